"""LBMamba as a drop-in: which ways are left, with which weights, in which kinds of mixer."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.edits.lbmamba import LocalMamba, SomeOrders, lbmamba
from vitrail.errors import InputError
from vitrail.layers.mamba import SS2D, BidirectionalMamba, Mamba, MambaBlock
from vitrail.layers.scan import selective_scan
from vitrail.layers.scan.local import local_scan
from vitrail.layers.scan.orders import cross, snake, windows
from vitrail.models import create_model


def four_windows(shape):
    """LocalVim's kind of orders: rows and windows, both ways."""
    ways = [windows(shape, shape), windows(shape, (2, 2))]
    return [*ways, *(way[::-1] for way in ways)]


def snakes(shape):
    """PlainMamba's kind of orders: every place next to the one before it."""
    ways = [snake(shape), snake(shape, (1, 0))]
    return [ways[0], ways[0][::-1], ways[1], ways[1][::-1]]


def net(*mixers):
    torch.manual_seed(0)
    return nn.Sequential(*(MambaBlock(mixer, nn.LayerNorm(6)) for mixer in mixers))


def test_vims_mixer_keeps_its_way_there_and_every_other_one_turns():
    torch.manual_seed(0)
    plain = net(*(BidirectionalMamba(6, states=3) for _ in range(3))).double()
    model = lbmamba(window=4)(copy.deepcopy(plain))
    for index, (old, new) in enumerate(zip(plain, model, strict=True)):
        mixer = new.mixer
        assert type(mixer) is LocalMamba
        assert mixer.reverse == (index == 1)
        state = old.mixer.state_dict()
        assert set(mixer.state_dict()) == {key for key in state if not key.startswith("back.")}
        for key, value in mixer.state_dict().items():
            assert torch.equal(value, state[key])
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        alone = Mamba(6, states=3).double()
        alone.load_state_dict(mixer.state_dict())
        alone.scan = partial(local_scan, window=4, form="reference")
        expected = alone(x.flip(1)).flip(1) if index == 1 else alone(x)
        torch.testing.assert_close(mixer(x), expected)


def test_mambas_mixer_keeps_its_way():
    model = lbmamba(window=2)(net(Mamba(6, states=3), Mamba(6, states=3)).double())
    x = torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)
    seen = torch.autograd.grad(model[1].mixer(x)[0, 2].sum(), x)[0].abs().sum(2)[0]
    assert seen[3] > 0  # in its window
    assert seen[4:].max() == 0
    assert not any(layer.mixer.reverse for layer in model)


@pytest.mark.parametrize(
    ("orders", "kept"), [(cross, ([0, 1], [2, 3])), (snakes, ([0, 2], [1, 3])), (four_windows, ([0, 1], [2, 3]))]
)
def test_a_mixer_of_planes_loses_one_of_each_pair_of_orders(orders, kept):
    torch.manual_seed(0)
    plain = net(SS2D(6, states=2, orders=orders), SS2D(6, states=2, orders=orders)).double()
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = lbmamba(window=3)(copy.deepcopy(plain))
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    for old, new, numbers in zip(plain, model, kept, strict=True):
        ways = orders((3, 4))
        inside, gate = old.mixer.in_proj(x).chunk(2, -1)
        inside = F.silu(old.mixer.conv2d(inside.permute(0, 3, 1, 2))).flatten(2)
        total = torch.zeros_like(inside)
        for number in numbers:
            order = torch.tensor(ways[number].copy())
            found = torch.einsum("bdl,cd->bcl", inside[..., order], old.mixer.x_proj_weight[number])
            delta, enter, leave = found.split((1, 2, 2), 1)
            part = slice(12 * number, 12 * number + 12)
            y, _ = local_scan(
                inside[..., order],
                torch.einsum("brl,dr->bdl", delta, old.mixer.dt_projs_weight[number]),
                -old.mixer.A_logs[part].exp(),
                enter,
                leave,
                old.mixer.Ds[part],
                delta_bias=old.mixer.dt_projs_bias[number],
                softplus=True,
                window=3,
                form="reference",
            )
            total = total.index_add(2, order, y)
        y = old.mixer.out_norm(total.transpose(1, 2)).unflatten(1, (3, 4)) * F.silu(gate)
        torch.testing.assert_close(new.mixer(x), old.mixer.out_proj(y))


