"""Alternating rounds: A B C A B C …, so that whatever slows the machine down slows every method down."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


class Method(Protocol):
    """Something that is run again and again. ``prepare`` is not timed."""

    def prepare(self) -> None: ...

    def run(self) -> None: ...


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, the warm-up left out."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def rate(self, count: int) -> float:
        """Items per second in the median round."""
        return count / self.median


def alternate(methods: Mapping[str, Method], rounds: int) -> dict[str, Timing]:
    """Run every method once to warm up and then ``rounds`` times in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        for name, method in methods.items():
            method.prepare()
            start = time.perf_counter()
            method.run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def median_ratio(a: Timing, b: Timing) -> float:
    """Rate of ``a`` over rate of ``b``: the median over the rounds, each compared with its neighbour."""
    return statistics.median(y / x for x, y in zip(a.seconds, b.seconds, strict=True))


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on the last of its cores."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
