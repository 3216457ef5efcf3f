"""``solve_ode``: an initial value problem in, its solution out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch._eager import eager
from ctorch._exceptions import ArgumentError, ArgumentTypeError
from ctorch.ode import (
    adams,
    arguments,
    batched_taylor,
    continuous,
    implicit,
    methods,
    scipy_solver,
    taylor,
)
from ctorch.ode import batched as batched_solve
from ctorch.ode import native as native_solve
from ctorch.ode.arguments import number
from ctorch.ode.coefficients import coefficients
from ctorch.ode.continuous import ContinuousAdjoint
from ctorch.ode.control import StepController, make_controller
from ctorch.ode.discrete import Job, solve_differentiably, solve_without_gradient
from ctorch.ode.events import Event, Watch, link
from ctorch.ode.field import VectorField
from ctorch.ode.fixed import endless_knots, grid_knots
from ctorch.ode.layout import Layout
from ctorch.ode.problem import Problem
from ctorch.ode.progress import progress_bar
from ctorch.ode.run import Run
from ctorch.ode.solution import EventRecord, Solution
from ctorch.ode.steps import FIXED
from ctorch.ode.transforms import transforms_active

GRADIENTS = ("backprop", "checkpoint", "adjoint", "reversible", "none")


@eager
def solve_ode(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    method: str = "dopri5",
    rtol: Any = 1e-6,
    atol: Any = 1e-8,
    gradient: str | ContinuousAdjoint = "checkpoint",
    batched: bool = False,
    controller: StepController | str | None = None,
    events: Event | Callable[..., Tensor] | Sequence[Event | Callable[..., Tensor]] | None = None,
    dense: bool = False,
    save: str = "t",
    max_steps: int | None = None,
    dt0: float | None = None,
    args: tuple[Any, ...] = (),
    options: dict[str, Any] | None = None,
    native: bool | str | None = None,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """Solve y' = func(t, y, *args), y(t[0]) = y0.

    The vector field is never evaluated outside [t[0], t[-1]], and the solve ends exactly on t[-1].

    Args:
        func: ``func(t, y, *args)`` returns dy/dt, of the shape(s) of ``y``. ``t`` is a 0-dim tensor
            of the state's (real) dtype; in a batched solve it is [B, 1, ..., 1], shaped to
            broadcast against ``y``.
        y0: initial state: a floating or complex tensor of any shape, or a pytree (tuple, list,
            dict) of tensors.
        t: [T] times at which the solution is wanted, increasing or decreasing, repeats allowed; the
            first is the initial time. With ``batched`` also [B, T].
        method: one of ``ctorch.ode.METHODS``; "dopri5", "tsit5", "vern7" and "dopri8" suit most
            problems, the latter two at tight tolerances; "bdf2" suits stiff ones.
        rtol, atol: tolerances of the local error: numbers, tensors that broadcast to y0, or (pytree
            y0) one for each part. An element's scale is atol + rtol * max(|y|, |y1|); a step is
            accepted where the norm of the scaled error is at most 1. Ignored by fixed-step methods,
            but for the iterations of implicit ones.
        gradient: "checkpoint" (exact; keeps the accepted states and recomputes one step at a time:
            the memory of the states and of a single step), "backprop" (exact; keeps the graphs of
            the accepted stages: faster, more memory), "adjoint" or ``ContinuousAdjoint(...)``
            (solves the adjoint equation backwards: as exact as its tolerances, memory of the
            outputs), or "none". The exact ones are the derivative of the steps as they were taken,
            step sizes held fixed, and can be differentiated again.
        batched: every sample (first dimension) steps on its own, with its own error control;
            adaptive methods and "taylor" only.
        controller: of the step size: "i" (default), "pi" (default of a batched solve), "pid" or a
            ``StepController``.
        events: function(s) ``g(t, y, *args)`` or ``Event``s; the solve ends at the first zero
            crossing, where the outputs end as well: ``sol.t`` and ``sol.y`` hold the times before
            the event and the event itself.
        dense: also return the continuous solution: ``sol(t)``.
        save: "t".
        max_steps: limit on attempted steps (default 1,000,000; per solve).
        dt0: first step of an adaptive method (default: found by Hairer's rule); the step of a
            fixed-step one (default: the grid ``t``), which is shortened so that steps end on every
            time in ``t``.
        args: further arguments of ``func`` and the events; gradients reach tensors in them.
        options: keys of torchdiffeq's ``options``: norm, step_t, jump_t, min_step, max_step,
            safety, ifactor, dfactor, grid_constructor, perturb, ...; of implicit methods also
            root_finder ("newton", "jacobi_newton", "functional"), diagonal, batch_dims, root_tol,
            max_iters.
        native: True: field and solver run as one compiled program (the first solve takes seconds,
            later ones find it in a cache on disk), or an error says why they cannot; "try": the
            same, with a warning and an eager solve where they cannot; False: eager; None: what
            ``ctorch.native_solves`` says, without it False.
        progress: show a progress bar.
        throw: raise ``ctorch.SolveError`` where the solve fails; else return what was reached, with
            ``status`` set.

    Returns:
        ``Solution`` with ``t``, ``y`` [T, *shape] ([B, T, *shape] batched), ``stats``, ``status``,
        ``event``.

    Raises:
        ctorch.SolveError: (a RuntimeError) step underflow, non-finite values or too many steps;
        says where. TypeError, ValueError: bad arguments, or a wrong shape or dtype returned by
        ``func``. NotImplementedError: something not built yet, named.

    Example:
        >>> import torch, ctorch
        >>> sol = ctorch.solve_ode(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]))
        >>> sol.y[-1]
        tensor([0.3679, 0.3679])
    """
    arguments.check_func(func)
    args = arguments.check_args(args)
    _check_unbuilt(gradient, save)
    native = native_solve.check_mode(native)
    key = None
    if native and events is None and not (dense or progress):
        from ctorch.ode import native_quick

        settings = (method, max_steps, dt0, controller, batched, gradient)
        key = native_quick.key_of(y0, rtol, atol, options, *settings)
        if key is not None:
            done = native_quick.solve(key, func, y0, t, args, batched, gradient != "none")
            if done is not None:
                return done
    method = methods.check_method(method)
    layout = Layout(y0, batched)
    t = arguments.check_times(t, layout.device, strict=False, batched=batched)
    options = arguments.as_options(options)
    dt0 = arguments.first_step(dt0)
    if max_steps is not None:
        options["max_num_steps"] = arguments.step_limit(max_steps)
    request = Request(
        func, y0, t, method, rtol, atol, options, layout, args,
        controller=controller, events=_events(events), dense=dense, dt0=dt0, gradient=gradient,
        native=native,
    )  # fmt: skip
    request.key = key
    with progress_bar(progress, t) as bar:
        run, rows, problem = request.solve(bar)
    solution = _solution(request, problem, run, rows, t)
    failure = run.failure
    if failure is not None:
        solution.message = failure.message
        if throw:
            failure.raise_(solution)
    return solution


def _check_unbuilt(gradient: Any, save: str) -> None:
    if (isinstance(gradient, str) and gradient not in GRADIENTS) or not isinstance(
        gradient, (str, ContinuousAdjoint)
    ):
        raise ValueError(
            f"gradient must be one of {GRADIENTS} or a ContinuousAdjoint, but is {gradient!r}."
        )
    if gradient == "reversible":
        raise NotImplementedError('gradient="reversible" is not built yet: use "checkpoint".')
    if save != "t":
        raise NotImplementedError(f'save={save!r} is not built yet: use save="t" or dense=True.')


def _events(events: Any) -> list[Event]:
    if events is None:
        return []
    given = [events] if isinstance(events, Event) or callable(events) else list(events)
    return [event if isinstance(event, Event) else Event(event) for event in given]


class Request:
    """A solve as asked for, by ``solve_ode`` or by ``odeint``; ``solve`` picks the machinery for
    it.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        y0: Any,
        t: Tensor,
        method: str,
        rtol: Any,
        atol: Any,
        options: dict[str, Any],
        layout: Layout,
        args: tuple[Any, ...] = (),
        *,
        controller: Any = None,
        events: Sequence[Event] = (),
        until_event: bool = False,
        dense: bool = False,
        dt0: float | None = None,
        gradient: Any = "backprop",
        torchdiffeq: bool = False,
        native: bool | str = False,
    ) -> None:
        self.func, self.args, self.y0, self.t = func, args, y0, t
        self.method, self.options, self.layout = method, options, layout
        self.rtol, self.atol = rtol, atol
        self.controller, self.events, self.until_event = controller, events, until_event
        self.dense, self.dt0, self.gradient = dense, dt0, gradient
        self.torchdiffeq, self.native = torchdiffeq, native
        self.key: Any = None  # of the way back to a native solve

    def solve(self, bar: Callable[[float], None] | None = None) -> tuple[Run, Tensor, Problem]:
        """Returns the run, its rows with their graph, and the problem."""
        if self.layout.batched:
            batched_solve.check_method(self)
        if self.native:
            done = native_solve.solve(self)
            if done is not None:
                return done
        if self.layout.batched:
            by_taylor = self.method in methods.TAYLOR
            return (batched_taylor if by_taylor else batched_solve).solve(self, bar)
        problem = self.problem()
        problem.progress = bar
        if problem.watch is not None:
            problem.watch.start(problem.times[0], problem.y0.detach())
        if self.method in methods.SCIPY:
            return (*self._scipy(problem), problem)
        if self.implicit:
            return implicit.solve(self, problem)
        if self.method in methods.ADAMS:
            return adams.solve(self, problem)
        if self.method in methods.TAYLOR:
            return taylor.solve(self, problem)
        job = Job(problem, self.coefficients(), self.knots(problem))
        if transforms_active():
            run = _run_plain(job)
            return run, run.rows, problem
        if not self.differentiates:
            run = solve_without_gradient(job)
            return run, run.rows, problem
        if self.adjoint:
            run, rows = continuous.solve(self, problem, lambda first: job.run(first, None))
            return run, rows, problem
        rows, run = solve_differentiably(job, graphs=self.gradient == "backprop")
        return run, rows, problem

    @property
    def differentiates(self) -> bool:
        """Whether a gradient may be asked for."""
        return torch.is_grad_enabled() and self.gradient != "none"

    @property
    def implicit(self) -> bool:
        """Whether the equations of implicit steps are solved by a root finder."""
        finder = self.options.get("root_finder")
        known = finder in (None, "functional") or self.method == "explicit_adams"
        return self.method in methods.BDF or (self.method in methods.ADAMS and not known)

    @property
    def adjoint(self) -> bool:
        """Whether the continuous adjoint is wanted."""
        return self.gradient == "adjoint" or isinstance(self.gradient, ContinuousAdjoint)

    def _scipy(self, problem: Problem) -> tuple[Run, Tensor]:
        if self.adjoint and self.differentiates:
            return continuous.solve(
                self, problem, lambda first: scipy_solver.solve(problem, self.options)
            )
        run = scipy_solver.solve(problem, self.options)
        return run, scipy_solver.without_gradient(problem, run) if self.differentiates else run.rows

    # -- what the machinery needs
    # ---------------------------------------------------------------------------------

    def problem(self) -> Problem:
        """Everything checked and normalized."""
        layout, options, method = self.layout, self.options, self.method
        times = [] if layout.batched else self.t.detach().tolist()
        direction = -1 if len(times) > 1 and times[-1] < times[0] else 1
        adaptive = method in methods.ADAPTIVE
        known = (
            arguments.ADAPTIVE_OPTIONS if adaptive
            else arguments.FIXED_OPTIONS if method in methods.FIXED
            else arguments.ADAMS_OPTIONS if method in methods.ADAMS
            else arguments.BDF_OPTIONS if method in methods.BDF
            else arguments.TAYLOR_OPTIONS if method in methods.TAYLOR
            else arguments.SCIPY_OPTIONS
        )  # fmt: skip
        if layout.batched or adaptive or method in methods.BDF:
            arguments.check_precision(layout, method)
        arguments.check_options(options, known, method, strict=not self.torchdiffeq)
        norm, max_norm = _norm(options.get("norm"))
        step_t, jump_t = arguments.special_times(options, direction)
        first = options.get("first_step") if self.dt0 is None else self.dt0
        supported = (
            ()
            if layout.batched
            else arguments.CALLBACKS
            if adaptive or method in methods.TAYLOR or method in methods.BDF
            else ()
            if method in methods.SCIPY
            else ("callback_step",)
        )
        field = VectorField(self.func, layout, self.args)
        problem = Problem(
            field=field,
            layout=layout,
            y0=layout.pack(self.y0).contiguous(),
            t=self.t,
            times=times,
            direction=direction,
            tolerances=arguments.make_tolerances(layout, self.y0, self.rtol, self.atol),
            controller=self._controller(),
            overshoot=self.torchdiffeq,
            norm=norm,
            max_norm=max_norm,
            first_step=None
            if first is None
            else number({"first_step": first}, "first_step", 0.0, True),
            min_step=number(options, "min_step", 0.0),
            max_step=number(options, "max_step", math.inf, positive=True),
            step_t=step_t,
            jump_t=jump_t,
            max_steps=_step_limit(options),
            perturb=bool(options.get("perturb", False)),
            dense=self.dense,
            callbacks=arguments.find_callbacks(self.func, supported, method),
        )
        if self.events:
            problem.watch = Watch(self.events, layout, self.args, self.until_event, problem.time)
        return problem

    def _controller(self) -> StepController:
        options = self.options
        chosen = self.controller
        if chosen is None and self.layout.batched:
            chosen = "pi"  # the sample with the most steps sets the cost: reject few
        controller = make_controller(chosen)
        if self.torchdiffeq:
            controller = dataclasses.replace(controller, never_shrinks=True)
        changes: dict[str, Any] = {
            mine: number(options, theirs, getattr(controller, mine))
            for mine, theirs in (
                ("safety", "safety"),
                ("max_factor", "ifactor"),
                ("min_factor", "dfactor"),
            )
            if theirs in options
        }
        if not changes:
            return controller
        return dataclasses.replace(controller, **changes)

    def coefficients(self) -> Any:
        """The method with the interpolant that this solve reads."""
        return coefficients(self.method, self.interpolant)

    @property
    def interpolant(self) -> str:
        """Name of the interpolant that this solve reads."""
        if self.method in methods.FIXED:
            default = "linear" if self.torchdiffeq else "cubic"
            linear = arguments.interpolation(self.options, default) == "linear"
            return "linear" if linear else "best"
        return "torchdiffeq" if self.torchdiffeq else "best"

    def polynomials(self, run: Run) -> Tensor:
        """The interpolant in which a run's continuous solution is written."""
        if self.method in methods.TAYLOR:
            return taylor.polynomials(run.pieces[0].k.shape[0])
        if self.implicit:
            return implicit.polynomials()
        return self.coefficients().p

    def knots(self, problem: Problem) -> Callable[[], Iterator[tuple[float, int]]] | None:
        """The grid of a fixed-step solve; None for an adaptive one."""
        if self.method in methods.ADAPTIVE:
            return None
        given = (self.options.get(key) for key in ("step_size", "grid_constructor"))
        if self.method in methods.BDF and all(value is None for value in given):
            return None
        options, times = self.options, problem.times
        step = options.get("step_size", self.dt0)
        constructor = options.get("grid_constructor")
        if constructor is not None:
            if step is not None:
                raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
            return self._constructed_knots(problem, constructor)
        if step is not None:
            step = number({"step_size": step}, "step_size", 0.0, positive=True)
        if self.until_event:
            if step is None:
                raise ArgumentError(
                    f'method {self.method!r} needs options={{"step_size": ...}} to look for an'
                    " event: it has no end time."
                )
            start, length, direction = times[0], step, problem.direction
            if "max_num_steps" not in options:
                problem.max_steps = 20_000
            return lambda: endless_knots(start, length, direction)
        return lambda: grid_knots(times, step, every=not self.torchdiffeq)

    def _constructed_knots(
        self, problem: Problem, constructor: Callable[..., Tensor]
    ) -> Callable[[], Iterator[tuple[float, int]]]:
        grid = constructor(self.func, self.y0, self.t)
        if not isinstance(grid, Tensor):
            raise ArgumentTypeError(
                f"grid_constructor must return a tensor of times, but returned"
                f" {type(grid).__name__}."
            )
        values = [float(x) for x in grid.detach().double().tolist()]
        times = problem.times
        if not values or values[0] != times[0] or values[-1] != times[-1]:
            given = f"[{values[0]}, ..., {values[-1]}]" if values else "[]"
            raise ArgumentError(
                f"grid_constructor must return a grid from t[0]={times[0]} to t[-1]={times[-1]},"
                f" but returned {given}."
            )
        arguments.check_times(grid, problem.layout.device, strict=False, batched=False)
        count = len(times)
        if grid.requires_grad or transforms_active():
            # the steps hang on the grid, which hangs on whatever it was made from
            problem.t = torch.cat([problem.t, grid.to(problem.t)])
            return lambda: iter([(v, count + i) for i, v in enumerate(values)])
        anchors = {0: 0, len(values) - 1: count - 1}
        return lambda: iter([(v, anchors.get(i, FIXED)) for i, v in enumerate(values)])


