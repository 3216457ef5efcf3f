"""Parts of csrc/native by themselves, at the widths that this processor's registers have."""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctorch.codegen import build
from ctorch.ode.events import bracketed_root

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

#: outputs and inputs of a matrix: whole registers of float32 and of float64 on any processor, less
#: than one, and remainders of rows, pairs of registers, registers
SIZES = [(1, 1), (3, 5), (8, 32), (17, 3), (9, 21), (13, 59), (300, 17)]
#: registers of samples side by side; 0: one sample, -1: less than a register holds
WIDTHS = [-1, 0, 1, 2]
PROGRAM = """
#include <sys/mman.h>
#include <memory>
static unsigned long advised[2];
static int noted(void* at, size_t bytes, int) {
  return advised[0] = reinterpret_cast<unsigned long>(at), advised[1] = bytes, 0;
}
#define madvise noted
#include "native/control.h"
#include "native/pending.h"
#include "native/roots.h"
#include "native/runs.h"
using namespace ct::native;

extern "C" void advise(void* array, long bytes, unsigned long* out) {
  advised[0] = advised[1] = 0;
  ask_for_large_pages(array, bytes);
  out[0] = advised[0], out[1] = advised[1];
}

extern "C" void* take(long bytes) { return spare_arrays.take(bytes); }
extern "C" void give(void* array, long bytes) { spare_arrays.give(array, bytes); }

extern "C" double root(double (*value)(double), double low, double high, double tolerance) {
  return bracketed_root(value, low, high, tolerance);
}

extern "C" long runs(long batch, long width, long threads, long* ends) {
  Tape<double> tape;
  Task task{};
  task.batch = batch, task.threads = threads, task.tape = &tape;
  open_runs<double>(task, static_cast<int>(width));
  for (const auto& run : tape.runs) *ends++ = run.begin, *ends++ = run.end;
  return tape.runs.size();
}

extern "C" void counted(long count, long threads, long* calls) {
  on_threads(count, threads, [&](int64_t i) { __atomic_fetch_add(calls + i, 1, 0); });
}

template <class T> long turned(T* square) {
  constexpr int R = kRegister<T>;
  Lanes<T, R> rows[R];
  for (int i = 0; i < R; ++i) rows[i] = load<Lanes<T, R>>(square + i * R);
  transpose(rows, std::make_integer_sequence<int, R>{});
  for (int i = 0; i < R; ++i) store<Lanes<T, R>>(square + i * R, rows[i]);
  return R;
}
extern "C" long turn_float(float* square) { return turned(square); }
extern "C" long turn_double(double* square) { return turned(square); }

template <class T, int W> void rough(const T* x, T* logs, T* exps) {
  using V = Lanes<T, W>;
  store<V>(logs, rough_log(load<V>(x))), store<V>(exps, rough_exp(load<V>(x)));
}
template <class T, int W> long chosen(LaneSet lanes, const T* x, T* out) {
  using V = Lanes<T, W>;
  const V yes = load<V>(x), no = -yes;
  store<V>(out, select(lanes, yes, no));
  return bits_of(load<V>(out) > V{}) == lanes && bits_of(mask_of<Mask<V>>(lanes)) == lanes ? W : 0;
}
#define FOR_WIDTHS(name, T) \\
  extern "C" void rough_##name(const T* x, T* logs, T* exps) { \\
    rough<T, 2 * kRegister<T>>(x, logs, exps); \\
  } \\
  extern "C" long chosen_##name(long way, LaneSet lanes, const T* x, T* out) { \\
    constexpr int R = kRegister<T>; \\
    return way == 0 ? chosen<T, R / 2>(lanes & ((1u << R / 2) - 1), x, out) \\
         : way == 1 ? chosen<T, R>(lanes & ((1u << R) - 1), x, out) \\
                    : chosen<T, 2 * R>(lanes & (~0u >> (32 - 2 * R)), x, out); \\
  }
FOR_WIDTHS(float, float)
FOR_WIDTHS(double, double)

template <class T, int kRegisters, long N, long K, bool kTurned>
long products(long count, const T* u, const T* x, T* w) {
  constexpr int R = kRegister<T>;
  constexpr int W = kRegisters < 0 ? R / 2 : kRegisters == 0 ? 1 : R * kRegisters;
  using P = Product<0, 0, N, K, kTurned ? 1 : K, kTurned ? N : 1>;
  const auto factors = std::make_unique<typename P::template Factors<T, W>>();
  factors->count = 0;
  for (long i = 0; i < count; ++i)
    P::template put<W>(u + i * N * W, x + i * K * W, w, factors.get());
  P::flush(w, *factors);
  return W;
}
"""


