import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks.sret import ARMS, deep_net, deep_training
from vitrail.errors import InputError
from vitrail.layers.recursion import NonlinearProjection
from vitrail.models import create_model, sret
from vitrail.models.sret import Block, Recursion, SReT, Stage, checkpoint_filter_fn, default_cfgs

TINY = {
    "num_classes": 3,
    "img_size": 24,
    "dims": (4, 8, 8),
    "depths": (2, 4, 3),
    "blocks": (1, 2, 3),
    "num_heads": (1, 2, 2),
    "groups": ((3, 2), (2, 1), (1, 1)),
    "stem_strides": (2, 1, 2),
}


def tiny(**options):
    torch.manual_seed(0)
    return SReT(**{**TINY, **options})


# ---- a block and its passes


def slow_attention(layer, x):
    """Attend from each of the tokens (n, C) to all."""
    query, key, value = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1)
    width = x.shape[1] // layer.num_heads
    rows = []
    for i in range(len(x)):
        parts = []
        for head in range(layer.num_heads):
            own = slice(head * width, (head + 1) * width)
            scores = torch.stack([query[i, own] @ key[j, own] / math.sqrt(width) for j in range(len(x))])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weights[j] * value[j, own] for j in range(len(x))))
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ layer.proj.weight.T + layer.proj.bias


