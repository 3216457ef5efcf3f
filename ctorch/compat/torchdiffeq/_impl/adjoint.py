"""Where code that reaches past the package finds ``odeint_adjoint``."""

from ctorch import odeint_adjoint

__all__ = ["odeint_adjoint"]
