import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks.mamba2d import ARMS, Lines, lines
from vitrail.errors import InputError
from vitrail.layers.scan import selective_scan
from vitrail.models import create_model
from vitrail.models.mamba2d import (
    STATES,
    Block,
    LocalPath,
    Mamba2D,
    Mamba2DMixer,
    MlpHead,
    PlaneScan,
    RotaryAttention,
    Stage,
    Stem,
    checkpoint_filter_fn,
)

TINY = {"dims": (4, 6, 8, 8), "depths": (2, 1, 1, 1), "stem_stride": 2}


def tiny(**options):
    torch.manual_seed(0)
    return Mamba2D(num_classes=3, **{**TINY, **options})


# ---- slow loops, from the paper and the published code


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def layer_norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def slow_scan(scan, x):
    """Scan one plane (H, W, C), a place at a time."""
    height, width, dim = x.shape
    rank = math.ceil(dim / 16)
    edges = [0, rank, 2 * rank, 2 * rank + 16, 2 * rank + 32, 2 * rank + 48]
    h, rows = {}, []
    for i in range(height):
        row = []
        for j in range(width):
            given = scan.x_proj.weight @ x[i, j]
            top, left, B_top, B_left, C = (given[a:b] for a, b in itertools.pairwise(edges))
            updates = {}
            for name, layer, rate, low, enter, before in (
                ("top", scan.dt_top, scan.A_top_log, top, B_top, h.get((i - 1, j))),
                ("left", scan.dt_left, scan.A_left_log, left, B_left, h.get((i, j - 1))),
            ):
                step = torch.log1p(torch.exp(layer.weight @ low + layer.bias))
                update = (step * x[i, j])[:, None] * enter
                if before is not None:
                    update = update + torch.exp(-step[:, None] * torch.exp(rate)) * before
                updates[name] = update
            if i == 0:
                h[i, j] = updates["left"]
            elif j == 0:
                h[i, j] = updates["top"]
            else:
                h[i, j] = (updates["top"] + updates["left"]) / 2
            row.append(h[i, j] @ C + scan.D * x[i, j])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def slow_local(path, x):
    inside = x @ path.pwconv1.weight.T
    inside = path.act1.scale * inside.clamp(min=0) ** 2 + path.act1.bias
    height, width, _ = inside.shape
    rows = []
    for i in range(height):
        for j in range(width):
            total = 0
            for a in range(3):
                for b in range(3):
                    if 0 <= i + a - 1 < height and 0 <= j + b - 1 < width:
                        total = total + path.dwconv.weight[:, 0, a, b] * inside[i + a - 1, j + b - 1]
            rows.append(total)
    inside = torch.stack(rows).reshape(inside.shape)
    inside = path.act2.scale * inside.clamp(min=0) ** 2 + path.act2.bias
    return inside @ path.pwconv2.weight.T


def around(function, x):
    """Apply it to the plane read from its lower right corner."""
    return function(x.flip(0, 1)).flip(0, 1)


def slow_mixer(mixer, x):
    inside = gelu(linear(mixer.in_proj, x))
    own = around(lambda p: slow_scan(mixer.scan, p), inside) if mixer.backwards else slow_scan(mixer.scan, inside)
    if mixer.scan_back is not None:
        other = slow_scan(mixer.scan_back, inside) if mixer.backwards else None
        other = around(lambda p: slow_scan(mixer.scan_back, p), inside) if other is None else other
        own = 0.5 * own + 0.5 * other
    y = linear(mixer.out_proj, gelu(own))
    return y if mixer.local_path is None else y + slow_local(mixer.local_path, layer_norm(mixer.local_norm, x))


def slow_attention(layer, x):
    """Attend in one plane (H, W, C), heads of 32 channels, pairs turned as complex numbers."""
    height, width, _ = x.shape
    query, key, value = linear(layer.qkv, x).reshape(height * width, 3, -1, 32).unbind(1)
    places = [(i, j) for i in range(height) for j in range(width)]

    def turn(part, norm):
        rows = []
        for number, (i, j) in enumerate(places):
            pairs = torch.complex(part[number, :, 0::2], part[number, :, 1::2])  # (n, 16)
            angle = [i * 10_000 ** (-k / 8) for k in range(8)] + [j * 10_000 ** (-k / 8) for k in range(8)]
            pairs = pairs * torch.polar(torch.ones(16, dtype=torch.float64), torch.tensor(angle, dtype=torch.float64))
            rows.append(torch.stack((pairs.real, pairs.imag), -1).flatten(-2))
        return layer_norm(norm, torch.stack(rows))

    query, key = turn(query, layer.q_norm), turn(key, layer.k_norm)
    weights = (torch.einsum("qnd,knd->nqk", query, key) / 32**0.5).softmax(-1)
    return linear(layer.proj, torch.einsum("nqk,knd->qnd", weights, value).reshape(height, width, -1))


