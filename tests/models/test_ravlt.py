import math

import pytest
import torch
import torch.nn.functional as F

from exact import moved, normal
from once import quick_run
from vitrail.app.build import count_parameters
from vitrail.checks import ravlt as check
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.ravlt import (
    FORMS,
    RAVLT,
    Attention,
    checkpoint_filter_fn,
    key_weights,
    linear_attention,
    plane_rotation,
)

SIZES = [(1, 1), (1, 4), (3, 1), (2, 3)]
TINY = {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (2, 2.5), "head_width": 12}
TINY |= {"attention": ("rala", "softmax"), "layer_scale": (0, 0.5), "stem_stride": 2}


def tiny(**options):
    torch.manual_seed(0)
    return RAVLT(num_classes=3, **{**TINY, **options})


def exact_angles(height, width, dim):
    return type(plane_rotation(1, 1, 4))(*(table.double() for table in plane_rotation(height, width, dim)))


# ---- slow loops, from the paper and the published code


def slow_turn(vector, row, column):
    """Turn the pairs of one vector: those of its first half by the row, the others by the column."""
    out, half = vector.clone(), len(vector) // 2
    pairs = half // 2
    for start, place in ((0, row), (half, column)):
        for i in range(pairs):
            angle = place / 10000 ** (i / max(pairs - 1, 1))
            one, two = vector[start + 2 * i], vector[start + 2 * i + 1]
            out[start + 2 * i] = one * math.cos(angle) - two * math.sin(angle)
            out[start + 2 * i + 1] = two * math.cos(angle) + one * math.sin(angle)
    return out


def kernel(vector):
    return torch.where(vector > 0, vector + 1, vector.exp())


