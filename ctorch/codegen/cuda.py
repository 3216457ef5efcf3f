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
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ctorch.codegen import build, cache

# Without -default-device NVRTC takes what is not marked for functions of the CPU, and refuses them.
FLAGS = ["-std=c++20", "-default-device", "-diag-suppress=177"]
#: of the kernels: small, for every thread needs many registers
BLOCK = 64

Dim3 = tuple[int, int, int]


class Kernel(Protocol):
    """A kernel on a device.

    Attributes:
        threads: that a block may have.
        room: bytes of shared memory that a launch may ask for, beside what the kernel declares.
    """

    threads: int
    room: int

    def __call__(self, grid: Dim3, block: Dim3, args: list[Tensor], shared_mem: int = 0) -> None:
        """Launch it on the current stream; the arguments are pointers to tensors."""


def launch(kernel: Kernel, threads: int, args: Sequence[Tensor], shared_memory: int = 0) -> None:
    """Launch a kernel with at least so many threads, where the arguments are.

    Args:
        kernel: what to launch.
        threads: how many there must be.
        args: its arguments.
        shared_memory: bytes that a block asks for, of the kernel's ``room``.
    """
    with torch.cuda.device_of(args[0]):
        grid, block = (-(-threads // BLOCK), 1, 1), (BLOCK, 1, 1)
        kernel(grid=grid, block=block, args=list(args), shared_mem=shared_memory)


class _Loaded:
    """A kernel as PyTorch loads it."""

    def __init__(self, kernel: Any, device: int) -> None:
        self._kernel = kernel
        self.threads = self._attribute(_THREADS)
        properties: Any = torch.cuda.get_device_properties(device)
        self.room = max(
            0, properties.shared_memory_per_block_optin - self._attribute(_SHARED_MEMORY)
        )
        self._asked = 0

    def __call__(self, grid: Dim3, block: Dim3, args: list[Tensor], shared_mem: int = 0) -> None:
        """Launch it."""
        if shared_mem > self._asked:
            self._ask_for(shared_mem)
        self._kernel(grid=grid, block=block, args=args, shared_mem=shared_mem)

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        error = _driver().cuFuncGetAttribute(ctypes.byref(value), number, self._kernel.func)
        if error:
            raise RuntimeError(f"CUDA does not tell the limits of a kernel (error {error}).")
        return value.value

    def _ask_for(self, size: int) -> None:
        """Without, a block has 48 KB at most, with what the kernel declares."""
        error = _driver().cuFuncSetAttribute(self._kernel.func, _LAUNCHED_MEMORY, size)
        if error:
            raise RuntimeError(f"CUDA refuses {size} bytes of shared memory (error {error}).")
        self._kernel.set_shared_memory_config(size)  # PyTorch counts them, too
        self._asked = size


#: of CUfunction_attribute
_THREADS, _SHARED_MEMORY, _LAUNCHED_MEMORY = 0, 1, 8


def _driver() -> Any:
    from torch.cuda._utils import _get_gpu_runtime_library

    return _get_gpu_runtime_library()


def load(source: str, names: Sequence[str], device: torch.device) -> Mapping[str, Kernel]:
    """The kernels of that name on a CUDA device: from this process, the cache, or the compiler.

    Raises:
        ctorch.codegen.build.NoCompiler, ctorch.codegen.build.CompileError: they cannot be made.
    """
    with _lock, torch.cuda.device(device):
        index = torch.cuda.current_device()
        key = (source, index)
        if key not in _loaded:
            from torch.cuda._utils import _cuda_load_module

            major, minor = torch.cuda.get_device_capability()
            code = compiled(source, f"sm_{major}{minor}")
            kernels = cast("Mapping[str, Any]", _cuda_load_module(code, list(names)))
            _loaded[key] = {name: _Loaded(kernel, index) for name, kernel in kernels.items()}
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
