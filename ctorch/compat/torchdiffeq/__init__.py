"""torchdiffeq's public names over ctorch's solvers.

One changed import moves a file::

    from ctorch.compat.torchdiffeq import odeint_adjoint as odeint

and one line before everything else moves a code base, its dependencies included::

    import sys, ctorch.compat.torchdiffeq as m; sys.modules["torchdiffeq"] = m

Attributes:
    __version__: the version of torchdiffeq whose behavior is kept to, for code that asks.
"""

from ctorch import odeint, odeint_adjoint, odeint_dense, odeint_event
from ctorch.compat.torchdiffeq import _impl as _impl

__version__ = "0.2.5"
__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
