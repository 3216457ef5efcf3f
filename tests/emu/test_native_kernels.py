"""The kernels of native solves, run on the CPU, return what the CPU's own solves return."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch import codegen
from ctorch.codegen import cuda
from ctorch.ode import Solution, native, native_cuda
from ctorch.ode.native_task import Task
from tests.emu.native_kernels import emulated, emulated_device, needs_compiler
from tests.ode import native_fields as fields

pytestmark = [needs_compiler, pytest.mark.usefixtures("folder")]
F32, F64 = torch.float32, torch.float64
T = torch.tensor([0.0, 0.0, 0.4, 1.3, 2.0], dtype=F64)
SAMPLES = cuda.BLOCK + 5  # a block and a part of one


def van_der_pol(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y[..., :1], y[..., 1:]
    return torch.cat([v, mu * (1 - x * x) * v - x], -1)


def lorenz(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


class Mixing(torch.nn.Module):
    """Reads its state and constants through tables, and sums over it."""

    def __init__(self) -> None:
        super().__init__()
        self.places = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 11, 10])
        self.decay = torch.tensor([1.0, 5.0, 2.0] * 4, dtype=F64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.softmax(y[..., self.places], -1) - self.decay * y


def states(dim: int, dtype: torch.dtype = F64) -> Tensor:
    grid = torch.arange(SAMPLES * dim, dtype=dtype).view(SAMPLES, dim)
    return 1 + 0.7 * torch.sin(1.3 * grid)


def stiffness() -> Tensor:
    return torch.linspace(0.5, 20.0, SAMPLES, dtype=F64)[:, None]


CASES: dict[str, Callable[[], tuple[Any, Tensor, tuple[Tensor, ...]]]] = {
    "lotka_volterra": lambda: (fields.lotka_volterra, states(2), ()),
    "van_der_pol": lambda: (van_der_pol, states(2), (stiffness(),)),
    "lorenz": lambda: (lorenz, states(3), ()),
    "mlp": lambda: (fields.Net(F64), states(2), (0.1 * stiffness(),)),
    "tables": lambda: (Mixing(), states(12), ()),
}


@pytest.fixture
def on_device(folder: Path) -> Callable[..., Solution]:
    """``solve_ode`` with the kernels in the emulator in the place of those on a device."""

    def solve(*args: Any, **how: Any) -> Solution:
        with emulated_device(folder):
            return on_cpu(*args, **how)

    return solve


def on_cpu(func: Any, y0: Tensor, t: Tensor, batched: bool = True, **how: Any) -> Solution:
    return ctorch.solve_ode(func, y0, t, native=True, gradient="none", batched=batched, **how)


def same(mine: Solution, expected: Solution, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(mine.y, expected.y, rtol=rtol, atol=rtol, equal_nan=True)
    for name in ("nfe", "accepted", "rejected"):
        counts = [torch.as_tensor(getattr(sol.stats, name)) for sol in (mine, expected)]
        assert torch.equal(*counts), name
    assert torch.equal(torch.as_tensor(mine.status), torch.as_tensor(expected.status))


@pytest.mark.parametrize("case", CASES)
def test_a_thread_takes_the_steps_of_the_cpu(case: str, on_device: Callable[..., Solution]) -> None:
    func, y0, args = CASES[case]()
    how: dict[str, Any] = {"args": args, "rtol": 1e-6, "atol": 1e-5}
    for t in (T, T.flip(0)) if case == "van_der_pol" else (T,):
        mine = on_device(func, y0, t, **how)
        same(mine, on_cpu(func, y0, t, **how))
        assert mine.stats.accepted.unique().numel() > 1


def test_float32_differs_by_its_rounding(on_device: Callable[..., Solution]) -> None:
    func, y0 = fields.Net(F32), states(2, F32)
    how = {"rtol": 1e-5, "atol": 1e-5}
    mine, expected = on_device(func, y0, T, **how), on_cpu(func, y0, T, **how)
    torch.testing.assert_close(mine.y, expected.y, rtol=1e-4, atol=1e-4)
    # where the error norm is all but 1, rounding decides
    assert mine.stats.nfe.ne(expected.stats.nfe).double().mean() < 0.1


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8"])
def test_every_kind_of_tableau(method: str, on_device: Callable[..., Solution]) -> None:
    y0, args = states(2), (stiffness(),)
    how: dict[str, Any] = {"method": method, "args": args, "rtol": 1e-5, "atol": 1e-6}
    same(on_device(van_der_pol, y0, T, **how), on_cpu(van_der_pol, y0, T, **how))


def test_times_and_tolerances_of_the_samples(on_device: Callable[..., Solution]) -> None:
    y0 = states(2)
    t = T[1:] * torch.linspace(0.5, 1.5, SAMPLES, dtype=F64)[:, None]
    how = {
        "rtol": torch.tensor([1e-4, 1e-7], dtype=F64),
        "atol": 1e-6,
        "options": {"first_step": 1e-3},
    }
    same(
        on_device(fields.lotka_volterra, y0, t, **how), on_cpu(fields.lotka_volterra, y0, t, **how)
    )


def test_a_sample_that_fails_leaves_the_others_alone(on_device: Callable[..., Solution]) -> None:
    y0 = torch.linspace(0.1, 0.9, SAMPLES, dtype=F64)[:, None]
    t = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    mine, expected = (
        solve(fields.blow_up, y0, t, throw=False, max_steps=300) for solve in (on_device, on_cpu)
    )
    same(mine, expected, rtol=1e-7)  # close to a pole steps of nearly one length end apart
    assert mine.status.unique().numel() > 1
    assert mine.y[:, -1].isnan().any()
    with pytest.raises(ctorch.SolveError, match="sample"):
        on_device(fields.blow_up, y0, t, max_steps=300)


ONE_STEP: dict[str, dict[str, Any]] = {
    "joint": {"rtol": 1e-6, "atol": 1e-5},
    "late and further stages": {"method": "vern7"},
    "largest error, tolerances": {
        "rtol": torch.tensor([1e-4, 1e-6], dtype=F64),
        "options": {"norm": "max", "first_step": 1e-3, "max_step": 0.2},
    },
    "fixed": {"method": "rk4", "dt0": 0.11},
    "perturbed": {"method": "midpoint", "dt0": 0.11, "options": {"perturb": True}},
}


@pytest.mark.parametrize("how", ONE_STEP.values(), ids=list(ONE_STEP))
def test_all_samples_take_one_step(how: dict[str, Any], on_device: Callable[..., Solution]) -> None:
    y0, how = states(2), {"args": (0.1 * stiffness(),), "batched": False, **how}
    for t in (T, T.flip(0)):
        mine, expected = (solve(van_der_pol, y0, t, **how) for solve in (on_device, on_cpu))
        same(mine, expected)


TOGETHER: dict[str, dict[str, Any]] = {
    "batched": {},
    "joint": {"batched": False},
    "fixed": {"batched": False, "method": "midpoint", "dt0": 0.11},
}


@pytest.mark.parametrize("how", TOGETHER.values(), ids=list(TOGETHER))
def test_a_block_multiplies_large_matrices_together(
    how: dict[str, Any],
    on_device: Callable[..., Solution],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All threads of a block meet at the barriers, whatever the steps of their samples."""
    sources = []
    generate = native_cuda.cuda_source
    monkeypatch.setattr(
        native_cuda, "cuda_source", lambda *given: sources.append(generate(*given)) or sources[-1]
    )
    net, y0 = fields.Net(F64, 40), states(2)
    how = {"args": (0.1 * stiffness(),), "batched": True, "rtol": 1e-5, "atol": 1e-5, **how}
    mine = on_device(net, y0, T, **how)
    assert "CT_TOGETHER" in sources[0]
    (made,) = [path for path in folder.glob("*.cpp") if sources[0] in path.read_text()]
    assert b"block_tile" in made.with_suffix(".so").read_bytes()  # what the threads share
    eager = ctorch.solve_ode(net, y0, T, gradient="none", **how)
    torch.testing.assert_close(mine.y, eager.y, rtol=1e-8, atol=1e-8)
    for name in ("accepted", "rejected"):
        counts = [torch.as_tensor(getattr(sol.stats, name)) for sol in (mine, eager)]
        assert torch.equal(*counts), name


