"""Generated kernels in the emulator, launched as kernels on a device are."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctorch.codegen import build, cuda
from ctorch.codegen.cuda import Dim3, Kernel
from ctorch.ode import native, native_quick

from ..precompiled import included, write

HERE = Path(__file__).resolve().parent
# All arguments of a kernel are pointers.
LAUNCH = """
template <class... Args, size_t... I>
void launch(void (*kernel)(Args...), int grid, int block, int bytes, void** args,
            std::index_sequence<I...>) {
  CT_LAUNCH(kernel, grid, block, bytes, nullptr, static_cast<Args>(args[I])...);
}
template <class... Args>
void launch(void (*kernel)(Args...), int grid, int block, int bytes, void** args) {
  launch(kernel, grid, block, bytes, args, std::index_sequence_for<Args...>{});
}
"""
LAUNCHER = """extern "C" void launch_{name}(int grid, int block, int bytes, void** args) {{
  launch({name}, grid, block, bytes, args);
}}
"""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Emulated:
    """A kernel, with limits as on a device."""

    threads, room = 1024, 100 << 10

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.function = getattr(library, f"launch_{name}")

    def __call__(self, grid: Dim3, block: Dim3, args: list[Tensor], shared_mem: int = 0) -> None:
        assert grid[1:] == block[1:] == (1, 1)
        assert shared_mem <= self.room
        pointers = (ctypes.c_void_p * len(args))(*(x.data_ptr() for x in args))
        self.function(grid[0], block[0], shared_mem, pointers)


def emulated(source: str, names: Sequence[str], folder: Path) -> Mapping[str, Kernel]:
    """The kernels of that name in generated CUDA source, for tensors of the CPU."""
    text = f'#include "cuda_emu.h"\n{source}{LAUNCH}'
    text += "".join(LAUNCHER.format(name=name) for name in names)
    path = folder / f"kernels{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    library = path.with_suffix(".so")
    if not library.exists():
        write(path, text)
        made = path.with_suffix(f".{os.getpid()}")  # other workers do the same
        flags = ["-std=c++20", "-Og", "-march=native", "-fPIC", "-shared", "-pthread"]
        flags += ["-Wall", "-Wextra", "-Werror"]
        command = ["g++", *flags, f"-I{HERE}", f"-I{build.include_folder()}"]
        headers = included(folder, '#include "cuda_emu.h"\n', command)
        done = subprocess.run(
            [*command, *headers, str(path), "-o", str(made)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[:4000]
        made.rename(library)
    loaded = ctypes.CDLL(str(library))
    return {name: Emulated(loaded, name) for name in names}


@contextlib.contextmanager
def emulated_device(folder: Path) -> Iterator[None]:
    """Native solves of tensors of the CPU by emulated kernels."""
    form_of, objection = native.form_of, native._objection

    def load(source: str, names: Sequence[str], device: Any) -> Mapping[str, Kernel]:
        return emulated(source, names, folder)

    def device_form(*args: Any) -> Any:
        return dataclasses.replace(form_of(*args), registers=0, device="cuda")

    def device_objection(request: Any, problem: Any) -> str:
        request = copy.copy(request)
        request.layout = copy.copy(request.layout)
        request.layout.device = torch.device("cuda")
        return objection(request, problem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "load", load)
        patch.setattr(native, "_objection", device_objection)
        patch.setattr(native, "form_of", device_form)
        patch.setattr(native, "_libraries", {})
        patch.setattr(native_quick, "_recipes", {})
        yield
