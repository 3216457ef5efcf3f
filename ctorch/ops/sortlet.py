"""Sortlets: antisymmetric functions in O(N log N), by sorting.

A sortlet is the product of the gaps between sorted scores, times the sign of the permutation that
sorts them. Scores of particles that come from a permutation-equivariant network make it a fermionic
wavefunction; a sum of several of them moves its nodes away from where scores tie.

Source: Richter-Powell, Thiede, Aspuru-Guzik and Duvenaud, "Sorting Out Quantum Monte Carlo" (2023).

Whatever the dtype of the scores, float32 or float64, gaps and what is made of them are float64.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ctorch.ops import _sortlet_reference as reference
from ctorch.ops import _sortlet_rules as rules
from ctorch.ops._by_reference import of_reference
from ctorch.ops._op import define

GAPS = {"linear": reference.LINEAR, "tanh": reference.TANH}


def sortlet(scores: Tensor, gap: str = "linear") -> tuple[Tensor, Tensor]:
    """Sign and log magnitude of an antisymmetric function of scores, in O(N log N).

    ``psi = sign(pi) * prod_i phi(a[i+1] - a[i])``, where ``a`` are the scores in ascending order
    and ``pi`` is the permutation that sorts them. Exchanging two scores changes the sign alone.

    psi is continuously differentiable, and smooth but where scores tie: there second derivatives
    jump (with ``"tanh"`` by a factor ``1 - tanh^2`` of the neighboring gaps less); of two scores it
    is smooth everywhere. Conventions:

    - a tie gives ``(0, -inf)``. To the gradient a tied gap contributes nothing, the others what
      they always do; equal scores keep their order. Derivatives across ties are those of
      ``sum_of_sortlets``.
    - NaN among the scores gives NaN for this list, in both results and the gradient.
    - infinite scores have an infinite gap to finite ones: ``logabs`` is ``inf`` (with ``"tanh"``
      such a gap counts as 1) and its gradient 0. Equal infinities tie.
    - no score or one gives ``(1, 0)``.

    Differentiable any number of times, in both modes, under vmap and ``torch.compile``, by
    ``ctorch.jet`` and ``ctorch.laplacian``; first and second derivatives are kernels.

    Args:
        scores: ``[..., N]``, float32 or float64.
        gap: the function ``phi`` of a gap: ``"linear"``: itself; ``"tanh"``: its tanh, for bounded
            and smoother functions.

    Returns:
        ``(sign, logabs)``, both ``[...]`` in the dtype of the scores; the sign has no gradient.

    Raises:
        TypeError: scores are not a tensor of float32 or float64.
        ValueError: scores have no dimension, or there is no such gap.

    Source: Richter-Powell et al., "Sorting Out Quantum Monte Carlo" (2023).

    Example:
        >>> import torch, ctorch
        >>> ctorch.sortlet(torch.tensor([[3.0, 1.0, 2.5], [1.0, 3.0, 2.5]]))
        (tensor([ 1., -1.]), tensor([-0.2877, -0.2877]))
    """
    if has_torch_function((scores,)):
        return handle_torch_function(sortlet, (scores,), scores, gap)
    number = _check(scores, gap)
    sign, logabs = log_sortlet(scores, number)
    return sign.detach(), logabs


def sum_of_sortlets(
    scores: Tensor, log_coeff: Tensor, sign: Tensor | None = None, gap: str = "linear"
) -> tuple[Tensor, Tensor]:
    """Sign and log magnitude of a sum of K sortlets, ``sum_k sign_k exp(log_coeff_k) psi_k``.

    Nothing overflows, however large or small the terms are. Derivatives are the true ones of the
    sum: where scores of one term tie, that term is zero but its gradient is not. Where the sum is
    zero the result is ``(0, -inf)``, with gradient 0 by convention. Second derivatives at a tie,
    where they jump, are those of the polynomial on one side.

    Args:
        scores: ``[..., K, N]``, float32 or float64.
        log_coeff: broadcasts to ``[..., K]``: ``[K]``, or one for each list of scores, as the
            logarithm of an envelope.
        sign: of each coefficient, broadcasts to ``[..., K]``; any real factor is allowed. None: 1.
        gap: as for ``sortlet``.

    Returns:
        ``(sign, logabs)``, both ``[...]`` in the dtype of the scores; the sign has no gradient.

    Raises:
        TypeError: scores are not a tensor of float32 or float64, or a dtype differs from theirs.
        ValueError: shapes do not fit, or there is no such gap.

    Source: Richter-Powell et al., "Sorting Out Quantum Monte Carlo" (2023).

    Example:
        >>> import torch, ctorch
        >>> scores = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, 1.0]])  # the second list has a tie
        >>> ctorch.sum_of_sortlets(scores, torch.zeros(2))
        (tensor(1.), tensor(0.6931))
    """
    if has_torch_function((scores, log_coeff, sign)):
        given = (scores, log_coeff, sign)
        return handle_torch_function(sum_of_sortlets, given, scores, log_coeff, sign, gap)
    number = _check(scores, gap)
    log_coeff, factor = check_terms(scores, log_coeff, sign)
    of_terms, logs = log_sortlet(scores.detach(), number)
    largest = largest_of(logs + log_coeff.detach())
    shift = log_coeff - largest.unsqueeze(-1)
    terms = sortlet_term(scores, shift, of_terms.detach(), logs.detach(), number)
    total = (terms if factor is None else terms * factor).sum(-1)
    return signed_log(total, largest)


def check_terms(
    scores: Tensor, log_coeff: Tensor, sign: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The coefficients of a sum ``[..., K]``, checked."""
    if scores.dim() < 2:
        raise ValueError(f"scores must be [..., K, N], got shape {tuple(scores.shape)}")
    shape = scores.shape[:-1]
    parts: list[Tensor | None] = []
    for name, x in (("log_coeff", log_coeff), ("sign", sign)):
        if x is None:
            parts.append(None)
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype != scores.dtype:
            raise TypeError(
                f"{name} must have the dtype of the scores, {scores.dtype}; got {x.dtype}"
            )
        try:
            parts.append(x.expand(shape))
        except RuntimeError:
            want = f"{tuple(shape)}, that of scores without the last dim"
            raise ValueError(f"{name} must broadcast to {want}; got {tuple(x.shape)}") from None
    return cast(Tensor, parts[0]), parts[1]