def test_a_joint_solve_fails_as_on_the_cpu(on_device: Callable[..., Solution]) -> None:
    how = {"args": (0.1 * stiffness(),), "batched": False, "throw": False, **ONE_STEP["joint"]}
    wild = states(2)
    wild[-1] = 1e200
    for y0, most in ((wild, None), (states(2), 7)):
        mine, expected = (
            solve(van_der_pol, y0, T, max_steps=most, **how) for solve in (on_device, on_cpu)
        )
        same(mine, expected)
        assert mine.status != 0
        assert mine.y[-1].isnan().all()
    with pytest.raises(ctorch.SolveError, match="max_steps"):
        on_device(van_der_pol, states(2), T, **{**how, "max_steps": 7, "throw": True})


def test_no_step_is_made_where_all_times_are_the_first(on_device: Callable[..., Solution]) -> None:
    how = {"args": (0.1 * stiffness(),), "batched": False, **ONE_STEP["joint"]}
    mine, expected = (solve(van_der_pol, states(2), T[:2], **how) for solve in (on_device, on_cpu))
    same(mine, expected)


def test_a_field_that_mixes_samples_is_one_system(on_device: Callable[..., Solution]) -> None:
    def pulled(t: Tensor, y: Tensor) -> Tensor:
        return y.mean(0) - y**3

    y0 = states(2)[:6].clone()
    mine, expected = (solve(pulled, y0, T, batched=False) for solve in (on_device, on_cpu))
    same(mine, expected)


