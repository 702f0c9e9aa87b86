import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock

from exact import moved, normal, same
from nets import pyramid
from vitrail.app.build import count_parameters
from vitrail.checks.cswin import NET, reach_of_blocks, shifted_windows
from vitrail.errors import InputError
from vitrail.models import create_model, cswin
from vitrail.models.cswin import (
    Block,
    CrossShapedAttention,
    CSWin,
    Stage,
    StripeAttention,
    checkpoint_filter_fn,
    default_cfgs,
)

TINY = {
    "num_classes": 3,
    "dim": 8,
    "depths": (1, 1, 2, 1),
    "num_heads": (2, 2, 4, 4),
    "stripes": (1, 2, 3),
    "stem_stride": 2,
}


def tiny(**options):
    torch.manual_seed(0)
    return CSWin(**{**TINY, **options})


# ---- slow loops, from the paper and the published code


def slow_stripe(branch, qkv):
    """Attend among the places of one stripe, (h, w, 3 c), and add what the convolution sees within it."""
    tall, wide, dim = *qkv.shape[:2], branch.dim
    query, key, value = qkv.split(dim, dim=-1)
    places = [(row, column) for row in range(tall) for column in range(wide)]
    width = dim // branch.num_heads
    out = torch.zeros(tall, wide, dim, dtype=qkv.dtype)
    for row, column in places:
        parts = []
        for head in range(branch.num_heads):
            own = slice(head * width, (head + 1) * width)
            scores = torch.stack([query[row, column, own] @ key[r, c, own] / math.sqrt(width) for r, c in places])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weight * value[r, c, own] for weight, (r, c) in zip(weights, places)))
        encoding = torch.zeros(dim, dtype=qkv.dtype)
        if branch.get_v is not None:
            encoding = branch.get_v.bias
            for r, c in places:
                if abs(r - row) <= 1 and abs(c - column) <= 1:
                    encoding = encoding + branch.get_v.weight[:, 0, r - row + 1, c - column + 1] * value[r, c]
        out[row, column] = torch.cat(parts) + encoding
    return out


def slow_branch(branch, qkv):
    """Cut a map (H, W, 3 c) into stripes, filled up with zeros on both sides, the odd one behind."""
    height, width = qkv.shape[:2]
    tall, wide = branch.stripe[0] or height, branch.stripe[1] or width
    rows, columns = math.ceil(height / tall), math.ceil(width / wide)
    top, left = (rows * tall - height) // 2, (columns * wide - width) // 2
    full = torch.zeros(rows * tall, columns * wide, qkv.shape[2], dtype=qkv.dtype)
    full[top : top + height, left : left + width] = qkv
    out = torch.zeros(*full.shape[:2], branch.dim, dtype=qkv.dtype)
    for row in range(0, len(full), tall):
        for column in range(0, full.shape[1], wide):
            place = (slice(row, row + tall), slice(column, column + wide))
            out[place] = slow_stripe(branch, full[place])
    return out[top : top + height, left : left + width]


@pytest.mark.parametrize(
    ("stripe", "height", "width"),
    [
        ((None, 1), 3, 2),
        ((None, 3), 1, 4),
        ((2, None), 3, 2),
        ((3, None), 1, 2),
        ((None, None), 2, 2),
        ((None, 3), 2, 1),
    ],
)
def test_a_branch_is_the_slow_loop(stripe, height, width):
    torch.manual_seed(0)
    for lepe in (True, False):
        branch = moved(StripeAttention(6, 2, stripe, lepe=lepe))
        qkv = normal(2, height, width, 18).requires_grad_()
        given = [qkv, *branch.parameters()]
        same(branch(qkv), torch.stack([slow_branch(branch, image) for image in qkv]), given)
        assert (branch.get_v is not None) == lepe


def test_the_first_half_attends_down_the_second_across():
    torch.manual_seed(0)
    layer = moved(CrossShapedAttention(8, 4, 2))
    assert [branch.stripe for branch in layer.attns] == [(None, 2), (2, None)]
    assert [(branch.dim, branch.num_heads) for branch in layer.attns] == [(4, 2), (4, 2)]
    x = normal(1, 3, 4, 8).requires_grad_()
    qkv = x @ layer.qkv.weight.T + layer.qkv.bias
    halves = [
        slow_branch(branch, qkv[0, ..., part]) for branch, part in zip(layer.attns, (slice(0, 12), slice(12, 24)))
    ]
    slow = torch.cat(halves, -1)[None] @ layer.proj.weight.T + layer.proj.bias
    same(layer(x), slow, [x, *layer.parameters()])


