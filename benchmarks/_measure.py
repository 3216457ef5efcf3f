"""Measuring side by side: every case is called once a round, in shuffled order, in one process."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Report:
    """What one solve did.

    Attributes:
        y: the final state, as NumPy array.
        gradients: gradients of the loss, y0's first; None for a forward solve.
        nfe: calls of the vector field, forward.
        nfe_backward: calls of it in the backward pass.
        vjps: its vector-Jacobian products, where the solver counts them.
        accepted, rejected: steps (of the slowest sample, where each has its own).
    """

    y: np.ndarray | None = None
    gradients: list[np.ndarray] | None = None
    nfe: int | None = None
    nfe_backward: int | None = None
    vjps: int | None = None
    accepted: int | None = None
    rejected: int | None = None


@dataclass
class Case:
    """One solver on one problem.

    Attributes:
        name: "package: method, variant".
        run: performs the solve; timed.
        describe: turns what ``run`` returned into a Report; it may solve once more to count.
        differentiates: whether the backward pass is in it.
    """

    name: str
    run: Callable[[], Any]
    describe: Callable[[Any], Report]
    differentiates: bool = False
    report: Report = field(default_factory=Report)
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    calls: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / self.median


@dataclass(frozen=True)
class Ratio:
    """How many times faster one case is than another: ratio of medians, quartiles over rounds."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Case, fast: Case) -> Ratio:
        rounds = min(len(slow.seconds), len(fast.seconds))
        each = np.array(slow.seconds[:rounds]) / np.array(fast.seconds[:rounds])
        low, high = np.percentile(each, [25, 75])
        return cls(slow.median / fast.median, float(low), float(high))


def interleave(
    cases: Sequence[Case],
    rounds: int,
    *,
    shortest: float,
    clock: str = "wall",
    seed: int = 0,
    least: float = 0.0,
    patience: float = math.inf,
) -> list[Case]:
    """Warm up, describe, then time all cases in shuffled rounds.

    Args:
        cases: what to compare; one that fails is reported and left out.
        rounds: least number of rounds.
        shortest: seconds one timing should last at least; short solves are repeated within it.
        clock: "wall"; or "cpu", this process's processor time: with one thread it is the fairer one
            on a machine that others use.
        seed: of the order.
        least: seconds for which rounds go on: short solves get many, so that the median outlasts
            the moods of a machine that others use.
        patience: seconds after which a case is timed no more, once it has been three times.

    Returns:
        The cases that ran, with ``report`` and ``seconds`` filled.
    """
    alive = []
    for case in cases:
        try:
            _warm_up(case, shortest)
        except Exception as error:  # a peer that fails must not end the others' run
            print(f"  {case.name}: FAILED, {type(error).__name__}: {str(error)[:300]}", flush=True)
        else:
            alive.append(case)
    order = list(alive)
    shuffle = random.Random(seed)
    end, done = time.perf_counter() + least, 0
    while order and (done < rounds or time.perf_counter() < end):
        done += 1
        shuffle.shuffle(order)
        gc.collect()
        for case in order:
            case.seconds.append(timed(case.run, case.calls, clock))
        order = [
            case
            for case in order
            if len(case.seconds) < 3 or sum(case.seconds) * case.calls <= patience
        ]
    return alive


def _warm_up(case: Case, shortest: float) -> None:
    case.first = timed(case.run)
    result = case.run()
    case.report = case.describe(result)
    del result
    case.calls = max(1, int(shortest / max(timed(case.run), 1e-6)))


def timed(fn: Callable[[], Any], calls: int = 1, clock: str = "wall") -> float:
    """Seconds per call."""
    now = CLOCKS[clock]
    start = now()
    for _ in range(calls):
        fn()
    return (now() - start) / calls


def held_bytes(fn: Callable[[], Any]) -> int:
    """Bytes of tensors that what ``fn`` returned keeps alive, by torch's own account.

    Every allocation and release of torch's CPU allocator during the call is summed, so that graphs,
    saved tensors and tensors kept in plain Python attributes count alike, whoever made them.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = fn()
        gc.collect()
    events = profiler.profiler.kineto_results.events()
    total = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del result
    return total
