"""From what the user gave to the source that reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.catalog import cards, locate
from vitrail.data.decode import IMAGE_EXTENSIONS
from vitrail.data.sources.base import Source
from vitrail.data.sources.digits import DigitsSource
from vitrail.data.sources.folder import FolderSource
from vitrail.data.sources.hub import HubSource, is_saved_dataset
from vitrail.data.sources.idx import NAME as IDX_NAME
from vitrail.data.sources.idx import IdxSource, is_idx_folder
from vitrail.data.sources.manifest import EXTENSIONS as MANIFEST_EXTENSIONS
from vitrail.data.sources.manifest import ManifestSource
from vitrail.data.sources.shards import RANGE, ShardSource, shard_paths
from vitrail.errors import DataError, InputError, nearest

if TYPE_CHECKING:
    from vitrail.training.recipe import DataConfig

KINDS = "a folder, a .csv, .tsv or .parquet table, IDX files, hf://name, or .tar shards"


def open_source(config: DataConfig, cache: Path | None = None) -> Source:
    """Return the source for ``config.path``: its kind is found by looking at it.

    Args:
        config: the path or address, and how to read it. ``SLUG://OPTIONS`` is what the data system of that slug
            generates: the first name that its card provides is called with the address and ``config``.
        cache: folder for unpacked IDX files; by default the user's cache folder.

    Raises:
        InputError: the path is missing, of no known kind, or lacks a column.
        DataError: there is no image in it, or it is damaged.
    """
    source = _select(config, cache)
    problem = None
    for record in source.records():
        if record.problem is None:
            return source
        problem = problem or f"{record.key}: {record.problem}"
    if problem:
        raise DataError(f"no image in {source.uri} can be used; the first reason is {problem}")
    raise DataError(
        f"there is no image in {source.uri}: give {KINDS}; images lie in one folder per class, as in cats/1.jpg"
    )


def _select(config: DataConfig, cache: Path | None) -> Source:
    given = config.path
    if given is None:
        return DigitsSource()
    if given.startswith("hf://"):
        return HubSource(given, config)
    scheme, sign, _ = given.partition("://")
    if sign and scheme in cards() and cards()[scheme].stage == "data":
        return locate(scheme, "data")(given, config)
    if sign:
        raise InputError(f"cannot read {given!r} over the network: download it, or give {KINDS}")
    path = Path(given).expanduser()
    if not path.exists() and RANGE.search(given):
        return ShardSource(given, shard_paths(given))
    try:
        if path.is_dir():
            return _select_folder(path, config, cache)
        if path.exists():
            return _select_file(path, config)
    except PermissionError as error:
        raise InputError(
            f"cannot read {error.filename or path}: permission denied; check the rights of the path"
        ) from None
    raise _missing(path)


def _select_folder(path: Path, config: DataConfig, cache: Path | None) -> Source:
    if is_idx_folder(path):
        return IdxSource(path, cache or user_cache())
    if is_saved_dataset(path):
        return HubSource(str(path.resolve()), config)
    with os.scandir(path) as entries:
        tars = sorted(
            Path(entry.path)
            for entry in entries
            if entry.name.lower().endswith(".tar") and not entry.name.startswith(".")
        )
    if tars:
        return ShardSource(str(path.resolve()), tars)
    return FolderSource(path, config.level)


def _select_file(path: Path, config: DataConfig) -> Source:
    name = path.name.lower()
    if path.suffix.lower() in MANIFEST_EXTENSIONS:
        return ManifestSource(path, config)
    if name.endswith(".tar"):
        return ShardSource(str(path.resolve()), [path])
    if name.endswith((".zip", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".7z", ".rar")):
        raise InputError(f"{path} is a compressed archive: unpack it and give the folder")
    if IDX_NAME.match(path.name):
        raise InputError(f"{path} is one IDX file: give the folder that holds images and labels, {path.parent}")
    if path.suffix.lower() in IMAGE_EXTENSIONS:
        raise InputError(f"{path} is one image: give a folder with one folder of images per class")
    raise InputError(f"{path} is of no known kind: give {KINDS}")


def _missing(path: Path) -> InputError:
    parent = path.parent
    close = nearest(path.name, (entry.name for entry in parent.iterdir())) if parent.is_dir() else []
    hint = "did you mean " + " or ".join(repr(str(parent / name)) for name in close) + "?" if close else f"give {KINDS}"
    return InputError(f"there is nothing at {path}: {hint}")


def user_cache() -> Path:
    """Return the folder for files that can be made again, ``$XDG_CACHE_HOME/vitrail`` or ``~/.cache/vitrail``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vitrail"
