import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.errors import InputError
from vitrail.layers.kan_layers import (
    BottleneckKANConv,
    BottleneckKANExperts,
    KANConv,
    KANFocalModulation,
    KANSelfAttention,
)
from vitrail.models import create_model
from vitrail.models.kan_nets import (
    KANVGG,
    KANDenseNet,
    KANResNet,
    KANResUNet,
    KANUNet,
    checkpoint_filter_fn,
    dice_bce_loss,
    vgg_widths,
)

WIDE = ((4,), (8,))


def published(layer):
    """The names and tensors that the authors' code gives one of its layers, of one group or two."""
    core = layer.core if isinstance(layer, BottleneckKANConv) else layer
    groups = core.groups
    found = {
        "poly_weights": torch.stack(core.weight.chunk(groups)),
        "beta_weights": core.basis.beta,
    }
    parts = {"base_conv": layer.base, "layer_norm": layer.norm}
    if core is not layer:
        parts |= {"inner_proj": layer.inner_proj, "out_proj": layer.out_proj}
    for part, module in parts.items():
        for name, value in module.state_dict().items():
            for group, piece in enumerate(value.chunk(groups) if value.ndim else [value] * groups):
                found[f"{part}.{group}.{name}"] = piece
    return found


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (lambda: create_model("kan_vgg_nano", num_classes=3, groups=2), 2),
        (lambda: create_model("kan_vgg_nano", num_classes=3, kind="bottleneck"), 1),
        (lambda: create_model("kan_resnet_nano", num_classes=3), 1),
        (lambda: create_model("kan_densenet_nano", num_classes=3), 1),
        (lambda: KANUNet(depth=2, layers=1, width=4), 1),
    ],
)
def test_the_authors_weights_load(make, groups):
    torch.manual_seed(0)
    model, other = make(), make()
    state, number = {}, 0
    kinds = (KANConv, BottleneckKANConv)
    inside = {part for m in model.modules() if isinstance(m, kinds) for part in m.modules() if part is not m}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and module not in inside:
            state |= {f"module.features.{number}.module.{key}": value for key, value in published(module).items()}
            number += 1
        elif module not in inside and not list(module.children()):
            state |= {f"module.other.{name}.{key}": value for key, value in module.state_dict().items()}
    own = model.state_dict()
    found = checkpoint_filter_fn(state, other)
    assert found.keys() == own.keys()
    for key, value in found.items():
        assert torch.equal(value, own[key]), key
    assert checkpoint_filter_fn(own, other).keys() == own.keys()
    with pytest.raises(InputError, match="create the variant of the checkpoint"):
        checkpoint_filter_fn(dict(list(state.items())[:-3]), other)


def test_vggs_have_the_published_widths():
    assert vgg_widths("vgg13") == ((16, 16), (32, 32), (64, 64), (128, 128), (128, 128))
    assert vgg_widths("vgg19", 3)[3:] == ((128,) * 4, (128,) * 4, (128, 256))
    assert vgg_widths("vgg11", 4, 32) == ((32,), (64,), (128, 128), (256, 256), (256, 256), (512, 512))
    with pytest.raises(InputError, match="vgg12"):
        vgg_widths("vgg12")


def test_a_vgg_pools_between_stages():
    torch.manual_seed(0)
    model = KANVGG(num_classes=3, widths=((4, 4), (8,)), degree=2, norm="batch", drop_rate=0.5, attention=(1,)).eval()
    x = torch.randn(2, 3, 9, 7)
    y = model.stages[0].blocks[0](model.stem(x))
    y = model.stages[1].blocks[0](F.max_pool2d(y, 2, ceil_mode=True))
    assert isinstance(model.stages[1].blocks[1], KANSelfAttention)
    y = model.stages[1].blocks[1](y)
    torch.testing.assert_close(model(x), model.head(y.mean((2, 3))))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_resnets_blocks_add_their_input(block):
    torch.manual_seed(0)
    model = KANResNet(num_classes=3, block=block, depths=(1, 2), width=4, norm="batch").eval()
    x = torch.randn(1, 4, 6, 6)
    first = model.stages[0].blocks[0]
    parts = [first.conv1, first.conv2, *([first.conv3] if block == "bottleneck" else [])]
    sides = {"basic": [(3, 3), (1, 1)], "bottleneck": [(1, 1), (3, 3), (1, 1)]}[block]
    assert [part.kernel_size for part in parts] == sides
    y = x
    for part in parts:
        y = part(y)
    torch.testing.assert_close(first(x), y + first.downsample(x))
    assert isinstance(first.downsample, nn.Identity) == (block == "basic")
    down = model.stages[1].blocks[0]
    assert down.downsample.where["stride"] == 2
    z = first(x)
    if block == "basic":
        torch.testing.assert_close(down(z), down.conv2(down.conv1(z)) + down.downsample(z))
    assert isinstance(model.stages[1].blocks[1].downsample, nn.Identity)
    assert model.stem(torch.randn(1, 3, 32, 32)).shape == (1, 4, 8, 8)
    torch.testing.assert_close(model.num_features, 8 * (4 if block == "bottleneck" else 1))


