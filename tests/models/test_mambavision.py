import math

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks.mambavision import FIRST, LAST, NET, WIDER, anywhere
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.mambavision import (
    STATES,
    Attention,
    Block,
    ConvBlock,
    MambaVision,
    MambaVisionMixer,
    Stage,
    checkpoint_filter_fn,
)

TINY = {"stem_dim": 4, "dim": 4, "depths": (1, 1, 3, 2), "num_heads": (2, 4), "window_sizes": (3, 2), "stem_stride": 2}


def tiny(**options):
    torch.manual_seed(0)
    return MambaVision(num_classes=3, **{**TINY, **options})


# ---- slow loops, from the paper and the published code


def slow_conv(x, weight):
    """Convolve every channel of (L, D) with its three weights, one place to either side."""
    length = len(x)
    rows = []
    for place in range(length):
        seen = [(k, place + k - 1) for k in range(3) if 0 <= place + k - 1 < length]
        rows.append(sum(weight[:, 0, k] * x[other] for k, other in seen))
    return torch.stack(rows)


def slow_mixer(mixer, x):
    """Mix the places of one window (L, C)."""
    half = x.shape[1] // 2
    inside = x @ mixer.in_proj.weight.T
    first, second = (
        slow_conv(inside[:, :half], mixer.conv1d_x.weight),
        slow_conv(inside[:, half:], mixer.conv1d_z.weight),
    )
    u, z = first / (1 + torch.exp(-first)), second / (1 + torch.exp(-second))
    projected = u @ mixer.x_proj.weight.T
    rank = math.ceil(x.shape[1] / 16)
    h, outputs = torch.zeros(half, 8, dtype=x.dtype), []
    for place in range(len(x)):
        low, enter, leave = projected[place, :rank], projected[place, rank : rank + 8], projected[place, rank + 8 :]
        step = torch.log1p(torch.exp(mixer.dt_proj.weight @ low + 2 * mixer.dt_proj.bias))
        rate = -torch.exp(mixer.A_log)
        h = torch.exp(step[:, None] * rate) * h + (step * u[place])[:, None] * enter
        outputs.append(h @ leave + mixer.D * u[place])
    return torch.cat((torch.stack(outputs), z), 1) @ mixer.out_proj.weight.T


