import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models import group_parameters

from exact import moved, normal, same
from vitrail.app.build import count_flops, count_parameters
from vitrail.checks.svt import NET, convolutions, layer_madds, reconstruction
from vitrail.errors import InputError
from vitrail.models import create_model, svt
from vitrail.models.svt import (
    SVT,
    Attention,
    Block,
    ClassBlock,
    EinsteinMlp,
    MapAttention,
    ScatterMixer,
    SplitMixer,
    checkpoint_filter_fn,
    default_cfgs,
)

TINY = {
    "num_classes": 3,
    "img_size": 24,
    "stem_dim": 4,
    "dims": (8, 8, 12, 16),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 3, 2),
    "stem_stride": 2,
}


def tiny(**options):
    torch.manual_seed(0)
    return SVT(**{**TINY, **options})


# ---- mixing of bands, by slow loops


def slow_einstein(mlp, z):
    """Multiply block after block of complex vectors (M, n, s) with two complex matrices."""
    for weight, bias, last in ((mlp.weight1, mlp.bias1, False), (mlp.weight2, mlp.bias2, True)):
        weight, bias = torch.complex(*weight), torch.complex(*bias)
        z = torch.stack([z[:, block] @ weight[block] + bias[block] for block in range(len(weight))], 1)
        if not last:
            z = torch.complex(z.real.relu(), z.imag.relu())
    return z


@pytest.mark.parametrize(("blocks", "size", "shape"), [(4, 3, (2, 5)), (1, 2, (3,)), (3, 1, (2, 1, 2))])
def test_an_einstein_mlp_is_complex_products_of_blocks(blocks, size, shape):
    mlp = moved(EinsteinMlp(blocks, size))
    z = normal(*shape, blocks * size, 2).requires_grad_()
    slow = slow_einstein(mlp, torch.view_as_complex(z).reshape(-1, blocks, size))
    same(mlp(z), torch.view_as_real(slow).reshape(z.shape), [z, *mlp.parameters()])


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 8)])
def test_a_mixer_gates_the_low_band_and_mixes_channels_of_details(size):
    mixer = moved(ScatterMixer(8, size))
    x = normal(2, *size, 8).requires_grad_()
    low, high = mixer.transform(x)
    assert mixer.gate.shape == (8, *low.shape[1:3])
    low = torch.stack([low[..., channel] * mixer.gate[channel] for channel in range(8)], -1)
    z = slow_einstein(mixer.channels, torch.view_as_complex(high).reshape(-1, 4, 2))
    slow = mixer.transform.inverse(low, torch.view_as_real(z).reshape(high.shape), size)
    assert slow.shape == x.shape
    same(mixer(x), slow, [x, *mixer.parameters()])


def test_tokens_of_a_row_are_mixed_after_channels():
    mixer = moved(ScatterMixer(4, (4, 6), tokens=True))
    assert mixer.tokens.bias1.shape == (2, 2, 3)
    x = normal(1, 4, 6, 4).requires_grad_()
    low, high = mixer.transform(x)
    low = low * mixer.gate.permute(1, 2, 0)
    high = torch.view_as_complex(mixer.channels(high))
    rows = torch.zeros_like(high)
    for band in range(6):
        for channel in range(4):
            place = high[band, :, :, :, channel]  # (1, h, w): a row is a block
            rows[band, :, :, :, channel] = slow_einstein(mixer.tokens, place)
    slow = mixer.transform.inverse(low, torch.view_as_real(rows))
    same(mixer(x), slow, [x, *mixer.parameters()])


