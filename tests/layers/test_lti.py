import math

import numpy as np
import pytest
import torch

from vitrail.errors import InputError, VitrailError
from vitrail.layers.scan.lti import (
    LARGEST_B,
    S4,
    S4D,
    S4D_INITS,
    S5,
    causal_convolution,
    diagonal_scan,
    dplr_kernel,
    hippo_legs,
    hippo_normal,
    vandermonde_kernel,
)

LENGTHS = [1, 2, 3, 7, 16, 33, 64]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def made(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options).double()


def gradients(y, inputs):
    weight = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
    return torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)


def assert_the_same(ours, theirs, inputs, rtol=1e-8, atol=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    for got, wanted in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


# ---- slow loops, from the papers: discretise a dense system, then recur


def pairs(x):
    """Both of each conjugate pair."""
    value = torch.view_as_complex(x) if x.shape[-1] == 2 and not x.is_complex() else x
    return torch.cat((value, value.conj()), -1)


def sample(A, B, step, method):
    """Return A and B of the sampled system, for dense A (N, N)."""
    one = torch.eye(len(A), dtype=A.dtype)
    if method == "bilinear":
        inverse = torch.linalg.inv(one - step / 2 * A)
        return inverse @ (one + step / 2 * A), inverse @ B * step
    grown = torch.linalg.matrix_exp(step * A)
    return grown, torch.linalg.solve(A, (grown - one) @ B)


def recur(A, B, C, D, u):
    """One channel, u (L,)."""
    state, rows = torch.zeros(len(A), dtype=A.dtype), []
    for value in u:
        state = A @ state + B * value
        rows.append((C @ state).real + D * value)
    return torch.stack(rows)


def slow_single(layer, x):
    """S4 and S4D, from their parameters."""
    images = []
    for image in x:
        columns = []
        for h in range(layer.dim):
            A = torch.diag(pairs(-torch.exp(layer.A_real[h]) - 1j * layer.A_imag[h]))
            B, C, step = pairs(layer.B[0, h]), pairs(layer.C[0, h]), torch.exp(layer.inv_dt[h, 0])
            if isinstance(layer, S4):
                P = pairs(layer.P[0, h])
                A = A - torch.outer(P, P.conj())
                A, B = sample(A, B, step, "bilinear")
                C = C @ torch.linalg.inv(
                    torch.eye(len(A), dtype=A.dtype) - torch.linalg.matrix_power(A, int(layer.l_kernel))
                )
            else:
                A, B = sample(A, B, step, layer.discretisation)
            columns.append(recur(A, B, C, layer.D[0, h], image[:, h]))
        images.append(torch.stack(columns, 1))
    return torch.stack(images)


def slow_s5(layer, x):
    real = layer.Lambda_re.clamp(max=-1e-4) if layer.clip else layer.Lambda_re
    poles, B = real + 1j * layer.Lambda_im, torch.view_as_complex(layer.B)
    step = torch.exp(layer.log_step[:, 0])
    if layer.discretisation == "zoh":
        A, factor = torch.exp(poles * step), (torch.exp(poles * step) - 1) / poles
    else:
        A, factor = (1 + step / 2 * poles) / (1 - step / 2 * poles), step / (1 - step / 2 * poles)
    B = factor[:, None] * B
    names = ("C1", "C2") if layer.bidirectional else ("C",)
    images = []
    for image in x:
        y = layer.D * image
        for name, turned in zip(names, (False, True), strict=False):
            state, rows = torch.zeros(len(A), dtype=A.dtype), []
            for u in image.flip(0) if turned else image:
                state = A * state + B @ u.to(B.dtype)
                rows.append(2 * (torch.view_as_complex(getattr(layer, name)) @ state).real)
            y = y + torch.stack(rows[::-1] if turned else rows)
        images.append(y)
    return torch.stack(images)


# ---- the mathematics


@pytest.mark.parametrize("size", [1, 2, 5, 8, 64])
def test_hippo_is_normal_less_a_matrix_of_rank_one(size):
    A, B = hippo_legs(size)
    for n in range(size):
        assert B[n] == pytest.approx(math.sqrt(2 * n + 1))
        for k in range(size):
            expected = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0
            assert A[n, k] == pytest.approx(expected)
    poles, P, entering, V = (torch.from_numpy(x) for x in hippo_normal(size))
    dense = V @ (torch.diag(poles) - torch.outer(P, P.conj())) @ V.mH
    torch.testing.assert_close(dense.real, torch.from_numpy(A), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((V @ entering).real, torch.from_numpy(B), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(poles.real, torch.full((size,), -0.5, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert (V[0].real > 0).all()
    assert V[0].imag.abs().max() < 1e-12


@pytest.mark.parametrize("length", LENGTHS)
def test_a_vandermonde_kernel_is_its_sum(length):
    weights = torch.complex(normal(2, 3), normal(2, 3, seed=1)).requires_grad_()
    logs = torch.complex(-normal(2, 3, seed=2).abs(), normal(2, 3, seed=3)).requires_grad_()
    slow = torch.stack([2 * (weights * torch.exp(step * logs)).sum(-1).real for step in range(length)], -1)
    assert_the_same(vandermonde_kernel(weights, logs, length), slow, [weights, logs])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_dplr_kernel_is_the_powers_of_the_sampled_matrix(monkeypatch, length, piece):
    monkeypatch.setattr("vitrail.layers.scan.lti.PIECE", piece)
    parts = [normal(2, 3, seed=seed) for seed in range(8)]
    parts[0] = -parts[0].abs() - 0.1
    poles, P, B, C = (torch.complex(*parts[k : k + 2]).requires_grad_() for k in (0, 2, 4, 6))
    rows = []
    for h in range(2):
        low = pairs(P[h])
        A, enter = sample(torch.diag(pairs(poles[h])) - torch.outer(low, low.conj()), pairs(B[h]), 1.0, "bilinear")
        C_h = pairs(C[h]) @ torch.linalg.inv(torch.eye(6, dtype=A.dtype) - torch.linalg.matrix_power(A, length))
        rows.append(torch.stack([(C_h @ torch.linalg.matrix_power(A, k) @ enter).real for k in range(length)]))
    found = dplr_kernel(poles, P, B, C, length)
    assert_the_same(found, torch.stack(rows), [poles, P, B, C], rtol=1e-7, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(dplr_kernel(poles, P, B, C, length), found.detach())


@pytest.mark.parametrize("length", LENGTHS)
def test_a_convolution_sees_the_past_alone(length):
    x, kernel = normal(2, 3, length).requires_grad_(), normal(3, length, seed=1).requires_grad_()
    slow = torch.stack([sum(kernel[:, k] * x[..., t - k] for k in range(t + 1)) for t in range(length)], -1)
    assert_the_same(causal_convolution(x, kernel), slow, [x, kernel])


@pytest.mark.parametrize("length", LENGTHS)
def test_a_diagonal_scan_is_its_recurrence(length):
    logs = torch.complex(-normal(3).abs(), normal(3, seed=1)).requires_grad_()
    entering = torch.complex(normal(2, length, 3), normal(2, length, 3, seed=2)).requires_grad_()
    first = torch.complex(normal(2, 3), normal(2, 3, seed=4)).requires_grad_()
    state, rows = first, []
    for t in range(length):
        state = torch.exp(logs) * state + entering[:, t]
        rows.append(state)
    found, slow = (torch.view_as_real(x) for x in (diagonal_scan(logs, entering, first), torch.stack(rows, 1)))
    assert_the_same(found, slow, [logs, entering, first])


# ---- the layers

LAYERS = {
    **{f"s4d-{init}": (lambda init=init: made(S4D, 3, 8, init), slow_single) for init in S4D_INITS},
    "s4d-bilinear": (lambda: made(S4D, 3, 8, "inv", "bilinear"), slow_single),
    "s4": (lambda: made(S4, 3, 8, 64), slow_single),
    "s5": (lambda: made(S5, 3, 8), slow_s5),
    "s5-blocks": (lambda: made(S5, 5, 12, 3, "bilinear"), slow_s5),
    "s5-both": (lambda: made(S5, 3, 4, bidirectional=True), slow_s5),
}


def output(layer, x):
    y = layer(x)
    return y[0] if isinstance(layer, S5) else y


@pytest.mark.parametrize("length", [1, 6, 13])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_discretised_recurrence(name, length):
    make, slow = LAYERS[name]
    layer = make()
    x = normal(2, length, layer.dim).requires_grad_()
    assert_the_same(output(layer, x), slow(layer, x), [x, *layer.parameters()], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "s5-both"])
def test_steps_are_the_sequence(name):
    layer = LAYERS[name][0]()
    x = normal(2, 21, layer.dim)
    state, rows, system = layer.initial_state(2), [], layer.sampled()
    for t in range(21):
        y, state = layer.step(x[:, t], state, system if t % 2 else None)
        rows.append(y)
    torch.testing.assert_close(torch.stack(rows, 1), output(layer, x), rtol=1e-7, atol=1e-7)


def test_a_sequence_in_parts_goes_through_the_state_of_s5():
    layer = made(S5, 3, 8)
    x = normal(2, 30, 3)
    whole, last = layer(x)
    first, state = layer(x[:, :11])
    second, end = layer(x[:, 11:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("kind", [S4, S4D, S5])
def test_single_precision_at_a_length_of_16384(kind):
    """Convolution and scan against steps in double precision: 1e-5 of the largest output."""
    torch.manual_seed(0)
    layer = kind(2, 16, length=16_384) if kind is S4 else kind(2, 16)
    x = normal(1, 16_384, 2, dtype=torch.float32)
    with torch.no_grad():
        found = output(layer, x)[0].numpy()
    u = x[0].double().numpy()
    if kind is S5:
        A, B, C = (value.detach().numpy() for value in layer.double().sampled())
        A, kept = np.diag(A), 2
    elif kind is S4D:
        A, B, C = (value.detach().numpy() for value in layer.double().sampled())
        A, kept = np.stack([np.diag(row) for row in A]), 2
    else:
        layer = layer.double()
        A, C, kept = layer._dense().detach().numpy(), layer._output().detach().numpy(), 1
        step = layer.inv_dt.detach().exp().numpy()
        B = step / 2 * ((A + np.eye(16)) @ pairs(layer.B[0]).detach().numpy()[..., None])[..., 0]
    state, rows = np.zeros(A.shape[:-1], dtype=complex), []
    for value in u:
        if kind is S5:
            state = A @ state + B @ value
            rows.append(kept * (C @ state).real)
        else:
            state = (A @ state[..., None])[..., 0] + B * value[:, None]
            rows.append(kept * (C * state).sum(-1).real)
    exact = np.stack(rows) + u * layer.D.detach().numpy()
    assert found.dtype == np.float32
    assert np.abs(found - exact).max() / np.abs(exact).max() < 1e-5


def test_s4_takes_longer_sequences_after_it_is_lengthened():
    layer, twin = made(S4, 2, 8, 16), made(S4, 2, 8, 16)
    x = normal(1, 40, 2)
    with pytest.raises(InputError, match=r"S4: a sequence of 40 steps.*takes 16: call lengthen\(40\)"):
        layer(x)
    layer.lengthen(40)
    assert int(layer.l_kernel) == 40
    torch.testing.assert_close(layer(x[:, :16]), twin(x[:, :16]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x), slow_single(layer, x), rtol=1e-6, atol=1e-6)


# ---- how they begin


def test_s4_and_s4d_begin_as_published():
    for init in S4D_INITS:
        torch.manual_seed(1)
        layer = S4D(4, 64, init, step_min=0.01, step_max=0.02)
        order = torch.arange(32.0)
        imaginary = {
            "lin": math.pi * order,
            "inv": 64 / math.pi * (64 / (2 * order + 1) - 1),
            "legs": -torch.from_numpy(hippo_normal(64)[0].imag[:32]).float(),
            "real": 0 * order,
        }[init]
        torch.testing.assert_close(layer.A_imag, imaginary.clamp(min=1e-4).expand(4, -1), rtol=1e-5, atol=1e-5)
        real = 1 + order if init == "real" else torch.full((32,), 0.5)
        torch.testing.assert_close(layer.A_real.exp(), real.expand(4, -1))
        if init != "legs":
            assert torch.equal(torch.view_as_complex(layer.B.data), torch.ones(1, 4, 32, dtype=torch.cfloat))
        assert ((layer.inv_dt.exp() >= 0.0099) & (layer.inv_dt.exp() <= 0.0201)).all()
    layer = S4(4, 64, 128)
    _, P, B, _ = (torch.from_numpy(x[..., :32]).to(torch.cfloat) for x in hippo_normal(64))
    assert B.imag.abs().max() > 40
    clipped = torch.complex(B.real, B.imag.clamp(-LARGEST_B, LARGEST_B))
    for value, expected in ((layer.P, P), (layer.B, clipped), (S4D(4, 64, "legs").B, clipped)):
        torch.testing.assert_close(torch.view_as_complex(value.data), expected.expand(1, 4, -1))
    many = torch.view_as_complex(S4D(400, 64).C.data)
    assert float(many.abs().square().mean()) == pytest.approx(1, rel=0.05)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "inv_dt": (4, 1),
        "C": (1, 4, 32, 2),
        "B": (1, 4, 32, 2),
        "A_real": (4, 32),
        "A_imag": (4, 32),
        "D": (1, 4),
        "P": (1, 4, 32, 2),
        "l_kernel": (),
    }


def test_s5_begins_as_blocks_of_hippo():
    torch.manual_seed(0)
    layer = S5(300, 64, blocks=4)
    poles = torch.from_numpy(hippo_normal(16)[0])[:8]
    torch.testing.assert_close(layer.Lambda_im, poles.imag.float().repeat(4))
    torch.testing.assert_close(layer.Lambda_re, torch.full((32,), -0.5))
    # V* and V keep a block's share of the variance: 1 / N of each entry before, of one real or two complex parts.
    B, C = torch.view_as_complex(layer.B.data), torch.view_as_complex(layer.C.data)
    assert float(B.abs().square().mean()) == pytest.approx(1 / 64, rel=0.1)
    assert float(C.abs().square().mean()) == pytest.approx(2 / 64, rel=0.1)
    assert [tuple(value.shape) for value in (layer.B, layer.C, layer.D, layer.log_step)] == [
        (32, 300, 2),
        (300, 32, 2),
        (300,),
        (32, 1),
    ]


def test_the_poles_of_a_clipped_s5_stay_left():
    layer = made(S5, 2, 4, clip=True)
    with torch.no_grad():
        layer.Lambda_re.fill_(0.3)
    assert (layer.discrete()[0].real < 0).all()
    x = normal(1, 5, 2)
    torch.testing.assert_close(layer(x)[0], slow_s5(layer, x))


@pytest.mark.parametrize("make", [lambda: S4D(4, 8), lambda: S4(4, 8, 32), lambda: S5(4, 8)], ids=["S4D", "S4", "S5"])
def test_low_precision_has_states_of_single_precision(make):
    torch.manual_seed(0)
    layer = make()
    x = normal(2, 32, 4, dtype=torch.float32)
    exact = output(layer, x).detach()
    with torch.no_grad():
        low = output(layer.bfloat16(), x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert layer.initial_state(1).dtype == torch.complex64
    assert float((low - exact).abs().max() / exact.abs().max()) < 0.1


def test_kernels_hold_no_state_for_each_step():
    """What autograd keeps of 4 channels x 4,096 steps x 32 pairs is far below the 512 K numbers of all states."""
    for layer in (S4D(4, 64), S4(4, 64, 4096)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            layer.kernel(4096)
        assert sum(kept) < 160_000, type(layer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S4D(3, 7), "S4D: dim = 3 and d_state = 7 .*even"),
        (lambda: S5(0, 8), "S5: dim = 0"),
        (lambda: S4(3, 8, 0), "S4: length = 0.*1 step"),
        (lambda: S4D(3, 8, step_min=0.2, step_max=0.1), "steps from 0.2 to 0.1 .*step_min <= step_max"),
        (lambda: S4D(3, 8, "log"), "initialisation of S4D.*'log'.*there are lin"),
        (lambda: S4D(3, 8, discretisation="euler"), "discretisation.*'euler'.*zoh and bilinear"),
        (lambda: S5(3, 8, discretisation="euler"), "discretisation.*'euler'"),
        (lambda: S5(3, 8, blocks=3), "blocks = 3 do not cut 8 states"),
        (lambda: S4D(3, 8)(torch.zeros(1, 4, 5)), r"x \(1, 4, 5\) must be \(B, L, 3\)"),
        (lambda: S5(3, 8)(torch.zeros(1, 0, 3)), r"x \(1, 0, 3\) .*none of them 0"),
        (lambda: S4D(3, 8).step(torch.zeros(2, 3), torch.zeros(1, 3, 4)), r"state \(1, 3, 4\) must be \(2, 3, 4\)"),
        (lambda: S5(3, 8).step(torch.zeros(2, 4), torch.zeros(2, 4)), r"x \(2, 4\) must be \(B, 3\)"),
        (lambda: S5(3, 8)(torch.zeros(2, 5, 3), torch.zeros(1, 4)), r"state \(1, 4\) must be \(2, 4\)"),
        (lambda: S5(3, 8, bidirectional=True).sampled(), "bidirectional layer takes no single steps"),
        (lambda: S4(3, 8, 16).lengthen(8), "length = 8 is below the present 16"),
    ],
)
def test_what_does_not_fit_is_explained(call, message):
    with pytest.raises(VitrailError, match=message):
        call()
