import math

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks.groupmamba import ARMS
from vitrail.errors import InputError
from vitrail.layers.mamba import SS2D
from vitrail.layers.scan.orders import cross
from vitrail.models import create_model
from vitrail.models.conv_stage import ConvMlp, Stage
from vitrail.models.groupmamba import (
    ClassBlock,
    GroupMamba,
    GroupScan,
    ModulatedGroupLayer,
    checkpoint_filter_fn,
)

TINY = {"stem_dim": 4, "dims": (16, 16, 20, 32), "depths": (1, 1, 2, 1), "mlp_ratios": (2, 2, 2, 3), "stem_stride": 2}


def tiny(**options):
    torch.manual_seed(0)
    return GroupMamba(num_classes=3, **{**TINY, **options})


def same(ours, theirs, given):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), given, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


# ---- slow loops, from the paper and the published code


def norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def silu(x):
    return x / (1 + torch.exp(-x))


def slow_convolution(x, weight, bias):
    """Convolve each channel of (H, W, D) with its nine weights."""
    height, width, _ = x.shape
    rows = []
    for i in range(height):
        row = []
        for j in range(width):
            total = bias
            for a in range(3):
                for b in range(3):
                    if 0 <= i + a - 1 < height and 0 <= j + b - 1 < width:
                        total = total + weight[:, 0, a, b] * x[i + a - 1, j + b - 1]
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def slow_group(scan, group, x):
    """Scan one quarter (H, W, d) of the channels of one image in the direction of its number."""
    height, width, d = x.shape
    part = slice(group * d, (group + 1) * d)
    both = x @ scan.in_proj[group].T
    u = silu(slow_convolution(both[..., :d], scan.conv2d.weight[part], scan.conv2d.bias[part]))
    places = [(i, j) for i in range(height) for j in range(width)]
    if group % 2:
        places = [(i, j) for j in range(width) for i in range(height)]
    rank = scan.dt_projs_weight.shape[2]
    h, y = torch.zeros(d, dtype=x.dtype), {}
    for place in places[::-1] if group >= 2 else places:
        projected = scan.x_proj_weight[group] @ u[place]
        low, enter, leave = projected[:rank], projected[rank], projected[rank + 1]
        step = torch.log1p(torch.exp(scan.dt_projs_weight[group] @ low + scan.dt_projs_bias[group]))
        h = torch.exp(-step * torch.exp(scan.A_logs[part, 0])) * h + step * enter * u[place]
        y[place] = leave * h + scan.Ds[part] * u[place]
    y = torch.stack([torch.stack([y[i, j] for j in range(width)]) for i in range(height)])
    y = norm(y, scan.out_norm_weight[part], scan.out_norm_bias[part], 1e-5)
    return (y * silu(both[..., d:])) @ scan.out_proj[group].T


@pytest.mark.parametrize(("height", "width", "dim"), [(1, 1, 4), (2, 3, 8), (3, 2, 12), (1, 4, 68), (3, 3, 8)])
def test_the_scan_is_the_slow_loop(height, width, dim):
    torch.manual_seed(0)
    scan, d = moved(GroupScan(dim)), dim // 4
    x = normal(2, height, width, dim).requires_grad_()
    slow = torch.stack(
        [torch.cat([slow_group(scan, g, image[..., g * d : (g + 1) * d]) for g in range(4)], -1) for image in x]
    )
    same(scan(x), slow, [x, *scan.parameters()])