def slow_attention(layer, x):
    """Attend in one window (L, C)."""
    query, key, value = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=1)
    width = x.shape[1] // layer.num_heads
    out = torch.zeros_like(x)
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        rows = []
        for place in range(len(x)):
            scores = torch.stack([query[place, part] @ key[other, part] / width**0.5 for other in range(len(x))])
            weights = torch.exp(scores) / torch.exp(scores).sum()
            rows.append(sum(weight * value[other, part] for other, weight in enumerate(weights)))
        out = torch.cat((out[:, : part.start], torch.stack(rows), out[:, part.stop :]), 1)
    return out @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize(
    ("make", "slow"),
    [(lambda: MambaVisionMixer(34), slow_mixer), (lambda: Attention(12, 3), slow_attention)],
    ids=["mixer", "attention"],
)
def test_a_layer_is_the_slow_loop(make, slow, length):
    torch.manual_seed(0)
    layer = moved(make())
    width = layer.out_proj.out_features if isinstance(layer, MambaVisionMixer) else 12
    x = normal(2, length, width).requires_grad_()
    ours, theirs = layer(x), torch.stack([slow(layer, window) for window in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    given, weight = [x, *layer.parameters()], normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), given, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_the_scan_of_low_precision_has_exact_rates():
    mixer = MambaVisionMixer(16).bfloat16()
    with torch.no_grad():
        mixer.A_log.fill_(-3.015625)
    seen = {}

    def look(u, delta, A, *rest, **named):
        seen["A"] = A
        return u, None

    mixer.scan = look
    mixer(torch.zeros(1, 4, 16, dtype=torch.bfloat16))
    torch.testing.assert_close(seen["A"], torch.full((8, 8), -math.exp(-3.015625)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("window", "height", "width"), [(3, 6, 3), (3, 4, 8), (4, 2, 3), (2, 1, 1)])
def test_a_stage_fills_its_last_windows_with_zeros(window, height, width):
    torch.manual_seed(0)
    blocks = [Block(8, mixer, 2, drop_path=0, layer_scale=0) for mixer in (MambaVisionMixer(8), Attention(8, 2))]
    stage = moved(Stage(4, 8, window, blocks))
    x = normal(2, 4, 2 * height, 2 * width - 1)
    found = stage(x)
    inside = torch.conv2d(x, stage.downsample.weight, stride=2, padding=1)
    assert inside.shape == found.shape == (2, 8, height, width)
    for row in range(0, height, window):
        for column in range(0, width, window):
            part = torch.zeros(2, 8, window, window, dtype=x.dtype)
            seen = inside[:, :, row : row + window, column : column + window]
            part[:, :, : seen.shape[2], : seen.shape[3]] = seen
            places = part.flatten(2).transpose(1, 2)
            for block in blocks:
                places = block(places)
            expected = places.transpose(1, 2).reshape(part.shape)[:, :, : seen.shape[2], : seen.shape[3]]
            got = found[:, :, row : row + window, column : column + window]
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def layer_norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def test_a_block_adds_its_mixer_and_its_feed_forward():
    block = moved(Block(8, Attention(8, 2), 3.0, drop_path=0, layer_scale=0.5))
    x = normal(2, 5, 8)
    y = x + block.ls1.gamma * block.mixer(layer_norm(block.norm1, x))
    hidden = block.mlp.fc1(layer_norm(block.norm2, y))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    assert hidden.shape[-1] == 24
    torch.testing.assert_close(block(x), y + block.ls2.gamma * block.mlp.fc2(hidden), rtol=1e-9, atol=1e-9)


def batch_norm(layer, x, eps):
    shape = (1, -1, 1, 1)
    centred = (x - layer.running_mean.view(shape)) / (layer.running_var.view(shape) + eps).sqrt()
    return centred * layer.weight.view(shape) + layer.bias.view(shape)


def test_a_convolutional_block_adds_two_convolutions():
    block = moved(ConvBlock(4, drop_path=0)).eval()
    x = normal(2, 4, 5, 3)
    inside = batch_norm(block.norm1, F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1), 1e-5)
    inside = 0.5 * inside * (1 + torch.tanh((2 / math.pi) ** 0.5 * (inside + 0.044715 * inside**3)))
    inside = batch_norm(block.norm2, F.conv2d(inside, block.conv2.weight, block.conv2.bias, padding=1), 1e-5)
    torch.testing.assert_close(block(x), x + inside, rtol=1e-9, atol=1e-9)


# ---- the net


def test_the_net_is_stem_stages_norm_mean_and_head():
    model = moved(tiny()).eval()
    for value in (model.stem[1].running_var, model.stem[4].running_var, model.norm.running_var):
        value.uniform_(0.001, 0.002)  # so that the epsilons count
    x = normal(2, 3, 20, 28)
    inside = F.relu(batch_norm(model.stem[1], F.conv2d(x, model.stem[0].weight, stride=2, padding=1), 1e-4))
    inside = F.relu(batch_norm(model.stem[4], F.conv2d(inside, model.stem[3].weight, padding=1), 1e-4))
    for stage in model.stages:
        inside = stage(inside)
    pooled = batch_norm(model.norm, inside, 1e-5).mean((2, 3))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


def test_stem_halves_where_it_says_and_drop_path_rises():
    for stride in (1, 2, 4):
        assert tiny(stem_stride=stride).stem(torch.zeros(1, 3, 16, 12)).shape == (1, 4, 16 // stride, 12 // stride)
    model = tiny(drop_path_rate=0.6)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_weights_begin_as_published():
    model = create_model("mambavision_nano", num_classes=100, layer_scale=1e-5)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
            assert module.bias is None or not module.bias.any()
        if isinstance(module, MambaVisionMixer):
            row = torch.arange(1.0, STATES + 1)
            torch.testing.assert_close(module.A_log.detach().exp(), row.expand(module.A_log.shape))
            assert torch.equal(module.D.detach(), torch.ones_like(module.D))
    assert torch.equal(model.stages[3].blocks[1].ls2.gamma.detach(), torch.full((128,), 1e-5))
    assert not hasattr(tiny().stages[2].blocks[0].ls1, "gamma")


def test_variants_are_as_published():
    attends = {"t": (8, 4, 4, 2), "t2": (11, 5, 4, 2), "s": (7, 3, 5, 2), "b": (10, 5, 5, 2), "l": (10, 5, 5, 2)}
    attends |= {"l2": (12, 6, 5, 2), "l2_512": (12, 6, 5, 2), "l3_256": (20, 10, 10, 5), "l3_512": (20, 10, 10, 5)}
    counts = {"t": 31_794_248, "t2": 35_104_008, "s": 50_140_584, "b": 97_685_288, "l": 227_961_048}
    counts |= {"l2": 241_554_824, "l2_512": 241_554_824, "l3_256": 739_570_472, "l3_512": 739_570_472}
    windows = {"l2_512": [32, 16], "l3_256": [16, 8], "l3_512": [32, 16]}
    for name, (depth, count, last_depth, last_count) in attends.items():
        with torch.device("meta"):
            model = create_model(f"mambavision_{name}", num_classes=1000)
        assert count_parameters(model) == counts[name]
        for stage, blocks, attending in ((2, depth, count), (3, last_depth, last_count)):
            kinds = [isinstance(block.mixer, Attention) for block in model.stages[stage].blocks]
            assert kinds == [False] * (blocks - attending) + [True] * attending, name
        heads = [stage.blocks[-1].mixer.num_heads for stage in model.stages[2:]]
        assert heads == ([16, 32] if name.startswith("l") else [8, 16])
        assert [stage.window for stage in model.stages] == [None, None, *windows.get(name, [14, 7])]
        assert hasattr(model.stages[2].blocks[0].ls1, "gamma") == (name not in ("t", "t2", "s"))
        side = int(name.partition("_")[2] or 224)
        assert model.pretrained_cfg["input_size"] == (3, side, side)


def test_blocks_attend_where_they_are_told_to():
    model = tiny(attention=((0, 2), ()))
    kinds = [[isinstance(block.mixer, Attention) for block in stage.blocks] for stage in model.stages[2:]]
    assert kinds == [[True, False, True], [False, False]]


def test_the_scan_is_no_multiply_add_but_attention_is():
    mixer = 9 * (32 * 32 + 2 * 16 * 3 + 16 * (2 + 2 * STATES) + 2 * 16 + 32 * 32)
    attention = 9 * (32 * 96 + 32 * 32) + 2 * 9 * 9 * 32
    for layer, expected in ((MambaVisionMixer(32), mixer), (Attention(32, 4), attention)):
        with FlopCounterMode(display=False) as counter:
            layer.to("meta")(torch.zeros(1, 9, 32, device="meta"))
        assert counter.get_total_flops() == 2 * expected


def test_what_sets_the_rates_is_not_decayed():
    model = tiny()
    kept = next(
        group["params"]
        for group in param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        if not group["weight_decay"]
    )
    kept = {id(parameter) for parameter in kept}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in kept) == (parameter.ndim < 2 or name.endswith("A_log")), name


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin = tiny(layer_scale=0.1), tiny(layer_scale=0.2)
    theirs = {prefix + _authors_name(key): value + 1 for key, value in ours.state_dict().items()}
    names = ["patch_embed.conv_down.4.running_var", "levels.2.blocks.0.mixer.A_log", "levels.3.blocks.1.gamma_2"]
    names += ["levels.2.downsample.reduction.0.weight", "levels.1.blocks.0.conv1.bias", "norm.weight", "head.bias"]
    assert {prefix + name for name in names} <= set(theirs)
    for given in (theirs, {"state_dict": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def _authors_name(key):
    head, _, rest = key.partition(".")
    if head == "stem":
        return f"patch_embed.conv_down.{rest}"
    if head != "stages":
        return key
    stage, part, *rest = rest.split(".")
    if part == "downsample":
        return f"levels.{int(stage) - 1}.downsample.reduction.0.weight"
    if rest[1] in ("ls1", "ls2"):
        rest = [rest[0], f"gamma_{rest[1][-1]}"]
    return ".".join([f"levels.{stage}.blocks", *rest])


def test_any_size_dense_features_and_pooling():
    features = create_model("mambavision_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 19, 25), (64, 5, 7), (128, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    model = MambaVision(num_classes=0, global_pool="", **TINY)
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 32, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)


def test_arms_of_the_check_are_of_one_size():
    counts = []
    for options in (LAST, FIRST, anywhere(0), anywhere(1)):
        assert [len(stage) for stage in options] == [2, 1]
        counts.append(count_parameters(create_model("mambavision_nano", num_classes=10, attention=options, **NET)))
    assert len(set(counts)) == 1
    alone = create_model("mambavision_nano", num_classes=10, attention=((), ()), mlp_ratio=WIDER, **NET)
    assert count_parameters(alone) == pytest.approx(counts[0], rel=0.01)
    drawn = {anywhere(seed) for seed in range(60)}
    assert len(drawn) == 10
    assert not drawn & {LAST, FIRST}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\).*each of four stages"),
        ({"num_heads": (2,)}, r"num_heads = \(2,\).*each of the last two stages"),
        ({"window_sizes": (8, 8, 14, 7)}, "window_sizes = .* has 4 entries"),
        ({"attention": ((0,),)}, "attention = .* has 1 entries"),
        ({"num_heads": (2, 5)}, "num_heads = 5 does not divide a width of 32"),
        ({"num_heads": (0, 4)}, "num_heads = 0"),
        ({"window_sizes": (3, 0)}, "window_sizes = 0 .*1 place"),
        ({"attention": ((0, 3), ())}, "block 3 of a stage with 3 blocks.*0 to 2"),
        ({"stem_stride": 3}, "stem_stride = 3 .*1, 2 or 4"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
