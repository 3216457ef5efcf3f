"""Solving the equation of an implicit step, z = constant + scale * f(t, z).

All root finders iterate z <- z - P^-1 r(z) on the residual r(z) = z - scale * f(t, z) - constant
and differ in P, what they know of I - scale * df/dy: nothing (functional iteration), its diagonal
(Jacobi-Newton; Chen and Duvenaud, "Neural Networks with Cheap Differential Operators", 2019,
section 4), or all of it (Newton). What P is decides how fast an iteration converges and never what
it converges to: its end is judged by the residual alone. Convergence is judged by the rate of the
corrections (Hairer and Wanner, "Solving ODEs II", IV.8).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctorch._exceptions import ArgumentError
from ctorch.autodiff.hollow import as_hollow, dimwise_derivative
from ctorch.ode.arguments import whole
from ctorch.ode.capture import Captured
from ctorch.ode.field import Stage, UnexpectedGraph
from ctorch.ode.problem import Problem

ROOT_FINDERS = ("functional", "jacobi_newton", "newton")
#: the largest system (or block of one) whose Jacobian is formed
LARGEST_DENSE = 4096
#: a Jacobian is formed anew where the corrections shrink by less than this
SLOW = 0.25


class NoRoot(Exception):
    """An iteration did not converge; says where and how far it came."""

    def __init__(self, t: float, iterations: int, residual: float, rate: float) -> None:
        super().__init__()
        self.t, self.iterations, self.residual, self.rate = t, iterations, residual, rate

    def describe(self, finder: str, h: float) -> str:
        """A sentence for the user."""
        how = "diverged" if not self.rate < 1 else "did not converge"
        return (
            f"the {finder} iteration {how} at t={self.t:.9g} (step h={h:.3e}, iteration"
            f" {self.iterations}, residual norm {self.residual:.3g} relative to the tolerances,"
            f" rate {self.rate:.3g})"
        )


class Identity:
    """P = I."""

    def solve(self, r: Tensor) -> Tensor:
        """P^-1 r."""
        return r

    solve_transposed = solve


class Diagonal:
    """P = diag(d), d of the state's shape."""

    def __init__(self, d: Tensor) -> None:
        self._d = d

    def solve(self, r: Tensor) -> Tensor:
        """P^-1 r."""
        return r / self._d

    solve_transposed = solve


class Dense:
    """P as matrices [blocks, n, n], one for each block of the state."""

    def __init__(self, matrices: Tensor) -> None:
        self._blocks, self._n = matrices.shape[:2]
        self._factors = torch.linalg.lu_factor_ex(matrices)[:2]

    def solve(self, r: Tensor) -> Tensor:
        """P^-1 r."""
        return self._solve(r, False)

    def solve_transposed(self, r: Tensor) -> Tensor:
        """P^-T r."""
        return self._solve(r, True)

    def _solve(self, r: Tensor, transposed: bool) -> Tensor:
        columns = r.reshape(self._blocks, self._n, 1)
        return torch.linalg.lu_solve(*self._factors, columns, adjoint=transposed).view_as(r)


Approximation = Identity | Diagonal | Dense


