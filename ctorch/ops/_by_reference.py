"""Derivative rules that an operator takes from its reference, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]
Function = Callable[..., Any]


def of_reference(function: Function, floating: int) -> dict[str, Function]:
    """Backward and jvp of an operator whose first ``floating`` arguments are differentiable."""

    def backward(args: Args, needed: Sequence[bool], *grads: Tensor | None) -> Args:
        inputs, rest = args[:floating], args[floating:]
        outs, pull = vjp(lambda *xs: function(*xs, *rest), *inputs)
        many = isinstance(outs, tuple)
        cotangents = filled(grads, outs if many else (outs,))
        return (*pull(cotangents if many else cotangents[0]), *(None for _ in rest))

    def jvp(args: Args, tangents: Args) -> Any:
        inputs, rest = args[:floating], args[floating:]
        return pushed(lambda *xs: function(*xs, *rest), inputs, tangents[:floating])

    return {"backward": backward, "jvp": jvp}


def pushed(f: Function, inputs: Args, tangents: Args) -> Any:
    """A jvp by two vjps: forward mode of torch would run below the level that asks."""
    outs, pull = vjp(f, *inputs)
    many = isinstance(outs, tuple)
    zeros = tuple(torch.zeros_like(out) for out in (outs if many else (outs,)))
    _, push = vjp(lambda *cotangents: pull(cotangents if many else cotangents[0]), *zeros)
    result: Args = push(filled(tangents, inputs))
    return result if many else result[0]


def vjp(f: Function, *inputs: Tensor) -> tuple[Any, Function]:
    """``torch.func.vjp`` without its auxiliary output."""
    outs, pull = torch.func.vjp(f, *inputs)[:2]
    return outs, pull


def filled(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parts, with zeros for those that are missing."""
    return tuple(
        torch.zeros_like(x) if part is None else part for part, x in zip(parts, like, strict=True)
    )
