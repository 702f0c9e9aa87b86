"""Time several computations fairly, in turns: what else a machine does meanwhile slows all of them."""

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


def medians(calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median seconds of each call over rounds in which all take their turn, after one to settle.

    Args:
        calls: name -> what to time.
        rounds: that count, 1 or more.
        clock: says what the time is, in seconds.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:
                spent[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return milliseconds of processor time that each call takes on one thread, without gradients.

    Args:
        calls, rounds: as of ``medians``.
    """
    with one_thread(), torch.inference_mode():
        return {name: 1e3 * seconds for name, seconds in medians(calls, rounds, time.thread_time).items()}
