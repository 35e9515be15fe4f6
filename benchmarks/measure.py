"""Time two sides in turn, so that what else the machine does falls on both; or see how much memory each takes."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Side = Callable[[], int]
"""Does some work and says how much, in the case's unit (actions, learned tokens)."""


@dataclass(frozen=True)
class Timing:
    """One side's repeats.

    Attributes:
        work: units of work in each repeat.
        wall, cpu: seconds of each repeat; cpu is the whole process's.
    """

    work: list[int]
    wall: list[float]
    cpu: list[float]

    def rates(self, clock: str = "wall") -> list[float]:
        """Units of work per second, repeat by repeat."""
        return [work / seconds for work, seconds in zip(self.work, getattr(self, clock), strict=True)]


@dataclass(frozen=True)
class Comparison:
    ours: Timing
    peer: Timing

    def ratios(self, clock: str = "wall") -> list[float]:
        """Our rate over the peer's, pair by pair: neighbours in time share the machine's mood."""
        return [a / b for a, b in zip(self.ours.rates(clock), self.peer.rates(clock), strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios())

    @property
    def spread(self) -> tuple[float, float]:
        """The ratios' first and third quartile."""
        quartiles = statistics.quantiles(self.ratios(), n=4, method="inclusive")
        return quartiles[0], quartiles[2]


@dataclass(frozen=True)
class Peaks:
    """Most bytes of tensors that each side has at once; the same each time."""

    ours: int
    peer: int

    @property
    def ratio(self) -> float:
        return self.ours / self.peer


def compare(ours: Side, peer: Side, repeats: int, on_pair: Callable[[], None] = lambda: None) -> Comparison:
    """Run both sides once unmeasured, then `repeats` (at least 2) times each, who goes first changing each time."""
    sides = {"ours": finished(ours), "peer": finished(peer)}
    timings = {name: Timing([], [], []) for name in sides}
    for side in sides.values():
        side()
    for repeat in range(repeats):
        for name in sorted(sides, reverse=bool(repeat % 2)):
            gc.collect()
            gc.freeze()  # a collection in a side looks at what it made, not at all that the process holds
            try:
                wall, cpu = time.perf_counter(), time.process_time()
                work = sides[name]()
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].cpu.append(time.process_time() - cpu)
            finally:
                gc.unfreeze()
            timings[name].work.append(work)
        on_pair()
    return Comparison(timings["ours"], timings["peer"])


def finished(side: Side) -> Side:
    """The side, whose work on a GPU is done when it returns."""

    def run() -> int:
        work = side()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return work

    return run


def peak(side: Side) -> int:
    """Bytes of tensors that a run of `side` has at once, at most, beyond those that were there before it."""
    side()
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)
