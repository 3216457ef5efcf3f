"""A native solve takes the eager solver's steps and returns its numbers, statistics and fates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.codegen import build
from ctorch.ode import TABLEAUS, Solution, Status, native

from . import native_fields as fields
from .native_fields import both

pytestmark = pytest.mark.usefixtures("quick_compiler")

F32, F64 = torch.float32, torch.float64
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUS.items() if not tableau.adaptive]
LOW_ORDER = ("adaptive_heun", "fehlberg2")
T = torch.tensor([0.0, 0.0, 0.4, 1.3, 2.0], dtype=F64)


def same(mine: Solution, eager: Solution, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(mine.y, eager.y, rtol=rtol, atol=rtol, equal_nan=True)
    for name in ("accepted", "rejected"):
        expected = torch.as_tensor(getattr(eager.stats, name))
        assert torch.equal(torch.as_tensor(getattr(mine.stats, name)), expected), name
    assert torch.equal(torch.as_tensor(mine.status), torch.as_tensor(eager.status))


def pendulums(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """States and stiffness; the samples need different steps."""
    spread = torch.linspace(0.0, 1.0, count, dtype=dtype)[:, None]
    return torch.cat([0.2 + spread, 1 - 2 * spread], 1), 1 + 60 * spread


def tolerance(method: str) -> dict[str, float]:
    return {"rtol": 1e-3, "atol": 1e-3} if method in LOW_ORDER else {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("method", ADAPTIVE)
def test_samples_step_as_in_the_eager_solver(method: str) -> None:
    y0, stiffness = pendulums(21, F64)  # more than there are lanes, and no multiple of them
    how = {"method": method, "args": (stiffness,), "batched": True, **tolerance(method)}
    for t in (T, T.flip(0)):
        mine, eager = both(fields.forced, y0, t, **how)
        same(mine, eager)
        assert mine.stats.accepted.unique().numel() > 2
    torch.testing.assert_close(mine.y[:, 0], y0)


def test_evaluations_are_counted_for_each_sample() -> None:
    """As the eager solver counts those of a sample alone; of a batch it counts its calls."""
    y0, stiffness = pendulums(21, F64)
    how: dict[str, Any] = {"controller": "i", **tolerance("dopri5")}
    mine, eager = both(fields.forced, y0, T, args=(stiffness,), batched=True, **how)
    for i in (0, 7, 20):
        one = slice(i, i + 1)
        alone = ctorch.solve_ode(fields.forced, y0[one], T, args=(stiffness[one],), **how)
        assert mine.stats.nfe[i] == alone.stats.nfe
    assert mine.stats.nfe.shape == (21,)
    assert isinstance(eager.stats.nfe, int)
    assert eager.stats.nfe >= int(mine.stats.nfe.max())


# one of each kind, the tableaus being those of samples that step alone: the last slope is evaluated
# after the step, or is one of its stages; outputs need further slopes
@pytest.mark.parametrize("method", ["adaptive_heun", "dopri5", "vern7"])
def test_a_whole_batch_steps_together_as_in_the_eager_solver(method: str) -> None:
    y0, stiffness = pendulums(11, F64)
    mine, eager = both(fields.forced, y0, T, method=method, args=(stiffness,), **tolerance(method))
    same(mine, eager)
    assert mine.stats.nfe == eager.stats.nfe


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_one_sample_alone(method: str, dtype: torch.dtype) -> None:
    y0, stiffness = pendulums(2, dtype)
    for batched in (True, False):
        how = {"args": (stiffness[1:],), "method": method, "batched": batched, "controller": "i"}
        mine, eager = both(fields.forced, y0[1:], T, **how)
        same(mine, eager, 1e-9 if dtype is F64 else 2e-5)
    assert mine.stats.nfe == eager.stats.nfe


@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps(method: str) -> None:
    y0, stiffness = pendulums(11, F64)
    how: dict[str, Any] = {"method": method, "args": (stiffness,)}
    for more in ({"dt0": 0.03}, {}, {"dt0": 0.03, "options": {"perturb": True}}):
        mine, eager = both(fields.forced, y0, T, **how, **more)
        same(mine, eager)
        assert mine.stats.nfe == eager.stats.nfe
    mine, eager = both(fields.forced, y0, T.flip(0), **how, dt0=0.07, max_steps=9)
    same(mine, eager)
    assert mine.status is Status.MAX_STEPS


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("batched", [True, False])
def test_a_network(dtype: torch.dtype, batched: bool) -> None:
    net = fields.Net(dtype)
    y0 = torch.randn(19, 2, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        mine, eager = both(net, y0, T, batched=batched)
        if dtype is F64:
            same(mine, eager)
        else:  # the rounding of float32 shows in the error estimates, and so in the steps
            torch.testing.assert_close(mine.y, eager.y, rtol=1e-4, atol=1e-4)
            steps = mine.stats.accepted / torch.as_tensor(eager.stats.accepted)
            assert bool(((steps - 1).abs() < 0.4).all())
        with torch.no_grad():
            net.net[2].weight.mul_(0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"controller": "i"},
        {"controller": "pid"},
        {"controller": ctorch.ode.StepController(safety=0.7, min_factor=0.5, max_factor=2.0)},
        {"options": {"min_step": 0.1}},
        {"options": {"max_step": 0.05}},
        {"dt0": 0.5},
        {"rtol": torch.tensor([1e-3, 1e-7], dtype=F64)},
        {"options": {"norm": "max"}},
        {"max_steps": 12},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
@pytest.mark.parametrize("batched", [True, False])
def test_settings_mean_the_same(settings: dict[str, Any], batched: bool) -> None:
    y0, stiffness = pendulums(11, F64)
    same(*both(fields.forced, y0, T, args=(stiffness,), batched=batched, **settings))


def test_each_sample_has_its_own_times() -> None:
    y0, stiffness = pendulums(21, F64)
    ends = torch.linspace(-2, 2, 21, dtype=F64)
    ends[3] = 0.0  # nothing to do
    t = torch.linspace(0, 1, 5, dtype=F64) * ends[:, None]
    mine, eager = both(fields.forced, y0, t, args=(stiffness,), batched=True)
    same(mine, eager)
    assert mine.stats.accepted[3] == 0


@pytest.mark.parametrize("gradient", [True, False])
def test_every_field_is_solved_by_its_own_library(gradient: bool) -> None:
    """Also the second time, when settings and shapes are known from another field."""
    y0 = torch.ones(3, 2, dtype=F64, requires_grad=gradient)
    for func in (fields.lotka_volterra, fields.blow_up) * 2:
        mine, eager = (
            ctorch.solve_ode(func, y0, T * 0.3, native=native) for native in (True, False)
        )
        same(mine, eager)
        if gradient:
            found = [torch.autograd.grad(sol.y.square().sum(), y0) for sol in (mine, eager)]
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_times_of_another_number_of_samples_are_refused() -> None:
    """Also where the same solve was made before, and its short way is known."""
    handle = ctorch.ode.compile(fields.lotka_volterra, batched=True)

    def solve(y0: Tensor, t: Tensor) -> Solution:
        return ctorch.solve_ode(fields.lotka_volterra, y0, t, batched=True, native=True)

    y0, t = torch.ones(3, 2, dtype=F64), T.expand(3, 5)
    for how in (solve, handle):
        for _ in range(2):
            assert how(y0, t).y.shape == (3, 5, 2)
            for rows in (1, 2, 4):
                with pytest.raises(ValueError, match=f"{rows} rows for a batch of 3"):
                    how(y0, T.expand(rows, 5))
            with pytest.raises(ValueError, match="3 rows for a batch of 4"):
                how(torch.ones(4, 2, dtype=F64), t)


@pytest.mark.parametrize("func", [fields.root, fields.blow_up])
@pytest.mark.parametrize("batched", [True, False])
def test_failures_have_the_same_status_and_rows(func: Callable[..., Tensor], batched: bool) -> None:
    y0 = torch.tensor([[1.0, 2.0], [1e-3, 1e-3], [0.5, 0.1], [-1.0, 0.1]], dtype=F64)
    t = torch.linspace(0.0, 3.0, 7, dtype=F64)
    for rows in (slice(None), slice(0, 1)):
        mine, eager = both(func, y0[rows], t, batched=batched, max_steps=5000)
        assert torch.equal(torch.as_tensor(mine.status), torch.as_tensor(eager.status))
        assert torch.equal(mine.y.isnan(), eager.y.isnan())
        torch.testing.assert_close(mine.y, eager.y, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert bool(mine.message)
    with pytest.raises(ctorch.SolveError, match="t="):
        ctorch.solve_ode(func, y0, t, batched=batched, native=True, gradient="none")


def test_threads_do_not_change_a_bit() -> None:
    y0, stiffness = pendulums(333, F64)
    threads = torch.get_num_threads()
    how: dict[str, Any] = {"args": (stiffness,), "batched": True, "gradient": "none"}
    try:
        found = []
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(ctorch.solve_ode(fields.forced, y0, T, native=True, **how))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].y, found[1].y)
    assert torch.equal(found[0].stats.nfe, found[1].stats.nfe)


def test_a_sample_does_not_depend_on_its_neighbors() -> None:
    y0, stiffness = pendulums(40, F64)
    whole, _ = both(fields.forced, y0, T, args=(stiffness,), batched=True)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:23]
    part, _ = both(fields.forced, y0[order], T, args=(stiffness[order],), batched=True)
    assert torch.equal(part.y, whole.y[order])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_samples_in_several_registers_step_as_those_in_one(dtype: torch.dtype) -> None:
    def field(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        x, v = y[..., :1], y[..., 1:]
        bend = torch.where(x > 0.5, torch.sin(x + t), torch.tanh(k * x) - torch.cos(v).abs())
        pull = torch.copysign(torch.erf(v), x) * torch.sqrt(1 + v * v)
        gate = torch.nn.functional.gelu(v) + torch.sigmoid(x) - torch.minimum(x, v)
        return torch.cat([v - 0.1 * gate, -bend - 0.2 * pull], -1)

    y0, stiffness = pendulums(163, dtype)
    t = T.to(dtype)
    settings = {"native": True, "batched": True, "rtol": 1e-5, "atol": 1e-5}
    many = ctorch.solve_ode(field, y0, t, args=(stiffness,), **settings)
    few = [
        ctorch.solve_ode(field, y, t, args=(k,), **settings)
        for y, k in zip(y0.split(41), stiffness.split(41), strict=True)
    ]
    assert native.registers_for(len(y0)) == 2
    assert native.registers_for(41) == 1
    close = 1e-5 if dtype is F32 else 1e-12
    torch.testing.assert_close(many.y, torch.cat([s.y for s in few]), rtol=close, atol=close)
    for name in ("nfe", "accepted", "rejected"):
        counts = torch.cat([getattr(s.stats, name) for s in few])
        assert torch.equal(getattr(many.stats, name), counts)


def test_odeint_and_the_context_switch_it_on() -> None:
    y0, t = torch.ones(3, 2, dtype=F64), torch.tensor([0.0, 0.7, 2.0], dtype=F64)
    eager = ctorch.odeint(fields.lotka_volterra, y0, t)
    found = [ctorch.odeint(fields.lotka_volterra, y0, t, options={"native": True})]
    with ctorch.native_solves(True):
        found.append(ctorch.odeint(fields.lotka_volterra, y0, t))
        assert ctorch.solve_ode(fields.lotka_volterra, y0, t, native=False).stats.nfe > 0
    for y in found:
        torch.testing.assert_close(y, eager, rtol=1e-10, atol=1e-10)
    assert native._mode.get() is False
    with pytest.raises(ValueError, match="try"), ctorch.native_solves("maybe"):
        pass


def test_what_is_not_native_is_named_or_solved_eagerly_with_one_warning() -> None:
    y0 = torch.ones(3, 2, dtype=F64)
    cases: dict[str, dict[str, Any]] = {
        "taylor": {"method": "taylor"},
        "scipy": {"method": "scipy_solver"},
    }
    for what, how in cases.items():
        with pytest.raises(NotImplementedError, match=what):
            ctorch.solve_ode(fields.lotka_volterra, y0, T, native=True, **how)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sol = ctorch.solve_ode(fields.lotka_volterra, y0, T, native="try", **how)
        assert [str(x.message) for x in caught if "native" in str(x.message)][1:] == []
        assert what in str(caught[0].message)
        assert torch.equal(sol.y, ctorch.solve_ode(fields.lotka_volterra, y0, T, **how).y)


def test_an_untraceable_field_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return -y * float(y.detach().sum() > 0)

    y0 = torch.ones(3, 2, dtype=F64)
    with pytest.raises(ctorch.codegen.Untraceable):
        ctorch.solve_ode(field, y0, T, native=True)
    with pytest.warns(UserWarning, match="solving eagerly"):
        ctorch.solve_ode(field, y0, T, native="try")
    monkeypatch.setattr(ctorch.codegen, "trace", lambda *_, **__: pytest.fail("traced again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol = ctorch.solve_ode(field, y0, T, native="try")
    assert torch.equal(sol.y, ctorch.solve_ode(field, y0, T).y)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("CTORCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    y0 = torch.ones(3, 2, dtype=F64)
    with pytest.raises(build.NoCompiler, match=r"g\+\+"):
        ctorch.solve_ode(fields.lotka_volterra, y0, T, native=True)
    with pytest.warns(UserWarning, match=r"solving eagerly.*g\+\+"):
        sol = ctorch.solve_ode(fields.lotka_volterra, y0, T, native="try")
    assert torch.equal(sol.y, ctorch.solve_ode(fields.lotka_volterra, y0, T).y)


def test_a_compiled_solve_is_solve_ode_without_its_cost() -> None:
    y0, stiffness = pendulums(11, F64)
    for batched in (True, False):
        solve = ctorch.ode.compile(fields.forced, batched=batched, rtol=1e-7, atol=1e-7)
        how = {"rtol": 1e-7, "atol": 1e-7, "args": (stiffness,), "batched": batched}
        for t in (T, T * 0.5):
            mine = solve(y0, t, stiffness)
            same(mine, ctorch.solve_ode(fields.forced, y0, t, gradient="none", **how))
    with pytest.raises(TypeError, match="rtoll"):
        ctorch.ode.compile(fields.forced, rtoll=1)
    with pytest.raises(ValueError, match="monotone"):
        solve(y0, torch.tensor([0.0, 1.0, 0.5, 2.0, 3.0]), stiffness)
    with pytest.raises(ValueError, match=r"one dimensional, .*\[11, 5\]"):
        ctorch.ode.compile(fields.forced)(y0, T.expand(11, 5), stiffness)
    t = T.clone()
    solve(y0, t, stiffness)
    t[2] = math.inf
    with pytest.raises(ValueError, match="finite"):
        solve(y0, t, stiffness)


def test_a_compiled_solve_is_never_stale() -> None:
    y0 = torch.tensor([[1.0, 2.0], [0.5, 0.1], [3.0, 1.0]], dtype=F64)

    def decay(t: Tensor, y: Tensor, given: dict[str, Any]) -> Tensor:
        return -given["rate"] * y * given["more"][0]

    def mixing(t: Tensor, y: Tensor) -> Tensor:
        return -0.1 * y * y.sum()

    one, two = torch.tensor(1.0, dtype=F64), torch.tensor(2.0, dtype=F64)
    solve = ctorch.ode.compile(decay)
    for rate, more in ((1.0, one), (2.0, one), (2.0, two), (one, two), (two, two), (1, 3.0)):
        given = {"rate": rate, "more": [more]}
        mine = solve(y0, T, given)
        same(mine, ctorch.solve_ode(decay, y0, T, args=(given,)), 1e-5)
    same(ctorch.ode.compile(mixing)(y0, T), ctorch.solve_ode(mixing, y0, T), 1e-5)
    values = T.numpy().copy()
    t = torch.from_numpy(values)
    given = {"rate": 1.0, "more": [one]}
    solve(y0, t, given)
    values[1:] *= 0.5  # unseen by torch
    same(solve(y0, t, given), ctorch.solve_ode(decay, y0, T * 0.5, args=(given,)), 1e-5)


def test_a_compiled_solve_says_what_it_cannot_do() -> None:
    def decay(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return -rate * y

    solve = ctorch.ode.compile(decay, batched=True)
    y0, rate = torch.ones(3, 2, dtype=F64), torch.ones(3, 1, dtype=F64)
    for place in range(3):
        given = [x.clone().requires_grad_(i == place) for i, x in enumerate((y0, T, rate))]
        with pytest.raises(native.Unsupported, match="gradients"):
            solve(*given)
    with pytest.raises(native.Unsupported, match="several tensors"):
        solve((y0, y0), T, rate)  # type: ignore[arg-type]
