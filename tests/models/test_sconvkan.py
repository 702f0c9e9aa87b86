import pytest
import torch
import torch.nn.functional as F

from vitrail.errors import InputError
from vitrail.models.sconvkan import SKAN, SConvKAN


def test_a_net_pools_between_stages():
    torch.manual_seed(0)
    net = SConvKAN(num_classes=3, dims=(4, 6), depth=2, spaces=("spline",)).eval()
    x = torch.randn(2, 3, 7, 6)
    y = net.stages[0].blocks[1](net.stages[0].blocks[0](net.stem(x)))
    y = net.stages[1].blocks[1](net.stages[1].blocks[0](F.max_pool2d(y, 2, ceil_mode=True)))
    torch.testing.assert_close(net(x), net.head(y.mean((2, 3))))
    assert net.no_weight_decay() == {"*.shares"}


def test_an_skan_is_its_layers_in_a_row():
    net = SKAN((2, 5, 3), ("fourier",), 3)
    x = torch.randn(4, 2)
    torch.testing.assert_close(net(x), net[1](net[0](x)))
    assert [layer.base.bias.shape[0] for layer in net] == [5, 3]


def test_what_makes_no_net_is_refused():
    for make, words in (
        (lambda: SKAN((3,)), "widths"),
        (lambda: SConvKAN(dims=()), "dims"),
        (lambda: SConvKAN(norm="layer"), "norm"),
    ):
        with pytest.raises(InputError, match=words):
            make()
