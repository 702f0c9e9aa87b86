"""Where images come from: folders, tables, IDX files, Hugging Face data sets, tar shards, the embedded digits."""

from vitrail.data.sources.base import Record, Source, Split
from vitrail.data.sources.select import open_source

__all__ = ["Record", "Source", "Split", "open_source"]
