import math

import pytest
import torch
import torch.nn.functional as F
from timm.models import group_parameters

from exact import moved, normal, same
from nets import loads, pyramid
from vitrail.app.build import count_parameters
from vitrail.checks.sbcformer import ARMS, latencies, latency_rows, published_sizes
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.sbcformer import (
    Attention,
    ConvNorm,
    Hourglass,
    InvertedResidual,
    SBCFormer,
    Transformer,
    checkpoint_filter_fn,
)

TINY = {
    "num_classes": 3,
    "dims": (8, 8, 12),
    "num_heads": (1, 2, 3),
    "key_dim": 2,
    "depths_invres": (1, 0, 1),
    "depths_mixer": (0, 1, 1),
    "depths_mattn": (1, 2, 1),
    "side": 3,
    "stem_stride": 2,
}


def tiny(**options):
    torch.manual_seed(0)
    return SBCFormer(**{**TINY, **options})


# ---- slow loops, from the paper and the published code


def conv_norm(layer, x):
    """Convolve (B, C, H, W) and normalise with the stored statistics."""
    conv, norm = layer
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.kernel_size[0] // 2, 1, conv.groups)
    y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def layer_norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def slow_inverted(block, x):
    return x + conv_norm(block.project, gelu(conv_norm(block.depthwise, gelu(conv_norm(block.expand, x)))))


def slow_attention(layer, x):
    """Attend among the places of one map (H, W, C), place by place; the biases are those of this size."""
    height, width, _ = x.shape
    heads, wide = layer.num_heads, layer.key_dim
    both = linear(layer.qkv, x)
    query, key, value = both.split((heads * wide, heads * wide, both.shape[2] - 2 * heads * wide), -1)
    local = gelu(conv_norm(layer.local, value.permute(2, 0, 1)[None]))[0].permute(1, 2, 0)
    value = value + local
    deep = value.shape[2] // heads
    places = [(row, column) for row in range(height) for column in range(width)]
    out = []
    for row, column in places:
        parts = []
        for head in range(heads):
            mine, own = slice(head * wide, (head + 1) * wide), slice(head * deep, (head + 1) * deep)
            scores = torch.stack(
                [
                    query[row, column, mine] @ key[r, c, mine] / math.sqrt(wide)
                    + layer.bias[head, abs(r - row), abs(c - column)]
                    for r, c in places
                ]
            )
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weight * value[r, c, own] for weight, (r, c) in zip(weights, places)))
        out.append(torch.cat(parts))
    return linear(layer.proj, torch.stack(out).reshape(height, width, -1))


def slow_transformer(block, x):
    x = x + block.attn(layer_norm(block.norm1, x))
    return x + linear(block.mlp.fc2, gelu(linear(block.mlp.fc1, layer_norm(block.norm2, x))))


