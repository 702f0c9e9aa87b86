import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.deploy.export import quiet
from vitrail.errors import InputError, MissingExtra
from vitrail.layers.scan import plane, plane_compiled, scans_as_operators
from vitrail.layers.scan.plane import PLANE_SCAN_FORMS, plane_scan, plane_scan_form

FORMS = ("portable", "compiled")
SHAPES = [
    # batch, height, width, channels, states
    (1, 1, 1, 1, 1),
    (2, 1, 9, 3, 4),
    (2, 9, 1, 3, 4),
    (1, 5, 8, 17, 16),  # one more channel than the vectors are wide
    (3, 7, 7, 16, 1),
    (1, 35, 2, 6, 4),  # two strips and some rows
    (2, 3, 40, 2, 16),
]


@pytest.fixture(autouse=True)
def _numba(request):
    if "compiled" in str(getattr(request.node, "callspec", "")):
        pytest.importorskip("numba")


def inputs(batch, height, width, channels, states, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    place = (batch, height, width)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    values = {
        "u": draw(*place, channels),
        "delta_top": draw(*place, channels).abs(),
        "delta_left": draw(*place, channels).abs(),
        "A_top": -2 * draw(channels, states).abs(),
        "A_left": -2 * draw(channels, states).abs(),
        "B_top": draw(*place, states),
        "B_left": draw(*place, states),
        "C": draw(*place, states),
        "D": draw(channels),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def by_the_paper(u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D):
    """Every element of every state by itself, in the four cases that there are."""
    outputs = torch.zeros_like(u)
    for b in range(u.shape[0]):
        for d in range(u.shape[3]):
            h = {}
            for i in range(u.shape[1]):
                for j in range(u.shape[2]):
                    place = (b, i, j)
                    for n in range(C.shape[3]):
                        x_top = delta_top[(*place, d)] * B_top[(*place, n)] * u[(*place, d)]
                        x_left = delta_left[(*place, d)] * B_left[(*place, n)] * u[(*place, d)]
                        keep_top = torch.exp(delta_top[(*place, d)] * A_top[d, n])
                        keep_left = torch.exp(delta_left[(*place, d)] * A_left[d, n])
                        if i == 0 and j == 0:
                            h[i, j, n] = x_left
                        elif i == 0:
                            h[i, j, n] = keep_left * h[i, j - 1, n] + x_left
                        elif j == 0:
                            h[i, j, n] = keep_top * h[i - 1, j, n] + x_top
                        else:
                            both = keep_left * h[i, j - 1, n] + x_left + keep_top * h[i - 1, j, n] + x_top
                            h[i, j, n] = both / 2
                    read = sum(C[(*place, n)] * h[i, j, n] for n in range(C.shape[3]))
                    outputs[(*place, d)] = read + D[d] * u[(*place, d)]
    return outputs


def value_and_gradients(function, given):
    y = function(**given)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    found = torch.autograd.grad((y * weight).sum(), list(given.values()), allow_unused=True)
    return [
        y.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(given.values(), found, strict=True))
    ]  # fmt: skip


def scan(form):
    return lambda **given: plane_scan(**given, form=form)


def agree(found, expected, rtol):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= rtol * max(float(theirs.abs().max()), 1e-3)


@pytest.mark.parametrize("form", ["reference", "portable"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 1, 4, 2, 3), (1, 4, 1, 2, 3), (1, 3, 4, 2, 2)], ids=str)
def test_a_form_is_the_papers_recurrence_with_its_gradients(form, shape):
    given = inputs(*shape, dtype=torch.float64)
    agree(value_and_gradients(scan(form), given), value_and_gradients(by_the_paper, given), 1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms_agree_with_the_reference(form, shape):
    given = inputs(*shape)
    agree(value_and_gradients(scan(form), given), value_and_gradients(scan("reference"), given), 2e-5)


@settings(max_examples=15)
@given(
    st.integers(1, 2), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(0, 9)
)
def test_any_shape(batch, height, width, channels, states, seed):
    pytest.importorskip("numba")
    given = inputs(batch, height, width, channels, states, seed=seed)
    agree(value_and_gradients(scan("compiled"), given), value_and_gradients(scan("portable"), given), 5e-5)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2), (1, 2, 4, 1, 3)], ids=str)
