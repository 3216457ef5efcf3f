"""The problems: the same field for torch, JAX and NumPy, the same initial values and weights."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Numpy = np.ndarray


@dataclass
class Problem:
    """An initial value problem that every solver gets in its own terms.

    Attributes:
        name: shown in the tables.
        field: called field(t, y); a plain function where there are no parameters.
        y0: initial state [B, D], or a tuple of states.
        end: solve over [0, end].
        tolerance: rtol and atol.
        numpy_field: f(t, y [B, D]), for scipy and for references.
        jax_field: f(jnp, t, y, parameters), where ``parameters`` are those of ``field``, in order.
        loss: of the final state; None: no gradients are asked for.
        args: further arguments of ``field`` that belong to samples, where it has them as defaults.
        alike: whether ``numpy_field`` takes any number of samples.
    """

    name: str
    field: Callable[..., Any]
    y0: Tensor | tuple[Tensor, ...]
    end: float
    tolerance: float
    numpy_field: Callable[[float, Numpy], Numpy] | None = None
    jax_field: Callable[..., Any] | None = None
    loss: Callable[[Any], Any] | None = None
    args: tuple[Tensor, ...] = ()
    alike: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.leaves[0].dtype

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.y0 if isinstance(self.y0, tuple) else (self.y0,)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.field.parameters()) if isinstance(self.field, nn.Module) else []

    def times(self) -> Tensor:
        return torch.tensor([0.0, self.end], dtype=self.dtype)

    def fresh_y0(self) -> Any:
        """The initial state as leaves of a new graph."""
        leaves = tuple(x.detach().clone().requires_grad_(True) for x in self.leaves)
        return leaves if isinstance(self.y0, tuple) else leaves[0]

    def in_double(self) -> Problem:
        """The same problem in float64, for references."""
        leaves = tuple(x.double() for x in self.leaves)
        return Problem(
            self.name,
            copy.deepcopy(self.field).double() if isinstance(self.field, nn.Module) else self.field,
            leaves if isinstance(self.y0, tuple) else leaves[0],
            self.end,
            self.tolerance,
            self.numpy_field,
            self.jax_field,
            self.loss,
        )


class Autonomous(nn.Module):
    """A network of the state alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class Hutchinson(nn.Module):
    """A continuous flow with the Hutchinson estimate of its divergence, FFJORD's field."""

    def __init__(self, net: nn.Module, probe: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("probe", probe)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = state[0]
        tracked = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            x = x if tracked else x.detach().clone().requires_grad_(True)
            dx = self.net(x)
            (pulled,) = torch.autograd.grad(dx, x, self.probe, create_graph=True)
            return dx, -(pulled * self.probe).sum(1)


def mlp(sizes: tuple[int, ...], gain: float, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        weight = torch.randn(outputs, inputs, generator=generator)
        layer.weight.data = weight * gain / math.sqrt(inputs)
        layer.bias.data = 0.1 * torch.randn(outputs, generator=generator)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def lotka_volterra(batch: int, dtype: torch.dtype) -> Problem:
    y0 = np.ones((batch, 2))
    if batch > 1:
        y0 = _representable(y0 + np.random.default_rng(0).uniform(-0.3, 0.3, (batch, 2)))

    def field(t: Tensor, y: Tensor) -> Tensor:
        prey, hunters = y[..., 0], y[..., 1]
        return torch.stack([1.5 * prey - prey * hunters, prey * hunters - 3.0 * hunters], -1)

    def jax_field(jnp: Any, t: Any, y: Any, parameters: Any) -> Any:
        prey, hunters = y[..., 0], y[..., 1]
        return jnp.stack([1.5 * prey - prey * hunters, prey * hunters - 3.0 * hunters], -1)

    return Problem(
        name=f"Lotka-Volterra B={batch} {_short(dtype)}",
        field=field,
        y0=torch.tensor(y0, dtype=dtype),
        end=10.0,
        tolerance=1e-6,
        numpy_field=lambda t, y: jax_field(np, t, y, ()),
        jax_field=jax_field,
    )


def van_der_pol(batch: int, dtype: torch.dtype, end: float = 20.0) -> Problem:
    """Stiffness mu from 0.5 to 50: every sample wants steps of its own."""
    mu = _representable(np.logspace(math.log10(0.5), math.log10(50.0), batch))

    stiffness = torch.tensor(mu, dtype=dtype)

    def field(t: Tensor, y: Tensor, mu: Tensor = stiffness) -> Tensor:
        x, v = y[..., 0], y[..., 1]
        return torch.stack([v, mu * (1 - x * x) * v - x], -1)

    def jax_field(jnp: Any, t: Any, y: Any, parameters: Any) -> Any:
        x, v = y[..., 0], y[..., 1]
        own = parameters[-1] if parameters else jnp.asarray(mu, y.dtype)
        return jnp.stack([v, own * (1 - x * x) * v - x], -1)

    return Problem(
        name=f"Van der Pol mu=.5..50 B={batch} {_short(dtype)}",
        field=field,
        y0=torch.tensor([[2.0, 0.0]], dtype=dtype).repeat(batch, 1),
        end=end,
        tolerance=1e-6,
        numpy_field=lambda t, y: jax_field(np, t, y, ()),
        jax_field=jax_field,
        args=(stiffness,),
    )


def small_mlp(batch: int, dtype: torch.dtype) -> Problem:
    y0 = _representable(np.random.default_rng(1).normal(size=(batch, 2)))
    net = mlp((2, 64, 64, 2), gain=2.2, seed=0)
    return _network(f"MLP 2-64-64-2 B={batch} {_short(dtype)}", net, y0, dtype, 10.0, 1e-6)


def narrow_mlp(batch: int, dtype: torch.dtype) -> Problem:
    y0 = _representable(np.random.default_rng(4).normal(size=(batch, 2)))
    net = mlp((2, 32, 32, 2), gain=1.5, seed=5)
    return _network(f"MLP 2-32-32-2 B={batch} {_short(dtype)}", net, y0, dtype, 5.0, 1e-5)


def lorenz(count: int, dtype: torch.dtype) -> Problem:
    """Trajectories from points about the attractor."""
    y0 = _representable(np.random.default_rng(6).normal([0.0, 0.0, 25.0], 8.0, size=(count, 3)))

    def field(t: Tensor, y: Tensor) -> Tensor:
        x, v, z = y[..., 0], y[..., 1], y[..., 2]
        return torch.stack([10 * (v - x), x * (28 - z) - v, x * v - 8 / 3 * z], -1)

    def numpy_field(t: float, y: Numpy) -> Numpy:
        x, v, z = y[..., 0], y[..., 1], y[..., 2]
        return np.stack([10 * (v - x), x * (28 - z) - v, x * v - 8 / 3 * z], -1)

    return Problem(
        name=f"Lorenz, {count} trajectories {_short(dtype)}",
        field=field,
        y0=torch.tensor(y0, dtype=dtype),
        end=1.0,
        tolerance=1e-6,
        numpy_field=numpy_field,
        alike=True,
    )


def wide_mlp(dtype: torch.dtype, batch: int = 512) -> Problem:
    y0 = _representable(np.random.default_rng(2).normal(size=(batch, 64)))
    net = mlp((64, 256, 256, 64), gain=1.5, seed=3)
    return _network(f"MLP 64-256-256-64 B={batch} {_short(dtype)}", net, y0, dtype, 1.0, 1e-5)


def ffjord(dtype: torch.dtype, batch: int = 512) -> Problem:
    rng = np.random.default_rng(2)
    x0 = torch.tensor(_representable(rng.normal(size=(batch, 64))), dtype=dtype)
    probe = torch.tensor(rng.choice([-1.0, 1.0], size=(batch, 64)), dtype=dtype)
    net = mlp((64, 256, 256, 64), gain=1.5, seed=3)

    def jax_field(jnp: Any, t: Any, state: Any, parameters: Any) -> Any:
        import jax

        signs = jnp.asarray(probe.numpy(), state[0].dtype)
        dx, pull = jax.vjp(lambda x: _layers(jnp, x, parameters), state[0])
        return dx, -(pull(signs)[0] * signs).sum(1)

    return Problem(
        name=f"FFJORD 64-256-256-64 B={batch} {_short(dtype)}",
        field=Hutchinson(net, probe).to(dtype),
        y0=(x0, torch.zeros(batch, dtype=dtype)),
        end=1.0,
        tolerance=1e-5,
        jax_field=jax_field,
        loss=lambda state: 0.5 * (state[0] ** 2).sum() / batch - state[1].sum() / batch,
    )


def _network(
    name: str, net: nn.Sequential, y0: Numpy, dtype: torch.dtype, end: float, tolerance: float
) -> Problem:
    field = Autonomous(net).to(dtype)
    weights = [p.detach().double().numpy() for p in field.parameters()]
    return Problem(
        name=name,
        field=field,
        y0=torch.tensor(y0, dtype=dtype),
        end=end,
        tolerance=tolerance,
        numpy_field=lambda t, y: _layers(np, y, weights),
        jax_field=lambda jnp, t, y, parameters: _layers(jnp, y, parameters),
        loss=lambda y: (y**2).sum(),
    )


def _representable(x: Numpy) -> Numpy:
    """Rounded to float32, so that the problem is the same one in both precisions."""
    return x.astype(np.float32).astype(np.float64)


def _layers(xp: Any, y: Any, parameters: Any) -> Any:
    for i in range(0, len(parameters), 2):
        y = y @ parameters[i].T + parameters[i + 1]
        if i < len(parameters) - 2:
            y = xp.tanh(y)
    return y


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.float64: "f64"}[dtype]
