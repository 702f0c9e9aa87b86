import pytest
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn

from exact import moved, normal, same
from vitrail.errors import InputError
from vitrail.layers import kan_bases as kb
from vitrail.layers.selectable_kan import SPACES, SelectableKAN, select, selection
from vitrail.models.sconvkan import SKAN


def slow_functions(name, x, size):
    """The functions of one space of the numbers x, by their textbooks' formulas, (..., K)."""
    t = x.tanh()
    if name == "chebyshev":
        return torch.stack([(n * t.acos()).cos() for n in range(1, size + 1)], -1)
    if name == "legendre":
        rows = [torch.ones_like(t), t]
        for n in range(1, size):
            rows.append(((2 * n + 1) * t * rows[-1] - n * rows[-2]) / (n + 1))
        return torch.stack(rows[1:], -1)
    if name == "fourier":
        waves = [(torch.cos if k % 2 else torch.sin)(torch.pi * (k // 2 + 1) * x) for k in range(size)]
        return torch.stack(waves, -1)
    if name == "wavelet":
        centres = [-1 + 2 * k / (size - 1) for k in range(size)]
        return torch.stack([kb.mexican_hat((x - c) * (size - 1) / 2) for c in centres], -1)
    if name == "radial":
        centres = [-2 + 4 * k / (size - 1) for k in range(size)]
        return torch.stack([(-(((x - c) * (size - 1) / 4) ** 2)).exp() for c in centres], -1)
    return kb.splines(x, kb.spline_centres(size - 3, 3, -1, 1), 2 / (size - 3), 3)


def slow_layer(layer, x):
    """A layer of vectors, node by node."""
    y = layer.base(F.silu(x))
    shares = layer.shares.softmax(0)
    for c in range(layer.in_features):
        for s, name in enumerate(layer.spaces):
            taken = layer.selected[c]
            gate = shares[s, c] if taken < 0 else float(taken == s)
            y = y + gate * slow_functions(name, x[:, c], layer.size) @ layer.weight[s, :, :, c].T
    return y


@pytest.mark.parametrize("size", [4, 7])
def test_a_layer_sums_the_weighted_functions_of_all_spaces(size):
    torch.manual_seed(0)
    layer = moved(SelectableKAN(3, 5, spaces=tuple(SPACES), size=size))
    x = normal(4, 3).requires_grad_()
    same(layer(x), slow_layer(layer, x), [x, layer.weight, layer.shares], 1e-6)
    layer.selected.copy_(torch.tensor([0, 4, -1]))  # one has not chosen
    same(layer(x), slow_layer(layer, x), [x, layer.weight], 1e-6)


@pytest.mark.parametrize(("groups", "kernel", "stride"), [(1, 3, 1), (2, (2, 3), 2)])
def test_a_convolution_sums_them_at_every_place_of_its_kernel(groups, kernel, stride):
    torch.manual_seed(0)
    spaces = ("legendre", "fourier")
    layer = moved(SelectableKAN(4, 6, kernel, stride, 1, groups=groups, spaces=spaces, size=3))
    x = normal(2, 4, 5, 4).requires_grad_()
    expected = layer.base(F.silu(x))
    gates = layer.shares.softmax(0)
    inside, outside = 4 // groups, 6 // groups
    parts = []
    for g in range(groups):
        total = 0
        for c in range(inside):
            for s, name in enumerate(spaces):
                basis = slow_functions(name, x[:, g * inside + c], 3).movedim(-1, 1) * gates[s, g * inside + c]
                weight = layer.weight[s, g * outside : (g + 1) * outside, :, c]
                total = total + F.conv2d(basis, weight, stride=stride, padding=1)
        parts.append(total)
    same(layer(x), expected + torch.cat(parts, 1), [x, layer.weight, layer.shares], 1e-7)


@pytest.mark.parametrize("kernel", [None, 3])
def test_nodes_keep_the_space_of_their_largest_share(kernel):
    torch.manual_seed(0)
    layer = moved(SelectableKAN(4, 5, kernel, groups=1, size=4))
    x = normal(3, 4, *([] if kernel is None else [4, 5]))
    weight, gates = layer.weight.detach().clone(), layer.gates().detach()
    best = layer.shares.argmax(0)
    layer.select()
    assert torch.equal(layer.selected, best)
    for c, s in enumerate(best.tolist()):  # the output of a node's own space stays as it was
        torch.testing.assert_close(layer.weight[s, :, :, c], weight[s, :, :, c] * gates[s, c])
    assert layer.gates().sum(0).tolist() == [1] * 4
    chosen, after = layer(x), layer.weight.detach().clone()
    nn.init.normal_(layer.shares)
    layer.select()  # what is chosen stays chosen
    torch.testing.assert_close(layer(x), chosen)
    assert torch.equal(layer.weight, after)
    before = sum(p.numel() for p in layer.parameters())
    layer.reparameterize()
    torch.testing.assert_close(layer(x), chosen)
    assert sum(p.numel() for p in layer.parameters()) == before - 2 * weight[0].numel() - gates.numel()
    with pytest.raises(InputError, match="no shares any more"):
        layer.gates()


def test_groups_are_chosen_for_their_own_channels():
    torch.manual_seed(0)
    layer = moved(SelectableKAN(4, 6, 1, groups=2, size=3))
    weight, gates = layer.weight.detach().clone(), layer.gates().detach()
    layer.select()
    for s in range(3):
        for o in range(6):
            for c in range(2):
                factor = gates[s, o // 3 * 2 + c]
                torch.testing.assert_close(layer.weight[s, o, :, c], weight[s, o, :, c] * factor)
    layer.reparameterize()
    assert layer.weight is not None


def test_a_layer_that_has_not_chosen_is_not_pruned():
    net = SKAN((2, 3, 1))
    x = torch.randn(4, 2)
    torch.testing.assert_close(reparameterize_model(net)(x), net(x))
    assert select(net) == 2
    torch.testing.assert_close(reparameterize_model(net)(x), net(x))


def test_shares_begin_equal_and_weights_as_those_of_a_linear_layer():
    torch.manual_seed(0)
    layer = SelectableKAN(64, 64, size=4)
    assert layer.gates().unique().tolist() == pytest.approx([1 / 3])
    assert layer.selected.tolist() == [-1] * 64
    assert float(layer.weight.detach().std()) == pytest.approx((4 * 64) ** -0.5, rel=0.03)


def test_the_report_counts_nodes():
    net = SKAN((4, 3), spaces=("spline", "fourier"))
    with torch.no_grad():
        net[0].shares[1, :3] = 1
    rows = selection(net)
    assert rows[0] == {"layer": "0", "space": "spline", "nodes": 1, "share": 0.25, "chosen": False}
    assert rows[1]["nodes"] == 3
    select(net)
    assert [row["nodes"] for row in selection(net)] == [1, 3]
    assert all(row["chosen"] for row in selection(reparameterize_model(net)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SelectableKAN(4, 6, spaces=("splines",)), "'spline'"),
        (lambda: SelectableKAN(4, 6, spaces=()), "spaces"),
        (lambda: SelectableKAN(4, 6, spaces=("spline", "spline")), "different"),
        (lambda: SelectableKAN(4, 6, size=1), "size = 1"),
        (lambda: SelectableKAN(4, 6, 3, groups=4), "groups = 4"),
        (lambda: SelectableKAN(4, 6)(torch.zeros(2, 3)), "give"),
        (lambda: selection(nn.Linear(2, 2)), "no layers"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
