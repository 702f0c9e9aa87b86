"""The house keeps its shape: imports run downwards, nothing heavy loads early, every system has its files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitrail

ROOT = Path(vitrail.__file__).parent
# Each layer may import those below it (further right); those between bars are siblings that may import each other.
ORDER = [
    {"cli", "__main__"},
    {"app", "checks"},
    {"training"},
    {"methods", "compress"},
    {"models"},
    {"layers", "edits", "data", "evaluate", "deploy", "report"},
    {"catalog"},
    {"errors", "runs"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# The recipe is plain data that any part may be configured with; it imports nothing but errors.
ANYWHERE = {"vitrail.training.recipe"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("vitrail.")}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path) - ANYWHERE:
        if any(name.startswith(f"{module}.") for module in ANYWHERE):
            continue
        other = name.split(".")[1]
        assert own in RANK, f"{own} has no place in ORDER"
        if other in RANK:
            assert RANK[own] <= RANK[other], f"{own} imports {name}"


def test_no_import_cycle():
    names = {module_name(path): path for path in FILES}
    graph = {name: {n for n in imports(path) if n in names and n != name} for name, path in names.items()}
    # A package's __init__ that gathers its own modules is no cycle by itself.
    graph = {name: {n for n in targets if not name.startswith(f"{n}.")} for name, targets in graph.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint('\\n'.join(sorted(sys.modules)))"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import vitrail", {"torch", "timm", "numpy", "pydantic", "PIL"}),
        ("import vitrail.cli", {"torch", "timm", "numpy", "pydantic", "rich"}),
        ("from vitrail.catalog import cards; cards()", {"torch", "timm", "numpy", "pydantic"}),
        ("import vitrail.deploy.runtime", {"torch", "timm", "pydantic", "onnx", "scipy", "sklearn", "pyarrow"}),
    ],
)
def test_light_imports_stay_light(code, banned):
    assert not loaded_after(code) & banned


def test_public_names_can_be_had():
    for name in vitrail.__all__:
        assert getattr(vitrail, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = vitrail.nothing
    assert set(vitrail.__all__) <= set(dir(vitrail))
