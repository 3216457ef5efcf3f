"""The list of operators in the documentation is the list that is lowered.

``python -m tests.codegen.test_lower_operators`` writes it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ctorch.codegen import supported_operators

PAGE = Path(__file__).resolve().parents[2] / "docs" / "native_operators.md"

INTRODUCTION = """# Operators in native solves

A vector field that is compiled may use the operators of PyTorch that come down to the ATen
operators below, in any of their forms (in place, with `out`, as methods, functions or modules);
their derivatives are compiled as well. Views (`view`, `transpose`, `select`, `unbind`, ...) and
writes into views cost nothing: only what computes remains. Others that PyTorch can take apart
into these are taken apart.

Whatever is computed from constants alone is computed when the function is traced, by any operator.

Refused, by name and with the line that calls them: random numbers, `item()`, `numpy()` and branches
on the values of tensors, results whose shape depends on values, types other than the state's,
writing into tensors from outside, and operators that are not here. Complex numbers are computed
with as pairs of real ones, by the operators of the last list, views and movements.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for kind, names in supported_operators().items():
        parts.append(
            f"## {kind.capitalize()}\n\n" + ", ".join(f"`{name}`" for name in names) + "\n"
        )
    return "\n".join(parts)


def test_the_page_lists_what_is_lowered() -> None:
    assert PAGE.read_text() == page(), "python -m tests.codegen.test_lower_operators writes it"


def test_names_are_those_of_operators() -> None:
    for names in supported_operators().values():
        for name in names:
            assert hasattr(torch.ops.aten, name), name


if __name__ == "__main__":
    PAGE.write_text(page())
