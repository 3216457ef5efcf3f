"""Loads the compiled library, or says once why there is none.

The operators exist without it: each is defined in Python, with a reference in plain PyTorch, and
loading the library gives it a kernel. ``load()`` is called once, after they have been defined.
"""

from __future__ import annotations

import importlib.util
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

REINSTALL = "pip install --force-reinstall --no-deps --no-build-isolation ."
library: Any = None
"""The loaded library as a Python module, with the functions of ``ctorch.ops._direct``."""

LIBRARY = Path(__file__).resolve().parents[1] / "_C.abi3.so"
_why, _cure = "the operators have not been loaded", "import ctorch"
_tried = False


def load() -> None:
    """Loads ``ctorch._C``; where that fails, warns and leaves every operator to its reference.

    Environment: ``CTORCH_KERNELS=0`` leaves the library alone, to compare with the reference.
    """
    global HAS_KERNELS, HAS_CUDA_KERNELS, library, _why, _cure, _tried
    if _tried:
        return
    _tried = True
    if os.environ.get("CTORCH_KERNELS") == "0":
        _why, _cure = "CTORCH_KERNELS=0 is set", "unset CTORCH_KERNELS"
        return
    try:
        library = _load_library()
    except ImportError as error:
        _why, _cure = _explain(error)
        if not _why.startswith("CTORCH_EXT=0"):  # then the user asked for none
            message = f"ctorch runs without its compiled kernels, slower: {reason()}"
            warnings.warn(message, UserWarning, stacklevel=2)
        return
    _why = _cure = ""
    HAS_KERNELS = True
    HAS_CUDA_KERNELS = any(_registered(name, "CUDA") for name in operators())


def reason() -> str:
    """Why there are no kernels, and the cure; an empty string where they are loaded."""
    return f"{_why}. Cure: {_cure}" if _why else ""


def cuda_reason() -> str:
    """Why there are no CUDA kernels, and the cure; an empty string where they are loaded."""
    if HAS_CUDA_KERNELS:
        return ""
    if not HAS_KERNELS:
        return reason()
    why = build_note().get("cuda_reason") or "the library holds none"
    cure = (
        f"install a CUDA toolkit (nvcc), then in ctorch's source folder `CTORCH_CUDA=1 {REINSTALL}`"
    )
    return f"{why}. Cure: {cure}"


def operators() -> list[str]:
    """The names of ctorch's operators, without the namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix("ctorch::") for name in names if name.startswith("ctorch::")})


def implementation(operator: str, device: str) -> str:
    """What serves an operator on a device: ``native``, ``CUDA`` or ``reference``.

    Args:
        operator: its name without the namespace.
        device: ``cpu`` or ``cuda``.
    """
    key, kind = {"cpu": ("CPU", "native"), "cuda": ("CUDA", "CUDA")}[device]
    return kind if HAS_KERNELS and _registered(operator, key) else "reference"


def build_note() -> dict[str, Any]:
    """What ``setup.py`` noted: compiler, torch, GPU architectures, or why it built no library."""
    try:
        note: dict[str, Any] = json.loads(LIBRARY.with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return note


def _load_library() -> Any:
    """Loads the library beside this very package, not another one that an import might find."""
    spec = importlib.util.spec_from_file_location("ctorch._C", LIBRARY)
    assert spec is not None
    return importlib.util.module_from_spec(spec)


def _registered(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ctorch::{operator}", key)


def _explain(error: ImportError) -> tuple[str, str]:
    """Why the library is missing or does not load, and the cure."""
    here = "in ctorch's source folder"
    if LIBRARY.exists():
        needs = "it needs torch >= 2.10 and the kind of machine it was built on"
        why = f"_C.abi3.so does not load under torch {torch.__version__} ({needs}): {error}"
        return why, f"rebuild it: {here} `{REINSTALL}`"
    note = build_note()
    if not note:
        return "the kernels were never built", f"{here} `pip install -e . --no-build-isolation`"
    why = str(note.get("reason", "the library is gone"))
    if "compiler" in why:
        return why, f"install g++ (Debian, Ubuntu: `apt install g++`), then {here} `{REINSTALL}`"
    return why, f"{here} `CTORCH_EXT=1 {REINSTALL} -v`, which shows what fails"
