"""Random programs of tensor operators, for comparing lowered code with eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

Draw = Callable[..., Any]


def _positive(x: Tensor) -> Tensor:
    return x.abs() + 0.4


def _inside(x: Tensor) -> Tensor:
    return 0.9 * torch.tanh(x)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x, "abs": torch.abs, "exp": lambda x: _inside(x).exp(),
    "exp2": lambda x: _inside(x).exp2(), "expm1": lambda x: _inside(x).expm1(),
    "log": lambda x: _positive(x).log(), "log1p": lambda x: _positive(x).log1p(),
    "log2": lambda x: _positive(x).log2(), "log10": lambda x: _positive(x).log10(),
    "sqrt": lambda x: _positive(x).sqrt(), "rsqrt": lambda x: _positive(x).rsqrt(),
    "reciprocal": lambda x: _positive(x).reciprocal(), "square": torch.square,
    "cube": lambda x: _inside(x) ** 3, "power": lambda x: _positive(x) ** 1.7,
    "inverse": lambda x: _positive(x) ** -2, "base": lambda x: 2.0 ** _inside(x),
    "base3": lambda x: 3.0 ** _inside(x), "sin": torch.sin, "cos": torch.cos,
    "tan": lambda x: _inside(x).tan(), "asin": lambda x: _inside(x).asin(),
    "acos": lambda x: _inside(x).acos(), "atan": torch.atan,
    "sinh": lambda x: _inside(x).sinh(), "cosh": lambda x: _inside(x).cosh(),
    "tanh": torch.tanh, "asinh": torch.asinh, "acosh": lambda x: (_positive(x) + 1).acosh(),
    "atanh": lambda x: _inside(x).atanh(), "sigmoid": torch.sigmoid, "erf": torch.erf,
    "erfc": torch.erfc, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "elu": F.elu, "celu": F.celu,
    "selu": F.selu, "leaky_relu": lambda x: F.leaky_relu(x, 0.2), "softplus": F.softplus,
    "softplus_beta": lambda x: F.softplus(x, 3.0, 2.0), "mish": F.mish, "sinc": torch.sinc,
    "logsigmoid": F.logsigmoid, "hardtanh": F.hardtanh, "hardswish": F.hardswish,
    "hardsigmoid": lambda x:
    F.hardsigmoid(x.detach()) * x, "softsign": F.softsign, "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.1, -0.2), "logit": lambda x: (x.sigmoid()).logit(),
    "floor": lambda x: (3 * x + 0.1234).floor(), "ceil": lambda x: (3 * x + 0.1234).ceil(),
    "round": lambda x: (3 * x + 0.1234).round(), "trunc": lambda x: (3 * x + 0.1234).trunc(),
    "frac": lambda x: (3 * x + 0.1234).frac(), "sign": lambda x: (x + 0.1234).sign(),
    "clamp": lambda x: x.clamp(-0.51, 0.73), "clamp_min": lambda x: x.clamp_min(0.11),
    "clamp_max": lambda x: x.clamp(max=0.37), "scaled": lambda x: 2.5 * x - 0.75,
    "divided": lambda x: 1.5 / _positive(x) + x / 3, "rsub": lambda x: torch.rsub(x, 2, alpha=3),
    "nan_to_num": torch.nan_to_num, "deg2rad": torch.deg2rad, "ndtr": torch.special.ndtr,
    "as_mask": lambda x: (x > 0.1234).to(x.dtype) * x,
    "mask_logic": lambda x: torch.where((x > 0.1234) & ~(x > 0.71) | (x < -0.9), x, 0.5 * x),
    "isfinite": lambda x: torch.where(torch.isfinite(x), x, 0.0), "remainder": lambda x:
    (x + 0.1234).remainder(0.37), "fmod": lambda x: (x + 0.1234).fmod(0.37),
    "floor_divide": lambda x: (x + 0.1234).div(0.37, rounding_mode="floor") * x,
    "in_place": lambda x: x.clone().mul_(2).add_(x).tanh_(),
    "signbit": lambda x: torch.where((x - 0.1234).signbit(), x, 2 * x),
    "isinf": lambda x: torch.where(torch.isinf(x), 0.0, x), "rad2deg": lambda x: x.rad2deg() / 50,
    "lgamma": lambda x: _positive(x).detach().lgamma() * x, "clip": lambda x: x.clip(-0.3),
    "logic": lambda x: torch.where(
        torch.logical_xor(x > 0.1234, x > -0.4) ^ torch.logical_not(x < 0.9), x, x.square()
    ),
    "whole": lambda x: ((3 * x + 0.1234).detach() // 1) * x,
    "filled": lambda x: torch.full_like(x, 0.3) * x + x.new_full((1,), 0.2) + x.new_ones(()),
    "bounded_below": lambda x: torch.clamp_max(x, 0.4),
    "written": lambda x: _written(x), "masked_fill": lambda x: x.masked_fill(x > 0.1234, 0.5),
}  # fmt: skip


def _written(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[..., 0] = x[..., -1]
    out[..., 1:] = x[..., 1:] * 2
    return out


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": lambda a, b: torch.sub(a, b, alpha=0.5), "mul": torch.mul,
    "div": lambda a, b: a / _positive(b), "maximum": torch.maximum, "minimum": torch.minimum,
    "atan2": lambda a, b: torch.atan2(a, _positive(b)), "hypot": lambda a, b:
    torch.hypot(_positive(a), b), "where": lambda a, b: torch.where(a > b + 0.1234, a, b),
    "pow": lambda a, b: _positive(a) ** _inside(b), "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "logaddexp": torch.logaddexp, "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.3),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, _positive(a), value=0.3), "xlogy": lambda a, b:
    torch.xlogy(a, _positive(b)), "fmod": lambda a, b: torch.fmod(a + 0.1234, _positive(b)),
    "copysign": torch.copysign,
    "heaviside": lambda a, b: torch.heaviside(a.detach(), b.detach()) * b,
}  # fmt: skip

REDUCTIONS: dict[str, Callable[[Tensor, int, bool], Tensor]] = {
    "sum": lambda x, d, k: x.sum(d, k), "mean": lambda x, d, k: x.mean(d, k),
    "prod": lambda x, d, k: _inside(x).prod(d, k), "amax": lambda x, d, k: x.amax(d, k),
    "amin": lambda x, d, k: x.amin(d, k), "max": lambda x, d, k: x.max(d, k).values,
    "min": lambda x, d, k: x.min(d, k).values,
    "var": lambda x, d, k: x.var(d, correction=0, keepdim=k),
    "std": lambda x, d, k: (torch.cat([x, x + 1], d)).std(d, keepdim=k),
    "norm": lambda x, d, k: _positive(x).norm(dim=d, keepdim=k),
    "norm1": lambda x, d, k: torch.linalg.vector_norm(x, 1, d, k),
    "norm3": lambda x, d, k: torch.linalg.vector_norm(_positive(x), 3, d, k),
    "norm_inf": lambda x, d, k: torch.linalg.vector_norm(x, float("inf"), d, k),
    "logsumexp": lambda x, d, k: x.logsumexp(d, k),
    "any": lambda x, d, k: (x > 0.1234).any(d, k).to(x.dtype),
    "all": lambda x, d, k: (x > -0.9).all(d, k).to(x.dtype),
    "count": lambda x, d, k: (x > 0.1234).sum(d, k).to(x.dtype),
}  # fmt: skip

ALONG: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": lambda x, d: x.softmax(d), "log_softmax": lambda x, d: x.log_softmax(d),
    "cumsum": lambda x, d: x.cumsum(d), "cumprod": lambda x, d: _positive(x).cumprod(d),
    "flip": lambda x, d: x.flip(d), "roll": lambda x, d: x.roll(1, d),
    "normalize": lambda x, d: F.normalize(x + 2, dim=d), "chunks": lambda x, d:
    torch.cat([2 * part for part in x.chunk(2, d)], d), "unbind": lambda x, d:
    torch.stack([part * (i + 1) for i, part in enumerate(x.unbind(d))], d),
    "diff": lambda x, d: torch.cat([x, x], d).diff(dim=d), "repeat": lambda x, d:
    x.repeat_interleave(2, d), "index": lambda x, d:
    x.index_select(d, torch.tensor([0, x.shape[d] - 1, 0])), "narrow": lambda x, d:
    x.narrow(d, 0, (x.shape[d] + 1) // 2), "unfold": lambda x, d:
    torch.cat([x, x], d).unfold(d, 2, 1), "argmax": lambda x, d:
    x.gather(d, x.argmax(d, keepdim=True)),
    "argmin": lambda x, d: x.gather(d, x.argmin(d, keepdim=True)),
    "var_mean": lambda x, d: torch.cat(torch.var_mean(x, d, correction=0, keepdim=True), d),
    "repeated": lambda x, d: x.repeat(1, *[2] * (x.dim() - 1)),
    "copied": lambda x, d: x.index_copy(d, torch.tensor([0]), 2 * x.narrow(d, x.shape[d] - 1, 1)),
    "selected": lambda x, d: x.select_scatter(x.select(d, 0) * 2, d, x.shape[d] - 1),
    "sliced": lambda x, d: x.slice_scatter(x.narrow(d, 0, 1) * 2, d, 0, 1),
    "gather": lambda x, d: x.gather(d, torch.zeros(x.shape, dtype=torch.long)),
}  # fmt: skip


@dataclass
class Step:
    """One operator of a program."""

    kind: str
    name: str
    first: int
    second: int
    dim: int
    keep: bool


class Program:
    """A vector field made of steps, on states [B, *shape].

    Args:
        steps: what is done, each on results of earlier ones.
        dtype: of the weights.
    """

    def __init__(self, steps: list[Step], dtype: torch.dtype) -> None:
        self.steps = steps
        self.dtype = dtype
        self.weights: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"Program({self.steps}, {self.dtype})"

    def __call__(self, t: Tensor, y: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        pool = [y, y * own.view(-1, *[1] * (y.dim() - 1)), y + shared, y * t]
        for step in self.steps:
            x, other = pool[step.first % len(pool)], pool[step.second % len(pool)]
            result = self.run(step, x, other)
            if result.numel() // len(y) <= 200:
                pool.append(result)
        out = torch.zeros_like(y)
        for i, x in enumerate(pool[4:]):
            if x.shape == y.shape:
                out = out + torch.tanh(x)
            else:
                size = x.reshape(len(y), -1).mean(1).view(-1, *[1] * (y.dim() - 1))
                out = out + torch.sin(size + i) * y
        return out

    def run(self, step: Step, x: Tensor, other: Tensor) -> Tensor:
        dim = 1 + step.dim % (x.dim() - 1) if x.dim() > 1 else 0
        if x.dim() == 1:
            x = x[:, None]
            dim = 1
        if other.dim() == 1:
            other = other[:, None]
        if step.kind == "unary":
            return UNARY[step.name](x)
        if step.kind == "binary":
            if x.shape[1:] != other.shape[1:]:
                other = other.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))
            return BINARY[step.name](x, other)
        if step.kind == "reduction":
            return REDUCTIONS[step.name](x, dim, step.keep)
        if step.kind == "along":
            return ALONG[step.name](x, dim)
        return self.structure(step.name, x, other, dim)

    def weight(self, *shape: int) -> Tensor:
        key = "x".join(map(str, shape))
        if key not in self.weights:
            generator = torch.Generator().manual_seed(sum(shape))
            self.weights[key] = (
                (torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5)
                .to(self.dtype)
                .requires_grad_(True)
            )
        return self.weights[key]

    def structure(self, name: str, x: Tensor, other: Tensor, dim: int) -> Tensor:
        n = x.shape[-1]
        if name == "linear":
            return F.linear(x, self.weight(3, n), self.weight(3))
        if name == "masked_linear":
            return F.linear(x, (self.weight(n, n) * torch.ones(n, n, dtype=x.dtype).tril()).tanh())
        if name == "layer_norm":
            return F.layer_norm(torch.cat([x, 2 * x + 1], -1), (2 * n,), self.weight(2 * n))
        if name == "group_norm":
            flat = x.flatten(1)
            both = torch.cat([flat, flat.sin() + 2], 1)[:, : 2 * (flat.shape[1])]
            return F.group_norm(both.view(len(x), 2, -1), 2, self.weight(2), self.weight(2))
        if name == "cat":
            return torch.cat([x.flatten(1), other.flatten(1)], 1)
        if name == "stack":
            return torch.stack([x, x.cos()], dim)
        if name == "flatten":
            return x.flatten(1)
        if name == "transpose":
            return x.transpose(1, -1)
        if name == "gram":
            return torch.einsum("bi,bj->bij", x.flatten(1), other.flatten(1))[:, :8, :8]
        if name == "attention":
            m = x.reshape(len(x), -1, n)
            return F.scaled_dot_product_attention(m, m, m)
        if name == "bmm":
            m = x.reshape(len(x), -1, n)
            return m.mT @ m * 0.3
        if name == "matrix":
            return self.weight(2, n) @ x.reshape(len(x), -1, n).mT
        if name == "pad":
            return F.pad(x, (1, 2), value=0.5)
        if name == "pad_zero":
            return F.pad(x, (1, 1))
        if name == "expand":
            return x.unsqueeze(-1).expand(*x.shape, 2) * 1.5
        if name == "tril":
            return torch.tril(x[:, None, :] * x[:, :, None]) if x.dim() == 2 else x.tril()
        if name == "slice":
            return x[..., ::2]
        if name == "advanced":
            flat = x.flatten(1)
            return flat[:, [0, -1, 0]] * flat[:, torch.tensor([0])]
        if name == "conditions":
            return torch.where(x.sum(dim, keepdim=True) > 0.1234, x, x.square())
        if name in ("reflect", "replicate"):
            long = torch.cat([x, x + 1, x * 2], -1).reshape(len(x), -1, 3 * n)
            return F.pad(long, (1, 2), mode=name)
        if name in ("reflect_2d", "replicate_2d"):
            flat = x.flatten(1)
            plane = torch.stack([flat, flat.sin(), flat.cos()], 1)[:, None]
            plane = torch.cat([plane, 2 * plane, plane], -1)
            return F.pad(plane, (1, 1, 1, 1), mode=name.removesuffix("_2d"))
        if name == "diagonals":
            square = torch.diag_embed(x.flatten(1)[:, :6]).triu()
            return square.diagonal_scatter(square.sum(1), 0, 1, 2)
        if name == "cross":
            three = torch.cat(
                [x, x * other.reshape(len(x), -1).mean(1).view(-1, *[1] * (x.dim() - 1))], -1
            )
            three = torch.cat([three, x.cos()], -1)[..., :3]
            return torch.linalg.cross(three, three.flip(-1).sin(), dim=-1)
        if name == "products":
            m = x.reshape(len(x), -1, n)
            return torch.baddbmm(m.mT @ m, m.mT, m, beta=0.5, alpha=0.2)
        if name == "taken":
            return self.weight(2, n).take(torch.tensor([0, n, 0])) * x.flatten(1)[:, :1]
        if name == "constants":
            w = self.weight(n, n)
            scale = w.trace() + w[0].dot(w[:, 0]) + torch.vdot(w[0], w[0])
            return F.linear(x, torch.addmm(w, w, w)) * scale + torch.addmv(w[0], w, w.mv(w[0]))
        assert name == "outer_sum", name
        flat = x.flatten(1)
        return (flat[:, :, None] - flat[:, None, :])[:, :6, :6].sin()


STRUCTURES = [
    "linear", "masked_linear", "layer_norm", "group_norm", "cat", "stack", "flatten", "transpose",
    "gram", "attention", "bmm", "matrix", "pad", "pad_zero", "expand", "tril", "slice", "advanced",
    "conditions", "outer_sum", "reflect", "replicate", "reflect_2d", "replicate_2d", "diagonals",
    "cross", "products", "taken", "constants",
]  # fmt: skip
_CHOICES = [
    *(("unary", name) for name in UNARY), *(("binary", name) for name in BINARY),
    *(("reduction", name) for name in REDUCTIONS), *(("along", name) for name in ALONG),
    *(("structure", name) for name in STRUCTURES), *(("structure", name) for name in STRUCTURES),
]  # fmt: skip


@st.composite
def programs(draw: Draw, longest: int = 14) -> Program:
    """Programs of random operators."""
    small = st.integers(0, 30)
    steps = st.builds(
        lambda choice, first, second, dim, keep: Step(*choice, first, second, dim, keep),
        st.sampled_from(_CHOICES), small, small, st.integers(0, 3), st.booleans(),
    )  # fmt: skip
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    return Program(draw(st.lists(steps, min_size=1, max_size=longest)), dtype)


shapes = st.sampled_from([(1,), (2,), (5,), (2, 3), (3, 1), (17,), (2, 2, 2)])
