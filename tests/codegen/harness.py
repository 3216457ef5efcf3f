"""Generated fields, compiled as they are and called on batches."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ctorch.codegen import build

from ..precompiled import included

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(tempfile.gettempdir()) / "ctorch-codegen-tests"

HEADERS = """#include <limits>
#include <vector>
#include "native/linear.h"
#include "native/math.h"
#include "native/pending.h"
#include "native/sweep.h"
"""
COMMAND = ["g++", "-std=c++20", "-Og", "-march=native", "-shared", "-fPIC", "-fno-math-errno"]
COMMAND.append(f"-I{ROOT / 'csrc'}")

ENTRIES = """
%s
using real = Field::real;
using V = ct::native::Lanes<real, %d>;
constexpr int W = ct::native::kWidth<V>;
static void gather(const real* from, long n, long first, long count, V* to) {
  for (long i = 0; i < n; ++i)
    for (int l = 0; l < W; ++l)
      ct::native::set(to[i], l, from[(first + (l < count ? l : 0)) * n + i]);
}
static void scatter(const V* from, long n, long first, long count, real* to) {
  for (long i = 0; i < n; ++i)
    for (int l = 0; l < count; ++l) to[(first + l) * n + i] = ct::native::get(from[i], l);
}
template <class T> static T* aligned(std::vector<char>& bytes, long n) {
  bytes.resize((n + 2) * sizeof(T) + 64);
  return reinterpret_cast<T*>((reinterpret_cast<size_t>(bytes.data()) + 63) / 64 * 64);
}
extern "C" void run_eval(long n, const real* t, const real* y, const real* own,
                         const real* const* shared, real* dy) {
  std::vector<char> b[4];
  V *vy = aligned<V>(b[0], Field::dim), *vo = aligned<V>(b[1], Field::own),
    *w = aligned<V>(b[2], Field::work), *vd = aligned<V>(b[3], Field::dim);
  ct::native::Arrays<Field, W> arrays;
  arrays.attach(reinterpret_cast<const void* const*>(shared));
  for (long i = 0; i < n; i += W) {
    const long count = n - i < W ? n - i : W;
    V vt;
    gather(t, 1, i, count, &vt), gather(y, Field::dim, i, count, vy);
    gather(own, Field::own, i, count, vo);
    Field::eval<V>(vt, vy, vo, arrays.all, w, vd);
    scatter(vd, Field::dim, i, count, dy);
  }
}
#ifdef WITH_VJP
// in_parts: slope and what the derivative needs of it first, then the rest; dy = the slope
template <class F> constexpr bool kParts = requires { F::kept; };
template <bool in_parts, class F = Field>
static void vjp_of(V t, const V* y, const V* own, const real* const* shared, V* work, V* dy,
                   const V* ct, V& ct_t, V* ct_y, V* ct_own, real* const* ct_shared) {
  if constexpr (in_parts) {
    std::vector<char> b[3];
    V *kept = aligned<V>(b[0], F::kept), *first = aligned<V>(b[1], F::record_work),
      *second = aligned<V>(b[2], F::pull_work);
    F::template record<V>(t, y, own, shared, first, kept, dy);
    F::template pull<V>(t, y, own, shared, second, kept, ct, ct_t, ct_y, ct_own, ct_shared);
  } else {
    Field::eval<V>(t, y, own, shared, work, dy);
    Field::vjp<V>(t, y, own, shared, work, ct, ct_t, ct_y, ct_own, ct_shared);
  }
}
extern "C" void run_vjp(long in_parts, long n, const real* t, const real* y, const real* own,
                        const real* const* shared, const real* ct, real* dy, real* ct_t,
                        real* ct_y, real* ct_own, real* const* ct_shared) {
  std::vector<char> b[7];
  V *vy = aligned<V>(b[0], Field::dim), *vo = aligned<V>(b[1], Field::own),
    *w = aligned<V>(b[2], Field::vjp_work + Field::work), *vd = aligned<V>(b[6], Field::dim),
    *vc = aligned<V>(b[3], Field::dim),
    *gy = aligned<V>(b[4], Field::dim), *go = aligned<V>(b[5], Field::own);
  ct::native::Arrays<Field, W> arrays;
  arrays.attach(reinterpret_cast<const void* const*>(shared));
  ct::native::Gradients<Field, W> gradients;
  gradients.attach(ct_shared);
  for (long i = 0; i < n; i += W) {
    const long count = n - i < W ? n - i : W;
    V vt, gt;
    gather(t, 1, i, count, &vt), gather(y, Field::dim, i, count, vy);
    gather(own, Field::own, i, count, vo), gather(ct, Field::dim, i, count, vc);
    for (long k = 0; k < Field::dim; ++k)
      for (int l = count; l < W; ++l) ct::native::set(vc[k], l, real(0));
    for (long k = 0; k < Field::own; ++k) go[k] = V{};
    if (in_parts)
      vjp_of<kParts<Field>>(vt, vy, vo, arrays.all, w, vd, vc, gt, gy, go, gradients.all);
    else vjp_of<false>(vt, vy, vo, arrays.all, w, vd, vc, gt, gy, go, gradients.all);
    scatter(vd, Field::dim, i, count, dy);
    scatter(&gt, 1, i, count, ct_t), scatter(gy, Field::dim, i, count, ct_y);
    scatter(go, Field::own, i, count, ct_own);
  }
  gradients.flush();
}
#endif
"""


@functools.cache
def _headers() -> tempfile.TemporaryDirectory[str]:
    """For those of this process: they are large, and change."""
    return tempfile.TemporaryDirectory(prefix="ctorch-headers-")


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * max(len(tensors), 1))(*(x.data_ptr() for x in tensors))


class Compiled:
    """A field that can be called.

    Args:
        source: ``struct Field``.
        width: samples side by side.
    """

    def __init__(self, source: str, width: int = 4) -> None:
        self.with_vjp = "void vjp(" in source
        self.in_parts = "void pull(" in source
        text = "#define WITH_VJP\n" * self.with_vjp + ENTRIES % (source, width)
        parts = [*COMMAND, HEADERS, text, build.headers()]
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        FOLDER.mkdir(exist_ok=True)
        library = FOLDER / f"{name}.so"
        if not library.exists():
            path = FOLDER / f"{name}.cpp"
            path.write_text(text)
            built = FOLDER / f"{name}.tmp"
            headers = included(Path(_headers().name), HEADERS, COMMAND)
            done = subprocess.run(
                [*COMMAND, *headers, str(path), "-o", str(built)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[:3000] + source
            built.rename(library)
        self._library = ctypes.CDLL(str(library))

    def eval(self, t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
        """[B], [B, dim], [B, own] -> [B, dim]."""
        t, y, own = (x.detach().contiguous() for x in (t, y, own))
        shared = [x.detach().contiguous() for x in shared]
        dy = torch.full_like(y, float("nan"))
        arrays = [ctypes.c_void_p(x.data_ptr()) for x in (t, y, own)]
        self._library.run_eval(
            ctypes.c_long(len(y)), *arrays, _pointers(shared), ctypes.c_void_p(dy.data_ptr())
        )
        return dy

    def vjp(
        self,
        t: Tensor,
        y: Tensor,
        own: Tensor,
        shared: list[Tensor],
        ct: Tensor,
        *,
        in_parts: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """The slope, and cotangents of t [B], y [B, dim], own [B, own] and the shared arrays."""
        t, y, own, ct = (x.detach().contiguous() for x in (t, y, own, ct))
        shared = [x.detach().contiguous() for x in shared]
        out = [torch.full_like(x, float("nan")) for x in (y, t, y, own)]
        by_shared = [torch.zeros_like(x) for x in shared]
        arrays = [ctypes.c_void_p(x.data_ptr()) for x in (t, y, own)]
        self._library.run_vjp(
            ctypes.c_long(in_parts),
            ctypes.c_long(len(y)),
            *arrays,
            _pointers(shared),
            ctypes.c_void_p(ct.data_ptr()),
            *(ctypes.c_void_p(x.data_ptr()) for x in out),
            _pointers(by_shared),
        )
        return out[0], out[1], out[2], out[3], by_shared

    def pull_back(
        self, t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor], ct: Tensor
    ) -> list[Tensor]:
        """The cotangents alone."""
        _, *rest, by_shared = self.vjp(t, y, own, shared, ct)
        return [*rest, *by_shared]
