"""Generated kernels in the emulator, launched as kernels on a device are."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from ctorch.codegen import build
from ctorch.codegen.cuda import Kernel

HERE = Path(__file__).resolve().parent
LAUNCHERS = """
extern "C" void launch_ct_solve(int grid, int block, void** args) {
  CT_LAUNCH(ct_solve, grid, block, 0, nullptr, static_cast<ct::native::Task*>(args[0]));
}
extern "C" void launch_ct_eval(int grid, int block, void** args) {
  CT_LAUNCH(ct_eval, grid, block, 0, nullptr, static_cast<int64_t*>(args[0]),
            static_cast<double*>(args[1]), args[2], args[3], args[4]);
}
"""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class _Emulated:
    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.function = getattr(library, f"launch_{name}")

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: list[Tensor]
    ) -> None:
        assert grid[1:] == block[1:] == (1, 1)
        self.function(
            grid[0], block[0], (ctypes.c_void_p * len(args))(*(x.data_ptr() for x in args))
        )


def emulated(source: str, folder: Path) -> Mapping[str, Kernel]:
    """The kernels in generated CUDA source, for tensors of the CPU."""
    number = len(list(folder.glob("*.cpp")))
    path, library = folder / f"kernels{number}.cpp", folder / f"kernels{number}.so"
    path.write_text(f'#include "cuda_emu.h"\n{source}{LAUNCHERS}')
    flags = [
        "-std=c++20",
        "-O1",
        "-march=native",
        "-fPIC",
        "-shared",
        "-pthread",
        "-Wall",
        "-Wextra",
    ]
    include = [f"-I{HERE}", f"-I{build.include_folder()}"]
    command = ["g++", *flags, "-Werror", *include, str(path), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    loaded = ctypes.CDLL(str(library))
    return {name: _Emulated(loaded, name) for name in ("ct_solve", "ct_eval")}
