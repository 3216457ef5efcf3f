"""The private modules of torchdiffeq that others are known to import from."""

from ctorch.compat.torchdiffeq._impl.adjoint import odeint_adjoint as odeint_adjoint
from ctorch.compat.torchdiffeq._impl.odeint import odeint as odeint
from ctorch.compat.torchdiffeq._impl.odeint import odeint_dense as odeint_dense
from ctorch.compat.torchdiffeq._impl.odeint import odeint_event as odeint_event
