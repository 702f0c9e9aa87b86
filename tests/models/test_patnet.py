import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.utils import reparameterize_model

from exact import moved, normal, same
from nets import loads, pyramid
from vitrail.app.build import count_parameters
from vitrail.checks.patnet import ARMS, cost_row, fold_error
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.patnet import (
    Block,
    FoldedSpatialAttention,
    GaussianChannelAttention,
    Mlp,
    PartialConv,
    PartialSelfAttention,
    PATNet,
    SpatialAttention,
    checkpoint_filter_fn,
    distance_buckets,
)

TINY = {"num_classes": 3, "dim": 8, "depths": (1, 1, 2, 1), "num_heads": 3, "feature_dim": 12, "stem_stride": 2}
STILL = {"attn_drop_rate": 0.0, "proj_drop_rate": 0.0}


def tiny(**options):
    torch.manual_seed(0)
    return PATNet(**{**TINY, **STILL, **options})


# ---- slow loops, from the paper and the published code


def batch_norm(layer, x):
    """Normalise (B, C, ...) with the stored statistics."""
    shape = (-1,) + (1,) * (x.ndim - 2)
    x = (x - layer.running_mean.view(shape)) / (layer.running_var.view(shape) + 1e-5).sqrt()
    return x * layer.weight.view(shape) + layer.bias.view(shape)


def gate(x):
    return (x + 3).clamp(0, 6) / 6


def slow_channel(layer, x):
    """Gate each channel of (B, u, H, W) by a mix of all means and deviations."""
    out = []
    dim = x.shape[1]
    for image in x:
        gated = []
        for channel in range(dim):
            score = 0.0
            for other in range(dim):
                values = image[other].flatten()
                mean = values.sum() / len(values)
                deviation = ((values - mean).square().sum() / (len(values) - 1)).sqrt()
                score = score + layer.mix.weight[channel, other] * mean
                score = score + layer.mix.weight[channel, dim + other] * deviation
            norm = layer.gate_norm
            score = (score - norm.running_mean[channel]) / (norm.running_var[channel] + 1e-5).sqrt()
            gated.append(image[channel] * gate(score * norm.weight[channel] + norm.bias[channel]))
        out.append(torch.stack(gated))
    return batch_norm(layer.norm, torch.stack(out))


def bucket(distance):
    """Return the entry of the table for a distance in places."""
    distance = round(distance)
    if distance <= 20:
        return 40 + distance
    return 40 + min(40, round(20 + 20 * math.log(distance / 20) / math.log(8)))


def slow_self(layer, x):
    """Attend among the places of one map (u, H, W), place by place."""
    dim, height, width = x.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    normal_ = {}
    for place in places:
        value = x[:, *place]
        spread = (value - value.mean()).square().mean()
        normal_[place] = (value - value.mean()) / (spread + 1e-6).sqrt() * layer.norm.weight + layer.norm.bias
    query, key, value = ({p: w @ v for p, v in normal_.items()} for w in layer.qkv.weight.split(dim))
    wide = dim // layer.num_heads
    out = torch.zeros_like(x)
    for place in places:
        parts = []
        for head in range(layer.num_heads):
            own = slice(head * wide, (head + 1) * wide)
            scores = torch.stack(
                [
                    query[place][own] @ key[other][own] / math.sqrt(wide)
                    + layer.bias[head, bucket(math.dist(place, other))]
                    for other in places
                ]
            )
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weight * value[other][own] for weight, other in zip(weights, places)))
        out[:, *place] = layer.proj.weight @ torch.cat(parts) + layer.proj.bias
    return out


def slow_spatial(layer, x):
    """Gate the first half of (B, C, H, W) by a score of each place; mix the second half."""
    half = x.shape[1] // 2
    gated, mixed = x[:, :-half], x[:, -half:]
    score = (gated * layer.score.weight[0, :, 0, 0, None, None]).sum(1, keepdim=True)
    mixed = torch.einsum("oi,bihw->bohw", layer.conv.weight[:, :, 0, 0], batch_norm(layer.conv_norm, mixed))
    return torch.cat((batch_norm(layer.norm, gated * gate(score)), mixed), 1)


