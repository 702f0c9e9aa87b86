import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks.vcmamba import ARMS, NET
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.vcmamba import (
    ConvBlock,
    ConvMlp,
    MambaBlock,
    SnakeMixer,
    VCMamba,
    checkpoint_filter_fn,
    moves,
    ways,
)

TINY = {"img_size": 64, "dims": (4, 6, 8, 18), "depths": (1, 1, 2, 3), "mamba": (0, 0, 0, 2), "stem_stride": 2}


def tiny(**options):
    torch.manual_seed(0)
    return VCMamba(num_classes=3, **{**TINY, **options})


# ---- slow loops, from the paper and the published code


def slow_ways(height, width):
    """Walk the four snakes, step by step, with how each step was reached: 1 right, 2 left, 3 up, 4 down."""
    rows = [(i, j if i % 2 == 0 else width - 1 - j) for i in range(height) for j in range(width)]
    columns = [(i if j % 2 == 0 else height - 1 - i, j) for j in range(width) for i in range(height)]
    names = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}
    found = []
    for way in (rows, rows[::-1], columns, columns[::-1]):
        reached = [names[(b[0] - a[0], b[1] - a[1])] for a, b in itertools.pairwise(way)]
        found.append((way, [0, *reached]))
    return found


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (3, 1), (2, 2), (2, 3), (3, 2), (3, 3), (4, 5)])
def test_steps_go_to_a_neighbour_and_know_how(height, width):
    for number, (way, reached) in enumerate(slow_ways(height, width)):
        assert [divmod(int(place), width) for place in ways((height, width))[number]] == way
        assert moves((height, width))[number].tolist() == reached
    assert moves((height, width)).dtype == np.int64


def batch_norm(layer, x):
    shape = (1, -1, 1, 1)
    scale = layer.weight / (layer.running_var + 1e-5).sqrt()
    return (x - layer.running_mean.view(shape)) * scale.view(shape) + layer.bias.view(shape)


def one_by_one(layer, x):
    return torch.einsum("bchw,dc->bdhw", x, layer.weight[:, :, 0, 0]) + layer.bias[:, None, None]


def slow_mixer(mixer, x):
    """Mix one image (C, H, W)."""
    _, height, width = x.shape
    inside = batch_norm(mixer.in_conv[1], one_by_one(mixer.in_conv[0], x[None]))
    inside = F.conv2d(inside, mixer.conv2d.weight, mixer.conv2d.bias, padding=3, groups=len(mixer.D))
    u = (inside / (1 + torch.exp(-inside)))[0].permute(1, 2, 0).reshape(height * width, -1)
    projected = u @ mixer.x_proj.weight.T
    rank = math.ceil(x.shape[0] / 16)
    total = torch.zeros_like(u)
    for way, reached in slow_ways(height, width):
        h, outputs = torch.zeros(u.shape[1], 16, dtype=x.dtype), {}
        for step, (i, j) in enumerate(way):
            # The value is that of the place; step size, B and C are those of the place of that number in rows.
            value, row = u[i * width + j], projected[step]
            delta = mixer.dt_proj.weight @ row[:rank] + 2 * mixer.dt_proj.bias
            delta = torch.log1p(torch.exp(delta))
            enter = row[rank : rank + 16] + mixer.direction_Bs[reached[step]]
            h = torch.exp(-delta[:, None] * torch.exp(mixer.A_log)) * h + (delta * value)[:, None] * enter
            outputs[i * width + j] = h @ row[rank + 16 :] + mixer.D * value
        total = total + torch.stack([outputs[place] for place in range(height * width)])
    centred = total - total.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
    y = y.clamp(min=0).T.reshape(1, -1, height, width)
    return batch_norm(mixer.out_conv[2], one_by_one(mixer.out_conv[1], y))[0]


