"""Every small image classifier of the catalogue, trained for the same time on the same images: accuracy and latency.

    python benchmarks/nanos.py Fashion-MNIST=/usr/share/datasets/fashion-mnist "Clip art=/usr/share/openclipart/png"

``vitrail compare`` trains them, all at 32 pixels from random weights, in ``runs/nanos-...``; the same command goes on
with what is there. Latency is of one image, eager, on one thread, with all nets taking turns. ``--out docs/nanos`` is
where the tables (.md) and the chart (.svg) go.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from vitrail.app.compare import BASELINE, compare
from vitrail.catalog import cards
from vitrail.evaluate.turns import in_turns
from vitrail.models import create_model

SIDE = 32
RECIPE = [f"model.img_size={SIDE}", "model.pretrained=none", "model.name=small_resnet_nano"]

INTRODUCTION = f"""# Small nets at equal time

Written by `benchmarks/nanos.py`: one training of each net for the same seconds, at {SIDE} pixels, from random weights,
with the default recipe. It shows how fast each learns here, in little time; not which is best after long training. The
interval is of the difference to the small ResNet over the held-out images; of a single training, it does not contain
the chance of the training itself.
""".splitlines()
COLUMNS = (
    "net",
    "top-1, %",
    "to the small ResNet, points",
    "passes over the images",
    "parameters, M",
    "ms for one image",
)


def arms() -> list[str]:
    """Return all nanos but those of clips, as ``compare`` names them."""
    found = []
    for card in cards().values():
        names = [path.rpartition(":")[2] for path in card.provides if path.endswith("_nano")]
        if card.stage == "model" and card.status != "planned" and card.slug != "small_resnet":
            found += [f"{card.slug}:{name}" for name in names if "video" not in name]
    return found


def trained(images: str, seconds: float) -> dict[str, Any]:
    """Compare all nanos on ``images``, a title and a path."""
    title, _, path = images.rpartition("=")
    names = arms()
    found = compare(
        path,
        names,
        seeds=1,
        minutes=seconds * (len(names) + 1) / 60 + 0.5,
        out=Path("runs") / f"nanos-{Path(path).name}",
        overrides=RECIPE,
        events=lambda event: print(event.get("stage") or event.get("text") or "", flush=True),
    )
    return {**found, "title": title or Path(path).name}


def milliseconds(names: list[str]) -> dict[str, float]:
    """Return what one image takes."""
    nets = {name: create_model(name, num_classes=10).eval() for name in names}
    x = torch.randn(1, 3, SIDE, SIDE)
    return in_turns({name: lambda net=net: net(x) for name, net in nets.items()}, rounds=40)


def chart(found: list[dict[str, Any]], times: dict[str, float], path: Path) -> None:
    """Draw accuracy over latency, a panel for each set of images."""
    figure = Figure(figsize=(10, 5.5 * len(found)), layout="constrained")
    for axes, comparison in zip(figure.subplots(len(found), squeeze=False)[:, 0], found):
        for arm in comparison["arms"]:
            if arm["mean"] is not None:
                x, y = times[arm["model"]], 100 * arm["mean"]
                axes.plot(x, y, "o", color="C1" if arm["name"] == BASELINE else "C0", markersize=4)
                axes.annotate(arm["model"].removesuffix("_nano"), (x, y), (3, 3), textcoords="offset points", size=7)
        axes.set(xscale="log", xlabel="ms for one image", ylabel="top-1, %", title=comparison["title"])
        axes.grid(alpha=0.3)
    figure.savefig(path)


def page(found: list[dict[str, Any]], times: dict[str, float], chart_name: str, note: str) -> str:
    """Return the tables."""
    lines = [
        *INTRODUCTION,
        *([note] if note else []),
        "",
        f"![accuracy over latency]({chart_name})",
    ]
    for comparison in found:
        lines += [
            "",
            f"## {comparison['title']}",
            "",
            f"{comparison['n_train']} images to train on, {comparison['n_eval']} held out, {comparison['n_classes']} "
            f"classes; {comparison['seconds_per_job']:.0f} s for each net; threads: {torch.get_num_threads()}.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "| --- " * len(COLUMNS) + "|",
        ]
        for arm in sorted(comparison["arms"], key=lambda arm: -(arm["mean"] or 0)):
            if arm["mean"] is None:
                lines.append(f"| {arm['name']} | failed: {next(iter(arm['errors'].values()))} | | | | |")
                continue
            difference = ""
            if gap := arm["difference"]:
                mean, low, high = (100 * gap[name] for name in ("mean", "low", "high"))
                difference = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
            lines.append(
                f"| {arm['model']} | {100 * arm['mean']:.1f} | {difference} | {arm['epochs']:.2f} | "
                f"{arm['params'] / 1e6:.2f} | {times[arm['model']]:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="TITLE=PATH of images, as for vitrail fit")
    parser.add_argument("--seconds", type=float, default=26.0, help="for each net")
    parser.add_argument("--out", type=Path, default=Path("docs/nanos"), help="name of the page and the chart")
    parser.add_argument("--note", default="", help="a sentence for the page on how it was run")
    given = parser.parse_args()
    found = [trained(path, given.seconds) for path in given.paths]
    nets = {arm["model"] for comparison in found for arm in comparison["arms"] if arm["mean"] is not None}
    times = milliseconds(sorted(nets))
    drawn = given.out.with_suffix(".svg")
    chart(found, times, drawn)
    given.out.with_suffix(".md").write_text(page(found, times, drawn.name, given.note), encoding="utf-8")


if __name__ == "__main__":
    main()
