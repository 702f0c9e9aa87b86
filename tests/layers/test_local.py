"""The locally bidirectional scan against its definition, written with indices, over lengths, windows and groups."""

import pytest
import torch
import torch.nn.functional as F

from vitrail.errors import InputError
from vitrail.layers.scan.local import LOCAL_FORMS, local_scan, published_window
from vitrail.layers.scan.local_compiled import MOST_WINDOW
from vitrail.layers.scan.selective import selective_scan


def inputs(batch, channels, length, size, groups, kind=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    given = {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length).abs() + 0.1,
        "A": -normal(channels, size).abs() - 0.05,
        "B": normal(batch, groups, size, length),
        "C": normal(batch, groups, size, length),
        "state": normal(batch, channels, size),
    }
    return {name: value.to(kind).requires_grad_() for name, value in given.items()}


def by_definition(u, delta, A, B, C, state, window):
    """Sum over pairs of places: each is reached from the first place, and from behind it within its window."""
    channels, length = u.shape[1:]
    groups = B.shape[1]
    y = torch.zeros_like(u)
    last = None
    for d in range(channels):
        g = d // (channels // groups)
        a = (delta[:, d, :, None] * A[d]).exp()  # (B, L, N)
        enter = (delta[:, d] * u[:, d])[..., None] * B[:, g].transpose(1, 2)
        rows = []
        for place in range(length):
            h = state[:, d] * a[:, : place + 1].prod(1)
            for other in range(place + 1):
                h = h + enter[:, other] * a[:, other + 1 : place + 1].prod(1)
            if place == length - 1:
                last = [*(last or []), h]
            for other in range(place + 1, min((place // window + 1) * window, length)):
                h = h + enter[:, other] * a[:, place:other].prod(1)
            rows.append((h * C[:, g, :, place]).sum(1))
        y = y + F.one_hot(torch.tensor(d), channels)[None, :, None] * torch.stack(rows, 1)[:, None]
    return y, torch.stack(last, 1)


def gradients(result, given, seed=3):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(value.shape, dtype=torch.float64, generator=generator).to(value.dtype) for value in result]
    total = sum((value * weight).sum() for value, weight in zip(result, weights, strict=True))
    return torch.autograd.grad(total, list(given.values()))


@pytest.mark.parametrize("form", LOCAL_FORMS)
@pytest.mark.parametrize(
    ("batch", "channels", "length", "size", "groups", "window"),
    [
        (2, 4, 1, 3, 1, 4),
        (1, 6, 7, 2, 3, 4),
        (2, 2, 9, 1, 2, 3),
        (1, 3, 12, 2, 1, 1),
        (1, 2, 8, 3, 1, 8),
        (1, 2, 5, 2, 1, 16),
    ],
)
def test_each_form_is_the_definition(form, batch, channels, length, size, groups, window):
    kind = torch.float32 if form == "compiled" else torch.float64
    tolerance = {"rtol": 2e-4, "atol": 2e-4} if form == "compiled" else {"rtol": 1e-9, "atol": 1e-9}
    given = inputs(batch, channels, length, size, groups, kind)
    found = local_scan(**given, window=window, form=form)
    exact = inputs(batch, channels, length, size, groups)
    expected = by_definition(**exact, window=window)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)
    for ours, theirs in zip(gradients(found, given), gradients(expected, exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


@pytest.mark.parametrize(
    ("channels", "length", "window"), [(20, 150, 4), (17, 129, 5), (16, 64, 64), (3, 70, 16), (33, 200, 24)]
)
def test_machine_code_agrees_over_chunks_and_odd_channels(channels, length, window):
    given = inputs(2, channels, length, 4, 1, torch.float32)
    exact = inputs(2, channels, length, 4, 1)
    found, expected = (
        local_scan(**values, window=window, form=form) for values, form in ((given, "compiled"), (exact, "reference"))
    )
    for ours, theirs in zip((*found, *gradients(found, given)), (*expected, *gradients(expected, exact)), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))


def test_skip_gate_bias_and_softplus_are_those_of_the_selective_scan():
    given = {name: value.detach() for name, value in inputs(2, 4, 11, 3, 2).items()}
    generator = torch.Generator().manual_seed(5)
    more = {
        "D": torch.randn(4, dtype=torch.float64, generator=generator),
        "z": torch.randn(2, 4, 11, dtype=torch.float64, generator=generator),
        "delta_bias": torch.randn(4, dtype=torch.float64, generator=generator),
    }
    whole, last = local_scan(**given, **more, softplus=True, window=4)
    steps = F.softplus(given["delta"] + more["delta_bias"][:, None])
    plain, state = local_scan(**{**given, "delta": steps}, window=4, form="reference")
    torch.testing.assert_close(whole, (plain + more["D"][:, None] * given["u"]) * F.silu(more["z"]))
    torch.testing.assert_close(last, state)
    # Nothing behind a place is seen where windows are of one place.
    torch.testing.assert_close(local_scan(**given, **more, window=1), selective_scan(**given, **more))


def test_a_place_sees_its_window_and_all_before_it():
    given = inputs(1, 2, 12, 2, 1)
    y, _ = local_scan(**given, window=4)
    for place in range(12):
        gradient = torch.autograd.grad(y[0, :, place].sum(), given["u"], retain_graph=True)[0][0].abs().sum(0)
        reached = [int(other) for other in gradient.nonzero()[:, 0]]
        assert reached == list(range((place // 4 + 1) * 4))


def test_low_precision_keeps_float32_states_and_complex_rates_are_taken():
    given = {name: value.detach().float() for name, value in inputs(2, 4, 40, 3, 1).items()}
    expected, _ = local_scan(**given, window=8)
    low = {name: value.bfloat16() if name in ("u", "delta", "B", "C") else value for name, value in given.items()}
    y, last = local_scan(**low, window=8)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))
    A = torch.complex(given["A"], given["A"].flip(0)).to(torch.complex128)
    u, delta = (given[name].double() for name in ("u", "delta"))
    B, C = (torch.complex(given[name], given[name].flip(3)).to(torch.complex128) for name in ("B", "C"))
    found, wanted = (local_scan(u, delta, A, B, C, window=8, form=form) for form in (None, "reference"))
    torch.testing.assert_close(found, wanted)


def test_the_window_is_as_published_unless_it_is_given():
    assert [published_window(length) for length in (1, 128, 129, 196, 256, 257, 5000)] == [4, 4, 8, 8, 8, 16, 16]
    given = {name: value.detach() for name, value in inputs(1, 2, 130, 1, 1).items()}
    torch.testing.assert_close(local_scan(**given), local_scan(**given, window=8, form="reference"))


def test_what_cannot_be_is_refused():
    given = {name: value.detach().float() for name, value in inputs(1, 2, 5, 1, 1).items()}
    with pytest.raises(InputError, match="window = 0"):
        local_scan(**given, window=0)
    with pytest.raises(InputError, match=r"unknown form .*'fast'"):
        local_scan(**given, form="fast")
    with pytest.raises(InputError, match=f"windows of {MOST_WINDOW}"):
        local_scan(**given, window=65, form="compiled")
    torch.testing.assert_close(local_scan(**given, window=65), local_scan(**given, window=65, form="reference"))
    with pytest.raises(InputError, match="selective_scan: A"):
        local_scan(**{**given, "A": given["A"][:1]})


def test_it_can_be_compiled_by_torch():
    given = {name: value.detach().float() for name, value in inputs(1, 2, 9, 2, 1).items()}
    torch.library.opcheck(
        torch.ops.vitrail.local_scan.default,
        (*(given[name] for name in ("u", "delta", "A", "B", "C", "state")), 4),
        test_utils=("test_schema", "test_faketensor"),
    )
