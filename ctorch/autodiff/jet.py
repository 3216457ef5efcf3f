"""Higher derivatives of torch functions by Taylor mode: one pass, whatever the order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch.autodiff._arguments import function, outermost, whole
from ctorch.autodiff._jet import Jet, pad
from ctorch.autodiff._propagated import Propagated, propagate
from ctorch.autodiff.mlp import derivative_of_numbers, mlp_for
from ctorch.ops import mlp

Function = Callable[..., Any]


def jet(
    f: Function,
    primals: Sequence[Any],
    series: Sequence[Any],
    *,
    factorial_scaled: bool = True,
) -> tuple[Any, Any]:
    """Derivatives of ``s -> f(x_1(s), ..., x_n(s))`` at ``s = 0``, from those of the ``x_i``.

    Truncated Taylor series pass through ``f`` once: ``K + 1`` times the cost of ``f``'s linear maps
    for all orders up to K, where nested forward mode takes ``2^K``. Arguments and order of the
    results are those of ``jax.experimental.jet.jet``. Differentiable any number of times.

    Args:
        f: any function of tensors made of torch functions, ``nn.Module`` among them; Python control
            flow may depend on values. Results are tensors in any pytree.
        primals: ``x_i(0)``, floating point tensors of any shapes.
        series: for each primal, its derivatives of order 1 to K, a sequence of tensors of the
            primal's shape; all of the same length K. Zeros above the first one or few may be left
            out: a shorter series is filled up with zeros.
        factorial_scaled: True: series hold derivatives ``x^(k)(0)``; False: normalized Taylor
            coefficients ``x^(k)(0) / k!``.

    Returns:
        ``(primals_out, series_out)``: ``f(x(0))`` and, in place of each tensor in it, the list of
        its K derivatives (or coefficients).

    Raises:
        TypeError: a primal or a coefficient is not a floating point tensor.
        ValueError: numbers, shapes or dtypes of primals and series do not fit.
        MissingRuleError: ``f`` calls a torch function without a rule; the message names it.

    Source: Griewank and Walther, "Evaluating Derivatives", 2nd ed., chapter 13.

    Example:
        >>> import torch, ctorch
        >>> x = torch.tensor(0.5, dtype=torch.float64)
        >>> y, (d1, d2, d3) = ctorch.jet(torch.sin, (x,), ([torch.ones_like(x)] + [0 * x] * 2,))
        >>> bool((d3 + x.cos()).abs() < 1e-12)
        True
    """
    function("f", f)
    stacks, order, scale = _stacks(primals, series, factorial_scaled)
    out = propagate(f, *(Jet(stack, order) for stack in stacks))
    leaves, tree = pytree.tree_flatten(out, is_leaf=_is_leaf)
    values, derivatives = [], []
    for leaf in leaves:
        stack = _stack_of(leaf, order)
        values.append(stack[0] if isinstance(stack, Tensor) else stack)
        derivatives.append(_unstack(stack, scale))
    return tree.unflatten(values), tree.unflatten(derivatives)


def derivative(
    f: Function,
    x: Tensor,
    v: Tensor | Sequence[Tensor],
    order: int | Sequence[int] = 1,
) -> Any:
    """A directional derivative of any order: ``d^k/ds^k f(x + s v)`` at ``s = 0``.

    With tuples of directions and orders, the mixed derivative
    ``d^(k_1 + ... + k_n) / ds_1^k_1 ... ds_n^k_n  f(x + s_1 v_1 + ... + s_n v_n)``, which is put
    together from derivatives along single directions by the interpolation formula of Griewank,
    Utke and Walther, "Evaluating higher derivative tensors by forward propagation of univariate
    Taylor series" (2000), eq. (13). Differentiable any number of times.

    Args:
        f: a function of one tensor; see ``jet``.
        x: the point, ``[*shape]``.
        v: the direction, ``[*shape]``, or a tuple of them.
        order: k >= 0, or a tuple of as many as there are directions.

    Returns:
        What ``f`` returns, with the derivative in place of each tensor.

    Raises:
        TypeError, ValueError: arguments do not fit.
        MissingRuleError: see ``jet``.

    Example:
        >>> import torch, ctorch
        >>> f = lambda x: x[..., 0] ** 2 * x[..., 1]
        >>> e = torch.eye(2)
        >>> ctorch.derivative(f, torch.tensor([3.0, 5.0]), (e[0], e[1]), (1, 1))
        tensor(6.)
    """
    function("f", f)
    if type(x) is Tensor and type(v) is Tensor and type(order) is int:
        found = derivative_of_numbers(f, x, v, order)
        if found is not None:
            return found
    outermost(x)
    if not isinstance(v, (Tensor, tuple, list)):
        raise TypeError(f"v: expected a tensor or a tuple of tensors, got {type(v).__name__}")
    if isinstance(v, Tensor) and not isinstance(order, (tuple, list)):
        return _along(f, x, v, whole("order", order, 0))
    if (
        isinstance(v, Tensor)
        or not isinstance(order, (tuple, list))
        or len(v) != len(order)
        or not len(v)
    ):
        raise ValueError(
            "v and order: give one direction and one order, or tuples of as many of each"
        )
    numbers = [whole(f"order[{i}]", k, 0) for i, k in enumerate(order)]
    _check_tensor("x", x)
    for i, direction in enumerate(v):
        _check_direction(f"v[{i}]", direction, x)
    keep = [i for i, k in enumerate(numbers) if k > 0]
    orders, directions = [numbers[i] for i in keep], [v[i] for i in keep]
    if len(keep) <= 1:
        return _along(f, x, directions[0] if keep else v[0], sum(orders))
    total = sum(orders)
    result: Any = None
    for j, weight in _interpolation(tuple(orders)).items():
        direction = sum(n * d for n, d in zip(j, directions, strict=True) if n)
        part = _along(f, x, cast(Tensor, direction), total)
        scale = weight / factorial(total, x.dtype)
        if result is None:
            result = pytree.tree_map(lambda a, w=scale: w * a, part)
        else:
            result = pytree.tree_map(lambda r, a, w=scale: r + w * a, result, part)
    return result


def _along(f: Function, x: Tensor, v: Tensor, order: int) -> Any:
    """``d^order/ds^order f(x + s v)``."""
    _check_tensor("x", x)
    _check_direction("v", v, x)
    if order == 0:
        return f(x)
    scale = _Scale(order, x.dtype)
    net = None if scale.exponent else mlp_for(f, x)
    if net is not None:
        return mlp.derivative(net, x, v, order)
    out = propagate(f, Jet(torch.stack([x, scale.step(v)]), order))

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Jet):
            if leaf.degree < order:
                return torch.zeros_like(leaf.value)
            return leaf.coefficients[order] * scale.factor(order)
        return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf

    # (in few words where that is all: a small net takes no longer than the search for leaves)
    return pick(out) if isinstance(out, Jet) else pytree.tree_map(pick, out, is_leaf=_is_leaf)


def _interpolation(orders: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """Weights of directions ``sum_i j_i v_i``, ``|j| = sum(orders)``, on their coefficient."""
    total = sum(orders)
    weights: dict[tuple[int, ...], float] = {}
    grid = [k for k in itertools.product(*(range(i + 1) for i in orders)) if any(k)]
    for j in itertools.product(*(range(total + 1) for _ in orders)):
        if sum(j) != total:
            continue
        weight = 0.0
        for k in grid:
            term = (-1.0) ** (total - sum(k)) * (sum(k) / total) ** total
            for i_n, k_n, j_n in zip(orders, k, j, strict=True):
                term *= math.comb(i_n, k_n) * _binomial(total * k_n / sum(k), j_n)
            weight += term
        if weight != 0.0:
            weights[j] = weight
    return weights


def _binomial(a: float, n: int) -> float:
    return math.prod([(a - m) / (m + 1) for m in range(n)])  # of a list, which Dynamo can read


# ---- stacks in and out


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Propagated)


def _stacks(
    primals: Sequence[Any], series: Sequence[Any], factorial_scaled: bool
) -> tuple[list[Tensor], int, _Scale | None]:
    for name, given in (("primals", primals), ("series", series)):
        if not isinstance(given, (tuple, list)):
            raise TypeError(f"{name}: expected a tuple, got {type(given).__name__}")
    if not primals or len(primals) != len(series):
        raise ValueError(f"series: expected one for each of {len(primals)} primals")
    lengths = [len(terms) for terms in series]
    order = max(lengths)
    stacks = []
    for i, (x, terms) in enumerate(zip(primals, series, strict=True)):
        _check_tensor(f"primals[{i}]", x)
        for k, term in enumerate(terms):
            _check_tensor(f"series[{i}][{k}]", term)
            if term.shape != x.shape or term.dtype != x.dtype:
                raise ValueError(
                    f"series[{i}][{k}]: expected {tuple(x.shape)}, {x.dtype} as its primal, "
                    f"got {tuple(term.shape)}, {term.dtype}"
                )
        scale = _Scale(order, x.dtype) if factorial_scaled else None
        if scale is not None:
            terms = [term / scale.factor(k) for k, term in enumerate(terms, 1)]
        stacks.append(torch.stack([x, *terms]))
    return stacks, order, scale


def _stack_of(leaf: Any, order: int) -> Any:
    """All coefficients of a result; a constant tensor's are zero."""
    if isinstance(leaf, Jet):
        return leaf.stack()
    return pad(leaf.unsqueeze(0), order) if isinstance(leaf, Tensor) else leaf


