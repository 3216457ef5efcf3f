"""ctorch: differentiable scientific computing on PyTorch."""

from ctorch import ode as ode
from ctorch._exceptions import GradientError as GradientError
from ctorch._exceptions import SolveError as SolveError
from ctorch._version import __version__ as __version__
from ctorch.ode import odeint as odeint
from ctorch.ode import odeint_adjoint as odeint_adjoint
from ctorch.ode import odeint_dense as odeint_dense
from ctorch.ode import odeint_event as odeint_event
from ctorch.ode import solve_ode as solve_ode
