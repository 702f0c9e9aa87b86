"""A table that lists images and their labels: CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.data.sources.base import Record, Split, clean_label, file_stamp, label_text, read_file, split_name
from vitrail.errors import InputError, unknown

if TYPE_CHECKING:
    from vitrail.training.recipe import DataConfig

EXTENSIONS = (".csv", ".tsv", ".parquet")


class ManifestSource:
    """Images listed in a table, read row by row.

    Paths are relative to the table's folder. Absolute paths and ``..`` are allowed: the table is the user's own list.
    A file that is missing, or is not a regular file, is unreadable when it is read. A row without a split belongs to
    ``train`` when the table has a split column.

    Args:
        path: the table, ``.csv``, ``.tsv`` or ``.parquet``.
        config: names of the columns and the label separator.
    """

    kind = "manifest"

    def __init__(self, path: Path, config: DataConfig) -> None:
        self.path = Path(path).resolve()
        self.uri = str(self.path)
        self.folder = str(self.path.parent)
        self.separator = config.label_separator
        self.columns = {"path": config.path_column, "label": config.label_column}
        if config.group_column is not None:
            self.columns["group"] = config.group_column
        if config.split_column is not None:
            self.columns["split"] = config.split_column
        self.parquet = self.path.suffix.lower() == ".parquet"
        lists = self._check_columns()
        self.multilabel = self.separator is not None or lists

    def records(self) -> Iterator[Record]:
        """Yield the rows in the order of the table."""
        for number, row in self._rows():
            yield self._record(number, row)

    def read(self, locator: str) -> bytes:
        """Return the bytes of an image file."""
        return read_file(os.path.join(self.folder, locator))  # noqa: PTH118 - once per image

    def stamp(self, locator: str) -> str:
        """Return size and time of an image file."""
        return file_stamp(os.path.join(self.folder, locator))  # noqa: PTH118

    def _record(self, number: int, row: dict[str, Any]) -> Record:
        path = label_text(row["path"])
        key = path or f"row {number}"
        if not path:
            return Record(key, key, problem=f"row {number} of the table has no path")
        if "://" in path:
            return Record(key, key, problem="an address on the network; download the file and list its path")
        if "\0" in path:
            return Record(key.replace("\0", "\\0"), "", problem="the path contains a zero byte")
        labels = self._labels(row["label"])
        if not labels and not self.multilabel:
            return Record(key, path, problem=f"row {number} of the table has no label")
        group = label_text(row.get("group")) or None
        return Record(key, path, labels, group, self._split(number, row))

    def _labels(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, list):
            names = [label_text(item) for item in value]
        elif self.separator is not None:
            names = [clean_label(name) for name in label_text(value).split(self.separator)]
        else:
            names = [label_text(value)]
        return tuple(dict.fromkeys(name for name in names if name))

    def _split(self, number: int, row: dict[str, Any]) -> Split | None:
        if "split" not in row:
            return None
        text = label_text(row["split"])
        if not text:
            return "train"
        split = split_name(text)
        if split is None:
            raise InputError(
                f"row {number} of {self.path} has the split {text!r} in column {self.columns['split']!r}: "
                "allowed are train, val and test"
            )
        return split

    def _check_columns(self) -> bool:
        """Check that the columns exist; return whether the label column of a Parquet file holds lists."""
        if not self.parquet:
            with self._open_text() as file:
                header = self._header(file)
            self._require(header)
            return False
        import pyarrow as pa

        with self._open_parquet() as table:
            schema = table.schema_arrow
        self._require(schema.names)
        if not (
            pa.types.is_string(schema.field(self.columns["path"]).type)
            or pa.types.is_large_string(schema.field(self.columns["path"]).type)
        ):
            raise InputError(
                f"column {self.columns['path']!r} of {self.path} holds {schema.field(self.columns['path']).type}, not "
                "paths: set data.path_column to a column of text"
            )
        label = schema.field(self.columns["label"]).type
        return pa.types.is_list(label) or pa.types.is_large_list(label)

    def _require(self, names: list[str]) -> None:
        for role, column in self.columns.items():
            if column not in names:
                raise unknown("column", column, names, f"(in {self.path}; set data.{role}_column)")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (row number as an editor shows it, or counted from 1 in Parquet, cells by role)."""
        if self.parquet:
            number = 0
            with self._open_parquet() as table:
                names = list(dict.fromkeys(self.columns.values()))
                for batch in table.iter_batches(batch_size=4096, columns=names):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, {role: row[column] for role, column in self.columns.items()}
            return
        with self._open_text() as file:
            header = self._header(file)
            places = {role: header.index(column) for role, column in self.columns.items()}
            reader = csv.reader(file, delimiter=self.delimiter)
            try:
                for cells in reader:
                    if cells:
                        number = reader.line_num + 1  # the header was read before
                        yield number, {role: cells[p] if p < len(cells) else None for role, p in places.items()}
            except (csv.Error, UnicodeDecodeError) as error:
                raise self._damaged(error, f"near line {reader.line_num + 2}") from None

    def _header(self, file: Any) -> list[str]:
        try:
            line = file.readline()
            if self.path.suffix.lower() == ".tsv":
                self.delimiter = "\t"
            else:  # spreadsheets of many countries write semicolons
                self.delimiter = ";" if ";" in line and "," not in line else ","
            return [name.strip() for name in next(csv.reader([line], delimiter=self.delimiter), [])]
        except (csv.Error, UnicodeDecodeError) as error:
            raise self._damaged(error, "in the first line") from None

    def _damaged(self, error: Exception, where: str) -> InputError:
        cause = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        return InputError(f"cannot read {self.path} {where}: {cause}; save the table as CSV in UTF-8")

    def _open_text(self) -> Any:
        try:
            return self.path.open(encoding="utf-8-sig", newline="")
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}; check its permissions") from None

    def _open_parquet(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.path, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            cause = " ".join(str(error).split())[:120]
            raise InputError(f"cannot read {self.path} as Parquet ({cause}); write the table again") from None
