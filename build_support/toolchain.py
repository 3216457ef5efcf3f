"""What there is on this machine: torch's headers, a C++ compiler, nvcc. Nothing imports torch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


def find_torch() -> Path | None:
    """The directory of the installed torch, also from inside an isolated build environment."""
    scheme = sysconfig.get_paths()
    for place in [*sys.path, scheme["purelib"], scheme["platlib"]]:
        torch = Path(place) / "torch"
        if (torch / "include/torch/csrc/stable/library.h").is_file():
            return torch
    return None


def torch_version(torch: Path) -> str:
    """The version string of the torch in that directory, or ``unknown``."""
    try:
        text = (torch / "version.py").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"__version__ = ['\"](.+?)['\"]", text)
    return found.group(1) if found else "unknown"


def has_cuda(torch: Path) -> bool:
    """Whether that torch was built with CUDA."""
    return (torch / "lib/libtorch_cuda.so").exists()


def find_compiler() -> list[str] | None:
    """The C++ compiler, as the first words of a command: ``$CXX``, else g++, else clang++.

    None where there is none, or not that in ``$CXX``: another would be a surprise.
    """
    given = os.environ.get("CXX", "").strip()
    if given:  # a path, or words, as "ccache g++"
        try:
            words = [given] if shutil.which(given) else shlex.split(given)
        except ValueError:
            return None
        program = shutil.which(words[0])
        return [program, *words[1:]] if program else None
    found = next((path for name in ("g++", "clang++") if (path := shutil.which(name))), None)
    return [found] if found else None


def without_launcher(compiler: list[str]) -> str:
    """The compiler alone, of words that may begin with ccache or the like."""
    launchers = ("ccache", "sccache", "distcc", "icecc")
    return next(word for word in compiler if Path(word).name not in launchers)


def find_nvcc() -> str | None:
    """The path of nvcc: on ``$PATH``, else under ``$CUDA_HOME`` or /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    places = os.pathsep.join(os.path.join(home, "bin") for home in homes if home)
    return shutil.which("nvcc") or shutil.which("nvcc", path=places)


def cuda_libraries(nvcc: str) -> list[str]:
    """The folders that hold libcudart_static.a, as nvcc itself states them."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    stated = re.search(r"^#\$ LIBRARIES=(.*)$", said, re.MULTILINE)
    folders = re.findall(r'"?-L([^"\s]+)"?', stated.group(1)) if stated else []
    return [folder for folder in folders if not folder.endswith("stubs")]


def first_line(command: list[str]) -> str:
    """The first line that a command prints."""
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