def slow_hourglass(block, x):
    """Shrink by means over windows, attend, grow by spreading each place, gate and fuse."""
    pool = block.pool.kernel_size
    for part in block.local:
        x = slow_inverted(part, x)
    height, width = x.shape[2:]
    small = torch.stack(
        [
            torch.stack([x[:, :, r : r + pool, c : c + pool].mean((2, 3)) for c in range(0, width, pool)], -1)
            for r in range(0, height, pool)
        ],
        -2,
    )
    for part in block.mixer:
        small = slow_inverted(part, small)
    small = small.permute(0, 2, 3, 1)
    for part in block.blocks:
        small = part(small)
    wide = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            spread = block.grow.weight[:, 0, row % pool, column % pool]
            wide[:, :, row, column] = small[:, row // pool, column // pool] * spread + block.grow.bias
    norm = block.norm
    wide = (wide - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    wide = wide * norm.weight[:, None, None] + norm.bias[:, None, None]
    gate = ((conv_norm(block.gate, wide) + 3).clamp(0, 6)) / 6
    return conv_norm(block.fuse, torch.cat((wide, x * gate), 1))


def test_an_inverted_residual_is_its_layers():
    block = moved(InvertedResidual(3, 6)).eval()
    x = normal(2, 3, 4, 5).requires_grad_()
    same(block(x), slow_inverted(block, x), [x, *block.parameters()])


@pytest.mark.parametrize(("side", "ratio"), [(2, 2.0), (3, 1.5)])
def test_attention_is_the_slow_loop(side, ratio):
    layer = moved(Attention(6, 2, 2, ratio, side)).eval()
    assert layer.proj.in_features == 2 * int(2 * ratio)
    x = normal(2, side, side, 6).requires_grad_()
    same(layer(x), torch.stack([slow_attention(layer, image) for image in x]), [x, *layer.parameters()])


@pytest.mark.parametrize(("height", "width"), [(5, 3), (2, 7), (1, 1)])
def test_biases_of_another_size_are_those_of_the_same_share_of_the_map(height, width):
    layer = moved(Attention(6, 2, 2, 1.0, 3))
    bias = layer.position_bias(height, width).reshape(2, height, width, height, width)

    def share(distance, side):
        """Return the lower entry of the table that a distance lies at, and how far beyond it."""
        place = 2 * distance / (side - 1) if side > 1 else 0
        low = min(int(place), 1)
        return low, place - low

    for head in range(2):
        for row, column, r, c in [(0, 0, height - 1, width - 1), (height - 1, 0, 0, width // 2), (0, 0, 0, 0)]:
            (i, down), (j, right) = share(abs(row - r), height), share(abs(column - c), width)
            cell = layer.bias[head, i : i + 2, j : j + 2]
            upper, lower = ((1 - right) * line[0] + right * line[1] for line in cell)
            expected = (1 - down) * upper + down * lower
            torch.testing.assert_close(bias[head, row, column, r, c], expected)


def test_a_transformer_adds_its_attention_and_its_feed_forward():
    block = moved(Transformer(6, Attention(6, 2, 2, 1.0, 2), 3.0, 0.0)).eval()
    x = 0.01 * normal(2, 2, 2, 6)  # small values, so that the epsilon counts
    assert block.mlp.fc1.out_features == 18
    torch.testing.assert_close(block(x), slow_transformer(block, x), rtol=1e-9, atol=1e-9)
    dropped = Transformer(6, Attention(6, 2, 2, 1.0, 2), 3.0, 0.999).double().train()
    torch.manual_seed(0)
    assert torch.equal(dropped(x), x)


@pytest.mark.parametrize(("size", "pool"), [((4, 6), 2), ((5, 3), 2), ((5, 4), 4)])
def test_an_hourglass_is_the_slow_loop(size, pool):
    transformers = [Transformer(4, Attention(4, 2, 2, 1.0, 2), 2.0, 0.0) for _ in range(2)]
    block = moved(Hourglass(4, 1, 1, transformers, invres_ratio=3, pool=pool)).eval()
    assert block.local[0].expand[0].out_channels == 12
    assert block.mixer[0].expand[0].out_channels == 8
    x = normal(2, 4, *size).requires_grad_()
    given = [x, *block.local.parameters(), *block.fuse.parameters()]
    same(block(x), slow_hourglass(block, x), given, 1e-7)  # torch's gate has a sixth in single precision


def test_an_hourglass_may_have_no_narrow_part():
    block = moved(Hourglass(4, 0, 0, [], invres_ratio=2, pool=1)).eval()
    x = normal(2, 4, 3, 5)
    gate = ((conv_norm(block.gate, x) + 3).clamp(0, 6)) / 6
    torch.testing.assert_close(block(x), conv_norm(block.fuse, torch.cat((x, x * gate), 1)))


# ---- the net


@pytest.mark.parametrize(("stride", "strides"), [(2, (2, 1, 1)), (4, (2, 2, 1)), (8, (2, 2, 2))])
def test_the_net_is_stem_stages_mean_norm_and_head(stride, strides):
    model = moved(tiny(stem_stride=stride)).eval()
    x = 0.01 * normal(2, 3, 45, 61)
    convs = [part for part in model.stages[0].merge if isinstance(part, ConvNorm)]
    assert tuple(conv[0].stride[0] for conv in convs) == strides
    assert [conv[0].out_channels for conv in convs] == [2, 4, 8]
    inside = x
    for conv in convs:
        inside = conv_norm(conv, inside).clamp(min=0)
    first, second, third = model.stages
    inside = first.hourglass(inside)
    inside = second.hourglass(conv_norm(second.merge, inside))
    inside = third.hourglass(conv_norm(third.merge, inside))
    assert inside.shape[2:] == tuple(-(-side // (4 * stride)) for side in (45, 61))
    torch.testing.assert_close(model.forward_features(x), inside)
    pooled = layer_norm(model.norm, inside.mean((2, 3)))
    torch.testing.assert_close(model.forward_head(inside, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), linear(model.head, pooled))


def test_drop_path_rises_and_weights_begin_as_published():
    model = tiny(drop_path_rate=0.3)
    blocks = [module for module in model.modules() if isinstance(module, Transformer)]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    model = create_model("sbcformer_nano", num_classes=100)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            std = math.sqrt(2 / module.out_features) if name.endswith("qkv") else 0.02
            assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.15), name
            assert not module.bias.any()
        if type(module) is torch.nn.Conv2d and module.weight.numel() > 500:
            fan_out = module.kernel_size[0] ** 2 * module.out_channels / module.groups
            assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.15), name
        if isinstance(module, torch.nn.ConvTranspose2d):  # as torch begins it
            assert float(module.weight.detach().abs().max()) <= 1 / module.kernel_size[0]
        if isinstance(module, Attention):
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("name", "parameters", "dims", "heads", "key_dim", "depths", "ratio"),
    [
        ("xs", 5_594_161, (96, 160, 288), (3, 5, 6), 16, (2, 3, 2), 2),
        ("s", 8_465_407, (96, 192, 320), (3, 5, 7), 16, (2, 4, 3), 2),
        ("b", 13_830_592, (128, 256, 384), (4, 6, 8), 24, (2, 4, 3), 2),
        ("l", 18_506_672, (192, 288, 384), (4, 6, 8), 32, (2, 4, 3), 4),
    ],
)
def test_variants_are_as_published(name, parameters, dims, heads, key_dim, depths, ratio):
    with torch.device("meta"):
        model = create_model(f"sbcformer_{name}", num_classes=1000)
    assert count_parameters(model) == parameters
    assert [info["reduction"] for info in model.feature_info] == [8, 16, 32]
    for stage, dim, count, depth, pool in zip(model.stages, dims, heads, depths, (4, 2, 1)):
        block = stage.hourglass
        assert getattr(block.pool, "kernel_size", 1) == pool
        assert (len(block.blocks), len(block.mixer)) == (depth, 2)
        assert block.local[0].expand[0].out_channels == ratio * dim
        attention = block.blocks[0].attn
        assert (attention.num_heads, attention.key_dim, attention.bias.shape) == (count, key_dim, (count, 7, 7))
    assert [len(stage.hourglass.local) for stage in model.stages] == [2, 2, 1]
    assert model.pretrained_cfg["crop_pct"] == 0.875


def authors_name(key):
    """Return the key of the authors' net that holds a weight of ours."""
    parts = key.split(".")
    if parts[0] != "stages":
        return key
    kinds = {"0": "conv", "1": "bn"}
    stage, part, *rest = parts[1:]
    if part == "merge":
        if stage == "0":
            return f"merging_blocks.0.stem.{rest[0]}.{kinds[rest[1]]}.{rest[2]}"
        return f"merging_blocks.{stage}.{'conv' if rest[0] == '0' else 'norm'}.{rest[1]}"
    own = {"local": "invres_blocks.InvRes_", "mixer": "mixer.Mixer_", "blocks": "trans_blocks.MAttn_"}
    words = {"expand": "pwconv1_bn", "depthwise": "dwconv_bn", "project": "pwconv2_bn"}
    head, *tail = rest
    if head in own:
        head, tail = own[head] + tail[0], tail[1:]
    else:
        head = {"grow": "convTrans", "gate": "proj", "fuse": "proj_fuse"}.get(head, head)
    tail = [words.get(word, word) for word in tail]
    if tail[0] == "attn":
        tail[1] = {"qkv": "pwconv", "local": "dwconv", "proj": "proj_out", "bias": "attention_biases"}[tail[1]]
    if len(tail) > 1 and tail[-2] in kinds:
        tail[-2] = kinds[tail[-2]]
    return ".".join(["sbcformer_blocks", stage, head, *tail])


def test_the_authors_keys_become_ours():
    ours, twin = tiny(), tiny()
    state = {key: value + torch.arange(value.numel()).reshape(value.shape) for key, value in ours.state_dict().items()}
    theirs = {}
    for key, value in state.items():
        if key.endswith("qkv.weight"):
            value = value[:, :, None, None]
        elif key.endswith("attn.bias"):
            value = value.flatten(1)
        theirs[authors_name(key)] = value
    names = ["merging_blocks.0.stem.4.bn.bias", "merging_blocks.1.norm.weight", "norm.weight", "head.bias"]
    names += [
        f"sbcformer_blocks.{name}"
        for name in (
            "0.invres_blocks.InvRes_0.pwconv1_bn.conv.weight",
            "0.convTrans.bias",
            "1.norm.running_mean",
            "1.trans_blocks.MAttn_1.attn.attention_biases",
            "2.mixer.Mixer_0.dwconv_bn.bn.bias",
            "2.proj.conv.weight",
            "2.proj_fuse.bn.weight",
            "2.trans_blocks.MAttn_0.mlp.fc1.bias",
        )
    ]
    assert set(names) <= set(theirs)
    again = {key.replace("merging_blocks.0.stem", "patch_embed.stem"): value for key, value in theirs.items()}
    again |= {key.replace("sbcformer_blocks.2", "sbcformer_blk"): value for key, value in theirs.items()}
    index = {"sbcformer_blocks.0.trans_blocks.MAttn_0.attn.attention_bias_idxs": torch.zeros(9, 9)}
    for given in (theirs, {"model": {**theirs, **again, **index}, "epoch": 3}):
        loads(twin, checkpoint_filter_fn(given, twin), state)
        twin.reset_classifier(3)
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def test_any_size_dense_features_and_groups():
    assert pyramid("sbcformer_nano", 0, 2) == ([(16, 23, 31), (64, 6, 8)], [2, 8])
    with torch.device("meta"):
        assert create_model("sbcformer_xs", num_classes=10)(torch.zeros(2, 3, 225, 190)).shape == (2, 10)
    model = tiny(num_classes=0, global_pool="").eval()
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 12, 3, 5)
    assert model(torch.zeros(1, 3, 1, 1)).shape == (1, 12, 1, 1)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 4)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["stages.0.merge.0.0.weight"] == 0
    assert groups["stages.0.hourglass.gate.0.weight"] < groups["stages.2.merge.0.weight"] == groups["norm.weight"]
    assert max(groups.values()) == groups["head.weight"]


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = []
    for own in ARMS.values():
        model = create_model("sbcformer_nano", num_classes=10, **own)
        assert model.eval()(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
        counts.append(count_parameters(model))
    assert counts[1:] == pytest.approx([counts[0]] * 2, rel=0.02)
    small = create_model("sbcformer_nano", num_classes=10, **ARMS["convolutions"])
    assert not any(isinstance(module, Attention) for module in small.modules())


def test_nets_are_timed_by_an_image_and_published_sizes_counted():
    nets = {"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)}
    spent = latencies(nets, 8, 2, 0)
    assert list(spent) == ["a", "b"]
    assert min(spent.values()) > 0
    row, _ = latency_rows(nets, 8, {"a": [2.0, 4.0], "b": [1.0, 1.0]})
    assert row["ms_per_image"] == 3
    assert row["gigamadds_per_second"] == pytest.approx(3 * 8 * 8 * 8 / 1e6 / 3)
    (row,) = published_sizes(["sbcformer_xs"])
    assert row["params_off"] == 0
    assert row["madds_off"] == pytest.approx((0.65 - 0.472187792) / 0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (8, 8)}, r"dims = \(8, 8\) .*4 or more for each of three stages"),
        ({"dims": (2, 8, 8)}, r"dims = \(2, 8, 8\) .*4 or more"),
        ({"num_heads": (1, 0, 1)}, "num_heads = .*1 or more for each"),
        ({"depths_mattn": (1, 1, -1)}, "depths_mattn = .*0 or more for each"),
        ({"pool_ratios": (4, 2, 0)}, "pool_ratios = .*1 or more for each"),
        ({"key_dim": 0}, "key_dim = 0 .*1 or more"),
        ({"side": 0}, "side = 0 .*1 or more"),
        ({"attn_ratio": 0.4}, "attn_ratio = 0.4 leaves no values for key_dim = 2"),
        ({"mlp_ratio": 0}, "mlp_ratio = 0 leaves no hidden channels"),
        ({"invres_ratio": 0.1}, "invres_ratio = 0.1 leaves no hidden channels"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2, 4 or 8"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
