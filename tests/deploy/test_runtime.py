from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import skimage.data
import torch
from PIL import Image

from vitrail.deploy import graph, runtime
from vitrail.deploy.interface import Interface
from vitrail.deploy.runtime import Predictor
from vitrail.errors import InputError, RunError

CLASSES = ("ant", "bee", "cat", "dog", "élan")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with four images in an order of names, hidden files, and two that are no images."""
    root = tmp_path / "pictures"
    (root / "b" / ".hidden").mkdir(parents=True)
    photo = Image.fromarray(skimage.data.chelsea())
    photo.save(root / "b" / "2.png")
    photo.crop((0, 0, 100, 80)).save(root / "b" / "1.PNG")
    photo.save(root / "b" / ".hidden" / "no.png")
    photo.save(root / ".no.png")
    photo.rotate(20).save(root / "c.png")
    (root / "a.jpg").write_bytes(b"not a picture")
    (root / "notes.txt").write_text("text")
    return root


def expected(exported, image: Image.Image) -> np.ndarray:
    inputs = torch.from_numpy(exported.preprocess.normalise(exported.preprocess(image))[None])
    with torch.inference_mode():
        return exported.model(inputs).softmax(-1)[0].numpy()


def test_answers_are_those_of_the_model_in_order(exported, pictures: Path) -> None:
    predictions = list(Predictor(exported.path).predict([pictures], top=5))
    names = [str(Path(prediction.path).relative_to(pictures)) for prediction in predictions]
    assert names == ["a.jpg", "c.png", "b/1.PNG", "b/2.png"]
    assert "not an image" in predictions[0].error
    for prediction in predictions[1:]:
        answer = expected(exported, Image.open(prediction.path))
        assert prediction.classes == tuple(CLASSES[index] for index in np.argsort(-answer))
        np.testing.assert_allclose(prediction.probabilities, np.sort(answer)[::-1], atol=0.01)


def test_batches_and_single_images_agree(exported, pictures: Path) -> None:
    predictor = Predictor(exported.path)
    images = [pictures / "c.png", pictures / "b" / "1.PNG", pictures / "missing.png", pictures / "b" / "2.png"] * 5
    together = list(predictor.predict(images, top=5, batch_size=7))
    assert [prediction.path for prediction in together] == [str(path) for path in images]
    for path, prediction in zip(images, together):
        (alone,) = predictor.predict([path], top=5)
        assert alone.error == prediction.error
        assert alone.classes == prediction.classes
        np.testing.assert_allclose(alone.probabilities, prediction.probabilities, atol=1e-5)


def test_predictions_stream(exported, pictures: Path) -> None:
    asked = []

    def images():
        for number in range(100):
            asked.append(number)
            yield pictures / "c.png"

    stream = Predictor(exported.path).predict(images(), batch_size=4)
    next(stream)
    assert len(asked) == 4


def test_large_images_are_not_collected(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "WINDOW_PIXELS", 10_000)
    asked = []

    def images():
        for number in range(10):
            asked.append(number)
            yield np.zeros((100, 100, 3), np.uint8)

    next(Predictor(exported.path).predict(images(), batch_size=8))
    assert len(asked) == 1


def test_errors_are_entries_and_stop_nothing(exported, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    given = [pictures / "none.png", tmp_path / "empty", pictures / "notes.txt", np.zeros((3, 3)), pictures / "c.png"]
    errors = [prediction.error for prediction in Predictor(exported.path).predict(given)]
    assert "No such file" in errors[0]
    assert "holds no images" in errors[1]
    assert "not an image" in errors[2]
    assert "uint8" in errors[3]
    assert errors[4] is None


def test_a_failing_model_is_an_entry(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(exported.path)

    def fail(_: np.ndarray) -> np.ndarray:
        raise MemoryError("out of memory")

    monkeypatch.setattr(predictor, "_answer", fail)
    (prediction,) = predictor.predict([np.zeros((4, 4, 3), np.uint8)])
    assert "out of memory" in prediction.error
    assert prediction.to_dict() == {"path": "image 0", "error": prediction.error}


def test_files_arrays_and_pillow_images_of_any_mode(exported, tmp_path: Path) -> None:
    photo = Image.fromarray(skimage.data.chelsea()).crop((0, 0, 200, 150))
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    photo.save(tmp_path / "plain.png")
    cut = photo.convert("RGBA")
    cut.putalpha(0)
    cut.save(tmp_path / "clear.png")
    white = Image.new("RGB", photo.size, exported.preprocess.background)
    images = [tmp_path / "plain.png", str(tmp_path / "turned.png"), photo, np.asarray(photo)]
    predictor = Predictor(exported.path)
    same = [prediction.probabilities for prediction in predictor.predict(images)]
    assert same[1:] == same[:-1]
    clear = [
        prediction.probabilities
        for prediction in Predictor(exported.path).predict([tmp_path / "clear.png", cut, white])
    ]
    assert clear[1:] == clear[:-1]
    grey = list(
        Predictor(exported.path).predict([photo.convert("L"), np.asarray(photo.convert("L")), photo.convert("P")])
    )
    assert [prediction.error for prediction in grey] == [None] * 3
    assert grey[0].probabilities == grey[1].probabilities


def test_top_and_multilabel(exported, tmp_path: Path) -> None:
    whole = onnx.load(exported.path)
    interface = Interface(CLASSES, exported.preprocess, temperature=1e6, multilabel=True)
    path = tmp_path / "many.onnx"
    onnx.save(graph.wrap(graph.network_from(whole, "input"), interface), path)
    image = np.zeros((9, 9, 3), np.uint8)
    (two,) = Predictor(exported.path).predict([image], top=2)
    assert len(two.classes) == len(two.probabilities) == 2
    assert len(two.to_dict()["predictions"]) == 2
    predictor = Predictor(path)
    (all_equal,) = predictor.predict([image], top=1)  # at this temperature all are near 0.5
    above = sum(value > 0.5 for value in predictor._answer(image[None])[0])
    assert predictor.multilabel
    assert len(all_equal.classes) == max(1, above)


def run_folder(exported, path: Path, winner: str) -> Path:
    path.mkdir()
    shutil.copy(exported.path, path / "model.onnx")
    (path / "artefact.json").write_text(json.dumps({"runtime": winner}))
    return path


def test_the_winner_of_a_run_folder(exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(exported, tmp_path / "run", "onnxruntime-int8")
    with pytest.raises(RunError, match=r"cannot find .*model\.int8\.onnx"):
        Predictor(run)
    with pytest.raises(RunError, match="INT8 was refused"):
        Predictor(run, prefer="int8")
    shutil.copy(exported.path, run / "model.int8.onnx")
    assert Predictor(run).runtime == "onnxruntime-int8"
    assert Predictor(run, prefer="onnx").runtime == "onnxruntime"
    assert Predictor(run, prefer="int8").classes == CLASSES
    (run / "artefact.json").write_text(json.dumps({"runtime": "openvino"}))
    monkeypatch.setattr(runtime, "_installed", lambda module: False)
    assert Predictor(run).runtime == "onnxruntime"
    with pytest.raises(InputError, match="prefer"):
        Predictor(run, prefer="fastest")


def test_openvino_serves_when_it_won(exported, tmp_path: Path, pictures: Path) -> None:
    if not runtime._installed("openvino"):
        pytest.skip("needs the extra vitrail[openvino]")
    predictor = Predictor(run_folder(exported, tmp_path / "run", "openvino"))
    assert predictor.runtime == "openvino"
    photo = Image.open(pictures / "c.png")
    (prediction,) = predictor.predict([photo])
    tolerance = 0.05 if runtime.openvino_precision() == "bf16" else 1e-4
    np.testing.assert_allclose(prediction.probabilities, np.sort(expected(exported, photo))[::-1], atol=tolerance)


def test_what_is_no_model_is_refused(exported, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot find .*nowhere"):
        Predictor(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"cannot find .*model\.onnx"):
        Predictor(tmp_path / "empty")
    blob = exported.path.read_bytes()
    for name, content in (("torn", blob[: len(blob) // 2]), ("zero", b""), ("noise", b"\x00\xff" * 500)):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(RunError, match=name) as caught:
            Predictor(path)
        assert "\n" not in str(caught.value)
    foreign = onnx.load(exported.path)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(RunError, match=r"foreign.*does not say its classes"):
        Predictor(tmp_path / "foreign.onnx")
    for options in ({"top": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match="give 1 or more"):
            Predictor(exported.path).predict([], **options)


def test_prediction_imports_neither_torch_nor_the_rest(exported, tmp_path: Path) -> None:
    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "cat.png")
    code = (
        "import sys\n"
        "from vitrail.deploy.runtime import Predictor\n"
        f"answer, = Predictor({str(exported.path)!r}).predict([{str(tmp_path / 'cat.png')!r}])\n"
        "heavy = {'torch', 'timm', 'pydantic', 'onnx', 'scipy', 'sklearn', 'openvino', 'matplotlib'}\n"
        "print(len(answer.classes), sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["5", "[]\n"]


def test_openvino_reports_nothing_over_the_network() -> None:
    if not runtime._installed("openvino"):
        pytest.skip("needs the extra vitrail[openvino]")
    code = (
        "import socket, subprocess, sys\n"
        "def refuse(*a, **k): raise SystemExit('a connection or a process was tried')\n"
        "socket.socket.connect = refuse; subprocess.Popen = refuse\n"
        "from vitrail.deploy.runtime import import_openvino\n"
        "import_openvino().Core()\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
