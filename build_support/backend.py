"""setuptools' build backend, which asks for torch only where none is installed.

The kernels need torch's headers at build time. Naming torch in ``build-system.requires`` would
fetch a second torch, of several GB, into every isolated build; naming none would build no kernels
on a machine that has no torch yet.
"""

from __future__ import annotations

import os
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need no change
from toolchain import find_compiler, find_torch

TORCH = "torch>=2.10"


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    wanted = os.environ.get("CTORCH_EXT") != "0" and find_compiler() is not None
    return [TORCH] if wanted and find_torch() is None else []
