"""From generated CUDA source to kernels on a device, through NVRTC and the cache on disk."""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from ctorch.codegen import build, cache

# Without -default-device NVRTC takes what is not marked for functions of the CPU, and refuses them.
FLAGS = ["-std=c++20", "-default-device", "-diag-suppress=177"]
#: of the kernels: small, for every thread needs many registers
BLOCK = 64


class Kernel(Protocol):
    """A kernel on a device."""

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: list[Tensor]
    ) -> None:
        """Launch it on the current stream; the arguments are pointers to tensors."""


def launch(kernel: Kernel, threads: int, args: Sequence[Tensor]) -> None:
    """Launch a kernel with at least so many threads, where the arguments are."""
    with torch.cuda.device_of(args[0]):
        kernel(grid=(-(-threads // BLOCK), 1, 1), block=(BLOCK, 1, 1), args=list(args))


def load(source: str, names: Sequence[str], device: torch.device) -> Mapping[str, Kernel]:
    """The kernels of that name on a CUDA device: from this process, the cache, or the compiler.

    Raises:
        ctorch.codegen.build.NoCompiler, ctorch.codegen.build.CompileError: they cannot be made.
    """
    with _lock, torch.cuda.device(device):
        key = (source, torch.cuda.current_device())
        if key not in _loaded:
            from torch.cuda._utils import _cuda_load_module

            major, minor = torch.cuda.get_device_capability()
            code = compiled(source, f"sm_{major}{minor}")
            _loaded[key] = cast("Mapping[str, Kernel]", _cuda_load_module(code, list(names)))
        return _loaded[key]


_lock = threading.Lock()
_loaded: dict[tuple[str, int], Mapping[str, Kernel]] = {}


def compiled(source: str, architecture: str) -> bytes:
    """The machine code (a cubin) for an architecture, as "sm_90"; kept in the cache on disk.

    Raises:
        ctorch.codegen.build.NoCompiler, ctorch.codegen.build.CompileError: it cannot be made.
    """
    compiler = _compiler()
    options = [*FLAGS, f"--gpu-architecture={architecture}"]
    version = (ctypes.c_int * 2)()
    compiler.nvrtcVersion(ctypes.byref(version, 0), ctypes.byref(version, 4))
    parts = ["cuda", source, *options, *map(str, version), build.headers()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    code = cache.read(key)
    if code is None:
        code = _compile(compiler, source, [*options, f"-I{build.include_folder()}"])
        with tempfile.TemporaryDirectory(prefix="ctorch-native-") as scratch:
            path = Path(scratch, "solve.cubin")
            path.write_bytes(code)
            cache.put(key, path)
    return code


def _compile(compiler: ctypes.CDLL, source: str, options: Sequence[str]) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    begun = compiler.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"solve.cu", 0, None, None
    )
    if begun:
        raise build.CompileError(f"NVRTC could not begin (error {begun}).")
    try:
        texts = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        failed = compiler.nvrtcCompileProgram(program, len(options), texts)
        what = "ProgramLog" if failed else "CUBIN"
        getattr(compiler, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        result = ctypes.create_string_buffer(size.value)
        getattr(compiler, f"nvrtcGet{what}")(program, result)
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        said = "\n".join(result.value.decode(errors="replace").splitlines()[:20])
        raise build.CompileError(f"NVRTC failed (error {failed}) on a generated solve:\n{said}")
    return result.raw


@functools.cache
def _compiler() -> ctypes.CDLL:
    """NVRTC: where the system finds it, beside PyTorch, or in the CUDA toolkit.

    Raises:
        NoCompiler: there is none.
    """
    major = (torch.version.cuda or "13").partition(".")[0]
    packages = Path(torch.__file__).parents[1]
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = ["", *glob.glob(f"{packages}/nvidia/*/lib/"), f"{toolkit}/lib64/"]
    for folder in folders:
        try:
            for helper in sorted(glob.glob(f"{folder}libnvrtc-builtins.so*")) if folder else []:
                ctypes.CDLL(helper, mode=ctypes.RTLD_GLOBAL)  # NVRTC looks for it by name alone
            return ctypes.CDLL(f"{folder}libnvrtc.so.{major}")
        except OSError:
            continue
    raise build.NoCompiler(
        f"native solves on CUDA need NVRTC, and libnvrtc.so.{major} was not found: it comes with"
        " PyTorch for CUDA and with the CUDA toolkit (CUDA_HOME). Without it, solve with"
        " native=False."
    )
