import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn

from exact import normal
from vitrail.app.build import count_parameters
from vitrail.checks.medical_mamba import CLASSES, NETS, cost, phantoms, soft_dice
from vitrail.errors import VitrailError
from vitrail.layers.scan.orders import cross, raster
from vitrail.models import create_model
from vitrail.models.medical_mamba import (
    LAYERS,
    RGB_MEAN,
    SCANS,
    Attention,
    ChannelAttentionBlock,
    MambaIR,
    MapAttention,
    MapMamba,
    MedMamba,
    PatchExpand,
    PatchMerging,
    ResidualBlock,
    ResidualUNet,
    RestorationBlock,
    SequenceNet,
    SSConvSSM,
    VMUNet,
    checkpoint_filter_fn,
    u_mamba,
)


def moved(make):
    """Return a module in double precision, with all that starts at zero or one moved, for evaluation."""
    torch.manual_seed(0)
    module = make().double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in [*module.parameters(), *(v for k, v in module.named_buffers() if "running_mean" in k)]:
            value += 0.2 * torch.randn(value.shape, dtype=torch.float64, generator=generator)
    return module


def assert_the_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        *(torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


# ---- slow loops, from the published codes


def norm_of(layer, x):
    """Norm the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def test_half_of_the_channels_go_through_each_branch_and_are_shuffled():
    block = moved(lambda: SSConvSSM(8))
    x = normal(2, 3, 5, 8).requires_grad_()
    left, right = x[..., :4].permute(0, 3, 1, 2), x[..., 4:]
    right = block.mixer(norm_of(block.norm, right))

    def batch_norm(layer, value):
        shape = (1, -1, 1, 1)
        value = (value - layer.running_mean.view(shape)) / (layer.running_var.view(shape) + 1e-5).sqrt()
        return value * layer.weight.view(shape) + layer.bias.view(shape)

    layers = block.local
    left = F.conv2d(batch_norm(layers[0], left), layers[1].weight, layers[1].bias, padding=1)
    left = F.conv2d(F.relu(batch_norm(layers[2], left)), layers[4].weight, layers[4].bias, padding=1)
    left = F.relu(F.conv2d(F.relu(batch_norm(layers[5], left)), layers[7].weight, layers[7].bias))
    both = [part for channel in range(4) for part in (left[:, channel], right[..., channel])]
    assert_the_same(block(x), x + torch.stack(both, -1), [x, *block.parameters()])


@pytest.mark.parametrize(("height", "width"), [(4, 6), (3, 4), (5, 1)])
def test_four_neighbours_become_one_place(height, width):
    layer = moved(lambda: PatchMerging(3))
    x = normal(2, height, width, 3).requires_grad_()
    rows = []
    for row in range(0, height, 2):
        for column in range(0, width, 2):
            seen = []
            for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
                inside = row + i < height and column + j < width
                seen.append(x[:, row + i, column + j] if inside else torch.zeros(2, 3, dtype=x.dtype))
            rows.append(norm_of(layer.norm, torch.cat(seen, -1)) @ layer.reduction.weight.T)
    slow = torch.stack(rows, 1).unflatten(1, (-(-height // 2), -1))
    assert_the_same(layer(x), slow, [x, *layer.parameters()])


@pytest.mark.parametrize(("dim", "factor", "expand"), [(4, 2, 2), (8, 4, 4)])
def test_a_place_becomes_a_square_of_places(dim, factor, expand):
    layer = moved(lambda: PatchExpand(dim, factor, expand))
    x = normal(2, 3, 2, dim).requires_grad_()
    out = expand * dim // factor**2
    slow = torch.zeros(2, 3 * factor, 2 * factor, out, dtype=x.dtype)
    for row, column, i, j in itertools.product(range(3), range(2), range(factor), range(factor)):
        values = x[:, row, column] @ layer.expand.weight.T
        part = values[:, (i * factor + j) * out : (i * factor + j + 1) * out]
        slow[:, row * factor + i, column * factor + j] = norm_of(layer.norm, part)
    assert_the_same(layer(x), slow, [x, *layer.parameters()])


@pytest.mark.parametrize(("axes", "sides"), [(2, (3, 4)), (3, (2, 3, 2))])
@pytest.mark.parametrize("scan", SCANS)
def test_mamba_reads_a_map_in_its_orders(axes, sides, scan):
    layer = moved(lambda: MapMamba(6, scan, axes))
    x = normal(2, 6, *sides).requires_grad_()
    orders = SCANS[scan](sides)
    assert len(layer.mixers) == len(orders) == {"both": 2, "cross": 2 * axes}.get(scan, 1)
    places = [norm_of(layer.norm, x.flatten(2)[:, :, place]) for place in range(math.prod(sides))]
    slow = torch.zeros(2, 6, len(places), dtype=x.dtype)
    for mixer, order in zip(layer.mixers, orders, strict=True):
        y = mixer(torch.stack([places[place] for place in order], 1))
        slow = slow.index_add(2, torch.tensor(order.copy()), y.transpose(1, 2))
    assert_the_same(layer(x), slow.view(x.shape), [x, *layer.parameters()])


def test_the_scans_are_those_that_they_say():
    assert [list(order) for order in SCANS["both"]((2, 2))] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert [list(order) for order in SCANS["snake"]((2, 3))] == [[0, 1, 2, 5, 4, 3]]
    assert list(SCANS["windows"]((4, 8))[0][:6]) == [0, 1, 2, 3, 8, 9]
    assert SCANS["cross"]((2, 3, 4)) == cross((2, 3, 4))
    assert SCANS["raster"]((2, 3)) == (raster((2, 3)),)


def test_mamba_scans_channels_where_they_are_more():
    layer = moved(lambda: MapMamba(6, "cross", 2, channel_tokens=True))
    x = normal(2, 9, 2, 3).requires_grad_()
    slow = layer.mixers[0](norm_of(layer.norm, x.flatten(2))).view(x.shape)
    assert_the_same(layer(x), slow, [x, *layer.parameters()])


def test_mamba_has_its_precision_under_autocast():
    torch.manual_seed(0)
    layer, x = MapMamba(6, "raster", 2), torch.randn(1, 6, 3, 3)
    expected = layer.mixers[0](layer.norm(x.flatten(2).transpose(1, 2))).transpose(1, 2).reshape(x.shape)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), expected)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_attention_of_a_sequence_sees_the_past_alone():
    layer = moved(lambda: Attention(8, 2))
    x = normal(2, 5, 8).requires_grad_()
    query, key, value = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1)
    rows = []
    for place in range(5):
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            scores = (query[:, place : place + 1, part] * key[:, : place + 1, part]).sum(-1) / 2
            shares = scores.exp() / scores.exp().sum(1, keepdim=True)
            heads.append((shares.unsqueeze(-1) * value[:, : place + 1, part]).sum(1))
        rows.append(torch.cat(heads, -1))
    slow = torch.stack(rows, 1) @ layer.proj.weight.T + layer.proj.bias
    assert_the_same(layer(x), slow, [x, *layer.parameters()])


def test_attention_of_a_map_is_a_transformer_block_of_its_places():
    layer = moved(lambda: MapAttention(8))
    x = normal(2, 8, 2, 3, 2)
    places = torch.stack([x[:, :, i, j, k] for i, j, k in itertools.product(range(2), range(3), range(2))], 1)
    slow = layer.block(places)
    torch.testing.assert_close(layer(x)[:, :, 1, 0, 1], slow[:, 7])
    assert layer.block.attn.num_heads == 4


@pytest.mark.parametrize(("axes", "stride", "project"), [(2, 1, False), (2, 2, True), (3, 2, True), (3, 1, True)])
def test_a_residual_block_is_two_convolutions_and_what_came_in(axes, stride, project):
    width = 5 if project else 3
    block = moved(lambda: ResidualBlock(axes, 3, width, stride, project=project))
    conv = {2: F.conv2d, 3: F.conv3d}[axes]
    x = normal(2, 3, *[4] * axes).requires_grad_()

    def normed(layer, value):
        dims, shape = tuple(range(2, value.ndim)), (1, -1, *[1] * axes)
        centred = value - value.mean(dims, keepdim=True)
        centred = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        return centred * layer.weight.view(shape) + layer.bias.view(shape)

    y = normed(block.norm1, conv(x, block.conv1.weight, block.conv1.bias, stride, 1))
    y = normed(block.norm2, conv(torch.maximum(y, 0.01 * y), block.conv2.weight, block.conv2.bias, 1, 1))
    y = y + (conv(x, block.skip.weight, block.skip.bias, stride) if project else x)
    assert_the_same(block(x), torch.maximum(y, 0.01 * y), [x, *block.parameters()])


# ---- the nets


def test_medmamba_is_stem_stages_mean_and_head():
    model = moved(lambda: MedMamba(num_classes=3, depths=(1, 2), dims=(4, 8), patch_size=2))
    x = normal(2, 3, 7, 10)
    inside = F.conv2d(F.pad(x, (0, 0, 0, 1)), model.stem.proj.weight, model.stem.proj.bias, 2)
    inside = norm_of(model.stem.norm, inside.permute(0, 2, 3, 1))
    for block in model.stages[0].blocks:
        inside = block(inside)
    inside = model.stages[1].downsample(inside)
    for block in model.stages[1].blocks:
        inside = block(inside)
    torch.testing.assert_close(model.forward_features(x), inside.permute(0, 3, 1, 2))
    torch.testing.assert_close(model(x), inside.mean((1, 2)) @ model.head.weight.T + model.head.bias)


def test_weights_begin_as_published():
    torch.manual_seed(0)
    model = create_model("medmamba_nano", num_classes=100, drop_path_rate=0.4)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            fan = module.out_channels * module.weight[0, 0].numel() / module.groups
            spread = (2 / (module.out_channels * module.weight[0, 0].numel())) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(spread, rel=0.15), (name, fan)
    assert not model.head.bias.any()
    rates = [getattr(block.drop_path, "drop_prob", 0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    rows = model.stages[0].blocks[0].mixer.A_logs.exp()
    torch.testing.assert_close(rows, torch.arange(1.0, 17).expand(rows.shape))
    net = u_mamba("bot", 2, stages=2, dim=64)
    spread = (2 / (1 + 0.01**2) / (64 * 9)) ** 0.5
    assert float(net.stages[0][0].conv2.weight.detach().std()) == pytest.approx(spread, rel=0.05)
    assert not net.stages[1][0].conv1.bias.any()


def test_sizes_are_those_of_the_published_codes():
    with torch.device("meta"):
        assert count_parameters(create_model("medmamba_t", num_classes=1000)) == 15_221_608
        assert count_parameters(VMUNet(num_classes=9)) == 27_427_761
        assert count_parameters(u_mamba("bot", 3, num_classes=3)) == 42_121_199
        assert count_parameters(u_mamba("enc", 2, num_classes=3, stages=7, image_size=(512, 512))) == 47_675_890
        light = MambaIR(3, 60, (6,) * 4, 10, 1.2, 2, "pixelshuffledirect")
        assert count_parameters(light) == 905_016


def test_vm_unet_adds_what_comes_down_below_each_expansion():
    model = moved(lambda: VMUNet(3, 2, (1, 1, 1), (1, 1, 1), 4))
    x = normal(1, 3, 32, 16)
    first = model.stem(x).permute(0, 2, 3, 1)
    second = model.merges[1](model.down[0](first))
    third = model.merges[2](model.down[1](second))
    y = model.up[0](model.down[2](third))
    y = model.up[1](model.expands[1](y + third))
    y = model.up[2](model.expands[2](y + second))
    expected = model.head(model.final(y).permute(0, 3, 1, 2))
    assert expected.shape == (1, 2, 32, 16)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[:, :1]), model(x[:, :1].repeat(1, 3, 1, 1)))
    rates = [
        [getattr(block.drop_path, "drop_prob", 0) for level in levels for block in level]
        for levels in (lambda net: (net.down, net.up))(
            VMUNet(depths=(1, 2), decoder_depths=(2, 1), dim=4, drop_path_rate=0.4)
        )
    ]
    assert rates == [pytest.approx([0, 0.2, 0.4]), pytest.approx([0.4, 0.2, 0])]


@pytest.mark.parametrize("axes", [2, 3])
def test_a_u_net_joins_the_way_down_with_the_way_up(axes):
    model = moved(lambda: u_mamba("enc", axes, 1, 2, stages=3, dim=4, image_size=(8,) * axes, deep_supervision=True))
    x = normal(2, 1, *[8] * axes)
    inside, skips = model.stem(x), []
    for stage, mixer in zip(model.stages, model.mixers, strict=True):
        inside = mixer(stage(inside))
        skips.append(inside)
    up = model.up[0](F.interpolate(skips[2], scale_factor=2, mode="nearest"))
    coarse = model.decoder[0](torch.cat((up, skips[1]), 1))
    up = model.up[1](F.interpolate(coarse, scale_factor=2, mode="nearest"))
    fine = model.decoder[1](torch.cat((up, skips[0]), 1) if axes == 3 else up)
    found = model(x)
    torch.testing.assert_close(found[0], model.heads[1](fine))
    torch.testing.assert_close(found[1], model.heads[0](coarse))
    model.deep_supervision = False
    torch.testing.assert_close(model(x), found[0])


def test_mamba_is_where_the_published_nets_have_it():
    def kinds(net):
        return [
            "c" if getattr(m, "channel_tokens", False) else "p" if isinstance(m, MapMamba) else "" for m in net.mixers
        ]

    assert kinds(u_mamba("bot", 2, stages=4, dim=4)) == ["", "", "", "p"]
    assert kinds(u_mamba("enc", 2, stages=4, dim=4, image_size=(16, 16))) == ["", "p", "", "c"]
    assert kinds(u_mamba("enc", 2, stages=5, dim=4)) == ["p", "", "p", "", "p"]
    assert kinds(u_mamba("enc", 3, stages=4, dim=4, image_size=(16, 8, 8))) == ["p", "p", "c", "c"]
    net = u_mamba("bot", 2, stages=7, dim=2, max_dim=16)
    assert [len(stage) for stage in net.stages] == [2, 2, 2, 2, 1, 1, 1]
    assert [len(stage) for stage in net.decoder] == [2, 2, 2, 2, 1, 1]
    assert [stage[0].conv1.out_channels for stage in net.stages] == [2, 4, 8, 16, 16, 16, 16]


def test_a_hybrid_has_mamba_and_attention_and_takes_any_fitting_size():
    net = ResidualUNet(3, 1, 2, (4, 8, 8), ("none", "mamba", "attention"), (1, 1, 1), (1, 1), "cross")
    assert [type(mixer) for mixer in net.mixers] == [nn.Identity, MapMamba, MapAttention]
    for side in (8, 12):
        assert net(torch.zeros(1, 1, 8, side, 8)).shape == (1, 2, 8, side, 8)


@pytest.mark.parametrize("light", [False, True])
def test_restoration_blocks_add_to_what_came_in_times_a_factor(light):
    block = moved(lambda: RestorationBlock(32, 2, 1.2, light, 0.0))
    x = normal(1, 3, 4, 32)
    y = x * block.skip_scale + block.mixer(norm_of(block.norm, x))
    inside = norm_of(block.norm2, y).permute(0, 3, 1, 2)
    assert block.mixer.out_proj.in_features == int(1.2 * 32)
    weigh = block.local.weigh
    for layer in block.local.convs:
        inside = layer(inside)
    share = torch.sigmoid(weigh[3](F.relu(weigh[1](inside.mean((2, 3), keepdim=True)))))
    torch.testing.assert_close(block(x), y * block.skip_scale2 + (inside * share).permute(0, 2, 3, 1))
    convs = [layer for layer in block.local.convs if isinstance(layer, nn.Conv2d)]
    shapes = [(c.out_channels, c.kernel_size[0], c.groups, c.dilation[0]) for c in convs]
    expected = (
        [(16, 1, 1, 1), (16, 3, 16, 1), (32, 1, 1, 1), (32, 3, 32, 2)] if light else [(10, 3, 1, 1), (32, 3, 1, 1)]
    )
    assert shapes == expected
    assert isinstance(ChannelAttentionBlock(60, light).weigh[1], nn.Conv2d)


@pytest.mark.parametrize(
    ("upscale", "upsampler"), [(1, ""), (2, "pixelshuffledirect"), (3, "pixelshuffle"), (4, "pixelshuffle")]
)
def test_restoration_is_groups_between_convolutions(upscale, upsampler):
    model = moved(lambda: MambaIR(3, 30, (1, 1), 2, 1.2, upscale, upsampler))
    x = torch.rand(1, 3, 5, 7, dtype=torch.float64)
    mean = torch.tensor(RGB_MEAN).view(1, 3, 1, 1)
    first = model.first(x - mean)
    inside = norm_of(model.norm, first.permute(0, 2, 3, 1))
    for group in model.groups:
        y = group.conv(group.blocks(inside).permute(0, 3, 1, 2))
        inside = inside + y.permute(0, 2, 3, 1)
    body = model.after(norm_of(model.last_norm, inside).permute(0, 3, 1, 2)) + first
    out = model.out(body) if upsampler else x - mean + model.out(body)
    assert out.shape == (1, 3, 5 * upscale, 7 * upscale)
    torch.testing.assert_close(model(x), out + mean, rtol=1e-5, atol=1e-6)
    assert not any("mean" in key for key in model.state_dict())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_net_for_sequences_looks_back_alone(layer):
    torch.manual_seed(0)
    net = SequenceNet(2, 3, 8, 2, layer, 4, 20)
    x = torch.randn(2, 12, 2)
    y, other = net(x), net(torch.cat((x[:, :6], torch.randn(2, 6, 2)), 1))
    assert y.shape == (2, 12, 3)
    torch.testing.assert_close(y[:, :6], other[:, :6], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y[:, 6:], other[:, 6:], atol=1e-4)
    x.requires_grad_()
    assert torch.autograd.grad(net(x)[:, -1].sum(), x)[0][:, 0].abs().sum() > 0
    inside = net.enter(x) + (net.places[:12] if layer == "attention" else 0)
    for norm, mixer, gate in zip(net.norms, net.mixers, net.gates, strict=True):
        value, share = gate(F.gelu(mixer(norm(inside)))).chunk(2, -1)
        inside = inside + value * torch.sigmoid(share)
    torch.testing.assert_close(net(x), net.leave(inside))


def test_what_sets_the_rates_is_not_decayed():
    model = create_model("medmamba_nano", num_classes=3)
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    kept = {id(value) for group in groups if not group["weight_decay"] for value in group["params"]}
    for name, value in model.named_parameters():
        assert (id(value) in kept) == (value.ndim < 2 or name.endswith("A_logs")), name


def test_any_size_and_dense_features():
    features = create_model("medmamba_nano", num_classes=3, features_only=True, out_indices=(0, 1, 3)).eval()
    assert [tuple(m.shape[1:]) for m in features(torch.randn(1, 3, 37, 50))] == [
        (16, 19, 25),
        (32, 10, 13),
        (128, 3, 4),
    ]
    assert features.feature_info.reduction() == [2, 4, 16]


# ---- the authors' weights

THEIRS = {
    "medmamba": (
        (r"^stem\.", "patch_embed."),
        (r"^stages\.1\.downsample\.", "layers.0.downsample."),
        (r"^stages\.", "layers."),
        (r"\.local\.", ".conv33conv33conv11."),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"\.mixer\.", ".self_attention."),
    ),
    "vmunet": (
        (r"^stem\.", "patch_embed."),
        (r"^merges\.1\.", "layers.0.downsample."),
        (r"^down\.(\d)\.", r"layers.\1.blocks."),
        (r"^expands\.(\d)\.", r"layers_up.\1.upsample."),
        (r"^up\.(\d)\.", r"layers_up.\1.blocks."),
        (r"^final\.", "final_up."),
        (r"^head\.", "final_conv."),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"\.mixer\.", ".self_attention."),
        ("^", "vmunet."),
    ),
    "mambair": (
        (r"^norm\.", "patch_embed.norm."),
        (r"^last_norm\.", "norm."),
        (r"^first\.", "conv_first."),
        (r"^after\.", "conv_after_body."),
        (r"^groups\.(\d)\.blocks\.", r"layers.\1.residual_group.blocks."),
        (r"^groups\.", "layers."),
        (r"\.norm\.(weight|bias)$", r".ln_1.\1"),
        (r"patch_embed\.ln_1", "patch_embed.norm"),
        (r"\.norm2\.", ".ln_2."),
        (r"\.mixer\.", ".self_attention."),
        (r"\.local\.weigh\.", ".conv_blk.cab.3.attention."),
        (r"\.local\.convs\.", ".conv_blk.cab."),
        (r"^out\.0\.", "conv_before_upsample.0."),
        (r"^out\.6\.", "conv_last."),
        (r"^out\.2\.", "upsample.0."),
        (r"^out\.4\.", "upsample.2."),
    ),
    "umamba": (
        (r"^(stem|stages)\.", r"encoder.\1."),
        (r"^mixers\.(\d)\.mixers\.0\.", r"encoder.mamba_layers.\1.mamba."),
        (r"^mixers\.", "encoder.mamba_layers."),
        (r"^decoder\.", "decoder.stages."),
        (r"^up\.(\d)\.", r"decoder.upsample_layers.\1.conv."),
        (r"^heads\.", "decoder.seg_layers."),
        (r"\.skip\.", ".conv3."),
        (r"\.[1-9]\.conv(\d)\.", lambda found: f"{found[0]}conv."),
        (r"(\.[1-9])\.norm(\d)\.", r"\1.conv\2.norm."),
    ),
}
NAMED = {
    "medmamba": "layers.0.blocks.0.conv33conv33conv11.4.weight",
    "vmunet": "vmunet.layers_up.1.upsample.expand.weight",
    "mambair": "layers.0.residual_group.blocks.0.conv_blk.cab.3.attention.1.weight",
    "umamba": "encoder.stages.0.1.conv1.conv.weight",
}
TINY = {
    "medmamba": lambda: MedMamba(num_classes=2, depths=(1, 1), dims=(4, 8)),
    "vmunet": lambda: VMUNet(3, 2, (1, 1), (1, 1), 4),
    "mambair": lambda: MambaIR(1, 30, (1,), 2, 1.2, 4, "pixelshuffle"),
    "umamba": lambda: u_mamba("enc", 2, stages=3, dim=4, image_size=(16, 16)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_authors_keys_become_ours(name):
    ours, twin = TINY[name](), TINY[name]()
    theirs = {}
    for key, value in ours.state_dict().items():
        for pattern, new in THEIRS[name]:
            key = re.sub(pattern, new, key)
        theirs[key] = value + 1 if value.is_floating_point() else value
    assert NAMED[name] in theirs
    if name == "umamba":
        theirs |= {f"decoder.{key}": value for key, value in theirs.items() if key.startswith("encoder.")}
        theirs["encoder.stages.0.1.conv1.all_modules.0.weight"] = theirs["encoder.stages.0.1.conv1.conv.weight"]
    wrapped = {"medmamba": theirs, "vmunet": {"model": theirs}, "mambair": {"params": theirs}}
    twin.load_state_dict(checkpoint_filter_fn(wrapped.get(name, {"network_weights": theirs}), twin), strict=True)
    for key, value in twin.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def test_vmamba_begins_both_ways_of_a_vm_unet():
    model = VMUNet(3, 2, (1, 2, 1), (1, 1, 1), 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = {}
    for key, value in model.state_dict().items():
        if key.startswith(("stem.", "down.", "merges.")):
            for pattern, new in THEIRS["vmunet"][:-1]:
                key = re.sub(pattern, new, key)
            theirs[key.replace("merges.2.", "layers.1.downsample.")] = value + 1
    theirs["classifier.head.weight"] = torch.zeros(1000, 16)
    model.load_state_dict(checkpoint_filter_fn({"model": theirs}, model), strict=True)
    for key, value in model.state_dict().items():
        _, level, rest = [*key.split(".", 2), "", ""][:3]
        if key.startswith(("stem.", "down.", "merges.")):
            assert torch.equal(value, before[key] + 1), key
        elif key.startswith("up."):
            assert torch.equal(value, before[f"down.{2 - int(level)}.{rest}"] + 1), key
        else:
            assert torch.equal(value, before[key]), key


# ---- the check, and errors


def test_phantoms_have_all_structures_and_dice_is_their_overlap():
    images, labels = phantoms(16, 32, torch.Generator().manual_seed(0))
    assert images.shape == (16, 1, 32, 32)
    shares = [float((labels == k).float().mean()) for k in range(CLASSES)]
    assert shares[0] > 0.4
    assert min(shares[1:]) > 0.02
    for k, bright in enumerate((0.03, 0.6, 1.2)):
        assert float(images[:, 0][labels == k].mean()) == pytest.approx(bright, abs=0.06)
    assert torch.equal(phantoms(16, 32, torch.Generator().manual_seed(0))[0], images)
    truth = F.one_hot(labels, CLASSES).movedim(-1, 1).float()
    assert float(soft_dice(truth, labels)) == pytest.approx(1)
    wrong = labels.clone()
    wrong[labels == 2] = 1
    found = F.one_hot(wrong, CLASSES).movedim(-1, 1).float()
    one, two = int((labels == 1).sum()), int((labels == 2).sum())
    assert float(soft_dice(found, labels)) == pytest.approx(one * 2 / (2 * one + two) / 2, rel=1e-4)


def test_arms_of_the_check_differ_in_their_mixers_alone():
    found = {}
    for name, build in NETS.items():
        net = build(32)
        found[name] = [type(mixer).__name__ for mixer in net.mixers]
        bare = {key: value.shape for key, value in net.state_dict().items() if not key.startswith("mixers.")}
        assert bare == {k: v.shape for k, v in NETS["u_net"](32).state_dict().items()}
    assert found == {
        "u_mamba": ["Identity", "MapMamba", "Identity", "MapMamba"],
        "u_net": ["Identity"] * 4,
        "transformer": ["Identity", "MapAttention", "Identity", "MapAttention"],
        "hybrid": ["Identity", "MapMamba", "Identity", "MapAttention"],
    }
    row = cost("u_net", NETS["u_net"], 16)
    assert row["kept_mb"] > 0.2
    assert row["madds_m"] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MedMamba(depths=(1, 1), dims=(4, 8, 16)), r"dims = \(4, 8, 16\) for depths = \(1, 1\)"),
        (lambda: MedMamba(depths=(1, 1), dims=(4, 12)), "twice that for the second"),
        (lambda: create_model("medmamba_nano", num_classes=3, global_pool="median"), "global_pool = 'median'"),
        (lambda: VMUNet(depths=(1, 1), decoder_depths=(1,)), "as many stages on the way up"),
        (lambda: VMUNet(dim=6), "dim = 6.*multiple of 4"),
        (lambda: VMUNet(3, 1, (1, 1), (1, 1), 4)(torch.zeros(1, 3, 12, 8)), r"images \(1, 3, 12, 8\).* 8 divides"),
        (lambda: ResidualUNet(4), "axes = 4"),
        (lambda: ResidualUNet(2, dims=(4, 8)), "have 2, 4 and 4 entries and decoder_blocks 3"),
        (lambda: ResidualUNet(mixers=("none", "none", "none", "lstm")), "mixer.*'lstm'.*none, mamba"),
        (lambda: ResidualUNet(scan="spiral"), "scan.*'spiral'.*raster"),
        (lambda: ResidualUNet(image_size=(20, 20)), r"image_size = \(20, 20\).*8 divides"),
        (
            lambda: u_mamba("enc", stages=3, dim=4, image_size=(8, 8))(torch.zeros(1, 1, 16, 16)),
            r"for images of \(8, 8\)",
        ),
        (lambda: u_mamba("bot", stages=3, dim=4)(torch.zeros(1, 1, 10, 8)), "4 divides.*sliding_window"),
        (lambda: u_mamba("top"), "place of Mamba.*'top'.*bot and enc"),
        (lambda: u_mamba(stages=1), "stages = 1"),
        (lambda: MambaIR(dim=16), "dim = 16.*from 30"),
        (lambda: MambaIR(upscale=2), "upscale = 2 with upsampler ''"),
        (lambda: MambaIR(upscale=6, upsampler="pixelshuffle"), "upscale = 6.*power of 2 or 3"),
        (lambda: MambaIR(upsampler="nearest"), "upsampler.*'nearest'"),
        (lambda: SequenceNet(1, 1, layer="lstm"), "layer for sequences.*'lstm'.*s4, s4d"),
        (lambda: SequenceNet(1, 1, dim=6, layer="attention"), "num_heads = 4 does not divide a width of 6"),
    ],
)
def test_what_does_not_fit_is_explained(call, message):
    with pytest.raises(VitrailError, match=message):
        call()
