"""What a failed check says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SHOWN = 64  # elements of a tensor that a report prints


class GradientMismatch(AssertionError):
    """A derivative disagrees with finite differences; the message holds the smallest failing case.

    Attributes:
        mode: ``"reverse"``, ``"forward"``, ``"batched"``, or ``"value"`` when the function itself
            returns other numbers for the same input.
        order: 1, or 2 when the derivative of the gradient is wrong.
        variable: the input or parameter concerned, as ``"input 0"`` or ``"net.weight"``.
        analytic, numeric: the derivative that was returned and the one expected, at the worst
            element.
        max_error: the largest absolute difference.
        seed: the seed that was given to the check.
    """

    mode: str = ""
    order: int = 1
    variable: str = ""
    analytic: complex | float = float("nan")
    numeric: complex | float = float("nan")
    max_error: float = float("nan")
    seed: int = 0


@dataclass
class Finding:
    """One disagreement: where it was seen, and by how much."""

    mode: str
    order: int
    variable: str
    headline: str
    analytic: complex | float = float("nan")
    numeric: complex | float = float("nan")
    max_error: float = float("nan")
    allowed: float = float("nan")
    where: str = ""
    hint: str = ""
    locate: Callable[[], Finding] | None = None  # finds the worst element; costly, so asked once

    @property
    def kind(self) -> tuple[str, int, str]:
        """Failures of one kind may stand for each other when a case is shrunk."""
        return self.mode, self.order, self.headline.partition(" with respect to")[0]

    def exception(self, name: str, case: str, seed: int, tried: int) -> GradientMismatch:
        """The error that a user sees: the finding, its case, and how to see it again."""
        lines = [f"{name}: {self.headline}"]
        if self.max_error == self.max_error:
            lines += [
                f"  analytic       {_number(self.analytic)}",
                f"  numeric        {_number(self.numeric)}",
                f"  largest error  {self.max_error:.3e} (allowed {self.allowed:.1e}){self.where}",
            ]
        if self.hint:
            lines.append(f"  {self.hint}")
        lines += ["smallest failing case:", case]
        lines.append(f"shown again by check_gradients(..., seed={seed}); {tried} cases were tried")
        error = GradientMismatch("\n".join(lines))
        error.mode, error.order, error.variable = self.mode, self.order, self.variable
        error.analytic, error.numeric = self.analytic, self.numeric
        error.max_error, error.seed = self.max_error, seed
        return error


def describe(name: str, tensor: Tensor) -> str:
    """Shape, layout and values of one tensor, indented for a report."""
    head = f"  {name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if not tensor.is_contiguous() or tensor.storage_offset():
        head += f", strides {tensor.stride()}, storage offset {tensor.storage_offset()}"
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= _SHOWN:
        return f"{head} = {tensor.detach().tolist()}"
    values = ", ".join(_number(x) for x in flat[:8].tolist())
    return f"{head} = [{values}, ... ({flat.numel()} elements)]"


def element(shape: Sequence[int], flat: int) -> str:
    """The index of a flat position, as `` at element (0, 1)``; nothing for a scalar."""
    if not shape:
        return ""
    index = torch.unravel_index(torch.tensor(flat), tuple(shape))
    return f" at element {tuple(int(i) for i in index)}"


def _number(x: complex | float) -> str:
    if isinstance(x, complex):
        return f"{x.real:.10g}{x.imag:+.10g}j"
    return f"{x:.10g}"
