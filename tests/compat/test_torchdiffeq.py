"""torchdiffeq's module names over ctorch: what code that migrates relies on."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import ctorch
from ctorch.compat import torchdiffeq as alias

METHODS = [
    "dopri8",
    "dopri5",
    "bosh3",
    "fehlberg2",
    "adaptive_heun",
    "euler",
    "midpoint",
    "heun2",
    "heun3",
    "rk4",
    "explicit_adams",
    "implicit_adams",
    "fixed_adams",
    "scipy_solver",
]
SOLVE = {"rtol": 1e-7, "atol": 1e-9, "method": None, "options": None}
ADJOINT = [
    "adjoint_rtol",
    "adjoint_atol",
    "adjoint_method",
    "adjoint_options",
    "adjoint_params",
]
SIGNATURES = {
    "odeint": (["func", "y0", "t"], {**SOLVE, "event_fn": None}),
    "odeint_adjoint": (
        ["func", "y0", "t"],
        {**SOLVE, "event_fn": None, **dict.fromkeys(ADJOINT)},
    ),
    "odeint_dense": (["func", "y0", "t0", "t1"], SOLVE),
}


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint", "odeint_event", "odeint_dense"])
def test_names_are_those_of_ctorch(name: str) -> None:
    assert getattr(alias, name) is getattr(ctorch, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_torchdiffeq(name: str) -> None:
    positional, keywords = SIGNATURES[name]
    parameters = inspect.signature(getattr(alias, name)).parameters
    assert list(parameters) == [*positional, *keywords]
    for key in positional:
        assert parameters[key].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert {key: parameters[key].default for key in keywords} == keywords


def test_the_signature_of_odeint_event_is_that_of_torchdiffeq() -> None:
    parameters = inspect.signature(alias.odeint_event).parameters
    names = ["func", "y0", "t0", "event_fn", "reverse_time", "odeint_interface", "kwargs"]
    assert list(parameters) == names
    assert parameters["reverse_time"].default is False
    assert parameters["odeint_interface"].default is ctorch.odeint
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_an_alias_in_sys_modules_serves_every_form_of_import() -> None:
    code = """
import sys, ctorch.compat.torchdiffeq as m; sys.modules["torchdiffeq"] = m
import ctorch, torchdiffeq
from torchdiffeq import odeint, odeint_adjoint, odeint_dense, odeint_event
from torchdiffeq._impl.odeint import SOLVERS
import torchdiffeq._impl.odeint
from torchdiffeq._impl import odeint as inner, odeint_adjoint, odeint_dense, odeint_event
from torchdiffeq._impl.adjoint import odeint_adjoint as adjoint
assert inner is odeint and adjoint is odeint_adjoint is ctorch.odeint_adjoint
assert torchdiffeq.odeint is odeint is ctorch.odeint
assert "dopri5" in list(SOLVERS)
assert torchdiffeq.__version__.split(".")[0] == "0"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_torchdiffeq_is_listed_and_solves(name: str) -> None:
    from ctorch.compat.torchdiffeq._impl.odeint import SOLVERS

    assert name in SOLVERS
    if name == "scipy_solver":
        pytest.importorskip("scipy")
    t = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
    y = alias.odeint(lambda t, y: -y, torch.ones(1, dtype=torch.float64), t, method=name)
    assert y.shape == (201, 1)
    assert abs(float(y[-1]) - float(torch.exp(-t[-1]))) < 2e-3


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "rk4"])
def test_outputs_are_torchdiffeqs_to_rounding(method: str) -> None:
    peer = pytest.importorskip("torchdiffeq")
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64)
    t = torch.linspace(0.0, 5.0, 13, dtype=torch.float64)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([y[1], -torch.sin(y[0]) + 0.1 * torch.cos(t)])

    # A first step so long that its error estimate stands clear of rounding, which would otherwise
    # decide the size of the steps that follow.
    options = None if method == "rk4" else {"first_step": 0.7}
    solve = {"method": method, "rtol": 1e-6, "atol": 1e-8, "options": options}
    ours, theirs = alias.odeint(field, y0, t, **solve), peer.odeint(field, y0, t, **solve)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)
