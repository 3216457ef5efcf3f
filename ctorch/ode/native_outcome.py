"""What came of a compiled solve, as a ``Run``."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

from torch import Tensor

from ctorch.ode.problem import Problem
from ctorch.ode.run import (
    Failure,
    Run,
    max_steps_failure,
    nonfinite_failure,
    short_failure,
    underflow_failure,
)
from ctorch.ode.solution import Stats, Status


@dataclasses.dataclass
class Outcome:
    """What a compiled solve returned.

    Attributes:
        rows: the states at the output times, in the shape that was asked for.
        numbers: [7, B] int64: evaluations, accepted, rejected, status, and the bits of time, step
            and error norm at the end; of one sample, where nobody wants a tensor, an array.
        failed: how many samples failed.
    """

    rows: Tensor
    numbers: Any
    failed: int

    def counts(self) -> list[int]:
        """Evaluations, accepted and rejected steps, status of the first sample."""
        numbers = self.numbers
        return (numbers.select(1, 0).tolist() if isinstance(numbers, Tensor) else numbers)[:4]

    def end(self, sample: int) -> tuple[float, float, float]:
        """Where a sample's solve ended: time, step, error norm."""
        numbers = self.numbers
        if isinstance(numbers, Tensor):
            numbers = numbers.select(1, sample).tolist()
        t, h, error = struct.unpack("3d", struct.pack("3q", *numbers[4:]))
        return t, h, error


def joint_run(problem: Problem, rows: Tensor, outcome: Outcome) -> Run:
    """The outcome of a solve with one step for all."""
    nfe, accepted, rejected, status = outcome.counts()
    run = Run(rows, [], rows, Stats(nfe, accepted, rejected))
    if outcome.failed:
        if status == 0:  # of samples that take the same steps, another one failed
            status = int(outcome.numbers[3].max())
        run.status = Status(status)
        t, h, error = outcome.end(0)
        if accepted + rejected == 0 and t + h == t:
            run.failure = short_failure(t, h)
            run.status = run.failure.status
        else:
            run.failure = _failure(problem, run.status, t, h, error)
    return run


def _failure(problem: Problem, status: Status, t: float, h: float, error: float) -> Failure:
    if status is Status.MAX_STEPS:
        return max_steps_failure(problem, t, h, error)
    # of steps of a fixed length, which ran on, there is no number
    if math.isnan(h) or not bool(problem.y0.isfinite().all()):
        return nonfinite_failure(t, 0.0 if math.isnan(h) else h, "the state y")
    if status is Status.STEP_UNDERFLOW or not math.isfinite(error):
        return underflow_failure(problem, t, h, error, None)
    return nonfinite_failure(t, h, "the state y")


_CAUSES = {
    Status.MAX_STEPS: "max_steps was reached: loosen the tolerances or raise max_steps",
    Status.STEP_UNDERFLOW: "underflow in dt: the error test asks for a step below the resolution"
    " of time (a jump of the field, too tight tolerances for the dtype, a blow-up, or a stiff"
    " problem)",
    Status.NONFINITE: "the vector field or the state is not finite (underflow in dt): evaluate func"
    " there",
}


def batched_run(problem: Problem, rows: Tensor, outcome: Outcome) -> Run:
    """The outcome of a solve in which every sample stepped on its own."""
    nfe, accepted, rejected, status = outcome.numbers[:4]
    run = Run(rows, [], rows, Stats(nfe, accepted, rejected), status)
    if outcome.failed:
        sample = int(status.ne(0).nonzero()[0])
        t, h, error = outcome.end(sample)
        cause = Status(int(status[sample]))
        others = f" {outcome.failed} of {len(status)} samples failed." if outcome.failed > 1 else ""
        message = (
            f"sample {sample}: {_CAUSES[cause]}; t={t:.9g}, step h={h:.3e}, error norm"
            f" {error:.3g}.{others} With throw=False the other samples' solutions are returned,"
            " with a status for each."
        )
        run.failure = Failure(cause, message, t, h, error)
    return run