class RootFinder:
    """Functional iteration: P = I. Converges where scale * df/dy is small: not for stiff fields.

    Args:
        problem: the problem.
        options: of the solve: "max_iters"; "root_tol", how far below the tolerances the error of a
            root has to be.
        patient: make all iterations, whatever the rate: for steps that cannot be shortened.
    """

    name = "functional"
    iterations = 10

    def __init__(self, problem: Problem, options: dict[str, Any], patient: bool) -> None:
        self.problem = problem
        self.field = problem.field
        self.patient = patient
        default = self.iterations * (5 if patient else 1)
        self.max_iters = whole(options, "max_iters", default, 1, sys.maxsize)
        self.tolerance = float(options.get("root_tol", 0.1))
        if not 0 < self.tolerance <= 1:
            raise ArgumentError(f"root_tol must lie in (0, 1], but is {self.tolerance}.")
        self.jacobians = 0
        self._rate = math.nan  # of the last iteration that converged
        self._eps = 4 * torch.finfo(problem.layout.dtype).eps

    def check(self, t: Tensor, y: Tensor, k: Tensor) -> None:
        """Look at the start of a solve, where the slope is ``k``, for what can never be right."""

    def evaluate(
        self, t: Tensor, z: Tensor, scale: float, known: Approximation | None
    ) -> tuple[Tensor, Approximation]:
        """The slope at (t, z), and P, which may be the one ``known`` already."""
        return self.field.value(t, z).k, known or Identity()

    def at_root(self, t: Tensor, z: Tensor, k: Tensor, scale: float) -> Approximation:
        """P at a root, given the slope ``k`` with its graph over the leaf ``z``."""
        return Identity()

    def find(
        self, t: Tensor, constant: Tensor, scale: float, guess: Tensor, weight: Tensor
    ) -> Tensor:
        """The root. Under ``no_grad`` or with nothing that requires grad.

        Args:
            t: time, as the field takes it.
            constant, scale: of the equation.
            guess: where to begin.
            weight: the scale of errors of the state.

        Raises:
            NoRoot: it was not found.
        """
        norm, z, known = self.problem.error_norm, guess, None
        size = last = rate = before = math.nan
        for count in range(1, self.max_iters + 1):
            k, known = self.evaluate(t, z, scale, None if rate > SLOW else known)
            residual = z - scale * k - constant
            change = known.solve(residual)
            z = z - change
            size = float(norm(change, weight).item())
            # a Jacobian that is far from normal makes corrections shrink every other time only
            ratio = size / last if count > 1 else math.nan
            rate = max(ratio, math.sqrt(ratio * before)) if count > 2 else ratio
            before = ratio
            if not math.isfinite(size):
                break
            if size <= self._eps * float(norm(z, weight).item()) or self._close(size, rate):
                if count > 1:
                    self._rate = max(rate, 1e-3)
                return z
            if not self.patient and self._hopeless(size, rate, self.max_iters - count):
                break
            last = size
        self._rate = math.nan
        left = float(norm(residual, weight).item())
        raise NoRoot(float(t), count, left, math.inf if math.isnan(rate) else rate)

    def _close(self, size: float, rate: float) -> bool:
        if math.isnan(rate):  # the first correction: by the rate of the last step, cautiously
            rate = self._rate**0.8
        return rate < 1 and rate / (1 - rate) * size <= self.tolerance

    def _hopeless(self, size: float, rate: float, left: int) -> bool:
        if math.isnan(rate):
            return False
        return rate >= 1 or rate**left / (1 - rate) * size > self.tolerance


class JacobiNewton(RootFinder):
    """Newton's iteration with the diagonal of the Jacobian alone: for fields in which it is known.

    ``diagonal(t, y)`` returns slope and diagonal; one call counts as one evaluation.
    """

    name = "jacobi_newton"
    iterations = 15

    def __init__(self, problem: Problem, options: dict[str, Any], patient: bool) -> None:
        super().__init__(problem, options, patient)
        self._diagonal = _diagonal_of(problem, options.get("diagonal"))

    def check(self, t: Tensor, y: Tensor, k: Tensor) -> None:
        """The slope that comes with the diagonal must be the field's own."""
        self.field.nfe += 1
        off = (self._diagonal(t, y)[0].detach() - k).abs()
        size = k.abs().amax() if k.numel() else 0.0
        if bool((off > 1e-3 * size).any()):
            raise ArgumentError(
                f"at t={float(t):.6g} the slope that comes with the diagonal of the Jacobian is off"
                f" what func returns by {float(off.max()):.3g}: both must be the same field, or"
                " roots and gradients would belong to different ones."
            )

    def evaluate(
        self, t: Tensor, z: Tensor, scale: float, known: Approximation | None
    ) -> tuple[Tensor, Approximation]:
        """The slope at (t, z), and P."""
        self.field.nfe += 1
        k, diagonal = self._diagonal(t, z)
        for name, value in (("slope", k), ("diagonal", diagonal)):
            self.problem.layout.check_like(value, f"the {name} of a field with a known diagonal")
        if k.requires_grad and torch.is_grad_enabled():
            raise UnexpectedGraph(Stage(t, z, k))
        return k.to(z.dtype), Diagonal(1 - scale * diagonal.to(z.dtype))

    def at_root(self, t: Tensor, z: Tensor, k: Tensor, scale: float) -> Approximation:
        """P at a root."""
        with torch.no_grad():
            return self.evaluate(t, z.detach(), scale, None)[1]


