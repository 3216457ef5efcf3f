"""Where code that offers a choice of methods looks for their names."""

from __future__ import annotations

from ctorch import odeint, odeint_dense, odeint_event
from ctorch.ode.methods import ALL

__all__ = ["SOLVERS", "odeint", "odeint_dense", "odeint_event"]

#: The methods by name. torchdiffeq has solver classes here, of which others read the keys.
SOLVERS: dict[str, str] = {name: name for name in ALL}
