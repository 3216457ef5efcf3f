"""Builds ctorch._C, the compiled kernels. Everything else about the package is in pyproject.toml.

Without a compiler or without torch the package installs all the same, and computes with plain
PyTorch instead; `ctorch info` says so, and why. How kernels are compiled: build_support/.

Environment:
    CTORCH_EXT=0|1|auto      0: no kernels; 1: fail rather than go without; auto: where possible
    CTORCH_CUDA=0|1|auto     likewise CUDA kernels; auto: where nvcc and a CUDA torch are found
    CTORCH_CUDA_ARCHS=80;90  GPU architectures; the last is embedded as PTX too, for newer GPUs
    CTORCH_WERROR=1          warnings in our own code are errors
    CTORCH_SANITIZE=...      -fsanitize=... (say address,undefined), with debug information
    CXX, CUDA_HOME           C++ compiler, CUDA toolkit
    MAX_JOBS                 number of compilations at a time
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))
from extension import CannotBuild, build, put, shared_headers  # noqa: E402

PRODUCTS = ("_C.abi3.so", "_build.json")  # the library, and a note of what was built or why not


class BuildKernels(build_ext):
    """Makes the library and the note, in the build folder and in the source tree.

    In the tree also where the package is installed elsewhere: `python -m ctorch` finds the tree
    first when it runs there.
    """

    def run(self) -> None:
        library, note = (Path(self.build_lib) / "ctorch" / name for name in PRODUCTS)
        # what an earlier build left must not be shipped with this one
        for place in (library.parent, ROOT / "ctorch"):
            for name in PRODUCTS:
                (place / name).unlink(missing_ok=True)
        try:
            facts = build(library)
        except (CannotBuild, subprocess.CalledProcessError, OSError) as error:
            if "1" in (os.environ.get("CTORCH_EXT"), os.environ.get("CTORCH_CUDA")):
                raise SystemExit(f"*** ctorch: {_say(error)}") from error
            facts = {"kernels": False, "cuda": False, "reason": _say(error)}
        library.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(facts, indent=1) + "\n")
        for product in (library, note):
            if product.exists():
                put(product, ROOT / "ctorch" / product.name)
        _announce(facts)

    def get_outputs(self) -> list[str]:
        products = (Path(self.build_lib) / "ctorch" / name for name in PRODUCTS)
        return [str(product) for product in products if product.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {output: str(ROOT / "ctorch" / Path(output).name) for output in self.get_outputs()}


class BuildPython(build_py):
    """Also copies the headers that generated code includes into the package: ctorch/include/."""

    def run(self) -> None:
        if not self.editable_mode:  # modules deleted since an earlier build must not be shipped
            shutil.rmtree(Path(self.build_lib) / "ctorch", ignore_errors=True)
        super().run()
        for header, copy in self._headers().items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, copy)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *map(str, self._headers().values())]

    def _headers(self) -> dict[Path, Path]:
        if self.editable_mode:  # then they are read from csrc/
            return {}
        include = Path(self.build_lib) / "ctorch/include"
        return {path: include / path.relative_to(ROOT / "csrc") for path in shared_headers()}


def _say(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        tool = Path(error.cmd[0]).name
        return f"{tool} failed with exit status {error.returncode} (`pip install -v` shows why)"
    return str(error)


def _announce(facts: dict[str, object]) -> None:
    if facts["kernels"]:
        cuda = "with" if facts["cuda"] else f"without ({facts['cuda_reason']})"
        lines = [f"built the kernels against torch {facts['torch']}, {cuda} CUDA kernels"]
    else:
        lines = [
            f"installing WITHOUT compiled kernels: {facts['reason']}",
            "it works, with plain PyTorch in their place, only slower",
        ]
    print(*(f"*** ctorch: {line}" for line in lines), sep="\n", file=sys.stderr)


setup(
    ext_modules=[Extension("ctorch._C", sources=["csrc/core/module.cpp"], py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
