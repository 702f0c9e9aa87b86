import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from exact import moved, normal, same
from nets import pyramid
from vitrail.app.build import count_parameters
from vitrail.checks.l2vit import (
    ARMS,
    cost_curve,
    global_blocks,
    growth,
    influence_entropy,
    map_entropy,
    relative_entropy,
)
from vitrail.errors import InputError
from vitrail.models import create_model, l2vit
from vitrail.models.l2vit import (
    GlobalAttention,
    GlobalBlock,
    L2ViT,
    LocalBlock,
    LocalConcentration,
    PositionalEncoding,
    Stage,
    WindowAttention,
    checkpoint_filter_fn,
    default_cfgs,
    linear_attention,
)

TINY = {
    "num_classes": 3,
    "dims": (8, 8, 12, 16),
    "depths": (2, 1, 3, 2),
    "num_heads": (1, 2, 3, 4),
    "window": 3,
    "stem_stride": 2,
}


def tiny(**options):
    torch.manual_seed(0)
    return L2ViT(**{**TINY, **options})


# ---- slow loops, from the paper and the author's code


def slow_linear(query, key, value, temperature, floor):
    """Attend with one head, (N, d) each, place after place."""
    rows = []
    for q in query:
        scores = torch.stack([(q.clamp(min=0) * k.clamp(min=0)).sum() for k in key])
        total = scores.sum() if scores.sum() > floor else torch.tensor(floor, dtype=q.dtype)
        rows.append(temperature * sum(score * v for score, v in zip(scores, value)) / total)
    return torch.stack(rows)


def slow_softmax(query, key, value):
    rows = []
    for q in query:
        weights = torch.stack([(q @ k / math.sqrt(len(q))).exp() for k in key])
        rows.append(sum(weight * v for weight, v in zip(weights / weights.sum(), value)))
    return torch.stack(rows)


def slow_layer(layer, places):
    """Project (N, C), attend head by head, project again."""
    width = places.shape[1] // layer.num_heads
    query, key, value = (places @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=1)
    temperature, out = getattr(layer, "temperature", None), []
    for head in range(layer.num_heads):
        parts = [part[:, head * width : (head + 1) * width] for part in (query, key, value)]
        out.append(
            slow_softmax(*parts) if temperature is None else slow_linear(*parts, temperature[head, 0, 0], layer.floor)
        )
    return torch.cat(out, 1) @ layer.proj.weight.T + layer.proj.bias


def slow_windows(layer, image):
    """Attend in each window of (H, W, C), filled up with zeros behind."""
    height, width, dim = image.shape
    out = torch.zeros_like(image)
    for row in range(0, height, layer.window):
        for column in range(0, width, layer.window):
            seen = image[row : row + layer.window, column : column + layer.window]
            full = torch.zeros(layer.window, layer.window, dim, dtype=image.dtype)
            full[: seen.shape[0], : seen.shape[1]] = seen
            found = slow_layer(layer, full.reshape(-1, dim)).reshape(full.shape)
            out[row : row + seen.shape[0], column : column + seen.shape[1]] = found[: seen.shape[0], : seen.shape[1]]
    return out


def slow_depthwise(conv, image):
    """Convolve (H, W, C), with zeros beyond it."""
    height, width, reach = *image.shape[:2], conv.weight.shape[-1] // 2
    out = []
    for row in range(height):
        for column in range(width):
            total = conv.bias
            for r in range(max(0, row - reach), min(height, row + reach + 1)):
                for c in range(max(0, column - reach), min(width, column + reach + 1)):
                    total = total + conv.weight[:, 0, r - row + reach, c - column + reach] * image[r, c]
            out.append(total)
    return torch.stack(out).reshape(image.shape)


