"""``vitrail profile``: models by name, its files, what it prints."""

import json
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from vitrail.app.profile import profile
from vitrail.cli import app
from vitrail.errors import InputError
from vitrail.evaluate import efficiency


@pytest.fixture(autouse=True)
def _a_small_machine(monkeypatch):
    monkeypatch.setattr(efficiency, "SIDES", {"cpu": (16,)})
    monkeypatch.setattr(efficiency, "COPIED", {"cpu": 1 << 16})


def test_models_have_their_own_sizes_or_one():
    own = profile(["convfirst_nano", "test_vit"], rounds=1)
    assert [one.name for one in own] == ["convfirst_nano", "test_vit"]
    (large,) = profile(["convfirst_nano"], img_size=64, batch=2, rounds=1)
    assert large.batch == 2
    head = 128 * 1000
    assert large.macs - 2 * head == 8 * (own[0].macs - head)  # twice the images, four times the places


def test_threads_are_set_for_a_while():
    before, seen = torch.get_num_threads(), []
    profile(["convfirst_nano"], threads=before + 1, rounds=1, tell=lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_the_command_prints_a_table_and_writes_plots(tmp_path):
    out = tmp_path / "deep" / "profile"
    done = CliRunner().invoke(
        app, ["profile", "convfirst_nano", "test_vit", "--img-size", "160", "--rounds", "1", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    names = ["efficiency_gap.svg", "profile.json", "waterline-convfirst_nano.svg", "waterline-test_vit.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    for word in ("model", "attainable", "of peak", "convfirst_nano", "operations per byte", "no operator's"):
        assert word in done.output
    for name in names:
        assert name in done.output.replace("\n", "")
        if name.endswith("svg"):
            assert ElementTree.parse(out / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    told = json.loads((out / "profile.json").read_text())
    assert [one["model"] for one in told["models"]] == ["convfirst_nano", "test_vit"]
    assert told["environment"]["python"]


def test_the_command_prints_json(tmp_path):
    done = CliRunner().invoke(app, ["profile", "convfirst_nano", "--rounds", "1", "--json", "--out", str(tmp_path)])
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "profile.json").read_text())
    assert told["models"][0]["operators"]
    assert (tmp_path / "waterline.svg").is_file()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "needs a model"),
        (["convfirst_nan"], {}, "unknown model 'convfirst_nan'.*'convfirst_nano'"),
        (["convfirst_nano"] * 2, {}, "convfirst_nano is given 2 times"),
        (["convfirst_nano"], {"img_size": 0}, "--img-size 0 .*1 or more"),
        (["convfirst_nano"], {"threads": 0}, "--threads 0 .*1 or more"),
        (["convfirst_nano"], {"batch": 0}, "batch = 0"),
    ],
)
def test_bad_input_is_explained(names, options, message):
    with pytest.raises(InputError, match=message):
        profile(names, **options)


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    options = ["--rounds", "1", "--out", str(tmp_path / "file")]
    done = CliRunner().invoke(app, ["profile", "convfirst_nano", *options])
    assert isinstance(done.exception, InputError)
    assert "give --out another one" in str(done.exception)