def entries() -> str:
    return "\n".join(
        f'extern "C" long outer_{name}_{n}_{k}_{i}_{turned}(long count, const {name}* u,'
        f" const {name}* x, {name}* w)"
        f" {{ return products<{name}, {width}, {n}, {k}, {turned}>(count, u, x, w); }}"
        for name in ("float", "double")
        for n, k in SIZES
        for i, width in enumerate(WIDTHS)
        for turned in (0, 1)
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("headers")
    source, made = folder / "parts.cpp", folder / "parts.so"
    source.write_text(PROGRAM + entries())
    flags = ["-std=c++20", "-O1", "-march=native", "-shared", "-fPIC", "-pthread"]
    command = ["g++", *flags, f"-I{build.include_folder()}", str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(made))


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


NAMES = {torch.float32: "float", torch.float64: "double"}


@pytest.mark.parametrize("dtype", NAMES)
def test_a_square_in_registers_is_turned(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    square = torch.arange(64.0 * 64, dtype=dtype)
    n = library[f"turn_{NAMES[dtype]}"](pointer(square))
    assert n > 1
    assert torch.equal(square[: n * n].view(n, n), torch.arange(n * n, dtype=dtype).view(n, n).T)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("way", [0, 1, 2])
def test_a_set_of_lanes_chooses_among_them(
    library: ctypes.CDLL, dtype: torch.dtype, way: int
) -> None:
    x, out = torch.arange(1, 65, dtype=dtype), torch.empty(64, dtype=dtype)
    for lanes in (0, 0xFFFFFFFF, 0x12345679, 0xEDCBA986, *(1 << i for i in range(32))):
        width = library[f"chosen_{NAMES[dtype]}"](
            way, ctypes.c_uint32(lanes), *map(pointer, (x, out))
        )
        assert width > 0
        chosen = torch.tensor([lanes >> i & 1 for i in range(width)], dtype=torch.bool)
        assert torch.equal(out[:width], torch.where(chosen, x[:width], -x[:width]))


@pytest.mark.parametrize("dtype", NAMES)
def test_rough_functions_have_the_digits_that_they_promise(
    library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    """Over all that may come: errors from the least to infinity, whose logarithm is finite too."""
    info, room = torch.finfo(dtype), torch.zeros(64, dtype=dtype)

    def found(x: Tensor) -> tuple[Tensor, Tensor]:
        logs, exps = [], []
        for part in torch.nn.functional.pad(x, (0, -len(x) % 64), value=1.0).split(4):
            given, *results = torch.cat([part, room]), room.clone(), room.clone()
            library[f"rough_{NAMES[dtype]}"](*map(pointer, (given, *results)))
            logs.append(results[0][:4])
            exps.append(results[1][:4])
        return torch.cat(logs)[: len(x)].double(), torch.cat(exps)[: len(x)].double()

    near = torch.linspace(0.5, 2.5, 4001, dtype=torch.float64)
    far = torch.linspace(math.log(info.tiny), math.log(info.max), 999, dtype=torch.float64)
    x = torch.cat([near, far[1:-1].exp()]).to(dtype)
    digits = 2e-6 if dtype is torch.float32 else 5e-9
    rounding = 4 * info.eps
    torch.testing.assert_close(found(x)[0], x.double().log(), rtol=rounding, atol=digits)
    x = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-1, 1, 997)]).to(dtype)
    digits = 3e-7 if dtype is torch.float32 else 5e-11
    torch.testing.assert_close(found(x)[1], x.double().exp(), rtol=digits, atol=0)
    ends = found(torch.tensor([info.max, math.inf, -info.max, -math.inf], dtype=dtype))[1]
    torch.testing.assert_close(ends.log(), torch.tensor([80, 80, -80, -80.0]).double())


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("width", range(len(WIDTHS)))
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("count", [0, 1, 2, 17])  # less than are added in one sweep, and more
def test_outer_products_are_summed_over_samples(
    library: ctypes.CDLL, dtype: torch.dtype, turned: int, width: int, n: int, k: int, count: int
) -> None:
    """Small whole numbers: every order of summation has the same bits."""
    u, x = torch.randint(-4, 5, (2, 17 * 300 * 32), dtype=torch.int64).to(dtype)
    w = torch.full((n * k + 1,), 3.0, dtype=dtype)
    lanes = library[f"outer_{NAMES[dtype]}_{n}_{k}_{width}_{turned}"](
        count, pointer(u), pointer(x), pointer(w)
    )
    u = u[: count * n * lanes].view(count, n, lanes)
    x = x[: count * k * lanes].view(count, k, lanes)
    want = 3 + (u @ x.mT).sum(0)
    assert torch.equal(w[:-1], (want.T if turned else want).reshape(-1))
    assert w[-1] == 3  # nothing is written behind the matrix