def _unstack(stack: Any, scale: _Scale | None) -> Any:
    if not isinstance(stack, Tensor):
        return stack
    terms = stack.unbind(0)[1:]
    if scale is None:
        return list(terms)
    return [term * scale.factor(k) for k, term in enumerate(terms, 1)]


def _check_tensor(name: str, x: Any) -> None:
    outermost(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"{name}: expected floating point, got {x.dtype}")


def _check_direction(name: str, v: Any, x: Tensor) -> None:
    _check_tensor(name, v)
    if v.shape != x.shape or v.dtype != x.dtype:
        raise ValueError(
            f"{name}: expected {tuple(x.shape)}, {x.dtype} as x, got {tuple(v.shape)}, {v.dtype}"
        )


def factorial(k: int, dtype: torch.dtype) -> float:
    """``k!`` as a float, which a tensor can be multiplied by: above 20! an int cannot.

    Raises:
        ValueError: it is beyond the dtype.
    """
    largest = torch.finfo(dtype).max
    if math.factorial(k) > int(largest):
        raise ValueError(
            f"order: {k}! is beyond {dtype}, which reaches {largest:.1e}; taylor_series and "
            f"jet(..., factorial_scaled=False) give Taylor coefficients, which stay small"
        )
    return float(math.factorial(k))


