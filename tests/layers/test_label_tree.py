import pytest
import torch

from vitrail.errors import InputError
from vitrail.layers.label_tree import LabelTree, class_groups

NAMES = ("car/van", "bird", "bird/perching/blackbird", "car", "bird/perching", "dish/soup")


def test_a_class_is_all_that_is_above_it():
    tree = LabelTree(NAMES)
    assert [tree.ancestors(i) for i in range(6)] == [[3, 0], [1], [1, 4, 2], [3], [1, 4], [5]]
    assert tree.groups() == [[0, 3], [1, 2, 4], [5]]
    assert LabelTree(["a>b", "a"], separator=">").ancestors(0) == [1, 0]


def test_targets_are_expanded_to_what_is_above():
    tree = LabelTree(NAMES)
    found = tree.expand(torch.tensor([2, 3, 5]))
    assert found.tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    hot = torch.nn.functional.one_hot(torch.tensor([2, 3, 5]), 6)
    torch.testing.assert_close(tree.expand(hot), found)
    mixed = torch.tensor([[0.3, 0.1, 0.5, 0.0, 0.2, 0.0]])
    wanted = [max([float(mixed[0, i]) for i in range(6) if label in tree.ancestors(i)]) for label in range(6)]
    torch.testing.assert_close(tree.expand(mixed)[0], torch.tensor(wanted))


@pytest.mark.parametrize(
    ("groups", "classes", "wanted"),
    [(2, 5, [[0, 1], [2, 3, 4]]), (1, 2, [[0, 1]]), (3, 3, [[0], [1], [2]]), ([(2, 0), [1]], 3, [[2, 0], [1]])],
)
def test_groups_hold_every_class_once(groups, classes, wanted):
    assert class_groups(groups, classes) == wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LabelTree([]), "tree of 0 labels"),
        (lambda: LabelTree(["a", "a"]), "2 labels, 1 of them different"),
        (lambda: class_groups(0, 3), "groups = 0 .*3 classes"),
        (lambda: class_groups(4, 3), "groups = 4"),
        (lambda: class_groups([[0], [1]], 3), "2 groups of 2 class numbers .*3 classes"),
        (lambda: class_groups([[0, 1], [1]], 2), "2 groups of 3"),
        (lambda: class_groups([[0, 1], []], 2), "no empty group"),
    ],
)
def test_what_is_no_tree_and_no_groups_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()
