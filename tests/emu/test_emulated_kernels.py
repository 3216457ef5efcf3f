"""CUDA kernels run on the CPU: right results, and no race that ThreadSanitizer can see."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
PROGRAMS = sorted(path.stem for path in HERE.glob("*.cpp"))
BARRIERS = [p for p in PROGRAMS if "__syncthreads" in (CSRC / p / "cuda_kernels.h").read_text()]
# "-g1": lines alone, which is what reports name
FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-pthread"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(program: str, folder: Path, *flags: str) -> Path:
    out = folder / program
    include = [f"-I{CSRC}", f"-I{HERE}"]
    command = ["g++", *FLAGS, *flags, *include, str(HERE / f"{program}.cpp"), "-o", str(out)]
    made = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in made.stderr and "san" in made.stderr:
        pytest.skip("this g++ has no sanitizer libraries")
    assert made.returncode == 0, made.stderr
    return out


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer wants memory where it expects it: without randomization where that is allowed.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    if fixed and subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    return subprocess.run([*fixed, str(program)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("program", PROGRAMS)
def test_equals_serial_loops(program: str, tmp_path: Path) -> None:
    # unoptimized: a sanitizer sees everything, and compiles in a third of the time
    done = run(build(program, tmp_path, "-O0", "-fsanitize=address,undefined"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_has_no_race(program: str, tmp_path: Path) -> None:
    done = run(build(program, tmp_path, "-O1", "-fsanitize=thread"))
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert "WARNING: ThreadSanitizer" not in done.stderr


@pytest.mark.parametrize("program", BARRIERS)
def test_a_missing_barrier_is_reported(program: str, tmp_path: Path) -> None:
    done = run(build(program, tmp_path, "-O1", "-fsanitize=thread", "-DEMU_WITHOUT_BARRIER"))
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "cuda_kernels.h" in done.stderr