def slow_mlp(layer, x, act):
    inside = torch.einsum("oi,bihw->bohw", layer.fc1.weight[:, :, 0, 0], x)
    return torch.einsum("oi,bihw->bohw", layer.fc2.weight[:, :, 0, 0], act(batch_norm(layer.norm, inside)))


def test_channel_attention_is_the_slow_loop():
    layer = moved(GaussianChannelAttention(3)).eval()
    for size in ((4, 5), (2, 1)):
        x = normal(2, 3, *size).requires_grad_()
        same(layer(x), slow_channel(layer, x), [x, *layer.parameters()], 1e-6)  # torch's gate is of single precision


def test_a_single_place_has_no_deviation():
    layer = moved(GaussianChannelAttention(3)).eval()
    x = normal(2, 3, 1, 1).requires_grad_()
    twice = layer(x.expand(2, 3, 1, 2))
    torch.testing.assert_close(layer(x), twice[..., :1])
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [(3, 2), (1, 4)])
def test_self_attention_is_the_slow_loop(size):
    layer = moved(PartialSelfAttention(6, 2)).eval()
    assert layer.qkv.bias is None
    x = (0.01 * normal(2, 6, *size)).requires_grad_()  # small values, so that the epsilon counts
    found = layer(x, distance_buckets(*size))
    same(found, torch.stack([slow_self(layer, image) for image in x]), [x, *layer.parameters()], 1e-7)


def test_buckets_are_of_rounded_distances_ever_wider():
    found = distance_buckets(3, 200)
    assert found.shape == (600, 600)
    for row, column in ((0, 0), (2, 3), (1, 20), (0, 21), (2, 57), (1, 150), (2, 199)):
        assert found[0, 200 * row + column] == bucket(math.hypot(row, column)), (row, column)
        assert found[200 * row + column, 0] == found[0, 200 * row + column]
    assert found.max() == 80


def test_attention_drops_out_in_training_alone():
    x, buckets = torch.randn(2, 6, 3, 3), distance_buckets(3, 3)
    for rates in ((0.5, 0.0), (0.0, 0.5)):
        layer = PartialSelfAttention(6, 2, *rates)
        assert not torch.equal(layer(x, buckets), layer(x, buckets))
        layer.eval()
        assert torch.equal(layer(x, buckets), layer(x, buckets))


@pytest.mark.parametrize("dim", [4, 5])
def test_spatial_attention_is_the_slow_loop(dim):
    layer = moved(SpatialAttention(dim)).eval()
    x = normal(2, dim, 3, 4).requires_grad_()
    same(layer(x), slow_spatial(layer, x), [x, *layer.parameters()], 1e-6)


@pytest.mark.parametrize(("act", "function"), [("gelu", F.gelu), ("relu", F.relu)])
def test_the_feed_forward_layer_has_spatial_attention_behind_it_or_none(act, function):
    x = normal(2, 4, 3, 2).requires_grad_()
    for spatial in (True, False):
        layer = moved(Mlp(4, 6, act, spatial=spatial)).eval()
        expected = slow_mlp(layer, x, function)
        if spatial:
            expected = slow_spatial(layer.attention, expected)
        same(layer(x), expected, [x, *layer.parameters()], 1e-6)


@pytest.mark.parametrize("dim", [4, 7])
def test_spatial_attention_folds_into_the_feed_forward_layer(dim):
    layer = moved(Mlp(dim, 6, "relu", spatial=True)).eval()
    x = normal(2, dim, 3, 4)
    expected = layer(x)
    layer.reparameterize()
    assert isinstance(layer.attention, FoldedSpatialAttention)
    assert layer.fc2.out_channels == dim + 1
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    layer.reparameterize()
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    plain = Mlp(dim, 6, "relu", spatial=False)
    plain.reparameterize()
    assert isinstance(plain.attention, torch.nn.Identity)


