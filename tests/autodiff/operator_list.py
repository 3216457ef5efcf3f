"""The operators by which coverage is judged, each beside its form in elementary operations.

``PEER_LIST``: 46 operators and small compositions on which other tools were judged too.
``TORCH_LIST``: 58 operators and modules on which nested derivatives of torch were judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import elementary as E

F64 = torch.float64
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operator:
    """One operator as users write it.

    Attributes:
        name: of the row in tables.
        fn: what is differentiated.
        elementary: the same in elementary operations; None where ``fn`` is that itself.
        shape: of its input.
        low, high: range of the input's magnitude.
        signed: whether the input has both signs.
    """

    name: str
    fn: Function
    elementary: Function | None = None
    shape: tuple[int, ...] = (4, 3)
    low: float = 0.3
    high: float = 1.1
    signed: bool = False

    @property
    def reference(self) -> Function:
        return self.fn if self.elementary is None else self.elementary

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A point and a direction, both [*shape], float64."""
        generator = torch.Generator().manual_seed(seed)

        def uniform() -> Tensor:
            return torch.rand(self.shape, generator=generator, dtype=F64)

        x = self.low + (self.high - self.low) * uniform()
        if self.signed:
            x = torch.where(uniform() < 0.5, -x, x)
        return x, 2 * uniform() - 1


