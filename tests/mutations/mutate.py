"""Break one line at a time and see a test fail: the guard of the tests.

    python tests/mutations/mutate.py                 all
    python tests/mutations/mutate.py rmt adaquant    those of rmt.toml and adaquant.toml

Each mutation is made in a copy of the package, and the test that is said to catch it is run against that copy; it must
fail, and it must pass against the package as it is. Takes a few seconds each; prints a line each, and exits with 1 if
one survived.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def mutations() -> list[dict[str, str]]:
    """Return all entries: ``file`` below src/vitrail, ``old`` (found once), ``new``, ``test``, and ``system``."""
    return [
        {**entry, "system": path.stem}
        for path in sorted(HERE.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    ]


def run(tests: list[str], source: Path) -> bool:
    """Return whether tests pass against the package in ``source``; raise if they cannot be run."""
    child = os.fork()
    if not child:
        sys.path.insert(0, str(source))
        os.environ["PYTHONPATH"] = str(source)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        import vitrail

        right = Path(vitrail.__file__).is_relative_to(source)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])) if right else 99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1, 2):  # 2: the mutation breaks the import already
        raise SystemExit(f"cannot run {' '.join(tests)} against {source}: pytest ended with {code}")
    return code == 0


def main() -> None:
    """Run the mutations of the systems named on the command line, or all."""
    chosen = [entry for entry in mutations() if not sys.argv[1:] or entry["system"] in sys.argv[1:]]
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    import timm  # noqa: F401 - so that every fork has it, and torch
    import torch  # noqa: F401

    survived = 0
    named = sorted({entry["test"] for entry in chosen})
    if named and not run(named, ROOT / "src"):
        wrong = [test for test in named if not run([test], ROOT / "src")]
        raise SystemExit(f"{', '.join(wrong)}: fails on the package as it is")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        for entry in chosen:
            path = copy / "vitrail" / entry["file"]
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(entry["old"], entry["new"]), encoding="utf-8")
            caught = not run([entry["test"]], copy)
            path.write_text(text, encoding="utf-8")
            survived += not caught
            print(
                "caught  " if caught else "SURVIVED", entry["file"], "|", entry["old"], "->", entry["new"], flush=True
            )
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
