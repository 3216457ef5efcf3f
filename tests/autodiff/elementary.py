"""Norms, attention, linear algebra and cells written in elementary operations.

What nested reverse mode of these gives is right at every order; of torch's fused forms it is not
(docs/taylor_mode_and_torch.md). Only sums, products, quotients, comparisons, indexing and
elementwise functions whose derivative formulas are elementary again are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As F.linear."""
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def tanh(x: Tensor) -> Tensor:
    return 1 - 2 / (1 + torch.exp(2 * x))


def erf(x: Tensor) -> Tensor:
    """Torch has none of complex numbers; scipy's is for references without a graph."""
    if not x.is_complex():
        return torch.erf(x)
    from scipy.special import erf as complex_erf

    return torch.from_numpy(complex_erf(x.detach().numpy()))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True)


def logsumexp(x: Tensor) -> Tensor:
    return torch.log(torch.exp(x).sum(-1))


def standardize(x: Tensor, dims: int | Sequence[int], eps: float = 1e-5) -> Tensor:
    """Mean 0 and variance 1 over ``dims``: the heart of every norm but the root-mean-square one."""
    centered = x - x.mean(dims, keepdim=True)
    return centered * (centered * centered).mean(dims, keepdim=True).add(eps) ** -0.5


def layer_norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
    return standardize(x, -1, module.eps) * module.weight + module.bias


def group_norm(x: Tensor, module: nn.GroupNorm) -> Tensor:
    grouped = x.reshape(x.shape[0], module.num_groups, -1)
    y = standardize(grouped, -1, module.eps).reshape(x.shape)
    shape = (-1,) + (1,) * (x.ndim - 2)
    return y * module.weight.reshape(shape) + module.bias.reshape(shape)


def batch_norm(x: Tensor, module: nn.Module) -> Tensor:
    """In training over the batch; else by the running statistics. Channels are dimension 1."""
    shape = (-1,) + (1,) * (x.ndim - 2)
    if module.training or module.running_mean is None:
        y = standardize(x, [d for d in range(x.ndim) if d != 1], module.eps)
    else:
        scale = (module.running_var + module.eps) ** -0.5
        y = (x - module.running_mean.reshape(shape)) * scale.reshape(shape)
    return y * module.weight.reshape(shape) + module.bias.reshape(shape)


