"""ctorch: differentiable scientific computing on PyTorch."""

import importlib
from typing import Any

from ctorch import autodiff, codegen, ode, ops
from ctorch._exceptions import GradientError, SolveError
from ctorch._version import __version__
from ctorch.autodiff import (
    derivative,
    dimwise_derivative,
    divergence,
    jet,
    laplacian,
    taylor_series,
)
from ctorch.ode import (
    ensemble,
    native_solves,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
    solve_ode,
)
from ctorch.ops.sortlet import sortlet, sum_of_sortlets

__all__ = [
    "GradientError", "SolveError", "__version__", "autodiff", "codegen", "derivative",
    "dimwise_derivative", "divergence", "ensemble", "jet", "laplacian", "native_solves", "ode",
    "odeint", "odeint_adjoint", "odeint_dense", "odeint_event", "ops", "solve_ode", "sortlet",
    "sum_of_sortlets", "taylor_series",
]  # fmt: skip
_PARTS = ("compat", "nn", "testing", "training")


def __getattr__(name: str) -> Any:
    """Parts that are imported when they are first used."""
    if name in _PARTS:
        return importlib.import_module(f"ctorch.{name}")
    raise AttributeError(f"module 'ctorch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})
