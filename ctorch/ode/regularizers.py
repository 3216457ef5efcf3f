"""Penalties, integrated beside the state, that make the solution of a learned ODE easy to compute.

A solver of order m takes few steps where the (m + 1)-th derivative of the solution is small; so
training punishes a total derivative of the state along its path. Kelly, Bettencourt, Johnson,
Duvenaud, "Learning Differential Equations that are Easy to Solve" (2020); Finlay, Jacobsen,
Nurbekyan, Oberman, "How to Train Your Neural ODE" (2020).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ctorch._numbers import as_int
from ctorch._trees import leaves_like
from ctorch.autodiff.jet import factorial
from ctorch.autodiff.series import taylor_series
from ctorch.ode.continuous import ContinuousAdjoint
from ctorch.ode.solution import Solution

Field = Callable[..., Any]


def taylor(order: int = 3, *, batch_dims: int = 1) -> Regularizer:
    """``R_K``: the integral of ``|d^K y / dt^K|^2 / dim`` along the solution.

    K = 2 or 3 serve solvers of order 5; K = 1 punishes the length of the path. The derivatives come
    from ``ctorch.taylor_series``: a regularized field costs K evaluations of the field itself. They
    are exact, and so is the gradient.

    Args:
        order: K >= 1.
        batch_dims: how many leading dimensions of the state count samples, each of which has a
            penalty of its own: 1 for ``[B, ...]``, 0 for a single state. ``dim`` is the number of
            elements of a sample.

    Returns:
        The regularizer: ``reg.solve(func, y0, t)``, or ``reg(func)`` as a field.

    Raises:
        TypeError: ``order`` is no int.
        ValueError: ``order`` is below 1.

    Example:
        >>> import torch, ctorch
        >>> field = lambda t, y: -y
        >>> reg = ctorch.ode.regularizers.taylor(order=2)
        >>> sol, penalty = reg.solve(field, torch.ones(4, 3), torch.tensor([0.0, 1.0]))
        >>> sol.y.shape, penalty.shape
        (torch.Size([2, 4, 3]), torch.Size([4]))
        >>> print(f"{penalty[0].item():.4f}")  # (1 - exp(-2)) / 2
        0.4323
    """
    number = as_int(order)
    if number is None:
        raise TypeError(f"order must be an int, but is {type(order).__name__}.")
    if number < 1:
        raise ValueError(f"order must be at least 1, but is {number}.")

    def penalty(func: Field, t: Any, y: Any) -> tuple[Any, Tensor]:
        series = taylor_series(func, t, y, number)
        slope = pytree.tree_map(lambda c: c[1], series)
        highest = pytree.tree_map(lambda c: factorial(number, c.dtype) * c[number], series)
        return slope, _mean_square(highest, batch_dims)

    return Regularizer(penalty, batch_dims)


def kinetic(*, batch_dims: int = 1) -> Regularizer:
    """The integral of ``|f(t, y)|^2 / dim``: straight paths, passed at constant speed (RNODE).

    Args:
        batch_dims: as for ``taylor``.
    """

    def penalty(func: Field, t: Any, y: Any) -> tuple[Any, Tensor]:
        slope = func(t, y)
        return slope, _mean_square(slope, batch_dims)

    return Regularizer(penalty, batch_dims)


def jacobian(*, batch_dims: int = 1) -> Regularizer:
    """The integral of ``|e^T df/dy|^2 / dim``, which estimates the Jacobian's size (RNODE).

    Its mean is the squared Frobenius norm. The probe e is standard normal, drawn when the
    regularized field is made (``Regularizer.solve``: once a solve) and constant along the path, so
    that the integrand is smooth.

    Args:
        batch_dims: as for ``taylor``.
    """

    def begin() -> Callable[..., tuple[Any, Tensor]]:
        probes: list[list[Tensor]] = []

        def penalty(func: Field, t: Any, y: Any) -> tuple[Any, Tensor]:
            leaves = pytree.tree_leaves(y)
            if not probes or [p.shape for p in probes[0]] != [leaf.shape for leaf in leaves]:
                probes[:] = [[torch.randn_like(leaf.detach()) for leaf in leaves]]
            spec = pytree.tree_structure(y)

            def slope_of(y: Any) -> Any:
                return pytree.tree_unflatten(leaves_like(func(t, y), spec), spec)

            slope, pull = cast(Any, torch.func.vjp)(slope_of, y)
            (pulled,) = pull(pytree.tree_unflatten(probes[0], spec))
            return slope, _mean_square(pulled, batch_dims)

        return penalty

    return Regularizer(None, batch_dims, begin)


class Regularizer:
    """A penalty to be integrated along the solutions of a vector field.

    ``solve`` does everything; for a module or another interface, take the parts:

        augmented = reg(func)
        y, r = solve_ode(augmented, reg.start(y0), t).y     # or odeint, or NeuralODE(augmented, t)
        loss = task(y[-1]) + weight * r[-1].mean()

    Args:
        penalty: ``penalty(func, t, y)`` returns the slope and the penalty's rate ``[*batch]``.
        batch_dims: see ``taylor``.
        begin: in place of ``penalty``: makes one for every regularized field.
    """

    def __init__(
        self,
        penalty: Callable[..., tuple[Any, Tensor]] | None,
        batch_dims: int = 1,
        begin: Callable[[], Callable[..., tuple[Any, Tensor]]] | None = None,
    ) -> None:
        number = as_int(batch_dims)
        if number is None or number < 0:
            raise ValueError(f"batch_dims must be an int, at least 0, but is {batch_dims!r}.")
        self.penalty, self.batch_dims, self.begin = penalty, number, begin

    def __call__(self, func: Field) -> Regularized:
        """The field of ``(y, r)``: the state's, and the rate of the penalty.

        Backward in time r falls, and the penalty is ``-r``; ``solve`` sees to the sign.
        """
        penalty = self.penalty if self.begin is None else self.begin()
        assert penalty is not None
        return Regularized(func, penalty)

    def start(self, y0: Any) -> tuple[Any, Tensor]:
        """The initial state of a regularized field.

        Args:
            y0: that of the field itself.

        Returns:
            ``(y0, zeros [*batch])``.
        """
        first = pytree.tree_leaves(y0)[0]
        shape = first.shape[: self.batch_dims]
        return y0, torch.zeros(shape, dtype=first.dtype.to_real(), device=first.device)

    def solve(self, func: Field, y0: Any, t: Tensor, **options: Any) -> tuple[Solution, Tensor]:
        """``solve_ode`` with the penalty beside the state.

        The penalty takes no part in the control of the step size, so that it does not make the
        solve dearer than the one that it is to make cheap.

        Args:
            func, y0, t: as for ``solve_ode``.
            options: further arguments of ``solve_ode``; ``rtol`` and ``atol`` are numbers. Any
                method but "taylor", which cannot differentiate what is a derivative already.

        Returns:
            The solution, of the state alone, and the penalty ``[*batch]`` over the whole interval.
        """
        from ctorch.ode.solve import solve_ode

        state = self.start(y0)
        tolerances = {}
        for name, default, free in (("rtol", 1e-6, 0.0), ("atol", 1e-8, math.inf)):
            given = options.get(name, default)
            tolerances[name] = ([given] * len(pytree.tree_leaves(y0)), free)
        changes: dict[str, Any] = {**options, **tolerances}
        adjoint = options.get("gradient")
        if adjoint == "adjoint" or isinstance(adjoint, ContinuousAdjoint):
            changes["gradient"] = _with_tolerances(adjoint, options)
        sol = solve_ode(self(func), state, t, **changes)
        y, r = sol.y
        r = r[:, -1] if options.get("batched") else r[-1]
        forward = (t[..., -1] - t[..., 0]).sign().to(r.device, r.dtype)  # dt < 0 costs as much
        r = r * forward.reshape((*forward.shape, *(1,) * (r.ndim - forward.ndim)))
        dense = sol.dense
        changed = dataclasses.replace(
            sol, y=y, dense=None if dense is None else lambda t: dense(t)[0]
        )
        return changed, r


class Regularized(nn.Module):
    """A vector field of ``(y, r)``, where r is a penalty's integral; made by a ``Regularizer``.

    Args:
        func: ``func(t, y, *args)``; the parameters of a module are this one's too.
        penalty: see ``Regularizer``.
    """

    def __init__(self, func: Field, penalty: Callable[..., tuple[Any, Tensor]]) -> None:
        super().__init__()
        if not callable(func):
            raise TypeError(f"func must be callable as func(t, y), but is {type(func).__name__}.")
        self.func = func
        self._penalty = penalty

    def forward(self, t: Any, state: tuple[Any, Tensor], *args: Any) -> tuple[Any, Tensor]:
        """Slope and rate of the penalty ``[*batch]``, at the state ``(y, penalty so far)``."""
        y, _ = state
        func = (lambda t, y: self.func(t, y, *args)) if args else self.func
        return self._penalty(func, t, y)


def _with_tolerances(adjoint: Any, options: dict[str, Any]) -> ContinuousAdjoint:
    """The adjoint with tolerances of its own: those of the forward solve go by its parts."""
    given = adjoint if isinstance(adjoint, ContinuousAdjoint) else ContinuousAdjoint()
    rtol = options.get("rtol", 1e-6) if given.rtol is None else given.rtol
    atol = options.get("atol", 1e-8) if given.atol is None else given.atol
    return dataclasses.replace(given, rtol=rtol, atol=atol)


def _mean_square(y: Any, batch_dims: int) -> Tensor:
    """The mean over the elements of each sample of ``|y|^2``."""
    leaves = pytree.tree_leaves(y)
    batch = leaves[0].shape[:batch_dims]
    parts = [_square(leaf).reshape(*batch, leaf.shape[batch_dims:].numel()) for leaf in leaves]
    return torch.cat(parts, -1).mean(-1)


def _square(y: Tensor) -> Tensor:
    return y.real.square() + y.imag.square() if y.is_complex() else y.square()
