"""torchdiffeq's interface: ``odeint``, ``odeint_adjoint``, ``odeint_event``, ``odeint_dense``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch._eager import eager
from ctorch._exceptions import ArgumentError, ArgumentTypeError
from ctorch.ode import arguments, methods
from ctorch.ode.continuous import ContinuousAdjoint
from ctorch.ode.dense import as_time
from ctorch.ode.events import Event, link
from ctorch.ode.layout import Layout
from ctorch.ode.native import check_mode
from ctorch.ode.solve import Request

Func = Callable[[Tensor, Any], Any]


@eager
def odeint(
    func: Func,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
) -> Any:
    """Solve y' = func(t, y) with torchdiffeq's conventions; gradients by an exact discrete adjoint.

    As there, an adaptive solve may step beyond t[-1] and interpolates its outputs;
    ``ctorch.solve_ode`` does neither and offers more. Unlike there, gradients reach every tensor
    that ``func`` uses through one node of the graph.

    Args:
        func: ``func(t, y)``; t is a 0-dim tensor of the real dtype of y.
        y0: tensor of any shape, real or complex, or a tuple of tensors.
        t: [T], strictly increasing or decreasing; t[0] is the initial time.
        rtol, atol: tolerances: numbers, tensors that broadcast to y0, or for a tuple y0 one for
            each tensor.
        method: a name of ``ctorch.ode.METHODS``; None: "dopri5".
        options: of the method. Adaptive: norm, first_step, step_t, jump_t, min_step, max_step,
            safety, ifactor, dfactor, max_num_steps, dtype (accepted; time is always float64).
            Fixed-step: step_size or grid_constructor(func, y0, t), interp ("linear", "cubic"),
            perturb; Adams also max_order, max_iters. scipy_solver: solver, min_step, max_step. All:
            native (see ``solve_ode``).
        event_fn: ``event_fn(t, y)``: integrate from t[0] in the direction of t[1] until an element
            changes its sign.

    Returns:
        [T, *y0.shape], or a tuple of such; with event_fn: (event time, [2, *y0.shape]: start and
        event).

    Raises:
        ValueError, TypeError, AssertionError: bad arguments, of torchdiffeq's kinds.
        ctorch.SolveError: the solve failed (a RuntimeError and an AssertionError).

    Example:
        >>> import torch
        >>> from ctorch import odeint
        >>> odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]))[-1]
        tensor([0.3679, 0.3679])
    """
    return _solve(func, y0, t, rtol, atol, method, options, event_fn, "backprop")


@eager
def odeint_adjoint(
    func: Func,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Any = None,
) -> Any:
    """``odeint`` with gradients by the continuous adjoint equation, solved backwards (Chen et al.,
    2018).

    Memory does not grow with the number of steps; the gradient is as exact as the tolerances. For
    an exact gradient at nearly the same memory use ``ctorch.solve_ode(...,
    gradient="checkpoint")``.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn: as for ``odeint``.
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward solve; default: those of the
            forward one.
        adjoint_options: of the backward solve; default: ``options`` but for the norm. Its "norm"
            may be "seminorm" (leave the parameters' cotangents out; Kidger et al., 2021) or a
            function of (t, y, a, *params).
        adjoint_params: tensors to differentiate in; default, where func is a module: its
            parameters, and every other tensor that it uses.

    Returns:
        As ``odeint``.

    Raises:
        ValueError: func is no module and adjoint_params is missing; or adjoint_method differs from
            method, options are given and adjoint_options are not.

    Example:
        >>> import torch
        >>> from ctorch import odeint_adjoint
        >>> rate = torch.tensor(0.5, requires_grad=True)
        >>> t = torch.tensor([0.0, 2.0])
        >>> y = odeint_adjoint(lambda t, y: -rate * y, torch.ones(1), t, adjoint_params=(rate,))
        >>> y[-1].sum().backward()
        >>> rate.grad  # -2 exp(-1)
        tensor(-0.7358)
    """
    if adjoint_params is None and not isinstance(func, torch.nn.Module):
        raise ValueError(
            "func must be an instance of nn.Module to specify the adjoint parameters;"
            " alternatively they can be"
            " specified explicitly via the `adjoint_params` argument. If there are no parameters"
            " then it is allowable"
            " to set `adjoint_params=()`. ctorch.solve_ode finds the tensors that func uses by"
            " itself."
        )
    if (
        adjoint_method is not None
        and adjoint_method != method
        and options is not None
        and adjoint_options is None
    ):
        raise ValueError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`."
            " So as `options` has"
            " been passed then `adjoint_options` must be passed as well."
        )
    adjoint = ContinuousAdjoint(
        rtol=adjoint_rtol,
        atol=adjoint_atol,
        method=adjoint_method,
        options=adjoint_options,
        params=adjoint_params,
    )
    return _solve(func, y0, t, rtol, atol, method, options, event_fn, adjoint)


@eager
def odeint_event(
    func: Func,
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve until an event, with the derivative of the event's time (Chen, Amos, Nickel, 2021).

    Args:
        func, y0: as for ``odeint``.
        t0: 0-dim (or one-element) initial time.
        event_fn: ``event_fn(t, y)`` returns a tensor; the event is the first change of sign of an
            element.
        reverse_time: run backwards in time.
        odeint_interface: ``odeint`` or ``odeint_adjoint``.
        **kwargs: passed to it.

    Returns:
        (event time, solution [2, *y0.shape]): differentiable in y0, t0, what func holds, and what
        event_fn holds.

    Raises:
        TypeError: t0 is no tensor.
        ValueError: t0 holds more than one time.
        SolveError: the event did not fire within the limit on the steps, or the solve failed.

    Example:
        >>> import torch
        >>> from ctorch import odeint_event
        >>> level = torch.tensor(0.5, requires_grad=True)
        >>> t, y = odeint_event(
        ...     lambda t, y: -y, torch.ones(1), torch.tensor(0.0), event_fn=lambda t, y: y - level
        ... )
        >>> t.backward()
        >>> print(f"{t.item():.4f} {level.grad.item():.4f}")  # log 2, -1 / level
        0.6931 -2.0000
    """
    if not isinstance(t0, Tensor):
        raise ArgumentTypeError(f"t0 must be a torch.Tensor, but is {type(t0).__name__}.")
    if t0.numel() != 1:
        raise ArgumentError(f"t0 must hold one time, but has shape {list(t0.shape)}.")
    start = t0.reshape(1)
    toward = start.detach() + (-1.0 if reverse_time else 1.0)
    event_t, solution = odeint_interface(
        func, y0, torch.cat([start, toward]), event_fn=event_fn, **kwargs
    )
    last = pytree.tree_map(lambda x: x[-1], solution)
    if torch.is_grad_enabled():
        event_t, last = link(func, event_fn, event_t.detach(), last)
    solution = pytree.tree_map(lambda x, s: torch.cat([x[:-1], s.unsqueeze(0)]), solution, last)
    return event_t, solution


@eager
def odeint_dense(
    func: Func,
    y0: Any,
    t0: float | Tensor,
    t1: float | Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[Tensor], Any]:
    """The solution on [t0, t1] as a function of time.

    Args:
        func, y0, rtol, atol, method, options: as for ``odeint``; any Runge-Kutta method, any state.
        t0, t1: ends of the interval, in either order; numbers are taken in float64.

    Returns:
        ``fn(t)``: t a number (taken in float64) or a tensor of any shape [*S] inside the interval
        -> [*S, *y0.shape]. Differentiable.

    Example:
        >>> import torch
        >>> from ctorch import odeint_dense
        >>> y = odeint_dense(lambda t, y: -y, torch.ones(2), 0.0, 1.0)
        >>> y(0.5), y(torch.rand(3, 4)).shape
        (tensor([0.6065, 0.6065]), torch.Size([3, 4, 2]))
    """
    layout = Layout(y0)
    ends = [as_time(x).to(layout.device) for x in (t0, t1)]
    dtype = torch.promote_types(ends[0].dtype, ends[1].dtype)
    if not dtype.is_floating_point:
        dtype = torch.float64
    t = torch.stack([x.to(dtype).reshape(()) for x in ends])
    request = _request(func, y0, t, rtol, atol, method, options, None, "backprop", layout)
    request.dense = True
    run, _, problem = request.solve()
    if run.failure is not None:
        run.failure.raise_()
    dense = run.dense_output(problem, request.polynomials)
    return lambda t: dense(as_time(t))


def _solve(
    func: Func,
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: Any,
    options: Any,
    event_fn: Any,
    gradient: Any,
) -> Any:
    arguments.check_func(func)
    if not isinstance(y0, (Tensor, tuple)):
        raise ArgumentTypeError(
            f"y0 must be either a torch.Tensor or a tuple, but is {type(y0).__name__}."
        )
    layout = Layout(y0)
    request = _request(func, y0, t, rtol, atol, method, options, event_fn, gradient, layout)
    run, rows, _ = request.solve()
    if run.failure is not None:
        run.failure.raise_()
    solution = layout.unpack(rows, (rows.shape[0],))
    if event_fn is None:
        return solution
    return run.event_time(request.t), solution


def _request(
    func: Func,
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: Any,
    options: Any,
    event_fn: Any,
    gradient: Any,
    layout: Layout,
) -> Request:
    method = methods.check_method(method)
    if event_fn is not None and isinstance(t, Tensor) and t.dim() == 1 and len(t) != 2:
        raise ValueError(
            f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}."
        )
    t = arguments.check_times(t, layout.device, strict=True, batched=False)
    events = [] if event_fn is None else [Event(event_fn)]
    options = arguments.as_options(options)
    native = check_mode(options.pop("native", None))
    return Request(
        func,
        y0,
        t,
        method,
        rtol,
        atol,
        options,
        layout,
        events=events,
        until_event=bool(events),
        gradient=gradient,
        torchdiffeq=True,
        native=native,
    )
