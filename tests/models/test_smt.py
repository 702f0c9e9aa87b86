import math

import pytest
import torch
import torch.nn.functional as F
from timm.models import group_parameters

from exact import moved, normal, same
from vitrail.app.build import count_parameters
from vitrail.checks.smt import ARMS
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.smt import (
    SMT,
    Aggregation,
    Attention,
    Block,
    ConvMlp,
    MixedConv,
    Modulation,
    Stage,
    Stem,
    checkpoint_filter_fn,
)

TINY = {"dims": (4, 4, 8, 8), "depths": (1, 1, 4, 2), "kernels": (3, 5), "num_heads": (1, 1, 2, 4)}


def tiny(**options):
    torch.manual_seed(0)
    return SMT(**{"num_classes": 3, **TINY, **options})


# ---- slow loops, from the paper and the published code


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def slow_window(x, weight, bias):
    """Convolve each channel of (H, W, C) with a window of its own (C, k, k)."""
    height, width, _ = x.shape
    reach = weight.shape[-1] // 2
    rows = []
    for row in range(height):
        for column in range(width):
            total = bias
            for i in range(weight.shape[-1]):
                for j in range(weight.shape[-1]):
                    y, z = row + i - reach, column + j - reach
                    if 0 <= y < height and 0 <= z < width:
                        total = total + weight[:, i, j] * x[y, z]
            rows.append(total)
    return torch.stack(rows).reshape(x.shape)


def slow_conv(layer, x):
    return slow_window(x, layer.weight[:, 0], layer.bias)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def slow_modulation(mixer, x):
    """Modulate the values of one image (H, W, C)."""
    count = len(mixer.mixed.convs)
    width = x.shape[2] // count
    inside = linear(mixer.s, x)
    heads = [
        slow_conv(conv, inside[:, :, head * width : (head + 1) * width]) for head, conv in enumerate(mixer.mixed.convs)
    ]
    found = torch.cat(heads, 2)
    if mixer.aggregation is not None:
        layer = mixer.aggregation
        out = []
        for group in range(width):
            members = [heads[head][:, :, group] for head in range(count)]
            if not layer.across:
                members = [found[:, :, group * count + number] for number in range(count)]
            for number in range(2 * group * count, 2 * (group + 1) * count):
                weights = layer.proj0.weight[number, :, 0, 0]
                out.append(layer.proj0.bias[number] + sum(w * m for w, m in zip(weights, members, strict=True)))
        hidden = torch.stack(out, 2)
        norm = layer.norm
        hidden = (hidden - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
        found = linear(layer.proj1, gelu(hidden))
    return linear(mixer.proj, found * linear(mixer.v, x))


def slow_attention(layer, x):
    """Attend in one image (H, W, C)."""
    channels = x.shape[2]
    places = x.reshape(-1, channels)
    both = linear(layer.kv, places)
    query, key, value = linear(layer.q, places), both[:, :channels], both[:, channels:]
    width = channels // layer.num_heads
    out = []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.exp(query[:, part] @ key[:, part].T / width**0.5)
        out.append(scores @ value[:, part] / scores.sum(1, keepdim=True))
    local = slow_conv(layer.local_conv, value.reshape(x.shape))
    return linear(layer.proj, torch.cat(out, 1).reshape(x.shape) + local)


def slow_mlp(layer, x):
    hidden = linear(layer.fc1, x)
    return linear(layer.fc2, gelu(hidden + slow_conv(layer.dwconv, hidden)))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3)])
@pytest.mark.parametrize(
    ("make", "slow"),
    [
        (lambda: Modulation(12, (3, 5, 7)), slow_modulation),
        (lambda: Modulation(12, (3, 5), "within"), slow_modulation),
        (lambda: Modulation(12, (3, 5), "none"), slow_modulation),
        (lambda: Attention(12, 3), slow_attention),
        (lambda: ConvMlp(12, 20), slow_mlp),
    ],
    ids=["across", "within", "none", "attention", "mlp"],
)
def test_a_layer_is_the_slow_loop(make, slow, size):
    torch.manual_seed(0)
    layer = moved(make()).eval()
    x = normal(2, *size, 12).requires_grad_()
    same(layer(x), torch.stack([slow(layer, image) for image in x]), [x, *layer.parameters()])


