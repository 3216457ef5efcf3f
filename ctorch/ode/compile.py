"""``ctorch.ode.compile``: a native solve as a function, without the cost of a call to solve_ode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctorch import codegen
from ctorch._eager import eager
from ctorch.codegen import Traced
from ctorch.codegen.graph import as_reals
from ctorch.codegen.trace_problem import Problem, environment
from ctorch.ode import arguments, methods, native
from ctorch.ode.layout import Layout
from ctorch.ode.native_again import Again, again
from ctorch.ode.native_outcome import batched_run, joint_run
from ctorch.ode.native_task import Task
from ctorch.ode.solution import Solution, Stats
from ctorch.ode.solve import Request
from ctorch.ode.transforms import transforms_active


def compile(func: Callable[..., Any], *, batched: bool = False, **settings: Any) -> CompiledSolve:
    """A vector field and a solver as one program.

    Args:
        func, batched: as for ``ctorch.solve_ode``.
        **settings: its further arguments that hold for every call: method, rtol, atol, controller,
            max_steps, dt0, options.

    Returns:
        A function of (y0, t, *args), which returns a ``Solution``. It compiles at its first call,
        and again where the shape or dtype of y0 is new, or what ``func`` was traced with changed.

    Raises:
        TypeError: an unknown setting. When called: what ``solve_ode(native=True)`` raises.

    Example:
        >>> import torch, ctorch
        >>> solve = ctorch.ode.compile(lambda t, y: -y, rtol=1e-6, atol=1e-8)
        >>> sol = solve(torch.ones(2), torch.tensor([0.0, 1.0]))
    """
    unknown = set(settings) - _SETTINGS
    if unknown:
        raise TypeError(
            f"compile got unknown settings {sorted(unknown)}; there are {sorted(_SETTINGS)}."
        )
    return CompiledSolve(func, batched, settings)


#: Where objects change from call to call, the short way is prepared again after so many of them.
_RARELY = 256
_SETTINGS = {"method", "rtol", "atol", "controller", "max_steps", "dt0", "options"}


class CompiledSolve:
    """What ``compile`` returns."""

    def __init__(self, func: Callable[..., Any], batched: bool, settings: dict[str, Any]) -> None:
        arguments.check_func(func)
        self.func, self.batched = func, batched
        self._settings = settings
        self._known: dict[Any, _Prepared] = {}
        self._times: tuple[Any, ...] = (None, None, None)
        self._again: Again | None = None
        self._calls, self._patience = 0, 1  # calls on the long way, and after how many to look anew

    def __call__(self, y0: Tensor, t: Tensor, *args: Any) -> Solution:
        """Solve from y0 at t[0] to the times t, as ``ctorch.solve_ode`` does."""
        solution = None if self._again is None else self._again(y0, t, *args)
        return self._solve(y0, t, args) if solution is None else solution

    def _solve(self, y0: Tensor, t: Tensor, args: tuple[Any, ...]) -> Solution:
        """The long way, on which everything is looked at."""
        if not isinstance(y0, Tensor):
            raise native.Unsupported(
                "a state of several tensors is not built natively yet: use native=False."
            )
        if not isinstance(t, Tensor):  # which is an error
            t = arguments.check_times(t, y0.device, strict=False, batched=self.batched)
        times = self._checked(y0, t)
        key = (y0.shape, y0.dtype, y0.device, t.shape, environment())
        prepared = self._known.get(key)
        found = None if prepared is None else prepared.tensors_now(y0, args)
        if prepared is None or found is None:
            prepared = self._known[key] = self._prepare(y0, t, args)
            found = prepared.tensors_of(prepared.traced.shared, prepared.traced.problem)
            self._patience = 1
        solution = prepared.solve(y0, t, times, *found)
        self._calls += 1
        if self._calls >= self._patience:
            self._calls, self._patience = 0, min(2 * self._patience, _RARELY)
            self._again = prepared.again(y0, t, args) or self._again
        return solution

    def _checked(self, y0: Tensor, t: Tensor) -> Tensor:
        """The times in float64; looked at once while they do not change."""
        known, copy, times = self._times
        if known is t and torch.equal(t, copy):  # they may change behind torch's back
            return times
        checked = arguments.check_times(t, y0.device, strict=False, batched=self.batched)
        times = checked.detach().double().contiguous()
        self._times = (t, t.detach().clone(), times)
        return times

    @eager
    def _prepare(self, y0: Tensor, t: Tensor, args: tuple[Any, ...]) -> _Prepared:
        layout = Layout(y0, self.batched)
        chosen = dict(self._settings)
        options = dict(chosen.pop("options", None) or {})
        steps = chosen.pop("max_steps", None)
        if steps is not None:
            options["max_num_steps"] = steps
        method = methods.check_method(chosen.pop("method", None))
        rtol, atol = chosen.pop("rtol", 1e-6), chosen.pop("atol", 1e-8)
        request = Request(
            self.func, y0.detach(), t.detach(), method, rtol, atol, options, layout, args,
            gradient="none", native=True, **chosen,
        )  # fmt: skip
        return _Prepared(request)


class _Prepared:
    """A compiled solve for states of one shape."""

    def __init__(self, request: Request) -> None:
        self.problem = problem = request.problem()
        native.check_supported(request, problem)
        y0, self.batched = problem.y0, request.layout.batched
        self.traced = traced = codegen.trace(
            request.func, request.y0, problem.t, request.args, batched=self.batched
        )
        self.batch = native.batch_of(problem, traced)
        form = native.form_of(request, problem, traced, self.batch)
        special = native.looked_at_for(request, problem) or problem.norm is not None
        if form.tolerances or special or request.method in methods.FIXED:
            raise native.Unsupported(
                "compile with fixed steps, with step_t, jump_t or a norm of your own, or with a"
                " tensor as rtol or atol, is not built yet: use solve_ode(native=True)."
            )
        self.function = native.library_of(traced, form).ct_solve
        self.task = bytes(native.settings(problem))
        self.dtype = request.layout.dtype
        # of shared arrays; the guards see to it that this stays so
        self.alike = all(x.dtype is y0.dtype and x.device == y0.device for x in traced.shared)
        self.pairs = request.layout.is_complex
        self.sizes = (self.batch, traced.dim)
        self.rows_shape = native.rows_shape(y0, request.t, self.batched)

    def tensors_now(
        self, y0: Tensor, args: tuple[Any, ...]
    ) -> tuple[list[Tensor], Tensor | None] | None:
        """The arrays that samples share, and what they have for themselves, as they are now; None
        where func or args are not what was compiled.
        """
        traced = self.traced
        problem = traced.problem
        if args or problem.args_spec is not None:
            problem = Problem(problem.func, y0, problem.t, args, self.batched)
            if problem.key != traced.problem.key:
                return None
        shared = traced.field.shared_of(problem)
        return None if shared is None else self.tensors_of(shared, problem)

    def again(self, y0: Tensor, t: Tensor, args: tuple[Any, ...]) -> Again | None:
        """The short way for calls like this one, if there is one."""
        if self.batch > 1 or self.batched or self.pairs or not y0.is_cpu:
            return None
        if not all(isinstance(x, Tensor) for x in args):
            return None
        problem = Problem(self.traced.problem.func, y0, t, args, batched=False)
        return again(self.function, self.task, self.traced.field, problem, t)

    def tensors_of(
        self, shared: list[Tensor], problem: Problem
    ) -> tuple[list[Tensor], Tensor | None]:
        """The same of a problem whose shared arrays are known."""
        field = self.traced.field
        return shared, Traced(field, shared, problem).own if field.own_size else None

    def solve(
        self, y0: Tensor, given_t: Tensor, t: Tensor, shared: list[Tensor], own: Tensor | None
    ) -> Solution:
        """Make the call; ``t``: the times given, in float64."""
        device = y0.device
        if transforms_active():
            raise native.Unsupported(
                "compiled solves know no torch.func transforms and no forward-mode AD: use"
                " solve_ode."
            )
        if torch.is_grad_enabled():
            inputs = [y0, given_t, *shared, *([] if own is None else [own])]
            if any(x.requires_grad for x in inputs):
                raise native.Unsupported(
                    "gradients of compiled solves are not built yet: call it under torch.no_grad()."
                )
        start = as_reals(y0) if self.pairs else y0
        if not start.is_contiguous():
            start = start.contiguous()
        if own is not None:
            own = native.plain(own, self.dtype, device)
        if not (self.alike and all(map(_is_contiguous, shared))):
            shared = [native.plain(x, self.dtype, device) for x in shared]
        outcome = native.execute(
            self.function, Task.from_buffer_copy(self.task), self.sizes, self.rows_shape, start, t,
            own, shared, not self.batched,
        )  # fmt: skip
        if not (self.batched or outcome.failed):
            nfe, accepted, rejected, _ = outcome.counts()
            return Solution(t, self._rows(outcome.rows), Stats(nfe, accepted, rejected))
        made = batched_run if self.batched else joint_run
        run = made(self.problem, outcome.rows, outcome)
        solution = Solution(t, self._rows(run.rows), run.stats, run.status)
        if run.failure is not None:
            solution.message = run.failure.message
            run.failure.raise_(solution)
        return solution

    def _rows(self, rows: Tensor) -> Tensor:
        return torch.view_as_complex(rows) if self.pairs else rows


_is_contiguous = Tensor.is_contiguous
