import time

import pytest
import torch

from vitrail.evaluate import turns
from vitrail.evaluate.turns import in_turns, one_thread


def test_calls_take_turns_on_one_thread_and_the_median_counts(monkeypatch):
    seen, clock = [], [0.0]
    costs = {"a": iter([9.0, 1.0, 5.0, 3.0]), "b": iter([9.0, 2.0, 2.0, 8.0])}
    monkeypatch.setattr(turns.time, "thread_time", lambda: clock[0])

    def call(name):
        seen.append((name, torch.get_num_threads(), torch.is_inference_mode_enabled()))
        clock[0] += next(costs[name])

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = in_turns({name: lambda name=name: call(name) for name in costs}, 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [("a", 1, True), ("b", 1, True)] * 4
    assert found == {"a": 3000.0, "b": 2000.0}


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            raise KeyError(time.monotonic())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
