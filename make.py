#!/usr/bin/env python3
"""Set up Vitrail in a virtual environment of its own and run it: needs Python 3.11 to 3.13 and nothing else.

    python3 make.py demo     train, evaluate, export and report on embedded data
    python3 make.py test     run the tests
    python3 make.py lint     formatting, lint, types
    python3 make.py docs     build the documentation into build/site

The environment is .venv beside this file, or the folder that VITRAIL_VENV names.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("VITRAIL_VENV", ROOT / ".venv"))
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")


def run(*command: str | Path) -> None:
    """Run a command of the environment in the project's folder; a failure ends this script with its exit code."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def install(*extras: str) -> None:
    """Create the environment and install the project with extras, unless that was done for these very files."""
    wanted = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    stamp = VENV / "installed"
    state = f"{hashlib.sha256(wanted).hexdigest()} {sys.version_info[:2]}"
    have = stamp.read_text().split("\n") if stamp.is_file() else []
    missing = set(extras) - set(have[1:])
    if have[:1] == [state] and not missing:
        return
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"Vitrail needs Python 3.11 to 3.13, and this is {sys.version.split()[0]}: call make.py with another")
    every = sorted(set(extras) | set(have[1:]) - {""} if have[:1] == [state] else set(extras))
    print(f"Installing into {VENV} (several gigabytes, a few minutes) ...", flush=True)
    venv.create(VENV, with_pip=True, clear=have[:1] != [state])
    target = f".[{','.join(every)}]" if every else "."
    run(BIN / "python", "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", target)
    stamp.write_text("\n".join([state, *every]))


def test_parts() -> list[list[str]]:
    """Return the arguments of each call of pytest: one per folder of tests, one for the files beside them.

    Each part gets fresh workers: a worker that had run several folders has died, without a trace, on starting a
    process. The tests of the report in a browser, which start many, stand alone.
    """
    browser = "tests/report/test_report_browser.py"
    folders = sorted({str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/*/**/test_*.py")})
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*.py"))
    return [*([folder, f"--ignore={browser}"] for folder in folders), files, [browser]]


def main() -> None:
    """Do what the first argument names; further arguments are passed on."""
    task, *rest = sys.argv[1:] or ["help"]
    if task == "demo":
        install("weights")
        run(BIN / "vitrail", "fit", *rest)
    elif task == "test":
        install("test")
        with tempfile.TemporaryDirectory() as shared:
            os.environ["VITRAIL_TESTS_SHARED"] = shared  # what several parts need is made there once
            for part in [rest] if rest else test_parts():
                run(BIN / "python", "-m", "pytest", "-n", "2", "--dist", "worksteal", *part)
    elif task == "lint":
        install("test", "lint")
        run(BIN / "ruff", "check", "--no-cache", ".")
        run(BIN / "ruff", "format", "--check", ".")
        run(BIN / "mypy")
    elif task == "docs":
        install("docs")
        run(BIN / "sphinx-build", "-q", "-b", "html", "docs", "build/site")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