LAYERS = {
    "scan": (lambda: PlaneScan(17), slow_scan, 17),
    "local path": (lambda: LocalPath(5), slow_local, 5),
    "mixer": (lambda: Mamba2DMixer(5), slow_mixer, 5),
    "mixer backwards": (lambda: Mamba2DMixer(5, local=False, backwards=True), slow_mixer, 5),
    "mixer from both corners": (lambda: Mamba2DMixer(5, local=False, both=True), slow_mixer, 5),
    "mixer from both, turned": (lambda: Mamba2DMixer(5, both=True, backwards=True), slow_mixer, 5),
    "attention": (lambda: RotaryAttention(70), slow_attention, 70),
}


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_slow_loop(name, size):
    make, slow, width = LAYERS[name]
    torch.manual_seed(0)
    layer = moved(make())
    x = normal(2, *size, width).requires_grad_()
    ours, theirs = layer(x), torch.stack([slow(layer, plane) for plane in x])
    # Angles are of single precision.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "attention" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(ours, theirs, **tolerance)
    given, weight = [x, *layer.parameters()], normal(*ours.shape, seed=9)
    found, expected = (torch.autograd.grad((y * weight).sum(), given, allow_unused=True) for y in (ours, theirs))
    for value, got, wanted in zip(given, found, expected, strict=True):
        got, wanted = (torch.zeros_like(value) if part is None else part for part in (got, wanted))
        torch.testing.assert_close(got, wanted, **tolerance)


def test_the_scan_of_low_precision_has_exact_rates():
    scan = PlaneScan(8).bfloat16()
    with torch.no_grad():
        scan.A_top_log.fill_(-3.015625)
    seen = {}

    def look(u, delta_top, delta_left, A_top, *rest):
        seen["A"] = A_top
        return u

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.models.mamba2d.plane_scan", look)
        scan(torch.zeros(1, 2, 2, 8, dtype=torch.bfloat16))
    torch.testing.assert_close(seen["A"], torch.full((8, STATES), -math.exp(-3.015625)), rtol=1e-6, atol=0)


def test_a_block_scales_what_came_in_and_adds_to_it():
    block = moved(Block(6, Mamba2DMixer(6), 3.0, drop_path=0))
    x = normal(2, 3, 4, 6)
    y = x * block.scale1 + block.mixer(layer_norm(block.norm1, x))
    hidden = gelu(linear(block.mlp.fc1, layer_norm(block.norm2, y)))
    assert hidden.shape[-1] == 18
    torch.testing.assert_close(block(x), y * block.scale2 + linear(block.mlp.fc2, hidden), rtol=1e-9, atol=1e-9)


def test_the_net_is_stem_stages_mean_norm_and_head():
    model = moved(tiny())
    x = normal(2, 3, 13, 18)
    inside = F.conv2d(x, model.stem.conv.weight, model.stem.conv.bias, stride=2, padding=3)
    inside = layer_norm(model.stem.norm, inside.permute(0, 2, 3, 1))
    for number, stage in enumerate(model.stages):
        if number:
            down = stage.downsample
            inside = F.conv2d(inside.permute(0, 3, 1, 2), down.weight, down.bias, stride=2, padding=1)
            inside = inside.permute(0, 2, 3, 1)
        for block in stage.blocks:
            inside = block(inside)
        inside = layer_norm(stage.norm, inside)
    torch.testing.assert_close(model.forward_features(x), inside.permute(0, 3, 1, 2))
    pooled = layer_norm(model.norm, inside.mean((1, 2)))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    hidden = layer_norm(model.head.norm, gelu(linear(model.head.fc1, pooled)))
    assert hidden.shape[-1] == 32
    torch.testing.assert_close(model(x), linear(model.head.fc2, hidden))


def test_stem_reduces_as_it_says():
    for stride, expected in ((1, (16, 13)), (2, (8, 7)), (4, (4, 3))):
        assert Stem(3, 4, stride)(torch.zeros(1, 3, 16, 13)).shape == (1, 4, *expected)
    assert Stem(3, 4, 4).conv.padding == (2, 2)


