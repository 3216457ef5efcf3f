"""From source to library: made once, found again, remade when anything it hangs on changes."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import ctorch
from ctorch.codegen import build, cache

ROOT = Path(__file__).resolve().parents[2]


def source(number: int) -> str:
    return f'extern "C" int number() {{ return {number}; }}\n'


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were compiled."""
    seen: list[str] = []
    compile = build._compile

    def counted(text: str, key: str) -> ctypes.CDLL:
        seen.append(text)
        return compile(text, key)

    monkeypatch.setattr(build, "_compile", counted)
    return seen


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(build, "_loaded", {})


def test_a_library_is_compiled_once(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.load(source(1)).number() == 1
    assert build.load(source(1)).number() == 1
    forget(monkeypatch)
    assert build.load(source(1)).number() == 1
    assert len(calls) == 1
    assert build.load(source(2)).number() == 2
    assert len(calls) == 2


def test_a_cached_library_loads_within_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    build.load(source(1))
    forget(monkeypatch)
    begun = time.thread_time()
    build.load(source(1))
    assert time.thread_time() - begun < 0.02


def test_a_damaged_library_is_made_again(
    calls: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.load(source(3))
    (path,) = own_cache.glob("*.so")
    path.unlink()  # what is loaded keeps its own
    path.write_bytes(b"\x7fELF not really")
    forget(monkeypatch)
    assert build.load(source(3)).number() == 3
    assert len(calls) == 2


def test_flags_compiler_processor_and_headers_make_another_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {build._key(source(1))}
    monkeypatch.setenv("CTORCH_NATIVE_FLAGS", "-O1")
    keys.add(build._key(source(1)))
    for name in ("_compiler_identity", "_processor", "headers"):
        monkeypatch.setattr(build, name, lambda *_, name=name: f"another {name}")
        keys.add(build._key(source(1)))
    assert len(keys) == 5


def test_no_compiler_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.NoCompiler, match=r"install g\+\+"):
        build.load(source(1))


@pytest.mark.parametrize("given", ["no-such-compiler", "no-such-launcher g++", "''"])
def test_a_compiler_that_is_not_there_is_named_and_no_other_taken(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("CXX", given)
    with pytest.raises(build.NoCompiler, match=re.escape(f"CXX={given} names none")):
        build.load(source(1))
    y0, t = torch.ones(2), torch.tensor([0.0, 1.0])
    with pytest.warns(UserWarning, match=re.escape(f"CXX={given} names none")):
        ctorch.solve_ode(lambda t, y: -y, y0, t, native="try")


def test_a_compiler_may_be_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launcher = tmp_path / "a launcher"
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.log"\nexec "$@"\n')
    launcher.chmod(0o755)
    before = build._key(source(4))
    monkeypatch.setenv("CXX", f"'{launcher}' g++ -DWORDS")
    assert build._key(source(4)) != before
    assert build.load(source(4)).number() == 4
    assert (tmp_path / "a launcher.log").read_text().splitlines()[:2] == ["g++", "-DWORDS"]
    monkeypatch.setenv("CXX", str(launcher))  # a path with a space, as it is
    assert build.compiler() == [str(launcher)]
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(build.CompileError, match=r"CXX=g\+\+ ' cannot be read"):
        build.load(source(5))


def test_a_compiler_that_fails_is_quoted(own_cache: Path) -> None:
    with pytest.raises(build.CompileError, match="nonsense"):
        build.load("int nonsense(")
    assert not own_cache.exists()


def test_a_library_that_the_system_refuses_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: str) -> None:  # as from a folder mounted noexec
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    with pytest.raises(build.CompileError, match=r"failed to map.*noexec.*CTORCH_CACHE_DIR"):
        build.load(source(9))


def test_flags_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTORCH_NATIVE_FLAGS", "-O1 '")
    with pytest.raises(build.CompileError, match="CTORCH_NATIVE_FLAGS=-O1 ' cannot be read"):
        build.load(source(1))


def test_many_processes_at_once_share_one_library(own_cache: Path) -> None:
    text = f"from ctorch.codegen import build\nprint(build.load({source(7)!r}).number())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, env=environment)
        for _ in range(4)
    ]
    assert [run.communicate(timeout=120)[0] for run in runs] == [b"7\n"] * 4
    assert [path.suffix for path in own_cache.iterdir()] == [".so"]


def test_a_cache_that_is_cleared_at_any_moment_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    find, put, sweep = cache.find, cache.put, cache._sweep

    def cleared(result: Any) -> Any:
        cache.clear()
        return result

    for name, function in (("find", find), ("put", put)):
        build.load(source(11))
        forget(monkeypatch)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            patch.setattr(cache, name, lambda *a, function=function: cleared(function(*a)))
            assert build.load(source(11 + (name == "put"))).number() == 11 + (name == "put")
    forget(monkeypatch)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(cache, "_sweep", lambda place: (sweep(place), place.rmdir()))
        cache.clear()
        assert build.load(source(13)).number() == 13
    assert [path.name for path in own_cache.iterdir()] != []
    (own_cache / ".being-written").touch()
    cache.clear()
    assert [path.name for path in own_cache.iterdir()] == [".being-written"]


def test_a_killed_build_hangs_nobody(own_cache: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow-compiler"
    slow.write_text("#!/bin/sh\nsleep 8\n")
    slow.chmod(0o755)
    text = f"from ctorch.codegen import build\nbuild.load({source(8)!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CXX": str(slow)}
    run = subprocess.Popen([sys.executable, "-c", text], env=environment, start_new_session=True)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=3)
    os.killpg(run.pid, 9)
    run.wait()
    assert build.load(source(8)).number() == 8
    assert cache.contents().libraries == 1
    assert len(list(own_cache.iterdir())) == 1


@pytest.mark.parametrize("heeded", [False, True])
def test_the_terminal_s_interrupt_is_the_program_s_to_heed(
    own_cache: Path, tmp_path: Path, heeded: bool
) -> None:
    started, slow = tmp_path / "started", tmp_path / "slow-compiler"
    slow.write_text(f'#!/bin/sh\necho $$ > {started}\nsleep {8 if heeded else 1}\nexec g++ "$@"\n')
    slow.chmod(0o755)
    text = "import signal\nfrom ctorch.codegen import build\n"
    text += "" if heeded else "signal.signal(signal.SIGINT, lambda *_: None)\n"
    text += f"print(build.load({source(9)!r}).number())"
    run = subprocess.Popen(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CXX": str(slow)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (started.exists() and started.read_text().strip()):
        assert run.poll() is None
        time.sleep(0.02)
    begun = time.monotonic()
    os.killpg(run.pid, signal.SIGINT)
    output, errors = run.communicate()
    if heeded:
        assert "KeyboardInterrupt" in errors
        assert time.monotonic() - begun < 6
        state = Path(f"/proc/{started.read_text().strip()}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    else:
        assert output == "9\n", errors


def test_the_headers_are_those_of_the_tree_or_of_the_package() -> None:
    assert (build.include_folder() / "native/solver.h").is_file()
    assert (build.include_folder() / "jet/vector_math.h").is_file()
