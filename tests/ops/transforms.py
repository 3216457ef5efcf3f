"""PyTorch's transforms, each as a function of ``f: tensor -> vector``.

Each takes ``(f, x)`` and returns a tensor; those that compile take the compiler as well, so that a
reference can go the same way uncompiled. Tangents and cotangents are never constant, or a
derivative taken at the wrong level could come out right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, func
from torch.autograd import forward_ad

VectorFunction = Callable[[Tensor], Tensor]


def _scalar(f: VectorFunction) -> VectorFunction:
    return lambda x: f(x).sin().sum()


def _tangent(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)


def _several(x: Tensor) -> Tensor:
    return torch.stack([x, 0.9 * x, 1.1 * x], -1)  # mapped over the last dimension, not the first


def _push(f: VectorFunction) -> VectorFunction:
    return lambda x: func.jvp(f, (x,), (_tangent(x),))[1]


def _map(f: VectorFunction) -> VectorFunction:
    return lambda xs: func.vmap(f, in_dims=-1)(xs)


def _backward(f: VectorFunction, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(_scalar(f)(x), x)[0]


def _double_backward(f: VectorFunction, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(_scalar(f)(x), x, create_graph=True)
    return torch.autograd.grad(first.sin().sum(), x)[0]


def _forward_mode(f: VectorFunction, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = f(forward_ad.make_dual(x, _tangent(x)))
        tangent = forward_ad.unpack_dual(out).tangent
    return torch.zeros_like(out) if tangent is None else tangent


def _mapped_sum(f: VectorFunction) -> VectorFunction:
    return lambda xs: _map(f)(xs).sin().sum()


EAGER: dict[str, Callable[[VectorFunction, Tensor], Tensor]] = {
    "backward": _backward,
    "double_backward": _double_backward,
    "forward_mode": _forward_mode,
    "grad": lambda f, x: func.grad(_scalar(f))(x),
    "vjp": lambda f, x: func.vjp(f, x)[1](_tangent(f(x)))[0],
    "jvp": lambda f, x: _push(f)(x),
    "vmap": lambda f, x: _map(f)(_several(x)),
    "vmap_grad": lambda f, x: _map(func.grad(_scalar(f)))(_several(x)),
    "grad_vmap": lambda f, x: func.grad(_mapped_sum(f))(_several(x)),
    "vmap_vmap": lambda f, x: _map(_map(f))(_several(_several(x))),
    "vmap_jvp": lambda f, x: _map(_push(f))(_several(x)),
    "jvp_jvp": lambda f, x: _push(_push(f))(x),
    "jvp_grad": lambda f, x: _push(func.grad(_scalar(f)))(x),
    "grad_jvp": lambda f, x: func.grad(_scalar(_push(f)))(x),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(_scalar(f))(x),
    "jacfwd_jacfwd": lambda f, x: func.jacfwd(func.jacfwd(_scalar(f)))(x),
}


def _compiled(transform: Callable[[VectorFunction, Tensor], Tensor]) -> Any:
    return lambda f, x, compile: compile(lambda z: transform(f, z))(x)


COMPILED: dict[str, Any] = {
    "compile_backward": lambda f, x, compile: _backward(compile(f), x),
    "compile_grad": _compiled(EAGER["grad"]),
    "compile_vmap": _compiled(EAGER["vmap"]),
    "compile_jvp": _compiled(EAGER["jvp"]),
}

TRANSFORMS = [*EAGER, *COMPILED]


def apply(name: str, f: VectorFunction, x: Tensor, compile: Any = None) -> Tensor:
    """The transform of that name; ``compile`` defaults to leaving a function alone."""
    if name in EAGER:
        return EAGER[name](f, x)
    result: Tensor = COMPILED[name](f, x, compile or (lambda g: g))
    return result
