"""Installing, importing and asking for help work, also where something is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import ctorch
from ctorch._extras import EXTRAS, cure, require

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "from ctorch.ops import _kernels; _kernels.load()\n"


def run(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, where ``ctorch`` is the one in ``cwd``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("CTORCH_")}
    env |= {"PYTHONPATH": str(cwd)} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def bare_copy(tmp_path: Path) -> Path:
    """A copy of the package as it is before a build."""
    built = shutil.ignore_patterns("_C.abi3.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "ctorch", tmp_path / "ctorch", ignore=built)
    return tmp_path


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``build_support/extension.py``."""
    monkeypatch.syspath_prepend(str(ROOT / "build_support"))
    import extension  # type: ignore[import-not-found]

    return extension


def test_import_loads_no_extra() -> None:
    extras = [package for packages in EXTRAS.values() for package in packages]
    done = run(f"import sys, ctorch; print([m for m in {extras} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_version_is_stated_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", ctorch.__version__)
    assert ctorch.__version__ not in (ROOT / "pyproject.toml").read_text()
    try:
        installed = metadata.version("ctorch")
    except metadata.PackageNotFoundError:
        pytest.skip("ctorch is on the path but not installed")
    assert installed == ctorch.__version__


def test_extras_named_in_messages_are_those_of_pyproject() -> None:
    tomllib = pytest.importorskip("tomllib")
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = stated["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert {re.split(r"[<>=]", line)[0] for line in optional[extra]} == set(packages)
    assert optional["dev"][0] == f"ctorch[{','.join([*EXTRAS, 'docs'])}]"
    assert {re.split(r"[<>=]", line)[0] for line in stated["dependencies"]} == {"torch", "numpy"}


def test_a_missing_extra_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "ctorch\[demo\]"') as caught:
        require("matplotlib.pyplot")
    assert caught.value.name == "matplotlib"


def test_what_an_installed_extra_lacks_is_not_blamed_on_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyscf.py").write_text("import something_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pyscf", raising=False)
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_there"):
        require("pyscf")


def test_the_command_line_without_typer_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['typer'] = None; from ctorch.cli import main; main()"
    done = run(code)
    assert done.returncode == 1
    assert cure("typer") in done.stderr
    assert "Traceback" not in done.stderr
    both = "for x in ['info'], ['info', '--cache']:\n  print('====')\n  sys.argv[1:] = x\n  main()"
    done = run(f"{code.removesuffix('; main()')}\n{both}")
    assert done.returncode == 0, done.stderr
    info, cache = done.stdout.split("====")[1:]
    assert "kernels" in info
    assert "compiled solves" in cache


def test_every_command_is_a_documented_function_of_its_file() -> None:
    from ctorch import cli

    assert "info" in cli.commands()
    application = cli.app()
    assert [command.name for command in application.registered_commands] == cli.commands()
    assert all(
        (command.callback.__doc__ or "").strip() for command in application.registered_commands
    )


def test_python_m_ctorch_is_the_command_line() -> None:
    command = [sys.executable, "-m", "ctorch", "info"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"ctorch   {ctorch.__version__}" in done.stdout


def test_kernels_are_loaded_where_they_were_built() -> None:
    if not (ROOT / "ctorch/_C.abi3.so").exists():
        pytest.skip("no kernels were built in this tree")
    done = run(KERNELS + "print(_kernels.HAS_KERNELS, repr(_kernels.reason()))")
    assert done.stdout.strip() == "True ''", done.stdout + done.stderr


def test_kernels_can_be_left_out_without_a_warning() -> None:
    done = run(KERNELS + "print(_kernels.HAS_KERNELS, _kernels.reason())", CTORCH_KERNELS="0")
    assert done.stdout.startswith("False CTORCH_KERNELS=0 is set"), done.stdout + done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("note", "why", "remedy"),
    [
        (None, "never built", "pip install -e . --no-build-isolation"),
        (
            {"reason": "no C++ compiler (g++ or clang++) was found"},
            "no C++ compiler",
            "install g++",
        ),
        ({"reason": "g++ failed with exit status 1"}, "exit status 1", "CTORCH_EXT=1 pip install"),
    ],
)
def test_missing_kernels_warn_once_and_info_names_the_cure(
    bare_copy: Path, note: dict[str, str] | None, why: str, remedy: str
) -> None:
    if note is not None:
        (bare_copy / "ctorch/_build.json").write_text(json.dumps(note))
    done = run(
        KERNELS + "_kernels.load()\nfrom ctorch.cli.info import report; print(report())", bare_copy
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1
    for text in (done.stdout, done.stderr):
        assert why in text
        assert remedy in text


def test_a_library_that_does_not_load_is_told_from_one_that_is_missing(bare_copy: Path) -> None:
    (bare_copy / "ctorch/_C.abi3.so").write_bytes(b"not a library")
    done = run(KERNELS + "print(_kernels.reason())", bare_copy)
    assert "does not load under torch" in done.stdout
    assert "rebuild it" in done.stdout


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of all that a build needs, with a library left by an earlier one."""
    tree = tmp_path / "tree"
    for name in ("ctorch", "csrc", "build_support"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "README.md").touch()
    (tree / "ctorch/_C.abi3.so").write_bytes(b"left by an earlier build")
    return tree


def build(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import runpy, sys; sys.argv[1:] = {list(command)}; runpy.run_path('setup.py')"
    return run(code, tree, **environment)


@pytest.mark.parametrize("wish", ["auto", "1"])
def test_without_a_compiler_the_build_goes_on_only_if_it_may(
    sources: Path, tmp_path: Path, wish: str
) -> None:
    tree = sources
    bare = {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    done = build(tree, "build_ext", "--inplace", CTORCH_EXT=wish, **bare)
    assert (done.returncode == 0) == (wish == "auto"), done.stderr
    assert "*** ctorch: " in done.stderr
    assert "no C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tree / "ctorch/_C.abi3.so").exists()
    if wish == "auto":
        assert "no C++ compiler" in json.loads((tree / "ctorch/_build.json").read_text())["reason"]


def test_an_install_serves_the_source_tree_too(sources: Path) -> None:
    """``pip install . && python -m ctorch demo`` in the source folder runs the tree's package."""
    done = build(sources, "build_ext", "--build-lib", "elsewhere", CTORCH_EXT="0")
    assert done.returncode == 0, done.stderr
    notes = [sources / place / "ctorch/_build.json" for place in ("elsewhere", ".")]
    assert [json.loads(note.read_text())["reason"][:12] for note in notes] == ["CTORCH_EXT=0"] * 2
    assert not (sources / "ctorch/_C.abi3.so").exists()


@pytest.mark.parametrize("installed", [True, False])
def test_the_build_asks_for_torch_only_where_there_is_none(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    import backend  # type: ignore[import-not-found]

    monkeypatch.delenv("CTORCH_EXT", raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(backend, "find_torch", lambda: Path("torch") if installed else None)
    monkeypatch.setattr(backend, "find_compiler", lambda: ["g++"])
    assert (backend.TORCH in backend._torch()) != installed
    monkeypatch.setattr(backend, "find_compiler", lambda: None)
    assert backend._torch() == []


def test_cxx_is_the_compiler_or_none_is(tools: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sh = shutil.which("sh")
    for given, found in {
        "sh": [sh], "sh -O1 'a b'": [sh, "-O1", "a b"], "no-such-compiler": None, "sh '": None,
        "no-such-launcher sh": None, "''": None,
    }.items():  # fmt: skip
        monkeypatch.setenv("CXX", given)
        assert tools.toolchain.find_compiler() == found, given
    with pytest.raises(tools.CannotBuild, match=r"no C\+\+ compiler was found: CXX='' names no"):
        tools.find_tools()
    launched = tools.Tools(Path("torch"), ["/bin/ccache", "/bin/g++", "-O1"], "nvcc", archs=["80"])
    assert tools.cxx_command(launched)[:3] == launched.compiler
    command = tools.nvcc_command(launched)
    assert command[command.index("-ccbin") + 1] == "/bin/g++"


def test_flags_keep_floating_point_and_portability(tools: ModuleType) -> None:
    found = tools.Tools(
        Path("torch"), ["g++"], "nvcc", archs=["80", "90"], sanitizers=[], strict=True
    )
    commands = [tools.cxx_command(found), tools.nvcc_command(found)]
    commands.append(tools.link_command(found, ["a.o"], Path("x.so"), cuda=True))
    words = " ".join(word for command in commands for word in command)
    for flag in ("-ffast-math", "-Ofast", "-march=native", "--use_fast_math", "-funsafe-math"):
        assert flag not in words
    for flag in ("code=sm_80", "code=sm_90", "code=compute_90", "--no-as-needed", "-Werror"):
        assert flag in words


def test_putting_a_file_leaves_no_half_of_it(tools: ModuleType, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("old")
    new.write_text("new")
    with old.open() as still_open:  # as a process that has the library loaded
        tools.put(new, old)
        assert still_open.read() == "old"
    assert old.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]
