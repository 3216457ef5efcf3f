"""The C++ source of a whole solve: a vector field of one sample, a tableau, the solver template."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from ctorch.ode.coefficients import coefficients


@dataclasses.dataclass(frozen=True)
class Form:
    """What a compiled solve is made for; everything else is an argument of it.

    Attributes:
        method, interpolant: as for ``coefficients``.
        entry: the function of csrc/native/solver.h that makes the steps.
        registers: how many the samples may fill side by side; 0: one sample by itself.
        segments: lengths of the parts of a sample whose norms are taken apart.
        pairs: numbers of the state are pairs, complex numbers.
        max_norm: a part's norm is its maximum, not its root mean square.
        tolerances: they are arrays, not numbers.
        gradient: its gradient is compiled too.
        device: "cpu", or the GPU that it is compiled for.
        events: ``struct Events``, where steps are looked at ("solve_observed").
        norm: ``struct Norm``, where the norm of errors is the user's own.
    """

    method: str
    interpolant: str
    entry: str
    registers: int
    segments: tuple[int, ...]
    pairs: bool = False
    max_norm: bool = False
    tolerances: bool = False
    gradient: bool = False
    device: str = "cpu"
    events: str = ""
    norm: str = ""


def solve_source(field: str, form: Form) -> str:
    """The translation unit for ``field``, the source of a ``struct Field``."""
    width = f"ct::native::kSamples<Field, {form.registers}>" if form.registers else "1"
    # the gradient sums over lanes, which is made for those of few registers
    back = f"ct::native::kSamplesBack<Field, {form.registers}>" if form.registers else "1"
    types = "Field, Method, Events" if form.events else "Field, Method"
    entries = f"""extern "C" int64_t ct_solve(const ct::native::Task* task) {{
  return ct::native::{form.entry}<{types}, {width}>(*task);
}}
extern "C" void ct_eval(int64_t batch, const double* t, const void* y, const void* own,
                        const void* const* shared, void* dy) {{
  const ct::native::Owned<ct::native::Evaluation<Field, {width}>> evaluation;
  for (int64_t base = 0; base < batch; base += {width})
    evaluation->run(base, batch, t, y, own, shared, dy);
}}
"""
    if form.gradient:
        entries += f"""extern "C" void* ct_tape() {{ return new ct::native::Tape<Field::real>; }}
