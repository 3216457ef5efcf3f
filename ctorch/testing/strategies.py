"""Hypothesis strategies that draw tensors: values, scales and memory layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")
_DRAWN_ONE_BY_ONE = (
    12  # more elements than this come from a drawn seed: they cannot shrink one at a time
)


def tensors(
    shape: Sequence[int],
    *,
    low: float | None = None,
    high: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    layouts: Sequence[str] = LAYOUTS,
) -> SearchStrategy[Tensor]:
    """A strategy that draws tensors of one shape in several memory layouts.

    Without bounds, values have a drawn scale (0.01, 1 or 10) and both signs. With bounds they lie
    between them, which is what a function with a limited domain (a logarithm, a square root) needs.

    Args:
        shape: shape of the tensor; ``()`` gives a scalar.
        low: lower bound, together with ``high``.
        high: upper bound.
        dtype: a floating-point or complex dtype; real and imaginary parts are drawn alike.
        device: where the tensor lies.
        layouts: the memory layouts to choose from: ``"contiguous"``, ``"transposed"``, ``"sliced"``
            (every other element of a larger storage, NaN between them), ``"offset"`` (the storage
            starts earlier) and ``"expanded"`` (stride 0). A layout that the shape does not allow
            falls back to contiguous.

    Raises:
        ImportError: hypothesis is not installed.
        TypeError: ``dtype`` is neither floating-point nor complex.
        ValueError: only one bound is given, the bounds are reversed, or a layout is unknown.

    Example:
        >>> from ctorch.testing import check_gradients, tensors
        >>> check_gradients(lambda x: x.log(), tensors((3,), low=0.1, high=10.0), examples=5)
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(
            f"tensors: dtype must be floating-point or complex to have a gradient, got {dtype}"
        )
    if (low is None) != (high is None):
        raise ValueError(f"tensors: give both bounds or none, got low={low}, high={high}")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"tensors: low must be less than high, got low={low}, high={high}")
    unknown = sorted(set(layouts) - set(LAYOUTS))
    if unknown or not layouts:
        raise ValueError(
            f"tensors: layouts must name at least one of {LAYOUTS}, got {tuple(layouts)}"
        )
    strategies = require_hypothesis().strategies
    span = None if low is None or high is None else (low, high)

    def draw_tensor(draw: DrawFn) -> Tensor:
        values = _draw_values(draw, tuple(shape), span)
        if dtype.is_complex:
            values = torch.complex(values, _draw_values(draw, tuple(shape), span))
        layout = draw(strategies.sampled_from(list(layouts)))
        return with_layout(values.to(device=device, dtype=dtype), layout)

    strategy: SearchStrategy[Tensor] = strategies.composite(draw_tensor)()
    return strategy


def with_layout(values: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout (``"expanded"`` repeats the first slice instead)."""
    if layout == "transposed" and values.ndim >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and values.ndim >= 1:
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), float("nan"))
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if layout == "offset":
        long = values.new_full((values.numel() + 3,), float("nan"))
        long[3:] = values.reshape(-1)
        return long[3:].view(values.shape)
    if layout == "expanded":
        for dim, size in enumerate(values.shape):
            if size > 1:
                return values.narrow(dim, 0, 1).clone().expand(values.shape)
    return values.contiguous()


def require_hypothesis() -> Any:
    """The hypothesis package, or an error that says how to get it."""
    try:
        import hypothesis
        import hypothesis.strategies
    except ImportError as error:
        raise ImportError(
            'ctorch.testing draws its cases with hypothesis: pip install "ctorch[testing]"'
        ) from error
    return hypothesis


def _draw_values(draw: DrawFn, shape: tuple[int, ...], span: tuple[float, float] | None) -> Tensor:
    """Contiguous float64 values; few elements are drawn one by one, so that they shrink."""
    st = require_hypothesis().strategies
    count = 1
    for size in shape:
        count *= size
    if count <= _DRAWN_ONE_BY_ONE:
        ticks = draw(st.lists(st.integers(-64, 64), min_size=count, max_size=count))
        unit = torch.tensor(ticks, dtype=torch.float64).reshape(shape) / 32
    else:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        unit = 4 * torch.rand(shape, generator=generator, dtype=torch.float64) - 2
    if span is not None:
        low, high = span
        return (low + (high - low) * (unit + 2) / 4).clamp(low, high)
    scale: float = draw(st.sampled_from((1.0, 0.01, 10.0)))
    return unit * scale
