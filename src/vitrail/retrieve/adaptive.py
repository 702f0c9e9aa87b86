"""Adaptive retrieval: find candidates by the first few numbers of an embedding, and put them in order by more of them.

Kusupati et al., "Matryoshka Representation Learning" (NeurIPS 2022), section 4.3, and the authors' notebooks: what is
embedded is cut and scaled to length one; neighbours are the nearest by L2 in an exact index or a graph of FAISS, and a
shortlist is ranked anew by distances at a larger dimension. A funnel does so several times: the dimension grows while
the shortlist shrinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitrail.errors import InputError, require

SLICE = 65_536
"""Embeddings that are read, cut and scaled at a time."""
FUNNEL_DIMS, FUNNEL_SHORTLISTS = (16, 32, 64, 128, 2048), (200, 100, 50, 25, 10)
"""As published, after a search by 8 dimensions."""


def write_embeddings(path: str | Path, parts: Iterable[np.ndarray], count: int, width: int) -> np.ndarray:
    """Write embeddings, in parts (n, D) as they come, into a file of which no more than a part is in memory.

    Args:
        path: of the ``.npy`` file.
        parts: ``count`` rows of ``width`` numbers in all.
        count: N.
        width: D.

    Returns:
        The file, memory-mapped, float32 (N, D).

    Raises:
        InputError: another number of rows or of columns.
    """
    store = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
    done = 0
    for part in parts:
        if part.ndim != 2 or part.shape[1] != width or done + len(part) > count:
            raise InputError(
                f"embeddings {part.shape} after {done} rows do not fit into {count} rows of {width} numbers"
            )
        store[done : done + len(part)] = part
        done += len(part)
    if done < count:
        raise InputError(f"{done} embeddings were given, and {count} were to come: say how many there are")
    store.flush()
    return np.load(path, mmap_mode="r")


class AdaptiveIndex:
    """An index of FAISS over the first ``dim`` numbers of embeddings, whose whole is read for candidates alone.

    Args:
        embeddings: (N, D), nested; may be memory-mapped, and need not be of length one.
        dim: numbers that the index holds, in memory, of each; from 1 to D.
        kind: ``exact``, or ``hnsw``, a graph that is searched approximately.
        links: of the graph, neighbours of each node; published: 8 and 32.

    Raises:
        InputError: an argument out of range, or no embedding.
        MissingExtra: FAISS is not installed.
    """

    def __init__(
        self, embeddings: np.ndarray, dim: int, *, kind: Literal["exact", "hnsw"] = "exact", links: int = 32
    ) -> None:
        if embeddings.ndim != 2 or not len(embeddings):
            raise InputError(f"embeddings {embeddings.shape} are not allowed: give (N, D), one or more")
        self.embeddings = embeddings
        self._check(dim)
        if kind not in ("exact", "hnsw"):
            raise InputError(f"kind = {kind!r} is not allowed: choose 'exact' or 'hnsw'")
        if links < 2:
            raise InputError(f"links = {links} is not allowed: give 2 or more")
        self.dim = dim
        faiss: Any = require("faiss", "retrieve")
        self.index = faiss.IndexFlatL2(dim) if kind == "exact" else faiss.IndexHNSWFlat(dim, links)
        for start in range(0, len(embeddings), SLICE):
            self.index.add(_unit(embeddings[start : start + SLICE, :dim]))

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return the rows of the ``k`` nearest of each query by ``dim`` numbers, (Q, k), nearest first.

        Args:
            queries: (Q, D), or their first ``dim`` numbers or more.
            k: from 1 to N.

        Raises:
            InputError: another ``k``, or queries that are too short.
        """
        self._check_queries(queries, self.dim)
        if not 1 <= k <= len(self.embeddings):
            raise InputError(
                f"k = {k} is not allowed: there are {len(self.embeddings)} embeddings; give 1 to that many"
            )
        found: np.ndarray = self.index.search(_unit(queries[:, : self.dim]), k)[1]
        return found

    def rerank(self, queries: np.ndarray, candidates: np.ndarray, dim: int) -> np.ndarray:
        """Return candidates (Q, k) in the order of their distance by ``dim`` numbers, nearest first.

        Args:
            queries: (Q, D).
            candidates: rows of the embeddings, (Q, k); equally near ones keep their order.
            dim: from 1 to D.
        """
        self._check(dim)
        self._check_queries(queries, dim)
        ordered = np.empty_like(candidates)
        for i, rows in enumerate(candidates):
            part = np.asarray(self.embeddings[rows, :dim], np.float32)
            # Of the length of a query the order does not depend.
            closeness = part @ queries[i, :dim].astype(np.float32) / np.maximum(np.linalg.norm(part, axis=1), 1e-12)
            ordered[i] = rows[np.argsort(-closeness, kind="stable")]
        return ordered

    def adaptive(self, queries: np.ndarray, k: int, *, shortlist: int = 200, dim: int | None = None) -> np.ndarray:
        """Return the ``k`` nearest of a shortlist that the index finds, ranked by ``dim`` numbers, (Q, k).

        Args:
            queries: (Q, D).
            k: from 1 to ``shortlist``.
            shortlist: candidates, at most N; published: 200.
            dim: None: D.
        """
        return self.funnel(
            queries, k, dims=(self.embeddings.shape[1] if dim is None else dim,), shortlists=(shortlist,)
        )

    def funnel(
        self,
        queries: np.ndarray,
        k: int,
        *,
        dims: Sequence[int] = FUNNEL_DIMS,
        shortlists: Sequence[int] = FUNNEL_SHORTLISTS,
    ) -> np.ndarray:
        """Return the ``k`` nearest after ranking ever fewer candidates by ever more numbers, (Q, k).

        Args:
            queries: (Q, D).
            k: from 1 to the last shortlist.
            dims: of each ranking, growing.
            shortlists: candidates of each ranking, shrinking; the first is at most N.

        Raises:
            InputError: dimensions and shortlists that are not so.
        """
        falling = all(a >= b for a, b in pairwise(shortlists))
        rising = all(a <= b for a, b in pairwise(dims))
        if not dims or len(dims) != len(shortlists) or not falling or not rising or not 1 <= k <= shortlists[-1]:
            raise InputError(
                f"dims = {list(dims)} with shortlists = {list(shortlists)} and k = {k} is not allowed: give as many "
                "growing dimensions as shrinking shortlists, the last of k or more"
            )
        found = self.search(queries, shortlists[0])
        for dim, length in zip(dims, shortlists):
            found = self.rerank(queries, found[:, :length], dim)
        return found[:, :k]

    def save(self, path: str | Path) -> None:
        """Write the index as a file of FAISS; the embeddings have theirs."""
        require("faiss", "retrieve").write_index(self.index, str(path))

    @classmethod
    def load(cls, path: str | Path, embeddings: np.ndarray) -> AdaptiveIndex:
        """Return the index of a file that ``save`` wrote, of these embeddings.

        Raises:
            InputError: the file cannot be read, or is of other embeddings.
        """
        faiss: Any = require("faiss", "retrieve")
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise InputError(f"cannot read the index {path}: {str(error).splitlines()[0]}; build it again") from None
        if index.ntotal != len(embeddings) or index.d > embeddings.shape[1]:
            raise InputError(
                f"the index {path} is of {index.ntotal} x {index.d} numbers and the embeddings are {embeddings.shape}: "
                "give those that it was built from, or build it again"
            )
        made = cls.__new__(cls)
        made.embeddings, made.dim, made.index = embeddings, index.d, index
        return made

    def _check(self, dim: int) -> None:
        if not 1 <= dim <= self.embeddings.shape[1]:
            raise InputError(f"dim = {dim} is not allowed: embeddings have {self.embeddings.shape[1]}; give 1 to that")

    def _check_queries(self, queries: np.ndarray, dim: int) -> None:
        if queries.ndim != 2 or queries.shape[1] < dim:
            raise InputError(f"queries {queries.shape} are not allowed: give (Q, {dim}) or wider")


def search_madds(count: int, dim: int, *, dims: Sequence[int] = (), shortlists: Sequence[int] = ()) -> int:
    """Return the multiply-adds of a query: an exact search of ``count`` by ``dim`` numbers, and rankings after it."""
    return count * dim + sum(length * wider for wider, length in zip(dims, shortlists))


def mean_average_precision(found: np.ndarray, truth: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return mAP@k: the sum of the precisions at each hit among the first ``k``, divided by ``k``, as published.

    Args:
        found: rows of neighbours, (Q, k) or more, nearest first.
        truth: classes of the queries, (Q,).
        labels: classes of what was searched, (N,).
        k: from 1.
    """
    hits = labels[found[:, :k]] == truth[:, None]
    precision = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    return float((precision * hits).sum(1).mean() / k)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