def test_a_densenet_keeps_what_it_had():
    torch.manual_seed(0)
    model = KANDenseNet(num_classes=3, depths=(2, 1), growth=4, width=6, norm="batch").eval()
    layer = model.stages[0].blocks[0]
    x = torch.randn(1, 6, 5, 5)
    y = layer(x)
    assert y.shape == (1, 10, 5, 5)
    assert torch.equal(y[:, :6], x)
    torch.testing.assert_close(y[:, 6:], layer.conv2(layer.conv1(x)))
    assert layer.conv1.out_channels == 16
    down = model.stages[1].downsample
    z = torch.randn(1, 14, 6, 4)
    torch.testing.assert_close(down(z), F.avg_pool2d(down.conv(F.selu(down.norm(z))), 2))
    assert model.num_features == 7 + 4


def test_narrow_bottlenecks_are_those_of_three_by_three_layers():
    model = KANResNet(num_classes=3, depths=(1,), width=256, kind="bottleneck")
    block = model.stages[0].blocks[0]
    assert (block.conv1.width, block.conv2.width) == (32, 64)


def test_experts_are_of_three_by_three_layers():
    model = KANResNet(num_classes=3, depths=(1,), width=8, kind="experts", layer_options={"experts": 3, "top_k": 1})
    block = model.stages[0].blocks[0]
    assert isinstance(block.conv1, BottleneckKANExperts)
    assert len(block.conv1.experts) == 3
    assert isinstance(block.conv2, BottleneckKANConv)
    assert isinstance(model.stem[0], BottleneckKANConv)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("mixer", ["conv", "self-att", "focal"])
def test_a_unet_goes_down_and_up(mixer):
    torch.manual_seed(0)
    net = KANUNet(num_classes=2, depth=2, layers=1, width=4, mixer=mixer).eval()
    x = torch.randn(1, 3, 9, 7)
    first = net.encoder[0](x)
    second = net.encoder[1](first)
    assert second.shape == (1, 8, 5, 4)
    up = F.interpolate(second, (9, 7), mode="bilinear", align_corners=True)
    expected = net.head(net.decoder[0](torch.cat((up, first), 1)))
    torch.testing.assert_close(net(x), expected)
    kinds = {"self-att": KANSelfAttention, "focal": KANFocalModulation, "conv": BottleneckKANConv}
    assert isinstance(net.decoder[0][0], kinds[mixer])
    net.train().grad_checkpointing = True
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_unet_of_residual_blocks():
    torch.manual_seed(0)
    net = KANResUNet(num_classes=2, depths=(1, 1, 1, 1), width=4, norm="batch").eval()
    x = torch.randn(1, 3, 17, 16)
    assert net(x).shape == (1, 2, 17, 16)
    skips, y = [], net.stem(x)
    for stage in net.encoder:
        y = stage(y)
        skips.append(y)
    y = net.middle(y)
    for skip, merge, stage in zip(reversed(skips[:-1]), net.merge, net.decoder):
        up = F.interpolate(y, skip.shape[2:], mode="bilinear", align_corners=True)
        y = stage(merge(torch.cat((up, skip), 1)))
    torch.testing.assert_close(net(x), net.head(y))


def test_the_loss_of_masks():
    logits, masks = torch.randn(2, 3, 4, 5), (torch.rand(2, 3, 4, 5) > 0.5).float()
    p = logits.sigmoid()
    dice = [
        (2 * (p[b, c] * masks[b, c]).sum() + 1) / (p[b, c].sum() + masks[b, c].sum() + 1)
        for b in range(2)
        for c in range(3)
    ]
    cross = -(masks * p.log() + (1 - masks) * (1 - p).log()).mean()
    torch.testing.assert_close(dice_bce_loss(logits, masks), 1 - sum(dice) / 6 + 0.1 * cross)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KANVGG(widths=()), "widths"),
        (lambda: KANResNet(block="plain"), "block = 'plain'"),
        (lambda: KANUNet(mixer="attention"), "mixer = 'attention'"),
        (lambda: KANUNet(depth=1), "depth = 1"),
        (lambda: KANResUNet(depths=(1, 1)), "depths"),
    ],
)
def test_what_makes_no_net_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
