"""What came of a compiled solve, as a ``Run``."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

from torch import Tensor

from ctorch.ode.problem import Problem
from ctorch.ode.run import (
    UNKNOWN,
    Run,
    failure_of,
    failure_of_sample,
    late_failure,
)
from ctorch.ode.solution import Stats, Status


@dataclasses.dataclass
class Outcome:
    """What a compiled solve returned.

    Attributes:
        rows: the states at the output times, in the shape that was asked for.
        numbers: [8, B] int64: evaluations, accepted, rejected, status, the bits of time, step
            and error norm at the end, and the number with the largest error (``failure_of``); of
            one sample, where nobody wants a tensor, an array. The last may be missing.
        failed: how many samples failed.
    """

    rows: Tensor
    numbers: Any
    failed: int

    def counts(self) -> list[int]:
        """Evaluations, accepted and rejected steps, status of the first sample."""
        numbers = self.numbers
        return (numbers.select(1, 0).tolist() if isinstance(numbers, Tensor) else numbers)[:4]

    def end(self, sample: int) -> tuple[float, float, float, int]:
        """Where a sample's solve ended: time, step, error norm, number with the largest error."""
        numbers = self.numbers
        if isinstance(numbers, Tensor):
            numbers = numbers.select(1, sample).tolist()
        t, h, error = struct.unpack("3d", struct.pack("3q", *numbers[4:7]))
        return t, h, error, numbers[7] if len(numbers) > 7 else UNKNOWN


def joint_run(problem: Problem, rows: Tensor, outcome: Outcome) -> Run:
    """The outcome of a solve with one step for all."""
    nfe, accepted, rejected, status = outcome.counts()
    run = Run(rows, [], rows, Stats(nfe, accepted, rejected))
    if outcome.failed:
        if status == 0:  # of samples that take the same steps, another one failed
            status = int(outcome.numbers[3].max())
        t, h, error, worst = outcome.end(0)
        steps = accepted + rejected
        if math.isnan(h) and status == Status.NONFINITE:  # steps of given lengths, which run on
            run.failure = late_failure(problem, rows)
        else:
            run.failure = failure_of(problem, problem.y0, Status(status), t, h, error, steps, worst)
        run.status = run.failure.status
    return run


def batched_run(problem: Problem, rows: Tensor, outcome: Outcome) -> Run:
    """The outcome of a solve in which every sample stepped on its own."""
    nfe, accepted, rejected, status = outcome.numbers[:4]
    run = Run(rows, [], rows, Stats(nfe, accepted, rejected), status)
    if outcome.failed:

        def ends(sample: int) -> tuple[float, float, float, int, int]:
            t, h, error, worst = outcome.end(sample)
            return t, h, error, int(accepted[sample] + rejected[sample]), worst

        run.failure = failure_of_sample(problem, status, ends)
    return run