def slow_head(query, key, value, height, width, form):
    """Attend in one head of one image, (L, d)."""
    length, dim = query.shape
    places = [(i // width, i % width) for i in range(length)]
    turned = [slow_turn(key[j] if form == "softmax" else kernel(key[j]), *places[j]) for j in range(length)]
    out = []
    if form == "softmax":
        for i in range(length):
            asks = slow_turn(query[i], *places[i])
            weights = [torch.exp(asks @ turned[j] / dim**0.5) for j in range(length)]
            out.append(sum(w * value[j] for j, w in enumerate(weights)) / sum(weights))
        return torch.stack(out)
    alphas = [1.0] * length
    if form == "rala":
        mean = sum(kernel(query[i]) for i in range(length)) / length
        scores = [torch.exp(mean @ kernel(key[j]) / dim**0.5) for j in range(length)]
        alphas = [length * score / sum(scores) for score in scores]
    buffer = sum(a * torch.outer(turned[j], value[j]) for j, a in enumerate(alphas)) / length
    total = sum(a * kernel(key[j]) for j, a in enumerate(alphas)) / length
    for i in range(length):
        asks = kernel(query[i])
        out.append(slow_turn(asks, *places[i]) @ buffer / (asks @ total + 1e-6))
    return torch.stack(out)


def slow_layer(layer, x):
    """Attend in one image (H, W, C)."""
    height, width, dim = x.shape
    parts = (x.reshape(-1, dim) @ layer.qkvo.weight.T + layer.qkvo.bias).split(dim, 1)
    heads = [[part.split(dim // layer.num_heads, 1)[n] for part in parts[:3]] for n in range(layer.num_heads)]
    mixed = torch.cat([slow_head(*head, height, width, layer.form) for head in heads], 1).reshape(x.shape)
    values, local = parts[2].reshape(x.shape), torch.zeros_like(x)
    for y in range(height):
        for c in range(width):
            for i in range(max(0, y - 2), min(height, y + 3)):
                for j in range(max(0, c - 2), min(width, c + 3)):
                    local[y, c] = local[y, c] + values[i, j] * layer.lepe.weight[:, 0, i - y + 2, j - c + 2]
    y = mixed + local + layer.lepe.bias
    if layer.modulated:
        y = y * parts[3].reshape(x.shape)
    return y @ layer.proj.weight.T + layer.proj.bias


def same_with_gradients(ours, theirs, given, tolerance=1e-8):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), given, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_the_slow_loop(form, height, width):
    torch.manual_seed(0)
    layer = moved(Attention(16, 2, form, modulated=form != "linear"))
    x = normal(2, height, width, 16).requires_grad_()
    ours = layer(x, exact_angles(height, width, 8))
    theirs = torch.stack([slow_layer(layer, image) for image in x])
    # The frequencies are of single precision.
    same_with_gradients(ours, theirs, [x, *layer.parameters()], tolerance=1e-6)


def test_the_weights_of_keys_are_of_sum_one_and_favour_what_the_mean_query_asks():
    query, key = torch.ones(1, 1, 3, 4), torch.zeros(1, 1, 5, 4)
    key[0, 0, 2] = 2.0
    weights = key_weights(query, key)
    assert weights.shape == (1, 1, 1, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 1))
    assert weights[0, 0, 0, 2] / weights[0, 0, 0, 0] == pytest.approx(math.exp(8 / 2))


def test_alike_keys_weigh_alike():
    query, value = normal(2, 1, 6, 8), normal(2, 1, 6, 8, seed=1)
    key = normal(2, 1, 1, 8, seed=2).expand(-1, -1, 6, -1)
    angles = exact_angles(2, 3, 8)
    for ours, plain in zip(*(linear_attention(query, key, value, angles, weighted=w) for w in (True, False))):
        torch.testing.assert_close(ours, plain)


def test_a_buffer_of_alike_values_is_of_rank_one_and_its_output_too():
    value = torch.outer(torch.ones(12).double(), normal(8)).expand(1, 1, 12, 8)
    still = type(plane_rotation(1, 1, 4))(torch.ones(12, 8).double(), torch.zeros(12, 8).double())
    buffer, out = linear_attention(normal(1, 1, 12, 8), normal(1, 1, 12, 8, seed=1), value, still, weighted=True)
    assert torch.linalg.matrix_rank(buffer) == 1
    torch.testing.assert_close(out, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_probe_asks_is_what_the_layer_computes(form):
    torch.manual_seed(0)
    layer = moved(Attention(16, 2, form))
    with torch.no_grad():
        layer.lepe.weight.zero_()
        layer.lepe.bias.zero_()
    x, angles = normal(2, 2, 3, 16), exact_angles(2, 3, 8)
    buffer, features = layer.attention_features(x, angles)
    assert features.shape == (2, 2, 6, 8)
    torch.testing.assert_close(layer.proj(features.transpose(1, 2).reshape(x.shape)), layer(x, angles))
    if form == "softmax":
        assert buffer is None
    else:
        query, key, value = (layer._heads(part) for part in layer.qkvo(x).split(16, -1)[:3])
        expected = linear_attention(query, key, value, angles, weighted=form == "rala")[0]
        torch.testing.assert_close(buffer, expected)


def test_a_block_adds_position_attention_and_feed_forward():
    model = tiny().double()
    block, prior = model.stages[1].blocks[0], model.stages[1].prior
    x, angles = normal(1, 3, 2, 16), prior(3, 2, torch.device("cpu"))

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    torch.nn.init.normal_(block.ls1.gamma)
    torch.nn.init.normal_(block.ls2.gamma)
    y = x + block.pos(x)
    y = y + block.ls1.gamma * block.attn(norm(y), angles)
    hidden = F.gelu(block.mlp.fc1(norm(y)))
    assert hidden.shape[-1] == 40
    y = y + block.ls2.gamma * block.mlp.fc2(hidden + block.mlp.dwconv(hidden))
    torch.testing.assert_close(block(x, angles), y, rtol=1e-9, atol=1e-9)


# ---- the net


def test_the_head_projects_normalises_and_then_pools():
    model = moved(tiny()).eval()
    model.norm.running_var.uniform_(0.5, 1.5)
    x = model.forward_features(normal(2, 3, 20, 12))
    tokens = torch.einsum("bchw,oc->bhwo", x, model.proj.weight) + model.proj.bias
    tokens = (tokens - model.norm.running_mean) / (model.norm.running_var + 1e-5).sqrt()
    tokens = tokens * model.norm.weight + model.norm.bias
    pooled = (tokens * tokens.sigmoid()).mean((1, 2))
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), pooled)
    torch.testing.assert_close(model.forward_head(x), model.head(pooled))


def test_stem_halves_where_it_says_and_drop_path_rises():
    strides = {1: [1, 1, 1, 1], 2: [2, 1, 1, 1], 4: [2, 1, 1, 2]}
    for stride, expected in strides.items():
        stem = tiny(stem_stride=stride).stem
        assert [conv.stride[0] for conv in stem if isinstance(conv, torch.nn.Conv2d)] == expected
        assert [conv.out_channels for conv in stem if isinstance(conv, torch.nn.Conv2d)] == [4, 4, 4, 8]
        assert isinstance(stem[-1], torch.nn.BatchNorm2d)
    model = create_model("ravlt_nano", num_classes=2, drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    block = model.stages[3].blocks[0].train()
    block.drop_path.drop_prob = 1 - 1e-9  # both branches, in this draw
    x = torch.randn(2, 3, 2, 128)
    torch.testing.assert_close(block(x, model.stages[3].prior(3, 2, x.device)), x + block.pos(x))


def test_the_stem_is_convolutions_with_gelu():
    stem = moved(tiny().stem).eval()
    x = normal(2, 3, 7, 6)
    y = x
    for place in (0, 3, 6):
        y = stem[place + 1](stem[place](y))
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    torch.testing.assert_close(stem(x), stem[10](stem[9](y)))


def test_the_angles_of_one_size_are_not_taken_for_another():
    prior = tiny().stages[0].prior
    for size in ((2, 3), (2, 5), (4, 5)):
        torch.testing.assert_close(prior(*size, torch.device("cpu")), plane_rotation(*size, 8))


def test_weights_begin_as_published():
    model = create_model("ravlt_nano", num_classes=100)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
            assert not module.bias.any()
    assert torch.equal(model.stages[2].blocks[1].ls2.gamma.detach(), torch.ones(96))
    assert not hasattr(tiny().stages[0].blocks[0].ls1, "gamma")


def test_variants_are_as_published():
    heads = {"t": [1, 2, 4, 8], "s": [1, 2, 5, 8], "b": [1, 2, 6, 8], "l": [1, 2, 7, 10]}
    counts = {"t": 14_897_768, "s": 25_591_208, "b": 48_241_288, "l": 95_242_440}
    scales = {"t": [1, 1, 1, 1], "s": [1, 1, 1, 1], "b": [1, 1, 1e-6, 1e-6], "l": [1e-6] * 4}
    for name, count in counts.items():
        with torch.device("meta"):
            model = create_model(f"ravlt_{name}", num_classes=1000)
        assert count_parameters(model) == count
        last = [stage.blocks[-1] for stage in model.stages]
        assert [block.attn.num_heads for block in last] == heads[name]
        assert [block.attn.form for block in last] == ["rala", "rala", "softmax", "softmax"]
        assert all(block.attn.modulated for block in last)
        assert [block.ls1.init_values for block in last] == scales[name]
        assert model.pretrained_cfg["input_size"] == (3, 224, 224)


def test_it_attends_as_it_is_told_to():
    model = tiny(attention=("linear", "rala"), modulated=False)
    layers = [stage.blocks[0].attn for stage in model.stages]
    assert [(layer.form, layer.modulated, layer.qkvo.out_features) for layer in layers] == [
        ("linear", False, 24),
        ("rala", False, 48),
    ]
    assert tiny().stages[0].blocks[0].attn.qkvo.out_features == 32


def test_low_precision_does_not_reach_the_angles():
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(x)
        found = model.bfloat16()(x.bfloat16()).float()
    assert all(table.dtype == torch.float32 for table in model.stages[0].prior(32, 32, x.device))
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin = tiny(layer_scale=(0.1, 0.2)), tiny(layer_scale=(0.3, 0.4))
    theirs = {f"layers.{i}.RoPE.angle": torch.zeros(3) for i in range(2)}
    theirs |= {_authors_name(key): _authors_shape(key, value + 1) for key, value in ours.state_dict().items()}
    names = ["patch_embed.proj.0.weight", "layers.0.downsample.reduction.bias", "layers.1.blocks.0.norm1.norm.weight"]
    names += ["layers.1.blocks.0.ffn.dwconv.weight", "layers.0.blocks.0.gamma_2", "layers.0.blocks.0.attn.qkvo.weight"]
    assert set(names) <= set(theirs)
    assert theirs["layers.0.blocks.0.attn.qkvo.weight"].shape == (32, 8, 1, 1)
    assert theirs["layers.0.blocks.0.gamma_2"].shape == (1, 8, 1, 1)
    theirs = {prefix + key: value for key, value in theirs.items()}
    for given in (theirs, {"model": theirs}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def _authors_name(key):
    head, _, rest = key.partition(".")
    if head == "stem":
        return f"patch_embed.proj.{rest}"
    if head != "stages":
        return key
    stage, part, *rest = rest.split(".")
    if part == "downsample":
        return f"layers.{int(stage) - 1}.downsample.{'reduction' if rest[0] == '0' else 'norm'}.{rest[1]}"
    number, layer, *rest = rest
    end = {"ls1": ["gamma_1"], "ls2": ["gamma_2"], "mlp": ["ffn", *rest]}.get(layer, [layer, *rest])
    if layer in ("norm1", "norm2"):
        end = [layer, "norm", *rest]
    return ".".join([f"layers.{stage}.blocks.{number}", *end])


def _authors_shape(key, value):
    if key.endswith("gamma"):
        return value.view(1, -1, 1, 1)
    return value[:, :, None, None] if value.ndim == 2 else value


def test_any_size_dense_features_and_pooling():
    features = create_model("ravlt_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 19, 25), (96, 5, 7), (128, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    large = create_model("ravlt_nano", num_classes=4, stem_stride=4).eval()
    with torch.no_grad():
        assert large(torch.zeros(1, 3, 225, 190)).shape == large(torch.zeros(1, 3, 224, 224)).shape == (1, 4)
    model = RAVLT(num_classes=0, global_pool="", **TINY)
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 16, 5, 9)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\).*one for each stage"),
        ({"attention": ("rala",)}, "attention = .* has 1 entries"),
        ({"num_heads": (1, 3)}, "embed_dims = 16 with num_heads = 3 .*multiple of four times"),
        ({"num_heads": (0, 2)}, "num_heads = 0"),
        ({"embed_dims": (8, 12)}, "embed_dims = 12 with num_heads = 2"),
        ({"attention": ("rala", "softmx")}, "unknown attention 'softmx'.*'softmax'"),
        ({"stem_stride": 3}, "stem_stride = 3 .*1, 2 or 4"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = {
        name: count_parameters(create_model("ravlt_nano", num_classes=10, **options))
        for name, options in check.ARMS.items()
    }
    assert counts["linear"] == counts["softmax"]
    assert counts["rala"] == counts["modulation alone"]
    assert counts["linear"] == pytest.approx(counts["rala"], rel=0.002)


def test_shares_are_of_layers_whose_places_do_not_limit_them():
    rows = [{"effective": 3.0, "full": 4, "places": 9, "channels": 4}]
    rows += [
        {"effective": 1.0, "full": 4, "places": 4, "channels": 4},
        {"effective": 1, "full": 1, "places": 1, "channels": 4},
    ]
    assert check.share(rows, "effective", "full") == pytest.approx(0.5)


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert set(verdict.findings[0].arms) == set(check.ARMS)
    assert "softmax" not in verdict.findings[1].arms
    assert [finding.outcome for finding in verdict.findings[4:]] == ["confirmed", "confirmed"]
    assert [row["places"] for row in verdict.tables["cost of attention"]] == [49, 196]
    assert {row["kind"] for row in verdict.tables["ranks, first seed"]} == {"rala", "linear", "softmax"}
