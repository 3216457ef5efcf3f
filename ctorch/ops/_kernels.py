"""Loads the compiled library, or says once why there is none.

The operators exist without it: each is defined in Python, with a reference in plain PyTorch. Loading the library gives
some of them a kernel. ``load()`` is called once, after the operators have been defined.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

HAS_KERNELS: bool = False
"""Whether the compiled library is loaded."""

HAS_CUDA_KERNELS: bool = False
"""Whether it holds CUDA kernels."""

NAMESPACE = "ctorch"
REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation ."
_PACKAGE = Path(__file__).resolve().parent.parent
_reason = "the operators have not been loaded"
_cure = ""


def load() -> None:
    """Loads ``ctorch._C``; where that fails, warns and leaves every operator to its reference.

    Environment: ``CTORCH_KERNELS=0`` leaves the library alone, to compare with the reference path.
    """
    global HAS_KERNELS, HAS_CUDA_KERNELS, _reason, _cure
    if HAS_KERNELS:
        return
    _reason, _cure = "", ""
    if os.environ.get("CTORCH_KERNELS") == "0":
        _reason, _cure = "CTORCH_KERNELS=0 is set", "unset CTORCH_KERNELS"
        return
    try:
        importlib.import_module("ctorch._C")
    except ImportError as error:
        _reason, _cure = _why_not(error)
        if not _reason.startswith("CTORCH_EXT=0"):  # then going without is what the user asked for
            warnings.warn(
                f"ctorch runs without its compiled kernels: {reason()}", UserWarning, stacklevel=2
            )
        return
    HAS_KERNELS = True
    HAS_CUDA_KERNELS = any(_registered(name, "CUDA") for name in operators())


def reason() -> str:
    """Why there are no kernels, and the cure; an empty string where they are loaded."""
    return f"{_reason}. Cure: {_cure}" if _reason else ""


def cuda_reason() -> str:
    """Why there are no CUDA kernels, and the cure; an empty string where they are loaded."""
    if HAS_CUDA_KERNELS:
        return ""
    if not HAS_KERNELS:
        return reason()
    why = build_record().get("cuda_reason") or "they were not built when ctorch was installed"
    return f"{why}. Cure: install a CUDA toolkit (nvcc), then `CTORCH_CUDA=1 {REBUILD}`"


def operators() -> list[str]:
    """The names of ctorch's operators, without the namespace."""
    prefix = f"{NAMESPACE}::"
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n[len(prefix) :] for n in names if n.startswith(prefix)})


def implementation(operator: str, device: str) -> str:
    """Which implementation serves an operator on a device: ``native``, ``CUDA`` or ``reference``.

    Args:
        operator: its name without the namespace.
        device: ``cpu`` or ``cuda``.
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if not _registered(operator, key):
        return "reference"
    return "native" if key == "CPU" else "CUDA"


def build_record() -> dict[str, Any]:
    """What ``setup.py`` noted when it built the library: compiler, torch, CUDA architectures, or why it did not."""
    try:
        record: dict[str, Any] = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def _registered(operator: str, key: str) -> bool:
    return HAS_KERNELS and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NAMESPACE}::{operator}", key
    )


def _why_not(error: ImportError) -> tuple[str, str]:
    """Reason and cure for a library that is missing or does not load."""
    if (_PACKAGE / "_C.abi3.so").exists():
        return (
            f"ctorch/_C.abi3.so does not load in torch {torch.__version__} ({error}); it needs torch >= 2.10"
            " and the same operating system and processor family as it was built on",
            f"rebuild it here, in ctorch's source folder: `{REBUILD}`",
        )
    record = build_record()
    if not record:
        return (
            "the compiled library was never built (a source folder on the path, not an installation?)",
            "in that folder, `pip install -e . --no-build-isolation`",
        )
    why = str(record.get("reason", "the build left no library"))
    if "compiler" in why:
        cure = f"install g++ (Debian, Ubuntu: `apt install g++`), then in ctorch's source folder `{REBUILD}`"
    elif why.startswith("CTORCH_EXT=0"):
        cure = f"`CTORCH_EXT=1 {REBUILD}` in ctorch's source folder"
    else:
        cure = f"`CTORCH_EXT=1 {REBUILD} -v` in ctorch's source folder, which shows the whole error"
    return why, cure
