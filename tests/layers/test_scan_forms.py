"""The forms of the selective scan beside those for CPUs: a step, compiled graphs, Triton, mamba_ssm."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vitrail.errors import InputError, MissingExtra
from vitrail.layers.scan import SCAN_FORMS, dual_scan, scan_form, selective_scan, selective_step, triton


def inputs(batch, channels, length, states, groups, *, complex_state=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    values = {
        "u": draw(batch, channels, length),
        "delta": draw(batch, channels, length),
        "A": -draw(channels, states).exp(),
        "B": draw(batch, groups, states, length),
        "C": draw(batch, groups, states, length),
        "D": draw(channels),
        "z": draw(batch, channels, length),
        "delta_bias": draw(channels),
        "state": draw(batch, channels, states),
    }
    if complex_state:
        values |= {name: torch.complex(values[name], draw(*values[name].shape)) for name in ("A", "B", "C", "state")}
    return {name: value.requires_grad_() for name, value in values.items()}


def values_and_gradients(function, given, **options):
    for value in given.values():
        value.grad = None
    y, last = function(**given, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.abs().square() * torch.rand(x.shape, generator=generator)).sum() for x in (y, last))
    loss.backward()
    return [y.detach(), last.detach(), *(value.grad for value in given.values())]


def agree(found, expected, share):
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= share * max(float(theirs.abs().max()), 1e-3)


# ---- a step


@pytest.mark.parametrize("complex_state", [False, True])
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_a_stream_of_steps_is_the_scan(groups, complex_state):
    given = inputs(2, 6, 5, 4, groups or 1, complex_state=complex_state, dtype=torch.float64)
    given = {name: value.detach() for name, value in given.items()}
    if groups is None:
        given |= {name: given[name][:, 0] for name in ("B", "C")}
    y, last = selective_scan(**given, softplus=True, form="reference")
    state, steps = given["state"], []
    for step in range(5):
        now = {k: v[..., step] if k in ("u", "delta", "B", "C", "z") else v for k, v in given.items()}
        out, state = selective_step(**{**now, "state": state}, softplus=True)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, -1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_a_step_begins_at_zero_and_needs_little():
    generator = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.randn(2, 4, generator=generator) for _ in range(4))
    y, state = selective_step(u, delta, -torch.ones(4, 4), B, C)
    torch.testing.assert_close(state, (delta * u).unsqueeze(-1) * B.unsqueeze(1))
    torch.testing.assert_close(y, (state * C.unsqueeze(1)).sum(-1))
    assert selective_step(u.bfloat16(), delta, -torch.ones(4, 4), B, C)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("u", "delta", "words"),
    [((2, 4, 1), (2, 4, 1), r"\(B, D\), one step"), ((2, 4), (2, 3), r"\(B, D\)"), ((2, 3), (2, 3), "D = 3")],
)
def test_a_step_of_wrong_shapes_is_explained(u, delta, words):
    with pytest.raises(InputError, match=words):
        selective_step(torch.zeros(u), torch.zeros(delta), torch.zeros(4, 5), torch.zeros(2, 5), torch.zeros(2, 5))


# ---- torch.compile and torch.export


@pytest.mark.parametrize("complex_state", [False, True])
def test_a_compiled_graph_holds_the_selective_scan(complex_state):
    torch._dynamo.reset()
    given = inputs(1, 4, 9, 3, 2, complex_state=complex_state)

    def scan(**given):
        return selective_scan(**given, softplus=True)

    graph = torch.compile(scan, backend="aot_eager", fullgraph=True)
    agree(values_and_gradients(graph, given), values_and_gradients(scan, given), 1e-6)


def test_a_compiled_graph_holds_the_scan_of_mamba_2():
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 7, 2, 3), "delta": (1, 7, 2), "A": (2,), "B": (1, 7, 1, 4), "C": (1, 7, 1, 4), "D": (2,)}
    given = {name: torch.rand(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}

    def scan(**given):
        return dual_scan(**given, chunk=4)

    graph = torch.compile(scan, backend="aot_eager", fullgraph=True)
    agree(values_and_gradients(graph, given), values_and_gradients(scan, given), 1e-6)


def test_an_exported_program_takes_any_batch():
    class Both(torch.nn.Module):
        def forward(self, u, delta, B, C):
            y, _ = selective_scan(u, delta, -torch.ones(4, 3), B, C, softplus=True)
            heads = y.transpose(1, 2).unflatten(2, (2, 2))
            x, _ = dual_scan(
                heads, heads.sum(-1).exp(), -torch.ones(2), *(v.transpose(1, 2)[:, :, None] for v in (B, C))
            )
            return x

    def draw(batch):
        given = inputs(batch, 4, 6, 3, 1)
        return tuple(given[name].detach() for name in ("u", "delta")) + tuple(given[name][:, 0] for name in ("B", "C"))

    batch = torch.export.Dim("batch")
    program = torch.export.export(Both(), draw(2), dynamic_shapes=({0: batch},) * 4)
    torch.testing.assert_close(program.module()(*draw(5)), Both()(*draw(5)), rtol=1e-4, atol=1e-5)


# ---- which form runs


@pytest.mark.parametrize(
    ("installed", "kind", "dtype", "state", "expected"),
    [
        ({"numba", "triton", "mamba_ssm"}, "cuda", torch.float32, None, "mamba_ssm"),
        ({"numba", "triton", "mamba_ssm"}, "cuda", torch.float32, "given", "triton"),
        ({"numba", "triton"}, "cuda", torch.float32, None, "triton"),
        ({"numba"}, "cuda", torch.float32, None, "portable"),
        ({"numba", "triton", "mamba_ssm"}, "cuda", torch.complex64, None, "portable"),
        ({"numba", "triton", "mamba_ssm"}, "cuda", torch.float64, None, "portable"),
        ({"numba", "triton", "mamba_ssm"}, "cpu", torch.float32, None, "compiled"),
        ({"triton", "mamba_ssm"}, "cpu", torch.float32, None, "portable"),
        ({"triton", "mamba_ssm"}, "meta", torch.float32, None, "portable"),
    ],
)
def test_the_form_follows_the_device_and_what_is_installed(monkeypatch, installed, kind, dtype, state, expected):
    monkeypatch.setattr("vitrail.layers.scan.selective._installed", lambda package: package in installed)
    u = types.SimpleNamespace(device=torch.device(kind))  # no GPU is needed to ask
    assert scan_form(u, torch.zeros(2, 3, dtype=dtype), state) == expected


def test_mamba_ssm_is_not_asked_for_more_states_than_it_has(monkeypatch):
    monkeypatch.setattr("vitrail.layers.scan.selective._installed", lambda package: True)
    u = types.SimpleNamespace(device=torch.device("cuda"))
    assert scan_form(u, torch.zeros(2, 256)) == "mamba_ssm"
    assert scan_form(u, torch.zeros(2, 257)) == "triton"


# ---- mamba_ssm


def stand_in(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """What mamba_ssm documents: u, delta (B, D, L), A (D, N), B, C (B, G, N, L); y, and the last state (B, D, N)."""
    assert A.is_contiguous()
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    outputs, last = [], []
    for image in range(u.shape[0]):
        for channel in range(u.shape[1]):
            group, h = channel // (u.shape[1] // B.shape[1]), torch.zeros(A.shape[1])
            for now, x, enter, leave in zip(
                delta[image, channel], u[image, channel], B[image, group].T, C[image, group].T
            ):
                h = torch.exp(now * A[channel]) * h + now * enter * x
                outputs.append((h * leave).sum())
            last.append(h)
    y, last = torch.stack(outputs).view(u.shape), torch.stack(last).view(*u.shape[:2], -1)
    y = y if D is None else y + u * D[:, None]
    y = y if z is None else y * F.silu(z)
    return (y, last) if return_last_state else y


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = stand_in
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_ssm_is_given_what_it_documents(package, groups):
    def without_state(**given):
        return selective_scan(**given, softplus=True)[0], given["u"]  # the last one has no gradient there

    given = inputs(2, 4, 5, 3, groups)
    del given["state"]
    found, expected = (values_and_gradients(without_state, given, form=form) for form in ("mamba_ssm", "reference"))
    agree(found, expected, 1e-5)
    ends = (selective_scan(**given, softplus=True, form=form)[1] for form in ("mamba_ssm", "reference"))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def test_mamba_ssm_refuses_what_it_cannot(package):
    given = inputs(1, 2, 3, 4, 1)
    with pytest.raises(InputError, match="begins at a state of zero"):
        selective_scan(**given, form="mamba_ssm")
    del given["state"]
    _, last = selective_scan(**given, form="mamba_ssm")
    with pytest.raises(InputError, match="no gradient of the last state"):
        last.sum().backward()
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(InputError, match=f"not {dtype}"):
            selective_scan(**{**given, "A": given["A"].to(dtype)}, form="mamba_ssm")


def test_without_mamba_ssm_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    given = inputs(1, 2, 3, 4, 1)
    del given["state"]
    with pytest.raises(MissingExtra, match="pip install mamba_ssm"):
        selective_scan(**given, form="mamba_ssm")


# ---- Triton, in its interpreter


INTERPRETED = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_scan_forms import inputs, values_and_gradients
from vitrail.layers.scan import selective_scan, triton

worst = []
for steps, tile, *shape in json.loads(sys.argv[2]):
    triton.STEPS, triton.TILE = steps, tile
    found, expected = (
        values_and_gradients(selective_scan, inputs(*shape), softplus=True, form=form)
        for form in ("triton", "reference")
    )
    worst.append([float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(found, expected)])
given = {name: value.detach() for name, value in inputs(1, 2, 5, 1, 1).items()}
args = [given[name] for name in ("u", "delta", "A", "B", "C", "state")]
checks = ("test_schema", "test_faketensor")
torch.library.opcheck(torch.ops.vitrail.selective_scan_triton.default, args, test_utils=checks)
print(json.dumps(worst))
"""
"""Prints the largest differences of values and gradients as shares of the largest value, a row for each shape."""

