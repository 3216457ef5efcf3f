"""The private modules of torchdiffeq that others are known to import from.

The imports are relative, so that under an alias in ``sys.modules`` a later ``import
torchdiffeq._impl.odeint`` does not put that module in the place of the function.
"""

from .adjoint import odeint_adjoint as odeint_adjoint
from .odeint import odeint as odeint
from .odeint import odeint_dense as odeint_dense
from .odeint import odeint_event as odeint_event
