"""The main job, end to end, on small data."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vitrail
from vitrail.app.evaluate import evaluate_run
from vitrail.app.export import export_run
from vitrail.errors import DataError, InputError, RunError

QUICK = (
    "train.epochs=30",
    "train.batch_size=16",
    "train.precision=fp32",
    "model.name=small_resnet_nano",
    "model.img_size=32",
    "model.pretrained=none",
    "deploy.compile=false",
    "deploy.openvino=false",
    "evaluate.corruption_images=8",
    "data.val_fraction=0.25",
)


@pytest.fixture(scope="module")
def spoiled(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes, with a duplicate, files that do not decode and a hidden folder."""
    root = tmp_path_factory.mktemp("spoiled")
    for file in sorted(shapes.rglob("*.png")):
        target = root / file.relative_to(shapes)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    (root / "circle" / "copy.png").write_bytes((root / "circle" / "00.png").read_bytes())
    (root / "cross" / "empty.png").write_bytes(b"")
    (root / "cross" / "torn.png").write_bytes((root / "cross" / "00.png").read_bytes()[:90])
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".ipynb_checkpoints" / "x.png").write_bytes((root / "circle" / "00.png").read_bytes())
    return root


@pytest.fixture(scope="module")
def done(spoiled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "shapes"
    return out, vitrail.fit(spoiled, out=out, overrides=QUICK)


def test_it_learns_and_says_how_sure_it_is(done):
    _, summary = done
    assert summary["top1"] >= 0.6  # a third by chance
    low, high = summary["top1_interval"]
    assert low < summary["top1"] <= high


def test_it_leaves_every_promised_file(done):
    out, _ = done
    for name in [
        "recipe.toml",
        "data.json",
        "split.csv",
        "metrics.jsonl",
        "summary.json",
        "model.safetensors",
        "model.onnx",
        "artefact.json",
        "report.html",
        "environment.json",
        "MODEL_CARD.md",
    ]:
        assert (out / name).stat().st_size > 0, name
    assert list((out / "checkpoints").glob("*.pt"))


def test_the_summary_has_every_promised_entry(done):
    out, summary = done
    assert json.loads((out / "summary.json").read_text()) == summary
    for key in [
        "top1",
        "top5",
        "macro_f1",
        "ece",
        "ece_calibrated",
        "n_train",
        "n_val",
        "n_classes",
        "classes",
        "unreadable",
        "duplicates",
        "seconds",
        "seconds_per_stage",
        "pretrained",
        "params",
        "flops",
        "onnx",
        "int8",
        "corruption",
    ]:
        assert key in summary, key
    assert {"max_abs_diff", "latency_ms"} <= set(summary["onnx"])
    assert {"accepted", "reason", "top1", "latency_ms"} <= set(summary["int8"])
    assert {"mean", "per_kind"} <= set(summary["corruption"])
    assert summary["classes"] == ["circle", "cross", "square"]
    assert summary["n_train"] + summary["n_val"] == 73
    assert summary["onnx"]["max_abs_diff"] < 1e-3
    assert (out / "model.int8.onnx").exists() == summary["int8"]["accepted"]
    assert summary["int8"]["accepted"] or summary["int8"]["reason"]


def test_bad_files_are_listed_and_left_out(done):
    _, summary = done
    assert sorted(Path(entry["path"]).name for entry in summary["unreadable"]) == ["empty.png", "torn.png"]
    assert all(entry["reason"] for entry in summary["unreadable"])
    assert summary["duplicates"]["exact"] == {"groups": 1, "images": 2}


def test_twins_are_on_one_side_of_the_split(done):
    out, _ = done
    with (out / "split.csv").open(newline="") as file:
        split = {row["key"]: row["split"] for row in csv.DictReader(file)}
    assert split["circle/00.png"] == split["circle/copy.png"]
    assert not any("checkpoints" in key for key in split)


def test_predictions_agree_with_the_torch_module(done, spoiled):
    out, summary = done
    model = vitrail.load(out)
    predictor = vitrail.Predictor(out, prefer="onnx")
    paths = sorted((spoiled / "square").glob("0*.png"))
    for path, prediction in zip(paths, predictor.predict(paths, top=3)):
        pixels = model.preprocess(Image.open(path).convert("RGB"))
        logits = model(torch.from_numpy(model.preprocess.normalise(pixels))[None])
        expected = (logits / model.temperature).softmax(-1)[0]
        got = dict(zip(prediction.classes, prediction.probabilities))
        assert np.allclose([got[name] for name in model.classes], expected, atol=0.03)
    assert summary["classes"] == list(predictor.classes)


def test_the_onnx_file_takes_raw_images_of_any_size(done):
    out, _ = done
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    for shape in ((1, 32, 32, 3), (2, 7, 91, 3), (3, 200, 120, 3)):
        (probabilities,) = session.run(["probabilities"], {"image": np.zeros(shape, np.uint8)})
        assert probabilities.shape == (shape[0], 3)
        assert np.allclose(probabilities.sum(1), 1, atol=1e-5)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]


def test_the_report_needs_nothing_else(done):
    out, summary = done
    page = (out / "report.html").read_text()
    links = _Links()
    links.feed(page)
    assert all(link.startswith(("data:", "#")) for link in links.found)
    for text in ("circle", "torn.png", f"{100 * summary['top1']:.1f}"):
        assert text in page