@pytest.mark.parametrize("floor", [1e-6, 2.0, 100.0])
@pytest.mark.parametrize("places", [1, 5])
def test_linear_attention_is_the_slow_loop(places, floor):
    query, key, value = (normal(2, 3, places, width, seed=i).requires_grad_() for i, width in enumerate((4, 4, 2)))
    temperature = normal(3, 1, 1, seed=5).requires_grad_()
    slow = torch.stack(
        [
            torch.stack([slow_linear(query[b, n], key[b, n], value[b, n], temperature[n, 0], floor) for n in range(3)])
            for b in range(2)
        ]
    )
    same(linear_attention(query, key, value, temperature, floor), slow, [query, key, value, temperature])


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_global_attention_is_the_slow_loop_and_shows_its_weights(kind):
    torch.manual_seed(0)
    layer = moved(GlobalAttention(6, 2, kind=kind, floor=1.5))
    x = normal(2, 2, 3, 6).requires_grad_()
    slow = torch.stack([slow_layer(layer, image.reshape(6, 6)).reshape(image.shape) for image in x])
    same(layer(x), slow, [x, *layer.parameters()])
    assert (layer.temperature is None) == (kind == "softmax")
    value = layer.heads(x)[2] * (1 if layer.temperature is None else layer.temperature)
    mixed = (layer.weights(x) @ value).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(mixed @ layer.proj.weight.T + layer.proj.bias, slow)


@pytest.mark.parametrize(("height", "width"), [(2, 4), (3, 2), (1, 1)])
def test_window_attention_is_the_slow_loop(height, width):
    torch.manual_seed(0)
    layer = moved(WindowAttention(6, 2, 2))
    x = normal(2, height, width, 6).requires_grad_()
    same(layer(x), torch.stack([slow_windows(layer, image) for image in x]), [x, *layer.parameters()])


