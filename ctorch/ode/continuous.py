"""The continuous adjoint: gradients from the adjoint equation, solved backwards beside the state.

With a = dL/dy, a' = -a df/dy, and the cotangents of parameters and time are integrals of -a df/dp
and -a df/dt (Pontryagin et al., 1962; Chen, Rubanova, Bettencourt, Duvenaud, "Neural Ordinary
Differential Equations", 2018).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch._exceptions import GradientError
from ctorch.ode.capture import Captured, discover, hooks_waiting
from ctorch.ode.field import Stage, UnexpectedGraph
from ctorch.ode.layout import Layout
from ctorch.ode.methods import check_method
from ctorch.ode.problem import Problem, default_norm
from ctorch.ode.run import Run
from ctorch.ode.sweep import audit_again

if TYPE_CHECKING:
    from ctorch.ode.solve import Request


@dataclasses.dataclass(frozen=True)
class ContinuousAdjoint:
    """``gradient=ContinuousAdjoint(...)``: how the adjoint equation is solved.

    Its gradient has an error of its own, governed by the tolerances, and y is solved backwards from
    the stored outputs, which is unstable where the forward problem is strongly dissipative;
    "checkpoint" has neither problem.

    Attributes:
        rtol, atol, method: of the backward solve; None: those of the forward one.
        norm: None (the largest of the norms of time, state, adjoint and each parameter's
            cotangent), "seminorm" (without the parameters; Kidger, Chen, Lyons, "Hey, that's not an
            ODE", 2021) or a callable of (t, y, a, *params).
        params: tensors to differentiate in; None: every tensor that func uses.
        options: of the backward solve; None: those of the forward one, but for the norm.

    Example:
        >>> import torch, ctorch
        >>> rate = torch.tensor(0.5, requires_grad=True)
        >>> adjoint = ctorch.ode.ContinuousAdjoint(rtol=1e-5, norm="seminorm")
        >>> t = torch.tensor([0.0, 2.0])
        >>> sol = ctorch.solve_ode(lambda t, y: -rate * y, torch.ones(1), t, gradient=adjoint)
        >>> sol.y[-1].sum().backward()
        >>> print(f"{rate.grad.item():.3f}")
        -0.736
    """

    rtol: Any = None
    atol: Any = None
    method: str | None = None
    norm: Any = None
    params: Sequence[Tensor] | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.method is not None:
            check_method(self.method)
        if self.params is not None:
            if isinstance(self.params, Tensor):
                raise TypeError(
                    "params (adjoint_params) must be a sequence of tensors, but is one: use (x,)."
                )
            object.__setattr__(self, "params", tuple(self.params))
            for p in self.params:
                if not isinstance(p, Tensor):
                    raise TypeError(
                        f"params (adjoint_params) must hold tensors, but holds {type(p).__name__}."
                    )


def solve(
    request: Request, problem: Problem, forward: Callable[[Stage | None], Run]
) -> tuple[Run, Tensor]:
    """Solve forward without a graph and attach the adjoint.

    Args:
        request: the solve as asked for.
        problem: normalized.
        forward: solves; takes the first evaluation if there is one already.

    Returns:
        The run and its rows with their graph.
    """
    given = (
        request.gradient if isinstance(request.gradient, ContinuousAdjoint) else ContinuousAdjoint()
    )
    first, params, complete = _parameters(problem, given)
    leaves = problem.y0.requires_grad or problem.t.requires_grad
    try:
        # where nothing is known to require grad, a slope with a graph is to be noticed
        with torch.set_grad_enabled(complete and not (leaves or params)):
            run = forward(first)
    except UnexpectedGraph as surprise:
        t, y = surprise.stage.t.detach().clone(), surprise.stage.y.detach().clone()
        _, found = discover(lambda: problem.field.record(t, y), [t, y], ())
        params = Captured(found).tensors
        with torch.no_grad():
            run = forward(first)
    if not (leaves or params):
        return run, run.rows
    backward = _Backward(request, problem, run, given, params, complete)
    rows, event_t = _Adjoint.apply(backward, run, problem.y0, problem.t, *params)
    if run.fired is not None:
        run.event_tensor = event_t
    return run, rows


def _parameters(
    problem: Problem, given: ContinuousAdjoint
) -> tuple[Stage | None, tuple[Tensor, ...], bool]:
    if given.params is not None:
        listed = given.params
        wanted = tuple(p for p in listed if p.requires_grad)
        norm = given.norm or (given.options or {}).get("norm")
        if len(wanted) != len(listed) and callable(norm):
            warnings.warn(
                "An adjoint parameter was passed without requiring gradient. For efficiency this"
                " will be excluded from"
                " the adjoint pass, and will not appear as a tensor in the adjoint norm.",
                stacklevel=5,
            )
        return None, wanted, False
    if problem.random:
        return None, (), True
    t, y = problem.time(problem.times[0]), problem.y0.detach()
    field = problem.field
    stage, found = discover(lambda: field.record(t, y), [t, y], (field.func, field.args))
    module = field.func
    own = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
    captured = Captured([*own, *found])
    plain = Stage(stage.t.detach(), stage.y.detach(), stage.k.detach())
    return plain, captured.tensors, True


class _Backward:
    """Everything that the backward pass needs."""

    def __init__(
        self,
        request: Request,
        problem: Problem,
        run: Run,
        given: ContinuousAdjoint,
        params: tuple[Tensor, ...],
        complete: bool,
    ) -> None:
        self.request, self.problem, self.run = request, problem, run
        self.params = params
        self.time_grad = problem.t.requires_grad
        self.audited = Captured(params) if complete else None
        self.method = given.method or request.method
        self.rtol = request.rtol if given.rtol is None else given.rtol
        self.atol = request.atol if given.atol is None else given.atol
        if given.options is None:
            self.options = {k: v for k, v in request.options.items() if k != "norm"}
            if self.method != request.method:
                self.options = {}
        else:
            self.options = dict(given.options)
        norm = given.norm if given.norm is not None else self.options.get("norm")
        self.default = self._default_norm
        self.options["norm"] = self._make_norm(norm)

    # -- norms
    # ----------------------------------------------------------------------------------------------

    def _state_norm(self, y: Tensor) -> Tensor:
        problem = self.problem
        state = problem.layout.unpack(y)
        if problem.norm is not None:
            return problem.users_norm(state)
        return default_norm(state, problem.max_norm)

    def _default_norm(self, parts: tuple[Tensor, ...]) -> Tensor:
        t, y, a, *params = parts
        norms = [t.abs(), self._state_norm(y), self._state_norm(a)]
        norms += [default_norm(p, False) for p in params]
        return torch.stack([n.to(y.dtype) for n in norms]).amax()

    def _make_norm(self, norm: Any) -> Callable[[tuple[Tensor, ...]], Tensor]:
        if norm is None:
            return self.default
        if norm == "seminorm":
            return lambda parts: self._default_norm(parts[:3])
        if not callable(norm):
            raise ValueError(f'the adjoint norm must be callable or "seminorm", but is {norm!r}.')
        layout = self.problem.layout
        if layout.is_tensor:
            return norm
        leaves = torch.utils._pytree.tree_leaves

        def on_parts(parts: tuple[Tensor, ...]) -> Tensor:
            t, y, a, *params = parts
            return norm((t, *leaves(layout.unpack(y)), *leaves(layout.unpack(a)), *params))

        return on_parts

    # -- the solve
    # ----------------------------------------------------------------------------------------------

    def gradients(
        self, grad_rows: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Cotangents of y0, t and the parameters. Under ``no_grad``."""
        problem, run = self.problem, self.run
        rows, times = run.rows, list(problem.times)
        ends_at_event = run.fired is not None
        if run.fired is not None:
            times = [*times[: rows.shape[0] - 1], run.fired[0]]
        count = rows.shape[0]
        if run.failure is not None:  # the rows that were not reached are constants
            count = int(torch.isfinite(rows.reshape(count, -1)).all(1).sum())
            if not count:
                return grad_rows[0], None, [torch.zeros_like(p) for p in self.params]
        initial = sum(t == times[0] for t in times[:count])
        field = problem.field
        sums = [torch.zeros_like(_real(p)) for p in self.params]
        time_bar = [0.0] * count
        zero = torch.zeros((), dtype=problem.layout.dtype, device=problem.layout.device)
        a = grad_rows[count - 1].clone()
        before = field.nfe
        with field.recomputing():
            for i in range(count - 1, initial - 1, -1):
                if self.time_grad:
                    slope = field.value(problem.time(times[i]), rows[i].clone()).k
                    moved = torch.dot(slope.reshape(-1), grad_rows[i].reshape(-1))
                    zero = zero - moved
                    time_bar[i] = float(moved)
                if times[i] != times[i - 1]:
                    zero, a, sums = self._interval(
                        times[i], times[i - 1], rows[i], zero, a, sums, options
                    )
                a = a + grad_rows[i - 1]
            for i in range(initial - 1, 0, -1):
                a = a + grad_rows[i - 1]
        run.stats.nfe_backward += field.nfe - before
        field.nfe = before
        time_bar[0] = float(zero)
        t_bar = None
        if self.time_grad:
            t_bar = torch.zeros_like(problem.t)
            kept = count - 1 if ends_at_event else count
            t_bar[:kept] = torch.tensor(time_bar[:kept], dtype=t_bar.dtype, device=t_bar.device)
        params = [
            (torch.view_as_complex(s) if p.is_complex() else s).to(p.dtype)
            for s, p in zip(sums, self.params, strict=True)
        ]
        return a, t_bar, params

    def _interval(
        self,
        start: float,
        end: float,
        y: Tensor,
        time_bar: Tensor,
        a: Tensor,
        sums: list[Tensor],
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        from ctorch.ode.solve import Request

        state = (time_bar, y, a, *sums)
        layout = Layout(state)
        options = dict(options)
        if (
            options.get("norm") is self.default
            and self.problem.norm is None
            and not self.problem.layout.is_complex
        ):
            # the same norm as the kernels take it: parts of the state apart
            del options["norm"]
            parts = self.problem.layout.segments or [y.numel()]
            layout.segments = [1, *parts, *parts, *[s.numel() for s in sums]]
        t = torch.tensor([start, end], dtype=torch.float64, device=y.device)
        request = Request(
            _Augmented(self),
            state,
            t,
            self.method,
            self.rtol if not isinstance(self.rtol, (tuple, list)) else self._parts(self.rtol, sums),
            self.atol if not isinstance(self.atol, (tuple, list)) else self._parts(self.atol, sums),
            options,
            layout,
            controller=self.request.controller,
            gradient="none",
            torchdiffeq=self.request.torchdiffeq,
        )
        if not self.request.torchdiffeq and self.request.dt0 is not None:
            request.dt0 = self.request.dt0
        run, rows, _ = request.solve()
        if run.failure is not None:
            message = f"in the backward pass (continuous adjoint): {run.failure.message}"
            run.failure.message = message + ' gradient="checkpoint" needs no backward solve.'
            run.failure.raise_()
        time_bar, _, a, *sums = layout.unpack(rows[-1])
        return time_bar, a, list(sums)

    def _parts(self, tolerance: Any, sums: list[Tensor]) -> Any:
        """One tolerance for each part of the user's state, as tolerances of the augmented state."""
        layout = self.problem.layout
        sizes = layout.segments or [self.problem.y0.numel()]
        per_part = [
            torch.as_tensor(x, dtype=layout.dtype).expand(n)
            if torch.as_tensor(x).dim() == 0
            else torch.as_tensor(x).reshape(-1)
            for x, n in zip(tolerance, sizes, strict=True)
        ]
        flat = torch.cat(per_part)
        smallest = float(flat.min())
        return (smallest, flat, flat, *[smallest] * len(sums))


class _Augmented:
    """The augmented vector field; carries the user's adjoint callbacks."""

    def __init__(self, backward: _Backward) -> None:
        self._backward = backward
        for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
            callback = getattr(backward.problem.field.func, f"{name}_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        backward = self._backward
        y, a = state[1], state[2]
        field = backward.problem.field
        record = field.record_with_time if backward.time_grad else field.record
        stage = record(t.detach().clone(), y.detach().clone())
        k = stage.k
        if backward.audited is not None:
            audit_again(backward.audited, field, stage)
        zeros = [torch.zeros_like(s) for s in state[3:]]
        if not k.requires_grad:
            return (torch.zeros_like(t), k, torch.zeros_like(a), *zeros)
        inputs = [stage.y, *([stage.t] if backward.time_grad else []), *backward.params]
        backward.run.stats.vjps += 1
        with torch.enable_grad():
            # what func holds may have been computed, by a graph that every evaluation shares
            grads = list(
                torch.autograd.grad(k, inputs, -a.to(k.dtype), retain_graph=True, allow_unused=True)
            )
        vjp_y = grads.pop(0)
        vjp_t = grads.pop(0) if backward.time_grad else None
        sums = [z if g is None else _real(g) for g, z in zip(grads, zeros, strict=True)]
        return (
            torch.zeros_like(t) if vjp_t is None else vjp_t,
            k.detach(),
            torch.zeros_like(a) if vjp_y is None else vjp_y,
            *sums,
        )


class _Adjoint(torch.autograd.Function):
    """Rows of a solve, whose backward pass solves the adjoint equation."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, backward: _Backward, run: Run, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.solve = backward
        #: read when the backward pass runs, so that it can be changed until then
        ctx.adjoint_options = backward.options
        ctx.save_for_backward(*inputs)
        when = run.fired[0] if run.fired is not None else backward.problem.times[-1]
        return run.rows.view_as(run.rows), run.rows.new_full((), when, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise GradientError(
                "the continuous adjoint cannot be differentiated again (create_graph=True): use"
                ' gradient="backprop" or "checkpoint", or odeint.'
            )
        _ = ctx.saved_tensors  # raises as usual where the graph was freed
        with hooks_waiting(ctx.solve.params):
            y0, t, params = ctx.solve.gradients(grad_rows, ctx.adjoint_options)
        return (None, None, y0, t, *params)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x
