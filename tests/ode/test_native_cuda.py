"""Native solves on a CUDA device return what they return on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch

from . import native_fields as fields

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
T = torch.tensor([0.0, 0.4, 1.3, 2.0], dtype=torch.float64)


def test_equals_the_cpu() -> None:
    y0 = 1 + 0.5 * torch.rand(500, 2, dtype=torch.float64)
    net = fields.Net(torch.float64)
    how = {"batched": True, "native": True, "gradient": "none"}
    for func in (fields.lotka_volterra, net):
        expected = ctorch.solve_ode(func, y0, T, **how)
        if func is net:
            net.to("cuda")
        mine = ctorch.solve_ode(func, y0.cuda(), T.cuda(), **how)
        assert mine.y.is_cuda
        torch.testing.assert_close(mine.y.cpu(), expected.y, rtol=1e-8, atol=1e-8)
        # where the error norm is all but 1, rounding decides
        assert mine.stats.nfe.cpu().ne(expected.stats.nfe).double().mean() < 0.02
        assert torch.equal(mine.status.cpu(), expected.status)


ONE_STEP: dict[str, dict[str, Any]] = {
    "joint": {"rtol": 1e-6, "atol": 1e-6},
    "vern7": {"method": "vern7"},
    "rk4": {"method": "rk4", "dt0": 0.11},
}


@pytest.mark.parametrize("how", ONE_STEP.values(), ids=list(ONE_STEP))
def test_one_step_for_all_is_that_of_the_cpu(how: dict[str, Any]) -> None:
    y0 = 1 + 0.5 * torch.rand(500, 2, dtype=torch.float64)
    how = {"native": True, "gradient": "none", **how}
    expected = ctorch.solve_ode(fields.lotka_volterra, y0, T, **how)
    mine = ctorch.solve_ode(fields.lotka_volterra, y0.cuda(), T.cuda(), **how)
    torch.testing.assert_close(mine.y.cpu(), expected.y, rtol=1e-8, atol=1e-8)
    assert mine.stats == expected.stats


@pytest.mark.parametrize("how", [{"batched": True}, *ONE_STEP.values()], ids=["batched", *ONE_STEP])
def test_the_gradient_is_that_of_the_cpu_and_repeats(how: dict[str, Any]) -> None:
    y0 = 1 + 0.5 * torch.rand(500, 2, dtype=torch.float64)
    gain = 0.5 + torch.rand(500, 1, dtype=torch.float64)

    def gradients(device: str) -> list[Tensor]:
        net = fields.Net(torch.float64).to(device)
        inputs = [x.to(device).requires_grad_() for x in (y0, gain)]
        sol = ctorch.solve_ode(net, inputs[0], T.to(device), args=(inputs[1],), native=True, **how)
        found = torch.autograd.grad(sol.y.square().sum(), [*inputs, *net.parameters()])
        return [x.cpu() for x in found]

    mine = gradients("cuda")
    torch.testing.assert_close(mine, gradients("cpu"), rtol=1e-7, atol=1e-7)
    assert all(map(torch.equal, mine, gradients("cuda")))


@pytest.mark.parametrize("how", [{"batched": True}, ONE_STEP["rk4"]], ids=["batched", "rk4"])
def test_a_block_goes_back_as_samples_do_on_the_cpu(how: dict[str, Any]) -> None:
    """With gradients in times; of a network whose sums fit a block, and one whose do not."""
    y0 = 1 + 0.5 * torch.rand(300, 2, dtype=torch.float64)
    for width in (40, 96):

        def gradients(device: str, width: int = width) -> list[Tensor]:
            net = fields.Net(torch.float64, width).to(device)
            inputs = [x.detach().to(device).requires_grad_() for x in (y0, T)]
            sol = ctorch.solve_ode(net, *inputs, native=True, **how)
            found = torch.autograd.grad(sol.y.square().sum(), [*inputs, *net.parameters()])
            return [x.cpu() for x in found]

        mine = gradients("cuda")
        torch.testing.assert_close(mine, gradients("cpu"), rtol=1e-7, atol=1e-7)
        assert all(map(torch.equal, mine, gradients("cuda")))


LOOKED_AT: dict[str, dict[str, Any]] = {
    "dense": {"dense": True},
    "jumps": {"dense": True, "options": {"jump_t": T[1:2], "step_t": torch.tensor([1.0])}},
    "rk4": {"dense": True, "method": "rk4", "dt0": 0.11},
}


@pytest.mark.parametrize("how", LOOKED_AT.values(), ids=list(LOOKED_AT))
def test_steps_are_looked_at_as_on_the_cpu(how: dict[str, Any]) -> None:
    y0 = 1 + 0.5 * torch.rand(300, 2, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        start = y0.to(device).requires_grad_()
        sol = ctorch.solve_ode(fields.lotka_volterra, start, T.to(device), native=True, **how)
        between = sol(torch.tensor([0.1, 0.5, 1.7], dtype=torch.float64, device=device))
        (gradient,) = torch.autograd.grad(between.square().sum() + sol.y.sum(), start)
        found.append([x.detach().cpu() for x in (sol.y, between, gradient)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-7)


def test_one_system_of_all_samples() -> None:
    y0 = torch.rand(6, 2, dtype=torch.float64)
    found = [
        ctorch.solve_ode(lambda t, y: y.mean(0) - y**3, y.to(device), T.to(device), native=True).y
        for device, y in (("cpu", y0), ("cuda", y0))
    ]
    torch.testing.assert_close(found[1].cpu(), found[0], rtol=1e-9, atol=1e-9)