@pytest.mark.parametrize(("height", "width", "dim"), [(1, 1, 4), (2, 3, 6), (3, 2, 18), (3, 3, 4)])
def test_the_mixer_is_the_slow_loop(height, width, dim):
    torch.manual_seed(0)
    mixer, x = moved(SnakeMixer(dim)).eval(), normal(2, dim, height, width).requires_grad_()
    ours, theirs = mixer(x), torch.stack([slow_mixer(mixer, image) for image in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    given, weight = [x, *mixer.parameters()], normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), given, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_a_feed_forward_layer_is_three_convolutions():
    torch.manual_seed(0)
    layer, x = moved(ConvMlp(3, 5)).eval(), normal(2, 3, 4, 3)
    inside = F.gelu(batch_norm(layer.norm1, one_by_one(layer.fc1, x)))
    inside = F.conv2d(inside, layer.mid.weight, layer.mid.bias, padding=1, groups=5)
    inside = F.gelu(batch_norm(layer.mid_norm, inside))
    wanted = batch_norm(layer.norm2, one_by_one(layer.fc2, inside))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-9)


def test_blocks_add_what_they_compute():
    torch.manual_seed(0)
    x = normal(2, 4, 3, 2)
    conv = moved(ConvBlock(4, 2, drop_path=0.0, layer_scale=1e-5)).eval()
    torch.testing.assert_close(conv(x), x + conv.layer_scale * conv.mlp(x), rtol=1e-9, atol=1e-9)
    block = moved(MambaBlock(4, 2, drop_path=0.0)).eval()
    inside = x + block.mamba(batch_norm(block.norm, x))
    wanted = inside + block.mlp(batch_norm(block.norm2, inside))
    torch.testing.assert_close(block(x), wanted, rtol=1e-9, atol=1e-9)


# ---- the net


@pytest.mark.parametrize("distilled", [False, True])
def test_the_net_is_stem_stages_norm_mean_and_heads(distilled):
    model = moved(tiny(distilled=distilled)).eval()
    x = normal(2, 3, 64, 64)
    inside = x
    for conv, norm in (model.stem[0:2], model.stem[3:5]):
        stride = 2 if conv is model.stem[0] else 1
        inside = batch_norm(norm, F.conv2d(inside, conv.weight, conv.bias, stride, 1)).clamp(min=0)
    for i, stage in enumerate(model.stages):
        if i:
            conv, norm = stage.downsample
            inside = batch_norm(norm, F.conv2d(inside, conv.weight, conv.bias, 2, 1))
        for number, block in enumerate(stage.blocks):
            if i == 3 and number == 1:
                inside = inside + stage.pos_embed
            inside = block(inside)
    inside = F.layer_norm(inside.permute(0, 2, 3, 1), (18,), model.norm.weight, model.norm.bias)
    pooled = inside.mean((1, 2))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    logits = [head(pooled) for head in ([model.head, model.head_dist] if distilled else [model.head])]
    torch.testing.assert_close(model(x), sum(logits) / len(logits))
    if distilled:
        model.set_distilled_training()
        assert isinstance(model.train()(x), tuple)


