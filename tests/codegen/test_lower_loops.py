"""Loops reach every element once, where it is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctorch.codegen.emit_loops import Access, Where, pieces

from .checks import check


def elements(access: Access, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Array and place of an access in the order of a loop."""
    if access.table is not None:
        return [(access.array, int(place)) for place in access.table]
    steps = [range(0, stride * n, stride) if stride else [0] * n
             for stride, n in zip(access.strides, sizes, strict=True)]  # fmt: skip
    return [(access.array, access.base + sum(at)) for at in itertools.product(*steps)]


@st.composite
def operands(draw: Any) -> tuple[tuple[int, ...], list[Where]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    n = int(np.prod(shape))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        strides = [draw(st.integers(-2, 7)) for _ in shape]
        place = 100 + sum(
            s * grid for s, grid in zip(strides, np.ogrid[tuple(map(slice, shape))], strict=True)
        )
        place = np.broadcast_to(place, shape).reshape(-1).copy()
        array = np.zeros(n, np.int64)
        kind = draw(st.sampled_from(["regular", "cut", "irregular", "scattered"]))
        if kind == "cut":
            array[draw(st.integers(0, n)) :] = 1
        elif kind == "irregular":
            place = np.array(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
        elif kind == "scattered":
            array = np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
        found.append(Where(array, place))
    return shape, found


@settings(deadline=None)
@given(operands())
def test_pieces_are_the_whole(drawn: tuple[tuple[int, ...], list[Where]]) -> None:
    shape, given_ = drawn
    n = int(np.prod(shape))
    seen = []
    for piece in pieces([(n,), shape], given_):
        own = [place for _, place in elements(piece.own, piece.sizes)]
        seen += own
        for where, access in zip(given_, piece.operands, strict=True):
            want = [(int(where.array[i]), int(where.place[i])) for i in own]
            assert elements(access, piece.sizes) == want
    assert sorted(seen) == list(range(n))


def among_constants(t: Tensor, y: Tensor) -> Tensor:
    fixed = torch.tensor([1.0, 0.0, 2.0, 5.0, 7.0] * 6, dtype=y.dtype)
    z = torch.cat([y[..., :30], fixed.expand(*y.shape[:-1], 30)], -1)
    return torch.sin(z) * torch.cos(y) + torch.tanh(z * y)


def test_constants_beside_computed_numbers_are_each_their_own() -> None:
    """Their places follow one upon another, but are no places in memory."""
    y = torch.randn(3, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check(among_constants, y)


def test_a_gradient_that_is_zero_everywhere_is_written_as_such() -> None:
    level = torch.linspace(-3.0, 3.0, 60, dtype=torch.float64, requires_grad=True)
    slope = torch.linspace(1.0, 2.0, 60, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    check(lambda t, y: torch.sin(y) * level.floor() + torch.cos(y * slope) * y.exp(), y)