def _step_limit(options: dict[str, Any]) -> int:
    limit = options.get("max_num_steps")
    if limit is None:
        return 1_000_000
    return int(min(number({"max_num_steps": limit}, "max_num_steps", math.inf, True), 2**31 - 1))


def _run_plain(job: Job) -> Run:
    try:
        return job.run_plain()
    except RuntimeError as error:
        if "vmap" in str(error) and ".item()" in str(error):
            raise NotImplementedError(
                "an adaptive solve chooses its steps by the values of its state, which vmap hides:"
                " use batched=True"
                " (each sample steps on its own), or a fixed-step method."
            ) from error
        raise


def _norm(norm: Any) -> tuple[Any, bool]:
    if norm is None or norm == "rms":
        return None, False
    if norm == "max":
        return None, True
    if not callable(norm):
        raise TypeError(f'options["norm"] must be callable, "rms" or "max", but is {norm!r}.')
    return norm, False


def _solution(request: Request, problem: Problem, run: Run, rows: Tensor, t: Tensor) -> Solution:
    layout = problem.layout
    count = rows.shape[0] if not layout.batched else rows.shape[1]
    y = layout.unpack(rows, (count,))
    event = None
    times = t
    if run.fired is not None:
        when, index = run.fired
        fired = torch.tensor(when, dtype=t.dtype, device=t.device)
        last = pytree.tree_map(lambda x: x[-1], y)
        chosen = request.events[index].fn
        time, state = fired, last
        if torch.is_grad_enabled() and request.gradient != "none" and not transforms_active():
            time, state = link(
                lambda s, x: request.func(s, x, *request.args),
                lambda s, x: chosen(s, x, *request.args),
                fired.to(layout.dtype),
                last,
            )
        event = EventRecord(time, state, index)
        times = torch.cat([t[: count - 1], time.reshape(1).to(t)])
        y = pytree.tree_map(lambda x, s: torch.cat([x[:-1], s.unsqueeze(0)]), y, state)
    dense = run.dense_output(problem, request.polynomials) if request.dense else None
    return Solution(times, y, run.stats, run.status, event, dense)
