"""A compiled solve is called again with other addresses, and never with old ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch.ode import native_quick
from ctorch.ops import _kernels

pytestmark = pytest.mark.usefixtures("quick_compiler")

F64 = torch.float64
needs_kernels = pytest.mark.skipif(not _kernels.HAS_KERNELS, reason="the short way is compiled")
T = torch.linspace(0.0, 2.0, 5, dtype=F64)
Y0 = torch.tensor([1.0, 0.5, -0.3], dtype=F64)


class Turning(nn.Module):
    """y' = W y, of which W is found anew at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.tensor([[0.0, 1, 2], [-1, 0.2, 0], [0.3, 0.4, -1]]).double()
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.weight.T


def by_solve_ode(field: Any, **settings: Any) -> Callable[..., Any]:
    """Solves four times, of which the last are prepared for; returns what came first."""

    def solve(y0: Tensor, t: Tensor, *args: Any) -> Any:
        made = [
            ctorch.solve_ode(
                field, y0, t, args=args, native=True, gradient="none",
                **{"rtol": 1e-6, "atol": 1e-8, **settings},
            )
            for _ in range(4)
        ]  # fmt: skip
        assert all(torch.equal(x.y, made[0].y) and x.stats == made[0].stats for x in made)
        return made[0]

    return solve


both_ways = pytest.mark.parametrize(
    "prepare", [ctorch.ode.compile, by_solve_ode], ids=["compile", "solve_ode"]
)


def same(mine: Any, field: Any, y0: Tensor, t: Tensor, *args: Tensor) -> None:
    eager = ctorch.solve_ode(field, y0, t, args=args, gradient="none")
    torch.testing.assert_close(mine.y, eager.y, rtol=1e-10, atol=1e-10)
    assert mine.stats == eager.stats


@both_ways
@torch.no_grad()
def test_every_call_reads_the_tensors_as_they_are(prepare: Callable[..., Any]) -> None:
    field = Turning()
    solve = prepare(field)
    for change in (
        lambda: None,
        lambda: field.weight.mul_(0.5),
        lambda: setattr(field.weight, "data", field.weight.data.t()),  # the same memory and shape
        lambda: setattr(field.weight, "data", torch.eye(6, dtype=F64)[::2, ::2]),
        lambda: setattr(field, "weight", nn.Parameter(torch.ones(3, 3, dtype=F64))),
    ):
        change()
        same(solve(Y0, T), field, Y0, T)
    spread = torch.stack((Y0, Y0), 1)[:, 0]
    same(solve(spread, T), field, spread, T)
    kept = solve(Y0, T).y
    copy = kept.clone()
    solve(2 * Y0, T)
    assert torch.equal(kept, copy)  # results have memory of their own


@both_ways
@torch.no_grad()
def test_every_call_is_of_the_type_of_its_state(prepare: Callable[..., Any]) -> None:
    """float32 after float64, and back, of one shape; nothing else tells them apart."""

    def decay(t: Tensor, y: Tensor) -> Tensor:
        return -0.7 * y

    solve = prepare(decay, rtol=1e-4, atol=1e-4)
    for dtype in (F64, torch.float32, F64, torch.float32):
        y0 = Y0.to(dtype)
        mine = solve(y0, T)
        eager = ctorch.solve_ode(decay, y0, T, rtol=1e-4, atol=1e-4, gradient="none")
        assert mine.y.dtype is dtype
        torch.testing.assert_close(mine.y, eager.y, rtol=1e-5, atol=1e-5)


def test_every_call_asks_what_requires_a_gradient_now() -> None:
    field = Turning()
    field.weight.requires_grad_(False)
    solve = ctorch.ode.compile(field)
    for _ in range(2):  # the second one differs by addresses alone
        assert not solve(Y0, T).y.requires_grad
    for y0, there in ((Y0.clone().requires_grad_(), False), (Y0, True)):
        field.weight.requires_grad_(there)
        with pytest.raises(NotImplementedError, match="gradients"):
            solve(y0, T)
        with torch.no_grad():
            same(solve(y0, T), field, y0, T)
    field.weight.requires_grad_(False)
    same(solve(Y0, T), field, Y0, T)


