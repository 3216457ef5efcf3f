"""The private modules of torchdiffeq that others are known to import from."""

from ctorch.compat.torchdiffeq._impl import odeint as _odeint_module

# As in torchdiffeq, the attribute is the function; an import from ``_impl.odeint`` finds the module.
odeint = _odeint_module.odeint

__all__ = ["odeint"]
