"""The command line, ``ctorch ...`` or ``python -m ctorch ...``.

A command is a file in this folder: ``name.py`` with a function ``name``, whose parameters are its
options and whose docstring is its help. Such a file imports nothing heavy at its top.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING

from ctorch._extras import require

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Runs the command that the process was given."""
    try:
        application = app()
    except ModuleNotFoundError as error:
        if sys.argv[1:2] == ["info"]:  # what one asks when something is missing needs no extra
            from ctorch.cli.info import info

            return info(cache="--cache" in sys.argv)
        sys.exit(f"ctorch: the command line cannot start; {error}")
    application(prog_name="ctorch")


def app() -> typer.Typer:
    """The typer application with every command in this folder."""
    application: typer.Typer = require("typer").Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    application.callback()(_no_options_of_its_own)
    for name in commands():
        module = importlib.import_module(f"ctorch.cli.{name}")
        application.command(name)(getattr(module, name))
    return application


def commands() -> list[str]:
    """The names of the commands."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def _no_options_of_its_own() -> None:
    """Differentiable scientific computing on PyTorch."""  # also: one command is still a command
