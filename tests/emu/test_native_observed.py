"""Kernels of solves whose steps are looked at, run on the CPU: the solution is the eager one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch.codegen import cuda
from ctorch.ode import Solution
from tests.emu.native_kernels import emulated_device, needs_compiler
from tests.ode import native_fields as fields

pytestmark = [needs_compiler, pytest.mark.usefixtures("folder")]
F64 = torch.float64
T = torch.tensor([0.0, 0.0, 0.3, 1.0, 2.0], dtype=F64)
BETWEEN = torch.tensor([0.11, 0.8, 0.9, 1.7], dtype=F64)
SAMPLES = cuda.BLOCK + 2


class Jumping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = fields.Net(F64, 8)

    def forward(self, t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        return torch.where(t < 0.8, gain, 3 * gain) * self.net(t, y)


STOPS = {"step_t": torch.tensor([0.5, 1.7], dtype=F64), "jump_t": torch.tensor([0.8], dtype=F64)}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stops and jumps": (SAMPLES, {"options": STOPS}),
    "dense": (SAMPLES, {"dense": True}),
    "dense, stops and jumps": (SAMPLES, {"dense": True, "options": STOPS}),
    "dense, one sample": (1, {"dense": True, "options": STOPS}),
    "dense, with steps of a length": (SAMPLES, {"dense": True, "method": "rk4", "dt0": 0.3}),
}


def solutions(samples: int, how: dict[str, Any], folder: Path) -> Iterator[tuple[Solution, Any]]:
    """Native and eager, with their gradients."""
    field, (y0, gain) = Jumping(), fields.start(samples)
    for native in (True, False):
        t = T.clone().requires_grad_()
        with emulated_device(folder):
            sol = ctorch.solve_ode(
                field, y0, t, args=(gain,), native=native, rtol=1e-4, atol=1e-5, **how
            )
            total = fields.loss_of(sol.y) + (fields.loss_of(sol(BETWEEN)) if "dense" in how else 0)
            wanted = [y0, gain, *field.parameters(), t]
            yield sol, torch.autograd.grad(total, wanted)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_eager_solution(case: str, folder: Path) -> None:
    samples, how = CASES[case]
    (mine, found), (eager, expected) = solutions(samples, how, folder)
    torch.testing.assert_close(mine.y, eager.y, rtol=1e-9, atol=1e-9)
    for name in ("nfe", "accepted", "rejected"):
        assert getattr(mine.stats, name) == getattr(eager.stats, name), name
    if "dense" in how:
        torch.testing.assert_close(mine(BETWEEN), eager(BETWEEN), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_a_solve_that_fails_has_the_pieces_that_it_made(folder: Path) -> None:
    y0 = torch.linspace(0.5, 0.9, 3, dtype=F64)[:, None]
    how: dict[str, Any] = {"dense": True, "throw": False, "gradient": "none"}
    t = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    with emulated_device(folder):
        mine = ctorch.solve_ode(fields.blow_up, y0, t, native=True, **how)
    eager = ctorch.solve_ode(fields.blow_up, y0, t, **how)
    assert mine.status == eager.status != 0
    torch.testing.assert_close(mine(T[:3]), eager(T[:3]), rtol=1e-9, atol=1e-9)
