"""Step control of a batch whose samples step on their own, as fused operators.

The host sees nothing of a sample but through one number of flags for each step; all else stays in
two matrices, with a column for each sample, that the operators change in place:

- ``samples`` float64: ``TAU`` (time, as tau = direction * t, which increases), ``LENGTH`` (proposed
  for the next step), ``END`` (last time), ``DIRECTION`` of t, ``ERROR`` (norm of the last
  attempt), ``LOG_LAST`` and ``LOG_BEFORE`` (logarithms of the norms of the last two accepted
  steps);
- ``counts`` int64: ``FATE``, ``OUTPUT`` (index of the next output time), ``OUTPUT_BEFORE`` (the
  same before the last attempt), ``ACCEPTED`` and ``REJECTED``.

A step is a matrix float64 too: ``START`` (t), ``SIGNED`` (length with the sign of the direction)
and ``STOP`` (t at the end).

    step, lands, times = rk_plan(samples, counts, c, control, like)

plans the next step of every sample that is ``RUNNING``: its proposed length within the limits; a
step that would all but reach the last time ends there (``lands``). The others get a step of length
zero. ``times [S, *like.shape]`` are the times of stages with abscissae ``c``, in the dtype of
``like``; at the end of a step it is the number just before it.

    moved, flags = rk_judge(samples, counts, step, lands, error, goals, control)

accepts or rejects from the error norms ``[B]`` of the attempt, and moves on: time, proposed length,
history, counts and fates. A sample whose next step would be below the resolution of time is
``STUCK``, or ``WILD`` where its error norm was not finite. The step of a sample that did not move
is cut to length zero. ``goals [B, T]`` are the output times, increasing, in tau. ``flags`` [2]
int64 is all that the host has to read: bits ``MOVED`` (some sample did), ``INSIDE`` (some output
time lies strictly within a step), ``NOT_FINITE`` (some error norm was not) and ``BUSY`` (some
sample is still running), and the number of output times that were passed.

    y, k0 = rk_accept(moved, y, y1, k0, k1)

gives the states and slopes ``[B, ...]`` at which the next step starts.

    sample, index, theta, at_end = rk_outputs(counts, step, t, count)

lists these ``count`` outputs, sample by sample: the sample, the index of the time in ``t [B, T]``,
the fraction of the step at which it lies, and whether it is the step's end.

``control`` [11] float64 on the CPU: p, i, d, safety, min_factor, max_factor, never_shrinks and
order of the controller (see ``ctorch.ode.StepController``), then min_step, max_step, max_steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ctorch.ops._op import define

TAU, LENGTH, END, DIRECTION, ERROR, LOG_LAST, LOG_BEFORE = range(7)
FATE, OUTPUT, OUTPUT_BEFORE, ACCEPTED, REJECTED = range(5)
START, SIGNED, STOP = range(3)

#: fates: still on its way; at the last time; out of steps; step below the resolution of time, with
#: an error norm that is finite, or not
RUNNING, DONE, SPENT, STUCK, WILD = range(5)

MOVED, INSIDE, NOT_FINITE, BUSY = 1, 2, 4, 8

_TINY_ERROR = 1e-300
_LEAST_PAST = 1e-10
_LANDING_ROOM = 1.001


def plan(
    samples: Tensor, counts: Tensor, c: Tensor, control: Tensor, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``rk_plan`` in plain PyTorch."""
    min_step, max_step = control[8:10].tolist()
    tau, end, direction = samples[TAU], samples[END], samples[DIRECTION]
    running = counts[FATE] == RUNNING
    length = samples[LENGTH].clamp(min_step, max_step)
    lands = running & (tau + _LANDING_ROOM * length >= end)
    length = torch.where(running, torch.where(lands, end - tau, length), 0.0)
    stop = torch.where(lands, end, tau + length)
    t, h, t1 = direction * tau, direction * length, direction * stop
    before_end = torch.nextafter(t1.to(like.dtype), t.to(like.dtype))
    times = [
        before_end if x == 1.0 else (t if x == 0.0 else t + x * h).to(like.dtype)
        for x in c.tolist()
    ]
    shape = (len(times), *like.shape)
    stacked = torch.stack(times).reshape(shape) if times else like.new_empty(shape)
    return torch.stack([t, h, t1]), lands, stacked