def test_positions_are_interpolated_for_other_sizes():
    model = moved(tiny()).eval()
    stage = model.stages[3]
    seen = []
    stage.blocks[1].register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    stage.blocks[0].register_forward_hook(lambda _module, _given, out: seen.append(out))
    stage(normal(1, 8, 5, 11))
    wanted = F.interpolate(stage.pos_embed, (3, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(seen[1] - seen[0], wanted)
    assert stage.pos_embed.shape == (1, 18, 4, 4)
    assert [part.pos_embed is None for part in model.stages] == [True, True, True, False]


def test_stem_halves_where_it_says_and_drop_path_rises():
    for stride in (1, 2, 4):
        assert tiny(stem_stride=stride).stem(torch.zeros(1, 3, 16, 12)).shape == (1, 4, 16 // stride, 12 // stride)
    model = tiny(drop_path_rate=0.6)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_weights_begin_as_published():
    model = create_model("vcmamba_nano", num_classes=100, distilled=True)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 2 + 2 * 2
    for module in linear:
        if module.weight.numel() > 300:
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert module.bias is None or not module.bias.any()
    for module in (m for m in model.modules() if isinstance(m, ConvMlp)):
        assert float(module.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert float(module.fc2.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert not module.fc1.bias.any() and not module.fc2.bias.any()
        assert float(module.mid.weight.detach().abs().max()) <= 1 / 3 + 1e-6
        assert module.mid.bias.any()
    mixer = model.stages[3].blocks[1].mamba
    row = torch.arange(1.0, 17.0)
    torch.testing.assert_close(mixer.A_log.detach().exp(), row.expand(128, 16))
    assert mixer.D.detach().eq(1).all()
    assert 0.01 < float(mixer.direction_Bs.detach().std()) < 0.03
    assert 0.01 < float(model.stages[3].pos_embed.detach().std()) < 0.03
    stem = model.stem[3]
    assert float(stem.weight.detach().std()) == pytest.approx((8 * 9) ** -0.5, rel=0.1)
    assert not stem.bias.any()
    assert torch.equal(model.stages[3].blocks[0].layer_scale.detach(), torch.full((64, 1, 1), 1e-5))


def test_variants_are_as_published():
    counts = {"s": 10_478_720, "m": 21_072_176, "b": 31_450_832}
    for name, count in counts.items():
        with torch.device("meta"):
            model = create_model(f"vcmamba_{name}", num_classes=1000, distilled=True)
        assert count_parameters(model) == count
        kinds = [[isinstance(block, MambaBlock) for block in stage.blocks] for stage in model.stages]
        assert not any(kind for stage in kinds[:3] for kind in stage)
        assert kinds[3] == [False] * (len(kinds[3]) - 4) + [True] * 4
        assert model.stages[3].pos_embed.shape[2:] == (7, 7)


def test_what_sets_the_rates_is_not_decayed():
    for model in (tiny(), tiny(mamba=(0, 0, 0, 0))):
        kept = next(
            group["params"]
            for group in param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
            if not group["weight_decay"]
        )
        kept = {id(parameter) for parameter in kept}
        for name, parameter in model.named_parameters():
            assert (id(parameter) in kept) == (parameter.ndim < 2 or name.endswith(("A_log", "pos_embed"))), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin, single = tiny(distilled=True), tiny(distilled=True), tiny()
    with torch.no_grad():
        for value in ours.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    theirs = {prefix + _authors_name(key): value for key, value in ours.state_dict().items()}
    names = ["patch_embed.3.weight", "network.1.proj.bias", "network.5.norm.running_var", "network.0.0.layer_scale_2"]
    names += ["network.6.1.mamba.direction_Bs", "network.4.1.mlp.mid_norm.weight", "pos_embed", "dist_head.bias"]
    assert {prefix + name for name in names} <= set(theirs)
    for given in (theirs, {"model": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()
    single.load_state_dict(checkpoint_filter_fn(theirs, single), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(single.eval()(x), ours.eval()(x), rtol=1e-4, atol=1e-5)
    larger = tiny(img_size=96)
    larger.load_state_dict(checkpoint_filter_fn(theirs, larger), strict=True)
    wanted = F.interpolate(ours.stages[3].pos_embed, (6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(larger.stages[3].pos_embed, wanted)


def _authors_name(key):
    head, _, rest = key.partition(".")
    if head in ("stem", "head_dist"):
        return {"stem": "patch_embed.", "head_dist": "dist_head."}[head] + rest
    if head != "stages":
        return key
    stage, part, *rest = rest.split(".")
    if part == "pos_embed":
        return "pos_embed"
    if part == "downsample":
        return f"network.{2 * int(stage) - 1}.{'proj' if rest[0] == '0' else 'norm'}.{rest[1]}"
    return f"network.{2 * int(stage)}.{'.'.join(rest)}".replace("layer_scale", "layer_scale_2")


def test_any_size_dense_features_and_pooling():
    features = create_model("vcmamba_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 19, 25), (48, 5, 7), (64, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    model = VCMamba(num_classes=0, global_pool="", **TINY)
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 18, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)


def test_arms_of_the_check_are_of_one_size():
    counts = [count_parameters(create_model("vcmamba_nano", num_classes=10, **NET, **arm)) for arm in ARMS.values()]
    assert counts == pytest.approx([counts[0]] * 3, rel=0.006)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\).*each of four stages"),
        ({"dims": (4, 4, 8, 8, 8)}, "dims = .* has 5 entries"),
        ({"mamba": (2,)}, r"mamba = \(2,\).*each of four stages"),
        ({"mamba": (0, 0, 0, 4)}, "mamba = 4 of a stage with 3 blocks.*0 to 3"),
        ({"mamba": (0, -1, 0, 0)}, "mamba = -1 .*0 to 1"),
        ({"stem_stride": 3}, "stem_stride = 3 .*1, 2 or 4"),
        ({"img_size": 0}, "img_size = 0 "),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
