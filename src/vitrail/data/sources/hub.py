"""Hugging Face data sets, from the hub or saved on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrail.data.decode import UnreadableImage
from vitrail.data.sources.base import Record, Split, label_text, read_file, split_name
from vitrail.errors import InputError, require
from vitrail.runs import offline

if TYPE_CHECKING:
    from vitrail.training.recipe import DataConfig


class HubSource:
    """A Hugging Face data set; its tables are memory-mapped and its images decoded by us.

    The image column is ``data.path_column`` or the only one of images; the label column is ``data.label_column`` or the
    only one of class labels. A split by another name than train, val(idation) or test is left out and reported.

    Args:
        uri: ``hf://name`` or ``hf://name@config``, or a folder written by ``save_to_disk``.
        config: names of the columns.
    """

    kind = "hf"

    def __init__(self, uri: str, config: DataConfig) -> None:
        self.uri = uri
        datasets = _import_datasets()
        tables = _load(datasets, uri)
        if not isinstance(tables, dict):
            tables = {"train": tables}
            self._splits: dict[str, Split | None] = {"train": None}
        else:
            self._splits = {name: split_name(name) for name in tables}
            if len(tables) == 1 and "train" not in self._splits.values():
                self._splits = dict.fromkeys(tables)
        self._one = len(tables) == 1
        first = next(iter(tables.values()))
        self._image = _image_column(datasets, first.features, config, uri)
        self._label = _label_column(datasets, first.features, config, uri)
        self._group = _column(first.features, config.group_column, "group", uri)
        self._stamps = {name: str(table._fingerprint) for name, table in tables.items()}
        feature = first.features[self._label]
        self.multilabel = not isinstance(feature, (datasets.Value, datasets.ClassLabel))
        inner = getattr(feature, "feature", feature)
        self._names = list(inner.names) if isinstance(inner, datasets.ClassLabel) else None
        self._tables = {}
        for name, table in tables.items():
            if isinstance(table.features[self._image], datasets.Image):
                table = table.cast_column(self._image, datasets.Image(decode=False))
            self._tables[name] = table

    def records(self) -> Iterator[Record]:
        """Yield the rows of each split in order."""
        for name, table in self._tables.items():
            split = self._splits[name]
            if split is None and not self._one:
                problem = f"the split {name!r} ({len(table)} rows) is none of train, val and test"
                yield Record(f"{name}/", f"{name}/", problem=problem)
                continue
            columns = [self._label] + ([self._group] if self._group else [])
            number = 0
            for batch in table.select_columns(columns).iter(batch_size=1000):
                groups = batch[self._group] if self._group else [None] * len(batch[self._label])
                for value, group in zip(batch[self._label], groups, strict=True):
                    key = f"{name}/{number}"
                    number += 1
                    labels = self._labels(value)
                    missing = None if labels or self.multilabel else "the row has no label"
                    yield Record(key, key, labels, label_text(group) or None, None if missing else split, missing)

    def read(self, locator: str) -> bytes | np.ndarray:
        """Return the encoded image, or its pixels."""
        name, _, number = locator.rpartition("/")
        value = self._tables[name][int(number)][self._image]
        if isinstance(value, dict):
            if value.get("bytes"):
                return value["bytes"]
            if value.get("path"):
                return read_file(value["path"])
            value = None
        if value is None:
            raise UnreadableImage("the row has no image")
        return np.asarray(value, np.uint8)

    def stamp(self, locator: str) -> str:
        """Return the fingerprint that the library gives a table."""
        return self._stamps[locator.rpartition("/")[0]]

    def _labels(self, value: Any) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [value]
        if self._names is None:
            names = [label_text(item) for item in values]
        else:  # -1 stands for "not labelled"
            names = [label_text(self._names[item]) for item in values if item is not None and item >= 0]
        return tuple(dict.fromkeys(name for name in names if name))


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _import_datasets() -> Any:
    if offline():  # the libraries read this once, when they are imported
        os.environ["HF_HUB_OFFLINE"] = "1"
    return require("datasets", "data")


def _load(datasets: Any, uri: str) -> Any:
    try:
        if not uri.startswith("hf://"):
            return datasets.load_from_disk(uri)
        name, _, config = uri.removeprefix("hf://").partition("@")
        if not name:
            raise InputError(f"{uri!r} names no data set: give hf://owner/name or hf://owner/name@config")
        if offline():
            datasets.config.HF_HUB_OFFLINE = True
        download = datasets.DownloadConfig(local_files_only=offline())
        return datasets.load_dataset(name, config or None, download_config=download)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - the library and its network layers raise all kinds
        cause = " ".join(str(error).split())[:200]
        hint = "offline mode is set, so only data sets loaded before can be used" if offline() else "check its name"
        raise InputError(f"cannot load the data set {uri} ({type(error).__name__}: {cause}); {hint}") from None


def _column(features: Any, column: str | None, role: str, uri: str) -> str | None:
    if column is not None and column not in features:
        from vitrail.errors import unknown

        raise unknown("column", column, features, f"(in {uri}; set data.{role}_column)")
    return column


def _image_column(datasets: Any, features: Any, config: DataConfig, uri: str) -> str:
    if config.path_column in features:
        return config.path_column
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [
        name for name, feature in features.items() if isinstance(feature, (datasets.Array2D, datasets.Array3D))
    ]
    return _only(found, "images", "path", features, uri)


def _label_column(datasets: Any, features: Any, config: DataConfig, uri: str) -> str:
    if config.label_column in features:
        return config.label_column
    found = [
        name
        for name, feature in features.items()
        if isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)
    ]
    return _only(found, "labels", "label", features, uri)


def _only(found: list[str], what: str, role: str, features: Any, uri: str) -> str:
    if len(found) == 1:
        return found[0]
    have = (
        f"several columns of {what} ({', '.join(found)})"
        if found
        else f"no column of {what} among {', '.join(features)}"
    )
    raise InputError(f"{uri} has {have}: set data.{role}_column")
