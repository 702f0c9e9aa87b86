"""The command line: parses, calls ``vitrail.app``, prints. Heavy imports happen inside the commands.

click rather than typer: typer imports pydantic to parse an option, which alone would break the promise that
``vitrail list`` answers in under 0.3 s.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Literal

import click

from vitrail import __version__
from vitrail.errors import VitrailError

STARTED = time.monotonic()
"""The budget of `vitrail fit` counts the seconds of loading."""

FILE = click.Path(path_type=Path)

data_path = click.argument("path", required=False)
overrides = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a recipe entry, as optim.lr=1e-3; repeatable.",
)
run_path = click.argument("run", type=FILE)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vitrail", message="%(prog)s %(version)s")
def app() -> None:
    """From a folder of images to the best deployable image model a budget allows, with the evidence.

    PATH is a class-per-folder tree, a CSV or Parquet manifest, a folder of IDX files, hf://NAME or WebDataset shards.
    """


@app.command()
@data_path
@click.option("--minutes", type=float, help="Wall-clock budget, report included.  [default: 10; 1 for the digits]")
@click.option("--out", type=FILE, help="Run folder.  [default: runs/ and the name of the data]")
@click.option("--target-ms", type=float, help="Latency per image that the shipped model must meet.")
@click.option("--matryoshka", is_flag=True, help="Nested embeddings: the first 8, 16, 32 ... numbers do by themselves.")
@click.option("--recipe", type=FILE, help="TOML recipe, or the name of a shipped one, as deit3.")
@overrides
def fit(
    path: str | None,
    minutes: float | None,
    out: Path | None,
    target_ms: float | None,
    matryoshka: bool,
    recipe: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Audit the data, choose and train a model, evaluate, compress, export, report.

    With no PATH it runs on embedded data (handwritten digits) in about a minute.
    """
    from vitrail.app.terminal import FitDisplay

    with FitDisplay() as display:
        # Imported under the display, so that the seconds that torch takes to load are seen to pass.
        from vitrail.app.fit import fit as run

        summary = run(
            path,
            minutes=minutes,
            out=out,
            target_ms=target_ms,
            matryoshka=matryoshka,
            recipe=recipe,
            overrides=overrides,
            events=display.event,
            started=STARTED,
        )
    display.final(summary)


@app.command()
@data_path
@click.option("--out", type=FILE, help="Folder for audit.json and the cache.")
@overrides
def audit(path: str | None, out: Path | None, overrides: tuple[str, ...]) -> None:
    """List unreadable files, duplicates, leakage, conflicting labels and class counts."""
    from vitrail.app.audit import audit_command

    audit_command(path, out, overrides)


@app.command()
@run_path
@click.argument("images", nargs=-1, required=True, type=FILE)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to list per image.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per image, a line each.")
@click.option("--explain", type=FILE, help="Folder for Grad-CAM pictures of the predictions.")
def predict(run: Path, images: tuple[Path, ...], top: int, as_json: bool, explain: Path | None) -> None:
    """Classify images, or folders of images, with the exported model."""
    from vitrail.app.predict import predict_command

    sys.exit(predict_command(run, images, top=top, as_json=as_json, explain=explain))


