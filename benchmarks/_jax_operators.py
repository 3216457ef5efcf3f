"""The operators of ``PEER_LIST`` (tests/autodiff/operator_list.py) as JAX users write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Function = Callable[[Any], Any]


def forms(matrix: np.ndarray) -> dict[str, Function]:
    """By name; ``matrix`` [3, 3] is the one that "solve" adds to."""
    eye = jnp.eye(3)
    return {
        "tanh": jnp.tanh,
        "sigmoid": jax.nn.sigmoid,
        "softplus": jax.nn.softplus,
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "elu": jax.nn.elu,
        "softmax": lambda x: jax.nn.softmax(x, -1),
        "log_softmax": lambda x: jax.nn.log_softmax(x, -1),
        "logsumexp": lambda x: jax.scipy.special.logsumexp(x, -1),
        "layer_norm": layer_norm,
        "exp": jnp.exp,
        "log": jnp.log,
        "sqrt": jnp.sqrt,
        "rsqrt": jax.lax.rsqrt,
        "sin": jnp.sin,
        "tan": jnp.tan,
        "atan": jnp.arctan,
        "erf": jax.lax.erf,
        "pow": lambda x: x**1.7,
        "x**x": lambda x: x**x,
        "div": lambda x: x / (1 + x * x),
        "lgamma": jax.lax.lgamma,
        "matmul": lambda x: x @ x.T,
        "cumsum": lambda x: jnp.cumsum(x, -1),
        "norm": lambda x: jnp.linalg.norm(x, axis=-1),
        "scaled_dot_product_attention": lambda x: jax.nn.softmax((x @ x.T) / math.sqrt(3), -1) @ x,
        "relu": jax.nn.relu,
        "abs": jnp.abs,
        "sinh": jnp.sinh,
        "einsum": lambda x: jnp.einsum("ij,kj,kl->il", x, x, x),
        "slice": lambda x: x[:, 1:] * x[:, :-1],
        "transpose": lambda x: x.T * 1.0,
        "cat": lambda x: jnp.concatenate([x, x * x], -1),
        "stack": lambda x: jnp.stack([x, x * x], -1),
        "where": lambda x: jnp.where(x > 0.5, x * x, x),
        "max": lambda x: x.max(-1),
        "index": lambda x: x[jnp.array([2, 0])],
        "roll": lambda x: jnp.roll(x, 1, -1) * x,
        "solve": lambda x: jnp.linalg.solve(jnp.asarray(matrix) + x[0, 0] * eye, x.T),
        "slogdet": lambda x: jnp.linalg.slogdet(x.T @ x + eye)[1],
        "cholesky": lambda x: jnp.linalg.cholesky(x.T @ x + eye),
        "fft": lambda x: jnp.fft.fft(x).real,
        "conv1d": lambda x: jax.lax.conv_general_dilated(
            x[None], jnp.ones((2, 4, 2), x.dtype), (1,), "VALID"
        ),
        "loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, z: jnp.tanh(z), x),
        "data-dependent if": lambda x: x * x if x.sum() > 0 else x,
    }


def layer_norm(x: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
