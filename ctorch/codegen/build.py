"""From generated C++ to a loaded library, through the system's compiler and the cache on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

from ctorch.codegen import cache

# Never -ffast-math: NaN checks vanish. -march=native is right here: what is built stays here.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-s"]


class NoCompiler(RuntimeError):
    """There is no C++ compiler; the message says how to get one."""


class CompileError(RuntimeError):
    """The compiler refused generated code; the message holds what it said."""


def load(source: str) -> ctypes.CDLL:
    """The library made from a C++ translation unit: from this process, the cache, or the compiler.

    Raises:
        NoCompiler, CompileError: it cannot be made.
    """
    with _lock:
        loaded = _loaded.get(source)
        if loaded is None:
            try:
                key = _key(source)
                path = cache.find(key)
                loaded = None if path is None else _opened(path)
                if loaded is None:
                    loaded = _compile(source, key)
                _loaded[source] = loaded
            except OSError as error:
                raise CompileError(
                    f"a compiled solve cannot be made or loaded: {error}. A folder that is mounted"
                    " noexec cannot hold programs: set CTORCH_CACHE_DIR to one that can, and TMPDIR"
                    " where that is full or cannot be written."
                ) from error
        return loaded


_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}


def _after_fork() -> None:
    """A thread that held the lock does not live on in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def include_folder() -> Path:
    """Where the headers are: inside an installed package, or in the source tree."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "include"
    return installed if installed.is_dir() else package.parent / "csrc"


def compiler() -> list[str]:
    """The C++ compiler, as the first words of a command: ``$CXX``, else g++, else clang++.

    Raises:
        NoCompiler: there is none, or not that in ``$CXX``.
    """
    given = os.environ.get("CXX", "").strip()
    if given:  # a path, or words, as "ccache g++"
        words = [given] if shutil.which(given) else _words("CXX", given)
        program = shutil.which(words[0]) if words else None
        if program is None:
            raise NoCompiler(
                f"native solves need a C++ compiler, and CXX={given} names none: there is no"
                f" program {words[0] if words else given} here. Correct CXX, or unset it to use g++"
                " or clang++. Without one, solve with native=False."
            )
        return [program, *words[1:]]
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    if found is None:
        raise NoCompiler(
            "native solves need a C++ compiler, and none was found: install g++ (Debian, Ubuntu:"
            " apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx; macOS:"
            " xcode-select --install), or name one in CXX. Without one, solve with native=False."
        )
    return [found]


def flags() -> list[str]:
    """How the compiler is called; ``$CTORCH_NATIVE_FLAGS`` are added.

    Raises:
        CompileError: those cannot be read.
    """
    more = _words("CTORCH_NATIVE_FLAGS", os.environ.get("CTORCH_NATIVE_FLAGS", ""))
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else (
        "-mcpu=native"
    )  # fmt: skip
    return [*FLAGS, native, "-pthread", *more]


def _words(name: str, given: str) -> list[str]:
    try:
        return shlex.split(given)
    except ValueError as error:
        raise CompileError(f"{name}={given} cannot be read: {error}.") from None


def _key(source: str) -> str:
    """The hash of everything that the library hangs on."""
    parts = [source, " ".join(flags()), _compiler_identity(*compiler()), _processor(), headers()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _opened(path: Path) -> ctypes.CDLL | None:
    """A library in the cache; None where another process has cleared that meanwhile."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        if path.exists():
            raise
        return None


def _compile(source: str, key: str) -> ctypes.CDLL:
    tool = compiler()
    with tempfile.TemporaryDirectory(prefix="ctorch-native-") as scratch:
        text, library = Path(scratch, "solve.cpp"), Path(scratch, "solve.so")
        text.write_text(source)
        command = [*tool, *flags(), f"-I{include_folder()}", str(text), "-o", str(library)]
        status, output = _run(command)
        if status != 0:
            said = "\n".join(output.splitlines()[:20])
            raise CompileError(
                f"{shlex.join(tool)} failed with exit status {status} on a generated solve:\n{said}"
            )
        return _opened(cache.put(key, library)) or ctypes.CDLL(str(library))


def _run(command: list[str]) -> tuple[int, str]:
    """Exit status and output; Ctrl-C at the terminal comes to this process alone, to decide."""
    to, pipe = subprocess.STDOUT, subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=to, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the driver and what it has started
            raise
    return process.returncode, output


@functools.lru_cache
def _compiler_identity(*words: str) -> str:
    """Changes with the compiler, and costs no call of it."""
    parts = list(words)
    for word in words:
        program = shutil.which(word)
        if program is not None:  # the compiler, or what starts it
            real = os.path.realpath(program)
            stat = os.stat(real)
            parts.append(f"{real} {stat.st_size} {stat.st_mtime_ns}")
    return " ".join(parts)


@functools.lru_cache
def _processor() -> str:
    """What -march=native hangs on."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = file.read(8192).partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(wanted))


@functools.lru_cache
def headers() -> str:
    """The hash of the library of headers."""
    total = hashlib.sha256()
    for header in sorted(include_folder().glob("native/*.h")):
        total.update(header.read_bytes())
    for name in ("vector_math.h", "polynomials.h"):
        total.update((include_folder() / "jet" / name).read_bytes())
    return total.hexdigest()
