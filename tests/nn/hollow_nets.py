"""Hollow nets that tests of several parts look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctorch.nn import HollowAttention, HollowMLP, HollowSum

F64 = torch.float64
D = 5

NETS: dict[str, Callable[..., Any]] = {
    "mlp": lambda d=D, **kw: HollowMLP(d, **{"width": 24, **kw}),
    "mlp, deep, own tau": lambda d=D, **kw: HollowMLP(
        d, **{"width": 13, "depth": 3, "shared": False, **kw}
    ),
    "sum": lambda d=D, **kw: HollowSum(d, **{"features": 8, "context": 6, **kw}),
    "sum, shared": lambda d=D, **kw: HollowSum(d, **{"hidden": (8, 7), "shared": True, **kw}),
    "attention": lambda d=D, **kw: HollowAttention(
        d, **{"width": 8, "depth": 3, "shared": False, **kw}
    ),
    "attention, sets": lambda d=D, **kw: HollowAttention(**{"width": 8, "context": 6, **kw}),
}


def make(name: str, d: int = D, **options: Any) -> Any:
    """A net with biases that are not zero, as they are after training."""
    torch.manual_seed(0)
    net = NETS[name](d, **{"dtype": F64, **options})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def points(d: int = D, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Times [B, 1] and points [B, d]."""
    generator = torch.Generator().manual_seed(1)
    t = torch.rand(batch, 1, dtype=F64, generator=generator)
    return t, torch.randn(batch, d, dtype=F64, generator=generator)
