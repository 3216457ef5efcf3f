"""Generated kernels compile for the GPUs that are built for, with nvcc and with NVRTC."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ctorch import codegen
from ctorch.codegen import build, cache, cuda
from ctorch.ode.native_source import (
    Form,
    cuda_gradient_source,
    cuda_source,
    multiplies_together,
)

ARCHITECTURES = ("sm_80", "sm_90")


def nvcc() -> str | None:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{toolkit}/bin/nvcc")


def has_nvrtc() -> bool:
    try:
        return cuda._compiler() is not None
    except build.NoCompiler:
        return False


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC")


def lotka_volterra(t: Tensor, y: Tensor) -> Tensor:
    hare, lynx = y[..., 0], y[..., 1]
    return torch.stack([1.5 * hare - hare * lynx, hare * lynx - 3 * lynx], -1)


def van_der_pol(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y[..., :1], y[..., 1:]
    return torch.cat([v, mu * (1 - x * x) * v - x], -1)


def lorenz(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def functions(t: Tensor, y: Tensor) -> Tensor:
    """Of every kind that the headers have, and a table."""
    places = torch.tensor([2, 0, 1, 3, 5, 4, 7, 6, 10, 8, 9])
    x = y[..., places]
    positive = x.abs() + 0.1
    bounded = x / (1 + positive)
    parts = [
        x.exp() + x.expm1() + x.exp2() + x.sigmoid() + nn.functional.softplus(x),
        positive.log() + positive.log1p() + positive.log2() + positive.log10() + positive.sqrt(),
        x.sin() + x.cos() + x.tan() + bounded.asin() + bounded.acos() + x.atan() + x.erf(),
        x.sinh() + x.cosh() + x.tanh() + x.asinh() + (1 + positive).acosh() + bounded.atanh(),
        x.floor() + x.ceil() + x.trunc() + x.round() + x.sign() + x.erfc() + positive.rsqrt(),
        torch.atan2(x, y) + torch.fmod(x, positive) + torch.hypot(x, y) + torch.copysign(x, y),
        positive**y + x**3 + x**-2 + torch.maximum(x, y) + torch.minimum(x, y),
        nn.functional.gelu(x)
        + torch.where(x > 0, x, float("inf")).clamp(max=3)
        + positive.lgamma(),
    ]
    return torch.stack(parts).sum(0) * torch.cos(t)


def mlp(width: int) -> Callable[[Tensor, Tensor], Tensor]:
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.SiLU(),
                        nn.Linear(width, 2))  # fmt: skip
    return lambda t, y: net(y)


#: vector field, numbers of its state, method, entry; "functions" has no gradient, "mlp" is
#: multiplied by blocks, and steps of joint solves are looked at
CASES: dict[str, tuple[Callable[..., Tensor], int, str, str]] = {
    "lotka_volterra": (lotka_volterra, 2, "tsit5", "solve_joint"),
    "van_der_pol": (van_der_pol, 2, "midpoint", "solve_fixed"),
    "lorenz": (lorenz, 3, "dopri5", "solve_samples"),
    "mlp": (mlp(64), 2, "bosh3", "solve_samples"),
    "functions": (functions, 11, "adaptive_heun", "solve_samples"),
}


def sources(case: str) -> list[tuple[str, list[bytes]]]:
    """CUDA sources, and the kernels in each."""
    func, dim, method, entry = CASES[case]
    dtype = torch.float32 if case in ("mlp", "lorenz", "functions") else torch.float64
    args = (torch.ones(5, 1, dtype=dtype),) if func is van_der_pol else ()
    y, t = torch.ones(5, dim, dtype=dtype), torch.tensor([0.0, 1.0], dtype=torch.float64)
    field = codegen.trace(func, y, t, args, batched=True).source
    joint = entry == "solve_joint"
    form = Form(method, "best", entry, 1, (dim,), gradient=True, events="dense" * joint)
    solve = [b"ct_solve", b"ct_eval", *[b"ct_judge", b"ct_pieces"] * joint]
    made = [(cuda_source(field, form), solve)]
    if case != "functions":
        names = [b"ct_pull_back", b"ct_add_up"]
        for together in {False, multiplies_together(field)}:
            made.append((cuda_gradient_source(field, form, together), names))
    return made


@needs_nvcc
@pytest.mark.parametrize("case", CASES)
def test_nvcc_compiles(case: str, tmp_path: Path) -> None:
    path, out = tmp_path / "solve.cu", tmp_path / "solve.fatbin"
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    strict = ["-Werror=all-warnings", "-diag-suppress=177"]
    flags = ["-std=c++20", "--expt-relaxed-constexpr", *strict, f"-I{build.include_folder()}"]
    for source, kernels in sources(case):
        path.write_text(source)
        command = [str(nvcc()), "-fatbin", *targets, *flags, str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        assert all(name in out.read_bytes() for name in kernels)


@needs_nvrtc
@pytest.mark.parametrize(
    ("case", "architecture"), [(case, ARCHITECTURES[i % 2]) for i, case in enumerate(CASES)]
)
def test_nvrtc_compiles(case: str, architecture: str) -> None:
    for source, kernels in sources(case):
        code = cuda.compiled(source, architecture)
        assert code.startswith(b"\x7fELF")
        assert all(name in code for name in kernels)


@needs_nvrtc
def test_machine_code_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'extern "C" __global__ void fill(int* x) { x[threadIdx.x] = 1; }'
    code = cuda.compiled(source, "sm_80")
    assert cache.contents().libraries == 1
    other = cuda.compiled(source, "sm_90")
    assert other != code

    def never(*args: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(cuda, "_compile", never)
    assert cuda.compiled(source, "sm_80") == code


@needs_nvrtc
def test_an_error_of_the_compiler_is_shown() -> None:
    with pytest.raises(build.CompileError, match="nonsense"):
        cuda.compiled("nonsense", "sm_80")


@needs_nvrtc
def test_a_sample_too_large_for_a_thread_is_refused() -> None:
    y, t = torch.ones(5, 400, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    source = codegen.trace(lambda t, y: -y, y, t, (), batched=True).source
    with pytest.raises(build.CompileError, match="too large for one thread"):
        cuda.compiled(
            cuda_source(source, Form("tsit5", "best", "solve_samples", 1, (400,))), "sm_80"
        )


def test_without_nvrtc_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **how: object) -> None:
        raise OSError

    cuda._compiler.cache_clear()
    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    with pytest.raises(build.NoCompiler, match="native=False"):
        cuda.compiled("", "sm_80")
    cuda._compiler.cache_clear()