def test_the_scan_is_four_of_one_direction():
    torch.manual_seed(0)
    scan, x = moved(GroupScan(16)), normal(2, 3, 5, 16)
    parts = []
    for group in range(4):
        one = SS2D(4, states=1, expand=1, orders=lambda shape, g=group: cross(shape)[g : g + 1]).double()
        rows = slice(4 * group, 4 * group + 4)
        own = {
            "in_proj.weight": scan.in_proj[group],
            "out_proj.weight": scan.out_proj[group],
            "out_norm.weight": scan.out_norm_weight[rows],
            "out_norm.bias": scan.out_norm_bias[rows],
            **{f"conv2d.{k}": getattr(scan.conv2d, k)[rows] for k in ("weight", "bias")},
            **{k: getattr(scan, k)[rows] for k in ("A_logs", "Ds")},
            **{k: getattr(scan, k)[group : group + 1] for k in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias")},
        }
        one.load_state_dict({k: v.detach() for k, v in own.items()}, strict=True)
        parts.append(one(x[..., rows]))
    torch.testing.assert_close(scan(x), torch.cat(parts, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("modulation", [True, False])
def test_a_layer_multiplies_scans_with_their_input_and_a_gate(modulation):
    torch.manual_seed(0)
    layer, x = (
        moved(ModulatedGroupLayer(32, GroupScan(32), modulation=modulation)),
        normal(2, 3, 2, 32).requires_grad_(),
    )
    inside = norm(x, layer.norm.weight, layer.norm.bias, 1e-5)
    y = layer.scan(inside) * layer.skip_scale * inside
    if modulation:
        for b in range(2):
            mean = sum(inside[b, i, j] for i in range(3) for j in range(2)) / 6
            hidden = (layer.fc1.weight @ mean + layer.fc1.bias).clamp(min=0)
            assert hidden.shape == (2,)
            gate = 1 / (1 + torch.exp(-(layer.fc2.weight @ hidden + layer.fc2.bias)))
            y = torch.cat((y[:b], (y[b] * gate)[None], y[b + 1 :]))
    y = norm(y, layer.norm.weight, layer.norm.bias, 1e-5) @ layer.proj.weight.T + layer.proj.bias
    same(layer(x), y, [x, *layer.parameters()])


def test_a_feed_forward_layer_convolves_inside():
    torch.manual_seed(0)
    layer, x = moved(ConvMlp(3, 5)), normal(1, 2, 3, 3).requires_grad_()
    inside = slow_convolution((x @ layer.fc1.weight.T + layer.fc1.bias)[0], layer.dwconv.weight, layer.dwconv.bias)
    inside = inside * (1 + torch.erf(inside / 2**0.5)) / 2
    same(layer(x), (inside @ layer.fc2.weight.T + layer.fc2.bias)[None], [x, *layer.parameters()])


def test_a_block_adds_its_scans_and_its_feed_forward():
    block, x = moved(tiny().stages[0].blocks[0]), normal(2, 3, 2, 16)
    inside = x + block.mixer(x)
    wanted = inside + block.mlp(norm(inside, block.norm2.weight, block.norm2.bias, 1e-6))
    torch.testing.assert_close(block(x), wanted, rtol=1e-9, atol=1e-12)


def test_the_last_block_sees_one_place_and_norms_its_scans_afterwards():
    torch.manual_seed(0)
    mixer = ModulatedGroupLayer(16, GroupScan(16), modulation=True)
    block, x = moved(ClassBlock(16, mixer, 2)), 1e-3 * normal(3, 16)
    inside = x + norm(block.mixer(x[:, None, None])[:, 0, 0], block.norm1.weight, block.norm1.bias, 1e-6)
    wanted = inside + block.mlp(norm(inside, block.norm2.weight, block.norm2.bias, 1e-6))
    torch.testing.assert_close(block(x), wanted, rtol=1e-9, atol=1e-12)


# ---- the net


@pytest.mark.parametrize("distilled", [False, True])
def test_the_net_is_stages_mean_block_norm_and_heads(distilled):
    model = moved(tiny(distilled=distilled)).eval()
    inside = normal(2, 3, 20, 28)
    for i, stage in enumerate(model.stages):
        inside = stage.downsample(inside).permute(0, 2, 3, 1)
        inside = norm(inside, stage.embed_norm.weight, stage.embed_norm.bias, 1e-5)
        for block in stage.blocks:
            inside = block(inside)
        if i < 3:
            inside = norm(inside, stage.norm.weight, stage.norm.bias, 1e-6)
        inside = inside.permute(0, 3, 1, 2)
    pooled = norm(model.post(inside.mean((2, 3))), model.norm.weight, model.norm.bias, 1e-6)
    x = normal(2, 3, 20, 28)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    logits = [head(pooled) for head in ([model.head, model.head_dist] if distilled else [model.head])]
    torch.testing.assert_close(model(x), sum(logits) / len(logits))
    if distilled:
        model.set_distilled_training()
        torch.testing.assert_close(model(x), sum(logits) / 2)
        model.train()
        first, second = model(x)
        assert not torch.allclose(first, second)
        model.set_distilled_training(False)
        torch.testing.assert_close(model(x), (first + second) / 2)


def test_the_stem_has_four_convolutions():
    for stride in (2, 4):
        model = tiny(stem_stride=stride)
        assert model.stages[0].downsample(torch.zeros(1, 3, 16, 12)).shape == (1, 16, 16 // stride, 12 // stride)
    kinds = [type(layer).__name__ for layer in model.stages[0].downsample]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 3 + ["Conv2d"]
    assert [layer.kernel_size[0] for layer in model.stages[0].downsample if isinstance(layer, torch.nn.Conv2d)] == [
        7,
        3,
        3,
        3,
    ]


def test_drop_path_rises():
    model = tiny(drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    scales = [stage.blocks[0].drop_path.scale_by_keep for stage in model.stages[1:]]
    assert scales == [True] * 3


def test_weights_begin_as_published():
    model = create_model("groupmamba_nano", num_classes=100, scan="grouped")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel() > 500:
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
            assert not module.bias.any()
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 500:
            fan_out = module.kernel_size[0] ** 2 * module.out_channels / module.groups
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.15), name
        if isinstance(module, GroupScan):
            d = module.in_proj.shape[2]
            assert float(module.in_proj.detach().std()) == pytest.approx(0.02, rel=0.2), name
            assert float(module.out_proj.detach().std()) == pytest.approx(0.02, rel=0.2), name
            assert torch.equal(module.A_logs.detach(), torch.zeros(4 * d, 1))
            assert module.Ds.detach().eq(1).all() and module.out_norm_weight.detach().eq(1).all()
            assert not module.out_norm_bias.any()
            steps = F.softplus(module.dt_projs_bias.detach())
            assert float(steps.min()) > 9e-4 and float(steps.max()) < 0.11
            assert float(module.x_proj_weight.detach().abs().max()) <= d**-0.5
            assert module.dt_projs_weight.shape == (4, d, math.ceil(d / 16))


def test_variants_are_as_published():
    counts = {"tiny": 22_912_917, "small": 34_781_555, "base": 56_637_838}  # of small, with two classifiers
    for name, wanted in counts.items():
        with torch.device("meta"):
            model = create_model(f"groupmamba_{name}", num_classes=1000, distilled=name == "small")
        assert count_parameters(model) == wanted
        assert model.pretrained_cfg["input_size"] == (3, 224, 224)


def test_what_sets_the_rates_is_not_decayed():
    model = tiny()
    kept = next(
        group["params"]
        for group in param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        if not group["weight_decay"]
    )
    kept = {id(parameter) for parameter in kept}
    for name, parameter in model.named_parameters():
        expected = parameter.ndim < 2 or name.endswith(("A_logs", "dt_projs_bias"))
        assert (id(parameter) in kept) == expected, name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin, single = tiny(distilled=True), tiny(distilled=True), tiny()
    with torch.no_grad():
        for value in ours.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
    theirs = {prefix + key: value for key, value in _authors(ours.state_dict()).items()}
    names = ["patch_embed1.conv.4.running_var", "patch_embed1.proj.bias", "patch_embed3.norm.weight", "norm4.bias"]
    names += ["block3.1.attn.mamba_g4.x_proj_weight", "post_network.0.attn.mamba_g1.out_norm.bias", "dist_head.bias"]
    names += ["block1.0.mlp.dwconv.dwconv.weight", "block2.0.attn.skip_scale", "norm2.weight", "patch_embed2.proj.bias"]
    assert {prefix + name for name in names} <= set(theirs)
    for given in (theirs, {"model": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()
    single.load_state_dict(checkpoint_filter_fn(theirs, single), strict=True)
    x = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(single.eval()(x), ours.eval()(x), rtol=1e-4, atol=1e-5)


def _authors(state):
    """Return a state under the authors' names, each group by itself."""
    found = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "stages":
            number, part, *after = rest.split(".")
            number = int(number) + 1
            if part == "downsample":
                layer = f"conv.{after[0]}" if number == 1 and after[0] != "9" else "proj"
                key = f"patch_embed{number}.{layer}.{after[-1]}"
            elif part == "blocks":
                key = f"block{number}.{'.'.join(after)}"
            else:
                key = {"embed_norm": f"patch_embed{number}.norm.", "norm": f"norm{number}."}[part] + after[0]
        elif head in ("post", "head_dist", "norm"):
            key = {"post": "post_network.0", "head_dist": "dist_head", "norm": "norm4"}[head] + "." + rest
        key = key.replace(".dwconv.", ".dwconv.dwconv.").replace(".mixer.", ".attn.")
        if ".scan." not in key:
            found[key] = value
            continue
        before, _, name = key.partition(".scan.")
        theirs = name.replace("out_norm_", "out_norm.") + (".weight" if name in ("in_proj", "out_proj") else "")
        for group, part in enumerate(value.chunk(4)):
            found[f"{before}.mamba_g{group + 1}.{theirs}"] = part[0] if name in ("in_proj", "out_proj") else part
    return found


def test_any_size_dense_features_and_pooling():
    features = create_model("groupmamba_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 19, 25), (64, 5, 7), (96, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    model = GroupMamba(num_classes=0, global_pool="", **TINY)
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 32, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)


def test_both_classifiers_are_replaced_and_given():
    model = tiny(distilled=True)
    model.reset_classifier(7)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 32)


def test_full_scans_see_all_channels_in_all_directions():
    model = tiny(scan="all", modulation=False)
    mixers = [m for m in model.modules() if isinstance(m, ModulatedGroupLayer)]
    assert all(isinstance(mixer.scan, SS2D) and mixer.scan.states == 1 for mixer in mixers)
    assert [len(m.scan.orders((2, 3))) for m in mixers] == [4] * 6
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert not any(name.endswith("fc2.weight") and "mixer" in name for name, _ in model.named_parameters())
    assert isinstance(model.stages[0], Stage)


def test_arms_of_the_check_are_of_the_sizes_they_say():
    count = {n: count_parameters(create_model("groupmamba_nano", num_classes=10, **o)) for n, o in ARMS.items()}
    assert count["all, equal parameters"] == pytest.approx(count["grouped"], rel=0.005)
    assert count["all, equal width"] > 1.2 * count["grouped"]
    assert count["no gate"] == pytest.approx(count["grouped"], rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\).*each of four stages"),
        ({"dims": (16, 16, 32, 32, 64)}, "dims = .* has 5 entries"),
        ({"mlp_ratios": (2,)}, "mlp_ratios = .*each of four stages"),
        ({"dims": (16, 18, 32, 32)}, "dims = 18 .*multiples of 4, 16 or more"),
        ({"dims": (12, 16, 32, 32)}, "dims = 12 .*16 or more"),
        ({"dims": (0, 16, 32, 32), "modulation": False}, "dims = 0 .*4 or more"),
        ({"scan": "group"}, "scan.*'grouped'"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2 or 4"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_a_net_of_one_classifier_cannot_give_two():
    with pytest.raises(InputError, match="distilled=True"):
        tiny().set_distilled_training()
