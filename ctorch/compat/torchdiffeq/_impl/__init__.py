"""The private modules of torchdiffeq that others are known to import from."""

from ctorch.compat.torchdiffeq._impl.odeint import odeint as odeint
