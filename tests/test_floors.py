"""The house stands as drawn: imports point down the floors, kernels have their twins."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"_", "ops"},  # "_": the private modules at the root of the package
    {"codegen", "autodiff"},
    {"ode", "estimators"},
    {"sde", "nn"},
    {"flows", "latent", "qmc", "testing", "training"},
    {"compat", "cli", "demo"},
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
TOP = len(FLOORS) - 1


def part_of(module: list[str]) -> str:
    """The part that a module below ``ctorch`` belongs to."""
    return "_" if module[0].startswith("_") else module[0]


def imported(source: str, package: list[str]) -> Iterator[list[str]]:
    """The dotted names that a module in that package imports, wherever in its text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from ([*base, alias.name] for alias in node.names)


def objection(importer: str, name: list[str]) -> str | None:
    """Why a part may not import that name; None where it may."""
    if name[0] != "ctorch" or FLOOR_OF[importer] == TOP:
        return None
    part = part_of(name[1:]) if len(name) > 1 else ""
    if part not in FLOOR_OF:
        return "the package's own names"
    if part == importer or FLOOR_OF[part] < FLOOR_OF[importer] or (importer, part) == ("ops", "_"):
        return None
    return "a sibling" if FLOOR_OF[part] == FLOOR_OF[importer] else "a higher floor"


def modules() -> list[Path]:
    doors = {ROOT / "ctorch/__init__.py", ROOT / "ctorch/__main__.py"}
    return [path for path in sorted((ROOT / "ctorch").rglob("*.py")) if path not in doors]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_the_floors(path: Path) -> None:
    place = path.relative_to(ROOT).with_suffix("").parts
    part = part_of(list(place[1:]))
    assert part in FLOOR_OF, f"ctorch/{place[1]} stands on no floor: add it to docs/design.md"
    for name in imported(path.read_text(), list(place[:-1])):
        why = objection(part, name)
        assert why is None, f"{'.'.join(place)} imports {'.'.join(name)}: {why}"


@pytest.mark.parametrize(
    ("module", "statement", "why"),
    [
        ("ode/solve.py", "import ctorch.flows", "a higher floor"),
        ("ode/solve.py", "from ctorch import flows", "a higher floor"),
        ("ode/solve.py", "from ..nn.blocks import Block", "a higher floor"),
        ("ode/solve.py", "def f():\n    from ctorch.estimators import elbo", "a sibling"),
        ("ode/solve.py", "from ctorch import odeint", "the package's own names"),
        ("ode/solve.py", "import ctorch", "the package's own names"),
        ("_helpers.py", "from ctorch.ops import combine", "a sibling"),
        ("ode/solve.py", "from . import tableaus", None),
        ("ode/solve.py", "from ctorch.ops._kernels import load", None),
        ("ops/combine.py", "from ctorch._exceptions import SolveError", None),
        ("cli/demo.py", "import ctorch", None),
    ],
)
def test_the_rule_itself(module: str, statement: str, why: str | None) -> None:
    place = ["ctorch", *module.removesuffix(".py").split("/")]
    found = [objection(part_of(place[1:]), name) for name in imported(statement, place[:-1])]
    assert found == [why]


def kernel_families() -> list[str]:
    folders = (path for path in (ROOT / "csrc").iterdir() if path.is_dir())
    return sorted(path.name for path in folders if path.name not in ("core", "native"))


@pytest.mark.parametrize("family", kernel_families())
def test_every_kernel_family_has_its_twins(family: str) -> None:
    for twin in (f"ctorch/ops/{family}.py", f"tests/ops/test_{family}.py"):
        assert (ROOT / twin).is_file(), f"csrc/{family} has no {twin}"
    # on CUDA, mlp's operators are a few full-batch products, for which torch's own are the kernels
    sources = ("arith.h", "cpu.cpp") if family == "mlp" else ("arith.h", "cpu.cpp", "cuda.cu")
    for source in sources:
        assert (ROOT / "csrc" / family / source).is_file(), f"csrc/{family} has no {source}"


PYTHON = ("module.cpp", "again.cpp", "again.h")  # of csrc/core: the module that Python imports


def test_kernels_know_nothing_of_python() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.name not in PYTHON]
    assert sources
    for path in sources:
        assert "Python.h" not in path.read_text(), path
