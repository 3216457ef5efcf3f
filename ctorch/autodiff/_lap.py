"""Value, Jacobian rows and Laplacian carried through torch code in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff import _dtypes as dtypes
from ctorch.autodiff import _lap_rows as forms
from ctorch.autodiff._propagated import Propagated, constant

Function = Callable[..., Any]


class Lap(Propagated):
    """A tensor ``y(x)`` with its derivatives along seeds ``v_r``: the state of a forward Laplacian.

    Attributes:
        rows: ``dy/dv_r``, ``[R, *shape]``. Sizes of 1 stand for dims over which rows are equal (the
            batch, up to the first function that is not linear).
        axes: empty: rows are dense. ``(a,)``: rows are local along dim ``a < 0``, whose ``n`` slots
            (electrons) have ``R`` seeds each: the dense row ``(m, r)`` is ``rows[r]`` at slot ``m``
            and zero at all others. ``(a, b)``: pairs of slots; the first half of the rows belongs
            to seeds of the slot along ``a``, the second to those along ``b``, and is zero where
            both are the same slot. Sums over rows are then sums over dense rows.
        lap: ``sum_r d^2 y/dv_r^2``, ``[*shape]``, or None while it is zero.
        seed: ``[d]`` where this is ``x: [.., d]`` itself and seeds are multiples of unit vectors.
    """

    order = 2
    __slots__ = ("_rows", "_value", "axes", "lap", "seed")

    def __init__(
        self,
        value: Tensor,
        rows: Any,
        lap: Tensor | None = None,
        axes: tuple[int, ...] = (),
        seed: Tensor | None = None,
    ) -> None:
        self._value = value
        self._rows = rows
        self.lap = lap
        self.axes = axes
        self.seed = seed
        if isinstance(rows, Tensor):
            forms.note(rows)

    @property
    def value(self) -> Tensor:
        return self._value

    @property
    def shape(self) -> torch.Size:
        return self._value.shape

    @property
    def rows(self) -> Tensor:
        if not isinstance(self._rows, Tensor):  # of a form of its own, as attention's weights
            self._rows = self._rows.dense()
            forms.note(self._rows)
        return self._rows

    @property
    def special(self) -> Any:
        """What holds the rows in a form of its own, or None."""
        return None if isinstance(self._rows, Tensor) else self._rows

    @property
    def plain(self) -> bool:
        """Whether the rows are dense and of full size."""
        return not self.axes and self.rows.shape[1:] == self._value.shape

    def full(self) -> Tensor:
        """Rows ``[R, *shape]`` of full size, compact ones still compact."""
        rows = self.rows
        return rows if rows.shape[1:] == self.shape else rows.expand(-1, *self.shape)

    def dense(self) -> Tensor:
        """Dense rows, possibly with sizes of 1."""
        return forms.densified(self.rows, self.axes, self.shape) if self.axes else self.rows

    def densified(self) -> Lap:
        """The same with dense rows."""
        return Lap(self._value, self.dense(), self.lap) if self.axes else self

    def laplacian(self) -> Tensor:
        """The Laplacian, zeros where it is not held."""
        return torch.zeros_like(self._value) if self.lap is None else self.lap

    # ---- the primitives of Propagated

    def linear(self, fn: Function) -> Lap:
        value = fn(self._value)
        lap = None if self.lap is None else fn(self.lap)
        rows, axes = self.rows, self.axes
        if axes:
            axes = forms.moved_axes(fn, self._value, axes)
            if not axes:  # not known to keep slots apart
                rows = self.dense()
        if self.seed is not None:
            compact = forms.unflattened_seed(fn, self._value, self.seed)
            if compact is not None:
                return Lap(value, compact[0], lap, compact[1])
        if rows.shape[1:] == self.shape:
            return Lap(value, fn(rows), lap, axes)
        return Lap(value, forms.squeezed(fn(rows.expand(-1, *self.shape))), lap, axes)

    def trailing(self, fn: Function, dims: int = 1) -> Lap:
        """``linear`` for a function that mixes elements of the last ``dims`` dims alone.

        What the rows share over other dims stays shared, and slots along these dims stay apart.
        """
        x = self.densified() if any(axis >= -dims for axis in self.axes) else self
        rows = x.rows
        if rows.shape[-dims:] != x.shape[-dims:]:
            rows = rows.expand(*rows.shape[:-dims], *x.shape[-dims:])
        return Lap(fn(x._value), fn(rows), None if x.lap is None else fn(x.lap), x.axes)

    def elementwise(self, fn: Function, shape: torch.Size | None = None) -> Lap:
        """``linear`` for a product with a constant, which may broadcast up to ``shape``."""
        shape = self.shape if shape is None else shape
        x = self.fitted(shape)
        return Lap(
            fn(x._value),
            fn(forms.widened(x.rows, len(shape))),
            x.lap if x.lap is None else fn(x.lap),
            x.axes,
        )

    def fitted(self, shape: torch.Size) -> Lap:
        """Itself, dense if broadcasting to ``shape`` would make more slots of one."""
        keeps = all(shape[axis] == self.shape[axis] for axis in self.axes)
        return self if keeps else self.densified()

    def shift(self, constant: Tensor | complex) -> Lap:
        value = self._value + constant
        if value.shape == self.shape:
            return Lap(value, self.rows, self.lap, self.axes)
        x = self.fitted(value.shape)
        lap = x.lap if x.lap is None else x.lap.expand(value.shape)
        return Lap(value, forms.widened(x.rows, value.ndim), lap, x.axes)

    @classmethod
    def join(cls, fn: Function, parts: Sequence[Any]) -> Lap:
        laps = [part for part in parts if isinstance(part, Lap)]
        count = laps[0].dense().shape[0]
        value = fn([part._value if isinstance(part, Lap) else part for part in parts])
        rows = [
            part.densified().full()
            if isinstance(part, Lap)
            else part.new_zeros(()).expand(count, *part.shape)
            for part in parts
        ]
        lap = None
        if any(part.lap is not None for part in laps):
            lap = fn(
                [
                    part.laplacian() if isinstance(part, Lap) else torch.zeros_like(part)
                    for part in parts
                ]
            )
        return Lap(value, forms.squeezed(fn(rows)), lap)

    def unary(self, name: str, param: float = 0.0) -> Lap:
        value, rows, lap = laplacian_unary(self._value, self.rows, self.lap, name, param)
        return Lap(value, rows, lap, self.axes)

    def integrate(self, value: Tensor, slope: Any) -> Lap:
        if constant(slope):
            return Lap(
                value, self.rows * slope, None if self.lap is None else self.lap * slope, self.axes
            )
        x, s, axes, shape = pair(self, slope)
        lap = forms.contracted(x, s, shape)
        if self.lap is not None:
            lap = lap + self.lap * slope._value
        return Lap(value, x * slope._value, lap, axes)

    def times(self, other: Lap) -> Lap:
        if self is other:
            twice = 2 * self._value
            lap = 2 * forms.squared(self.rows, self.shape)
            lap = lap if self.lap is None else torch.addcmul(lap, twice, self.lap)
            return Lap(self._value * self._value, self.rows * twice, lap, self.axes)
        a, b, axes, shape = pair(self, other)
        x, y = self._value, other._value
        lap = 2 * forms.contracted(a, b, shape)
        for factor, part in ((x, other.lap), (y, self.lap)):
            if part is not None:
                lap = lap + factor * part
        return Lap(x * y, x * b + y * a, lap, axes)

    def over(self, other: Lap) -> Lap:
        a, b, axes, shape = pair(self, other)
        y = 1 / other._value
        ratio = self._value * y
        rows = (a - ratio * b) * y
        lap = -2 * forms.contracted(rows, b, shape)
        if self.lap is not None:
            lap = lap + self.lap
        if other.lap is not None:
            lap = lap - ratio * other.lap
        return Lap(ratio, rows, lap * y, axes)

    @classmethod
    def bilinear(cls, fn: Function, a: Lap, b: Lap) -> Lap:
        x, y = a._value, b._value
        ra, rb = a.densified().full(), b.densified().full()
        count = len(ra)
        rows = fn(ra, y.expand(count, *y.shape)) + fn(x.expand(count, *x.shape), rb)
        lap = 2 * fn(ra, rb).sum(0)
        if a.lap is not None:
            lap = lap + fn(a.lap, y)
        if b.lap is not None:
            lap = lap + fn(x, b.lap)
        return Lap(fn(x, y), rows, lap)

    def _assign(self, other: Lap) -> None:
        self._value, self._rows, self.lap = other._value, other._rows, other.lap
        self.axes, self.seed = other.axes, None


def pair(a: Lap, b: Lap) -> tuple[Tensor, Tensor, tuple[int, ...], torch.Size]:
    """Rows of two in one form, with dims that broadcast together; that form; the common shape."""
    shape = broadcast_shapes(a.shape, b.shape)
    a, b = a.fitted(shape), b.fitted(shape)
    axes = forms.common_axes(a.rows, a.axes, b.rows, b.axes, shape)
    rows = [forms.brought(forms.widened(x.rows, len(shape)), x.axes, axes, shape) for x in (a, b)]
    return rows[0], rows[1], axes, shape


def laplacian_unary(
    x: Tensor, rows: Tensor, lap: Tensor | None, name: str, param: float
) -> tuple[Tensor, Tensor, Tensor]:
    """An elementwise function of value, rows and Laplacian; by a kernel, if the dtype has one."""
    if rows.dtype is not x.dtype:  # a bias raised the value's alone, under autocast
        rows, lap = rows.to(x.dtype), None if lap is None else lap.to(x.dtype)
    return dtypes.laplacian_unary(x, rows, lap, name, param)