extern "C" void ct_free(void* tape) {{ delete static_cast<ct::native::Tape<Field::real>*>(tape); }}
extern "C" void ct_pull_back(const ct::native::Task* task, const ct::native::Cotangents* given) {{
  ct::native::pull_back_rows<Field, Method, {back}>(*task, *given);
}}
extern "C" void ct_stand_still(const ct::native::Task* task) {{
  ct::native::stand_still<Field>(*task);
}}
"""
    if form.events:
        entries += OBSERVED_ENTRIES
    if form.norm:
        entries += NORM_ENTRY
    headers = ["solver", *["adjoint"] * form.gradient, *["observed"] * bool(form.events)]
    includes = [f'#include "native/{name}.h"' for name in headers]
    structs = ["namespace {", field, form.norm, method_source(form), form.events, "}  // namespace"]
    return "\n".join([*includes, *structs, entries])


def cuda_source(field: str, form: Form) -> str:
    """The kernels ``ct_solve`` and ``ct_eval`` for ``field``, for "solve_joint" ``ct_judge``, and
    where steps are looked at ``ct_pieces``.

    A thread takes a sample. Where the field has large matrices, the threads of a block multiply
    them together.
    """
    solve = _CUDA_JOINT if form.entry == "solve_joint" else _CUDA_SOLVE.format(entry=form.entry)
    entries = solve + _CUDA_EVAL + _CUDA_PIECES * bool(form.events)
    return _cuda_unit(field, form, multiplies_together(field), entries)


def cuda_gradient_source(field: str, form: Form, together: bool) -> str:
    """The kernels ``ct_pull_back`` and ``ct_add_up`` for ``field``.

    A thread takes a sample, and adds up the gradients of what samples share for itself;
    ``together`` the threads of a block do, and multiply large matrices together.
    """
    return _cuda_unit(field, form, together, _CUDA_GRADIENT)


def multiplies_together(field: str) -> bool:
    """Whether ``field`` has matrices that are large enough for the threads of a block together."""
    products = re.findall(r"\blinear<(\d+), (\d+)", field)
    return any(int(n) * int(k) >= _LARGE_PRODUCT for n, k in products)


def _cuda_unit(field: str, form: Form, together: bool, entries: str) -> str:
    # the steps keep nothing for the gradient but their states
    return f"""#define CT_CUDA
{"#define CT_TOGETHER" * together}
#include "native/cuda_kernels.h"
namespace {{
{field}
{method_source(dataclasses.replace(form, gradient=False))}
}}  // namespace
{entries}"""


#: kLeastProduct of csrc/native/cuda_linear.h
_LARGE_PRODUCT = 1024
_CUDA_SOLVE = """extern "C" __global__ void ct_solve(const ct::native::Task* task) {{
  ct::native::{entry}<Field, Method>(*task);
}}
"""
_CUDA_JOINT = """extern "C" __global__ void ct_solve(const ct::native::Task* task,
                                    ct::native::JointState* state, void* samples,
                                    double* partials) {
  ct::native::solve_joint<Field, Method>(
      *task, {state, static_cast<Field::real*>(samples), partials});
}
extern "C" __global__ void ct_judge(const ct::native::Task* task, ct::native::JointState* state,
                                    double* partials) {
  ct::native::judge_joint<Field, Method>(*task, {state, nullptr, partials});
}
"""
_CUDA_EVAL = """extern "C" __global__ void ct_eval(const int64_t* numbers, const double* t,
                                   const void* y, const void* own, void* dy) {
  const auto shared = reinterpret_cast<const void* const*>(numbers + 1);
  ct::native::evaluate_sample<Field>(numbers[0], t, y, own, shared, dy);
}
"""
_CUDA_PIECES = """extern "C" __global__ void ct_pieces(const ct::native::Task* task,
                                     const ct::native::CudaPieces* given) {
  ct::native::make_pieces<Field, Method>(*task, *given);
}
"""
_CUDA_GRADIENT = """extern "C" __global__ void ct_pull_back(const ct::native::Task* task,
                                        const ct::native::CudaCotangents* given) {
  ct::native::pull_back_samples<Field, Method>(*task, *given);
}
extern "C" __global__ void ct_add_up(const ct::native::CudaSums* sums) {
  ct::native::add_up<Field::real>(*sums);
}
"""


OBSERVED_ENTRIES = """extern "C" void ct_take(ct::native::Observation* asked, double* starts,
                        double* lengths, void* states, void* slopes) {
  ct::native::take_pieces<Field>(*asked, starts, lengths, states, slopes);
}
extern "C" void ct_events(double t, const void* y, const void* const* shared, void* values) {
  ct::native::evaluate_values<Events>(t, y, shared, values);
}
"""
NORM_ENTRY = """extern "C" void ct_norm(double t, const void* y, const void* const* shared,
                        void* value) {
  ct::native::evaluate_values<Norm>(t, y, shared, value);
}
"""


def method_source(form: Form) -> str:
    """``struct Method``: the tableau's constants."""
    method = coefficients(form.method, form.interpolant)
    n, total = method.n, method.total
    assert method.p is not None
    rows = [[*row.tolist(), *[0.0] * (total - len(row))] for row in method.a]
    error = [] if method.e is None else method.e.tolist()
    ends = [sum(form.segments[:i]) for i in range(len(form.segments) + 1)]
    constants = [
        f"int stages = {n}, total = {total}, degree = {method.p.shape[1]}",
        f"bool fsal = {_bool(method.fsal)}, late = {_bool(method.late)}",
        f"double order = {method.tableau.error_order}",
        f"double c[] = {_row(method.c)}",
        f"double a[][{total}] = {_rows(rows)}",
        f"double b[] = {_row(method.b.tolist())}",
        f"double e[] = {_row([*error, *[0.0] * (n - len(error))])}",
        f"double p[][{method.p.shape[1]}] = {_rows(method.p.tolist())}",
        f"int segments = {len(form.segments)}",
        f"long segment[] = {{{', '.join(map(str, ends))}}}",
        f"bool maximum = {_bool(form.max_norm)}, tolerances = {_bool(form.tolerances)}",
        f"bool pairs = {_bool(form.pairs)}",
        f"bool gradient = {_bool(form.gradient)}",
    ]
    lines = [f"  static constexpr {constant};" for constant in constants]
    lines.append(f"  using Norm = {'::Norm' if form.norm else 'ct::native::NoValues'};")
    return "\n".join([f"struct Method {{  // {form.method}", *lines, "};"])


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _row(values: Sequence[float]) -> str:
    assert all(map(math.isfinite, values))
    return "{" + ", ".join(float(x).hex() for x in values) + "}"


def _rows(rows: Sequence[Sequence[float]]) -> str:
    return "{" + ", ".join(map(_row, rows)) + "}"
