"""Cases of what a vector field may read, by name: functions that return one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Case = tuple[Callable[[], Any], Callable[[], Any]]  # what is read, and what changes it
CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make