@app.command()
@run_path
@click.argument("path")
@as_json
@overrides
def evaluate(run: Path, path: str, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Measure a run's shipped model on other labelled images; labels are matched by name."""
    from vitrail.app.evaluate import evaluate_command

    evaluate_command(run, path, as_json=as_json, overrides=overrides)


@app.command()
@run_path
@click.option("--out", type=FILE, help="File to write.  [default: model.onnx in the run folder]")
def export(run: Path, out: Path | None) -> None:
    """Write the ONNX file of a run's weights again and check its parity."""
    from vitrail.app.export import export_command

    export_command(run, out)


@app.command()
@click.argument("path")
@click.argument("arms", nargs=-1, required=True, metavar="ARM...")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Trainings of each arm.")
@click.option("--minutes", type=float, help="Wall-clock of all arms and seeds together.  [default: 10]")
@click.option("--out", type=FILE, help="Folder of the comparison.  [default: runs/compare- and the name of the data]")
@click.option("--recipe", type=FILE, help="TOML recipe that all arms start from.")
@click.option("--on", type=click.Choice(["here", "ray"]), default="here", show_default=True, help="Where to run.")
@overrides
def compare(
    path: str,
    arms: tuple[str, ...],
    seeds: int,
    minutes: float | None,
    out: Path | None,
    recipe: Path | None,
    on: Literal["here", "ray"],
    overrides: tuple[str, ...],
) -> None:
    """Train arms at equal data and budget, and say which differ from the baseline.

    PATH is as for fit, or the word digits. An ARM is the slug of a model, an edit or a method, a recipe file, or
    changes as key=value,key=value. The first arm, baseline, is always there: the recipe without changes.
    """
    from vitrail.app.terminal import FitDisplay, comparison_lines

    with FitDisplay() as display:
        from vitrail.app.compare import compare as run

        found = run(
            None if path == "digits" else path,
            arms,
            seeds=seeds,
            minutes=minutes,
            out=out or Path("runs") / f"compare-{Path(path).stem}",
            recipe=recipe,
            overrides=overrides,
            on=on,
            events=display.event,
            started=STARTED,
        )
    click.echo("\n".join(comparison_lines(found)))


@app.command()
@click.argument("slug")
@click.option("--data", help="Images to use instead of the bundled ones: what `vitrail fit` takes.")
@click.option("--full", is_flag=True, help="Judge the claim: minutes instead of seconds.")
@click.option("--seeds", type=click.IntRange(min=1), help="Seeds of each arm.  [default: 3 with --full, else 1]")
@click.option("--out", type=FILE, help="Folder for the JSON file.  [default: evidence with --full, else none]")
@as_json
def check(slug: str, data: str | None, full: bool, seeds: int | None, out: Path | None, as_json: bool) -> None:
    """Test a system's central claim on data at hand: confirmed, not seen or contradicted."""
    from vitrail.app.check import check as run
    from vitrail.app.check import lines

    if full and out is None:
        out = Path("evidence")
    evidence = run(
        slug, data=data, full=full, seeds=seeds, out=out, tell=lambda text: click.echo(f"  {text}", err=True)
    )
    click.echo(json.dumps(evidence) if as_json else "\n".join(lines(evidence)))


@app.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--img-size", type=click.IntRange(min=1), help="Pixels of a side.  [default: each model's own]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images of a pass.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the CPU.  [default: all that torch takes]")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Medians are of so many.")
@click.option("--out", type=FILE, default="runs/profile", show_default=True, help="Folder for the plots and the JSON.")
@as_json
def profile(
    models: tuple[str, ...],
    img_size: int | None,
    batch: int,
    threads: int | None,
    rounds: int,
    out: Path,
    as_json: bool,
) -> None:
    """Measure how much of this machine models use, and where they wait for memory.

    Several models are measured in turns and share a plot. Weights are random.
    """
    from vitrail.app.profile import profile_command

    profile_command(models, img_size=img_size, batch=batch, threads=threads, rounds=rounds, out=out, as_json=as_json)


@app.command("list")
@click.option("--stage", help="Only this stage.")
@click.option("--task", help="Only systems for this task.")
@click.option("--status", help="Only this status.")
@click.option("--models", is_flag=True, help="Names of all models instead, timm's too.")
@as_json
def list_systems(stage: str | None, task: str | None, status: str | None, models: bool, as_json: bool) -> None:
    """List the systems of the catalogue, built and planned."""
    if models:
        from vitrail.models import model_names

        names = model_names()
        click.echo(json.dumps(names) if as_json else "\n".join(names))
        return
    from vitrail.catalog import cards
    from vitrail.catalog.card import STAGES, STATUSES, TASKS
    from vitrail.errors import unknown

    for what, value, allowed in (("stage", stage, STAGES), ("task", task, TASKS), ("status", status, STATUSES)):
        if value is not None and value not in allowed:
            raise unknown(what, value, allowed)
    chosen = [
        card
        for card in cards().values()
        if stage in (None, card.stage) and status in (None, card.status) and (task is None or task in card.tasks)
    ]
    if as_json:
        keys = ("slug", "stage", "tasks", "status", "title")
        click.echo(json.dumps([{key: getattr(card, key) for key in keys} for card in chosen]))
        return
    width = max((len(card.slug) for card in chosen), default=0)
    for card in chosen:
        click.echo(f"{card.slug:{width}}  {card.stage:8}  {card.status:7}  {card.title}")
    counts = ", ".join(f"{sum(card.status == name for card in chosen)} {name}" for name in STATUSES)
    click.echo(f"\n{len(chosen)} systems: {counts}; `vitrail show SLUG` tells more")


@app.command()
@click.argument("slug")
def show(slug: str) -> None:
    """Say what a system is and how to use it."""
    from vitrail.catalog import find

    card = find(slug)
    origin = ", ".join(part for part in (card.authors, card.paper, str(card.year or "")) if part)
    lines = [f"{card.slug}: {card.title}  [{card.stage}, {card.status}]", "", card.summary]
    lines += ["", f"paper     {origin}"] if origin else []
    lines += [f"code      {card.code}"] if card.code else []
    lines += [f"provides  {name}" for name in card.provides]
    lines += [f"missing   {card.missing}"] if card.missing else []
    lines += [f"differs   {card.differences}"] if card.differences else []
    lines += [f"claim     {claim.text} ({claim.source})" for claim in card.claims]
    for size in card.sizes:
        flops = f", {size.flops:g} G multiply-adds" if size.flops else ""
        lines.append(
            f"size      {size.name}: {size.params:g} M parameters{flops}"
            + (f" at {size.img_size} px" if size.img_size else "")
        )
    lines += [f"compares  {card.experiment}"] if card.experiment else []
    lines += ["", f"try       {card.example}"] if card.example else []
    lines += [f"check     vitrail check {card.slug}"] if card.check else []
    lines += ["", "Planned, not built yet."] if card.status == "planned" else []
    click.echo("\n".join(lines))


def main() -> None:
    """Run the command line; a failure the user can mend is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=False)
    except VitrailError as error:
        fail(str(error), 2)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        fail(f"{error.format_message()} Try `vitrail --help`.", 2)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted; the same command goes on from the last checkpoint", 130)


def fail(message: str, code: int) -> None:
    """Print one line on stderr and exit."""
    click.echo("vitrail: " + " ".join(message.split()), err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
