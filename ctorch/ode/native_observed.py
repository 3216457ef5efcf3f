"""Native solves whose steps are looked at: events, the continuous solution, steps that end on given
times.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from ctorch.codegen import Traced
from ctorch.ode import methods
from ctorch.ode.events import nan_event
from ctorch.ode.native import Call, Outcome, Unsupported
from ctorch.ode.native_source import Form
from ctorch.ode.native_values import Values, traced_values
from ctorch.ode.problem import Problem
from ctorch.ode.run import Pieces, Run, endless_failure
from ctorch.ode.solution import Status

if TYPE_CHECKING:
    from ctorch.ode.solve import Request


class Observation(ctypes.Structure):
    """See csrc/native/observed.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("stops", "jumps", "anchors")],
        ("stop_count", ctypes.c_int64),
        ("fixed_step", ctypes.c_double),
        ("shared", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("until_event", "dense")],
        ("pieces", ctypes.c_void_p),
        ("piece_count", ctypes.c_int64),
        ("event_time", ctypes.c_double),
        *[(name, ctypes.c_int64) for name in ("event", "rows", "nan_event")],
    ]


class ObservedCall(Call):
    """A native solve whose steps are looked at.

    Attributes:
        events: the event functions, if there are any.
        observation: what is asked of the compiled solve, and what it found.
    """

    spare = 1  # of the event

    def __init__(self, request: Request, problem: Problem, traced: Traced) -> None:
        self.observation = Observation(until_event=request.until_event, dense=request.dense)
        self.fired: tuple[float, int] | None = None
        self.total = request.coefficients().total
        self.events = None
        if request.events:
            functions = [event.fn for event in request.events]
            self.events = traced_values("events", functions, request, problem, *request.args)
        super().__init__(request, problem, traced)
        self.task.observation = ctypes.addressof(self.observation)
        if self.form.device == "cpu":
            self.library.ct_take.restype = None
            self.library.ct_take.argtypes = [ctypes.c_void_p] * 5
        if request.method in methods.ADAPTIVE:
            knots = problem.knots(ends=not problem.overshoot)
            device = self.y0.device
            stops = torch.tensor([tau for tau, _, _ in knots], dtype=torch.float64, device=device)
            anchors, jumps = (
                torch.tensor([knot[i] for knot in knots], dtype=torch.int64, device=device)
                for i in (1, 2)
            )
            self.observation.stops, self.observation.jumps = stops.data_ptr(), jumps.data_ptr()
            self.observation.anchors, self.observation.stop_count = anchors.data_ptr(), len(knots)
            self._held += [stops, anchors, jumps]
        if self.events is not None:
            self.events.verify(self.library, "ct_events")
            self.observation.shared = ctypes.addressof(self.events.pointers)

    def _form(self) -> Form:
        events = _events_source(self.request, self.events)
        form = super()._form()
        entry = "solve_observed"
        if form.device != "cpu":  # of which samples that step together do all of it
            entry = "solve_fixed" if self.request.method in methods.FIXED else "solve_joint"
        return dataclasses.replace(form, entry=entry, events=events)

    def _give_knots(self, knots: Callable[[], Iterator[tuple[float, int]]]) -> None:
        request = self.request
        if request.until_event and request.options.get("grid_constructor") is None:
            step = request.options.get("step_size", request.dt0)
            assert step is not None  # else there were no knots
            self.observation.fixed_step, start = float(step), self.problem.times[0]
            knots = lambda: iter([(start, 0)])  # noqa: E731
        super()._give_knots(knots)

    def make(self) -> Outcome:
        """Make the call; where an event fired, the last of the times is its own from then on."""
        outcome, found = super().make(), self.observation
        if found.nan_event >= 0:
            raise nan_event(found.nan_event, found.event_time)
        if found.event >= 0:
            self.fired = (found.event_time, found.event)
            reached = self.t[: found.rows - 1]
            self.t = torch.cat([reached, reached.new_tensor([found.event_time])])
            self.task.t, self.task.rows = self.t.data_ptr(), found.rows
            self.task.has_event = 1
        return outcome

    def result(self, outcome: Outcome) -> Run:
        """What came of it, in the user's shapes."""
        outcome.rows = outcome.rows[: self.t.shape[-1]]
        run = super().result(outcome)
        run.fired = self.fired
        if run.failure is None and self.fired is not None:
            run.status = Status.EVENT
        stuck = run.failure
        if stuck is not None and stuck.status is Status.MAX_STEPS and math.isinf(stuck.step):
            run.failure = endless_failure(stuck.t, stuck.step, stuck.error_norm)
        if self.request.dense:
            run.attached = self._pieces()
        return run

    def _pieces(self) -> Pieces:
        count, y0, total = self.observation.piece_count, self.problem.y0, self.total
        starts, lengths = (torch.empty(count, dtype=torch.float64) for _ in range(2))
        y = y0.new_empty((count, *y0.shape))
        k = y0.new_empty((count, total, *y0.shape))
        arrays = [x.data_ptr() for x in (starts, lengths, y, k)]
        self.library.ct_take(ctypes.byref(self.observation), *arrays)
        return Pieces(starts, lengths, y.detach(), k.detach().transpose(0, 1).contiguous())


def _events_source(request: Request, events: Values | None) -> str:
    """``struct Events``."""
    if events is None:
        return "using Events = ct::native::NoValues;"
    if not events.count:
        raise Unsupported("an event without elements is not built natively: use native=False.")
    event, direction = [], []
    for index, (given, size) in enumerate(zip(request.events, events.sizes, strict=True)):
        event += [index] * size
        direction += [given.direction] * size
    return events.source(
        "Events", [f"int {name}[] = {{{', '.join(map(str, x))}}}"
                   for name, x in (("event", event), ("direction", direction))]
    )  # fmt: skip
