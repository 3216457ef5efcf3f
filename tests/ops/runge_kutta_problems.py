"""Drawn states, slopes, steps and norms for the tests of the Runge-Kutta operators."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ctorch.ops import runge_kutta as rk

F64 = torch.float64
HALF = (torch.float16, torch.bfloat16)

# Small, around a vector's width, around a block of the kernels, and what has no elements at all.
SHAPES = [(), (1,), (3,), (0,), (0, 3), (3, 0), (5, 2), (2, 3, 4), (33,), (511,), (513,), (300, 2)]
SHAPES += [(2, 600), (3, 1100), (200, 3), (150, 4)]


def rand(shape: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.rand(shape, generator=generator, dtype=F64) - 2).to(device)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def coefficients(data: st.DataObject, stages: int) -> Tensor:
    """As many as there are stages or fewer, some of them zero, none maybe."""
    count = data.draw(st.integers(0, stages), "coefficients")
    value = st.sampled_from([0.0, 0.0, 1.0, -0.25, 0.7, 1.3])
    return torch.tensor(data.draw(st.lists(value, min_size=count, max_size=count)), dtype=F64)


def spoil(k: Tensor, *coefficients: Tensor) -> Tensor:
    """NaN in the stages that no coefficient looks at: no result may depend on them."""
    for j in range(len(k)):
        if all(j >= len(a) or not a[j].any() for a in coefficients):
            k[j] = math.nan
    return k


class Drawn:
    """State, slopes and step of a drawn problem."""

    def __init__(self, data: st.DataObject, device: str, *, samples: bool = False) -> None:
        shapes = [s for s in SHAPES if s and s[0]] if samples else SHAPES
        self.shape = data.draw(st.sampled_from(shapes), "shape")
        self.stages = data.draw(st.sampled_from([1, 3, 7, 8, 9, 17]), "stages")
        self.seed = data.draw(st.integers(0, 1000), "seed")
        self.device = device
        self.y = self.rand(self.shape)
        self.k = self.rand((self.stages, *self.shape))
        each = bool(self.shape) and data.draw(st.booleans(), "a step for each sample")
        self.h = self.rand(self.shape[:1]) if each else rand((), self.seed)

    def rand(self, shape: tuple[int, ...]) -> Tensor:
        self.seed += 1
        return rand(shape, self.seed, self.device)

    def norm(self, data: st.DataObject) -> dict[str, Any]:
        """Norm, segments and tolerances."""
        per_sample = bool(self.shape) and data.draw(st.booleans(), "per_sample")
        length = math.prod(self.shape[1:] if per_sample else self.shape)
        cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3), "cuts"))
        ends = [0, *cuts, length]
        segments = [b - a for a, b in itertools.pairwise(ends)] if cuts else []
        norm = data.draw(st.sampled_from(rk.Norms), "norm")
        return {"segments": segments, "norm": norm, "per_sample": per_sample}

    def tolerance(self, data: st.DataObject) -> Tensor:
        full = data.draw(st.booleans(), "a tolerance for each element")
        return self.rand(self.shape).abs() + 0.1 if full else numbers(0.3)[0]


def as_reference(norm: dict[str, Any]) -> tuple[list[int], bool, bool]:
    return norm["segments"], norm["norm"] == "max", norm["per_sample"]