def norm_of(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def mlp_of(layer, x):
    hidden = x @ layer.fc1.weight.T + layer.fc1.bias
    return (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ layer.fc2.weight.T + layer.fc2.bias


def slow_block(block, x, members):
    """Return tokens (N, C) after a block whose groups have these members."""
    a, b, c, d = block.residual
    normed, found = norm_of(block.norm1, x), torch.zeros_like(x)
    for group in members:
        found[group] = slow_attention(block.attn, normed[group])
    x = a * x + b * found
    return c * x + d * mlp_of(block.mlp, norm_of(block.norm2, x))


@pytest.mark.parametrize("members", [[[0, 1, 2], [3, 4]], [[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]]])
def test_a_block_is_the_slow_loop(members):
    block = moved(Block(6, 2, 1.5))
    x = (0.01 * normal(1, 5, 6)).requires_grad_()  # small values, so that the epsilon counts
    ours, slow = block(x, len(members)), slow_block(block, x[0], members)[None]
    torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-9)
    weight, given = normal(1, 5, 6, seed=9), [x, *block.parameters()]
    for got, wanted in zip(*(torch.autograd.grad((y * weight).sum(), given) for y in (ours, slow)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_a_shuffled_block_attends_in_the_drawn_groups():
    block, x = moved(Block(6, 2, 1.5)), normal(1, 5, 6)
    torch.manual_seed(4)
    order = torch.randperm(5).tolist()
    torch.manual_seed(4)
    slow = slow_block(block, x[0], [order[:3], order[3:]])[None]
    torch.testing.assert_close(block.train()(x, 2, True), slow, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(block.eval()(x, 2, True), slow)
    torch.testing.assert_close(block(x, 2, True), block(x, 2, True), rtol=0, atol=0)


def test_what_is_dropped_leaves_what_goes_past():
    block, x = moved(Block(6, 2, 1.5)), normal(1, 5, 6)
    block.drop_path = torch.nn.Dropout(1.0)
    torch.testing.assert_close(block.train()(x), block.residual[0] * block.residual[2] * x)


def test_a_stage_passes_through_each_block_and_projects_behind_each_pass():
    units = [Recursion(Block(8, 2, 2.0), [NonlinearProjection(8) for _ in range(3)]) for _ in range(2)]
    stage = moved(Stage(4, 8, units, (3, 2))).eval()
    x = normal(2, 4, 5, 6)
    y = F.conv2d(x, stage.downsample.weight, stage.downsample.bias, stride=2, padding=1, groups=4)
    assert stage.downsample.weight.shape[1] == 1
    tokens = y.flatten(2).transpose(1, 2)
    passes = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for (block, loop), (groups, shuffled) in zip(passes, 3 * [(3, False), (2, True)]):
        tokens = units[block].projections[loop](units[block].block(tokens, groups, shuffled))
    torch.testing.assert_close(stage(x), tokens.transpose(1, 2).reshape(2, 8, 3, 3), rtol=1e-9, atol=1e-9)


def test_the_net_is_stem_positions_stages_mean_norm_and_head():
    model = moved(tiny()).eval()
    x = 0.01 * normal(2, 3, 24, 24)
    inside = x
    for number, stride in zip((0, 3, 6), (2, 1, 2)):
        conv, norm = model.stem.conv[number], model.stem.conv[number + 1]
        inside = F.conv2d(inside, conv.weight, conv.bias, stride=stride, padding=1)
        inside = F.batch_norm(inside, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
    inside = inside + model.stem.pos_embed
    for stage in model.stages:
        inside = stage(inside)
    torch.testing.assert_close(model.forward_features(x), inside)
    pooled = norm_of(model.norm, inside.mean((2, 3)))
    torch.testing.assert_close(model.forward_head(inside, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


def test_weights_are_shared_by_passes():
    once, twice = tiny(depths=(1, 2, 3)), tiny(depths=(4, 8, 12))
    blocks = [[p.shape for name, p in model.named_parameters() if ".block." in name] for model in (once, twice)]
    assert blocks[0] == blocks[1]
    assert [len(stage.blocks) for stage in twice.stages] == [1, 2, 3]
    assert all(len(unit.projections) == 4 for stage in twice.stages for unit in stage.blocks)


def test_hundreds_of_layers_have_gradients():
    model = create_model("sret_nano", num_classes=3, img_size=8, **deep_net(200)).train()
    x = torch.randn(2, 3, 8, 8)
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    norms = [float(layer.mlp.fc1.weight.grad.norm()) for layer in model.stages[2].blocks[0].projections]
    assert len(norms) == 196
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)
    assert model.stem.conv[0].weight.grad.isfinite().all()


def test_drop_path_and_beginning_are_as_published():
    model = tiny(drop_path_rate=0.9)
    rates = [getattr(unit.block.drop_path, "drop_prob", 0) for stage in model.stages for unit in stage.blocks]
    assert rates == pytest.approx([0, 0.2, 0.3, 0.6, 0.7, 0.8])  # of the passes 0, 2, 3, 6, 7, 8 of 9
    block = Block(8, 2, 2.0, drop_path=0.5).train()
    assert isinstance(block.drop_path, DropPath)
    model = create_model("sret_nano", num_classes=100)
    assert 0.018 < float(model.stem.pos_embed.detach().std()) < 0.022
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):  # torch's own beginning
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.8 * bound < module.weight.detach().abs().max() <= bound, name
        if isinstance(module, Block | NonlinearProjection):
            assert (module.residual == 1).all()
    model.reset_classifier(7)
    assert float(model.head.bias.detach().abs().max()) > 0


def test_variants_are_as_published(monkeypatch):
    with torch.device("meta"):
        assert count_parameters(create_model("sret_t", num_classes=1000)) == 4_755_979
    made = {}
    monkeypatch.setattr(sret, "create", lambda kind, name, pretrained, weights, stages, **own: made.update({name: own}))
    defaults = {key: value.default for key, value in inspect.signature(SReT).parameters.items()}
    names = ("t", "lt", "lt_16_14_1", "s", "t_wo_slice", "lt_wo_slice", "s_wo_slice")
    for name in (*names, "t_wo_slice_384", "s_wo_slice_384", "s_wo_slice_512"):
        getattr(sret, f"sret_{name}")()
        options, kind = defaults | made[f"sret_{name}"], name.partition("_")[0]
        small = kind == "s"
        assert (options["depths"], options["blocks"]) == ((4, 10, 6), (2, 5, 3))
        assert options["dims"] == ((126, 252, 504) if small else (64, 128, 256))
        assert options["num_heads"] == ((3, 6, 12) if small else (2, 4, 8))
        assert options["mlp_ratio"] == {"t": 3.6, "lt": 4.0, "s": 3.0}[kind]
        assert options["projection_ratio"] == (2 if small else 1)
        sliced = ((16, 1), (14, 1), (1, 1)) if "16" in name else ((8, 2), (4, 1), (1, 1))
        assert options["groups"] == (((1, 1),) * 3 if "wo_slice" in name else sliced)
        side = int(name[-3:]) if name[-3:].isdigit() else 224
        assert options["img_size"] == side
        found = default_cfgs[f"sret_{name}"].default
        assert (found.input_size, found.crop_pct) == ((3, side, side), 0.875 if side == 224 else 1.0)


# ---- the authors' weights


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin = tiny(), tiny()
    state = {key: value + torch.randn(value.shape) for key, value in ours.state_dict().items() if value.ndim}
    state |= {key: value + 5 for key, value in ours.state_dict().items() if not value.ndim}
    theirs = {prefix + name: value for key, whole in state.items() for name, value in authors_names(ours, key, whole)}
    wanted = ["patch_embed.conv2.bias", "patch_embed.bn3.running_var", "pools.0.conv.weight", "pos_embed", "norm.bias"]
    wanted += ["transformers.0.blocks.2.attn.qkv.weight", "transformers.1.blocks.5.coefficient2.bias"]
    wanted += ["transformers.1.blocks.6.coefficient4.bias", "transformers.2.blocks.1.norm1.weight", "head.weight"]
    assert {prefix + name for name in wanted} <= set(theirs)
    for given in (theirs, {"model": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
        for key, value in twin.state_dict().items():
            assert torch.equal(value, state[key]), key
        twin.load_state_dict(tiny(num_classes=3).state_dict())
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()
    larger = tiny(img_size=32)
    larger.load_state_dict(checkpoint_filter_fn(theirs, larger))
    wide = F.interpolate(state["stem.pos_embed"], (8, 8), mode="bicubic")
    assert torch.equal(larger.stem.pos_embed.detach(), wide)


def authors_names(model, key, value):
    """Return all that the authors have under a key of ours: a block is there once for each pass."""
    if key == "stem.pos_embed":
        return [("pos_embed", value)]
    if key.startswith("stem.conv."):
        number, rest = key.removeprefix("stem.conv.").split(".", 1)
        return [(f"patch_embed.{'bn' if int(number) % 3 else 'conv'}{int(number) // 3 + 1}.{rest}", value)]
    if not key.startswith("stages."):
        return [(key, value)]
    _, stage, kind, *more = key.split(".")
    if kind == "downsample":
        return [(f"pools.{int(stage) - 1}.conv.{more[0]}", value)]
    number, part, *rest = more
    loops = len(model.stages[int(stage)].blocks[0].projections)
    first = 2 * loops * int(number)
    places = [first + 2 * int(rest[0]) + 1] if part == "projections" else range(first, first + 2 * loops, 2)
    name = ".".join(rest[part == "projections" :])
    name = name.replace("norm.", "norm1.") if part == "projections" else name
    found = [(name, value)]
    if name == "residual":
        found = [(f"coefficient{place}.bias", one.reshape(1)) for place, one in enumerate(value, 1)]
    return [(f"transformers.{stage}.blocks.{place}.{own}", one) for place in places for own, one in found]


# ---- sizes, and options that do not fit


def test_any_size_dense_features_and_pooling():
    features = create_model("sret_nano", num_classes=10, features_only=True, out_indices=(0, 2)).eval()
    maps = features(torch.randn(1, 3, 45, 61))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 12, 16), (128, 3, 4)]
    assert features.feature_info.reduction() == [4, 16]
    model = tiny(num_classes=0, global_pool="").eval()
    for height, width in ((17, 33), (28, 28), (225, 190)):
        size = tuple(-(-side // 16) for side in (height, width))
        assert model(torch.zeros(1, 3, height, width)).shape == (1, 8, *size)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)
    assert create_model("sret_nano", num_classes=2).no_weight_decay() == {"stem.pos_embed"}


def test_channels_last_is_the_same():
    model, x = moved(tiny()).eval(), normal(2, 3, 28, 20)
    exact = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), exact)


def test_positions_of_another_size_are_interpolated():
    assert tiny(img_size=30).stem.pos_embed.shape == (1, 4, 8, 8)  # a place that is not whole has one, too
    stem = tiny().stem.eval()
    with torch.no_grad():
        for value in (stem.conv[7].weight, stem.conv[7].bias):
            value.zero_()
    wide = F.interpolate(stem.pos_embed, (5, 8), mode="bicubic")
    torch.testing.assert_close(stem(torch.randn(1, 3, 17, 30)), wide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 2)}, r"depths = \(2, 2\) has 2 entries and dims has 3"),
        ({"blocks": (1, 1, 1, 1)}, "blocks = .* has 4 entries"),
        ({"num_heads": (1,)}, "num_heads = .* has 1 entries"),
        ({"groups": ((1, 1),)}, "groups = .* has 1 entries"),
        ({"stem_strides": (2, 2)}, r"stem_strides = \(2, 2\) .*three of 1 or more"),
        ({"stem_strides": (2, 0, 2)}, r"stem_strides = \(2, 0, 2\) .*three of 1 or more"),
        ({"dims": (4, 6, 8)}, r"dims = \(4, 6, 8\) .*multiples, each of the one before"),
        ({"dims": (1, 2, 2)}, r"dims = \(1, 2, 2\) .*multiples"),
        ({"depths": (2, 3, 3)}, "blocks = 2 does not divide depths = 3"),
        ({"blocks": (1, 0, 3)}, "blocks = 0 does not divide depths = 4"),
        ({"num_heads": (1, 3, 2)}, "num_heads = 3 does not divide a width of 8"),
        ({"num_heads": (0, 1, 2)}, "num_heads = 0 does not divide a width of 4"),
        ({"groups": ((1, 1), (1,), (1, 1))}, r"groups = \(1,\) of a stage .*two numbers"),
        ({"groups": ((1, 1), (0, 1), (1, 1))}, r"groups = \(0, 1\) .*two numbers"),
        ({"groups": (2, 2, 2)}, "groups = 2 of a stage .*two numbers"),
        ({"depths": 4}, "depths = 4 is one number: give a list"),
        ({"img_size": 0}, "img_size = 0 .*1 pixel"),
        ({"projection_ratio": 0.1}, r"projection_ratio = 0\.1 leaves no hidden channel"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = {name: count_parameters(create_model("sret_nano", num_classes=10, **net)) for name, net in ARMS.items()}
    assert counts["sliced"] == counts["naive"]
    assert counts["once"] == pytest.approx(counts["naive"], rel=0.005)
    whole = create_model("sret_nano", num_classes=10, **ARMS["naive"])
    assert {stage.groups for stage in whole.stages} == {(1, 1)}


def test_a_deep_net_of_the_check_learns():
    found = deep_training(6)
    assert found["layers"] == 6
    assert found["loss_after"] < found["loss_before"]
    assert found["first_gradient_over_last"] > 0