def test_maps_of_another_size_get_interpolated_weights():
    mixer = moved(ScatterMixer(4, (6, 8), tokens=True))
    for size in ((7, 12), (4, 4)):
        half = -(-size[0] // 2), -(-size[1] // 2)
        other = ScatterMixer(4, size, tokens=True).double()
        with torch.no_grad():
            whole = (2 * half[0], 2 * half[1])
            other.gate.copy_(F.interpolate(mixer.gate[None], whole, mode="bilinear")[0])
            other.channels.load_state_dict(mixer.channels.state_dict())
            for name, weight in mixer.tokens.named_parameters():
                if name.startswith("bias"):
                    found = F.interpolate(weight[None], half, mode="bilinear")[0]
                else:
                    # As many products fall on each sum, whatever the number of columns.
                    cube = (half[0], half[1], half[1])
                    found = F.interpolate(weight[None], cube, mode="trilinear")[0] * 4 / half[1]
                other.tokens.get_parameter(name).copy_(found)
        x = normal(2, *size, 4)
        torch.testing.assert_close(mixer(x), other(x), rtol=1e-9, atol=1e-9)


def test_half_of_a_split_mixer_convolves_and_the_halves_are_interleaved():
    mixer = moved(SplitMixer(16, (4, 6)))
    x = normal(2, 4, 6, 16).requires_grad_()
    conv = mixer.conv
    near = F.conv2d(x[..., :8].permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=8).permute(0, 2, 3, 1)
    far = mixer.scatter(x[..., 8:])
    slow = torch.stack([part[..., channel] for channel in range(8) for part in (near, far)], -1)
    same(mixer(x), slow, [x, *mixer.parameters()])
    assert mixer.scatter.tokens is not None


# ---- attention and blocks


def slow_attention(layer, places, asking):
    """Attend from each of ``asking`` (M, C) to places (N, C)."""
    query = asking @ layer.q.weight.T + layer.q.bias
    key, value = (places @ layer.kv.weight.T + layer.kv.bias).chunk(2, -1)
    width, out = query.shape[-1] // layer.num_heads, []
    for number in range(len(query)):
        parts = []
        for head in range(layer.num_heads):
            own = slice(head * width, (head + 1) * width)
            weights = (key[:, own] @ query[number, own] / math.sqrt(width)).exp()
            parts.append((weights / weights.sum()) @ value[:, own])
        out.append(torch.cat(parts))
    return torch.stack(out) @ layer.proj.weight.T + layer.proj.bias


def test_attention_is_the_slow_loop():
    torch.manual_seed(0)
    layer = moved(Attention(6, 3))
    x, asking = normal(2, 5, 6).requires_grad_(), normal(2, 2, 6, seed=1).requires_grad_()
    slow = torch.stack([slow_attention(layer, *pair) for pair in zip(x, asking)])
    same(layer(x, asking), slow, [x, asking, *layer.parameters()])
    flat = moved(MapAttention(6, 2))
    x = normal(1, 2, 3, 6).requires_grad_()
    slow = slow_attention(flat, x[0].flatten(0, 1), x[0].flatten(0, 1)).view(x.shape)
    same(flat(x), slow, [x, *flat.parameters()])


def norm_of(layer, x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def test_a_block_adds_its_mixer_and_its_feed_forward():
    torch.manual_seed(0)
    block = moved(Block(8, ScatterMixer(8, (3, 2)), 2.5, drop_path=0))
    x = 0.01 * normal(2, 3, 2, 8)
    y = x + block.mixer(norm_of(block.norm1, x))
    inside = (norm_of(block.norm2, y) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias).permute(0, 3, 1, 2)
    assert inside.shape[1] == 20
    conv = block.mlp.dwconv
    inside = F.conv2d(inside, conv.weight, conv.bias, padding=1, groups=20).permute(0, 2, 3, 1)
    inside = inside * 0.5 * (1 + torch.erf(inside / 2**0.5))
    slow = y + inside @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(block(x), slow, rtol=1e-9, atol=1e-9)


def test_what_is_dropped_leaves_what_came():
    block = Block(8, ScatterMixer(8, (3, 2)), 2.0, drop_path=0)
    block.drop_path = torch.nn.Dropout(1.0)
    x = torch.randn(2, 3, 2, 8)
    torch.testing.assert_close(block.train()(x), x)


def test_the_last_block_updates_its_token_alone():
    torch.manual_seed(0)
    block = moved(ClassBlock(6, 2, 3.0))
    token, places = 0.01 * normal(2, 6), 0.01 * normal(2, 4, 6, seed=1)
    seen = norm_of(block.norm1, torch.cat((token[:, None], places), 1))
    y = token + torch.stack([slow_attention(block.attn, one, one[:1])[0] for one in seen])
    hidden = norm_of(block.norm2, y) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    assert hidden.shape[1] == 18
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    slow = y + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(block(token, places), slow, rtol=1e-9, atol=1e-9)


# ---- the net


@pytest.mark.parametrize("stride", [2, 4])
def test_the_net_is_stages_a_token_and_two_classifiers(stride):
    model = moved(tiny(stem_stride=stride, token_labels=True)).eval()
    x = inside = normal(2, 3, 45, 29)
    for number, stage in enumerate(model.stages):
        if number:
            conv = stage.downsample
            inside = F.conv2d(inside, conv.weight, conv.bias, stride=2, padding=1)
        else:
            inside = stage.downsample(inside)
            assert inside.shape[2] == -(-45 // stride)
        inside = norm_of(stage.embed_norm, inside.permute(0, 2, 3, 1), 1e-5)
        for block in stage.blocks:
            inside = block(inside)
        inside = (norm_of(stage.norm, inside) if number < 3 else inside).permute(0, 3, 1, 2)
    features = model.forward_features(x)
    torch.testing.assert_close(features, inside)
    places = inside.flatten(2).transpose(1, 2)
    token = norm_of(model.norm, model.post(places.mean(1), places))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), token)
    norm, head = model.aux_head
    best = (norm_of(norm, places) @ head.weight.T + head.bias).max(1).values
    torch.testing.assert_close(model(x), token @ model.head.weight.T + model.head.bias + 0.5 * best)


def test_the_stem_has_four_convolutions():
    stem = tiny(stem_stride=4).stages[0].downsample
    convs = [layer for layer in stem if isinstance(layer, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0]) for c in convs] == [
        (3, 4, 7, 2, 3),
        (4, 4, 3, 1, 1),
        (4, 4, 3, 1, 1),
        (4, 8, 3, 2, 1),
    ]
    assert [conv.bias is not None for conv in convs] == [False, False, False, True]


