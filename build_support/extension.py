"""Compiles csrc/ into one library with g++ and nvcc.

Against torch's stable ABI and Python's limited API, so that one library serves every torch from
2.10 on and every Python from 3.10 on; built against a CPU torch, it serves a CUDA torch too. That
is also why torch's own build helpers are of no use here: a CPU torch refuses to compile CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import toolchain

CSRC = Path(__file__).resolve().parent.parent / "csrc"
DEFINES = [
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # 2.10
    "-DPy_LIMITED_API=0x030a0000",  # 3.10
]
# Never -ffast-math or -Ofast: they change the floating-point mode of the whole process, and NaN
# checks vanish. Never -march=native: what is built here runs elsewhere, so kernels choose their
# instruction set at run time.
OPTIMIZE = ["-O3", "-fno-math-errno"]


class CannotBuild(RuntimeError):
    """The kernels cannot be built here; the message says why."""


def build(library: Path) -> dict[str, object]:
    """Builds the library at that path and returns what there is to know about it."""
    if os.environ.get("CTORCH_EXT") == "0":
        raise CannotBuild("CTORCH_EXT=0 was set when ctorch was installed")
    tools = find_tools()
    why_no_cuda = tools.why_no_cuda()
    if not why_no_cuda:
        try:
            compile_and_link(tools, library, cuda=True)
        except subprocess.CalledProcessError:
            if os.environ.get("CTORCH_CUDA") == "1":
                raise
            why_no_cuda = "nvcc or the host compiler failed when ctorch was installed"
    if why_no_cuda:
        compile_and_link(tools, library, cuda=False)
    return {
        "kernels": True,
        "cuda": not why_no_cuda,
        "cuda_archs": [] if why_no_cuda else tools.archs,
        "cuda_reason": why_no_cuda,
        "torch": toolchain.torch_version(tools.torch),
        "compiler": toolchain.first_line([*tools.compiler, "--version"]),
        "sanitize": ",".join(tools.sanitizers),
    }


def shared_headers() -> list[Path]:
    """The headers that generated code includes, on the user's machine."""
    names = ["core/hd.h", "*/arith.h", "native/**/*.h", "jet/vector_math.h", "jet/polynomials.h"]
    return sorted(header for name in names for header in CSRC.glob(name))


def put(source: Path, target: Path) -> None:
    """Copies in one step: a killed build leaves the old file or the new one, never half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    passing = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, passing)
    os.replace(passing, target)


@dataclass
class Tools:
    """What was found on this machine, and what the environment asks for."""

    torch: Path
    compiler: list[str]
    nvcc: str | None
    archs: list[str] = field(default_factory=lambda: _list("CTORCH_CUDA_ARCHS", "80;90"))
    sanitizers: list[str] = field(default_factory=lambda: _list("CTORCH_SANITIZE", ""))
    strict: bool = os.environ.get("CTORCH_WERROR") == "1"

    def why_no_cuda(self) -> str:
        """Why CUDA kernels are not built; an empty string where they are."""
        wish = os.environ.get("CTORCH_CUDA", "auto")
        if wish == "0":
            return "CTORCH_CUDA=0 was set when ctorch was installed"
        if self.nvcc is None:
            if wish == "1":
                raise CannotBuild("CTORCH_CUDA=1, but no nvcc is on the path or under CUDA_HOME")
            return "no nvcc was found when ctorch was installed"
        if wish != "1" and not toolchain.has_cuda(self.torch):
            return "ctorch was built against a torch without CUDA"
        return ""


def find_tools() -> Tools:
    """Looks for everything that a build needs; raises where something is missing."""
    torch, compiler = toolchain.find_torch(), toolchain.find_compiler()
    if sys.platform == "win32":
        raise CannotBuild("the kernels have not been ported to Windows")
    if compiler is None:
        given = os.environ.get("CXX", "").strip()
        wanted = f"CXX={given} names no program" if given else "neither g++ nor clang++"
        raise CannotBuild(f"no C++ compiler was found: {wanted}")
    if torch is None:
        raise CannotBuild("no torch >= 2.10 was found, and its headers are needed")
    return Tools(torch, compiler, toolchain.find_nvcc())


def compile_and_link(tools: Tools, library: Path, cuda: bool) -> None:
    """Runs the compilers in a scratch folder and puts the library in place at the end."""
    commands = [
        (cxx_command(tools), source)
        for name in ("core/*.cpp", "*/cpu.cpp")
        for source in _csrc(name)
    ]
    if cuda:
        commands += [(nvcc_command(tools), source) for source in _csrc("*/cuda.cu")]
    with tempfile.TemporaryDirectory(prefix="ctorch-build-") as scratch:

        def compile_one(command: list[str], source: Path) -> str:
            made = f"{scratch}/{source.parent.name}-{source.name}.o"
            subprocess.run([*command, "-c", str(source), "-o", made], check=True)
            return made

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda job: compile_one(*job), commands))
        linked = Path(scratch) / library.name
        subprocess.run(link_command(tools, objects, linked, cuda), check=True)
        put(linked, library)


def cxx_command(tools: Tools) -> list[str]:
    """The C++ compiler with its flags."""
    return [*tools.compiler, "-std=c++20", *OPTIMIZE, *_include(tools), *_host_flags(tools)]


def nvcc_command(tools: Tools) -> list[str]:
    """Nvcc with its flags, those of the host compiler among them."""
    newest = tools.archs[-1]
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in tools.archs]
    targets.append(f"arch=compute_{newest},code=compute_{newest}")
    generate = [word for target in targets for word in ("-gencode", target)]
    host = ["-Xcompiler", ",".join([*OPTIMIZE, *_host_flags(tools)])]
    strict = ["-Werror", "all-warnings"] if tools.strict else []
    base = [str(tools.nvcc), "-std=c++20", "-O3", "-ccbin"]
    base.append(toolchain.without_launcher(tools.compiler))
    return [*base, *_include(tools), *generate, *host, *strict]


def link_command(tools: Tools, objects: list[str], library: Path, cuda: bool) -> list[str]:
    """The link step."""
    flags = [f"-fsanitize={name}" for name in tools.sanitizers] or ["-s"]
    if cuda:
        flags += [f"-L{folder}" for folder in toolchain.cuda_libraries(str(tools.nvcc))]
        flags += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # A CUDA torch's libtorch.so is what brings in libtorch_cuda.so, where the weak symbols of
    # core/stream.h are found. A linker that drops it as unused would leave them null.
    flags += ["-Wl,--no-as-needed", f"-L{tools.torch}/lib", "-ltorch", "-ltorch_cpu"]
    if sys.platform == "darwin":
        flags = ["-undefined", "dynamic_lookup"]
    return [*tools.compiler, "-shared", *objects, "-o", str(library), *flags]


def _include(tools: Tools) -> list[str]:
    foreign = [f"{tools.torch}/include", sysconfig.get_paths()["include"]]
    return [*(word for folder in foreign for word in ("-isystem", folder)), "-I", str(CSRC)]


def _host_flags(tools: Tools) -> list[str]:
    flags = [*DEFINES, "-fPIC", "-fvisibility=hidden"]
    if tools.strict:
        flags += ["-Wall", "-Wextra", "-Werror"]
    if tools.sanitizers:
        flags += [f"-fsanitize={name}" for name in tools.sanitizers]
        flags += ["-DCT_SANITIZE", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
    return flags


def _csrc(pattern: str) -> list[Path]:
    return sorted(CSRC.glob(pattern))


def _list(variable: str, default: str) -> list[str]:
    return [item for item in os.environ.get(variable, default).replace(",", ";").split(";") if item]