class _Scale:
    """Another unit for a series' parameter, where factorials leave the range of a dtype.

    Coefficients of ``f(x(2^e s))`` are ``2^(e k) / k!`` times the derivatives: a factor that stays
    moderate where ``1 / k!`` alone would underflow and ``k!`` overflow. As a power of two it rounds
    nothing. Low orders need none, e = 0.

    Raises:
        ValueError: no unit will do.
    """

    def __init__(self, order: int, dtype: torch.dtype) -> None:
        info = torch.finfo(dtype)
        self.exponent = 0
        if math.lgamma(order + 1) > 0.5 * math.log(info.max):
            self.exponent = round(math.lgamma(order + 1) / math.log(2) / order)
            # k! / 2^(e k) is least where k = 2^e
            least = math.lgamma(2.0**self.exponent + 1) - 2.0**self.exponent * self._rate
            most = math.lgamma(order + 1) - order * self._rate
            if least < math.log(info.tiny) or most > math.log(info.max):
                raise ValueError(
                    f"order: derivatives of order {order} are beyond {dtype}; taylor_series and "
                    f"jet(..., factorial_scaled=False) give Taylor coefficients, which stay small"
                )

    @property
    def _rate(self) -> float:
        return self.exponent * math.log(2)

    def step(self, v: Tensor) -> Tensor:
        """A direction in the new unit."""
        return v * 2.0**self.exponent if self.exponent else v

    def factor(self, k: int) -> float:
        """What turns coefficient k into the derivative: ``k! / 2^(e k)``."""
        return math.factorial(k) / (1 << self.exponent * k)
