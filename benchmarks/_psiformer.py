"""A small PsiFormer-like wavefunction: two layers of self-attention over electrons, a determinant.

Plainly written, the same in torch and in JAX with the same weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from _measure import Case
from _operator_bench import Shape
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, NUCLEI = 64, 4, 2, 2


class Layer(nn.Module):
    """Attention, then a tanh net, each added to what came in, each followed by a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        attended = torch.softmax(scores, -1) @ v
        h = self.norm1(h + self.out(attended.transpose(-2, -3).flatten(-2)))
        return self.norm2(h + self.outer(torch.tanh(self.inner(h))))


class PsiFormer(nn.Module):
    """Positions [..., 3 N] -> log|psi| [...]."""

    def __init__(self, electrons: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.electrons = electrons
        self.register_buffer("nuclei", torch.randn(NUCLEI, 3))
        self.embed = nn.Linear(4 * NUCLEI, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH, HEADS) for _ in range(LAYERS))
        self.orbitals = nn.Linear(WIDTH, electrons)
        self.decay = nn.Parameter(torch.rand(NUCLEI, electrons) / 2 + 0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        r = x.unflatten(-1, (self.electrons, 3))
        apart = r.unsqueeze(-2) - self.nuclei
        distance = torch.linalg.norm(apart, dim=-1)
        h = self.embed(torch.cat([apart.flatten(-2), distance], -1))
        for layer in self.layers:
            h = layer(h)
        envelope = torch.exp(-distance.unsqueeze(-1) * self.decay).sum(-2)
        return torch.linalg.slogdet(self.orbitals(h) * envelope)[1]

    def walkers(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, 3 * self.electrons, generator=generator, dtype=torch.float64)
        return x.to(self.decay.dtype)


def folx_case(name: str, net: PsiFormer, x: Tensor, threshold: int) -> Case:
    """Forward Laplacian in JAX, Jacobians kept sparse up to ``threshold`` entries a row."""
    import folx
    import jax
    import jax.numpy as jnp
    from _operator_jax import case

    weights = {n: jnp.asarray(p.detach().numpy()) for n, p in net.state_dict().items()}

    def linear(p: Any, name: str, h: Any) -> Any:
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(p: Any, name: str, h: Any) -> Any:
        centered = h - h.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        return centered * scale * p[f"{name}.weight"] + p[f"{name}.bias"]

    def layer(p: Any, i: int, h: Any) -> Any:
        n = h.shape[0]
        qkv = linear(p, f"layers.{i}.qkv", h)
        q, k, v = (y.reshape(n, HEADS, -1).swapaxes(0, 1) for y in jnp.split(qkv, 3, -1))
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        attended = (jax.nn.softmax(scores, -1) @ v).swapaxes(0, 1).reshape(n, -1)
        h = norm(p, f"layers.{i}.norm1", h + linear(p, f"layers.{i}.out", attended))
        inner = jnp.tanh(linear(p, f"layers.{i}.inner", h))
        return norm(p, f"layers.{i}.norm2", h + linear(p, f"layers.{i}.outer", inner))

    def logabs(p: Any, x: Any) -> Any:
        r = x.reshape(-1, 3)
        apart = r[:, None, :] - p["nuclei"]
        distance = jnp.linalg.norm(apart, axis=-1)
        h = linear(p, "embed", jnp.concatenate([apart.reshape(len(r), -1), distance], -1))
        for i in range(LAYERS):
            h = layer(p, i, h)
        envelope = jnp.exp(-distance[..., None] * p["decay"]).sum(-2)
        return jnp.linalg.slogdet(linear(p, "orbitals", h) * envelope)[1]

    def laplacian(p: Any, x: Any) -> Any:
        one = folx.forward_laplacian(lambda y: logabs(p, y), threshold)
        return jax.vmap(lambda y: one(y).laplacian)(x)

    return case(name, laplacian, weights, jnp.asarray(x.numpy()))


def products(electrons: int, walkers: int) -> list[Shape]:
    """The products of a forward Laplacian for some walkers.

    Before the first attention an electron's features depend on its own three coordinates: five rows
    (value, three derivatives, Laplacian). From there on on all: 3 N + 2 rows. Products of attention
    are counted once for each factor that varies, but for those of the first layer whose varying
    factor belongs to one electron.
    """
    n, width, head = electrons, WIDTH, WIDTH // HEADS
    own, every = 5 * walkers * n, (3 * n + 2) * walkers * n
    shapes: list[Shape] = [(own, 4 * NUCLEI, width), (own, width, 3 * width)]
    shapes += [(own * HEADS, head, n)] * 2  # dQ K and Q dK
    shapes += [(every * HEADS, n, head)]  # dA V
    for i in range(LAYERS):
        if i:
            shapes += [(every, width, 3 * width)]
            shapes += [(every * HEADS, head, n)] * 2 + [(every * HEADS, n, head)] * 2
        shapes += [(every, width, width)] * 3
    return [*shapes, (every, width, n)]
