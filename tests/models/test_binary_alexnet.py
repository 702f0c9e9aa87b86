import pytest
import timm
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.layers.binary import BinaryConv2d
from vitrail.models import create_model
from vitrail.models.binary_alexnet import BinaryAlexNet, checkpoint_filter_fn

TINY = {"widths": (4, 5, 6, 6, 4), "hidden": 8, "grid": 2, "stem": (3, 1, 1), "num_classes": 3}


def published(widths, hidden, grid, classes, *, inputs):
    """The authors' net, module by module, for the stem of TINY."""

    def block(dim_in, dim, kernel, padding):
        conv = BinaryConv2d(dim_in, dim, kernel, padding=padding, inputs=False)
        if inputs:
            return nn.Sequential(nn.BatchNorm2d(dim_in, 1e-4), Sign(), conv)
        return nn.Sequential(conv, nn.BatchNorm2d(dim, 1e-3), nn.ReLU())

    a, b, c, d, e = widths
    parts = [nn.Conv2d(3, a, 3, 1, 1), nn.BatchNorm2d(a, 1e-5 if inputs else 1e-3), nn.ReLU(), nn.MaxPool2d(3, 2)]
    parts += [block(a, b, 5, 2), nn.MaxPool2d(3, 2), block(b, c, 3, 1), block(c, d, 3, 1), block(d, e, 3, 1)]
    parts += [nn.MaxPool2d(3, 2), block(e, hidden, grid, 0), block(hidden, hidden, 1, 0)]
    parts += [nn.BatchNorm2d(hidden, 1e-3), nn.ReLU()] if inputs else []
    return nn.Sequential(*parts, nn.Conv2d(hidden, classes, 1), nn.Flatten())


class Sign(nn.Module):
    def forward(self, x):
        return x.sign()


@pytest.mark.parametrize("inputs", [True, False])
def test_it_is_the_published_net_with_its_weights(inputs):
    torch.manual_seed(0)
    theirs = published(TINY["widths"], 8, 2, 3, inputs=inputs)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    ours = BinaryAlexNet(**TINY, inputs=inputs, scaled=False)
    state = {f"features.{key}": value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(checkpoint_filter_fn(state, ours))
    x = torch.randn(2, 3, 24, 26)  # 24 -> 11 -> 5 -> 2
    torch.testing.assert_close(ours.double().eval()(x.double()), theirs.double().eval()(x.double()))
    assert ours.load_state_dict(checkpoint_filter_fn(ours.state_dict(), ours)).missing_keys == []
    with pytest.raises(InputError, match="numbered modules with weights and the model has"):
        checkpoint_filter_fn(dict(list(state.items())[:4]), ours)


def test_weights_begin_as_published():
    torch.manual_seed(0)
    model = create_model("alexnet_xnor_nano", num_classes=10)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convolutions:
        assert float(conv.weight.detach().std()) == pytest.approx((2 / conv.weight[0].numel()) ** 0.5, rel=0.1)
        assert conv.bias is None
    assert float(model.head.weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    assert [isinstance(conv, BinaryConv2d) for conv in convolutions] == [False] + [True] * 6


def test_published_options():
    create_model("alexnet_xnor_nano", num_classes=2)
    with torch.device("meta"):
        bwn, xnor = (timm.create_model(f"alexnet_{kind}") for kind in ("bwn", "xnor"))
    assert [m.p for m in bwn.modules() if isinstance(m, nn.Dropout2d)] == [0.1, 0.1]
    assert [m.p for m in xnor.modules() if isinstance(m, nn.Dropout2d)] == [0, 0]
    assert all(not m.inputs for m in bwn.modules() if isinstance(m, BinaryConv2d))
    assert all(m.inputs and m.scaled for m in xnor.modules() if isinstance(m, BinaryConv2d))
    assert [m.eps for m in xnor.modules() if isinstance(m, nn.BatchNorm2d)] == [1e-5, *[1e-4] * 6, 1e-3]
    assert [m.eps for m in bwn.modules() if isinstance(m, nn.BatchNorm2d)] == [1e-3] * 7
    assert bwn.forward_features(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 256, 6, 6)


def test_small_and_odd_images_are_averaged_to_the_grid():
    model = BinaryAlexNet(**TINY).eval()
    for size in ((5, 9), (33, 47)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3)
    assert model.forward_features(torch.randn(1, 3, 33, 47)).shape == (1, 4, 3, 5)


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match="five convolutions"):
        BinaryAlexNet(**{**TINY, "widths": (4, 5)})
    with pytest.raises(InputError, match="give 'avg'"):
        BinaryAlexNet(**TINY).reset_classifier(3, "max")
