"""What checks of the forward Laplacian have in common: references and functions of electrons."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctorch.autodiff import laplacian

D = torch.float64


def hessians(f, x: Tensor) -> Tensor:
    """``[..., d, d]`` of ``f: [..., d] -> [...]``, sample by sample, by nested reverse mode."""
    flat = x.reshape(-1, x.shape[-1])
    out = [torch.autograd.functional.hessian(lambda z: f(z.unsqueeze(0))[0], xi) for xi in flat]
    return torch.stack(out).reshape(*x.shape, x.shape[-1])


def agrees(f, x, *, reference=None, tolerance=1e-10, **options):
    reference = reference or f
    value, gradient, lap = laplacian(f, x, **options)
    h = hessians(reference, x)
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(reference(z).sum(), z)
    expected = h.diagonal(0, -2, -1).sum(-1)
    scale = 1 + float(h.abs().max())
    torch.testing.assert_close(value, reference(x), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, g, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(lap, expected, rtol=tolerance, atol=tolerance * scale)


def normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=D)


def mlp(g, d, width=7):
    w1, w2, b = normal(g, width, d), normal(g, width, width), normal(g, width)
    return lambda x: F.linear(torch.tanh(F.linear(x, w1, b)), w2).sin().sum(-1)


# ---- functions of electrons


def electrons(x):
    return x.unflatten(-1, (-1, 3))


def features(x, w):
    r = electrons(x)
    n = r.norm(dim=-1, keepdim=True)
    return torch.cat([r, n, torch.ones_like(n.detach())], -1) @ w


def pair_features(x, w):
    r = x.reshape(*x.shape[:-1], -1, 3)
    d2 = (r.unsqueeze(-2) - r.unsqueeze(-3)).square().sum(-1) + 0.5
    return torch.stack([d2.sqrt(), torch.exp(-d2 / 5)], -1) @ w[:2]


COMPACT = {
    "one electron": lambda x, w: features(x, w).tanh().sum((-1, -2)),
    "mean field": lambda x, w: (features(x, w).tanh().mean(-2) ** 2).sum(-1),
    "mean field, kept": lambda x, w: (
        (features(x, w) * features(x, w).mean(-2, True)).tanh().sum((-1, -2))
    ),
    "pairs": lambda x, w: pair_features(x, w).tanh().sum((-1, -2, -3)),
    "pairs to one": lambda x, w: (
        (pair_features(x, w).tanh().mean(-2) + features(x, w)).sin().sum((-1, -2))
    ),
    "pairs to the other": lambda x, w: (
        (pair_features(x, w).mean(-3) * features(x, w)).sin().sum((-1, -2))
    ),
    "pairs and ones": lambda x, w: (
        (pair_features(x, w) * features(x, w).unsqueeze(-2)).sin().sum((-1, -2, -3))
    ),
    "pairs, transposed": lambda x, w: (
        (pair_features(x, w).transpose(-2, -3) * features(x, w).unsqueeze(-3))
        .sin()
        .sum((-1, -2, -3))
    ),
    "quotient of pairs": lambda x, w: (
        features(x, w).tanh().unsqueeze(-2) / (3 + features(x, w).tanh().unsqueeze(-3))
    ).sum((-1, -2, -3)),
    "outer product": lambda x, w: (features(x, w) @ features(x, w).mT).tanh().sum((-1, -2)),
    "inner product": lambda x, w: (features(x, w).mT @ features(x, w)).tanh().sum((-1, -2)),
    "one slot": lambda x, w: features(x, w)[..., 1, :].tanh().sum(-1),
    "some slots": lambda x, w: features(x, w)[..., 1:, :].tanh().mean(-2).sin().sum(-1),
    "slots in another order": lambda x, w: (
        (features(x, w).flip(-2) * features(x, w)).tanh().sum((-1, -2))
    ),
    "slots rolled": lambda x, w: (features(x, w).roll(1, -2) * features(x, w)).tanh().sum((-1, -2)),
    "slots strided": lambda x, w: features(x, w)[..., ::2, :].tanh().sum((-1, -2)),
    "dims merged": lambda x, w: features(x, w).flatten(-2).sin().sum(-1),
    "max over slots": lambda x, w: features(x, w).amax(-2).sin().sum(-1),
    "softmax over slots": lambda x, w: (features(x, w).softmax(-2) * features(x, w)).sum((-1, -2)),
    "norm over slots": lambda x, w: features(x, w).norm(dim=-2).sum(-1),
    "matrix from the left": lambda x, w: (w[:4, :4] @ features(x, w)).tanh().sum((-1, -2)),
    "written in place": lambda x, w: (features(x, w) + 0).mul_(2.0).add_(1.0).sin().sum((-1, -2)),
}


class Block(nn.Module):
    """Attention and a perceptron; written with torch's fused functions or by elementary ones."""

    def __init__(self, width, heads, elementary=False):
        super().__init__()
        self.heads, self.elementary = heads, elementary
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(5))

    def norm(self, i, h):
        if not self.elementary:
            return self.norms[i](h)
        c = h - h.mean(-1, keepdim=True)
        c = c / ((c * c).mean(-1, keepdim=True) + 1e-5) ** 0.5
        return c * self.norms[i].weight + self.norms[i].bias

    def forward(self, h):
        z = self.norm(0, h)
        q, k, v = (m(z).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for m in self.maps[:3])
        if self.elementary:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            a = torch.softmax(scores, -1) @ v
        else:
            a = F.scaled_dot_product_attention(q, k, v)
        h = h + self.maps[3](a.transpose(-2, -3).flatten(-2))
        return h + torch.tanh(self.maps[4](self.norm(1, h)))


class Psi(nn.Module):
    """The logarithm of a wavefunction, of the shape of a PsiFormer."""

    def __init__(self, electrons, width=8, heads=2, layers=2, elementary=False):
        super().__init__()
        self.first = nn.Linear(5, width)
        self.blocks = nn.Sequential(*(Block(width, heads, elementary) for _ in range(layers)))
        self.orbitals = nn.Linear(width, electrons)

    def forward(self, x):
        r = electrons(x)
        n = r.norm(dim=-1, keepdim=True)
        spin = torch.ones_like(n)
        h = self.blocks(self.first(torch.cat([r, n, spin], -1)))
        return torch.linalg.slogdet(self.orbitals(h) * torch.exp(-n))[1]