def test_every_other_scan_begins_in_the_opposite_corner_and_drop_path_rises():
    model = tiny(depths=(3, 2, 1, 1), drop_path_rate=0.6)
    turns = [[block.mixer.backwards for block in stage.blocks] for stage in model.stages[:2]]
    assert turns == [[False, True, False], [False, True]]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert not any(module.backwards for module in tiny(alternate=False).modules() if isinstance(module, Mamba2DMixer))


def test_a_stage_has_the_mixer_that_is_asked_for():
    model = tiny(dims=(4, 4, 4, 4), mixers=("scan", "scan_both", "scan_local", "attention"))
    scan, both, local, attention = (stage.blocks[0].mixer for stage in model.stages)
    assert isinstance(attention, RotaryAttention)
    assert [mixer.scan_back is not None for mixer in (scan, both, local)] == [False, True, False]
    assert [mixer.local_path is not None for mixer in (scan, both, local)] == [False, False, True]


def test_weights_begin_as_published():
    torch.manual_seed(0)
    scan = PlaneScan(320)
    for logs in (scan.A_top_log, scan.A_left_log):
        torch.testing.assert_close(logs.detach().exp(), torch.arange(1.0, 17).expand(320, 16))
    assert torch.equal(scan.D.detach(), torch.ones(320))
    steps = F.softplus(scan.dt_top.bias.detach())
    assert torch.equal(scan.dt_top.bias, scan.dt_left.bias)
    assert 0.001 <= float(steps.min()) < 0.0012
    assert 0.08 < float(steps.max()) <= 0.1
    for layer in (scan.dt_top, scan.dt_left):
        assert scan.rank == 20
        assert 0.95 * 20**-0.5 < float(layer.weight.detach().abs().max()) <= 20**-0.5
    assert not torch.equal(scan.dt_top.weight, scan.dt_left.weight)
    path = LocalPath(8)
    assert [path.act1.scale.item(), path.act1.bias.item()] == [1, 0]
    block = tiny().stages[0].blocks[0]
    assert torch.equal(block.scale1.detach(), torch.ones(4))
    assert torch.equal(block.scale2.detach(), torch.ones(4))


def test_variants_are_as_published():
    counts = {"n": 7_178_496, "t": 26_523_136, "s": 50_273_636}
    for name, count in counts.items():
        with torch.device("meta"):
            model = create_model(f"mamba2d_{name}", num_classes=1000)
        assert count_parameters(model) == count
        kinds = [{type(block.mixer) for block in stage.blocks} for stage in model.stages]
        assert kinds == [{Mamba2DMixer}] * 2 + [{RotaryAttention}] * 2
        assert [len(stage.blocks) for stage in model.stages] == ([3, 12, 14, 3] if name == "s" else [3, 3, 9, 3])
        assert model.stages[0].blocks[1].mixer.backwards
        assert model.stages[0].blocks[0].mixer.local_path is not None


