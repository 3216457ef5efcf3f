"""ctorch: differentiable scientific computing on PyTorch."""

import importlib
from typing import Any

from ctorch import autodiff as autodiff
from ctorch import ode as ode
from ctorch._exceptions import GradientError as GradientError
from ctorch._exceptions import SolveError as SolveError
from ctorch._version import __version__ as __version__
from ctorch.autodiff import derivative as derivative
from ctorch.autodiff import dimwise_derivative as dimwise_derivative
from ctorch.autodiff import divergence as divergence
from ctorch.autodiff import jet as jet
from ctorch.autodiff import laplacian as laplacian
from ctorch.autodiff import taylor_series as taylor_series
from ctorch.ode import odeint as odeint
from ctorch.ode import odeint_adjoint as odeint_adjoint
from ctorch.ode import odeint_dense as odeint_dense
from ctorch.ode import odeint_event as odeint_event
from ctorch.ode import solve_ode as solve_ode
from ctorch.ops.sortlet import sortlet as sortlet
from ctorch.ops.sortlet import sum_of_sortlets as sum_of_sortlets

_PARTS = ("compat", "nn", "sde", "testing", "training")


def __getattr__(name: str) -> Any:
    """Parts that are imported when they are first used."""
    if name in _PARTS:
        return importlib.import_module(f"ctorch.{name}")
    raise AttributeError(f"module 'ctorch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PARTS])
