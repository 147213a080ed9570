"""Samples of several runners taken in turn, and the ratios between them.

On a shared machine absolute times spread by 33 to 79 %, ratios of neighbouring samples by 18 to
25 %: what is compared is measured in turn, and the median of the pairwise ratios is reported.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

Clock = Callable[[], float]  # seconds
Sampler = Callable[[], float]  # takes one sample: seconds a call

_SHORTEST = 200e-6  # seconds of a sample: shorter calls are repeated within it
_LONG = 1.0  # seconds of a warm-up that may count as a sample
_MOST_ROUNDS = 100


class Samples(NamedTuple):
    """Seconds a call by the number of the round in which it was measured."""

    by_round: dict[int, float]

    @property
    def median(self) -> float:
        return statistics.median(self.by_round.values())

    @property
    def us(self) -> list[float]:
        return [1e6 * seconds for seconds in self.by_round.values()]


def times_faster(subject: Samples, peer: Samples) -> float:
    """The median, over the rounds that both took part in, of peer's time over subject's."""
    shared = subject.by_round.keys() & peer.by_round.keys()
    return statistics.median(peer.by_round[r] / subject.by_round[r] for r in shared)


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection between the samples."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def wall_sampler(
    run: Callable[[], Any],
    *,
    grad: bool = False,
    first_counts: bool = False,
    clock: Clock = time.perf_counter,
) -> Sampler:
    """Wall time of `run`, warmed up here. Results live until the clock has stopped.

    A large result is fresh memory at each call, as it is for a user: the allocator returns it to
    the system when it is dropped. With `first_counts`, for a `run` that compiles nothing, a warm-up
    of more than a second is the first sample: there is no time to call it again for nothing.
    """
    loops = 0
    kept: list[float] = []

    def timed(repeats: int) -> float:
        with torch.set_grad_enabled(grad):
            start = clock()
            for _ in range(repeats):
                result = run()
            elapsed = clock() - start
            del result
        return elapsed

    def sample() -> float:
        return kept.pop() if kept else timed(loops) / loops

    first = timed(1)
    if first_counts and first > _LONG:
        kept.append(first)
        loops = 1
    else:
        once = timed(1)
        loops = max(1, min(10_000, round(_SHORTEST / once))) if once > 0 else 10_000
    return sample


def _rounds(cost: float, share: float, least: int) -> int:
    rounds = int(share / cost) if cost > 0 else _MOST_ROUNDS
    if rounds < least and least * cost > 4 * share:
        return 1  # a peer of seconds a call: one sample shows the order of magnitude
    return min(max(rounds, least), _MOST_ROUNDS)


def interleave(
    samplers: dict[str, Sampler],
    *,
    seconds: float,
    least: int = 3,
    clock: Clock = time.perf_counter,
) -> dict[str, Samples]:
    """Samples taken in turn within about `seconds`; the first sampler takes part in every round.

    The order within a round rotates. A sampler that is too slow for every round takes part in
    evenly spaced ones, at least in `least`, or in one where that alone would take too long.
    """
    names = list(samplers)
    share = seconds / len(names)
    cost, first = {}, {}
    for name, sampler in samplers.items():
        start = clock()
        first[name] = sampler()
        cost[name] = max(clock() - start, first[name])  # a sample may be one taken before
    rounds = max(_rounds(cost[names[0]], share, least), 1)
    turns = {name: min(_rounds(cost[name], share, least), rounds) for name in names}
    turns[names[0]] = rounds
    taken: dict[str, dict[int, float]] = {name: {} for name in names}
    for name in names[1:]:
        if turns[name] == 1:  # the round that told what a sample costs is the one it takes part in
            turns[name] = 0
            taken[name][-1], taken[names[0]][-1] = first[name], first[names[0]]
    with quiet():
        for r in range(rounds):
            offset = r % len(names)
            for name in names[offset:] + names[:offset]:
                if (r + 1) * turns[name] // rounds > r * turns[name] // rounds:
                    taken[name][r] = samplers[name]()
    return {name: Samples(by_round) for name, by_round in taken.items()}