def _diagonal_of(problem: Problem, given: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    func, args = problem.field.func, problem.field.args
    if not problem.layout.plain:
        raise NotImplementedError(
            'root_finder="jacobi_newton" needs a state that is one real tensor: use'
            ' root_finder="newton".'
        )
    if given is not None:
        if not callable(given):
            raise ArgumentError(
                'options["diagonal"] must be callable as diagonal(t, y, *args) -> (slope, diagonal'
                f" of the Jacobian), but is {type(given).__name__}."
            )
        return lambda t, y: given(t, y, *args)
    try:
        if args:
            raise TypeError("a hollow net takes no further args")
        as_hollow(func)
    except TypeError as reason:
        raise ArgumentError(
            'root_finder="jacobi_newton" needs a field whose diagonal of the Jacobian is known: a'
            f" hollow net such as ctorch.nn.HollowMLP, or one that wraps it, but {reason}. Or give"
            ' the diagonal by options={"diagonal": fn}, fn(t, y, *args) -> (slope, diagonal), or'
            ' use root_finder="newton".'
        ) from None

    def hollow(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value, derivatives = dimwise_derivative(func, y, order=1, t=t)
        return value, derivatives[0]

    return hollow


class Newton(RootFinder):
    """Newton's iteration with a dense Jacobian, kept for as long as it serves.

    The option "batch_dims" says that the field treats each element of so many leading dimensions of
    the state alone: then the Jacobian is one block for each of them.
    """

    name = "newton"

    def __init__(self, problem: Problem, options: dict[str, Any], patient: bool) -> None:
        super().__init__(problem, options, patient)
        shape, lead = problem.y0.shape, options.get("batch_dims", 0)
        if not (isinstance(lead, int) and 0 <= lead <= len(shape)):
            raise ArgumentError(
                f"batch_dims must be an integer from 0 to {len(shape)}, the dimensions of the"
                f" state, but is {lead!r}."
            )
        self.blocks, self.n = math.prod(shape[:lead]), math.prod(shape[lead:])
        if self.n > LARGEST_DENSE:
            raise ArgumentError(
                f'root_finder="newton" forms the Jacobian, of {self.n} x {self.n} elements here (at'
                f" most {LARGEST_DENSE} are allowed): say with options={{'batch_dims': ...}} how"
                ' many leading dimensions of y are samples, or use root_finder="jacobi_newton".'
            )

    def evaluate(
        self, t: Tensor, z: Tensor, scale: float, known: Approximation | None
    ) -> tuple[Tensor, Approximation]:
        """The slope at (t, z), and P."""
        if known is not None:
            return self.field.value(t, z).k, known
        watching = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            t, leaf = t.clone(), z.detach().clone().requires_grad_()
            k = self.field(t, leaf)
            if watching:
                Captured(()).audit(Stage(t, leaf, k))
            return k.detach(), self.at_root(t, leaf, k, scale)

    def at_root(self, t: Tensor, z: Tensor, k: Tensor, scale: float) -> Approximation:
        """P at a root."""
        if not (k.requires_grad and k.numel()):
            return Identity()
        self.jacobians += 1
        eye = torch.eye(self.n, dtype=k.dtype, device=k.device)
        seeds = eye.unsqueeze(1).expand(self.n, self.blocks, self.n)
        (rows,) = torch.autograd.grad(
            k, z, seeds.reshape(self.n, *z.shape), retain_graph=True, allow_unused=True,
            is_grads_batched=True,
        )  # fmt: skip
        if rows is None:
            return Identity()
        jacobian = rows.detach().reshape(self.n, self.blocks, self.n).transpose(0, 1)
        return Dense(eye - scale * jacobian)


def make_root_finder(
    name: str, problem: Problem, options: dict[str, Any], patient: bool
) -> RootFinder:
    """The root finder of that name.

    Raises:
        ArgumentError: unknown, or of no use for the field; says what is allowed.
    """
    for kind in (RootFinder, JacobiNewton, Newton):
        if kind.name == name:
            return kind(problem, options, patient)
    allowed = ", ".join(f'"{x}"' for x in ROOT_FINDERS)
    raise ArgumentError(f"root_finder must be one of {allowed}, but is {name!r}.")
