"""What passed a costly check with the very sources and libraries that are here, so that it need not run again.

Exporting every net takes longer than all other contracts together, and its outcome rests on the net's sources, the
exporter's and a few libraries alone. ``passed.json`` keeps a key of these for each subject that passed; where the key
is another, the check runs. After a change, or for a new subject,

    python tests/contracts/passed.py NAME ...      # no name: all whose key is another; --all: every one

runs the check and keeps the key of what passes.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import probes

import vitrail

FILE = Path(__file__).with_name("passed.json")
ROOT = Path(vitrail.__file__).parent
LIBRARIES = ("torch", "timm", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


@cache
def _file(module: str) -> Path | None:
    """Return the file of a module of Vitrail, or None for any other."""
    parts = module.split(".")
    place = ROOT.joinpath(*parts[1:])
    if parts[0] != ROOT.name or len(parts) == 1:  # the package itself holds little but the version
        return None
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


@cache
def _imported(module: str) -> frozenset[str]:
    """Return the modules of Vitrail that one imports, wherever in its file."""
    file = _file(module)
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file else ():
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in names if _file(name))


def closure(modules: Iterable[str]) -> set[str]:
    """Return these modules and all of Vitrail that they rest on."""
    found: set[str] = set()
    waiting = [module for module in modules if _file(module)]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += _imported(module)
    return found


def key(check: Any, subject: Any) -> str:
    """Return a hash of all that the outcome of a check rests on."""
    digest = hashlib.sha256(inspect.getsource(check).encode() + inspect.getsource(probes.file_agrees).encode())
    digest.update(f"{sys.version_info[:2]} {[version(library) for library in LIBRARIES]}".encode())
    for module in sorted(closure([*subject.modules, "vitrail.deploy.export"])):
        file = _file(module)
        digest.update(module.encode() + (file.read_bytes() if file else b""))
    return digest.hexdigest()[:16]


def _read() -> dict[str, str]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


_kept = cache(_read)


def is_kept(check: Any, subject: Any) -> bool:
    """Whether the subject passed the check as everything is."""
    return subject.name in _kept() and _kept()[subject.name] == key(check, subject)


def _subjects() -> Iterator[tuple[Any, Any]]:
    """Yield every costly check with each subject that it is asked of and not known to fail."""
    import edit_contract
    import model_contract
    from contract import applicable, exempt
    from subjects import edits, models

    for contract, found in ((model_contract, models()), (edit_contract, edits())):
        for card, subject in found:
            for check in applicable(contract, subject.traits):
                if getattr(check, "costly", False) and not exempt(card, subject.name, check):
                    yield check, subject


def main() -> None:
    """Run what is asked for, keep what passes, and end with what does not."""
    wanted, live, failed = set(sys.argv[1:]), set(), []
    for check, subject in _subjects():
        live.add(subject.name)
        if subject.name in wanted or "--all" in wanted or (not wanted and not is_kept(check, subject)):
            try:
                check(subject)
            except Exception as error:  # noqa: BLE001 - a part may break in any way; the others go on
                failed.append(f"{subject.name}: {error}")
                continue
            _keep({**_read(), subject.name: key(check, subject)})
            print(subject.name, flush=True)
    _keep({name: value for name, value in _read().items() if name in live})
    sys.exit("\n".join(failed) or None)


def _keep(kept: dict[str, str]) -> None:
    FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