def judge(
    samples: Tensor,
    counts: Tensor,
    step: Tensor,
    lands: Tensor,
    error: Tensor,
    goals: Tensor,
    control: Tensor,
) -> tuple[Tensor, Tensor]:
    """``rk_judge`` in plain PyTorch."""
    min_step, max_step, max_steps = control[8:].tolist()
    error = error.double()
    running, finite = counts[FATE] == RUNNING, torch.isfinite(error)
    length, tau, tau1 = step[SIGNED].abs(), samples[TAU], samples[DIRECTION] * step[STOP]
    # that of a least step which lands is longer by what is left over
    least = torch.where(lands, _LANDING_ROOM * min_step, torch.full_like(length, min_step))
    moved = running & ((error <= 1.0) | ((length <= least) & finite))
    factor = _factor(error, samples[LOG_LAST], samples[LOG_BEFORE], control)
    grown = torch.where(lands, torch.maximum(length * factor, samples[LENGTH]), length * factor)
    following = torch.where(moved, grown, length * factor.clamp_max(1.0))
    output = torch.searchsorted(goals, tau1.unsqueeze(1), right=True).squeeze(1)
    output = torch.where(moved, output, counts[OUTPUT])
    passed = output - counts[OUTPUT]
    row = torch.arange(goals.shape[1], device=goals.device)
    inside = (row >= counts[OUTPUT].unsqueeze(1)) & (row < output.unsqueeze(1))
    inside &= goals < tau1.unsqueeze(1)

    counts[OUTPUT_BEFORE] = counts[OUTPUT]
    counts[OUTPUT] = output
    counts[ACCEPTED] += moved
    counts[REJECTED] += running & ~moved
    spent = (counts[ACCEPTED] + counts[REJECTED]) >= max_steps
    at, ahead = torch.where(moved, tau1, tau), following.clamp(min_step, max_step)
    stuck = frozen(at, ahead, samples[END])
    fate = torch.where(spent, SPENT, RUNNING)
    fate = torch.where(stuck, torch.where(finite | moved, STUCK, WILD), fate)
    fate = torch.where(moved & lands, DONE, fate)
    counts[FATE] = fate = torch.where(running, fate, counts[FATE])

    log = error.clamp_min(_LEAST_PAST).log()
    samples[LOG_BEFORE] = torch.where(moved, samples[LOG_LAST], samples[LOG_BEFORE])
    samples[LOG_LAST] = torch.where(moved, log, samples[LOG_LAST])
    samples[ERROR] = torch.where(running, error, samples[ERROR])
    samples[LENGTH] = torch.where(running, following, samples[LENGTH])
    samples[TAU] = torch.where(running, at, tau)
    rejected = running & ~moved
    step[STOP] = torch.where(rejected, step[START], step[STOP])
    step[SIGNED] = torch.where(rejected, 0.0, step[SIGNED])
    found = {
        MOVED: moved,
        INSIDE: inside,
        NOT_FINITE: rejected & ~finite,
        BUSY: fate == RUNNING,
    }
    bits = sum(bit * where.any().long() for bit, where in found.items())
    return moved, torch.stack([torch.as_tensor(bits), passed.sum()])


def frozen(tau: Tensor, length: Tensor, end: Tensor) -> Tensor:
    """Which samples a step of that length leaves where they are."""
    return ~((tau + length > tau) | (tau + _LANDING_ROOM * length >= end))


def accept(moved: Tensor, y: Tensor, y1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
    """``rk_accept`` in plain PyTorch."""
    mask = moved.view(-1, *[1] * (y.dim() - 1))
    return torch.where(mask, y1, y).contiguous(), torch.where(mask, k1, k0).contiguous()


def outputs(
    counts: Tensor, step: Tensor, t: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``rk_outputs`` in plain PyTorch."""
    at = torch.arange(t.shape[1], device=t.device)
    passed = (at >= counts[OUTPUT_BEFORE].unsqueeze(1)) & (at < counts[OUTPUT].unsqueeze(1))
    sample, index = passed.nonzero(as_tuple=True)
    if len(sample) != count:
        raise RuntimeError(f"rk_outputs: count is {count}, but the samples passed {len(sample)}")
    goal, start, stop = t[sample, index], step[START][sample], step[STOP][sample]
    theta = ((goal - start) / (stop - start)).clamp_max(1.0)
    return sample, index, theta, goal == stop


def _factor(error: Tensor, log_last: Tensor, log_before: Tensor, control: Tensor) -> Tensor:
    """By how much the step changes."""
    p, i, d, safety, least, most, never_shrinks, order = control[:8].tolist()
    accepted = error <= 1.0
    past = (p + 2 * d) / order * log_last - d / order * log_before
    power = -(p + i + d) / order * error.clamp_min(_TINY_ERROR).log()
    factor = safety * torch.exp(torch.where(accepted, power + past, power))
    if p == 0.0 and d == 0.0:
        at_least = torch.where((error < 1.0) & bool(never_shrinks), 1.0, least)
        factor = torch.maximum(factor, at_least)
    else:
        # the history of accepted steps says nothing on how to shorten a rejected one
        factor = torch.where(accepted, factor, factor.clamp_max(safety)).clamp_min(least)
    factor = torch.where(error == 0.0, most, factor.clamp_max(most))
    return torch.where(error < math.inf, factor, least)


def _fake_plan(
    samples: Tensor, counts: Tensor, c: Tensor, control: Tensor, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    step = samples.new_empty((3, samples.shape[1]))
    lands = samples.new_empty(samples.shape[1], dtype=torch.bool)
    return step, lands, like.new_empty((c.shape[0], *like.shape))


def _fake_judge(samples: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    moved = samples.new_empty(samples.shape[1], dtype=torch.bool)
    return moved, samples.new_empty(2, dtype=torch.int64)


def _fake_accept(moved: Tensor, y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape)


def _fake_outputs(
    counts: Tensor, step: Tensor, t: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sample, index = counts.new_empty(count), counts.new_empty(count)
    return sample, index, step.new_empty(count), step.new_empty(count, dtype=torch.bool)


rk_plan = define(
    "rk_plan(Tensor samples, Tensor counts, Tensor c, Tensor control, Tensor like) "
    "-> (Tensor step, Tensor lands, Tensor times)",
    plan,
    fake=_fake_plan,
)
rk_judge = define(
    "rk_judge(Tensor(a!) samples, Tensor(b!) counts, Tensor(c!) step, Tensor lands, Tensor error, "
    "Tensor goals, Tensor control) -> (Tensor moved, Tensor flags)",
    judge,
    fake=_fake_judge,
)
rk_accept = define(
    "rk_accept(Tensor moved, Tensor y, Tensor y1, Tensor k0, Tensor k1) "
    "-> (Tensor next_y, Tensor next_k)",
    accept,
    fake=_fake_accept,
)
rk_outputs = define(
    "rk_outputs(Tensor counts, Tensor step, Tensor t, int count) "
    "-> (Tensor sample, Tensor index, Tensor theta, Tensor at_end)",
    outputs,
    fake=_fake_outputs,
)