def test_gradients_of_the_portable_form_are_those_of_small_steps(shape, monkeypatch):
    monkeypatch.setattr(plane, "DIAGONALS", 2)  # so that it computes some again
    given = inputs(*shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *values: plane_scan(*values, form="portable"), tuple(given.values()))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_keeps_its_states_in_float32(form):
    given = inputs(1, 24, 24, 4, 4)
    low = {k: v.detach() if k[0] in "AD" else v.detach().bfloat16().requires_grad_() for k, v in given.items()}
    y = scan(form)(**low)
    exact = scan("reference")(**{k: v.float() for k, v in low.items()})
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).abs().max() <= 0.005 * exact.abs().max()
    y.sum().backward()
    assert low["u"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_what_comes_later_and_what_stands_above_right_of_it_is_not_seen(form):
    """A place sees the rectangle from the corner to it, and no other place."""
    given = {name: value.detach() for name, value in inputs(1, 5, 6, 2, 3).items()}
    before = plane_scan(**given, form=form)
    given["u"] = given["u"].clone()
    given["u"][0, 2, 3] += 1
    changed = (plane_scan(**given, form=form) - before).abs().amax(-1)[0] > 0
    seen = torch.zeros(5, 6, dtype=torch.bool)
    seen[2:, 3:] = True
    assert torch.equal(changed, seen)


def test_extreme_rates_neither_overflow_nor_stay():
    pytest.importorskip("numba")
    one = torch.ones(1, 6, 6, 1)
    A = torch.tensor([[-1e4], [-1e-6]])
    u = one.expand(1, 6, 6, 2)
    y = plane_scan(u, u, u, A, A, one, one, one, form="compiled")
    torch.testing.assert_close(y, plane_scan(u, u, u, A, A, one, one, one, form="reference"))
    torch.testing.assert_close(y[..., 0], torch.ones(1, 6, 6))


def test_memory_of_the_portable_form_is_bounded():
    """Between forward and backward it keeps one state per segment of antidiagonals, not one per place."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = inputs(1, 64, 64, 32, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = scan("portable")(**given)
    assert sum(kept.values()) < 64 * 64 * 32 * 16 * 4
    assert y.requires_grad


def test_the_compiled_form_keeps_a_row_of_states_per_strip():
    pytest.importorskip("numba")
    values = [value.detach() for value in inputs(2, 33, 5, 3, 4).values()][:8]
    assert torch.ops.vitrail.plane_scan(*values)[1].shape == (2, 3, 5, 4, 3)


def test_which_form_runs_can_be_asked(monkeypatch):
    u, A = torch.zeros(1, 2, 3, 4), torch.zeros(4, 4)
    monkeypatch.setattr(plane, "_has_numba", lambda: True)
    assert plane_scan_form(u, A) == plane_scan_form(u, A.bfloat16()) == "compiled"
    assert plane_scan_form(u, A.double()) == plane_scan_form(u.to("meta"), A.to("meta")) == "portable"
    monkeypatch.setattr(plane, "_has_numba", lambda: False)
    assert plane_scan_form(u, A) == "portable"
    assert set(FORMS) < set(PLANE_SCAN_FORMS)


@pytest.mark.parametrize("ask", ["torch.compiler.is_exporting", "torch.onnx.is_in_onnx_export"])
def test_an_export_takes_the_portable_form(monkeypatch, ask):
    monkeypatch.setattr(plane, "_has_numba", lambda: True)
    monkeypatch.setattr(ask, lambda: True)
    assert plane_scan_form(torch.zeros(1, 2, 3, 4), torch.zeros(4, 4)) == "portable"


@pytest.mark.parametrize("trains", [False, True])
def test_an_exported_program_holds_torchs_operators_alone(trains):
    values = tuple(value.detach().requires_grad_(trains) for value in inputs(2, 2, 16, 2, 3).values())
    program = torch.export.export(Scan(), values)
    assert not [node.target for node in program.graph.nodes if "vitrail" in str(node.target)]
    torch.testing.assert_close(program.module()(*values), Scan()(*values), rtol=1e-4, atol=1e-5)


class Scan(torch.nn.Module):
    def forward(self, *values):
        return plane_scan(*values)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 2, 4), (1, 6, 2, 3, 1)], ids=str)
def test_the_operator_of_an_onnx_file_is_the_reference_in_torch(shape, monkeypatch):
    given = {name: value.detach() for name, value in inputs(*shape, dtype=torch.float64).items()}
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    with monkeypatch.context() as patch, scans_as_operators():
        patch.setattr(plane, "_in_segments", None)
        found = plane_scan(**given)
    torch.testing.assert_close(found, plane_scan(**given, form="reference"), rtol=1e-12, atol=1e-12)


def test_torch_knows_the_shape_of_the_operator_of_an_onnx_file():
    place = (5, 2, 3)
    side = [torch.rand(*place, *rest) for rest in ((1, 4), (1, 4), (6, 1), (1, 1))]
    args = (*side, *side, torch.rand(*place, 1, 6), -torch.rand(6, 4), -torch.rand(6, 4), torch.rand(2, 3, 6, 4))
    torch.library.opcheck(torch.ops.vitrail.plane_steps.default, args, test_utils=("test_schema", "test_faketensor"))


def test_an_onnx_file_holds_one_operator_and_answers_for_any_batch():
    onnxruntime = pytest.importorskip("onnxruntime")
    given = tuple(value.detach() for value in inputs(2, 5, 4, 3, 4).values())
    dynamic = tuple({0: torch.export.Dim("batch")} if value.ndim == 4 else None for value in given)
    with quiet(), scans_as_operators() as translations:
        proto = torch.onnx.export(
            Scan(), given, dynamo=True, dynamic_shapes=(dynamic,), custom_translation_table=translations
        ).model_proto
    assert [node.op_type for node in proto.graph.node].count("Scan") == 1
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for batch in (1, 3):
        given = [value.detach() for value in inputs(batch, 5, 4, 3, 4, seed=batch).values()]
        names = [entry.name for entry in session.get_inputs()]
        found = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})[0]
        torch.testing.assert_close(torch.from_numpy(found), plane_scan(*given), rtol=1e-4, atol=1e-5)


def test_threads_do_not_change_the_answer():
    pytest.importorskip("numba")
    given = inputs(1, 20, 20, 48, 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = value_and_gradients(scan("compiled"), given)
        torch.set_num_threads(3)
        three = value_and_gradients(scan("compiled"), given)
    finally:
        torch.set_num_threads(before)
    agree(three, one, 1e-5)


def test_it_is_an_operator_that_torch_knows():
    pytest.importorskip("numba")
    values = tuple(value.detach() for value in list(inputs(1, 18, 3, 2, 3).values())[:8])
    torch.library.opcheck(torch.ops.vitrail.plane_scan.default, values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u": torch.zeros(2, 3, 4)}, r"u \(2, 3, 4\) must be \(B, H, W, D\)"),
        ({"u": torch.zeros(2, 0, 5, 4)}, "each at least 1"),
        ({"delta_left": torch.zeros(2, 3, 4, 4)}, r"delta_left \(2, 3, 4, 4\) must be \(2, 3, 5, 4\)"),
        ({"A_top": torch.zeros(3, 3)}, r"\(D, N\) with D = 4"),
        ({"A_top": torch.zeros(4, 3, dtype=torch.complex64)}, "must be real"),
        ({"A_left": torch.zeros(4, 2)}, r"A_left \(4, 2\) must be \(4, 3\)"),
        ({"B_top": torch.zeros(2, 3, 5, 4)}, r"B_top .* must be \(2, 3, 5, 3\)"),
        ({"C": torch.zeros(2, 5, 3, 3)}, r"C \(2, 5, 3, 3\) must be \(2, 3, 5, 3\)"),
        ({"D": torch.zeros(3)}, r"D \(3,\) must be \(4,\)"),
        ({"form": "fast"}, "compiled, portable, reference"),
    ],
)
def test_wrong_shapes_are_explained(change, words):
    given = {name: value.detach() for name, value in inputs(2, 3, 5, 4, 3).items()}
    with pytest.raises(InputError, match=words):
        plane_scan(**{**given, **change})


def test_without_numba_the_extra_is_named(monkeypatch):
    def missing(module, extra):
        raise MissingExtra(f"pip install 'vitrail[{extra}]'")

    monkeypatch.setattr(plane_compiled, "require", missing)
    plane_compiled._kernels.cache_clear()
    given = {name: value.detach() for name, value in inputs(1, 2, 3, 2, 1).items()}
    with pytest.raises(MissingExtra, match=r"vitrail\[fast\]"):
        plane_scan(**given, form="compiled")
    plane_compiled._kernels.cache_clear()
