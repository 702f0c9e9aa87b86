import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.errors import InputError, MissingExtra
from vitrail.layers.scan import SCAN_FORMS, compiled, portable, scan_form, selective_scan

FORMS = ("portable", "compiled")
SHAPES = [
    # batch, channels, length, state, groups
    (1, 1, 1, 1, 1),
    (2, 3, 1, 4, 1),
    (2, 6, 7, 16, 2),
    (1, 17, 33, 16, 1),  # one more than vectors are wide
    (3, 40, 64, 1, 4),  # a chunk
    (1, 4, 131, 5, 2),
    (2, 16, 63, 8, 1),
    (1, 33, 65, 64, 1),
    (1, 32, 129, 17, 2),
]


@pytest.fixture(autouse=True)
def _numba(request):
    if "compiled" in str(getattr(request.node, "callspec", "")):
        pytest.importorskip("numba")


def inputs(batch, channels, length, size, groups, *, dtype=torch.float32, complex_state=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    inner = {torch.float32: torch.complex64, torch.float64: torch.complex128}[dtype] if complex_state else dtype
    A = -torch.rand(channels, size, dtype=dtype, generator=generator) * 4
    if complex_state:
        A = torch.complex(A, draw(channels, size))
    values = {
        "u": draw(batch, channels, length),
        "delta": draw(batch, channels, length),
        "A": A,
        "B": draw(batch, groups, size, length, dtype=inner),
        "C": draw(batch, groups, size, length, dtype=inner),
        "D": draw(channels),
        "z": draw(batch, channels, length),
        "delta_bias": draw(channels),
        "state": draw(batch, channels, size, dtype=inner),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def by_the_paper(u, delta, A, B, C, D, z, delta_bias, state):
    """Every element by itself: h = exp(delta A) h + delta B u, y = C h + D u, then the gate."""
    outputs, last = torch.zeros_like(u), []
    for image in range(u.shape[0]):
        for channel in range(u.shape[1]):
            group = channel // (u.shape[1] // B.shape[1])
            h = state[image, channel]
            for step in range(u.shape[2]):
                now = F.softplus(delta[image, channel, step] + delta_bias[channel])
                x = u[image, channel, step]
                h = torch.exp(now * A[channel]) * h + now * B[image, group, :, step] * x
                read = (C[image, group, :, step] * h).sum()
                read = 2 * read.real if read.is_complex() else read
                gate = z[image, channel, step] * torch.sigmoid(z[image, channel, step])
                outputs[image, channel, step] = (read + D[channel] * x) * gate
            last.append(h)
    return outputs, torch.stack(last).view(state.shape)


def values_and_gradients(function, given):
    for value in given.values():
        value.grad = None
    y, last = function(**given)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.real.dtype) for x in (y, last)]
    loss = (y * weights[0]).sum() + (last.abs().square() * weights[1]).sum()
    loss.backward()
    return [y.detach(), last.detach(), *(value.grad for value in given.values())]


def scan(form):
    return lambda **given: selective_scan(**given, softplus=True, form=form)


def agree(found, expected, rtol):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        scale = float(theirs.abs().max())
        assert float((ours - theirs).abs().max()) <= rtol * max(scale, 1e-3)


@pytest.mark.parametrize("complex_state", [False, True])
@pytest.mark.parametrize("form", ["reference", "portable"])
@pytest.mark.parametrize("shape", SHAPES[:3] + SHAPES[5:6], ids=str)
def test_a_form_is_the_papers_recurrence_with_its_gradients(form, shape, complex_state):
    batch, channels, length, size, groups = shape
    given = inputs(batch, channels, min(length, 12), size, groups, dtype=torch.float64, complex_state=complex_state)
    agree(values_and_gradients(scan(form), given), values_and_gradients(by_the_paper, given), 1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms_agree_with_the_reference(form, shape):
    given = inputs(*shape)
    agree(values_and_gradients(scan(form), given), values_and_gradients(scan("reference"), given), 2e-5)


@settings(max_examples=15)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 100), st.integers(1, 20), st.integers(0, 9)
)
def test_any_shape(batch, groups, width, length, size, seed):
    pytest.importorskip("numba")
    given = inputs(batch, groups * width, length, size, groups, seed=seed)
    expected = values_and_gradients(scan("reference"), given)
    for form in FORMS:
        agree(values_and_gradients(scan(form), given), expected, 5e-5)


