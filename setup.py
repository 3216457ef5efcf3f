"""Builds ctorch._C, the compiled kernels, with g++ and nvcc. Everything else about the package is in pyproject.toml.

Against torch's stable ABI and Python's limited API, so that one library serves every torch >= 2.10 and every
Python >= 3.10; built against a CPU torch it serves a CUDA torch too. torch's headers are found on disk and torch is never
imported. Without a compiler or without torch the package installs all the same and computes with plain PyTorch.

Environment:
    CTORCH_EXT=0|1|auto       0: no kernels; 1: fail rather than go without; auto (default): build them where possible
    CTORCH_CUDA=0|1|auto      the same for the CUDA kernels; auto: where nvcc and a CUDA build of torch are found
    CTORCH_CUDA_ARCHS=80;90   GPU architectures; the last one is also embedded as PTX, for newer GPUs
    CTORCH_WERROR=1           warnings in our own code are errors
    CTORCH_SANITIZE=...       -fsanitize=... (for instance address,undefined), with debug information
    CXX, CUDA_HOME, MAX_JOBS  compiler, CUDA toolkit, number of compilations at a time
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))
import toolchain  # noqa: E402

TARGET_TORCH = "0x020a000000000000"  # 2.10
TARGET_PYTHON = "0x030a0000"  # 3.10
LIBRARY, RECORD = "_C.abi3.so", "_build.json"
# Never -ffast-math or -Ofast (they change the floating-point mode of the whole process, and NaN checks vanish), never
# -march=native (what is distributed must run elsewhere): kernels choose their instruction set at run time.
OPTIMIZE = ["-O3", "-fno-math-errno"]


class CannotBuild(RuntimeError):
    """The kernels cannot be built here; the message says why."""


class BuildKernels(build_ext):
    """Compiles csrc/*/cpu.cpp, csrc/core/*.cpp and csrc/*/cuda.cu into one library, and records what was built."""

    def run(self) -> None:
        built = Path(self.build_lib) / "ctorch"
        for folder in self._folders(built):  # a library left from an earlier build must never be shipped
            for name in (LIBRARY, RECORD):
                (folder / name).unlink(missing_ok=True)
        wish = os.environ.get("CTORCH_EXT", "auto")
        try:
            if wish == "0":
                raise CannotBuild("CTORCH_EXT=0 was set when ctorch was installed")
            record = self._build(built / LIBRARY)
        except (CannotBuild, subprocess.CalledProcessError, OSError) as error:
            if wish == "1":
                raise
            reason = _say(error)
            record = {"kernels": False, "cuda": False, "reason": reason}
            print(f"\n*** ctorch: installing WITHOUT compiled kernels: {reason}.", file=sys.stderr)
            print("*** It works, with plain PyTorch in their place, only slower.\n", file=sys.stderr)
        built.mkdir(parents=True, exist_ok=True)
        (built / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        for folder in self._folders(built):
            for name in (LIBRARY, RECORD):
                if folder != built and (built / name).exists():
                    _replace(built / name, folder / name)

    def _folders(self, built: Path) -> list[Path]:
        return [built, ROOT / "ctorch"] if self.inplace or self.editable_mode else [built]

    def get_outputs(self) -> list[str]:
        built = Path(self.build_lib) / "ctorch"
        return [str(built / name) for name in (LIBRARY, RECORD) if (built / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {output: str(ROOT / "ctorch" / Path(output).name) for output in self.get_outputs()}

    def _build(self, target: Path) -> dict[str, object]:
        torch, compiler, nvcc = toolchain.find_torch(), toolchain.find_compiler(), toolchain.find_nvcc()
        if sys.platform == "win32":
            raise CannotBuild("the kernels have not been ported to Windows")
        if compiler is None:
            raise CannotBuild("no C++ compiler (g++ or clang++) was found")
        if torch is None:
            raise CannotBuild("no torch >= 2.10 was found, and its headers are needed")
        cuda = self._wants_cuda(torch, nvcc)
        archs = os.environ.get("CTORCH_CUDA_ARCHS", "80;90").replace(",", ";").strip(";").split(";")
        include = ["-isystem", f"{torch}/include", "-isystem", sysconfig.get_paths()["include"], "-I", f"{ROOT}/csrc"]
        define = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", f"-DPy_LIMITED_API={TARGET_PYTHON}"]
        sanitize = os.environ.get("CTORCH_SANITIZE", "")
        host = ["-fPIC", "-fvisibility=hidden"]
        link = ["-s"]
        if sanitize:
            define += ["-DCT_SANITIZE"]
            host += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g", "-fno-omit-frame-pointer"]
            link = [f"-fsanitize={sanitize}", "-g"]
        strict = os.environ.get("CTORCH_WERROR") == "1"
        host += ["-Wall", "-Wextra", "-Werror"] if strict else []
        common = ["-std=c++20", *OPTIMIZE, *define, *include]
        jobs = [([compiler, *common, *host], source) for source in sorted(_sources("*.cpp"))]
        if cuda:
            assert nvcc is not None
            common = ["-std=c++20", "-O3", "-DUSE_CUDA", *define, *include, "-ccbin", compiler]
            common += ["-Xcompiler", ",".join([*OPTIMIZE, *host]), *_gencode(archs)]
            common += ["-Werror", "all-warnings"] if strict else []
            jobs += [([nvcc, *common], source) for source in sorted(_sources("*.cu"))]
            link += [f"-L{folder}" for folder in toolchain.cuda_libraries(nvcc)]
            link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        # --no-as-needed: libtorch.so is what brings libtorch_cuda.so, and no symbol of ours is found in it alone.
        torch_libraries = [f"-L{torch}/lib", "-ltorch", "-ltorch_cpu"]
        link += ["-Wl,--no-as-needed", *torch_libraries] if sys.platform == "linux" else ["-undefined", "dynamic_lookup"]
        self._compile_and_link(jobs, [compiler, "-shared"], link, target)
        version = toolchain.torch_version(torch)
        print(f"*** ctorch: built the kernels against torch {version}, CUDA: {'yes' if cuda else 'no'}", file=sys.stderr)
        return {
            "kernels": True,
            "cuda": cuda,
            "cuda_archs": archs if cuda else [],
            "cuda_reason": "" if cuda else self._why_no_cuda(torch, nvcc),
            "torch": version,
            "compiler": _first_line([compiler, "--version"]),
            "sanitize": sanitize,
        }

    def _wants_cuda(self, torch: Path, nvcc: str | None) -> bool:
        wish = os.environ.get("CTORCH_CUDA", "auto")
        if wish == "1" and nvcc is None:
            raise CannotBuild("CTORCH_CUDA=1, but nvcc was found neither on the path nor under CUDA_HOME")
        return wish == "1" or (wish == "auto" and not self._why_no_cuda(torch, nvcc))

    def _why_no_cuda(self, torch: Path, nvcc: str | None) -> str:
        if os.environ.get("CTORCH_CUDA") == "0":
            return "CTORCH_CUDA=0 was set when ctorch was installed"
        if nvcc is None:
            return "no nvcc was found when ctorch was installed"
        return "" if toolchain.has_cuda(torch) else "ctorch was built against a torch without CUDA"

    def _compile_and_link(
        self, jobs: list[tuple[list[str], Path]], link: list[str], libraries: list[str], target: Path
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="ctorch-build-") as scratch:

            def compile_one(job: tuple[list[str], Path]) -> str:
                command, source = job
                made = Path(scratch) / f"{source.parent.name}-{source.name}.o"
                subprocess.run([*command, "-c", str(source), "-o", str(made)], check=True)
                return str(made)

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, jobs))
            linked = Path(scratch) / LIBRARY
            subprocess.run([*link, *objects, "-o", str(linked), *libraries], check=True)
            _replace(linked, target)


class BuildPython(build_py):
    """Copies the headers that generated code includes into the package, as ctorch/include/."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        include = Path(self.build_lib) / "ctorch/include"
        shutil.rmtree(include, ignore_errors=True)
        for header in _shared_headers():
            copy = include / header.relative_to(ROOT / "csrc")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, copy)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        include = Path(self.build_lib) / "ctorch/include"
        headers = [str(include / h.relative_to(ROOT / "csrc")) for h in _shared_headers() if not self.editable_mode]
        return [*super().get_outputs(include_bytecode), *headers]


def _sources(suffix: str) -> list[Path]:
    names = {"*.cpp": ["core/*.cpp", "*/cpu.cpp"], "*.cu": ["*/cuda.cu"]}[suffix]
    return [source for name in names for source in (ROOT / "csrc").glob(name)]


def _shared_headers() -> list[Path]:
    names = ["core/hd.h", "*/arith.h", "native/**/*.h"]
    return sorted(header for name in names for header in (ROOT / "csrc").glob(name))


def _gencode(archs: list[str]) -> list[str]:
    newest = archs[-1]
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"arch=compute_{newest},code=compute_{newest}")
    return [word for target in targets for word in ("-gencode", target)]


def _replace(source: Path, target: Path) -> None:
    """Puts a copy of source at target in one step: a killed build leaves the old file or the new, never half."""
    target.parent.mkdir(parents=True, exist_ok=True)
    passing = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, passing)
    os.replace(passing, target)


def _first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def _say(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{Path(error.cmd[0]).name} failed (exit status {error.returncode}); `pip install -v` shows its output"
    return str(error)


setup(
    ext_modules=[Extension("ctorch._C", sources=["csrc/core/module.cpp"], py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