@both_ways
def test_threads_share_a_handle(prepare: Callable[..., Any]) -> None:
    def decay(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return -rate * y

    # (some milliseconds for a call, so that calls overlap)
    solve = prepare(decay, options={"max_step": 2e-5})
    rates = [torch.tensor(0.1 * k, dtype=F64) for k in range(8)]
    want = [solve(Y0, T, rate).y for rate in rates]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            got = list(pool.map(lambda rate: solve(Y0, T, rate).y, rates))
            assert all(map(torch.equal, got, want))


class Held:
    """What a vector field may hold its values in, and how each may change."""

    rate = -0.1

    def __init__(self) -> None:
        self.net, self.gain, self.pairs = Turning(), 1.0, [1.0, [2.0]]
        self.options, self.mask = {"gain": 1.0}, torch.tensor([True, False, True])
        self.scale: Any = None
        shift = 0.5

        def shifted(y: Tensor) -> Tensor:
            return y + shift

        self.shifted = shifted

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        y = self.net(t, self.shifted(y)) * self.gain * self.pairs[0] * self.pairs[1][0]
        if self.scale is not None:
            y = y * self.scale
        y = torch.where(self.mask, y, 0.5 * y) * self.options["gain"] * SETTINGS["gain"] * GAIN
        return y if self.net.training else self.rate * y


class Other(Held):
    rate = 0.3


def recoded(function: Any) -> Any:
    shift = 0.0

    def twice(y: Tensor) -> Tensor:
        return 2 * y + shift

    function.__code__ = twice.__code__
    return function


SETTINGS, GAIN = {"gain": 0.1}, 1.0
weight = torch.linspace(-1, 0.5, 9, dtype=F64).reshape(3, 3)
CHANGES: dict[str, Callable[[Held], object]] = {
    "a number": lambda f: setattr(f, "gain", 0.5),
    "a number in a dict": lambda f: f.options.update(gain=0.3),
    "a number in a list": lambda f: f.pairs.__setitem__(0, 0.3),
    "a number in a list in a list": lambda f: f.pairs[1].__setitem__(0, 0.3),
    "a number in a global dict": lambda f: SETTINGS.update(gain=SETTINGS["gain"] * 0.9),
    "a global": lambda f: globals().update(GAIN=GAIN * 0.9),
    "a cell": lambda f: setattr(f.shifted.__closure__[0], "cell_contents", 0.1),
    "a function": lambda f: setattr(f, "shifted", lambda y: 2 * y),
    "the code of a method": lambda f: setattr(f, "shifted", recoded(f.shifted)),
    "a mask": lambda f: f.mask.logical_not_(),
    "an index behind torch's back": lambda f: f.mask.numpy().__setitem__(1, True),
    "a switch of a module": lambda f: f.net.eval(),
    "a tensor where there was none": lambda f: setattr(f, "scale", weight[0]),
    "the class": lambda f: (f.net.eval(), setattr(f, "__class__", Other)),
    "an attribute of the class": lambda f: (f.net.eval(), setattr(Held, "rate", Held.rate - 0.1)),
    "the dict": lambda f: setattr(f, "__dict__", {**f.__dict__, "gain": 0.7}),
    "a method": lambda f: setattr(f.net, "forward", lambda t, y: -y),
    "a hook": lambda f: f.net.register_forward_hook(lambda net, given, y: 0.5 * y),
    "a parameter": lambda f: setattr(f.net, "weight", nn.Parameter(weight)),
    "a parameter, in place": lambda f: f.net.weight.mul_(0.5),
    "the data of a parameter": lambda f: setattr(f.net.weight, "data", weight),
    "the strides of a parameter": lambda f: setattr(f.net.weight, "data", f.net.weight.data.t()),
    "a parameter that wants none": lambda f: setattr(
        f.net, "weight", nn.Parameter(weight.clone(), requires_grad=False)
    ),
    "what wants a gradient": lambda f: f.net.weight.requires_grad_(False),
}


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_seen_on_the_short_way(change: Callable[[Held], object]) -> None:
    field = Held()
    solve = ctorch.ode.compile(field)
    same(solve(Y0, T), field, Y0, T)
    assert solve._again(Y0, T) is not None
    change(field)
    for _ in range(3):
        same(solve(Y0, T), field, Y0, T)
    # (compiled code reads a copy of what does not lie side by side)
    assert (solve._again(Y0, T) is None) is not field.net.weight.is_contiguous()


@needs_kernels
def test_other_surroundings_are_seen_on_the_short_way() -> None:
    field = Turning()
    solve = ctorch.ode.compile(field)
    with torch.no_grad():
        solve(Y0, T)
        assert solve._again(Y0, T) is not None
    assert solve._again(Y0, T) is None
    with pytest.raises(ctorch.ode.native.Unsupported, match="gradients"):
        solve(Y0, T)
    field.weight.requires_grad_(False)
    assert solve._again(Y0, T) is None
    same(solve(Y0, T), field, Y0, T)
    same(solve(Y0, T), field, Y0, T)
    assert solve._again(Y0, T) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert solve._again(Y0, T) is None
    torch.set_default_dtype(torch.float64)
    try:
        assert solve._again(Y0, T) is None
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autograd.forward_ad.dual_level():
        assert solve._again(Y0, T) is None
        with pytest.raises(ctorch.ode.native.Unsupported, match="forward-mode"):
            solve(Y0, T)
    assert solve._again(Y0.clone().requires_grad_(), T) is None
    assert solve._again(Y0, T) is not None


@needs_kernels
@torch.no_grad()
def test_other_states_and_times_are_seen_on_the_short_way() -> None:
    field = Turning()
    solve = ctorch.ode.compile(field)
    t = T.clone()
    same(solve(Y0, t), field, Y0, t)
    for other in (T, T.flip(0), T * 0.5, torch.zeros(5, dtype=F64)):  # of the same form
        t.copy_(other)
        same(solve._again(Y0, t), field, Y0, t)
        same(solve._again(Y0 + 1, other.clone()), field, Y0 + 1, t)
    for bad in (T[[0, 2, 1, 3, 4]], T / 0, T * float("nan")):
        assert solve._again(Y0, bad) is None
        with pytest.raises(ValueError, match=r"monotone|finite"):
            solve(Y0, bad)
    unlike = torch.stack((Y0, 2 * Y0), 1)
    for y0, times in (
        (Y0, T.float()), (Y0, T[:3]), (Y0, torch.stack((T, T), 1)[:, 0]), (Y0, T[0:1]),
        (unlike[:, 1], T), (Y0[None], T), (Y0.to(torch.complex128).real, T), (Y0, T),
    ):  # fmt: skip
        for _ in range(2):
            short = solve._again(y0, times)
            assert short is None or short.y.shape == (len(times), *y0.shape)
            same(solve(y0, times), field, y0, times)
    with pytest.raises(TypeError):
        solve(Y0, None)
    with pytest.raises(ctorch.ode.native.Unsupported):
        solve((Y0,), T)


@needs_kernels
@torch.no_grad()
def test_arguments_are_read_as_they_are_on_the_short_way() -> None:
    def decay(t: Tensor, y: Tensor, rate: Tensor, more: Tensor) -> Tensor:
        return -rate * y + more.sum()

    solve = ctorch.ode.compile(decay)
    rate, more = torch.tensor(0.5, dtype=F64), torch.ones(4, dtype=F64)
    solve(Y0, T, rate, more)
    for args in ((rate, more), (rate * 2, more), (rate, more * 3)):
        assert solve._again(Y0, T, *args) is not None
        same(solve(Y0, T, *args), decay, Y0, T, *args)
    assert solve._again(Y0, T) is None
    assert solve._again(Y0, T, rate) is None
    for args in ((rate, more[:2]), (rate, more[::2]), (0.5, more)):
        assert solve._again(Y0, T, *args) is None
        same(solve(Y0, T, *args), decay, Y0, T, *args)
    with pytest.raises(TypeError, match="more"):
        solve(Y0, T, rate)


@needs_kernels
@torch.no_grad()
def test_what_changes_at_every_call_is_prepared_for_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    field, made = Turning(), []
    solve = ctorch.ode.compile(field)
    solve(Y0, T)
    prepared = next(iter(solve._known.values()))
    before = prepared.again
    monkeypatch.setattr(
        type(prepared), "again", lambda self, *given: made.append(1) or before(*given)
    )
    for k in range(40):
        field.weight = nn.Parameter(torch.full((3, 3), -0.01 * k, dtype=F64))
        same(solve(Y0, T), field, Y0, T)
    assert 1 <= len(made) <= 6


@both_ways
@torch.no_grad()
def test_every_call_reads_what_belongs_to_its_sample(prepare: Callable[..., Any]) -> None:
    """One sample of a batch, whose row of args is its own, as it is now."""

    def decay(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return -rate * y

    y0, t = torch.ones(1, 2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    solve = prepare(decay)
    kept = [torch.tensor([[0.5 * k]], dtype=F64) for k in range(4)]  # alive: other addresses
    for rate in kept:
        same(solve(y0, t, rate), decay, y0, t, rate)
        spread = rate.expand(1, 2)[:, ::2]
        same(solve(y0, t, spread), decay, y0, t, spread)
    with pytest.raises(ctorch.codegen.Untraceable, match="float32"):
        solve(y0, t, kept[0].float())
    same(solve(y0, t, kept[1]), decay, y0, t, kept[1])


@both_ways
def test_a_call_that_fails_says_why_and_the_next_one_is_made(prepare: Callable[..., Any]) -> None:
    def blow_up(t: Tensor, y: Tensor) -> Tensor:
        return y * y

    solve = prepare(blow_up, max_steps=200)
    y0 = torch.tensor([0.4], dtype=F64)
    same(solve(y0, T), blow_up, y0, T)
    with pytest.raises(ctorch.SolveError) as mine:
        solve(torch.ones(1, dtype=F64), T)
    with pytest.raises(ctorch.SolveError) as eager:
        ctorch.solve_ode(blow_up, torch.ones(1, dtype=F64), T, max_steps=200)
    assert str(mine.value).split()[:4] == str(eager.value).split()[:4]
    same(solve(y0, T), blow_up, y0, T)


@both_ways
def test_complex_states_and_many_times(prepare: Callable[..., Any]) -> None:
    def spin(t: Tensor, y: Tensor) -> Tensor:
        return 1j * t * y

    solve = prepare(spin)
    for count in (1, 2, 40):
        t, y0 = torch.linspace(0, 1, 40, dtype=F64)[:count], torch.ones(2, dtype=torch.complex128)
        same(solve(y0, t), spin, y0, t)


@needs_kernels
@torch.no_grad()
def test_solve_ode_remembers_few_fields_and_each_with_its_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_quick, "_short", {})
    y0 = torch.tensor(1.0, dtype=F64)  # of no dimension

    def decay(t: Tensor, y: Tensor) -> Tensor:
        return -0.3 * y

    def solved(field: Any, rtol: float) -> Any:
        return ctorch.solve_ode(field, y0, T, rtol=rtol, native=True, gradient="none")

    want = {rtol: solved(decay, rtol).stats.accepted for rtol in (1e-3, 1e-9)}
    assert want[1e-3] < want[1e-9]
    for rtol in (1e-3,) * 5 + (1e-9,) * 5:
        assert solved(decay, rtol).stats.accepted == want[rtol]
    assert native_quick._short[id(decay)].again is not None
    for k in range(20):  # a new function each time
        y = solved(lambda t, y, k=k: -0.1 * k * y, 1e-6).y
        assert float(y[-1]) == pytest.approx(math.exp(-0.2 * k), rel=1e-4)
    assert len(native_quick._short) <= 8
    assert native_quick._short[id(decay)].again is not None


@needs_kernels
@torch.no_grad()
def test_solve_ode_takes_times_of_single_precision() -> None:
    t = T.float()
    field = Turning()
    for _ in range(6):
        sol = ctorch.solve_ode(field, Y0, t, native=True)
        assert sol.t is t
        same(sol, field, Y0, t)
    assert native_quick._short[id(field)].again is not None


@needs_kernels
def test_solve_ode_asks_each_time_for_gradients_callbacks_and_bad_arguments() -> None:
    field = Turning()
    for _ in range(6):
        with torch.no_grad():
            ctorch.solve_ode(field, Y0, T, native=True)
    assert native_quick._short[id(field)].again is not None
    assert ctorch.solve_ode(field, Y0, T, native=True).y.requires_grad
    with torch.no_grad():
        with pytest.raises(TypeError, match="t must be"):
            ctorch.solve_ode(field, Y0, [0.0, 1.0], native=True)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="floating"):
            ctorch.solve_ode(field, Y0, torch.arange(5), native=True)
        with pytest.raises(ValueError, match="monotone"):
            ctorch.solve_ode(field, Y0, T[[0, 2, 1, 3, 4]], native=True)
        with pytest.raises(TypeError):
            ctorch.solve_ode(field, Y0, T, args=(torch.ones(1),), native=True)
        field.callback_step = lambda t, y, h: None  # type: ignore[assignment]
        with pytest.raises(NotImplementedError, match="callback"):
            ctorch.solve_ode(field, Y0, T, native=True)