def seeded(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Any:
    """A float64 module whose weights are the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make(*args, **options).to(F64)


def _matrix(n: int) -> Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(2), dtype=F64)
    return a @ a.T + n * torch.eye(n, dtype=F64)


def _gram(x: Tensor) -> Tensor:
    """Symmetric, positive definite, of size three, from [4, 3]."""
    return x.T @ x + torch.eye(3, dtype=F64)


def _rows(x: Tensor) -> Tensor:
    """[2, 4, 6] -> [2, 4, 4], symmetric, positive definite."""
    return x @ x.transpose(-1, -2) + torch.eye(4, dtype=F64)


def _spread(x: Tensor) -> Tensor:
    """[2, 4, 6] -> [2, 4, 4], symmetric, with eigenvalues apart."""
    return x @ x.transpose(-1, -2) + torch.diag(torch.arange(4, dtype=F64))


def _branch(x: Tensor) -> Tensor:
    return x * x if x.sum() > 0 else x


def _attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def _where_positive(x: Tensor, negative: Function) -> Tensor:
    return torch.where(x > 0, x, negative(x))


SHARED: dict[str, tuple[Function, Function | None, bool]] = {
    # name: (operator, elementary form, both signs)
    "tanh": (torch.tanh, E.tanh, True),
    "sigmoid": (torch.sigmoid, E.sigmoid, True),
    "softplus": (F.softplus, E.softplus, True),
    "silu": (F.silu, lambda x: x * E.sigmoid(x), True),
    "gelu": (F.gelu, E.gelu, True),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), E.gelu_tanh, True),
    "elu": (F.elu, lambda x: _where_positive(x, lambda y: torch.exp(y) - 1), True),
    "softmax": (lambda x: F.softmax(x, -1), E.softmax, True),
    "log_softmax": (
        lambda x: F.log_softmax(x, -1),
        lambda x: x - E.logsumexp(x).unsqueeze(-1),
        True,
    ),
    "logsumexp": (lambda x: torch.logsumexp(x, -1), E.logsumexp, True),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: E.standardize(x, -1), True),
    "exp": (torch.exp, None, True),
    "log": (torch.log, None, False),
    "sqrt": (torch.sqrt, lambda x: x**0.5, False),
    "rsqrt": (torch.rsqrt, lambda x: x**-0.5, False),
    "sin": (torch.sin, None, True),
    "tan": (torch.tan, lambda x: torch.sin(x) / torch.cos(x), True),
    "atan": (torch.atan, None, True),
    "erf": (torch.erf, None, True),
    "pow": (lambda x: x**1.7, lambda x: torch.exp(1.7 * torch.log(x)), False),
    "x**x": (lambda x: x**x, lambda x: torch.exp(x * torch.log(x)), False),
    "div": (lambda x: x / (1 + x * x), None, True),
    "lgamma": (torch.lgamma, None, False),
    "matmul": (
        lambda x: x @ x.transpose(-1, -2),
        lambda x: (x.unsqueeze(-2) * x.unsqueeze(-3)).sum(-1),
        True,
    ),
    "cumsum": (lambda x: x.cumsum(-1), lambda x: E.running(x, product=False), True),
    "norm": (lambda x: torch.linalg.norm(x, dim=-1), lambda x: (x * x).sum(-1) ** 0.5, True),
    "scaled_dot_product_attention": (_attend, lambda x: E.attention(x, x, x), True),
}

_ALSO_OF_PEERS: dict[str, tuple[Function, Function | None, bool]] = {
    "relu": (torch.relu, lambda x: torch.where(x > 0, x, 0), True),
    "abs": (torch.abs, lambda x: torch.where(x > 0, x, -x), True),
    "sinh": (torch.sinh, lambda x: (torch.exp(x) - torch.exp(-x)) / 2, True),
    "einsum": (
        lambda x: torch.einsum("ij,kj,kl->il", x, x, x),
        lambda x: (((x.unsqueeze(1) * x).sum(-1)).unsqueeze(-1) * x).sum(1),
        True,
    ),
    "slice": (lambda x: x[:, 1:] * x[:, :-1], None, True),
    "transpose": (lambda x: x.T * 1.0, None, True),
    "cat": (lambda x: torch.cat([x, x * x], -1), None, True),
    "stack": (lambda x: torch.stack([x, x * x], -1), None, True),
    "where": (lambda x: torch.where(x > 0.5, x * x, x), None, True),
    "max": (
        lambda x: x.max(-1).values,
        lambda x: x.gather(-1, x.argmax(-1, keepdim=True)).squeeze(-1),
        True,
    ),
    "index": (lambda x: x[torch.tensor([2, 0])], None, True),
    "roll": (
        lambda x: torch.roll(x, 1, -1) * x,
        lambda x: torch.cat([x[..., -1:], x[..., :-1]], -1) * x,
        True,
    ),
    "solve": (
        lambda x: torch.linalg.solve(_matrix(3) + x[0, 0] * torch.eye(3, dtype=F64), x.T),
        lambda x: E.solve(_matrix(3) + x[0, 0] * torch.eye(3, dtype=F64), x.T),
        True,
    ),
    "slogdet": (
        lambda x: torch.linalg.slogdet(_gram(x))[1],
        lambda x: torch.log(E.det(_gram(x))),
        True,
    ),
    "cholesky": (
        lambda x: torch.linalg.cholesky(_gram(x)),
        lambda x: E.cholesky(_gram(x)),
        True,
    ),
    "fft": (lambda x: torch.fft.fft(x).real, lambda x: E.fft(x)[0], True),
    "conv1d": (
        lambda x: F.conv1d(x[None], torch.ones(2, 4, 2, dtype=F64)),
        lambda x: E.conv1d(x[None], torch.ones(2, 4, 2, dtype=F64)),
        True,
    ),
    "loop": (lambda x: torch.tanh(torch.tanh(torch.tanh(x))), None, True),
    "data-dependent if": (_branch, None, True),
}


def _also_of_torch() -> dict[str, tuple[Function, Function | None, bool]]:
    linear, bilinear = seeded(nn.Linear, 6, 3), seeded(nn.Bilinear, 6, 6, 3)
    gru, lstm = seeded(nn.GRUCell, 6, 5), seeded(nn.LSTM, 6, 5, batch_first=True)
    heads = seeded(nn.MultiheadAttention, 6, 2, batch_first=True)
    layer = seeded(nn.TransformerEncoderLayer, 6, 2, 8, dropout=0.0, batch_first=True).train()
    groups, evaluated = seeded(nn.GroupNorm, 2, 4), seeded(nn.BatchNorm1d, 4).eval()
    trained = seeded(nn.BatchNorm1d, 4, track_running_stats=False)
    target = torch.arange(8) % 6
    rest = torch.zeros(8, 5, dtype=F64)
    kernel = torch.ones(3, 4, 2, dtype=F64)
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return {
        "mish": (F.mish, lambda x: x * E.tanh(E.softplus(x)), True),
        "selu": (
            F.selu,
            lambda x: scale * _where_positive(x, lambda y: alpha * (torch.exp(y) - 1)),
            True,
        ),
        "celu": (F.celu, lambda x: _where_positive(x, lambda y: torch.exp(y) - 1), True),
        "leaky_relu": (F.leaky_relu, lambda x: _where_positive(x, lambda y: 0.01 * y), True),
        "logsigmoid": (F.logsigmoid, lambda x: -E.softplus(-x), True),
        "hardswish": (F.hardswish, lambda x: x * (x + 3) / 6, True),
        "glu": (F.glu, lambda x: x[..., :3] * E.sigmoid(x[..., 3:]), True),
        "rms_norm": (lambda x: F.rms_norm(x, (6,)), E.rms_norm, True),
        "group_norm": (groups, lambda x: E.group_norm(x, groups), True),
        "batch_norm (eval)": (evaluated, lambda x: E.batch_norm(x, evaluated), True),
        "batch_norm (train)": (trained, lambda x: E.batch_norm(x, trained), True),
        "instance_norm": (F.instance_norm, lambda x: E.standardize(x, -1), True),
        "sinc": (torch.sinc, lambda x: torch.sin(math.pi * x) / (math.pi * x), True),
        "cumprod": (lambda x: x.cumprod(-1), lambda x: E.running(x, product=True), True),
        "prod": (lambda x: x.prod(-1), lambda x: E.running(x, product=True)[..., -1], True),
        "normalize": (
            lambda x: F.normalize(x, dim=-1),
            lambda x: x * (x * x).sum(-1, keepdim=True) ** -0.5,
            True,
        ),
        "cross_entropy": (
            lambda x: F.cross_entropy(x.reshape(8, 6), target, reduction="none"),
            lambda x: E.logsumexp(x.reshape(8, 6)) - x.reshape(8, 6)[torch.arange(8), target],
            True,
        ),
        "mse_loss": (
            lambda x: F.mse_loss(x, torch.zeros_like(x)),
            lambda x: (x * x).mean(),
            True,
        ),
        "smooth_l1_loss": (
            lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)),
            lambda x: (x * x / 2).mean(),
            True,
        ),
        "conv1d": (
            lambda x: F.conv1d(torch.tanh(x), kernel),
            lambda x: E.conv1d(E.tanh(x), kernel),
            True,
        ),
        "linear": (linear, lambda x: E.affine(x, linear.weight, linear.bias), True),
        "bilinear": (
            lambda x: bilinear(x, x),
            lambda x: torch.einsum("...i,oij,...j->...o", x, bilinear.weight, x) + bilinear.bias,
            True,
        ),
        "det": (lambda x: torch.linalg.det(_rows(x)), lambda x: E.det(_rows(x)), True),
        "slogdet": (
            lambda x: torch.linalg.slogdet(_rows(x))[1],
            lambda x: torch.log(E.det(_rows(x))),
            True,
        ),
        "solve": (
            lambda x: torch.linalg.solve(_rows(x), x),
            lambda x: E.solve(_rows(x), x),
            True,
        ),
        "cholesky": (
            lambda x: torch.linalg.cholesky(_rows(x)),
            lambda x: E.cholesky(_rows(x)),
            True,
        ),
        "eigvalsh": (
            lambda x: torch.linalg.eigvalsh(_spread(x)),
            lambda x: E.eigvalsh(_spread(x)),
            True,
        ),
        "GRUCell": (
            lambda x: gru(x.reshape(8, 6)),
            lambda x: E.gru_cell(x.reshape(8, 6), rest, gru),
            True,
        ),
        "LSTM": (lambda x: lstm(x)[0], lambda x: E.lstm(x, lstm), True),
        "MultiheadAttention": (
            lambda x: heads(x, x, x, need_weights=False)[0],
            lambda x: E.multihead(x, heads),
            True,
        ),
        "TransformerEncoderLayer": (layer, lambda x: E.encoder_layer(x, layer), True),
    }


def _list(
    entries: dict[str, tuple[Function, Function | None, bool]], **ranges: Any
) -> tuple[Operator, ...]:
    return tuple(
        Operator(name, fn, simple, signed=signed, **ranges)
        for name, (fn, simple, signed) in entries.items()
    )


PEER_LIST = _list({**SHARED, **_ALSO_OF_PEERS}, shape=(4, 3), low=0.3, high=1.1)
TORCH_LIST = _list({**SHARED, **_also_of_torch()}, shape=(2, 4, 6), low=0.3, high=0.9)
