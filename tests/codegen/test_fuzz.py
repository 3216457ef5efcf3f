"""Random programs: lowered C++ equals eager, in value and derivative."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from ctorch.codegen import Untraceable

from .checks import check
from .programs import (
    ALONG,
    BINARY,
    REDUCTIONS,
    STRUCTURES,
    UNARY,
    Program,
    Step,
    programs,
    shapes,
)

FUZZ = settings(
    max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


def compare(program: Program, shape: tuple[int, ...], width: int, batched: bool) -> None:
    generator = torch.Generator().manual_seed(5)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(program.dtype)

    y, own, shared = normal(3, *shape), normal(3), normal(*shape)
    program(torch.tensor(0.4, dtype=program.dtype), y, own, shared)  # makes the weights
    check(program, y, 0.4, (own, shared), width=width, batched=batched, factor=30)


@FUZZ
@given(programs(), shapes, st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_random_programs(
    program: Program, shape: tuple[int, ...], width: int, batched: bool
) -> None:
    try:
        compare(program, shape, width, batched)
    except (RuntimeError, IndexError) as error:
        if isinstance(error, Untraceable):
            raise
        reject()  # shapes that do not suit


def every() -> list[tuple[str, str]]:
    kinds = {"unary": UNARY, "binary": BINARY, "reduction": REDUCTIONS, "along": ALONG}
    names = [(kind, name) for kind, table in kinds.items() for name in table]
    return names + [("structure", name) for name in STRUCTURES]


@pytest.mark.parametrize("first", range(0, len(every()), 24))
@pytest.mark.parametrize("shape", [(3,), (4, 6)])
def test_every_operator(first: int, shape: tuple[int, ...]) -> None:
    """Many at once, each on the state itself."""
    steps = [Step(kind, name, 0, 2, 1, False) for kind, name in every()[first : first + 24]]
    program = Program(steps, torch.float64)
    compare(program, shape, 4, True)