def layer_norm(layer, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def test_a_block_adds_its_mixer_and_its_feed_forward():
    block = moved(Block(8, Attention(8, 2), 3.0, drop_path=0, layer_scale=0.5))
    x = 1e-3 * normal(2, 3, 2, 8)  # so that the epsilons count
    y = x + block.ls1.gamma * block.mixer(layer_norm(block.norm1, x, 1e-6))
    assert block.mlp.fc1.out_features == 24
    expected = y + block.ls2.gamma * block.mlp(layer_norm(block.norm2, y, 1e-6))
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_a_stage_is_a_convolution_a_norm_blocks_and_a_norm():
    torch.manual_seed(0)
    blocks = [Block(8, Attention(8, heads), 2, drop_path=0, layer_scale=0) for heads in (1, 2)]
    stage = moved(Stage(torch.nn.Conv2d(4, 8, 3, 2, 1), 8, blocks))
    stage.embed_norm.weight.data *= 1e-3
    x = 1e-3 * normal(2, 4, 5, 4)
    inside = F.conv2d(x, stage.embed.weight, stage.embed.bias, stride=2, padding=1).permute(0, 2, 3, 1)
    inside = layer_norm(stage.embed_norm, inside, 1e-5)
    for block in blocks:
        inside = block(inside)
    expected = layer_norm(stage.norm, inside, 1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(stage(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("stride", "kernel"), [(2, 3), (4, 3), (4, 7)])
def test_the_stem_fills_an_odd_plane_with_zeros(stride, kernel):
    torch.manual_seed(0)
    stem = moved(Stem(3, 4, kernel, stride)).eval()
    for size in ((8, 12), (9, 11), (1, 2), (10, 6)):
        x = normal(2, 3, *size)
        inside = F.conv2d(x, stem[0].weight, stride=stride // 2, padding=kernel // 2)
        shape = (1, -1, 1, 1)
        inside = (inside - stem[1].running_mean.view(shape)) / (1 + 1e-5) ** 0.5
        inside = F.relu(inside * stem[1].weight.view(shape) + stem[1].bias.view(shape))
        full = torch.zeros(2, 4, *(side + side % 2 for side in inside.shape[2:]), dtype=x.dtype)
        full[:, :, : inside.shape[2], : inside.shape[3]] = inside
        found = stem(x)
        assert found.shape[2:] == tuple(-(-side // stride) for side in size)
        torch.testing.assert_close(found, F.conv2d(full, stem[3].weight, stem[3].bias, stride=2))


# ---- the net


def test_the_net_is_stages_mean_and_head():
    model = moved(tiny()).eval()
    x = normal(2, 3, 40, 70)
    inside = x
    for stage in model.stages:
        inside = stage(inside)
    assert inside.shape == (2, 8, 2, 3)
    torch.testing.assert_close(model.forward_features(x), inside)
    pooled = inside.mean((2, 3))
    torch.testing.assert_close(model.forward_head(inside, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), linear(model.head, pooled))


def test_depth_rises_and_groups_follow_it():
    model = tiny(drop_path_rate=0.7, layer_scale=0.1)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    number = group_parameters(model, model.group_matcher(), reverse=True)
    assert number["stages.0.embed.0.weight"] == number["stages.0.embed_norm.bias"] == 0
    assert number["stages.2.blocks.3.norm1.weight"] < number["stages.3.blocks.0.norm1.weight"]
    assert number["stages.2.blocks.2.mlp.fc1.bias"] < number["stages.2.blocks.3.mlp.fc1.bias"]
    assert (
        number["stages.1.embed.weight"] == number["stages.1.embed_norm.bias"] == number["stages.1.blocks.0.ls1.gamma"]
    )
    assert number["stages.3.blocks.1.norm2.bias"] < number["stages.3.norm.weight"] < number["head.weight"]


def test_weights_begin_as_published():
    model = create_model("smt_nano", num_classes=100, dims=(32, 32, 64, 128), layer_scale=1e-4)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            std = (2 / module.out_features) ** 0.5 if name.endswith("proj1") else 0.02
            assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.15), name
            assert not module.bias.any()
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels / module.groups
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.3), name
            assert module.bias is None or not module.bias.any()
    assert torch.equal(model.stages[3].blocks[0].ls2.gamma.detach(), torch.full((128,), 1e-4))
    assert not hasattr(tiny().stages[2].blocks[0].ls1, "gamma")


def test_variants_are_as_published():
    counts = {"t": 11_506_536, "s": 22_550_952, "b": 32_037_352, "l": 80_620_264, "l_384": 80_620_264}
    for name, count in counts.items():
        with torch.device("meta"):
            model = create_model(f"smt_{name}", num_classes=1000)
        assert count_parameters(model) == count
        kinds = [[isinstance(block.mixer, Attention) for block in stage.blocks] for stage in model.stages]
        assert not any(kinds[0] + kinds[1])
        assert kinds[2] == [j % 2 == 1 for j in range(len(kinds[2]))]
        assert all(kinds[3])
        heads = [stage.blocks[-1].mixer.num_heads for stage in model.stages[2:]]
        assert heads == [8, 16]
        widths = [conv.kernel_size[0] for conv in model.stages[1].blocks[0].mixer.mixed.convs]
        assert widths == [3, 5, 7, 9]
        assert model.stages[0].embed[0].kernel_size[0] == (3 if name in ("t", "s") else 7)
        assert hasattr(model.stages[0].blocks[0].ls1, "gamma") == name.startswith("l")
        side = 384 if name == "l_384" else 224
        cfg = model.pretrained_cfg
        assert cfg["input_size"] == (3, side, side)
        assert (cfg["crop_pct"], cfg["crop_mode"]) == ((1.0, "squash") if name == "l_384" else (0.875, "center"))


def test_blocks_attend_where_they_are_told_to():
    model = tiny(attention=((0,), (), (2, 3), ()))
    kinds = [[isinstance(block.mixer, Attention) for block in stage.blocks] for stage in model.stages]
    assert kinds == [[True], [False], [False, False, True, True], [False, False]]


def test_the_parts_can_be_chosen():
    model = tiny(aggregation="none", kernels=(5,))
    mixer = model.stages[0].blocks[0].mixer
    assert mixer.aggregation is None
    assert isinstance(mixer.mixed, MixedConv)
    assert [conv.kernel_size for conv in mixer.mixed.convs] == [(5, 5)]
    assert tiny(aggregation="across").stages[0].blocks[0].mixer.aggregation.across
    within = tiny(aggregation="within").stages[0].blocks[0].mixer.aggregation
    assert isinstance(within, Aggregation)
    assert not within.across


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin = tiny(layer_scale=0.1), tiny(layer_scale=0.2)
    theirs = {}
    for key, value in ours.state_dict().items():
        value = value + 1
        theirs[prefix + _authors_name(key)] = value[..., None, None] if key.endswith("proj1.weight") else value
    names = ["patch_embed1.conv.0.weight", "patch_embed1.norm.bias", "patch_embed3.proj.weight", "norm3.weight"]
    names += ["block1.0.attn.local_conv_2.bias", "block1.0.attn.proj0.weight", "block1.0.attn.bn.running_var"]
    names += ["block3.1.attn.kv.weight", "block3.1.attn.local_conv.weight", "block4.1.mlp.dwconv.dwconv.bias"]
    names += ["block2.0.gamma_2", "block2.0.attn.proj.weight", "head.bias", "patch_embed4.norm.weight"]
    assert {prefix + name for name in names} <= set(theirs)
    for given in (theirs, {"model": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def _authors_name(key):
    if key.startswith("head"):
        return key
    _, stage, part, *rest = key.split(".")
    number = int(stage) + 1
    if part == "embed":
        return ".".join([f"patch_embed{number}", "conv" if number == 1 else "proj", *rest])
    if part in ("norm", "embed_norm"):
        return f"norm{number}.{rest[0]}" if part == "norm" else f"patch_embed{number}.norm.{rest[0]}"
    block, kind, *rest = rest
    if kind == "mixer":
        kind = "attn"
        if rest[0] == "mixed":
            rest = [f"local_conv_{int(rest[2]) + 1}", rest[3]]
        elif rest[0] == "aggregation":
            rest = ["bn" if rest[1] == "norm" else rest[1], rest[2]]
    elif rest[0] == "dwconv":
        rest = ["dwconv", *rest]
    elif kind in ("ls1", "ls2"):
        return f"block{number}.{block}.gamma_{kind[-1]}"
    return ".".join([f"block{number}.{block}", kind, *rest])


def test_any_size_dense_features_and_pooling():
    features = create_model("smt_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 19, 25), (64, 5, 7), (128, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    assert tiny().eval()(torch.randn(1, 3, 225, 190)).shape == (1, 3)
    model = tiny(num_classes=0, global_pool="")
    assert model(torch.zeros(2, 3, 33, 65)).shape == (2, 8, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(2, 3, 33, 65)).shape == (2, 4)


def test_arms_of_the_check_are_of_one_size():
    counts = {}
    for name, options in ARMS.items():
        counts[name] = count_parameters(create_model("smt_nano", num_classes=10, **options))
    assert counts["published"] == counts["within"]
    for name, count in counts.items():
        assert count == pytest.approx(counts["published"], rel=0.01), name
    assert math.prod(ARMS["two heads"]["kernels"]) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\).*each of four stages"),
        ({"num_heads": (2,)}, r"num_heads = \(2,\).*each of four stages"),
        ({"dims": (4, 4, 8)}, "dims = .* has 3 entries"),
        ({"mlp_ratios": (4,)}, "mlp_ratios = .* has 1 entries"),
        ({"attention": ((0,),)}, "attention = .* has 1 entries"),
        ({"num_heads": (1, 1, 2, 5)}, "5 heads of attention do not divide a width of 8"),
        ({"num_heads": (0, 1, 2, 4)}, "0 heads of attention"),
        ({"dims": (0, 4, 4, 8)}, r"dims = \(0, 4, 4, 8\) .*leaves a channel"),
        ({"mlp_ratios": (4, 4, 0, 2)}, r"mlp_ratios = \(4, 4, 0, 2\) .*leaves a channel"),
        ({"kernels": (3, 5, 7)}, "3 heads of the modulation do not divide a width of 4"),
        ({"kernels": (3, 4)}, r"kernels = \(3, 4\) .*odd"),
        ({"kernels": ()}, r"kernels = \(\) .*odd"),
        ({"stem_kernel": 2}, "stem_kernel = 2 .*odd"),
        ({"attention": ((), (), (4,), ())}, "block 4 of a stage with 4 blocks.*0 to 3"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2 or 4"),
        ({"aggregation": "acros"}, "unknown aggregation 'acros'.*'across'"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
