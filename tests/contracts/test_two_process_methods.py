"""Two real processes, each with its share of a batch, compute the loss and the gradients of one.

An edited model may hold statistics of its process's images, so of edits both must only come to the same gradients.
"""

import os
import subprocess
import sys
from pathlib import Path

import broken
import pytest
import torch
from contract import exempt
from edit_contract import every_parameter_gets_a_gradient
from method_contract import its_loss_is_a_mean_over_images
from probes import TOLERANCE, gap, gradients, step, the_same_gradients
from subjects import edits, methods

from once import made_once

CASES = [
    pytest.param(subject, id=subject.name, marks=exempt(card, subject.name, its_loss_is_a_mean_over_images))
    for card, subject in methods()
]

EDITS = [
    pytest.param(subject, id=subject.name, marks=exempt(card, subject.name, every_parameter_gets_a_gradient))
    for card, subject in edits()
]


def launch(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = Path(__file__).with_name("gloo_worker.py")
    done = subprocess.run(
        [*command, str(worker), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_once("two_process_methods", launch, tmp_path_factory)


def agree(folder, subject):
    parts = [torch.load(folder / f"{subject.name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not any("error" in part for part in parts), parts
    method = subject.build()
    whole = step(method, subject.batch())["loss"]
    assert gap(parts[0]["loss"] + parts[1]["loss"], whole) < TOLERANCE, "the loss of two processes is another"
    for part in parts:
        the_same_gradients(part["gradients"], gradients(method), "in two processes")


@pytest.mark.slow
@pytest.mark.parametrize("subject", CASES)
def test_two_processes_compute_the_gradients_of_one(folder, subject):
    agree(folder, subject)


@pytest.mark.slow
@pytest.mark.parametrize("subject", EDITS)
def test_an_edited_model_trains_in_two_processes(folder, subject):
    first, second = (torch.load(folder / f"{subject.name}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert "error" not in first and "error" not in second, (first, second)
    for name, value in first["gradients"].items():
        assert value.isfinite().all() and value.any(), f"no gradient reaches {name}"
        assert torch.equal(value, second["gradients"][name]), f"two processes have different gradients of {name}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [broken.Summed, broken.WrongGradient])
def test_a_wrong_distributed_gradient_is_seen(folder, kind):
    with pytest.raises(AssertionError, match="two processes"):
        agree(folder, broken.method(kind))