def test_a_convolution_sees_the_first_channels_and_leaves_the_others():
    layer = moved(PartialConv(5, 2, torch.nn.Softmax(1))).eval()
    x = normal(2, 5, 4, 3).requires_grad_()
    padded = F.pad(x[:, :2], (1, 1, 1, 1))
    seen = sum(
        torch.einsum("oi,bihw->bohw", layer.conv.weight[:, :, r, c], padded[:, :, r : r + 4, c : c + 3])
        for r in range(3)
        for c in range(3)
    )
    same(layer(x), torch.cat((seen, x[:, 2:].softmax(1)), 1), [x, *layer.parameters()])


def test_a_block_adds_both_parts_at_once_or_one_after_the_other():
    mixer, mlp = moved(PartialConv(4, 1, torch.nn.Tanh())).eval(), moved(Mlp(4, 6, "relu", spatial=True)).eval()
    x = normal(2, 4, 3, 3)
    together = Block(mixer, mlp, drop_path=0.0, apart=False).eval()
    torch.testing.assert_close(together(x), x + mlp(mixer(x)))
    apart = Block(mixer, mlp, drop_path=0.0, apart=True).eval()
    torch.testing.assert_close(apart(x), x + mixer(x) + mlp(x + mixer(x)))
    dropped = Block(mixer, mlp, drop_path=0.999, apart=True).train()
    torch.manual_seed(0)
    torch.testing.assert_close(dropped(x), x + mixer(x))


# ---- the net