def largest_of(logs: Tensor) -> Tensor:
    """The largest logarithm ``[..., K] -> [...]``, a finite number in any case."""
    if logs.shape[-1] == 0:
        return logs.sum(-1)
    largest = logs.detach().amax(-1)
    return torch.where(largest.isfinite(), largest, torch.zeros_like(largest))


def signed_log(total: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of ``total * exp(shift)``; at zero ``-inf`` without a gradient."""
    zero = total == 0
    safe = torch.where(zero, torch.ones_like(total), total)
    logabs = torch.where(zero, -torch.inf, safe.abs().log() + shift)
    return total.detach().sign(), logabs


def _check(scores: Any, gap: Any) -> int:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a tensor, got {type(scores).__name__}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores must be float32 or float64, got {scores.dtype}; convert them")
    if scores.dim() == 0:
        raise ValueError("scores must be [..., N], got a 0-dim tensor")
    if gap not in GAPS:
        raise ValueError(f"gap must be one of {tuple(GAPS)}, got {gap!r}")
    return GAPS[gap]


# ---- the bare operators ------------------------------------------------------------------------
# scores [..., N]; shift, sign, logabs, g, u [...]; v [..., N]; rows [R, ..., N]; lap [..., N]


def _list(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[:-1])


def _scores(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


def _rows(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[:-1])


log_sortlet = define(
    "sortlet(Tensor scores, int gap) -> (Tensor, Tensor)",
    reference.sortlet,
    fake=lambda scores, gap: (_list(scores), _list(scores)),
    backward=rules.sortlet_backward,
    jvp=rules.sortlet_jvp,
    vmap=rules.mapped([0], [0, 0]),
)
sortlet_gradient = define(
    "sortlet_gradient(Tensor scores, Tensor g, int gap) -> Tensor",
    reference.gradient,
    fake=lambda scores, g, gap: _scores(scores),
    backward=rules.gradient_backward,
    jvp=rules.gradient_jvp,
    vmap=rules.mapped([0, 0], [0]),
)
sortlet_hessian = define(
    "sortlet_hessian(Tensor scores, Tensor g, Tensor v, int gap) -> (Tensor, Tensor)",
    reference.hessian,
    fake=lambda scores, g, v, gap: (_list(scores), _scores(scores)),
    vmap=rules.mapped([0, 0, 0], [0, 0]),
    **of_reference(reference.hessian, 3),
)
sortlet_laplacian = define(
    "sortlet_laplacian(Tensor scores, Tensor rows, Tensor lap, int gap) "
    "-> (Tensor, Tensor, Tensor)",
    reference.laplacian,
    fake=lambda scores, rows, lap, gap: (_rows(rows), _list(scores), _list(scores)),
    vmap=rules.mapped([0, 1, 0], [1, 0, 0]),
    **of_reference(reference.laplacian, 3),
)
sortlet_term = define(
    "sortlet_term(Tensor scores, Tensor shift, Tensor sign, Tensor logabs, int gap) -> Tensor",
    reference.term,
    fake=lambda scores, shift, sign, logabs, gap: _list(scores),
    backward=rules.term_backward,
    jvp=rules.term_jvp,
    vmap=rules.mapped([0, 0, 0, 0], [0]),
)
sortlet_term_gradient = define(
    "sortlet_term_gradient(Tensor scores, Tensor shift, Tensor g, int gap) -> (Tensor, Tensor)",
    reference.term_gradient,
    fake=lambda scores, shift, g, gap: (_scores(scores), _list(scores)),
    backward=rules.term_gradient_backward,
    jvp=rules.term_gradient_jvp,
    vmap=rules.mapped([0, 0, 0], [0, 0]),
)
sortlet_term_hessian = define(
    "sortlet_term_hessian(Tensor scores, Tensor shift, Tensor g, Tensor v, Tensor u, int gap) "
    "-> (Tensor, Tensor, Tensor)",
    reference.term_hessian,
    fake=lambda scores, shift, g, v, u, gap: (_scores(scores), _list(scores), _list(scores)),
    vmap=rules.mapped([0, 0, 0, 0, 0], [0, 0, 0]),
    **of_reference(reference.term_hessian, 5),
)
sortlet_term_laplacian = define(
    "sortlet_term_laplacian(Tensor scores, Tensor shift, Tensor rows, Tensor lap, int gap) "
    "-> (Tensor, Tensor, Tensor)",
    reference.term_laplacian,
    fake=lambda scores, shift, rows, lap, gap: (_list(scores), _rows(rows), _list(scores)),
    vmap=rules.mapped([0, 0, 1, 0], [0, 1, 0]),
    **of_reference(reference.term_laplacian, 4),
)
rules.ops.gradient = sortlet_gradient
rules.ops.hessian = sortlet_hessian
rules.ops.term_gradient = sortlet_term_gradient
rules.ops.term_hessian = sortlet_term_hessian
