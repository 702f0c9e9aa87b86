from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vitrail.deploy import runtime, tournament
from vitrail.deploy.tournament import RUNTIMES, TournamentResult
from vitrail.errors import InputError
from vitrail.training.recipe import DeployConfig

LATENCIES = {
    "eager": 9.0,
    "eager-channels-last": 8.0,
    "compiled-bf16": 1.0,
    "onnxruntime": 4.0,
    "onnxruntime-int8": 2.0,
    "openvino": 3.0,
    "openvino-int8": 5.0,
}


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Latencies that a test sets, in place of measured ones."""
    latencies = dict(LATENCIES)

    def turns(self, pixels, until) -> Iterator:
        for name, contestant in self.running.items():
            contestant(pixels)
            yield self.entries[name], latencies[name] * len(pixels)

    monkeypatch.setattr(tournament._Contest, "turns", turns)
    return latencies


@pytest.fixture
def hold(exported, tmp_path: Path):
    """Runs a tournament on photographs that the network itself labelled."""
    images = exported.pixels(40)
    targets = exported.answers(images)
    lines: list[str] = []

    def run(*, deadline=None, calibration=images, targets=targets, **config) -> TournamentResult:
        return tournament.tournament(
            exported.model,
            exported.preprocess,
            tmp_path,
            onnx_path=exported.path,
            calibration=lambda: iter([calibration[:16], calibration[16:32]]),
            validation=lambda: ((images[k : k + 7], targets[k : k + 7]) for k in range(0, 40, 7)),
            config=DeployConfig(**{"compile": False, "openvino": False, "max_drop": 0.2, **config}),
            deadline=deadline,
            progress=lines.append,
        )

    return SimpleNamespace(run=run, folder=tmp_path, targets=targets, lines=lines)


def test_the_quickest_accurate_runtime_ships(hold, stopwatch) -> None:
    result = hold.run(target_ms=2.5)
    assert result.winner == "onnxruntime-int8"
    assert result.images == 40
    assert result.meets_target
    assert (hold.folder / "model.int8.onnx").is_file()
    reference, plain, small = result["eager"], result["onnxruntime"], result["onnxruntime-int8"]
    assert (reference.top1, reference.agreement, reference.drop) == (1, 1, 0)
    assert (plain.status, plain.agreement, plain.drop_interval) == ("ok", 1, (0, 0))
    assert small.drop == pytest.approx(1 - small.top1)
    low, high = small.drop_interval
    assert low <= small.drop <= high
    assert small.bytes < plain.bytes
    assert plain.throughput == pytest.approx(1000 / 4)
    assert any("ships: onnxruntime-int8, 2.00 ms" in line for line in hold.lines)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["int8"]["accepted"] is True
    assert values["int8"]["latency_ms"] == 2.0
    assert values["onnx"]["latency_ms"] == 4.0
    assert [entry["name"] for entry in values["runtimes"]] == list(LATENCIES)


def test_int8_that_is_not_faster_is_refused_and_removed(hold, stopwatch) -> None:
    stopwatch["onnxruntime-int8"] = 4.5
    result = hold.run(target_ms=1.0)
    assert result.winner == "onnxruntime"
    assert result["onnxruntime-int8"].status == "refused"
    assert "4.50 ms per image against 4.00 ms" in result["onnxruntime-int8"].reason
    assert not (hold.folder / "model.int8.onnx").exists()
    assert result.to_dict()["int8"]["accepted"] is False
    assert result.meets_target is False
    assert "target 1 ms: missed" in result.to_dict()["ships"]


def test_int8_that_loses_accuracy_is_tried_again_then_refused(hold, stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    quantise = tournament.quantise
    monkeypatch.setattr(
        tournament, "quantise", lambda *args, **kwargs: (tries.append(kwargs["keep_edges"]), quantise(*args, **kwargs))
    )
    # Ranges learnt on black images clip the activations of every other image.
    result = hold.run(calibration=np.zeros((32, 32, 32, 3), np.uint8), max_drop=0.01)
    small = result["onnxruntime-int8"]
    assert tries == [False, True]
    assert small.status == "refused"
    assert "on 40 images; deploy.max_drop allows 1.00%" in small.reason
    assert small.drop > 0.01
    assert not (hold.folder / "model.int8.onnx").exists()


def test_int8_can_be_left_out(hold, stopwatch) -> None:
    result = hold.run(int8=False)
    assert (result["onnxruntime-int8"].status, result["onnxruntime-int8"].reason) == ("skipped", "deploy.int8 is false")
    assert result.winner == "onnxruntime"
    assert result.to_dict()["int8"]["top1"] is None


def test_openvino_takes_part(hold, stopwatch) -> None:
    if not runtime._installed("openvino"):
        pytest.skip("needs the extra vitrail[openvino]")
    stopwatch.update({"openvino-int8": 1.5, "onnxruntime-int8": 6.0})
    result = hold.run(openvino="auto", max_drop=0.5)
    assert result["openvino"].agreement > 0.9
    assert result["openvino-int8"].agreement > 0.6
    assert result.winner == "openvino-int8"
    # ONNX Runtime's INT8 is slow here, but OpenVINO reads the same file.
    assert (hold.folder / "model.int8.onnx").is_file()
    assert result.to_dict()["int8"]["runtime"] == "openvino-int8"


def test_what_is_not_installed_says_so(hold, stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    monkeypatch.setattr(tournament.shutil, "which", lambda name: None)
    result = hold.run(openvino="auto", compile=True)
    for name, words in (("openvino", "vitrail[openvino]"), ("compiled-bf16", "no C++ compiler")):
        assert result[name].status == "unavailable"
        assert words in result[name].reason
        assert result[name].latency_ms is None


def test_a_contestant_that_fails_is_out_and_the_others_go_on(hold, stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the compiler\nfell over")

    monkeypatch.setattr(tournament, "_compiled", fail)
    result = hold.run(compile=True)
    assert result["compiled-bf16"].status == "unavailable"
    assert result["compiled-bf16"].reason == "it failed here: the compiler fell over"
    assert result.winner == "onnxruntime-int8"


def test_past_the_deadline_the_plain_file_ships(hold) -> None:
    result = hold.run(deadline=time.monotonic() - 1, openvino="auto", compile=True)
    assert result.winner == "onnxruntime"
    assert result["onnxruntime"].latency_ms > 0
    assert result.images == 7  # the first batch
    for name in ("onnxruntime-int8", "openvino", "compiled-bf16"):
        assert result[name].status == "skipped"
    assert "s are left" in result["compiled-bf16"].reason


def test_compiling_waits_to_be_asked_without_a_deadline(hold, stopwatch) -> None:
    assert "set deploy.compile = true" in hold.run(compile="auto")["compiled-bf16"].reason


def test_rounds_are_measured(hold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tournament, "TURNS", 3)
    result = hold.run(int8=False)
    for name in ("eager", "eager-channels-last", "onnxruntime"):
        entry = result[name]
        assert entry.latency_ms > 0
        assert entry.throughput == pytest.approx(16_000 / entry.latency_ms_16)


def test_multi_hot_targets(hold, stopwatch) -> None:
    targets = np.ones((40, 5), np.float32)
    targets[:10, :] = 0
    result = hold.run(targets=targets, int8=False)
    assert result["eager"].top1 == 0.75


def test_validation_needs_images(exported, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give at least one batch"):
        tournament.tournament(
            exported.model,
            exported.preprocess,
            tmp_path,
            onnx_path=exported.path,
            calibration=lambda: iter([]),
            validation=lambda: iter([]),
            config=DeployConfig(),
        )


def test_every_runtime_that_ships_is_a_contestant() -> None:
    assert set(RUNTIMES) <= set(tournament.ORDER) == set(LATENCIES)
