"""The house keeps its shape: imports run downwards, nothing heavy loads early, every system has its files."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import vitrail

ROOT = Path(vitrail.__file__).parent
DOCS = Path(__file__).resolve().parent.parent / "docs"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


graph = load(DOCS / "import_graph.py")
RANK = {name: rank for rank, names in enumerate(graph.ORDER) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in RANK, f"{own} has no place in ORDER of docs/import_graph.py"
    for name in graph.imports_of(path):
        other = name.split(".")[1]
        if other in RANK and not name.startswith(graph.ANYWHERE):
            assert RANK[own] <= RANK[other], f"{own} imports {name}"


def test_the_drawing_shows_every_part_and_import():
    drawing = ElementTree.fromstring(graph.draw())
    names = [element.text for element in drawing.iter() if element.tag.endswith("text")]
    assert sorted(names) == sorted(RANK)
    titles = [element.text for element in drawing.iter() if element.tag.endswith("title")]
    assert len(titles) == len(graph.edges())
    assert any(title.startswith("training imports methods in") for title in titles)


def test_no_import_cycle():
    names = {module_name(path): path for path in FILES}
    targets = {name: {n for n in graph.imports_of(path) if n in names and n != name} for name, path in names.items()}
    # A package's __init__ that gathers its own modules is no cycle by itself.
    targets = {name: {n for n in those if not name.startswith(f"{n}.")} for name, those in targets.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in sorted(targets[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in targets:
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