def test_a_finished_run_returns_its_summary(done, spoiled):
    out, summary = done
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert vitrail.fit(spoiled, out=out, overrides=QUICK) == summary
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_another_request_in_the_same_folder_is_refused(done, spoiled):
    out, _ = done
    with pytest.raises(RunError, match=r"train\.epochs.*--out"):
        vitrail.fit(spoiled, out=out, overrides=(*QUICK, "train.epochs=31"))


def test_the_saved_recipe_reproduces_the_run(done, tmp_path):
    out, _ = done
    vitrail.fit(recipe=out / "recipe.toml", out=tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluate_matches_labels_by_name(done, shapes, tmp_path):
    out, _ = done
    other = tmp_path / "other"
    for name in ("square", "cross", "hexagon"):
        (other / name).mkdir(parents=True)
        for file in sorted((shapes / ("circle" if name == "hexagon" else name)).glob("*.png"))[:6]:
            (other / name / file.name).write_bytes(file.read_bytes())
    (other / "cross" / "bad.png").write_bytes(b"no image")
    figures = evaluate_run(out, str(other))
    assert figures["n"] == 12
    assert figures["unknown_classes"] == {"hexagon": 6}
    assert len(figures["unreadable"]) == 1
    assert figures["top1"] >= 0.6
    for name in ("square", "cross"):
        (other / name).rename(other / f"{name}s")
    with pytest.raises(DataError, match="by name"):
        evaluate_run(out, str(other))


def test_export_writes_the_same_network_again(done, tmp_path):
    out, _ = done
    written = export_run(out, tmp_path / "again.onnx")
    assert written["max_abs_diff"] < 1e-3
    image = np.random.default_rng(0).integers(0, 256, (1, 50, 40, 3), np.uint8)
    answers = [
        onnxruntime.InferenceSession(str(path)).run(["logits"], {"image": image})[0]
        for path in (out / "model.onnx", tmp_path / "again.onnx")
    ]
    assert np.allclose(*answers, atol=1e-4)


def test_the_predict_command_goes_on_past_a_bad_file(done, spoiled, tmp_path):
    out, _ = done
    arguments = ["predict", str(out), str(spoiled / "cross"), "--json", "--explain", str(tmp_path / "cam")]
    finished = subprocess.run(
        [sys.executable, "-m", "vitrail", *arguments], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    assert finished.returncode == 1, finished.stderr
    assert len(lines) == 26
    assert sum("error" in line for line in lines) == 2
    assert len(list((tmp_path / "cam").glob("*.png"))) == 24


FAST = ("train.epochs=6", "deploy.int8=false", "evaluate.corruptions=false", "train.checkpoint_seconds=0")


def fit_command(data: Path, out: Path, *extra: str) -> list[str]:
    options = [part for text in (*QUICK, *FAST, *extra) for part in ("--set", text)]
    return [sys.executable, "-m", "vitrail", "fit", str(data), "--out", str(out), *options]


def test_a_killed_run_goes_on_to_the_same_weights(spoiled, tmp_path):
    """SIGKILL as soon as there is a checkpoint, with loader workers and dropout, then the same command again."""
    extra = ("train.workers=1", "model.drop_rate=0.2", "train.ema=0.9", "augment.mixup=0.2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(
        fit_command(spoiled, tmp_path / "whole", *extra), capture_output=True, text=True, check=False, env=environment
    )
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        fit_command(spoiled, tmp_path / "killed", *extra),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not list((tmp_path / "killed" / "checkpoints").glob("*.pt")) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    again = subprocess.run(
        fit_command(spoiled, tmp_path / "killed", *extra), capture_output=True, text=True, check=False, env=environment
    )
    assert again.returncode == 0, again.stderr
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_labels_per_image(shapes, tmp_path):
    lines = ["path,label"]
    for file in sorted(shapes.rglob("*.png")):
        name = file.parent.name
        lines.append(f"{file},{name}|{'round' if name == 'circle' else 'edgy'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    summary = vitrail.fit(
        tmp_path / "labels.csv",
        out=tmp_path / "run",
        overrides=(*QUICK, *FAST, "data.label_separator='|'"),
    )
    assert summary["multilabel"]
    assert summary["map"] > 0.4
    assert summary["n_classes"] == 5
    assert vitrail.Predictor(tmp_path / "run").multilabel


def test_a_given_test_split_is_what_is_reported(shapes, tmp_path):
    for file in sorted(shapes.rglob("*.png")):
        part = "test" if int(file.stem) >= 18 else "train"
        target = tmp_path / "data" / part / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    summary = vitrail.fit(tmp_path / "data", out=tmp_path / "run", overrides=(*QUICK, *FAST))
    assert summary["evaluated_on"] == "test"
    assert summary["n_test"] == summary["n_eval"] == 18
    assert summary["n_train"] + summary["n_val"] == 54


@pytest.mark.parametrize("kind", ["one class", "one image", "empty", "file"])
def test_data_that_cannot_serve_is_refused_and_leaves_nothing(shapes, tmp_path, kind):
    data = tmp_path / "data"
    (data / "circle").mkdir(parents=True)
    images = sorted((shapes / "circle").glob("*.png"))[: {"one class": 5, "one image": 1}.get(kind, 0)]
    for image in images:
        (data / "circle" / image.name).write_bytes(image.read_bytes())
    if kind == "file":
        data = tmp_path / "notes.txt"
        data.write_text("hello")
    with pytest.raises((DataError, InputError)) as caught:
        vitrail.fit(data, out=tmp_path / "run", overrides=QUICK)
    assert str(data) in str(caught.value) or data.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unwritable_folder_is_refused(shapes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--out"):
        vitrail.fit(shapes, out=tmp_path / "file" / "run", overrides=QUICK)
