"""An initial value problem with its settings checked and normalized: what every integrator
reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctorch._exceptions import ArgumentError, ArgumentTypeError
from ctorch.ode.control import StepController
from ctorch.ode.field import VectorField
from ctorch.ode.layout import Layout
from ctorch.ode.steps import FIXED

Norm = Callable[[Any], Tensor]


@dataclasses.dataclass
class Tolerances:
    """Error tolerances as the kernels take them: 0-dim float64, or of the state's shape and
    dtype.
    """

    rtol: Tensor
    atol: Tensor

    def scale(self, y: Tensor) -> Tensor:
        """atol + rtol * abs(y), in the dtype of y."""
        return (self.atol + self.rtol * y.abs()).to(y.dtype)


@dataclasses.dataclass
class Problem:
    """y' = field(t, y) with y(times[0]) = y0, to be known at ``times``.

    Attributes:
        y0: packed initial state (may require grad).
        t: the user's times, [T] (may require grad); ``times`` are their values, float64.
        direction: +1 or -1. Integrators count in tau = direction * t, which increases.
        overshoot: torchdiffeq's way: the last step may end beyond the last time, whose value is
            interpolated.
        norm: norm of a user-shaped state, or None for the default (RMS; over the parts of a pytree,
            their maximum).
        step_t, jump_t: times in tau, increasing, at which steps end (and the field jumps).
        callbacks: functions of (t, y, h) by name.
        events: see ``events.Watch``.
        random: the field draws random numbers.
    """

    field: VectorField
    layout: Layout
    y0: Tensor
    t: Tensor
    times: list[float]
    direction: int
    tolerances: Tolerances
    controller: StepController
    overshoot: bool = False
    norm: Norm | None = None
    max_norm: bool = False
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    step_t: list[float] = dataclasses.field(default_factory=list)
    jump_t: list[float] = dataclasses.field(default_factory=list)
    max_steps: int = 2**31 - 1
    perturb: bool = False
    dense: bool = False
    callbacks: dict[str, Callable[..., None]] = dataclasses.field(default_factory=dict)
    watch: Any = None
    progress: Callable[[float], None] | None = None
    random: bool = False

    @property
    def time_dtype(self) -> torch.dtype:
        """Of the ``t`` that the vector field is given."""
        return self.layout.dtype

    def time(self, value: float) -> Tensor:
        """A time as the vector field takes it."""
        return torch.scalar_tensor(value, dtype=self.layout.dtype, device=self.layout.device)

    def follow(self, moving: Tensor, value: float) -> Tensor:
        """The time ``value`` as the vector field takes it, with the derivative of ``moving``."""
        exact = moving + (value - moving.detach())
        return exact.to(self.layout.device, self.layout.dtype)

    def knots(self, ends: bool) -> list[tuple[float, int, bool]]:
        """(tau, anchor, jumps) at which adaptive steps have to end, in order.

        Args:
            ends: the last of the user's times is one of them.
        """
        start, end = (self.direction * self.times[i] for i in (0, -1))
        given = ((self.step_t, False), (self.jump_t, True))
        knots = [(tau, FIXED, jumps) for at, jumps in given for tau in at if tau > start]
        if ends:
            knots = [knot for knot in knots if knot[0] < end]
            knots.append((end, len(self.times) - 1, False))
        return sorted(knots)

    def host_time(self, value: float) -> Tensor:
        """A time as callbacks take it: float64."""
        return torch.scalar_tensor(value, dtype=torch.float64)

    def call_back(self, name: str, t: float, y: Tensor, h: float) -> None:
        """Call the user's callback ``name``, if there is one."""
        callback = self.callbacks.get(name)
        if callback is not None:
            callback(self.host_time(t), self.layout.unpack(y), self.host_time(h))

    def error_norm(self, error: Tensor, scale: Tensor) -> Tensor:
        """The norm of an error relative to its scale, through the user's norm or for a complex
        state. 0-dim.
        """
        ratio: Any = self.layout.unpack(error / scale)
        if self.norm is not None:
            return self.users_norm(ratio)
        return default_norm(ratio, self.max_norm)

    def users_norm(self, state: Any) -> Tensor:
        """``norm`` of a user-shaped state. 0-dim.

        Raises:
            ArgumentError: it is not one number.
        """
        value = self._users(state, "one number")
        if value.numel() != 1:
            raise ArgumentError(
                f"options['norm'] must return one number, but returned shape {list(value.shape)}."
            )
        return value.abs().reshape(())

    def users_norms(self, state: Any, size: int) -> Tensor:
        """``norm`` of a batch of user-shaped states. [B] float64.

        Raises:
            ArgumentError: it is not one number for each sample.
        """
        value = self._users(state, f"one norm for each sample, [{size}]")
        if value.shape != (size,):
            raise ArgumentError(
                f"with batched=True options['norm'] must return one norm for each sample, [{size}],"
                f" but returned shape {list(value.shape)}."
            )
        return value.abs().double()

    def _users(self, state: Any, what: str) -> Tensor:
        assert self.norm is not None
        value = self.norm(state)
        if not isinstance(value, (Tensor, float, int)):
            raise ArgumentTypeError(f"options['norm'] must return {what}, but returned {value!r}.")
        return torch.as_tensor(value)

    def error_scale(self, y: Tensor, y1: Tensor) -> Tensor:
        """atol + rtol * max(|y|, |y1|); for a complex state through the modulus."""
        if self.layout.is_complex:
            y, y1 = torch.view_as_complex(y), torch.view_as_complex(y1)
            size = torch.maximum(y.abs(), y1.abs())
            scale = self.tolerances.atol + self.tolerances.rtol * size
            return scale.unsqueeze(-1)
        return self.tolerances.scale(torch.maximum(y.abs(), y1.abs()))


def default_norm(ratio: Any, max_norm: bool) -> Tensor:
    """RMS (or maximum) of a tensor; of a pytree the largest over its tensors. 0-dim."""
    leaves = [ratio] if isinstance(ratio, Tensor) else torch.utils._pytree.tree_leaves(ratio)
    norms = []
    for leaf in leaves:
        if leaf.numel():
            size = leaf.abs()
            norms.append(size.amax() if max_norm else size.square().mean().sqrt())
    return torch.stack(norms).amax() if norms else torch.zeros(())
