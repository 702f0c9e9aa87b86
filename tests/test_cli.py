import subprocess
import sys

import pytest

import vitrail
from vitrail.cli import main


def vitrail_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "vitrail", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["fit", "--help"], ["audit", "-h"], ["predict", "-h"], ["list", "-h"]]
)
def test_help(arguments):
    done = vitrail_command(*arguments)
    assert "Usage: " in done.stdout
    assert done.returncode == (0 if arguments else 2)


def test_version():
    assert vitrail_command("--version").stdout.strip() == f"vitrail {vitrail.__version__}"


def test_list_and_show():
    assert "supervised" in vitrail_command("list").stdout
    only = vitrail_command("list", "--stage", "model").stdout
    assert "small_resnet" in only
    assert "supervised" not in only
    shown = vitrail_command("show", "efficientnet_lite").stdout
    for part in ("4.7 M parameters", "timm:tf_efficientnet_lite0", "try       vitrail fit"):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["show", "suprvised"], "supervised"),
        (["list", "--stage", "modle"], "model"),
        (["list", "--task", "retreival"], "retrieval"),
        (["fit", "/no/such/path"], "/no/such/path"),
        (["fit", "--minutes", "0"], "--minutes"),
        (["fit", "--minutes", "soon"], "float"),
        (["fit", "--set", "optim.lrr=1"], "optim.lr"),
        (["fit", "--set", "optim.lr=fast"], "number"),
        (["fit", "--recipe", "/no/recipe.toml"], "recipe.toml"),
        (["fit", "--set", "model.name=resnt50"], "resnet50"),
        (["fit", "--bogus"], "--bogus"),
        (["frobnicate"], "frobnicate"),
        (["predict", "/no/run", "x.jpg"], "x.jpg"),
        (["evaluate", "/no/run", "/no/data"], "/no/run"),
        (["export", "/no/run"], "/no/run"),
        (["audit", "/no/such/path"], "/no/such/path"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vitrail", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert text in message
    assert message.startswith("vitrail: ")


def test_bad_input_leaves_the_process_as_the_shell_expects():
    done = vitrail_command("show", "suprvised")
    assert done.returncode == 2
    assert done.stderr.startswith("vitrail: ")
    assert "Traceback" not in done.stderr
