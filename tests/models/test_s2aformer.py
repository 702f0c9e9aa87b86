import math

import pytest
import torch
import torch.nn.functional as F
from timm.models import group_parameters

from exact import moved, normal, same
from nets import pyramid
from vitrail.app.build import count_parameters
from vitrail.checks.s2aformer import ARMS, RIVALS, attention_times, cost_row, layer, published_sizes
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.s2aformer import (
    HybridPerceptionBlock,
    LocalInteraction,
    S2AFormer,
    StripSelfAttention,
    checkpoint_filter_fn,
)

TINY = {
    "num_classes": 3,
    "stem_dim": 3,
    "dims": (4, 6, 8, 8),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 4),
    "reductions": (3, 2, 2, 1),
    "feature_dim": 12,
    "mlp_ratio": 2.0,
}


def tiny(**options):
    torch.manual_seed(0)
    return S2AFormer(**{**TINY, **options})


# ---- slow loops, from the paper's equations


def point(conv, x):
    """Apply a 1 x 1 convolution to (C, H, W)."""
    return torch.einsum("oi,ihw->ohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]


def layer_norm(norm, x):
    """Normalise the channels of each place of (..., C, H, W)."""
    centred = x - x.mean(-3, keepdim=True)
    spread = (centred.square().mean(-3, keepdim=True) + 1e-6).sqrt()
    return centred / spread * norm.weight[:, None, None] + norm.bias[:, None, None]


def depthwise(conv, x):
    """Apply a 3 x 3 depthwise convolution to (B, C, H, W)."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    return conv.bias[:, None, None] + sum(
        conv.weight[:, 0, r, c, None, None] * padded[:, :, r : r + height, c : c + width]
        for r in range(3)
        for c in range(3)
    )


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def slow_attention(attn, x, reduction):
    """Attend from each place of a map (C, H, W) to the places of the smaller map."""
    dim, height, width = x.shape
    small = x
    if reduction > 1:
        conv, norm = attn.reduce
        rows, columns = -(-height // reduction), -(-width // reduction)
        small = conv.bias[:, None, None].expand(dim, rows, columns).clone()
        for row in range(height):
            for column in range(width):
                spread = conv.weight[:, 0, row % reduction, column % reduction] * x[:, row, column]
                small[:, row // reduction, column // reduction] += spread
        small = layer_norm(norm, small)
    query, key, value = point(attn.query, x), point(attn.key, small), point(attn.value, small)
    heads = attn.num_heads
    wide, deep = query.shape[0] // heads, dim // heads
    places = [(r, c) for r in range(small.shape[1]) for c in range(small.shape[2])]
    out = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            for head in range(heads):
                mine, own = slice(head * wide, (head + 1) * wide), slice(head * deep, (head + 1) * deep)
                scores = torch.stack([query[mine, row, column] @ key[mine, r, c] / math.sqrt(wide) for r, c in places])
                weights = scores.exp() / scores.exp().sum()
                out[own, row, column] = sum(weight * value[own, r, c] for weight, (r, c) in zip(weights, places))
    return point(attn.proj, out)


def slow_interaction(lim, x):
    norm = lim.norm
    x = gelu(depthwise(lim.conv1, x))
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return depthwise(lim.conv2, x * norm.weight[:, None, None] + norm.bias[:, None, None])


@pytest.mark.parametrize(
    ("size", "heads", "reduction", "key_dim"),
    [((5, 3), 2, 2, 1), ((2, 4), 3, 1, 1), ((3, 4), 2, 3, 2), ((3, 2), 2, 2, 0)],
)
def test_strip_self_attention_is_the_slow_loop(size, heads, reduction, key_dim):
    attn = moved(StripSelfAttention(6, heads, reduction, key_dim)).eval()
    assert attn.query.out_channels == attn.key.out_channels == (heads * key_dim or 6)
    x = normal(2, 6, *size).requires_grad_()
    given = [x, *(value for name, value in attn.named_parameters() if name != "key.bias")]
    same(attn(x), torch.stack([slow_attention(attn, image, reduction) for image in x]), given, 1e-8)


def test_reduced_maps_are_normalised_with_the_small_epsilon():
    attn = moved(StripSelfAttention(6, 2, 2)).eval()
    attn.reduce[0].bias.data.zero_()
    x = 0.01 * normal(1, 6, 4, 4)
    torch.testing.assert_close(attn(x)[0], slow_attention(attn, x[0], 2), rtol=1e-8, atol=1e-8)


def test_local_interaction_is_two_depthwise_convolutions():
    lim = moved(LocalInteraction(3)).eval()
    x = normal(2, 3, 4, 5).requires_grad_()
    same(lim(x), slow_interaction(lim, x), [x, *lim.parameters()])


@pytest.mark.parametrize(("attention", "interaction"), [(True, True), (False, True), (True, False)])
def test_a_block_adds_its_parts_one_after_the_other(attention, interaction):
    attn = StripSelfAttention(4, 2, 2) if attention else None
    block = moved(HybridPerceptionBlock(4, attn, 3.0, interaction=interaction, drop_path=0.0)).eval()
    x = 0.01 * normal(2, 4, 3, 5)  # small values, so that the epsilon counts
    expected = x + depthwise(block.conv, x)
    if attention:
        inside = layer_norm(block.norms["attn"], expected)
        expected = expected + torch.stack([slow_attention(attn, image, 2) for image in inside])
    if interaction:
        expected = expected + slow_interaction(block.parts["lim"], layer_norm(block.norms["lim"], expected))
    fc1, _, fc2 = block.parts["mlp"]
    assert fc1.out_channels == 12
    inside = layer_norm(block.norms["mlp"], expected)
    expected = expected + torch.stack([point(fc2, gelu(point(fc1, image))) for image in inside])
    torch.testing.assert_close(block(x), expected, rtol=1e-8, atol=1e-8)


def test_stochastic_depth_is_of_all_but_the_first_convolution():
    block = HybridPerceptionBlock(4, StripSelfAttention(4, 2, 2), 3.0, interaction=True, drop_path=0.999).train()
    x = torch.randn(2, 4, 3, 5)
    torch.manual_seed(0)
    torch.testing.assert_close(block(x), x + depthwise(block.conv, x))


# ---- the net


@pytest.mark.parametrize("stride", [1, 2])
def test_the_net_is_stem_stages_norm_mean_hidden_layer_and_head(stride):
    model = moved(tiny(stem_stride=stride)).eval()
    x = normal(2, 3, 21, 30)
    inside = x
    for i in range(3):
        conv, norm = model.stem[3 * i], model.stem[3 * i + 1]
        assert conv.bias is None
        inside = F.conv2d(inside, conv.weight, None, 1 if i else stride, 1)
        inside = (inside - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
        inside = gelu(inside * norm.weight[:, None, None] + norm.bias[:, None, None])
    for stage in model.stages:
        conv, norm = stage.downsample
        height, width = inside.shape[2:]
        inside = F.pad(inside, (0, width % 2, 0, height % 2))
        inside = inside.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        inside = torch.einsum("oirc,bihrwc->bohw", conv.weight, inside) + conv.bias[:, None, None]
        inside = layer_norm(norm, inside)
        for block in stage.blocks:
            inside = block(inside)
    inside = layer_norm(model.norm, inside)
    torch.testing.assert_close(model.forward_features(x), inside)
    assert inside.shape[2:] == tuple(-(-side // (16 * stride)) for side in (21, 30))
    pooled = gelu(inside.mean((2, 3)) @ model.hidden.weight.T + model.hidden.bias)
    torch.testing.assert_close(model.forward_head(inside, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


def test_drop_path_rises_and_weights_begin_small():
    model = tiny(drop_path_rate=0.4)
    blocks = [module for module in model.modules() if isinstance(module, HybridPerceptionBlock)]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    model = create_model("s2aformer_nano", num_classes=100)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            std = 0.02
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
                std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels / module.groups))
            if module.weight.numel() > 300:
                assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.2), name
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(
    ("name", "parameters", "stem", "dims", "depths"),
    [
        ("mini", 5_002_700, 16, (32, 64, 136, 352), (2, 2, 2, 2)),
        ("t", 5_810_986, 16, (40, 80, 160, 320), (1, 2, 6, 2)),
        ("xs", 6_535_948, 16, (40, 88, 168, 352), (2, 2, 6, 2)),
        ("s", 10_638_628, 24, (52, 104, 208, 416), (2, 3, 6, 3)),
        ("m", 24_799_402, 32, (80, 160, 304, 560), (3, 3, 12, 3)),
    ],
)
def test_variants_are_as_the_card_says(name, parameters, stem, dims, depths):
    with torch.device("meta"):
        model = create_model(f"s2aformer_{name}", num_classes=1000)
    assert count_parameters(model) == parameters
    assert model.stem[0].out_channels == stem
    for info, stage, dim, depth, heads, reduction in zip(
        model.feature_info, model.stages, dims, depths, (1, 2, 4, 8), (8, 4, 2, 1)
    ):
        assert info["num_chs"] == dim
        assert len(stage.blocks) == depth
        attn = stage.blocks[-1].parts["attn"]
        assert attn.num_heads == attn.query.out_channels == heads
        assert (attn.reduce[0].stride[0] if reduction > 1 else 1) == reduction
        assert stage.blocks[0].parts["mlp"][0].out_channels == 4 * dim
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert model.head.in_features == 1280


def test_any_size_dense_features_groups_and_weights():
    assert pyramid("s2aformer_nano", 0, 3) == ([(16, 23, 31), (64, 3, 4)], [2, 16])
    with torch.device("meta"):
        assert create_model("s2aformer_t", num_classes=10)(torch.zeros(2, 3, 225, 190)).shape == (2, 10)
    model = tiny(num_classes=0, global_pool="").eval()
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 8, 1, 2)
    assert model(torch.zeros(1, 3, 1, 1)).isfinite().all()
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 4)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["stem.0.weight"] == 0
    assert groups["stages.0.blocks.0.conv.weight"] < groups["stages.3.blocks.0.conv.weight"] == groups["norm.weight"]
    assert groups["hidden.weight"] < groups["head.weight"]
    twin, state = tiny(num_classes=4), model.state_dict()
    for given in (state, {"state_dict": state, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = []
    for name, own in ARMS.items():
        model = create_model("s2aformer_nano", num_classes=10, **own)
        assert model.eval()(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
        counts.append(count_parameters(model))
        attentions = [module for module in model.modules() if isinstance(module, StripSelfAttention)]
        assert bool(attentions) == (name != "none")
        for attn in attentions:
            assert (attn.key.out_channels == attn.num_heads) == (name == "strip")
            assert name != "full" or isinstance(attn.reduce, torch.nn.Identity)
    assert counts[1:] == pytest.approx([counts[0]] * 3, rel=0.01)


def test_attentions_are_timed_and_counted_at_one_shape():
    shape = (8, 2, 2, 6)
    (row,) = attention_times([shape], 1, 0)
    assert list(row) == list(RIVALS)
    assert min(row.values()) > 0
    found = cost_row(shape, [{"strip": 1.0, "reduced": 2.0, "full": 4.0}, {"strip": 3.0, "reduced": 2.0, "full": 4.0}])
    assert (found["strip_ms"], found["reduced_ms"], found["full_ms"]) == (2, 2, 4)
    places, small, wide = 36, 9, 64 * 1e-6
    reduce, products = small * 4 * 8 * 1e-6, places * small * 1e-6
    strip = reduce + (places + small) * 16e-6 + (small + places) * wide + products * (2 + 8)
    assert found["strip_mega_madds"] == pytest.approx(strip)
    assert found["reduced_mega_madds"] == pytest.approx(reduce + 2 * (places + small) * wide + products * 16)
    assert found["full_mega_madds"] == pytest.approx(4 * places * wide + places * places * 16e-6)
    assert layer(shape, "full").training is False
    (row,) = published_sizes(["s2aformer_mini"])
    assert row["params_off"] == pytest.approx((5.02 - 5.0027 - 0.005) / 5.02)
    assert row["madds_off"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (8, 8)}, r"dims = \(8, 8\) .*1 or more for each of four stages"),
        ({"depths": (1, 1, 0, 1)}, "depths = .*1 or more"),
        ({"reductions": (0, 2, 2, 1)}, "reductions = .*1 or more"),
        ({"num_heads": (1, 2, 2, 3)}, "num_heads = 3 does not divide a width of 8"),
        ({"stem_dim": 0}, "stem_dim = 0 .*1 or more"),
        ({"feature_dim": 0}, "feature_dim = 0 .*1 or more"),
        ({"mlp_ratio": 0.2}, "mlp_ratio = 0.2 leaves no hidden channels"),
        ({"key_dim": -1}, "key_dim = -1 .*1 or more, or 0"),
        ({"stem_stride": 4}, "stem_stride = 4 .*1 or 2"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
