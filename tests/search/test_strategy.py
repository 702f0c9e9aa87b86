import numpy as np
import pytest

from vitrail.errors import InputError
from vitrail.search.cell_space import CellSpace
from vitrail.search.strategy import RandomSearch, Trial, best, search


class Counting:
    """A strategy of numbers, which notes what it is asked for and told."""

    def __init__(self):
        self.asked, self.told, self.next = [], [], 0

    def ask(self, count):
        self.asked.append(count)
        self.next += count
        return [{"number": number} for number in range(self.next - count, self.next)]

    def tell(self, trials):
        self.told.append([trial.reward for trial in trials])


def test_a_search_asks_in_batches_and_tells_the_rewards():
    strategy = Counting()
    done = search(strategy, lambda each: -(each["number"] ** 2) + 4 * each["number"], trials=7, batch=3)
    assert (strategy.asked, strategy.told) == ([3, 3, 1], [[0, 3, 4], [3, 0, -5], [-12]])
    assert [trial.architecture["number"] for trial in done] == list(range(7))
    assert best(done) == Trial({"number": 2}, 4)


def test_of_equal_rewards_the_first_is_best():
    assert best([Trial({"a": 1}, 0.0), Trial({"a": 2}, 1.0), Trial({"a": 3}, 1.0)]).architecture == {"a": 2}


def test_random_search_is_of_its_seed_and_draws_all_options_alike():
    space = CellSpace(blocks=2, operations=("identity", "sep_3x3", "conv_1x1"))
    first, again, other = (RandomSearch(space, seed=seed).ask(400) for seed in (0, 0, 1))
    assert first == again != other
    codes = np.array([space.encode(each) for each in first])
    for number, count in enumerate(space.choices):
        shares = np.bincount(codes[:, number], minlength=count) / len(codes)
        assert shares == pytest.approx(1 / count, abs=0.1)
    strategy = RandomSearch(space)
    strategy.tell([Trial(first[0], 1.0)])
    assert strategy.ask(2) == first[:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials = 0, batch = 1 .*1 or more"),
        ({"trials": 1, "batch": 0}, "trials = 1, batch = 0 .*1 or more"),
    ],
)
def test_a_search_of_nothing_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        search(Counting(), lambda each: 0.0, **options)


def test_rewards_are_finite_and_there_is_a_best():
    with pytest.raises(InputError, match=r"reward nan of .*'number': 0.* is not finite"):
        search(Counting(), lambda each: float("nan"), trials=1)
    with pytest.raises(InputError, match="no trials"):
        best([])
