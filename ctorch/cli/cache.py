"""``ctorch cache``: the compiled solves on disk."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated

import typer


class Action(str, Enum):
    """What to do with the cache."""

    show = "show"
    clear = "clear"


def cache(action: Annotated[Action, typer.Argument(help="What to do.")] = Action.show) -> None:
    """Show or clear the cache of compiled solves (CTORCH_CACHE_DIR says where it is)."""
    from ctorch.codegen import cache as stored

    try:
        held = stored.contents() if action is Action.show else stored.clear()
    except OSError as error:
        sys.exit(f"ctorch: {error}")
    done = "removed " if action is Action.clear else ""
    print(f"{done}{held.libraries} compiled solves, {held.size / 1e6:.1f} MB, {held.folder}")
