import errno
import json
from pathlib import Path

import pytest

from vitrail.errors import RunError
from vitrail.runs import RunFolder, atomic_path, read_json, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError), atomic_path(path) as temporary:
        temporary.write_text("half a fi")
        raise ValueError
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_non_finite_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"disk is full.*intact"):
        write_text(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_damaged_json_names_the_file(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(RunError, match=r"summary\.json"):
        read_json(tmp_path / "summary.json")


def test_missing_json_asks_for_a_run_folder(tmp_path):
    with pytest.raises(RunError, match="run folder"):
        read_json(tmp_path / "nothing.json")


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--out"):
        RunFolder(tmp_path / "file" / "run").create()


def test_json_keeps_unicode(tmp_path):
    write_json(tmp_path / "a.json", {"class": "crème brûlée"})
    assert "crème" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["class"] == "crème brûlée"