def test_all_sweeps_can_be_left_with_their_weights():
    plain = net(BidirectionalMamba(6, states=2))
    planes = net(SS2D(6, states=2))
    for model, scans in ((plain, 2), (planes, 1)):
        before = list(model.state_dict())
        lbmamba(sweeps="all", window=4)(model)
        assert list(model.state_dict()) == before
        changed = [m for m in model.modules() if isinstance(getattr(m, "scan", None), partial)]
        assert len(changed) == scans
        assert all(m.scan.func is local_scan and m.scan.keywords == {"window": 4} for m in changed)


def test_orders_without_an_opposite_stay():
    model = lbmamba()(net(SS2D(6, states=2, orders=lambda shape: [snake(shape)]), BidirectionalMamba(6, states=2)))
    assert model[0].mixer.x_proj_weight.shape[0] == 1
    assert model[0].mixer.scan.keywords == {"window": None}
    assert not model[1].mixer.reverse  # the first to lose a way


def test_a_whole_net_keeps_its_types_modes_and_copies():
    model = create_model("vim_nano", num_classes=3).bfloat16().eval()
    model.requires_grad_(False)
    lbmamba()(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert "reverse=True" in repr(model)
    x = torch.randn(1, 3, 32, 32)
    model.float()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    planes = lbmamba()(net(SS2D(6, states=2)))
    x = torch.randn(1, 2, 3, 6)
    assert torch.equal(pickle.loads(pickle.dumps(planes))(x), planes(x))


@pytest.mark.parametrize("name", ["vim", "mambavision", "groupmamba", "vcmamba", "mamba_nd", "medmamba"])
def test_it_reaches_every_selective_scan_of_our_nets(name):
    torch.manual_seed(0)
    plain = create_model(f"{name}_nano", num_classes=3).eval()
    edited = lbmamba(window=4)(copy.deepcopy(plain))
    calls = []
    for module in edited.modules():
        if isinstance(getattr(module, "scan", None), partial):
            assert module.scan.func is local_scan
            module.scan = partial(
                lambda scan, *given, **named: calls.append(scan) or scan(*given, **named), module.scan
            )
    images = torch.randn(2, 3, 32, 32)
    with pytest.MonkeyPatch.context() as patch:
        # A scan that the edit left as it was would be called by this name.
        for path in ("layers.mamba", "models.mambavision", "models.groupmamba", "models.vcmamba", "models.mamba_nd"):
            patch.setattr(f"vitrail.{path}.selective_scan", None, raising=False)
        changed = edited(images)
    assert calls
    assert not torch.equal(changed, plain(images))


def test_the_order_of_weights_frozen_or_not_is_kept():
    mixer = SS2D(6, states=2)
    mixer.Ds.requires_grad_(False)
    lbmamba()(net(mixer))
    assert not mixer.Ds.requires_grad
    assert mixer.A_logs.requires_grad
    assert isinstance(mixer.orders, SomeOrders)


def test_a_local_mixer_turns_round_and_does_not_stream():
    mixer = LocalMamba(6, window=2)
    x = torch.randn(1, 4, 6)
    with pytest.raises(InputError, match="whole sequence"):
        mixer.stream(x)
    turned = LocalMamba(6, window=2, reverse=True)
    turned.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(turned(x), mixer(x.flip(1)).flip(1))


def test_what_cannot_be_edited_is_explained():
    for window in (1, 2.5, -3):
        with pytest.raises(InputError, match="lbmamba: window = "):
            lbmamba(window=window)
    with pytest.raises(InputError, match="'none'"):
        lbmamba(sweeps="none")
    with pytest.raises(InputError, match=r"no mixer with a selective scan in Sequential.*Softsign"):
        lbmamba()(nn.Sequential(nn.Softsign()))
    with pytest.raises(InputError, match="no mixer with a selective scan"):
        lbmamba()(lbmamba()(net(Mamba(6))))
    assert Mamba(6).scan is selective_scan
