"""Optional dependencies: imported where they are used, named with their cure where missing."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRAS: dict[str, tuple[str, ...]] = {
    "demo": ("typer", "rich", "matplotlib"),
    "testing": ("hypothesis",),
    "qmc": ("pyscf",),
}
"""The modules that each user-facing extra brings."""


def require(module: str) -> ModuleType:
    """Imports an optional module.

    Args:
        module: a dotted name, for instance ``matplotlib.pyplot``; its package is in ``EXTRAS``.

    Raises:
        ModuleNotFoundError: it is not installed; the message holds the pip command that brings it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is installed, but something that it needs is not
        raise ModuleNotFoundError(f"{package} is missing: {cure(package)}", name=package) from error


def cure(package: str) -> str:
    """The pip command that brings an optional package."""
    extra = next(extra for extra, packages in EXTRAS.items() if package in packages)
    return f'pip install "ctorch[{extra}]"'
