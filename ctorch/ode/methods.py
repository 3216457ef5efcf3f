"""The names that ``method`` takes."""

from __future__ import annotations

from typing import Any

from ctorch.ode.tableaus import TABLEAUS

ADAPTIVE = tuple(name for name, tableau in TABLEAUS.items() if tableau.adaptive)
FIXED = tuple(name for name, tableau in TABLEAUS.items() if not tableau.adaptive)
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
BDF = ("bdf2",)
TAYLOR = ("taylor",)
SCIPY = ("scipy_solver",)
ALL = (*ADAPTIVE, *FIXED, *ADAMS, *BDF, *TAYLOR, *SCIPY)


def check_method(method: Any) -> str:
    """The method's name; None is dopri5.

    Raises:
        ValueError: unknown; lists the names.
    """
    if method is None:
        return "dopri5"
    if isinstance(method, str) and method in ALL:
        return method
    names = ", ".join(f'"{name}"' for name in ALL)
    raise ValueError(f"Invalid method {method!r}. Must be one of {names}.")
