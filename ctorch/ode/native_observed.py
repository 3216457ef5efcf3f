"""Native solves whose steps are looked at: events, the continuous solution, steps that end on given
times.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch.codegen import Traced, Untraceable, trace_values
from ctorch.ode import methods
from ctorch.ode.native import Call, Outcome, Unsupported, plain
from ctorch.ode.native_source import Form
from ctorch.ode.problem import Problem
from ctorch.ode.run import Pieces, Run, endless_failure
from ctorch.ode.solution import Status

if TYPE_CHECKING:
    from ctorch.ode.solve import Request


class Observation(ctypes.Structure):
    """See csrc/native/observed.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("stops", "jumps")],
        ("stop_count", ctypes.c_int64),
        ("fixed_step", ctypes.c_double),
        ("shared", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("until_event", "dense")],
        ("pieces", ctypes.c_void_p),
        ("piece_count", ctypes.c_int64),
        ("event_time", ctypes.c_double),
        *[(name, ctypes.c_int64) for name in ("event", "rows")],
    ]


class ObservedCall(Call):
    """A native solve whose steps are looked at.

    Attributes:
        watched: the trace of the event functions, if there are any.
        observation: what is asked of the compiled solve, and what it found.
    """

    spare = 1  # of the event

    def __init__(self, request: Request, problem: Problem, traced: Traced) -> None:
        self.observation = Observation(until_event=request.until_event, dense=request.dense)
        self.fired: tuple[float, int] | None = None
        self.total = request.coefficients().total
        self.watched, self._events, count = _trace_events(request, problem)
        super().__init__(request, problem, traced)
        self.task.observation = ctypes.addressof(self.observation)
        _prepare(self.library, self.watched, count)
        if request.method in methods.ADAPTIVE:
            knots = problem.knots(ends=not problem.overshoot)
            stops = torch.tensor([tau for tau, _, _ in knots], dtype=torch.float64)
            jumps = torch.tensor([jumps for _, _, jumps in knots], dtype=torch.int64)
            self.observation.stops, self.observation.jumps = stops.data_ptr(), jumps.data_ptr()
            self.observation.stop_count = len(knots)
            self._held += [stops, jumps]
        if self.watched is not None:
            arrays = [plain(x, request.layout.dtype) for x in self.watched.shared]
            pointers = _pointers(arrays)
            self.observation.shared = ctypes.addressof(pointers)
            self._held += [arrays, pointers]

    def _form(self) -> Form:
        return dataclasses.replace(super()._form(), entry="solve_observed", events=self._events)

    def _give_knots(self, knots: Callable[[], Iterator[tuple[float, int]]]) -> None:
        request = self.request
        if request.until_event and request.options.get("grid_constructor") is None:
            step = request.options.get("step_size", request.dt0)
            assert step is not None  # else there were no knots
            self.observation.fixed_step, start = float(step), self.problem.times[0]
            knots = lambda: iter([(start, 0)])  # noqa: E731
        super()._give_knots(knots)

    def _check_gradient(self, own: Tensor) -> bool:
        if not super()._check_gradient(own):
            return False
        what = "dense=True" if self.request.dense else "jump_t" if self.problem.jump_t else ""
        if self.problem.t.requires_grad:
            what = "events or step_t, in t"
        if what:
            raise Unsupported(
                f"a gradient with {what} is not built natively yet: use native=False, or"
                ' gradient="none".'
            )
        return True

    def make(self) -> Outcome:
        """Make the call; where an event fired, the last of the times is its own from then on."""
        outcome, found = super().make(), self.observation
        if found.event >= 0:
            self.fired = (found.event_time, found.event)
            reached = self.t[: found.rows - 1]
            self.t = torch.cat([reached, reached.new_tensor([found.event_time])])
            self.task.t, self.task.rows = self.t.data_ptr(), found.rows
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


def _trace_events(request: Request, problem: Problem) -> tuple[Traced | None, str, int]:
    """The trace of the event functions, ``struct Events``, and how many elements they have."""
    if not request.events:
        return None, "using Events = ct::native::NoEvents;", 0
    functions = [event.fn for event in request.events]
    try:
        traced, sizes = trace_values(functions, request.y0, problem.t.detach()[0], request.args)
    except Untraceable as error:
        raise Unsupported(f"events are not built natively, for {error}") from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Unsupported(f"events cannot be traced: {error}") from error
    event, direction = [], []
    for index, (given, size) in enumerate(zip(request.events, sizes, strict=True)):
        event += [index] * size
        direction += [given.direction] * size
    if not event:
        raise Unsupported("an event without elements is not built natively: use native=False.")
    constants = [
        f"long count = {len(event)}",
        f"int event[] = {{{', '.join(map(str, event))}}}",
        f"int direction[] = {{{', '.join(map(str, direction))}}}",
    ]
    lines = [f"  static constexpr {constant};" for constant in constants]
    names = ["namespace events {", traced.source, "}  // namespace events"]
    source = "\n".join([*names, "struct Events : events::Field {", *lines, "};"])
    return traced, source, len(event)


def _prepare(library: Any, watched: Traced | None, count: int) -> None:
    """Compare the compiled event functions with those that they were made from, once."""
    if getattr(library, "ct_prepared", False):
        return
    pointer = ctypes.c_void_p
    library.ct_take.restype, library.ct_take.argtypes = None, [pointer] * 5
    library.ct_events.restype = None
    library.ct_events.argtypes = [ctypes.c_double, *[pointer] * 3]

    def evaluate(t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
        arrays = [plain(x, y.dtype) for x in shared]
        y, values = y.contiguous(), y.new_empty(1, count)
        library.ct_events(float(t), y.data_ptr(), _pointers(arrays), values.data_ptr())
        return values

    if watched is not None:
        watched.verify(evaluate)
    library.ct_prepared = True


def _pointers(arrays: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*[x.data_ptr() for x in arrays])