@pytest.mark.parametrize("complex_state", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_segments_and_chunks_of_the_portable_form(monkeypatch, length, complex_state):
    monkeypatch.setattr(portable, "SEGMENT", 16 * 36)  # 16 steps
    monkeypatch.setattr(portable, "WIDTH", 3 * 36)  # in three chunks
    given = inputs(2, 6, length, 3, 2, dtype=torch.float64, complex_state=complex_state)
    assert next(portable._segments(given["u"], given["A"]))[1] == min(3, int(length**0.5))
    agree(values_and_gradients(scan("portable"), given), values_and_gradients(scan("reference"), given), 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_arrays_may_lie_in_memory_in_any_order(form):
    given = {name: value.detach() for name, value in inputs(2, 18, 40, 16, 1).items()}
    expected = values_and_gradients(scan(form), {k: v.clone().requires_grad_() for k, v in given.items()})
    for axis in (0, -2):
        turned = {k: v.transpose(axis % v.ndim, -1).contiguous() if v.ndim > 1 else v for k, v in given.items()}
        turned = {k: v.transpose(axis % v.ndim, -1) if v.ndim > 1 else v for k, v in turned.items()}
        turned = {k: v.detach().requires_grad_() for k, v in turned.items()}
        agree(values_and_gradients(scan(form), turned), expected, 1e-6)


def test_machine_code_leaves_the_order_in_memory_as_it_is():
    pytest.importorskip("numba")
    given = {name: value.detach() for name, value in inputs(2, 18, 40, 16, 1).items()}
    last = given["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    for delta in (last, given["delta"]):
        y, _ = selective_scan(**{**given, "delta": delta, "z": None}, form="compiled")
        assert y.stride() == delta.stride()


def test_long_sequences():
    pytest.importorskip("numba")
    given = inputs(1, 2, 16384, 2, 1)
    with torch.no_grad():
        expected = scan("reference")(**given)
    portable, compiled = (values_and_gradients(scan(form), given) for form in FORMS)
    agree(portable[:2], expected, 1e-4)
    agree(compiled, portable, 2e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_in_two_parts_is_the_sequence(form):
    given = inputs(2, 5, 50, 4, 1)
    whole, last = scan(form)(**given)
    cut = lambda part: {k: v[..., part] if k in ("u", "delta", "B", "C", "z") else v for k, v in given.items()}  # noqa: E731
    first, between = scan(form)(**cut(slice(0, 21)))
    second, end = scan(form)(**{**cut(slice(21, 50)), "state": between})
    assert torch.allclose(torch.cat([first, second], 2), whole, atol=1e-5)
    assert torch.allclose(end, last, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_keeps_its_states_in_float32(form, dtype):
    given = {name: value.detach() for name, value in inputs(2, 4, 300, 8, 1).items()}
    low = {k: v.to(dtype) if k in ("u", "delta", "B", "C", "z") else v for k, v in given.items()}
    found = values_and_gradients(scan(form), {k: v.requires_grad_() for k, v in low.items()})
    same = {k: v.detach().float().requires_grad_() for k, v in low.items()}
    expected = values_and_gradients(scan("reference"), same)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    agree(found[:1], [expected[0].to(dtype)], 0.01)
    agree(found[1:2], expected[1:2], 1e-5)
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        agree([ours], [theirs.to(ours.dtype)], 0.02)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_round_the_states(form):
    given = inputs(2, 4, 30, 8, 1)
    expected = values_and_gradients(scan(form), given)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(scan(form), given)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left_out", [(), ("D",), ("delta_bias",), ("state", "D", "delta_bias")], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
def test_what_machine_code_does_around_the_scan(softplus, left_out, dtype):
    """Softplus, with its bias, and D u, of the step sizes from the smallest to the largest."""
    pytest.importorskip("numba")
    given = inputs(2, 36, 70, 3, 2)
    given = {name: value.detach() for name, value in given.items() if name not in left_out}
    if softplus:
        given["delta"] += torch.linspace(-90, 40, 36)[:, None]
    else:  # states would grow
        given |= {name: given[name].abs() for name in ("delta", "delta_bias") if name in given}
    low = {name: value.to(dtype) if name in ("u", "delta") else value for name, value in given.items()}
    found, expected = (
        values_and_gradients(
            lambda **given: selective_scan(**given, softplus=softplus, form=form),  # noqa: B023
            {name: value.detach().clone().requires_grad_() for name, value in low.items()},
        )
        for form in ("compiled", "reference")
    )
    agree(found, expected, 2e-5 if dtype == torch.float32 else 0.01)
    if dtype == torch.float32 and softplus:  # channel by channel, as small ones are lost beside large ones
        steps = list(given).index("delta") + 2
        scale = expected[steps].abs().amax((0, 2)).clamp(min=1e-30)
        assert float(((found[steps] - expected[steps]).abs().amax((0, 2)) / scale).max()) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_given_is_left_out(form):
    given = inputs(2, 4, 9, 3, 1)
    y, last = selective_scan(
        given["u"], given["delta"].abs(), given["A"], given["B"][:, 0], given["C"][:, 0], form=form
    )
    neutral = {**given, "delta": given["delta"].abs().expm1().log(), "delta_bias": torch.zeros(4), "D": torch.zeros(4)}
    neutral |= {"state": torch.zeros(2, 4, 3), "z": torch.full((2, 4, 9), 30.0)}
    expected, end = by_the_paper(**neutral)
    assert torch.allclose(y, expected / 30, atol=1e-5)
    assert torch.allclose(last, end, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_rates_neither_overflow_nor_stay(form):
    u, one = torch.ones(1, 2, 40), torch.ones(1, 1, 40)
    A = torch.tensor([[-1e4], [-1e-6]])
    y, _ = selective_scan(u, torch.ones(1, 2, 40), A, one, one, form=form)
    assert torch.allclose(y[0, 0], torch.ones(40))
    assert torch.allclose(y[0, 1], torch.arange(1, 41.0), rtol=1e-4)


@pytest.mark.parametrize("rate", [-1e30, -1e4, -200.0, 0.0])
@pytest.mark.parametrize("form", FORMS)
def test_extreme_rates_have_finite_gradients(form, rate):
    given = inputs(2, 18, 70, 4, 1)
    given["A"] = torch.full((18, 4), rate, requires_grad=True)
    found, expected = (values_and_gradients(scan(name), given) for name in (form, "reference"))
    agree(found, expected, 2e-5)
    assert all(bool(value.isfinite().all()) for value in found)


def test_a_state_that_never_fades_gathers_no_error():
    """2^x is exact at 0 and near it: else thousands of steps would multiply what it is off by."""
    pytest.importorskip("numba")
    u, one = torch.zeros(1, 1, 16384), torch.ones(1, 1, 16384)
    for delta in (0.0, 1e-9, 1e-8):
        given = (u, torch.full_like(u, delta), -torch.ones(1, 1), one, one)
        y, _ = selective_scan(*given, state=torch.ones(1, 1, 1), form="compiled")
        assert abs(float(y[0, 0, -1]) - math.exp(-16384 * delta)) < 2e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_of_a_gradient_is_refused(form):
    given = inputs(1, 2, 5, 3, 1)
    y, _ = scan(form)(**given)
    (slope,) = torch.autograd.grad(y.square().sum(), given["u"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|no autograd formula"):
        slope.square().sum().backward()


def test_memory_of_a_long_sequence_is_bounded(monkeypatch):
    """The portable form keeps one state per segment between forward and backward, not one per step."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    monkeypatch.setattr(portable, "SEGMENT", 64 * 4 * 16)
    given = inputs(1, 4, 64 * 20, 16, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = scan("portable")(**given)
    states = 4 * 64 * 20 * 16 * 4
    assert sum(kept.values()) < 1.5 * states
    assert outputs[0].requires_grad


def test_which_form_runs_can_be_asked(monkeypatch):
    u, A = torch.zeros(1, 2, 3), torch.zeros(2, 4)
    monkeypatch.setattr("vitrail.layers.scan.selective._has_numba", lambda: True)
    assert scan_form(u, A) == "compiled"
    assert scan_form(u, A.double()) == scan_form(u, A.cfloat()) == "portable"
    assert scan_form(u.to("meta"), A.to("meta")) == "portable"
    monkeypatch.setattr("vitrail.layers.scan.selective._has_numba", lambda: False)
    assert scan_form(u, A) == "portable"
    assert set(FORMS) < set(SCAN_FORMS)


@pytest.mark.parametrize("ask", ["torch.compiler.is_exporting", "torch.onnx.is_in_onnx_export"])
def test_an_export_takes_the_portable_form(monkeypatch, ask):
    monkeypatch.setattr("vitrail.layers.scan.selective._has_numba", lambda: True)
    monkeypatch.setattr(ask, lambda: True)
    assert scan_form(torch.zeros(1, 2, 3), torch.zeros(2, 4)) == "portable"


def test_an_exported_program_holds_torchs_operators_alone():
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, softplus=True)[0]

    given = tuple(
        value.detach() for name, value in inputs(2, 4, 9, 3, 1).items() if name in ("u", "delta", "A", "B", "C")
    )
    program = torch.export.export(Scan(), given)
    assert not [node.target for node in program.graph.nodes if "vitrail" in str(node.target)]
    torch.testing.assert_close(program.module()(*given), Scan()(*given), rtol=1e-4, atol=1e-5)


def test_threads_do_not_change_the_answer():
    pytest.importorskip("numba")
    given = inputs(1, 48, 200, 16, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = values_and_gradients(scan("compiled"), given)
        torch.set_num_threads(3)
        three = values_and_gradients(scan("compiled"), given)
    finally:
        torch.set_num_threads(before)
    agree(three, one, 1e-5)
    for name, ours, theirs in zip(("y", "last", *given), three, one, strict=True):
        assert torch.equal(ours, theirs) or name in ("B", "C")  # whose gradients are sums over channels


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_has_threads_of_its_own():
    pool = compiled._pool(2)
    assert compiled._pool(2) is pool
    child = os.fork()
    if not child:
        os._exit(compiled._pool.cache_info().currsize)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_it_is_an_operator_that_torch_knows():
    pytest.importorskip("numba")
    values = [value.detach() for value in inputs(1, 4, 40, 3, 2).values()]
    u, delta, A, B, C, state = *values[:5], values[-1]
    last = delta.transpose(1, 2).contiguous().transpose(1, 2)  # channels
    for step, softplus in ((delta.abs(), False), (last, True)):
        given = (u, step, A, B, C, state, torch.rand(4, 2), softplus)
        torch.library.opcheck(torch.ops.vitrail.selective_scan.default, given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"delta": torch.zeros(2, 4, 8)}, "must be (B, D, L)"),
        ({"u": torch.zeros(2, 4, 0), "delta": torch.zeros(2, 4, 0)}, "L at least 1"),
        ({"A": torch.zeros(3, 3)}, "(D, N) with D = 4"),
        ({"B": torch.zeros(2, 3, 3, 9)}, "divides 4"),
        ({"C": torch.zeros(2, 1, 2, 9)}, "C (2, 1, 2, 9) must be"),
        ({"state": torch.zeros(2, 4, 4)}, "state (2, 4, 4)"),
        ({"form": "fast"}, "compiled, portable, reference"),
    ],
)
def test_wrong_shapes_are_explained(change, words):
    given = {name: value.detach() for name, value in inputs(2, 4, 9, 3, 1).items()}
    with pytest.raises(InputError) as raised:
        selective_scan(**{**given, **change})
    assert words in str(raised.value)


def test_without_numba_the_extra_is_named(monkeypatch):
    def missing(module, extra):
        raise MissingExtra(f"pip install 'vitrail[{extra}]'")

    monkeypatch.setattr(compiled, "require", missing)
    compiled._kernels.cache_clear()
    given = {name: value.detach() for name, value in inputs(1, 2, 3, 2, 1).items()}
    with pytest.raises(MissingExtra, match=r"vitrail\[fast\]"):
        selective_scan(**given, form="compiled")
    compiled._kernels.cache_clear()
