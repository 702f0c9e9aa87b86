"""The import graph of the package: the order that it keeps, and its drawing.

python docs/import_graph.py > graph.svg
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "src" / "vitrail"
# Each part may import those on the lines below it; those on one line are siblings that may import each other.
ORDER = [
    ["cli", "__main__"],
    ["app", "checks"],
    ["training", "search"],
    ["methods", "compress", "generate", "retrieve"],
    ["models"],
    ["layers", "edits", "data", "evaluate", "deploy", "report"],
    ["catalog"],
    ["errors", "runs"],
]
# The recipe is plain data that any part may be configured with; it imports nothing but errors.
ANYWHERE = "vitrail.training.recipe"


def imports_of(path: Path) -> set[str]:
    """Return the modules and names of the package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("vitrail.")}


def part_of(path: Path) -> str:
    """Return the folder or file directly below the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def edges() -> Counter[tuple[str, str]]:
    """Return how many files of one part import another part."""
    parts = {part for line in ORDER for part in line}
    found: Counter[tuple[str, str]] = Counter()
    for path in ROOT.rglob("*.py"):
        names = {name for name in imports_of(path) if not name.startswith(ANYWHERE)}
        targets = {name.split(".")[1] for name in names} & parts - {part_of(path)}
        found.update((part_of(path), target) for target in targets)
    return found


def draw() -> str:
    """Return the graph as SVG: a row per line of ``ORDER``; the wider an arrow, the more files import."""
    width, height, step = 120, 34, 96
    place = {}
    for row, parts in enumerate(ORDER):
        for column, part in enumerate(parts):
            place[part] = (480 + (column - (len(parts) - 1) / 2) * 150, 30 + row * step)
    lines = []
    for (source, target), count in sorted(edges().items()):
        (x0, y0), (x1, y1) = place[source], place[target]
        if y0 == y1:
            path = f"M{x0:.0f} {y0 + height / 2:.0f} Q{(x0 + x1) / 2:.0f} {y0 + 62:.0f} {x1:.0f} {y1 + height / 2:.0f}"
        else:
            bend = 24 if x0 == x1 and y1 - y0 > step else 0
            x = (x0 + x1) / 2 + bend * 6
            path = f"M{x0:.0f} {y0 + height / 2:.0f} Q{x:.0f} {(y0 + y1) / 2:.0f} {x1:.0f} {y1 - height / 2 - 3:.0f}"
        thick = min(0.6 + count / 6, 3)
        title = f"<title>{source} imports {target} in {count} files</title>"
        lines.append(
            f'<path d="{path}" fill="none" stroke="#46a" stroke-opacity=".55" stroke-width="{thick:.1f}" '
            f'marker-end="url(#tip)">{title}</path>'
        )
    for part, (x, y) in place.items():
        lines.append(
            f'<rect x="{x - width / 2:.0f}" y="{y - height / 2:.0f}" width="{width}" height="{height}" rx="6" '
            f'fill="#fff" stroke="#333"/><text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{part}</text>'
        )
    tip = '<marker id="tip" markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="9" '
    tip += 'refX="7" refY="4.5" orient="auto"><path d="M0 0L9 4.5L0 9z" fill="#46a"/></marker>'
    size = f"0 0 960 {84 + (len(ORDER) - 1) * step}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif" font-size="14">'
        f"<defs>{tip}</defs>{''.join(lines)}</svg>\n"
    )


if __name__ == "__main__":
    print(draw(), end="")
