"""The samples of an ensemble: what each starts from, and what it has for itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch._numbers import as_int
from ctorch.ode.ensemble_draws import Draws


class Samples:
    """The initial states, times and arguments of any of the samples."""

    def __init__(
        self, y0: Any, t: Any, args: tuple[Any, ...], size: int | None, seed: int | None
    ) -> None:
        if not isinstance(args, (tuple, list)):
            raise TypeError(f"args must be a tuple of arguments, but is {type(args).__name__}.")
        self.y0, self.t, self.seed = y0, t, None if seed is None else _integer("seed", seed)
        self.size = _size(y0, size)
        leaves, self.spec = pytree.tree_flatten_with_path(tuple(args))
        self.args = {f"args{pytree.keystr(path)}": arg for path, arg in leaves}
        if isinstance(t, Tensor) and t.dim() == 2 and t.shape[0] != self.size:
            raise ValueError(
                f"t has {t.shape[0]} rows for {self.size} samples: give [T] or [N, T]."
            )
        for name, arg in {"y0": y0, **self.args}.items():
            if _is_function(arg):
                self._check_call(name, arg)
            elif name != "y0" and isinstance(arg, Tensor) and arg.dim() and len(arg) != self.size:
                raise ValueError(
                    f"{name} has shape {list(arg.shape)} for {self.size} samples: tensors in"
                    " args have one row for each. One for all belongs into func itself (a closure,"
                    " functools.partial, a module)."
                )

    def of(self, chunk: range) -> tuple[Any, Any, tuple[Any, ...]]:
        """(y0, t, args) of a chunk."""
        indices = torch.arange(chunk.start, chunk.stop)
        y0, t = self.y0, self.t
        if _is_function(y0):
            y0 = self._made("y0", y0, indices, 0)
        else:
            y0 = pytree.tree_map(lambda x: x[chunk.start : chunk.stop], y0)
        if isinstance(t, Tensor) and t.dim() == 2:
            t = t[chunk.start : chunk.stop]
        args = []
        for k, (name, arg) in enumerate(self.args.items()):
            if _is_function(arg):
                arg = self._made(name, arg, indices, k + 1)
            elif isinstance(arg, Tensor) and arg.dim():
                arg = arg[chunk.start : chunk.stop]
            args.append(arg)
        return y0, t, pytree.tree_unflatten(args, self.spec)

    def _check_call(self, name: str, function: Callable[..., Any]) -> None:
        """Refuse a function that cannot be called as ``_made`` does."""
        try:
            signature = inspect.signature(function)
        except (ValueError, TypeError):  # one written in C
            return
        wanted = "(indices)" if self.seed is None else "(indices, draws)"
        try:
            signature.bind(*wanted.split(","))
        except TypeError as error:
            seed = "without seed" if self.seed is None else f"with seed={self.seed}"
            cure = " Give seed, to get random numbers as draws." if self.seed is None else ""
            raise TypeError(
                f"{name} is a function with the parameters {signature}, but {seed} it is called"
                f" with {wanted}: {error}.{cure}"
            ) from None

    def _made(self, name: str, function: Callable[..., Any], indices: Tensor, stream: int) -> Any:
        draws = () if self.seed is None else (Draws(self.seed, indices, stream),)
        made = function(indices, *draws)
        for leaf in pytree.tree_leaves(made):
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != indices.shape:
                got = f"shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
                raise ValueError(
                    f"{name}, called with {len(indices)} indices, must return one row for each:"
                    f" [{len(indices)}, ...], but returned {got}."
                )
        return made

    def bytes(self) -> int:
        """Memory of one sample: 16 states in work, and one for each output time."""
        one = self.of(range(1))[0]
        rows = self.t.shape[-1] if isinstance(self.t, Tensor) and self.t.dim() else 1
        return sum(x.nbytes for x in pytree.tree_leaves(one)) * (16 + rows)


def _integer(name: str, given: Any) -> int:
    number = as_int(given)
    if number is None:
        raise TypeError(f"{name} must be an integer, but is {given!r}.")
    return number


def _is_function(x: Any) -> bool:
    return callable(x) and not isinstance(x, (Tensor, torch.nn.Module))


def _size(y0: Any, size: int | None) -> int:
    """How many samples there are."""
    if _is_function(y0):
        if size is None:
            raise ValueError("size is missing: y0 is a function, which does not say how many.")
        sizes = {_integer("size", size)}
    else:
        leaves = pytree.tree_leaves(y0)
        if not leaves or not all(isinstance(x, Tensor) and x.dim() for x in leaves):
            raise TypeError(
                "y0 must be a tensor [N, ...] (or a pytree of such), or a function of indices, but"
                f" is {type(y0).__name__ if not isinstance(y0, Tensor) else 'a 0-dim tensor'}."
            )
        sizes = {x.shape[0] for x in leaves}
        if size is not None:
            sizes.add(_integer("size", size))
    if len(sizes) > 1:
        raise ValueError(f"y0 and size do not agree on the number of samples: {sorted(sizes)}.")
    (count,) = sizes
    if count < 1:
        raise ValueError(f"there must be at least one sample, but there are {count}.")
    return count