def test_early_stages_scatter_and_late_ones_attend():
    for count, mixing in ((0, "channel"), (1, "channel"), (2, "channel"), (2, "channel_token")):
        model = tiny(scatter_stages=count, mixing=mixing)
        early = ScatterMixer if mixing == "channel" else SplitMixer
        kinds = [type(block.mixer) for stage in model.stages for block in stage.blocks]
        assert kinds == [*[early] * count, *[MapAttention] * (5 - count)]
        assert model(torch.zeros(2, 3, 24, 24)).shape == (2, 3)
    gates = [stage.blocks[0].mixer.gate.shape for stage in tiny(scatter_stages=4, img_size=(30, 50)).stages]
    assert gates == [(8, 16, 26), (8, 8, 14), (12, 4, 8), (16, 2, 4)]


def test_drop_path_rises_and_weights_begin_as_published():
    model = tiny(drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    model = create_model("svt_nano", num_classes=100, scatter_stages=2, token_labels=True)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            wanted = 0.02
            assert not module.bias.any(), name
        elif isinstance(module, torch.nn.Conv2d):
            wanted = math.sqrt(2 * module.groups / (module.kernel_size[0] ** 2 * module.out_channels))
        else:
            continue
        assert float(module.weight.detach().std()) == pytest.approx(wanted, rel=0.15), name
    for stage in model.stages[:2]:
        mixer = stage.blocks[0].mixer
        assert float(mixer.gate.detach().std()) == pytest.approx(0.02, rel=0.1)
        for name, value in mixer.channels.named_parameters():
            assert float(value.detach().std()) == pytest.approx(0.02, rel=0.35), name


def test_variants_are_as_published(monkeypatch):
    with torch.device("meta"):
        model = create_model("svt_h_s", num_classes=1000)
        assert model(torch.zeros(1, 3, 225, 190)).shape == (1, 1000)
    # One norm serves both classifiers of the authors.
    assert count_parameters(model) == 22_052_592 + 2 * 448
    assert model.stages[0].blocks[0].mixer.gate.shape == (64, 56, 56)
    assert model.post.attn.num_heads == 14
    made = {}
    monkeypatch.setattr(svt, "create", lambda kind, name, pretrained, weights, **own: made.update({name: own}))
    defaults = {key: value.default for key, value in inspect.signature(SVT).parameters.items()}
    for name, stem, dims, depths in (
        ("s", 32, (64, 128, 320, 448), (3, 4, 6, 3)),
        ("b", 64, (64, 128, 320, 512), (3, 4, 12, 3)),
        ("l", 64, (96, 192, 384, 512), (3, 6, 18, 3)),
    ):
        getattr(svt, f"svt_h_{name}")()
        options = defaults | made[f"svt_h_{name}"]
        assert (options["stem_dim"], options["dims"], options["depths"]) == (stem, dims, depths)
        assert options["num_heads"] == tuple(dim // 32 for dim in dims)
        assert options["mlp_ratios"] == (8, 8, 4, 4)
        assert (options["scatter_stages"], options["mixing"], options["token_labels"]) == (1, "channel", True)
        found = default_cfgs[f"svt_h_{name}"].default
        assert (found.input_size, found.crop_pct) == ((3, 224, 224), 0.96)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin = tiny(token_labels=True), tiny(token_labels=True)
    state = {key: value + 1 for key, value in ours.state_dict().items()}
    for part in ("weight", "bias"):
        state[f"aux_head.0.{part}"] = state[f"norm.{part}"]
    theirs = {prefix + authors_name(key): value for key, value in state.items() if not key.startswith("aux_head.0.")}
    names = [
        "patch_embed1.conv.0.weight",
        "patch_embed1.proj.bias",
        "patch_embed2.proj.weight",
        "patch_embed3.norm.bias",
    ]
    names += ["block1.0.attn.complex_weight_ll", "block1.0.attn.complex_weight_lh_2", "block3.1.attn.kv.weight"]
    names += ["block1.0.attn.complex_weight_lh_b1", "block2.0.mlp.dwconv.dwconv.bias", "norm2.weight", "norm4.bias"]
    names += ["post_network.0.attn.q.weight", "post_network.0.mlp.fc1.bias", "head.weight", "aux_head.bias"]
    assert {prefix + name for name in names} <= set(theirs)
    theirs |= {f"{prefix}block1.0.attn.xfm.h0o": torch.zeros(1), f"{prefix}block1.0.attn.ifm.g1b": torch.zeros(1)}
    for given in (theirs, {"model": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
        for key, value in twin.state_dict().items():
            assert torch.equal(value, state[key]), key
        twin.reset_classifier(3)
    kept = checkpoint_filter_fn(ours.state_dict(), twin)
    assert kept.keys() == ours.state_dict().keys()
    small = tiny(img_size=16)  # of one classifier
    small.load_state_dict(checkpoint_filter_fn(theirs, small), strict=True)
    gate = state["stages.0.blocks.0.mixer.gate"]
    wanted = F.interpolate(gate[None], (8, 8), mode="bilinear")[0]
    torch.testing.assert_close(small.stages[0].blocks[0].mixer.gate.detach(), wanted)


def authors_name(key):
    parts = key.split(".")
    if parts[0] == "norm":
        return f"norm4.{parts[1]}"
    if parts[0] == "post":
        return "post_network.0." + key.removeprefix("post.")
    if parts[0] == "aux_head":
        return f"aux_head.{parts[2]}"
    if parts[0] != "stages":
        return key
    stage, part, *rest = int(parts[1]) + 1, *parts[2:]
    if part == "downsample":
        if stage > 1:
            return ".".join([f"patch_embed{stage}.proj", *rest])
        return f"patch_embed1.proj.{rest[1]}" if rest[0] == "9" else ".".join(["patch_embed1.conv", *rest])
    if part in ("embed_norm", "norm"):
        return f"{'patch_embed' if part == 'embed_norm' else 'norm'}{stage}.{'norm.' * (part == 'embed_norm')}{rest[0]}"
    name = ".".join([f"block{stage}", *rest]).replace(".mixer.", ".attn.").replace(".dwconv.", ".dwconv.dwconv.")
    name = name.replace(".gate", ".complex_weight_ll").replace(".channels.bias", ".complex_weight_lh_b")
    return name.replace(".channels.weight", ".complex_weight_lh_")


def test_any_size_dense_features_and_classifiers():
    features = create_model("svt_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 45, 61))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 23, 31), (64, 6, 8), (96, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    assert create_model("svt_nano", num_classes=10, img_size=28).stages[0].blocks[0].mixer.gate.shape == (16, 14, 14)
    model = tiny(num_classes=0, global_pool="", token_labels=True)
    assert model.aux_head is None
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 16, 2, 3)
    model.reset_classifier(4, "max")
    assert model.aux_head[1].out_features == 4
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)
    model.reset_classifier(0)
    assert model.aux_head is None
    assert tiny().aux_head is None
    model = tiny(token_labels=True)
    groups = group_parameters(model, model.group_matcher())
    assert {"aux_head.1.weight", "head.weight"} <= set(groups[max(groups)])


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    nets = [
        create_model("svt_nano", num_classes=10, img_size=28, **NET),
        create_model("svt_nano", num_classes=10, img_size=28, **{**NET, "scatter_stages": 0}),
        convolutions()(create_model("svt_nano", num_classes=10, img_size=28, **NET)),
    ]
    for net in nets[1:]:
        assert not any(isinstance(module, ScatterMixer) for module in net.modules())
        assert count_parameters(net) == pytest.approx(count_parameters(nets[0]), rel=0.01)
        assert count_flops(net, (28, 28)) == pytest.approx(count_flops(nets[0], (28, 28)), rel=0.2)
        assert net(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
    with pytest.raises(InputError, match="for an SVT net, and this is a Linear"):
        convolutions()(torch.nn.Linear(2, 2))


def test_what_the_check_counts():
    assert max(row["error"] for row in reconstruction()) < 1e-5
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 32, 32), torch.nn.Flatten(), torch.nn.Linear(196, 5))
        assert layer_madds(net) == 49 * 4 * 3 * 32 * 32 + 5 * 196


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (8, 8, 12)}, r"dims = \(8, 8, 12\) has 3 entries.*each of four stages"),
        ({"depths": (1,)}, r"depths = \(1,\) has 1 entries"),
        ({"num_heads": (1, 2, 5, 4)}, "num_heads = 5 does not divide a width of 12"),
        ({"num_heads": (0, 2, 3, 4)}, "num_heads = 0 does not divide a width of 8"),
        ({"depths": (1, 1, 1, 0)}, r"depths = \(1, 1, 1, 0\) and .*1 block"),
        ({"stem_dim": 0}, "stem_dim = 0 are not allowed"),
        ({"scatter_stages": 5}, "scatter_stages = 5 .*0 to 4"),
        ({"mixing": "token"}, "mixing.*'token'.*channel and channel_token"),
        ({"dims": (6, 8, 12, 16)}, "dims = 6 .*multiples of 4"),
        ({"dims": (12, 8, 12, 16), "mixing": "channel_token"}, "dims = 12 .*multiples of 8"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2 or 4"),
        ({"img_size": 0}, "img_size = 0 .*1 pixel"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