@pytest.mark.parametrize("stride", [2, 4])
def test_the_net_is_stem_stages_mean_hidden_layer_and_head(stride):
    model = moved(tiny(stem_stride=stride, mixers=("channel", "identity", "self", "self"))).eval()
    x = normal(2, 3, 45, 61)

    def patches(layers, x, side):
        conv, norm = layers
        height, width = (-(-size // side) for size in x.shape[2:])
        x = F.pad(x, (0, width * side - x.shape[3], 0, height * side - x.shape[2]))
        x = x.unflatten(3, (width, side)).unflatten(2, (height, side))
        return batch_norm(norm, torch.einsum("oirc,bihrwc->bohw", conv.weight, x))

    inside = patches(model.stem, x, stride)
    for i, stage in enumerate(model.stages):
        if i:
            inside = patches(stage.downsample, inside, 2)
        for block in stage.blocks:
            inside = block(inside, *([distance_buckets(*inside.shape[2:])] if i > 1 else []))
    torch.testing.assert_close(model.forward_features(x), inside)
    assert inside.shape[2:] == tuple(-(-side // (8 * stride)) for side in (45, 61))
    pooled = (inside.mean((2, 3)) @ model.hidden.weight.T).clamp(min=0)
    torch.testing.assert_close(model.forward_head(inside, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)
    kinds = [type(stage.blocks[0].mixer.others) for stage in model.stages]
    assert kinds == [GaussianChannelAttention, torch.nn.Identity, PartialSelfAttention, PartialSelfAttention]
    assert [stage.blocks[0].apart for stage in model.stages] == [False, False, True, True]


def test_without_attention_it_is_fasternet():
    theirs = timm.create_model("fasternet_t0", embed_dim=8, depths=(1, 1, 2, 1), feature_dim=12, num_classes=3).eval()
    ours = tiny(stem_stride=4, mixers=("identity",) * 4, spatial=False, act="gelu").eval()
    moved(theirs)
    state = {}
    for key, value in theirs.state_dict().items():
        # timm has kept the authors' names, but for the head and the place of the stages.
        head, _, rest = key.partition(".")
        if head == "stages":
            stage, part, rest = rest.split(".", 2)
            key = (
                f"stages.{2 * int(stage) - 1}.{rest}"
                if part == "downsample"
                else f"stages.{2 * int(stage)}.blocks.{rest}"
            )
        state[
            {"conv_head": "avgpool_pre_head.1", "classifier": "head"}.get(head, "") + f".{rest}"
            if head in ("conv_head", "classifier")
            else key
        ] = value
    ours.double().load_state_dict(checkpoint_filter_fn({"model": state}, ours), strict=True)
    x = normal(2, 3, 64, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_drop_path_rises_and_weights_begin_as_published():
    model = tiny(drop_path_rate=0.4)
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    model = create_model("patnet_nano", num_classes=100)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.weight.numel() > 1000:
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            assert not module.bias.any()
        if isinstance(module, PartialSelfAttention):
            assert module.bias.shape == (4, 81)
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("name", "parameters", "dim", "depths", "heads", "act"),
    [
        ("t0", 3_558_240, 32, [1, 2, 8, 2], 4, "GELU"),
        ("t1", 6_144_876, 48, [1, 2, 8, 2], 6, "GELU"),
        ("t2", 12_651_072, 64, [2, 2, 6, 4], 6, "ReLU"),
        ("s", 28_976_352, 96, [2, 2, 9, 4], 6, "ReLU"),
        ("m", 61_367_424, 128, [2, 3, 16, 4], 6, "ReLU"),
        ("l", 104_465_984, 160, [2, 3, 20, 4], 6, "ReLU"),
    ],
)
def test_variants_are_as_published(name, parameters, dim, depths, heads, act):
    with torch.device("meta"):
        model = create_model(f"patnet_{name}", num_classes=1000)
    assert count_parameters(model) == parameters
    assert [len(stage.blocks) for stage in model.stages] == depths
    assert [info["num_chs"] for info in model.feature_info] == [dim, 2 * dim, 4 * dim, 8 * dim]
    last = model.stages[3].blocks[0]
    assert (last.mixer.others.num_heads, last.mixer.others.attn_drop_rate) == (heads, 0.1)
    assert last.mixer.others.proj_drop.p == 0.1
    assert last.mixer.parts == (2 * dim, 6 * dim)
    assert type(last.mlp.act).__name__ == type(model.act).__name__ == act
    assert [stage.attends for stage in model.stages] == [False, False, False, True]
    assert model.pretrained_cfg["crop_pct"] == 0.9


def authors_name(key):
    """Return the key of the authors' net that holds a weight of ours."""
    for ours, theirs in (
        ("stem.0", "patch_embed.proj"),
        ("stem.1", "patch_embed.norm"),
        ("hidden", "avgpool_pre_head.1"),
    ):
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    if not key.startswith("stages."):
        return key
    _, stage, part, *rest = key.split(".")
    if part == "downsample":
        return f"stages.{2 * int(stage) - 1}.{'reduction' if rest[0] == '0' else 'norm'}.{rest[1]}"
    number, half, name, *tail = rest
    if half == "mlp":
        inside = {"attention": "4", "fc1": "0", "norm": "1", "fc2": "3"}[name]
        if name == "attention":
            tail[0] = {"score": "conv_attn", "conv_norm": "norm2"}.get(tail[0], tail[0])
        tail = [inside, *tail]
    elif name == "conv":
        half, tail = "spatial_mixing", ["partial_conv3", *tail]
    else:
        half = "spatial_mixing"
        own = {"mix": "attn.cfc1", "gate_norm": "attn.bn", "bias": "attn.rpe_k.lookup_table_bias"}
        own |= {"qkv": "attn.qkv", "proj": "attn.proj"}
        tail = [own.get(tail[0], tail[0]), *tail[1:]]
    return ".".join(["stages", str(2 * int(stage)), "blocks", number, half, *tail])


def test_the_authors_keys_become_ours():
    ours, twin = tiny(), tiny()
    state = {key: value + torch.arange(value.numel()).reshape(value.shape) for key, value in ours.state_dict().items()}
    theirs = {}
    for key, value in state.items():
        if key.endswith("mix.weight"):
            value = torch.stack(value.chunk(2, 1), 2)[:, :, None]
            assert value.shape[2:] == (1, 2)
        elif key == "hidden.weight":
            value = value[:, :, None, None]
        theirs[authors_name(key)] = value
    names = ["patch_embed.proj.weight", "stages.1.norm.bias", "stages.5.reduction.weight", "head.bias"]
    names += [
        f"stages.{name}"
        for name in (
            "0.blocks.0.spatial_mixing.attn.cfc1.weight",
            "0.blocks.0.spatial_mixing.attn.bn.running_var",
            "2.blocks.0.spatial_mixing.norm.weight",
            "4.blocks.1.mlp.4.conv_attn.weight",
            "4.blocks.1.mlp.4.norm2.bias",
            "4.blocks.0.mlp.3.weight",
            "6.blocks.0.spatial_mixing.partial_conv3.weight",
            "6.blocks.0.spatial_mixing.attn.rpe_k.lookup_table_bias",
            "6.blocks.0.spatial_mixing.attn.proj.bias",
        )
    ]
    assert set(names) <= set(theirs)
    for given in (theirs, {"state_dict": {f"model.{key}": value for key, value in theirs.items()}, "epoch": 3}):
        loads(twin, checkpoint_filter_fn(given, twin), state)
        twin.reset_classifier(3)
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def test_any_size_dense_features_and_groups():
    assert pyramid("patnet_nano", 0, 3) == ([(16, 23, 31), (128, 3, 4)], [2, 16])
    with torch.device("meta"):
        assert create_model("patnet_t0", num_classes=10)(torch.zeros(2, 3, 225, 190)).shape == (2, 10)
    model = tiny(num_classes=0, global_pool="").eval()
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 64, 2, 3)
    assert model(torch.zeros(1, 3, 1, 1)).isfinite().all()
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 4)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["stem.0.weight"] == 0
    assert groups["stages.0.blocks.0.mlp.fc1.weight"] < groups["stages.3.blocks.0.mlp.fc1.weight"]
    assert groups["stages.3.blocks.0.mlp.fc1.weight"] == groups["hidden.weight"] < groups["head.weight"]


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = []
    for own in ARMS.values():
        model = create_model("patnet_nano", num_classes=10, **own)
        assert model.eval()(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
        counts.append(count_parameters(model))
    assert counts[1:] == pytest.approx([counts[0]] * 3, rel=0.01)
    kinds = {type(module) for module in create_model("patnet_nano", num_classes=10, **ARMS["no self"]).modules()}
    assert PartialSelfAttention not in kinds
    assert GaussianChannelAttention in kinds


def test_rows_of_cost_and_the_error_of_folding(monkeypatch):
    model = create_model("patnet_nano", num_classes=10).eval()
    row = cost_row("net", model, 32, 4.0, 2.0)
    assert (row["params_m"], row["images_per_second"]) == (count_parameters(model) / 1e6, 500)
    assert row["madds_g"] > cost_row("net", reparameterize_model(model), 32, 4.0, 2.0)["madds_g"] > 0.002
    assert fold_error(model, (28, 28)) < 1e-5
    monkeypatch.setattr(Mlp, "reparameterize", lambda mlp: mlp.fc2.weight.data.mul_(1.5))
    assert fold_error(model, (28, 28)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\) .*1 or more for each of four stages"),
        ({"depths": (1, 1, 0, 1)}, r"depths = \(1, 1, 0, 1\) .*1 or more"),
        ({"mixers": ("self",)}, r"mixers = .* has 1 entries: give one for each of four stages"),
        ({"mixers": ("channel", "channel", "chanel", "self")}, "mixer 'chanel'.*channel"),
        ({"act": "gleu"}, "activation 'gleu'.*gelu"),
        ({"n_div": 1}, "dim = 8 and n_div = 1 .*2 or more"),
        ({"dim": 3}, "dim = 3 and n_div = 4 .*as much"),
        ({"mlp_ratio": 0.1}, "mlp_ratio = 0.1 .*leaves a channel"),
        ({"feature_dim": 0}, "feature_dim = 0 .*leaves a channel"),
        ({"attn_drop_rate": 1}, r"attn_drop_rate = 1 .*\[0, 1\)"),
        ({"proj_drop_rate": -0.1}, r"proj_drop_rate = -0.1 .*\[0, 1\)"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2 or 4"),
        ({"num_heads": 5}, "num_heads = 5 does not divide the 48 channels of stage 3"),
        ({"num_heads": 0}, "num_heads = 0 "),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
