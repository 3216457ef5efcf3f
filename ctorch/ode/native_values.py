"""Functions of time and state in a native solve: events, and norms of the user's own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch.codegen import Traced, Untraceable, trace_values
from ctorch.ode.native import Unsupported, plain

if TYPE_CHECKING:
    from ctorch.ode.problem import Problem
    from ctorch.ode.solve import Request


class Values:
    """Traced functions.

    Args:
        what: they are, for messages.
        traced, sizes: what ``trace_values`` returned.
        dtype: of the state.

    Attributes:
        count: how many numbers they return.
        pointers: of their shared arrays, held alive with it.
    """

    def __init__(self, traced: Traced, sizes: Sequence[int], dtype: torch.dtype) -> None:
        self.traced, self.sizes, self.count = traced, sizes, sum(sizes)
        self._arrays = [plain(x, dtype) for x in traced.shared]
        self.pointers = pointers_to(self._arrays)

    def source(self, name: str, constants: Sequence[str] = ()) -> str:
        """``struct name`` in C++, with further constants."""
        lines = [f"static constexpr {x};" for x in (f"long count = {self.count}", *constants)]
        space = f"of_{name.lower()}"
        return "\n".join(
            [f"namespace {space} {{", self.traced.source, f"}}  // namespace {space}",
             f"struct {name} : {space}::Field {{", *lines, "};"]
        )  # fmt: skip

    def verify(self, library: Any, name: str) -> None:
        """Compare the library's function ``name`` with those that it was made from, once."""
        if getattr(library, f"{name}_verified", False):
            return
        function, pointer = getattr(library, name), ctypes.c_void_p
        function.restype, function.argtypes = None, [ctypes.c_double, *[pointer] * 3]

        def evaluate(t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
            arrays = [plain(x, y.dtype) for x in shared]
            y, values = y.contiguous(), y.new_empty(len(y), self.count)
            for time, state, result in zip(t.tolist(), y, values, strict=True):
                function(time, state.data_ptr(), pointers_to(arrays), result.data_ptr())
            return values

        self.traced.verify(evaluate)
        setattr(library, f"{name}_verified", True)


def traced_values(
    what: str, functions: Sequence[Callable[..., Tensor]], request: Request, problem: Problem,
    *args: Any, timed: bool = True,
) -> Values:  # fmt: skip
    """Trace functions of a solve's state, which take ``args`` as well.

    Raises:
        Unsupported: they cannot be traced.
    """
    layout, t = request.layout, problem.t.detach().reshape(-1)[0]
    y = request.y0 if layout.plain else layout.unpack(problem.y0.detach())
    how = {"batched": layout.batched, "timed": timed}
    try:
        traced, sizes = trace_values(functions, y, t, args, **how)
    except Untraceable as error:
        raise Unsupported(f"{what} cannot be native: {error}", functions) from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Unsupported(f"{what} cannot be traced: {error}", functions) from error
    return Values(traced, sizes, layout.dtype)


def norm_of(request: Request, problem: Problem) -> Values | None:
    """The user's norm, if there is one.

    Raises:
        Unsupported: it cannot be traced, or does not return one number.
    """
    if problem.norm is None:
        return None
    values = traced_values('options["norm"]', [problem.norm], request, problem, timed=False)
    if values.count != 1:
        raise Unsupported(f'options["norm"] must return one number, but returned {values.count}.')
    return values


def pointers_to(arrays: Sequence[Tensor]) -> Any:
    """Their addresses, as C takes them."""
    return (ctypes.c_void_p * len(arrays))(*[x.data_ptr() for x in arrays])
