import sys

import numpy as np
import pytest

from vitrail.errors import InputError, MissingExtra
from vitrail.retrieve.adaptive import AdaptiveIndex, mean_average_precision, search_madds, write_embeddings


def vectors(count, width=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def slow_nearest(query, rows, among, dim):
    """Return ``among``, nearest first by the cosine of ``dim`` numbers."""

    def cosine(row):
        a, b = query[:dim].astype(float), rows[row, :dim].astype(float)
        return a @ b / np.sqrt((a @ a) * (b @ b))

    return sorted(among, key=cosine, reverse=True)


@pytest.mark.parametrize("dim", [3, 8, 16])
def test_an_exact_search_is_the_slow_loop(dim):
    rows, queries = vectors(90), 3 * vectors(4, seed=1)
    found = AdaptiveIndex(rows, dim).search(queries, 7)
    assert found.tolist() == [slow_nearest(query, rows, range(90), dim)[:7] for query in queries]


def test_a_shortlist_is_ranked_anew_by_more_numbers():
    rows, queries = vectors(90), vectors(4, seed=1)
    index = AdaptiveIndex(rows, 3)
    for dim in (None, 9):
        wanted = []
        for query in queries:
            short = slow_nearest(query, rows, range(90), 3)[:20]
            wanted.append(slow_nearest(query, rows, short, dim or 16)[:5])
        assert index.adaptive(queries, 5, shortlist=20, dim=dim).tolist() == wanted
    whole = AdaptiveIndex(rows, 16).search(queries, 5)
    assert index.adaptive(queries, 5, shortlist=90).tolist() == whole.tolist()


def test_a_funnel_ranks_ever_fewer_by_ever_more():
    rows, queries = vectors(90), vectors(4, seed=1)
    wanted = []
    for query in queries:
        among = slow_nearest(query, rows, range(90), 2)[:40]
        for dim, length in ((4, 40), (8, 15), (16, 6)):
            among = slow_nearest(query, rows, among[:length], dim)
        wanted.append(among[:3])
    found = AdaptiveIndex(rows, 2).funnel(queries, 3, dims=(4, 8, 16), shortlists=(40, 15, 6))
    assert found.tolist() == wanted


def test_the_funnel_is_the_published_one():
    rows = vectors(300, 2048)
    found = AdaptiveIndex(rows, 8).funnel(rows[:2], 10)
    assert found.shape == (2, 10)
    assert found[:, 0].tolist() == [0, 1]


def test_a_graph_finds_nearly_all_and_is_kept(tmp_path):
    rows, queries = vectors(400), vectors(20, seed=1)
    graph = AdaptiveIndex(rows, 8, kind="hnsw", links=16)
    exact = AdaptiveIndex(rows, 8).search(queries, 5)
    found = graph.search(queries, 5)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found, exact)]) > 4
    graph.save(tmp_path / "graph.index")
    again = AdaptiveIndex.load(tmp_path / "graph.index", rows)
    assert again.dim == 8
    assert again.search(queries, 5).tolist() == found.tolist()
    assert again.adaptive(queries, 5, shortlist=30).tolist() == graph.adaptive(queries, 5, shortlist=30).tolist()


def test_embeddings_are_read_from_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr("vitrail.retrieve.adaptive.SLICE", 7)
    rows = vectors(30)
    kept = write_embeddings(tmp_path / "rows.npy", (rows[i : i + 8] for i in range(0, 30, 8)), 30, 16)
    assert isinstance(kept, np.memmap)
    np.testing.assert_array_equal(kept, rows)
    queries = vectors(2, seed=1)
    index = AdaptiveIndex(kept, 4)
    assert index.search(queries, 30).tolist() == [slow_nearest(query, rows, range(30), 4) for query in queries]


def test_the_cost_is_that_of_the_search_and_of_each_ranking():
    assert search_madds(1000, 8) == 8000
    assert search_madds(1000, 8, dims=(16, 2048), shortlists=(200, 10)) == 8000 + 3200 + 20480


def test_mean_average_precision_is_as_published():
    labels, truth = np.array([0, 1, 0, 1, 2]), np.array([0, 1])
    found = np.array([[0, 1, 2], [4, 1, 3]])
    slow = np.mean([(1 / 1 + 2 / 3) / 3, (1 / 2 + 2 / 3) / 3])
    assert mean_average_precision(found, truth, labels, 3) == pytest.approx(slow)
    assert mean_average_precision(found, truth, labels, 1) == pytest.approx(0.5)


INDEX = AdaptiveIndex(vectors(9, 4), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: AdaptiveIndex(vectors(0), 2), r"\(0, 16\) .*one or more"),
        (lambda folder: AdaptiveIndex(vectors(2), 17), "dim = 17 .*have 16"),
        (lambda folder: AdaptiveIndex(vectors(2), 0), "dim = 0"),
        (lambda folder: AdaptiveIndex(vectors(2), 2, kind="tree"), "kind = 'tree'"),
        (lambda folder: AdaptiveIndex(vectors(2), 2, kind="hnsw", links=1), "links = 1"),
        (lambda folder: INDEX.search(vectors(1, 4), 10), "k = 10 .*9 embeddings"),
        (lambda folder: INDEX.search(vectors(1, 1), 1), r"queries \(1, 1\) .*\(Q, 2\)"),
        (lambda folder: INDEX.rerank(vectors(1, 3), np.zeros((1, 2), int), 4), r"queries \(1, 3\)"),
        (lambda folder: INDEX.rerank(vectors(1, 4), np.zeros((1, 2), int), 5), "dim = 5"),
        (lambda folder: INDEX.funnel(vectors(1, 4), 1, dims=(4, 3), shortlists=(5, 2)), r"dims = \[4, 3\]"),
        (lambda folder: INDEX.funnel(vectors(1, 4), 1, dims=(3, 4), shortlists=(2, 5)), r"shortlists = \[2, 5\]"),
        (lambda folder: INDEX.funnel(vectors(1, 4), 3, dims=(3, 4), shortlists=(5, 2)), "k = 3"),
        (lambda folder: INDEX.funnel(vectors(1, 4), 1, dims=(3,), shortlists=(5, 2)), "as many"),
        (lambda folder: AdaptiveIndex.load(folder / "none", vectors(2)), "cannot read the index"),
        (lambda folder: INDEX.save(folder / "i") or AdaptiveIndex.load(folder / "i", vectors(3)), "of 9 x 2 numbers"),
        (lambda folder: write_embeddings(folder / "e.npy", [vectors(2)], 1, 16), "do not fit into 1 rows"),
        (lambda folder: write_embeddings(folder / "e.npy", [vectors(2)], 3, 16), "2 embeddings were given, and 3"),
        (lambda folder: write_embeddings(folder / "e.npy", [vectors(2)], 2, 8), "16. after 0 rows"),
    ],
)
def test_what_cannot_be_searched_is_explained(call, message, tmp_path):
    with pytest.raises(InputError, match=message):
        call(tmp_path)


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"vitrail\[retrieve\]"):
        AdaptiveIndex(vectors(2), 2)
