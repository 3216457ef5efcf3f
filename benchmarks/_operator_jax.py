"""The same in JAX, under jit: nested jvp, jax.experimental.jet, folx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import Case, Report
from _operator_torch import Mlp
from jax.experimental.jet import jet

Function = Callable[..., Any]


def setup(double: bool) -> None:
    jax.config.update("jax_enable_x64", double)


def case(name: str, fn: Function, *args: Any, judged: bool = True) -> Case:
    """Compiled at its first call; the first array of the result is judged."""
    compiled = jax.jit(fn)

    def describe(out: Any) -> Report:
        if not judged:
            return Report()
        return Report(y=np.asarray(jax.tree_util.tree_leaves(out)[0], dtype=np.float64))

    return Case(name, lambda: jax.block_until_ready(compiled(*args)), describe)


def weights(problem: Mlp) -> list[tuple[Any, Any]]:
    return [
        (jnp.asarray(w.detach().numpy()), jnp.asarray(b.detach().numpy()))
        for w, b in problem.weights
    ]


def mlp(p: Any, x: Any) -> Any:
    for i, (w, b) in enumerate(p):
        x = (jnp.tanh(x) if i else x) @ w.T + b
    return x


def squared(fn: Function) -> Function:
    """Gradient of mean(fn(weights, ...) ** 2), with the first weight matrix first."""
    gradient = jax.grad(lambda p, *rest: (fn(p, *rest) ** 2).mean())
    return lambda p, *rest: [leaf for layer in gradient(p, *rest) for leaf in layer]


def tangent(f: Function) -> Function:
    return lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


def directional(problem: Mlp, order: int) -> list[Case]:
    def nested(p: Any, x: Any, v: Any) -> Any:
        f = lambda t: mlp(p, x + t * v)  # noqa: E731
        for _ in range(order):
            f = tangent(f)
        return f(jnp.zeros((), x.dtype))

    def taylor(p: Any, x: Any, v: Any) -> Any:
        series = (v,) + (jnp.zeros_like(v),) * (order - 1)
        return jet(lambda y: mlp(p, y), (x,), (series,))[1][-1]

    args = weights(problem), jnp.asarray(problem.x.numpy()), jnp.asarray(problem.v.numpy())
    return [case("jax, nested jvp", nested, *args), case("jax.jet", taylor, *args)]


def series_functions(order: int) -> dict[str, Function]:
    """``d^order/dt^order`` of the solution of ``x' = f(x)``, in three ways."""

    def nested(p: Any, x: Any) -> Any:
        f = lambda y: mlp(p, y)  # noqa: E731
        g = f
        for _ in range(order - 1):
            g = (lambda h: lambda y: jax.jvp(h, (y,), (f(y),))[1])(g)
        return g(x)

    def recursion(p: Any, x: Any) -> Any:
        y = [mlp(p, x)]
        for _ in range(1, order):
            first, rest = jet(lambda z: mlp(p, z), (x,), (tuple(y),))
            y = [first, *rest]
        return y[-1]

    def seeded(p: Any, x: Any) -> Any:
        """One order more than is needed, as in the published regularizer's code."""
        first, rest = jet(lambda z: mlp(p, z), (x,), ((jnp.ones_like(x),),))
        for _ in range(order - 1):
            first, rest = jet(lambda z: mlp(p, z), (x,), ((first, *rest),))
        return rest[-2]

    return {
        "jax, nested jvp": nested,
        "jax.jet, recursion": recursion,
        "jax.jet, recursion from ones": seeded,
    }


def series(problem: Mlp, order: int, *, gradient: bool) -> list[Case]:
    args = weights(problem), jnp.asarray(problem.x.numpy())
    return [
        case(name, squared(fn) if gradient else fn, *args)
        for name, fn in series_functions(order).items()
    ]


def laplacian(problem: Mlp, *, gradient: bool) -> list[Case]:
    def forward(p: Any, x: Any) -> Any:
        import folx

        one = folx.forward_laplacian(lambda y: mlp(p, y)[0], 0)
        return jax.vmap(lambda y: one(y).laplacian)(x)

    def hessian(p: Any, x: Any) -> Any:
        return jax.vmap(lambda y: jnp.trace(jax.hessian(lambda z: mlp(p, z)[0])(y)))(x)

    ways = {"folx": forward} if gradient else {"folx": forward, "jax, hessian": hessian}
    args = weights(problem), jnp.asarray(problem.x.numpy())
    return [case(n, squared(f) if gradient else f, *args) for n, f in ways.items()]


def divergence(problem: Mlp) -> list[Case]:
    def trace(p: Any, x: Any) -> Any:
        return jax.vmap(lambda y: jnp.trace(jax.jacfwd(lambda z: mlp(p, z))(y)))(x)

    def hutchinson(p: Any, x: Any, probe: Any) -> Any:
        _, pull = jax.vjp(lambda y: mlp(p, y), x)
        return (pull(probe)[0] * probe).sum(-1)

    p, x = weights(problem), jnp.asarray(problem.x.numpy())
    probe = jnp.sign(jnp.asarray(problem.v.numpy()))
    return [
        case("jax, jacfwd", trace, p, x),
        case("jax, Hutchinson, 1 probe", hutchinson, p, x, probe, judged=False),
    ]
