import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import check_parity, export_onnx, quiet
from vitrail.deploy.int8 import quantise
from vitrail.deploy.interface import IMAGE
from vitrail.deploy.runtime import open_session
from vitrail.layers.scan import dual_scan, exported, scan_form, scans_as_operators, selective_scan

CHANNELS, GROUPS, STATES = 6, 2, 4


class Scans(nn.Module):
    """A real scan and a complex one."""

    def __init__(self):
        super().__init__()
        self.real, self.imaginary, self.D = (
            nn.Parameter(torch.randn(size)) for size in ((CHANNELS, STATES), (CHANNELS, STATES), (CHANNELS,))
        )

    def forward(self, u, delta, B, C, z, h):
        rates = -self.real.exp()
        named = {"delta_bias": self.D, "softplus": True}
        y, last = selective_scan(u, delta, rates, B, C, self.D, z=z, state=h, **named)
        turning = torch.complex(rates, self.imaginary)
        x, end = selective_scan(u, delta, turning, torch.complex(C, B), C, state=torch.complex(last, h), **named)
        return y, last, x, end.real, end.imag


def inputs(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    plane, group = (batch, CHANNELS, length), (batch, GROUPS, STATES, length)
    shapes = (plane, plane, group, group, plane, (batch, CHANNELS, STATES))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def write(model, given, dynamic):
    with quiet(), scans_as_operators() as translations:
        program = torch.onnx.export(
            model, given, dynamo=True, verbose=False, dynamic_shapes=dynamic, custom_translation_table=translations
        )
    return program.model_proto


def answers(session, given):
    return session.run(None, {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), given)})


@pytest.fixture(scope="module")
def written():
    torch.manual_seed(0)
    model = Scans().eval().requires_grad_(False)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    *sequences, state = inputs(2, 5)
    dynamic = (*({0: batch, value.ndim - 1: length} for value in sequences), {0: batch})
    return model, write(model, (*sequences, state), dynamic)


def test_every_scan_is_one_operator(written):
    _, proto = written
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Scan") == 2
    assert not {"Loop", "If"} & set(kinds)
    assert not proto.functions


@pytest.mark.parametrize(("batch", "length"), [(2, 5), (1, 1), (3, 33)])
def test_the_file_answers_as_torch_for_any_batch_and_length(written, batch, length):
    model, proto = written
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    given = inputs(batch, length, seed=1)
    for got, wanted in zip(answers(session, given), model(*given), strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("complex_state", [False, True])
@pytest.mark.parametrize("length", [1, 7])
def test_the_operator_in_torch_is_the_reference(length, complex_state):
    u, delta, B, C, z, state = (value.double() for value in inputs(2, length))
    A = -state[0].exp()
    if complex_state:
        A, B, state = torch.complex(A, A.cos()), torch.complex(B, C), torch.complex(state, state.sin())
    for got, wanted in zip(
        *(selective_scan(u, delta.abs(), A, B, C, z=z, state=state, form=form) for form in ("onnx", "reference")),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_torch_knows_the_shapes_of_the_operators():
    steps, cell = torch.rand(5, 2, 3, 1, 4), torch.rand(2, 3, 6, 4)
    enter, leave, A = torch.rand(5, 2, 3, 6, 1), torch.rand(5, 2, 3, 1, 6), -torch.rand(3, 6, 4)
    checks = ("test_schema", "test_faketensor")
    args = (steps, steps, A, enter, leave, cell)
    torch.library.opcheck(exported._steps, args, test_utils=checks)
    args = (steps, steps, A, A, enter, enter, leave, leave, cell, cell)
    torch.library.opcheck(exported._complex_steps, args, test_utils=checks)


def test_only_an_export_that_can_write_the_operator_takes_it(monkeypatch):
    u, A = torch.zeros(1, 2, 3), torch.zeros(2, 4)
    with scans_as_operators():
        assert scan_form(u, A) != "onnx"
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    assert scan_form(u, A) == "portable"
    with scans_as_operators() as translations:
        assert scan_form(u, A) == scan_form(u, A.cfloat()) == "onnx"
        assert len(translations) == 3
    assert scan_form(u, A) == "portable"


def test_the_scan_of_mamba_2_is_exported_for_any_batch():
    class Dual(nn.Module):
        def forward(self, x, delta, B, C):
            return dual_scan(x, delta.exp(), -torch.ones(4), B, C, torch.ones(4), chunk=4)

    def draw(batch):
        generator = torch.Generator().manual_seed(batch)
        return tuple(torch.randn(batch, 11, *rest, generator=generator) for rest in ((4, 3), (4,), (2, 5), (2, 5)))

    batch = torch.export.Dim("batch")
    session = onnxruntime.InferenceSession(write(Dual(), draw(2), ({0: batch},) * 4).SerializeToString())
    for size in (1, 2, 5):
        for got, wanted in zip(answers(session, draw(size)), Dual()(*draw(size)), strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)


class Tiny(nn.Module):
    """Patches, read in both directions by a scan each, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.project, self.rates = nn.Linear(8, 8 + 2 * STATES), nn.Parameter(torch.randn(8, STATES))

    def forward(self, image):
        x = self.stem(image).flatten(2)
        found = 0
        for places in (x, x.flip(-1)):
            delta, B, C = self.project(places.transpose(1, 2)).transpose(1, 2).split((8, STATES, STATES), dim=1)
            found = found + selective_scan(places, delta, -self.rates.exp(), B, C, softplus=True)[0]
        return self.head(found.mean(-1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    model, preprocess = Tiny().eval(), Preprocess((16, 16))
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    report = export_onnx(model, preprocess, path, classes=["a", "b", "c"])
    return model, preprocess, path, report


def test_a_model_is_exported_with_an_operator_for_each_scan(tiny):
    model, preprocess, path, report = tiny
    assert report.operators["Scan"] == 2
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)) for i in range(3)]
    parity = check_parity(model, preprocess, path, images)
    assert parity.max_abs_diff < 1e-5
    assert parity.agreement == 1


def test_a_scan_is_left_in_floats_by_int8(tiny, tmp_path):
    path = tiny[2]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    quantise(path, tmp_path / "int8.onnx", iter([pixels]))
    whole, small = (open_session(file).run(None, {IMAGE: pixels}) for file in (path, tmp_path / "int8.onnx"))
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert kinds.count("Scan") == 2
    assert "QuantizeLinear" in kinds
    assert np.abs(whole[0] - small[0]).max() < 0.1 * np.abs(whole[0]).max()
