import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.layers.activations import GELUTanh
from torch import nn

from vitrail.layers.packed import activation_code, can_pack, pack

ACTIVATIONS = [None, nn.ReLU(), nn.GELU(), nn.GELU("tanh"), GELUTanh(), nn.SiLU(), nn.Hardswish(), nn.Sigmoid()]
LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (2, 5, 12)),
    "rows": (lambda: nn.Linear(12, 7, bias=False), (3, 12)),
    "conv": (lambda: nn.Conv2d(6, 8, (3, 1), (2, 1), (1, 0)), (2, 6, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 5, 1, 4, dilation=2, groups=8, bias=False), (2, 8, 7, 6)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, 1, 1, groups=2), (1, 8, 5, 6)),
}


def made(name, seed=0):
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    return build().requires_grad_(False), torch.randn(shape)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_is_the_layer_and_its_activation(name, activation):
    layer, x = made(name)
    expected = layer(x) if activation is None else activation(layer(x))
    packed = pack(layer, activation)
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)
    assert packed._packed is not None, "the plain layer was used"
    if x.ndim == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(packed(last), expected, rtol=1e-4, atol=1e-5)
    again = torch.cat((x, x + 1))
    torch.testing.assert_close(packed(again)[: len(x)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_it_packs_again_when_its_weight_has_changed(name):
    layer, x = made(name)
    packed = pack(layer)
    packed(x)
    with torch.no_grad():
        packed.weight.mul_(2)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-4, atol=1e-5)
    packed.weight = nn.Parameter(torch.ones_like(packed.weight), requires_grad=False)
    layer.weight = packed.weight
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_copies_pickles_and_states_are_alike(name):
    layer, x = made(name)
    packed = pack(layer, nn.GELU())
    expected = packed(x)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert twin._packed is None
        torch.testing.assert_close(twin(x), expected)
    other, _ = made(name, seed=1)
    other = pack(other, nn.GELU())
    other(x)
    other.load_state_dict(packed.state_dict())
    torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_what_the_operators_cannot_do_the_plain_layer_does(name):
    layer, x = made(name)
    packed = pack(layer, nn.ReLU())
    x.requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
    torch.testing.assert_close(packed.double()(x.double()), layer.double()(x.double()).relu())
    assert packed._packed is None


def test_only_plain_layers_are_packed():
    class Own(nn.Linear):
        pass

    assert can_pack(nn.Linear(2, 2))
    assert can_pack(nn.Conv2d(2, 2, 3, padding=1))
    for layer in (
        Own(2, 2),
        nn.Conv1d(2, 2, 1),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Linear(2, 2).double(),
    ):
        assert not can_pack(layer)
    assert activation_code(nn.Softmax(-1)) is None
    assert F.gelu(torch.ones(1), approximate="tanh") != F.gelu(torch.ones(1))