def rms_norm(x: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps
    return x * ((x * x).mean(-1, keepdim=True) + eps) ** -0.5


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / math.sqrt(q.shape[-1])
    return (softmax(scores).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def multihead(x: Tensor, module: nn.MultiheadAttention) -> Tensor:
    """Self-attention of [B, T, E] as nn.MultiheadAttention does it."""

    def heads(y: Tensor) -> Tensor:
        return y.reshape(*y.shape[:-1], module.num_heads, -1).transpose(-2, -3)

    q, k, v = affine(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    y = attention(heads(q), heads(k), heads(v)).transpose(-2, -3).reshape(x.shape)
    return affine(y, module.out_proj.weight, module.out_proj.bias)


def encoder_layer(x: Tensor, module: nn.TransformerEncoderLayer) -> Tensor:
    """Without dropout; the activation is taken from the module (relu, gelu)."""
    act = {"relu": lambda y: torch.where(y > 0, y, 0), "gelu": gelu}[module.activation.__name__]

    def feed_forward(x: Tensor) -> Tensor:
        y = act(affine(x, module.linear1.weight, module.linear1.bias))
        return affine(y, module.linear2.weight, module.linear2.bias)

    if module.norm_first:
        x = x + multihead(layer_norm(x, module.norm1), module.self_attn)
        return x + feed_forward(layer_norm(x, module.norm2))
    x = layer_norm(x + multihead(x, module.self_attn), module.norm1)
    return layer_norm(x + feed_forward(x), module.norm2)


def gru_cell(x: Tensor, h: Tensor, cell: nn.GRUCell) -> Tensor:
    rx, zx, nx = affine(x, cell.weight_ih, cell.bias_ih).chunk(3, -1)
    rh, zh, nh = affine(h, cell.weight_hh, cell.bias_hh).chunk(3, -1)
    z = sigmoid(zx + zh)
    return (1 - z) * tanh(nx + sigmoid(rx + rh) * nh) + z * h


def lstm(x: Tensor, module: nn.LSTM) -> Tensor:
    """One layer, batch first; the outputs [B, T, H]."""
    h = c = x.new_zeros(x.shape[0], module.hidden_size)
    outputs = []
    for t in range(x.shape[1]):
        gates = affine(x[:, t], module.weight_ih_l0, module.bias_ih_l0)
        gates = gates + affine(h, module.weight_hh_l0, module.bias_hh_l0)
        i, f, g, o = gates.chunk(4, -1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        outputs.append(h)
    return torch.stack(outputs, 1)


def conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """Valid, stride 1."""
    length = x.shape[-1] - weight.shape[-1] + 1
    return sum(
        affine(x[..., k : k + length].transpose(-1, -2), weight[..., k]).transpose(-1, -2)
        for k in range(weight.shape[-1])
    )


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Shifted slices, one for each tap; also of complex input."""
    kh, kw = weight.shape[-2:]
    x = torch.nn.functional.pad(x, (padding,) * 4)
    rows = (x.shape[-2] - kh) // stride + 1
    columns = (x.shape[-1] - kw) // stride + 1
    y = 0
    for i in range(kh):
        for j in range(kw):
            tap = x[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
            y = y + torch.einsum("bihw,oi->bohw", tap, weight[:, :, i, j].to(x.dtype))
    return y if bias is None else y + bias.reshape(-1, 1, 1)


def det(a: Tensor) -> Tensor:
    """By expansion along the first row: polynomial, so right for singular matrices too."""
    n = a.shape[-1]
    if n == 1:
        return a[..., 0, 0]
    total = 0
    for j in range(n):
        minor = torch.cat([a[..., 1:, :j], a[..., 1:, j + 1 :]], -1)
        total = total + (-1) ** j * a[..., 0, j] * det(minor)
    return total


def solve(a: Tensor, b: Tensor) -> Tensor:
    """Elimination without pivots, for matrices near a positive definite one."""
    n = a.shape[-1]
    rows = [torch.cat([a[..., i, :], b[..., i, :]], -1) for i in range(n)]
    for i in range(n):
        rows[i] = rows[i] / rows[i][..., i : i + 1]
        for k in range(n):
            if k != i:
                rows[k] = rows[k] - rows[k][..., i : i + 1] * rows[i]
    return torch.stack(rows, -2)[..., n:]


def cholesky(a: Tensor) -> Tensor:
    n = a.shape[-1]
    entries: dict[tuple[int, int], Tensor] = {}
    zero = torch.zeros_like(a[..., 0, 0])
    for j in range(n):
        for i in range(j, n):
            rest = a[..., i, j]
            for k in range(j):
                rest = rest - entries[i, k] * entries[j, k]
            entries[i, j] = rest**0.5 if i == j else rest / entries[j, j]
    rows = [torch.stack([entries.get((i, j), zero) for j in range(n)], -1) for i in range(n)]
    return torch.stack(rows, -2)


def eigvalsh(a: Tensor) -> Tensor:
    """Newton's method on the characteristic polynomial from the eigenvalues themselves.

    Each step doubles the number of derivatives that are right: three give seven.
    """
    n = a.shape[-1]
    values = torch.linalg.eigvalsh(a.detach())
    eye = torch.eye(n, dtype=a.dtype)
    for _ in range(3):
        shifted = a.unsqueeze(-3) - values[..., None, None] * eye
        slope = 0
        for i in range(n):
            keep = [k for k in range(n) if k != i]
            slope = slope - det(shifted[..., keep, :][..., keep])
        values = values - det(shifted) / slope
    return values


def fft(x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the transform over the last dimension."""
    n = x.shape[-1]
    angle = -2 * math.pi * torch.outer(torch.arange(n), torch.arange(n)).to(x.dtype) / n
    return affine(x, torch.cos(angle)), affine(x, torch.sin(angle))


def running(x: Tensor, product: bool) -> Tensor:
    """Cumulative sum or product over the last dimension."""
    parts = [x[..., 0]]
    for i in range(1, x.shape[-1]):
        parts.append(parts[-1] * x[..., i] if product else parts[-1] + x[..., i])
    return torch.stack(parts, -1)
