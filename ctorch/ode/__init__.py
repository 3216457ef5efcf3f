"""Ordinary differential equations: problems in, solutions out."""

from ctorch.ode import regularizers as regularizers
from ctorch.ode.compile import compile as compile
from ctorch.ode.continuous import ContinuousAdjoint as ContinuousAdjoint
from ctorch.ode.control import StepController as StepController
from ctorch.ode.ensemble import EnsembleSolution as EnsembleSolution
from ctorch.ode.ensemble import ensemble as ensemble
from ctorch.ode.ensemble_draws import Draws as Draws
from ctorch.ode.ensemble_merge import Moments as Moments
from ctorch.ode.events import Event as Event
from ctorch.ode.methods import ALL as METHODS
from ctorch.ode.native import native_solves as native_solves
from ctorch.ode.odeint import odeint as odeint
from ctorch.ode.odeint import odeint_adjoint as odeint_adjoint
from ctorch.ode.odeint import odeint_dense as odeint_dense
from ctorch.ode.odeint import odeint_event as odeint_event
from ctorch.ode.solution import EventRecord as EventRecord
from ctorch.ode.solution import Solution as Solution
from ctorch.ode.solution import Stats as Stats
from ctorch.ode.solution import Status as Status
from ctorch.ode.solve import solve_ode as solve_ode
from ctorch.ode.tableaus import TABLEAUS as TABLEAUS

__all__ = [
    "METHODS", "TABLEAUS", "ContinuousAdjoint", "Draws", "EnsembleSolution", "Event",
    "EventRecord", "Moments", "Solution", "Stats", "Status", "StepController", "compile",
    "ensemble", "native_solves", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event",
    "regularizers", "solve_ode",
]  # fmt: skip
