"""Time several computations fairly: in turns, on one thread, by the time of the processor and not of the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return milliseconds of processor time that each call takes on one thread, without gradients.

    Args:
        calls: name -> what to time. Each is called once before the rounds.
        rounds: of which medians are taken, 1 or more; in each, every call is made once.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    with one_thread(), torch.inference_mode():
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.thread_time()
                call()
                spent[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(times) for name, times in spent.items()}
