"""Native solves on a CUDA device return what they return on the CPU."""

from __future__ import annotations

import pytest
import torch

import ctorch
from ctorch.ode import native

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


def test_what_is_not_built_is_refused() -> None:
    y0 = torch.rand(5, 2, dtype=torch.float64, device="cuda")
    with pytest.raises(native.Unsupported, match="batched=True"):
        ctorch.solve_ode(fields.lotka_volterra, y0, T.cuda(), native=True)
    with pytest.raises(native.Unsupported, match="gradient"):
        ctorch.solve_ode(
            fields.lotka_volterra, y0.requires_grad_(), T.cuda(), batched=True, native=True
        )
