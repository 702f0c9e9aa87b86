import pytest
import timm
import torch
from timm.layers import Conv2dSame
from timm.models.inception_next import InceptionDWConv2d
from torch import nn

from vitrail.edits.inception_depthwise import InceptionDepthwise, inception_depthwise
from vitrail.errors import InputError


def slow_branch(x, conv, rows, columns, stride, dilation):
    """Convolve each channel of (C, H, W) with its own window, place by place."""
    channels, height, width = x.shape
    out = []
    for c in range(channels):
        for top in range(0, height, stride):
            for left in range(0, width, stride):
                total = conv.bias[c] if conv.bias is not None else x.new_zeros(())
                for i in range(rows):
                    for j in range(columns):
                        y, z = top + (i - rows // 2) * dilation, left + (j - columns // 2) * dilation
                        if 0 <= y < height and 0 <= z < width:
                            total = total + conv.weight[c, 0, i, j] * x[c, y, z]
                out.append(total)
    return torch.stack(out).view(channels, -(-height // stride), -(-width // stride))


def slow_inception(module, x, square, band, share, stride, dilation):
    images = []
    for image in x:
        parts = image.split([len(image) - 3 * share, share, share, share])
        images.append(
            torch.cat(
                [
                    parts[0][:, ::stride, ::stride],
                    slow_branch(parts[1], module.dwconv_hw, square, square, stride, dilation),
                    slow_branch(parts[2], module.dwconv_w, 1, band, stride, dilation),
                    slow_branch(parts[3], module.dwconv_h, band, 1, stride, dilation),
                ]
            )
        )
    return torch.stack(images)


@pytest.mark.parametrize(
    ("size", "channels", "ratio", "square", "band", "stride", "dilation", "bias"),
    [
        ((5, 6), 8, 0.125, 3, 5, 1, 1, True),
        ((7, 4), 5, 0.25, 1, 3, 2, 1, False),
        ((6, 7), 6, 1 / 3, 3, 3, 2, 1, True),
        ((5, 4), 9, 0.25, 3, 5, 1, 2, True),
    ],
)
def test_it_is_the_slow_loop(size, channels, ratio, square, band, stride, dilation, bias):
    torch.manual_seed(0)
    module = InceptionDepthwise(channels, square, band, ratio, stride, dilation, bias).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, channels, *size, dtype=torch.float64, requires_grad=True)
    ours = module(x)
    theirs = slow_inception(module, x, square, band, int(channels * ratio), stride, dilation)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    given, weight = [x, *module.parameters()], torch.randn_like(ours)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_with_stride_one_it_is_timms():
    theirs, ours = InceptionDWConv2d(24), InceptionDepthwise(24)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 24, 9, 13)
    torch.testing.assert_close(ours(x), theirs(x))


def test_it_begins_as_published():
    torch.manual_seed(0)
    module = InceptionDepthwise(4096)
    for conv in (module.dwconv_hw, module.dwconv_w, module.dwconv_h):
        assert float(conv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not conv.bias.any()


class Net(nn.Module):
    """Depthwise convolutions of all kinds, and what is none."""

    def __init__(self):
        super().__init__()
        self.large = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.strided = nn.Conv2d(16, 16, 5, 2, 2, groups=16, bias=False)
        self.dilated = nn.Conv2d(16, 16, 5, padding=6, dilation=3, groups=16)
        self.same = nn.Conv2d(16, 16, 31, padding="same", groups=16)
        self.tf = Conv2dSame(16, 16, 5, 2, groups=16)
        self.small = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.shrinks = nn.Conv2d(16, 16, 5, groups=16)
        self.grouped = nn.Conv2d(16, 16, 5, padding=2, groups=8)
        self.widens = nn.Conv2d(16, 32, 5, padding=2, groups=16)
        self.narrow = nn.Conv2d(1, 1, 5, padding=2)
        self.uneven = nn.Conv2d(16, 16, 5, (1, 2), 2, groups=16)
        self.even = nn.Conv2d(16, 16, 6, padding=3, groups=16)
        self.row = nn.Conv2d(16, 16, (1, 7), padding=(0, 3), groups=16)


def test_large_depthwise_convolutions_that_keep_the_size_are_replaced():
    before = dict(Net().double().named_children())
    model = inception_depthwise(band_kernel=9)(Net().double())
    found = {name: m for name, m in model.named_children() if isinstance(m, InceptionDepthwise)}
    assert list(found) == ["large", "strided", "dilated", "same", "tf"]
    x = torch.randn(2, 16, 33, 40, dtype=torch.float64)
    for name, layer in found.items():
        assert layer(x).shape == before[name](x).shape, name
    assert found["strided"].dwconv_hw.bias is None
    assert found["large"].dwconv_w.bias is not None
    assert found["dilated"].dwconv_w.dilation == (3, 3)
    assert found["large"].dwconv_h.kernel_size == (9, 1)
    assert isinstance(inception_depthwise(min_kernel=3)(Net()).small, InceptionDepthwise)
    assert isinstance(inception_depthwise(min_kernel=7)(Net()).strided, nn.Conv2d)
    named = inception_depthwise(modules="larg.")(Net())
    assert isinstance(named.large, InceptionDepthwise)
    assert isinstance(named.same, nn.Conv2d)


def test_a_convnext_becomes_smaller_and_keeps_its_shapes():
    model = timm.create_model("convnext_zepto_rms", num_classes=3).eval()
    count = sum(p.numel() for p in model.parameters())
    edited = inception_depthwise()(model)
    assert edited(torch.zeros(1, 3, 45, 61)).shape == (1, 3)
    assert sum(p.numel() for p in edited.parameters()) < count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"square_kernel": 2}, "square_kernel = 2 .*odd"),
        ({"band_kernel": 0}, "band_kernel = 0 .*odd"),
        ({"branch_ratio": 0.5}, "branch_ratio = 0.5 .*1/3"),
        ({"branch_ratio": 0}, "branch_ratio = 0 "),
        ({"min_kernel": 1}, "min_kernel = 1 .*from 2"),
        ({"modules": "("}, r"modules = '\(' is no regular expression"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        inception_depthwise(**options)


def test_a_model_without_a_place_is_refused():
    with pytest.raises(InputError, match=r"no depthwise convolution of 5 x 5 or more that keeps its size in"):
        inception_depthwise()(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16)))
    with pytest.raises(InputError, match="whole name matches 'arge'"):
        inception_depthwise(modules="arge")(Net())
    with pytest.raises(InputError, match=r"0.125 of 4 channels is less than one channel: give 0.25"):
        InceptionDepthwise(4)
