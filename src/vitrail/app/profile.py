"""``vitrail profile``: how much of this machine models use, and where they wait for memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

from vitrail.app.environment import environment
from vitrail.errors import InputError, unknown
from vitrail.evaluate.efficiency import Profile, efficiency_gap_plot, profile_models, summary, waterline_plot
from vitrail.models import create_model, model_names
from vitrail.report.plots import standalone
from vitrail.runs import write_json, write_text


def profile(
    names: Sequence[str],
    *,
    img_size: int | None = None,
    batch: int = 1,
    threads: int | None = None,
    rounds: int = 7,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Profile]:
    """Measure models by name, with random weights, on the GPU where there is one.

    Args:
        names: of ``model_names()``; each once.
        img_size: side of the images in pixels; None for the one that each model was published with.
        batch: images of a pass.
        threads: of the CPU; None leaves torch's number.
        rounds: of which medians are taken.
        tell: takes a line of text about progress.

    Raises:
        InputError: no such model, one twice, a number that is not allowed, or a model that does not take such images.
    """
    if not names:
        raise InputError("vitrail profile needs a model: give one or more names; `vitrail list --models` has them all")
    for name, number in {"--img-size": img_size, "--threads": threads}.items():
        if number is not None and number < 1:
            raise InputError(f"{name} {number} is not allowed: give 1 or more")
    for name in names:
        if name not in model_names():
            raise unknown("model", name, model_names(), "`vitrail list --models` lists them all")
        if names.count(name) > 1:
            raise InputError(f"the model {name} is given {names.count(name)} times: give each once")
    sides = {name: img_size or _side(name) for name in names}
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: create_model(name, num_classes=1000, img_size=sides[name]).to(place) for name in names}
    sizes = {name: (side, side) for name, side in sides.items()}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        return profile_models(models, sizes, batch=batch, rounds=rounds, tell=tell)
    finally:
        torch.set_num_threads(before)


def _side(name: str) -> int:
    """Return the side of the images that a model was published with."""
    config = timm.models.get_pretrained_cfg(name)
    return int(config.input_size[-1]) if config is not None else 224


def write(profiles: Sequence[Profile], out: Path) -> list[Path]:
    """Write the plots and the figures into a folder and return the files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made ({error.strerror}): give --out another one") from error
    plots = {"efficiency_gap.svg": efficiency_gap_plot(profiles)}
    for one in profiles:
        plots["waterline.svg" if len(profiles) == 1 else f"waterline-{one.name}.svg"] = waterline_plot(one)
    for name, svg in plots.items():
        write_text(out / name, standalone(svg))
    write_json(out / "profile.json", to_dict(profiles))
    return [*(out / name for name in plots), out / "profile.json"]


def to_dict(profiles: Sequence[Profile]) -> dict[str, Any]:
    """Return plain values for JSON."""
    return {"environment": environment(), "models": [one.to_dict() for one in profiles]}


COLUMNS = {
    "model": ("model", "{}"),
    "GMACs": ("gmacs", "{:.3g}"),
    "ideal": ("ideal_ms", "{:.3g}"),
    "attainable": ("attainable_ms", "{:.3g}"),
    "actual": ("actual_ms", "{:.3g}"),
    "of peak": ("efficiency", "{:.1%}"),
    "gap": ("gap", "{:.1f}x"),
    "waiting": ("memory_bound", "{:.0%}"),
}
"""Heading -> key of ``summary`` and how it is written."""


def profile_command(
    names: Sequence[str],
    *,
    img_size: int | None,
    batch: int,
    threads: int | None,
    rounds: int,
    out: Path,
    as_json: bool,
) -> None:
    """Measure, write the files and print a table, or JSON."""
    console = Console(stderr=True)
    with console.status("measuring") as status:
        profiles = profile(
            names,
            img_size=img_size,
            batch=batch,
            threads=threads,
            rounds=rounds,
            tell=lambda text: status.update(f"measuring, {text}"),
        )
    files = write(profiles, out)
    if as_json:
        print(json.dumps(to_dict(profiles)))  # noqa: T201
        return
    machine = profiles[0].machine
    table = Table(box=None, pad_edge=False)
    for heading in COLUMNS:
        first = heading == "model"
        table.add_column(heading, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    for one in profiles:
        row = summary(one)
        table.add_row(*(form.format(row[key]) for key, form in COLUMNS.values()))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\nThis machine, now: {machine.peak / 1e9:.4g} G operations a second, {machine.bandwidth / 1e9:.3g} GB a "
        f"second: the waterline is at {machine.balance:.3g} operations per byte.\n"
        f"Milliseconds are of a pass of {batch}. Ideal is arithmetic at the peak; attainable waits for memory too, as "
        "if nothing stayed in a cache, for the share of it in the last column; the gap is actual over ideal."
    )
    for one in profiles:
        outside = f"{one.name}: {max(0.0, 1e3 * one.unattributed):.3g} ms of a pass are no operator's"
        more = f"; multiply-adds that nobody counts are in {', '.join(one.unknown)}" if one.unknown else ""
        console.print(outside + more)
    console.print("\n".join(["", *(f"written to {file}" for file in files)]), soft_wrap=True)
