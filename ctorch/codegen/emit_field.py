"""The C++ type that stands for a vector field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ctorch.codegen.emit import Body
from ctorch.codegen.emit_arrays import Output, Shared
from ctorch.codegen.emit_record import split
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
# The same in two parts: with the slope what the second part needs of it, and the rest.
_RECORD = """  template <class V>
  static void record([[maybe_unused]] V t, [[maybe_unused]] const V* y,
                     [[maybe_unused]] const V* own, [[maybe_unused]] const real* const* shared,
                     [[maybe_unused]] V* work, V* kept, V* dy) {"""
_PULL = """  template <class V>
  static void pull([[maybe_unused]] V t, [[maybe_unused]] const V* y, [[maybe_unused]] const V* own,
                   [[maybe_unused]] const real* const* shared, [[maybe_unused]] V* work,
                   const V* kept, [[maybe_unused]] const V* ct, V& ct_t, V* ct_y,
                   [[maybe_unused]] V* ct_own, [[maybe_unused]] real* const* ct_shared) {"""


@dataclass
class Derivative:
    """What a vector-Jacobian product computes.

    Attributes:
        graph: of slope and derivative.
        slope: [dim].
        ct_t, ct_y, ct_own: cotangents [1], [dim], [own].
        ct_shared: of the shared arrays, [numbers] each; None for those without.
    """

    graph: Graph
    slope: Ids
    ct_t: Ids
    ct_y: Ids
    ct_own: Ids
    ct_shared: Sequence[Ids | None]

    def outputs(self) -> list[Output]:
        """Where the cotangents go."""
        outputs = [
            Output("time", self.ct_t),
            Output("ct_y", self.ct_y),
            Output("ct_own", self.ct_own, "add"),
        ]
        outputs += [
            Output(f"ct_shared[{k}]", ids, "sum", array=k)
            for k, ids in enumerate(self.ct_shared)
            if ids is not None
        ]
        return [output for output in outputs if output.ids.size]


def field_source(
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    forward: tuple[Graph, Ids],
    backward: Derivative | None,
) -> str:
    """``struct Field`` in C++.

    Args:
        dtype: of its numbers.
        sizes: numbers of the state, numbers that samples have for themselves, shared arrays.
        forward: the graph of the slope, and the slope [dim].
        backward: its derivative; None where there is none.
    """
    graph, slope = forward
    shared = Shared(sizes[2])
    body = Body(graph, [Output("dy", slope)], "eval", shared)
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
        body = Body(backward.graph, backward.outputs(), "vjp", shared)
        parts.append(f"  static constexpr long vjp_work = {body.work};")
        functions += _pulling(_VJP, body)
        parted = None if body.plan.straight else split(backward.graph, backward.outputs())
        if parted is not None:
            kept, rest = parted
            slopes = [Output("dy", backward.slope), Output("kept", kept)]
            record = Body(backward.graph, slopes, "record", shared)
            pull = Body(rest, backward.outputs(), "pull", shared)
            parts += [
                f"  static constexpr long kept = {kept.size};",
                f"  static constexpr long record_work = {record.work}, pull_work = {pull.work};",
            ]
            functions += [_RECORD, *_indented([*record.tables, *record.lines]), "  }"]
            functions += _pulling(_PULL, pull)
    parts.append(f"  using Matrices = {shared.matrices.text};")
    parts.append(f"  using Products = {shared.products.text};")
    return "\n".join([*parts, *functions, "};", "}  // namespace"]) + "\n"


def _pulling(head: str, body: Body) -> list[str]:
    return [head, *_indented(["V* const time = &ct_t;", *body.tables, *body.lines]), "  }"]


def _indented(lines: Sequence[str]) -> list[str]:
    out, depth = [], 2
    for line in ["using namespace ct::native;", *lines]:
        depth -= line.startswith("}")
        out.append("  " * depth + line)
        depth += line.endswith("{")
    return out