#: function, bracket, root
ROOTS: dict[str, tuple[Callable[[float], float], float, float, float]] = {
    "a line": (lambda x: 0.3 - x, 0.0, 1.0, 0.3),
    "steep at the end": (lambda x: math.exp(-1) - math.exp(20 * (x - 1)), 0.0, 1.0, 0.95),
    "flat": (lambda x: -((x - 0.7) ** 9), 0.0, 2.0, 0.7),
    "a jump": (lambda x: 1.0 if x < 0.62 else -1e-9, 0.0, 1.0, 0.62),
    "zero at the end": (lambda x: 1.0 - x, 0.0, 1.0, 1.0),
    "not positive at the start": (lambda x: 0.5 - x, 0.6, 1.0, 0.6),
    # a departure: the function begins in its root
    "zero at the start": (lambda x: x * (0.8 - x), 0.0, 1.0, 0.8),
}


Value = Callable[[float], float]


def native_root(
    library: ctypes.CDLL, value: Value, low: float, high: float, tolerance: float
) -> float:
    library.root.restype = ctypes.c_double
    called = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(value)
    return float(library.root(called, *map(ctypes.c_double, (low, high, tolerance))))


def root_and_places(
    library: ctypes.CDLL, native: bool, func: Value, low: float, high: float, tolerance: float
) -> tuple[float, list[float]]:
    asked = []

    def value(x: float) -> float:
        asked.append(x)
        return func(x)

    find = functools.partial(native_root, library) if native else bracketed_root
    return find(value, low, high, tolerance), asked


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-12])
@pytest.mark.parametrize("name", ROOTS)
def test_a_root_is_bracketed_in_little_more_time_than_by_bisection(
    library: ctypes.CDLL, name: str, tolerance: float, native: bool
) -> None:
    func, low, high, want = ROOTS[name]
    found, asked = root_and_places(library, native, func, low, high, tolerance)
    assert abs(found - want) <= tolerance
    assert all(low <= x <= high for x in asked)
    bisections = math.ceil(math.log2((high - low) / (2 * tolerance)))
    assert len(asked) <= 2 + bisections + 2  # the ends, and what the method may waste


@pytest.mark.parametrize("native", [True, False])
def test_a_root_of_a_smooth_function_is_found_in_far_less_time(
    library: ctypes.CDLL, native: bool
) -> None:
    found, asked = root_and_places(library, native, math.cos, 1.0, 2.0, 1e-12)
    assert abs(found - math.pi / 2) <= 1e-12
    assert len(asked) <= 10  # 41 by bisection


@pytest.mark.parametrize("batch", [1, 7, 8, 9, 127, 128, 129, 1000])
@pytest.mark.parametrize("width", [1, 8, 16])
def test_runs_are_whole_tiles_and_do_not_depend_on_threads(
    library: ctypes.CDLL, batch: int, width: int
) -> None:
    found = []
    for threads in (1, 3):
        ends = (ctypes.c_long * 64)()
        count = library.runs(*map(ctypes.c_long, (batch, width, threads)), ends)
        assert 1 <= count <= 16
        found.append([(ends[2 * i], ends[2 * i + 1]) for i in range(count)])
    runs = found[0]
    assert found[1] == runs
    assert [i for begin, end in runs for i in range(begin, end)] == list(range(batch))
    assert all(begin % width == 0 for begin, _ in runs)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_share_the_work_out(library: ctypes.CDLL, threads: int) -> None:
    for count in (0, 1, 5, 100):
        calls = (ctypes.c_long * 101)()
        library.counted(ctypes.c_long(count), ctypes.c_long(threads), calls)
        assert list(calls) == [1] * count + [0] * (101 - count)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux")
def test_large_pages_are_asked_for_within_the_array(library: ctypes.CDLL) -> None:
    page = 1 << 21
    for begin, size, want in [
        (5 * page, 3 * page, (5 * page, 3 * page)),
        (5 * page + 1, 3 * page, (6 * page, 2 * page)),
        (5 * page - 1, 3 * page, (5 * page, 2 * page)),
        (5 * page + 1, 2 * page - 2, (0, 0)),
        (5 * page, page - 1, (0, 0)),
    ]:
        out = (ctypes.c_ulong * 2)()
        library.advise(ctypes.c_void_p(begin), ctypes.c_long(size), out)
        assert tuple(out) == want


def test_large_arrays_are_kept_for_the_next_who_asks_for_such(library: ctypes.CDLL) -> None:
    take, give = library.take, library.give
    take.restype, take.argtypes = ctypes.c_void_p, [ctypes.c_long]
    give.restype, give.argtypes = None, [ctypes.c_void_p, ctypes.c_long]
    size, most = 1 << 23, 1 << 27
    held = [take(size) for _ in range(most // size + 1)]
    assert len(set(held)) == len(held)  # what is not given back is nobody else's
    for array in held:
        ctypes.memset(array, 1, size)
        give(array, size)
    again = [take(size) for _ in held]
    assert again[:-1] == held[-2::-1]  # the last one was too much
    for array in again[:2]:
        give(array, size)
    other = take(size + 64)
    ctypes.memset(other, 1, size + 64)  # it is as large as was asked for
    assert other not in again[:2]
    give(other, size + 64)  # from now on these are kept
    assert take(size + 64) == other
    for array in [*again[2:], other]:
        give(array, 64)  # too small to be kept