def norm_of(layer, x):
    """Normalise over the channels of (B, H, W, C)."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def batch_norm(layer, x):
    """Normalise (B, H, W, C) as in evaluation."""
    return (x - layer.running_mean) / (layer.running_var + 1e-5).sqrt() * layer.weight + layer.bias


def feed_forward(block, x, ratio):
    hidden = block.mlp.fc1(norm_of(block.norm2, x))
    assert hidden.shape[-1] == ratio * x.shape[-1]
    return block.mlp.fc2(gelu(hidden))


def test_encoding_and_module_are_the_slow_loops():
    encoding, module = moved(PositionalEncoding(3)), moved(LocalConcentration(3)).eval()
    x = normal(2, 4, 5, 3).requires_grad_()
    slow = torch.stack([image + slow_depthwise(encoding.proj, image) for image in x])
    same(encoding(x), slow, [x, *encoding.parameters()])
    inside = batch_norm(module.bn, gelu(torch.stack([slow_depthwise(module.conv1, image) for image in x])))
    slow = torch.stack([slow_depthwise(module.conv2, image) for image in inside])
    same(module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), slow, [x, *module.parameters()])


def test_a_local_block_is_its_parts_in_order():
    block = moved(LocalBlock(6, 2, 2, 3.0, drop_path=0))
    x = normal(2, 3, 4, 6)
    y = block.cpe[0](x)
    y = block.cpe[1](y + block.attn(norm_of(block.norm1, y)))
    torch.testing.assert_close(block(x), y + feed_forward(block, y, 3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("concentration", [True, False])
def test_a_global_block_is_its_parts_in_order(concentration):
    block = moved(GlobalBlock(6, GlobalAttention(6, 2), 2.0, concentration=concentration, drop_path=0)).eval()
    x = normal(2, 3, 4, 6)
    y = block.cpe(x)
    y = y + block.attn(norm_of(block.norm1, y))
    if concentration:
        y = y + block.local_mp(norm_of(block.norm3, y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert (block.local_mp is None) != concentration
    torch.testing.assert_close(block(x), y + feed_forward(block, y, 2), rtol=1e-9, atol=1e-9)


def test_stochastic_depth_is_of_all_but_the_encodings():
    x = torch.randn(2, 3, 4, 6)
    torch.manual_seed(0)
    block = LocalBlock(6, 2, 2, 2.0, drop_path=0.999).train()
    torch.testing.assert_close(block(x), block.cpe[1](block.cpe[0](x)))
    block = GlobalBlock(6, GlobalAttention(6, 2), 2.0, concentration=True, drop_path=0.999).train()
    torch.testing.assert_close(block(x), block.cpe(x))


@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_a_stage_norms_fills_up_halves_and_runs_its_blocks(size):
    block = LocalBlock(6, 2, 2, 2.0, drop_path=0)
    stage = moved(Stage(4, 6, [block, block]))
    x = 0.01 * normal(2, 4, *size)
    inside = norm_of(stage.norm, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    full = torch.zeros(2, 4, 4, 6, dtype=x.dtype)
    full[:, :, : size[0], : size[1]] = inside
    inside = F.conv2d(full, stage.downsample.weight, stage.downsample.bias, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(stage(x), block(block(inside)).permute(0, 3, 1, 2), rtol=1e-9, atol=1e-9)


# ---- the net


@pytest.mark.parametrize("stride", [2, 4])
def test_the_net_is_stem_stages_norm_mean_and_head(stride):
    model = moved(tiny(stem_stride=stride)).eval()
    x = normal(2, 3, 45, 29)
    full = torch.zeros(2, 3, 48 if stride == 4 else 46, 32 if stride == 4 else 30, dtype=x.dtype)
    full[:, :, :45, :29] = x
    first, norm, _, second, after, last = model.stem
    with torch.no_grad():
        norm.bias += 9  # so that what was filled up counts behind the ReLU
    inside = F.conv2d(full, first.weight, first.bias, stride=2, padding=1).permute(0, 2, 3, 1)
    inside = F.relu(batch_norm(norm, inside)).permute(0, 3, 1, 2)
    inside = F.conv2d(inside, second.weight, second.bias, stride=stride // 2, padding=1).permute(0, 2, 3, 1)
    inside = norm_of(last, batch_norm(after, inside)).permute(0, 3, 1, 2)
    for stage in model.stages:
        inside = stage(inside)
    pooled = norm_of(model.norm, inside.permute(0, 2, 3, 1)).mean((1, 2))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


def test_blocks_are_local_and_global_in_turn_and_begin_as_published():
    model = tiny(drop_path_rate=0.7)
    kinds = [[type(block) is GlobalBlock for block in stage.blocks] for stage in model.stages]
    assert kinds == [[False, True], [False], [False, True, False], [False, True]]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * number for number in range(8)])
    for name, module in create_model("l2vit_nano", num_classes=100).named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.2), name
            assert not module.bias.any(), name
        if isinstance(module, GlobalAttention):
            assert torch.equal(module.temperature.detach(), torch.full((module.num_heads, 1, 1), 0.25))
            assert module.floor == 1


def test_variants_are_as_published(monkeypatch):
    with torch.device("meta"):
        model = create_model("l2vit_tiny", num_classes=1000)
        assert model(torch.zeros(2, 3, 225, 190)).shape == (2, 1000)
    assert count_parameters(model) == 28_596_781
    made = {}
    monkeypatch.setattr(l2vit, "create", lambda kind, name, pretrained, weights, **own: made.update({name: own}))
    for name in ("tiny", "small", "base", "base_384"):
        getattr(l2vit, f"l2vit_{name}")()
        defaults = {key: value.default for key, value in inspect.signature(L2ViT).parameters.items()}
        options = defaults | made[f"l2vit_{name}"]
        first, heads = (128, 4) if "base" in name else (96, 3)
        assert options["dims"] == tuple(first * 2**i for i in range(4))
        assert options["num_heads"] == tuple(heads * 2**i for i in range(4))
        assert options["depths"] == (2, 2, 6 if name == "tiny" else 18, 2)
        assert options["window"] == (12 if "384" in name else 7)
        assert (options["attention"], options["concentration"], options["floor"]) == ("linear", True, 100)
        assert (options["mlp_ratio"], options["stem_stride"]) == (4, 4)
        side = 384 if "384" in name else 224
        found = default_cfgs[f"l2vit_{name}"].default
        assert found.input_size == (3, side, side)
        assert (found.crop_pct, found.crop_mode) == ((1.0, "squash") if "384" in name else (0.875, "center"))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin = tiny(), tiny()
    state = {key: value + 1 for key, value in ours.state_dict().items()}
    theirs = {prefix + authors_name(key): value for key, value in state.items()}
    names = [
        "downsample_layers.0.proj.proj.4.running_var",
        "downsample_layers.0.norm.bias",
        "stages.2.1.cpe.0.proj.bias",
    ]
    names += ["downsample_layers.3.norm.weight", "downsample_layers.1.proj.weight", "stages.0.0.cpe.1.proj.weight"]
    names += ["stages.0.1.attn.temperature", "stages.3.1.local_mp.conv1.weight", "stages.2.1.cpe.0.proj.bias"]
    assert {prefix + name for name in names} <= set(theirs)
    average = {key: torch.zeros_like(value) for key, value in theirs.items()}
    for given in (theirs, {"model": theirs, "model_ema": average, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
        for key, value in twin.state_dict().items():
            assert torch.equal(value, state[key]), key
        twin = tiny()
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def authors_name(key):
    head, _, rest = key.partition(".")
    if head == "stem":
        return f"downsample_layers.0.norm{rest[1:]}" if rest[0] == "5" else f"downsample_layers.0.proj.proj.{rest}"
    if head != "stages":
        return key
    stage, part, rest = rest.split(".", 2)
    if part != "blocks":
        return f"downsample_layers.{stage}.{'proj' if part == 'downsample' else part}.{rest}"
    number, rest = rest.split(".", 1)
    if int(number) % 2:
        rest = rest.replace("cpe.", "cpe.0.")
    return f"stages.{stage}.{number}.{rest}"


def test_any_size_dense_features_and_pooling():
    assert pyramid("l2vit_nano", 0, 2, 3) == ([(16, 23, 31), (64, 6, 8), (128, 3, 4)], [2, 8, 16])
    model = tiny(num_classes=0, global_pool="")
    assert model(torch.zeros(2, 3, 17, 33)).shape == (2, 16, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(2, 3, 17, 33)).shape == (2, 4)


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = {}
    for name, options in ARMS.items():
        model = create_model("l2vit_nano", num_classes=10, **options)
        counts[name] = count_parameters(model)
        blocks = [block for block in model.modules() if isinstance(block, GlobalBlock)]
        assert {block.local_mp is not None for block in blocks} == {name == "module"}
        assert {block.attn.temperature is None for block in blocks} == {name == "softmax"}
    assert max(counts.values()) < 1.01 * min(counts.values())


def test_entropy_is_one_for_equal_shares_and_less_for_a_peak():
    shares = torch.tensor([[1.0, 1, 1, 1], [5, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(relative_entropy(shares), torch.tensor([1.0, 0, 0.5, math.nan]), equal_nan=True)


def test_what_is_measured_of_blocks():
    torch.manual_seed(0)
    images, found = torch.randn(2, 3, 32, 32), []
    for concentration in (True, False):
        model = create_model("l2vit_nano", num_classes=10, concentration=concentration).eval()
        seen = list(global_blocks(model, images))
        assert [x.shape[1] for _, x in seen] == [16, 8, 4]  # not the last stage's 2 x 2
        for block, _ in seen:
            width = block.attn.proj.in_features
            torch.nn.init.zeros_(block.attn.qkv.weight[: 2 * width])
            torch.nn.init.ones_(block.attn.qkv.bias)  # all places attend alike
            if concentration:
                torch.nn.init.zeros_(block.attn.proj.weight)  # the module alone acts
        assert map_entropy(model, images) == pytest.approx(1)
        found.append(influence_entropy(model, images))
    assert found[0] < 0.97 < found[1] <= 1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_only_linear_attention_costs_as_places_grow():
    curve = cost_curve((4, 8))
    assert growth(curve, "linear_madds") == [1]
    assert growth(curve, "softmax_madds")[0] > 1
    assert curve[0]["linear_madds"] == 16 * (96 * 96 * 4 + 2 * 96 * 32 + 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\) has 3 entries.*each of four stages"),
        ({"dims": (8,)}, r"dims = \(8,\) has 1 entries"),
        ({"num_heads": (2, 2)}, r"num_heads = \(2, 2\) has 2 entries"),
        ({"num_heads": (1, 2, 3, 5)}, "num_heads = 5 does not divide a width of 16"),
        ({"num_heads": (0, 2, 3, 4)}, "num_heads = 0 does not divide a width of 8"),
        ({"attention": "liner"}, "unknown attention 'liner': did you mean 'linear'"),
        ({"window": 0}, "window = 0 .*1 place"),
        ({"floor": 0.0}, "floor = 0.0 .*above 0"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2 or 4"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
