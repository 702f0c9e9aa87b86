import pickle

import numpy as np
import pytest

from vitrail.data.audit import audit
from vitrail.data.index import build_index
from vitrail.data.sources import open_source
from vitrail.data.subset import ClassSubset
from vitrail.errors import InputError
from vitrail.training.recipe import DataConfig


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("subset"), DataConfig()
    source = open_source(config)
    return build_index(source, audit(source, config, folder / "audit.sqlite"), config, folder / "index.arrow")


def test_it_holds_the_images_of_its_classes_in_their_splits(index):
    subset = ClassSubset(index, ["7", "2", "4"])
    assert subset.classes == ("2", "4", "7")
    for split in ("train", "val"):
        rows = subset.rows(split)
        names = [index.classes[number] for number in index.targets(rows)]
        assert set(names) == {"2", "4", "7"}
        assert [subset.classes[number] for number in subset.targets(rows)] == names
        assert subset.counts(split).tolist() == [names.count(name) for name in subset.classes]
        assert len(rows) == sum(index.counts(split)[[2, 4, 7]])
    row = subset.rows("train")[0]
    assert np.array_equal(subset.read(row), index.read(row))
    assert subset.key(row) == index.key(row)
    others = np.setdiff1d(index.rows("val"), subset.rows("val"))
    assert set(subset.targets(others)) == {-1}


def test_its_table_and_summary_are_of_its_classes(index):
    subset = ClassSubset(index, ["0", "9"])
    table = list(subset.table())
    assert {labels for _, labels, _ in table} == {("0",), ("9",)}
    assert len(table) == sum(len(subset.rows(split)) for split in ("train", "val", "test"))
    assert list(subset.summary()["classes"]) == ["0", "9"]


def test_a_worker_gets_the_same(index):
    subset = ClassSubset(index, ["3", "5"])
    other = pickle.loads(pickle.dumps(subset))
    assert other.classes == subset.classes
    assert np.array_equal(other.targets(other.rows("val")), subset.targets(subset.rows("val")))


def test_what_does_not_fit_is_explained(index):
    with pytest.raises(InputError, match="unknown class '12'"):
        ClassSubset(index, ["1", "12"])
    with pytest.raises(InputError, match=r"a subset of 1 classes .*two or more of 10"):
        ClassSubset(index, ["1", "1"])
    several = pickle.loads(pickle.dumps(index))
    several.multilabel = True
    with pytest.raises(InputError, match="several labels"):
        ClassSubset(several, ["1", "2"])
