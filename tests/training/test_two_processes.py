"""Two real processes compute what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_process_worker import CASES, norm_cases, train_all

from once import made_once

pytestmark = pytest.mark.slow


def train(folder):
    """Fill ``one`` with what one process computes, and ``two`` with what two do."""
    one, two = folder / "one", folder / "two"
    one.mkdir(exist_ok=True)
    two.mkdir(exist_ok=True)
    # `accelerate launch --cpu` starts one process only unless there is an MPI, so torch's own launcher is used.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = Path(__file__).with_name("two_process_worker.py")
    launched = subprocess.Popen(
        [*command, str(worker), str(two)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        train_all(one)
        output, _ = launched.communicate(timeout=200)
    finally:
        launched.kill()
    assert launched.returncode == 0, output[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one process and of two."""
    folder = made_once("two_processes", train, tmp_path_factory)
    return folder / "one", folder / "two"


def read(path, name):
    return torch.load(path / name, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_gradients_weights_and_figures(runs, case):
    one = read(runs[0], f"{case}.0.pt")
    for rank in (0, 1):
        two = read(runs[1], f"{case}.{rank}.pt")
        assert len(two["gradients"]) == len(one["gradients"])
        for a, b in zip(one["gradients"][0], two["gradients"][0]):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-7)
        # Differences of rounding grow from step to step.
        for step_a, step_b in zip(one["gradients"], two["gradients"]):
            for a, b in zip(step_a, step_b):
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
        for name, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert two["figures"]["top1"] == one["figures"]["top1"]
        assert two["figures"]["loss"] == pytest.approx(one["figures"]["loss"], rel=1e-4)
        for a, b in zip(one["history"], two["history"], strict=True):
            assert (a["kind"], a["step"], a.get("top1"), a.get("images")) == (
                b["kind"],
                b["step"],
                b.get("top1"),
                b.get("images"),
            )
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
            assert a.get("images", 33) == 33


def test_an_interrupted_run_of_two_processes(runs):
    whole = read(runs[1], "batchnorm.0.pt")["weights"]
    for rank in (0, 1):
        for name, value in read(runs[1], f"interrupted.{rank}.pt").items():
            assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("number", range(len(norm_cases())))
def test_batch_normalisation_over_two_processes(runs, number):
    layer, shape, _ = norm_cases()[number]
    torch.manual_seed(number)
    x = (3 * torch.randn(shape) + 1).requires_grad_()
    upstream = torch.randn(shape)
    for _ in range(2):
        y = layer(x)
    (y * upstream).sum().backward()
    parts = [read(runs[1], f"norm{number}.{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([part["dx"] for part in parts]), x.grad, rtol=1e-4, atol=1e-5)
    for part in parts:
        for gradient, parameter in zip(part["parameters"], layer.parameters()):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)
        for name, value in layer.named_buffers():
            torch.testing.assert_close(part["buffers"][name], value, rtol=1e-4, atol=1e-5)
