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
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

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
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 2):  # 2: the mutation breaks the import already
        raise SystemExit(f"cannot run {tests}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main() -> None:
    """Run the mutations of the systems named on the command line, or all."""
    chosen = [entry for entry in mutations() if not sys.argv[1:] or entry["system"] in sys.argv[1:]]
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
