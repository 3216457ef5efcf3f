"""Weights that are made of parameters (masked, normalized) have their gradients natively, or it is
said that they have not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import ctorch

pytestmark = pytest.mark.usefixtures("quick_compiler")

F64 = torch.float64
T = torch.tensor([0.0, 0.7], dtype=F64)


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)


class Masked(nn.Linear):
    def forward(self, y: Tensor) -> Tensor:
        mask = torch.ones(4, 2, dtype=y.dtype).tril()
        return nn.functional.linear(y, self.weight * mask, self.bias)


def positive(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


MADE: dict[str, Callable[[], nn.Module]] = {
    "masked": lambda: Masked(2, 4, dtype=F64),
    "pruned": lambda: pruned(nn.Linear(2, 4, dtype=F64)),
    "normalized": lambda: parametrizations.weight_norm(nn.Linear(2, 4, dtype=F64)),
    "positive": lambda: positive(nn.Linear(2, 4, dtype=F64)),
    "spectral, in use": lambda: parametrizations.spectral_norm(nn.Linear(2, 4, dtype=F64)).eval(),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral, in training": (
        lambda: parametrizations.spectral_norm(nn.Linear(2, 4, dtype=F64)), "writes into a tensor",
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(2, 4, dtype=F64)), "linalg_householder",
    ),
}  # fmt: skip


def net_of(first: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(first(), nn.Tanh(), nn.Linear(4, 2, dtype=F64))


def gradients(net: nn.Module, native: bool | str, batched: bool) -> list[Tensor]:
    y0 = torch.linspace(-1, 1, 10, dtype=F64).reshape(5, 2)
    how = {"rtol": 1e-9, "atol": 1e-9, "batched": batched, "native": native}
    sol = ctorch.solve_ode(lambda t, y: net(y), y0, T, **how)
    return list(torch.autograd.grad(sol.y.square().sum(), list(net.parameters())))


@pytest.mark.parametrize("made", MADE)
def test_they_are_eagers(made: str) -> None:
    net = net_of(MADE[made])
    for batched in (True, False):
        mine, eager = (gradients(net, native, batched) for native in (True, False))
        assert all(float(x.abs().max()) > 0 for x in eager)
        torch.testing.assert_close(mine, eager, rtol=1e-8, atol=1e-10)


def test_a_mask_that_changes_is_seen() -> None:
    net = net_of(MADE["pruned"])
    gradients(net, True, True)
    with torch.no_grad():
        net[0].weight_mask.copy_(1 - net[0].weight_mask)  # type: ignore[union-attr, operator]
    mine, eager = (gradients(net, native, True) for native in (True, False))
    torch.testing.assert_close(mine, eager, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("made", REFUSED)
def test_what_cannot_be_made_natively_is_named(made: str) -> None:
    make, why = REFUSED[made]
    net = net_of(make)
    with pytest.raises(ctorch.codegen.Untraceable, match=why):
        gradients(net, True, True)
    with pytest.warns(UserWarning, match=f"solving eagerly.*{why}"):
        gradients(net, "try", True)