def test_the_last_stage_attends_everywhere_in_one_branch():
    torch.manual_seed(0)
    layer = moved(CrossShapedAttention(6, 3, None))
    (branch,) = layer.attns
    x = normal(1, 2, 3, 6).requires_grad_()
    qkv = x @ layer.qkv.weight.T + layer.qkv.bias
    slow = slow_branch(branch, qkv[0])[None] @ layer.proj.weight.T + layer.proj.bias
    same(layer(x), slow, [x, *layer.parameters()])


# ---- the net


def norm_of(layer, x):
    """Normalise over the channels of (B, H, W, C)."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def test_a_block_adds_its_attention_and_its_feed_forward():
    block = moved(Block(8, CrossShapedAttention(8, 2, 1), 3.0, drop_path=0))
    x = normal(2, 3, 2, 8)
    y = x + block.attn(norm_of(block.norm1, x))
    hidden = block.mlp.fc1(norm_of(block.norm2, y))
    assert hidden.shape[-1] == 24
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(block(x), y + block.mlp.fc2(hidden), rtol=1e-9, atol=1e-9)


def test_stochastic_depth_is_of_both_branches():
    x = torch.randn(2, 3, 2, 8)
    torch.manual_seed(0)
    assert torch.equal(Block(8, CrossShapedAttention(8, 2, 1), 2.0, drop_path=0.999).train()(x), x)


def test_a_stage_merges_then_runs_its_blocks():
    block = Block(8, CrossShapedAttention(8, 2, 1), 2.0, drop_path=0)
    stage = moved(Stage(4, 8, [block, block]))
    x = 0.01 * normal(2, 4, 5, 6)
    conv, norm = stage.downsample
    inside = norm_of(norm, F.conv2d(x, conv.weight, 0.01 * conv.bias, stride=2, padding=1).permute(0, 2, 3, 1))
    with torch.no_grad():
        conv.bias *= 0.01  # small values, so that the epsilon counts
    torch.testing.assert_close(stage(x), block(block(inside)).permute(0, 3, 1, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("stride", "padding"), [(2, 3), (4, 2)])
def test_the_net_is_stem_stages_norm_mean_and_head(stride, padding):
    model = moved(tiny(stem_stride=stride)).eval()
    x = 0.01 * normal(2, 3, 45, 61)
    conv, norm = model.stem
    inside = F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=padding)
    for stage in (lambda y: norm_of(norm, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), *model.stages):
        inside = stage(inside)
    pooled = norm_of(model.norm, inside.permute(0, 2, 3, 1)).mean((1, 2))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


def test_drop_path_rises_and_weights_begin_as_published():
    model = tiny(drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    model = create_model("cswin_nano", num_classes=100)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
            assert not module.bias.any()
        if isinstance(module, torch.nn.Conv2d):  # torch's own beginning
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.8 * bound < module.weight.detach().abs().max() <= bound, name


def test_variants_are_as_published(monkeypatch):
    with torch.device("meta"):
        model = create_model("cswin_tiny", num_classes=1000)
        assert model(torch.zeros(1, 3, 225, 190)).shape == (1, 1000)
    assert count_parameters(model) == 22_320_552
    assert [stage.blocks[0].attn.attns[0].stripe for stage in model.stages] == [(None, w) for w in (1, 2, 7, None)]
    made = {}
    monkeypatch.setattr(cswin, "create", lambda kind, name, pretrained, weights, **own: made.update({name: own}))
    for name in ("tiny", "small", "base", "base_384", "large", "large_384"):
        getattr(cswin, f"cswin_{name}")()
        kind, _, side = name.partition("_")
        options = {key: value.default for key, value in inspect.signature(CSWin).parameters.items()} | made[
            f"cswin_{name}"
        ]
        width, heads = {"base": (96, (4, 8, 16, 32)), "large": (144, (6, 12, 24, 24))}.get(kind, (64, (2, 4, 8, 16)))
        assert (options["dim"], options["num_heads"]) == (width, heads)
        assert options["depths"] == ((1, 2, 21, 1) if kind == "tiny" else (2, 4, 32, 2))
        assert options["stripes"] == (1, 2, 12 if side else 7)
        assert (options["mlp_ratio"], options["lepe"], options["stem_stride"]) == (4, True, 4)
        found = default_cfgs[f"cswin_{name}"].default
        assert found.input_size == (3, int(side or 224), int(side or 224))
        assert found.crop_pct == (1.0 if side else 0.9)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_keys_and_order_become_ours(prefix):
    ours, twin = tiny(), tiny()
    state = {key: value + 1 for key, value in ours.state_dict().items()}
    theirs = {prefix + authors_name(key): authors_order(ours, key, value) for key, value in state.items()}
    names = ["stage1_conv_embed.2.weight", "stage3.1.qkv.weight", "stage4.0.attns.0.get_v.bias", "stage1.0.proj.bias"]
    names += ["merge1.conv.weight", "merge3.norm.bias", "stage2.0.mlp.fc1.weight", "norm.weight", "head.bias"]
    assert {prefix + name for name in names} <= set(theirs)
    worse = {key: torch.zeros_like(value) for key, value in theirs.items()}
    for given in (theirs, {"state_dict": theirs}, {"state_dict": worse, "state_dict_ema": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
        for key, value in twin.state_dict().items():
            assert torch.equal(value, state[key]), key
        twin.reset_classifier(3)
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def authors_name(key):
    head, _, rest = key.partition(".")
    if head == "stem":
        return f"stage1_conv_embed.{'2' if rest[0] == '1' else '0'}{rest[1:]}"
    if head != "stages":
        return key
    stage, part, number, rest = rest.split(".", 3)
    if part == "downsample":
        return f"merge{stage}.{'conv' if number == '0' else 'norm'}.{rest}"
    return f"stage{int(stage) + 1}.{number}.{rest.removeprefix('attn.')}"


def authors_order(model, key, value):
    """All queries, then all keys, then all values, the two directions side by side in each."""
    layer = model.get_submodule(key.rpartition(".qkv.")[0]) if ".qkv." in key else None
    if layer is None or len(layer.attns) == 1:
        return value
    down, across = value.chunk(2)
    return torch.cat([half for pair in zip(down.chunk(3), across.chunk(3)) for half in pair])


def test_any_size_dense_features_and_pooling():
    assert pyramid("cswin_nano", 0, 2, 3) == ([(16, 23, 31), (64, 6, 8), (128, 3, 4)], [2, 8, 16])
    model = tiny(num_classes=0, global_pool="")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 64, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = []
    for shifted in (False, True):
        model = create_model("cswin_nano", num_classes=10, **NET)
        if shifted:
            shifted_windows(side=28)(model)
            blocks = [block for stage in model.stages for block in stage.blocks]
            assert all(isinstance(block, SwinTransformerBlock) for block in blocks)
            assert [block.shift_size[0] for block in blocks] == [0, 2, 0, 2, 0, 1, 0, 1, 0, 0]
            assert [block.window_size[0] for block in blocks] == [4, 4, 4, 4, 2, 2, 2, 2, 2, 2]
            assert float(blocks[0].attn.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert model.eval()(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
        counts.append(count_parameters(model))
    assert counts[1] == pytest.approx(counts[0], rel=0.01)
    with pytest.raises(InputError, match="for a CSWin net, and this is a Linear"):
        shifted_windows(side=28)(torch.nn.Linear(2, 2))


def test_two_blocks_reach_every_place_and_shifted_ones_do_not():
    reach = {(row["windows"], row["blocks"]): row["reach"] for row in reach_of_blocks(8)}
    assert reach["cross", 1] == pytest.approx(15 / 64)
    assert reach["cross", 2] == 1
    assert reach["shifted", 2] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\) has 3 entries.*each of four stages"),
        ({"num_heads": (2,)}, r"num_heads = \(2,\) has 1 entries.*each of four stages"),
        ({"stripes": (1, 2, 7, 7)}, "stripes = .* has 4 entries.*each of the first three stages"),
        ({"num_heads": (2, 2, 4, 5)}, "num_heads = 5 does not divide a width of 64"),
        ({"num_heads": (2, 0, 4, 4)}, "num_heads = 0 does not divide a width of 16"),
        ({"num_heads": (1, 2, 4, 4)}, "num_heads = 1 is odd: give an even number"),
        ({"stripes": (1, 0, 2)}, "stripes = 0 .*1 place"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2 or 4"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
