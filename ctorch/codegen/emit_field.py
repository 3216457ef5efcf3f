"""The C++ type that stands for a vector field."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ctorch.codegen.emit import Body, Output
from ctorch.codegen.graph import Graph, Ids

_EVAL = """  template <class V>
  CT_BOTH static void eval([[maybe_unused]] V t, [[maybe_unused]] const V* y,
                           [[maybe_unused]] const V* own,
                           [[maybe_unused]] const real* const* shared,
                           [[maybe_unused]] V* work, V* dy) {"""
# Sums: where numbers are added up, as `real*`
_VJP = """  template <class V, class Sums>
  CT_BOTH static void vjp([[maybe_unused]] V t, [[maybe_unused]] const V* y,
                          [[maybe_unused]] const V* own,
                          [[maybe_unused]] const real* const* shared, [[maybe_unused]] V* work,
                          [[maybe_unused]] const V* ct, V& ct_t, V* ct_y,
                          [[maybe_unused]] V* ct_own, [[maybe_unused]] const Sums* ct_shared) {"""


def field_source(
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    forward: tuple[Graph, Ids],
    backward: tuple[Graph, Ids, Ids, Ids, Sequence[Ids | None]] | None,
) -> str:
    """``struct Field`` in C++.

    Args:
        dtype: of its numbers.
        sizes: numbers of the state, numbers that samples have for themselves, shared arrays.
        forward: the graph of the slope, and the slope [dim].
        backward: the graph of its derivative, and the cotangents of t [1], y [dim], own [own] and
            the shared arrays [numbers], None for those without; None where there is no derivative.
    """
    graph, slope = forward
    body = Body(graph, [Output("dy", slope)], "eval")
    parts = [
        # of a class with a name for the linker, tables would be those of the first library loaded
        "namespace {",
        "struct Field {",
        f"  using real = {'float' if dtype == torch.float32 else 'double'};",
        f"  static constexpr long dim = {sizes[0]};",
        f"  static constexpr long own = {sizes[1]};",
        f"  static constexpr long shared = {sizes[2]};",
        f"  static constexpr long work = {body.work};",
    ]
    functions = [_EVAL, *_indented([*body.tables, *body.lines]), "  }"]
    if backward is not None:
        graph, ct_t, ct_y, ct_own, ct_shared = backward
        outputs = [Output("time", ct_t), Output("ct_y", ct_y), Output("ct_own", ct_own, "add")]
        outputs += [
            Output(f"ct_shared[{k}]", ids, "sum")
            for k, ids in enumerate(ct_shared)
            if ids is not None
        ]
        body = Body(graph, [output for output in outputs if output.ids.size], "vjp")
        parts.append(f"  static constexpr long vjp_work = {body.work};")
        lines = ["V* const time = &ct_t;", *body.tables, *body.lines]
        functions += [_VJP, *_indented(lines), "  }"]
    return "\n".join([*parts, *functions, "};", "}  // namespace"]) + "\n"


def _indented(lines: Sequence[str]) -> list[str]:
    out, depth = [], 2
    for line in ["using namespace ct::native;", *lines]:
        depth -= line.startswith("}")
        out.append("  " * depth + line)
        depth += line.endswith("{")
    return out