def test_threads_without_a_sample_do_nothing(tmp_path: Path) -> None:
    y0 = states(2)
    traced = codegen.trace(fields.lotka_volterra, y0, T, (), batched=True)
    form = native.Form("tsit5", "best", "solve_samples", 1, (2,))
    source = native_cuda.cuda_source(traced.source, form)
    kernels = emulated(source, ["ct_solve", "ct_eval"], tmp_path)
    library = native_cuda.Library(kernels, form, 2, F64, 0, y0.device)
    few, mark = 3, -7.0
    y0[few:], rows = mark, torch.full((SAMPLES, 2, 2), mark, dtype=F64)
    numbers = torch.full((7, SAMPLES), -7)
    at, times = numbers.data_ptr(), torch.tensor([0.0, 0.5], dtype=F64)
    task = Task(
        batch=few, rows=2, t=times.data_ptr(), y0=y0.data_ptr(), out=rows.data_ptr(),
        out_sample=4, out_row=2, rtol=1e-3, atol=1e-3, i=1.0, safety=0.9, min_factor=0.2,
        max_factor=5.0, first_step=-1.0, max_step=1.0, max_steps=100.0, counts=at,
        status=at + 24 * few, last=at + 32 * few,
    )  # fmt: skip
    assert library.ct_solve(ctypes.byref(task)) == native_cuda.UNCOUNTED
    flat = numbers.view(-1)
    assert flat[3 * few : 4 * few].eq(0).all()
    assert flat[7 * few :].eq(-7).all()
    assert rows[:few].ne(mark).all()
    assert rows[few:].eq(mark).all()
    slope = torch.full((SAMPLES, 2), mark, dtype=F64)
    memory = torch.tensor([few])
    cuda.launch(kernels["ct_eval"], few, [memory, torch.zeros(few, dtype=F64), y0, y0, slope])
    torch.testing.assert_close(slope[:few], fields.lotka_volterra(times[0], y0[:few]))
    assert slope[few:].eq(mark).all()


def test_kernels_that_differ_from_func_are_refused(
    on_device: Callable[..., Solution], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = native_cuda.cuda_source
    monkeypatch.setattr(
        native_cuda, "cuda_source", lambda *how: source(*how).replace("real(1.5)", "real(1.6)")
    )
    with pytest.raises(codegen.Untraceable, match="differs"):
        on_device(fields.lotka_volterra, states(2)[:4].clone(), T)


LOOKED_AT: dict[str, dict[str, Any]] = {
    "events": {"events": lambda t, y: y[0, 0] - 2},
    "norm": {"options": {"norm": lambda x: x.abs().max()}},
}


@pytest.mark.parametrize("how", LOOKED_AT.values(), ids=list(LOOKED_AT))
def test_what_kernels_do_not_do_is_refused(
    how: dict[str, Any], on_device: Callable[..., Solution]
) -> None:
    what = "events on cuda" if "events" in how else r"options\[.norm.\] on cuda"
    with pytest.raises(native.Unsupported, match=what):
        on_device(fields.lotka_volterra, states(2), T, batched=False, **how)


@pytest.mark.parametrize("how", LOOKED_AT.values(), ids=list(LOOKED_AT))
def test_what_kernels_do_not_do_is_solved_eagerly_where_one_tries(
    how: dict[str, Any], folder: Path
) -> None:
    y0 = states(2)
    with emulated_device(folder), pytest.warns(UserWarning, match="solving eagerly.*on cuda"):
        mine = ctorch.solve_ode(fields.lotka_volterra, y0, T, native="try", **how)
    eager = ctorch.solve_ode(fields.lotka_volterra, y0, T, **how)
    assert torch.equal(mine.y, eager.y)
