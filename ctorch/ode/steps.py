"""What a solve keeps of an accepted step, and how the ends of steps hang on the user's times."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ctorch.ode.field import Stage

#: a step's end moves with its start: its length is a frozen number
FREE = -1
#: a step's end is a constant (a time in step_t or jump_t): its length changes with its start
FIXED = -2
#: in place of a row's time: an event's, which is a constant to the solve
EVENT = -3


@dataclasses.dataclass(slots=True)
class Step:
    """One accepted step from ``t`` to ``t1 = t + h``.

    In a batched solve ``t``, ``h`` and ``t1`` are [B] float64 and ``moved`` says which samples took
    the step.

    Attributes:
        t, h, t1: start, signed length, end.
        y: packed state at the start, without graph.
        start: index of the user's time at which the step starts, or FREE: where the step before it
            ended.
        end: index of the user's time on which the step ends, FREE or FIXED. Batched: [B] int64 or
            FREE.
        fresh: the first slope was evaluated anew, not taken over from the step before.
        stages: the graphs of the stages, where they are kept (``gradient="backprop"``); None:
            recomputed.
        outputs: (index of the user's time, theta) of what this step's interpolant returned; theta
            None is the end. Batched: ``Rows``.
        extended: the interpolant's further stages were evaluated.
        rng: random states before the evaluation of every stage, where the field draws random
            numbers.
    """

    t: Any
    h: Any
    t1: Any
    y: Tensor
    start: int = FREE
    end: Any = FREE
    fresh: bool = False
    stages: list[Stage] | None = None
    outputs: Any = dataclasses.field(default_factory=list)
    extended: bool = False
    moved: Tensor | None = None
    rng: list[Any] | None = None


@dataclasses.dataclass(slots=True)
class Rows:
    """Outputs of one batched step: sample [M], index of its time [M], theta [M] and whether it is
    the step's end.
    """

    sample: Tensor
    index: Tensor
    theta: Tensor
    exact: Tensor


def forget_lost(steps: list[Step], failed: Tensor, like: Tensor) -> None:
    """Of the samples of a batch that failed, ``failed`` [B], undo the steps behind their last
    outputs.

    Nothing is read from those, but they may lead up to where the field has no derivative: 0 times
    an infinite one is NaN.
    """
    if not steps:
        return
    read = torch.full_like(failed, -1, dtype=torch.int64)  # by sample: its last step with outputs
    for number, step in enumerate(steps):
        if isinstance(step.outputs, Rows):
            read[step.outputs.sample] = number
    columns = (-1, *[1] * (like.dim() - 1))
    y, t = steps[0].y, steps[0].t
    for number, step in enumerate(steps):
        lost = failed & (read < number)
        y = torch.where(lost.view(columns), y, step.y)
        t = torch.where(lost, t, step.t)
        if bool(lost.any()):
            step.y, step.t, step.stages = y, t, None
            step.t1, step.h = torch.where(lost, t, step.t1), torch.where(lost, 0.0, step.h)
            assert step.moved is not None  # as of all steps of a batch
            step.moved = step.moved & ~lost


def random_state(device: torch.device) -> Any:
    """The state of the generators that a field on ``device`` may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(device: torch.device, states: Any) -> None:
    """Put back what ``random_state`` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
