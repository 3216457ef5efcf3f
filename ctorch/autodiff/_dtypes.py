"""Taylor arithmetic in dtypes that the kernels do not serve.

Half precision is computed in float32 and rounded once, complex values in plain torch: for analytic
functions the recurrences are the same as for real ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctorch.ops import _jet_reference as reference
from ctorch.ops import jet as ops

KERNEL_DTYPES = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)

# of which torch has no complex version
_REAL_ONLY = ("softplus", "logsigmoid", "mish", "erf", "gelu")


def real_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a real part; Dynamo knows no ``dtype.to_real``."""
    if not dtype.is_complex:
        return dtype
    return torch.float64 if dtype == torch.complex128 else torch.float32


def unary(x: Tensor, name: str, order: int, param: float = 0.0, last: bool = False) -> Tensor:
    """Coefficients of an elementwise function of a series ``[D+1, *shape]``, as ``ops.unary``.

    Args:
        last: give the one of order K alone, ``[*shape]``.
    """
    number = ops.NUMBER[name]
    if x.dtype in KERNEL_DTYPES:
        return ops.jet_unary(x, number, order, param, 0, last)  # type: ignore[no-any-return]
    if x.dtype in HALF:
        return unary(x.float(), name, order, param, last).to(x.dtype)
    if name in _REAL_ONLY:
        raise TypeError(
            f"{name}: torch does not compute it for complex values ({x.dtype}), so that it has no "
            f"rule for them; use their real and imaginary parts"
        )
    if name == "acosh":  # by its own formula: (x^2 - 1)^(-1/2) has another branch
        series = reference.coefficients(x)
        below, above = (reference.power(reference.shifted(series, a), -0.5, order) for a in (-1, 1))
        slope = reference.product(below, above, order)
        y = reference.integral(torch.acosh(x[0]), slope, series, order)
        return y[order] if last else reference.stack(y, order)
    return reference.unary(x, number, order, param, 0, last)


def product(a: Tensor, b: Tensor, order: int) -> Tensor:
    """Coefficients 0 to order of a product, of any dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    if not dtype.is_complex:
        wide = torch.float32 if dtype in HALF else dtype
        return ops.mul(a.to(wide), b.to(wide), order).to(dtype)
    orders = []
    for k in range(order + 1):
        js = range(max(0, k + 1 - b.shape[0]), min(k, a.shape[0] - 1) + 1)
        terms = [a[j] * b[k - j] for j in js] or [torch.zeros_like(a[0] * b[0])]
        orders.append(torch.stack(terms).sum(0))
    return torch.stack(orders)


def laplacian_unary(
    x: Tensor, rows: Tensor, lap: Tensor | None, name: str, param: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, Jacobian rows and Laplacian of an elementwise function, as ``ops.laplacian_unary``."""
    if x.dtype in KERNEL_DTYPES:
        return ops.laplacian_unary(x, rows, lap, name, param)
    if x.dtype in HALF:
        parts = (x.float(), rows.float(), None if lap is None else lap.float())
        y, rows, lap = ops.laplacian_unary(*parts, name, param)
        return y.to(x.dtype), rows.to(x.dtype), lap.to(x.dtype)
    y, first, half_second = unary(torch.stack([x, torch.ones_like(x)]), name, 2, param)
    second = 2 * half_second * (rows * rows).sum(0)
    return y, first * rows, second if lap is None else second + first * lap