def test_what_sets_the_rates_is_not_decayed():
    model = tiny()
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    kept = {id(parameter) for group in groups if not group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in kept) == (parameter.ndim < 2 or name.endswith("_log")), name
    assert tiny(mixers=("attention",) * 4).no_weight_decay() == set()


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_authors_keys_become_ours(prefix):
    options = {"mixers": ("scan_local", "scan_both", "attention", "attention"), "depths": (2, 3, 1, 1)}
    ours, twin = tiny(**options), tiny(**options)
    theirs = {prefix + _authors_name(key, ours): value + 1 for key, value in ours.state_dict().items()}
    names = ["backbone.ds.stem.post_norm.norm.weight", "backbone.ds.ds2.conv.bias", "backbone.stages.0.2.weight"]
    names += ["backbone.stages.0.1.token_mixer.AT_log", "backbone.stages.1.0.token_mixer.dt_projL_b.weight"]
    names += ["backbone.stages.0.0.res_scale1.scale", "backbone.stages.0.0.token_mixer.local_path.act2.scale"]
    names += ["backbone.stages.1.2.token_mixer.D_b", "backbone.stages.2.0.token_mixer.q_norm.weight"]
    names += ["backbone.stages.0.0.MLP.fc1.weight", "backbone.stages.0.0.token_mixer.dt_projT.bias"]
    names += ["backbone.stages.1.0.token_mixer.AL_log_b", "norm.weight", "head.fc2.bias"]
    assert {prefix + name for name in names} <= set(theirs)
    for given in (theirs, {"state_dict": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def _authors_name(key, model):
    part, _, rest = key.partition(".")
    if part == "stem":
        return "backbone.ds.stem." + ("post_norm.norm." if rest.startswith("norm") else "") + rest.removeprefix("norm.")
    if part != "stages":
        return key
    stage, part, *rest = rest.split(".")
    if part == "downsample":
        return f"backbone.ds.ds{stage}.conv.{rest[0]}"
    if part == "norm":
        return f"backbone.stages.{stage}.{len(model.stages[int(stage)].blocks)}.{rest[0]}"
    block, name = rest[0], ".".join(rest[1:])
    for old, new in (("mlp", "MLP"), ("scale1", "res_scale1.scale"), ("scale2", "res_scale2.scale")):
        name = new + name.removeprefix(old) if name.startswith(old) else name
    back = "scan_back." in name
    name = name.replace("mixer.scan_back.", "mixer.").replace("mixer.scan.", "mixer.").replace("mixer.", "token_mixer.")
    for old, new in (
        ("dt_top", "dt_projT"),
        ("dt_left", "dt_projL"),
        ("A_top_log", "AT_log"),
        ("A_left_log", "AL_log"),
    ):
        name = name.replace(old, new)
    if back:
        head, *tail = name.removeprefix("token_mixer.").split(".")
        name = ".".join(["token_mixer", f"{head}_b", *tail])
    return f"backbone.stages.{stage}.{block}.{name}"


def test_any_size_dense_features_and_pooling():
    features = create_model("mamba2d_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 19, 25), (64, 5, 7), (96, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    model = Mamba2D(num_classes=0, global_pool="", **TINY)
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 8, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)
    assert isinstance(model.get_classifier(), MlpHead)


def test_checkpointing_is_of_blocks():
    model = tiny()
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.stages if isinstance(stage, Stage))


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = {}
    for name, (options, directions) in ARMS.items():
        model = create_model("mamba2d_nano", num_classes=10, **options)
        counts[name] = count_parameters(lines(directions=directions)(model) if directions else model)
    plane, four, one, *alone = counts.values()
    assert four == pytest.approx(plane, rel=0.01)
    assert one == pytest.approx(plane, rel=0.01)
    assert alone[1] == pytest.approx(alone[0], rel=0.01)


@pytest.mark.parametrize("directions", [1, 4])
def test_scans_of_lines_are_of_rows_and_columns_from_either_end(directions):
    torch.manual_seed(0)
    scan = moved(Lines(5, directions))
    x = normal(1, 3, 4, 5)
    total = 0
    for k in range(directions):
        plane = x.transpose(1, 2) if k % 2 else x
        plane = plane.flip(1, 2) if k > 1 else plane
        u = plane.flatten(1, 2).transpose(1, 2)
        low, enter, leave = (scan.x_proj_weight[k] @ u).split((1, 16, 16), 1)
        delta = scan.dt_projs_weight[k] @ low + scan.dt_projs_bias[k][:, None]
        part = slice(5 * k, 5 * k + 5)
        y, _ = selective_scan(u, F.softplus(delta), -scan.A_logs[part].exp(), enter, leave, scan.Ds[part])
        y = y.transpose(1, 2).reshape(plane.shape)
        y = y.flip(1, 2) if k > 1 else y
        total = total + (y.transpose(1, 2) if k % 2 else y)
    torch.testing.assert_close(scan(x), total / directions)


def test_lines_take_the_place_of_every_scan():
    model = lines()(tiny(depths=(2, 1, 1, 1)))
    assert sum(isinstance(module, Lines) for module in model.modules()) == 3
    assert not any(isinstance(module, PlaneScan) for module in model.modules())
    with pytest.raises(InputError, match="found no scan of the plane"):
        lines()(model)
    with pytest.raises(InputError, match=r"directions = 2 .*1 or 4"):
        lines(directions=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\).*one of each for every stage"),
        ({"dims": (), "depths": (), "mixers": ()}, "one of each for every stage"),
        ({"mixers": ("scan", "scan", "scan", "conv")}, "'conv' is not allowed: give one of scan, scan_both"),
        ({"stem_stride": 3}, "stem_stride = 3 .*1, 2 or 4"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