TILES_AND_SHAPES = [
    # steps, tile; batch, channels, length, states, groups
    (4, 16, 1, 1, 1, 1, 1),
    (4, 16, 1, 4, 9, 3, 2),  # three chunks, the last with one step; two groups; states that fill no power of two
    (2, 8, 2, 3, 3, 2, 1),  # two blocks of channels, the last not full
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton: it comes with CUDA")
def test_triton_agrees_with_the_reference_in_its_interpreter():
    # Triton reads the variable when it is imported, which another test may have done here.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(Path(__file__).parent), json.dumps(TILES_AND_SHAPES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for shape, shares in zip(TILES_AND_SHAPES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert max(shares) < 1e-5, (shape, shares)


def test_triton_refuses_what_it_cannot(monkeypatch):
    given = inputs(1, 2, 3, 4, 1)
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(InputError, match=f"not {dtype}"):
            selective_scan(**{**given, "A": given["A"].to(dtype), "state": None}, form="triton")
    triton._kernels.cache_clear()
    monkeypatch.delitem(sys.modules, "vitrail.layers.scan.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtra, match="it comes with torch for CUDA"):
        selective_scan(**given, form="triton")
    triton._kernels.cache_clear()


@pytest.mark.parametrize("form", ["triton", "portable"])
def test_outputs_without_values_have_shapes(form):
    """Gradients as well: what torch.compile asks, without a GPU, and what counts a net's multiply-adds."""
    given = {name: value.detach().to("meta").requires_grad_() for name, value in inputs(2, 4, 40, 3, 2).items()}
    y, last = selective_scan(**given, form=form)
    assert (y.shape, last.shape) == ((2, 4, 40), (2, 4, 3))
    (y.sum() + last.sum()).backward()
    assert all(value.grad.shape == value.shape for value in given.values())


# ---- the stated tolerance


@pytest.mark.parametrize("form", ["compiled", "portable", "onnx"])
def test_forms_agree_within_the_stated_tolerance(form):
    if form == "compiled":
        pytest.importorskip("numba")
    assert set(SCAN_FORMS) == {"compiled", "portable", "reference", "onnx", "triton", "mamba_ssm"}
    given = inputs(2, 6, 200, 16, 2)
    if form == "onnx":
        given = {name: value.detach() for name, value in given.items()}
        found, expected = (selective_scan(**given, softplus=True, form=name) for name in (form, "reference"))
    else:
        found, expected = (
            values_and_gradients(selective_scan, given, softplus=True, form=name) for name in (form, "reference")
        )
    agree(found, expected, 5e-5)


def test_real_b_and_c_go_with_complex_rates():
    given = inputs(2, 4, 17, 3, 1, complex_state=True, dtype=torch.float64)
    given |= {name: given[name].real.clone() for name in ("B", "C")}
    found = {}
    for form in ("reference", "portable"):
        leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
        y, last = selective_scan(**leaves, form=form)
        found[form] = [y, last, *torch.autograd.grad(y.sum() + last.abs().sum(), list(leaves.values()))]
    for ours, theirs in zip(found["portable"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs)
