"""What a field does besides: random numbers, buffers, hooks, autocast, graphs of its own."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch

from .problems import F64, Net, frozen, leaf, same, times

MODES = ["backprop", "checkpoint", "adjoint"]
every_mode = pytest.mark.parametrize("gradient", MODES)
METHODS: dict[str, dict[str, Any]] = {
    "dopri5": {"method": "dopri5", "options": frozen(0.3)},
    "adaptive": {"method": "tsit5", "rtol": 1e-3, "atol": 1e-3, "dt0": 0.9},
    "bosh3, dense outputs": {"method": "bosh3", "options": frozen(0.4)},
    "vern7, dense outputs": {"method": "vern7", "options": frozen(0.7)},
    "rk4": {"method": "rk4"},
    "explicit_adams": {"method": "explicit_adams", "options": {"step_size": 0.2}},
}
every_method = pytest.mark.parametrize("how", METHODS.values(), ids=list(METHODS))
T = times(0.0, 0.25, 0.5, 1.0)


class Dropping(nn.Module):
    """Draws random numbers at every evaluation."""

    def __init__(self, first_draw: float = -1.0) -> None:
        super().__init__()
        self.net = Net(4, 8)
        self.first_draw = first_draw

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k = self.net(t, y)
        return nn.functional.dropout(k, 0.3) if float(t) > self.first_draw else k


@every_method
@pytest.mark.parametrize("first_draw", [-1.0, 0.4], ids=["from the start", "later"])
def test_checkpoint_replays_dropout(how: dict[str, Any], first_draw: float) -> None:
    net, y0, results = Dropping(first_draw), leaf(4), []
    if "dt0" in how:  # steps that a random field does not make ever shorter
        how = {**how, "rtol": 10.0, "atol": 10.0}
    for gradient in ("backprop", "checkpoint"):
        torch.manual_seed(7)
        y = ctorch.solve_ode(net, y0, T, gradient=gradient, **how).y
        after = torch.rand(3)
        gradients = torch.autograd.grad(y.square().sum(), [y0, *net.parameters()])
        results.append((y, after, gradients, torch.rand(3)))
    (y, after, gradients, later), (y_again, after_again, gradients_again, later_again) = results
    assert torch.equal(y, y_again)
    assert torch.equal(after, after_again)
    same(gradients_again, gradients, 1e-13)
    # the backward pass leaves the generator as it found it
    assert torch.equal(later, later_again)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_second_derivatives_replay_dropout(gradient: str) -> None:
    net, y0 = Dropping(), leaf(4)
    torch.manual_seed(7)
    y = ctorch.solve_ode(net, y0, T, gradient=gradient, method="dopri5", options=frozen(0.3)).y
    wanted = [y0, *net.parameters()]
    plain = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    twice = torch.autograd.grad(y.sum(), wanted, create_graph=True)
    same([g.detach() for g in twice], plain, 1e-12)


class Counting(nn.Module):
    """Counts its evaluations in a buffer, as BatchNorm does, and through a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.hooked = 0
        self.register_forward_hook(self._hook)

    def _hook(self, *_: Any) -> None:
        self.hooked += 1

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        return self.net(t, y)


@every_mode
@every_method
def test_buffers_hooks_and_nfe_count_every_evaluation_once(
    gradient: str, how: dict[str, Any]
) -> None:
    net, y0 = Counting(), leaf(2)
    sol = ctorch.solve_ode(net, y0, T, gradient=gradient, **how)
    assert sol.stats.nfe == int(net.count) == net.hooked
    without = Counting()
    plain = ctorch.solve_ode(without, y0.detach(), T, gradient="none", **how)
    assert plain.stats.nfe == sol.stats.nfe == int(without.count)
    sol.y.sum().backward()
    assert int(net.count) == sol.stats.nfe, "the backward pass changed a buffer"
    if gradient == "backprop":
        assert sol.stats.nfe_backward == 0
        assert net.hooked == sol.stats.nfe


@pytest.mark.parametrize("how", ["closure", "bound method", "partial"])
@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_buffers_of_modules_that_func_only_holds_are_left_alone(gradient: str, how: str) -> None:
    net = Counting()
    func = {
        "closure": lambda t, y: net(t, y),
        "bound method": net.forward,
        "partial": functools.partial(Counting.forward, net),
    }[how]
    sol = ctorch.solve_ode(func, leaf(2), T, gradient=gradient)
    sol.y.sum().backward()
    assert int(net.count) == sol.stats.nfe


@every_mode
def test_batch_norm_statistics_are_those_of_the_forward_pass(gradient: str) -> None:
    states = []
    for mode in (gradient, "none"):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(3, dtype=F64)
        field = _Normed(norm)
        y0 = leaf(5, 3)
        y = ctorch.solve_ode(field, y0, T, gradient=mode, method="rk4").y
        if mode != "none":
            y.square().sum().backward()
            assert norm.weight.grad is not None
        states.append((norm.running_mean.clone(), norm.num_batches_tracked.clone()))
    for got, expected in zip(*states, strict=True):
        assert torch.equal(got, expected)


class _Normed(nn.Module):
    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.norm(y))


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_autocast_fields_keep_the_dtype_of_the_state(gradient: str, dtype: torch.dtype) -> None:
    net = nn.Linear(4, 4).to(dtype)
    y0 = torch.linspace(-1, 1, 4, dtype=dtype, requires_grad=True)
    seen: list[torch.dtype] = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        k = net(y)
        seen.append(k.dtype)
        return k

    with torch.autocast("cpu", torch.bfloat16):
        sol = ctorch.solve_ode(
            field, y0, torch.tensor([0.0, 1.0]), gradient=gradient, method="rk4", dt0=0.25
        )
    assert sol.y.dtype is dtype
    forward = len(seen)
    (g,) = torch.autograd.grad(sol.y[-1].sum(), [y0])
    assert g.dtype is dtype
    if dtype is torch.float32:  # autocast leaves float64 alone
        assert set(seen) == {torch.bfloat16}, "recomputation did not restore autocast"
    if gradient != "backprop":
        assert len(seen) > forward
    exact = ctorch.solve_ode(field, y0, torch.tensor([0.0, 1.0]), method="rk4", dt0=0.25)
    torch.testing.assert_close(sol.y, exact.y, rtol=0.05, atol=0.05)


@every_mode
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "bdf2", "implicit_adams", "taylor"])
@pytest.mark.parametrize("batched", [False, True])
def test_autocast_is_for_the_field_alone(gradient: str, method: str, batched: bool) -> None:
    def solved(autocast: bool) -> list[Tensor]:
        y0 = torch.linspace(0.2, 1, 8).reshape(4, 2).requires_grad_()
        rate = torch.tensor(0.7, requires_grad=True)
        t = torch.linspace(0, 2, 9, requires_grad=True)
        fixed = {"dt0": 0.25} if method in ("rk4", "implicit_adams") else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sol = ctorch.solve_ode(
                lambda t, y: -rate * y,  # which autocast leaves alone
                y0, t, method=method, gradient=gradient, batched=batched, **fixed,
            )  # fmt: skip
            loss = (sol.y * torch.linspace(0.5, 1.5, sol.y.numel()).view_as(sol.y)).square().sum()
            return [sol.y.detach(), *torch.autograd.grad(loss, (y0, rate, t))]

    if batched and (gradient == "adjoint" or method not in ("dopri5", "bosh3", "taylor")):
        pytest.skip("not built")
    for found, exact in zip(solved(True), solved(False), strict=True):
        if method == "taylor":
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found, exact)


class Flow(nn.Module):
    """A continuous normalizing flow's field: Hutchinson's divergence, by autograd inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(3, 6)
        self.probe = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]], dtype=F64)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = state
        with torch.enable_grad():
            x.requires_grad_(True)
            dx = self.net(t, x)
            (product,) = torch.autograd.grad(dx, x, self.probe, create_graph=True)
        return dx, -(product * self.probe).sum(1)


class PlainFlow(Flow):
    """The same in plain operations."""

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = state
        net = self.net
        time = t.expand(2, 1).to(x.dtype)
        inner = torch.tanh(net.inner(torch.cat([x, time], -1)))
        pushed = (self.probe @ net.inner.weight[:, :3].T) * (1 - inner**2)
        return net.outer(inner), -((pushed @ net.outer.weight.T) * self.probe).sum(1)


@pytest.mark.parametrize("grad_y0", [False, True])
@pytest.mark.parametrize("gradient", [*MODES, "odeint", "odeint_adjoint"])
def test_a_flow_that_differentiates_inside_trains(gradient: str, grad_y0: bool) -> None:
    results = []
    for field in (Flow(), PlainFlow()):
        x = leaf(2, 3).detach().requires_grad_(grad_y0)
        y0, t = (x, torch.zeros(2, dtype=F64)), times(0.0, 1.0)
        tight = {"rtol": 1e-9, "atol": 1e-9}
        if gradient.startswith("odeint"):
            y, logp = getattr(ctorch, gradient)(field, y0, t, **tight)
        else:
            y, logp = ctorch.solve_ode(field, y0, t, gradient=gradient, **tight).y
        loss = y[-1].square().sum() - logp[-1].sum()
        wanted = [*field.parameters(), *([x] if grad_y0 else [])]
        results.append(torch.autograd.grad(loss, wanted))
    same(results[0], results[1], 1e-6 if "adjoint" in gradient else 1e-11)


@pytest.mark.parametrize("gradient", [*MODES, "none"])
def test_a_field_that_changes_its_state_in_place_is_an_error(gradient: str) -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return y.mul_(-1.0)

    y0 = leaf(2) if gradient != "none" else leaf(2).detach()
    with pytest.raises(RuntimeError, match=r"in place|in-place"):
        ctorch.solve_ode(field, y0, T, gradient=gradient).y.sum().backward()


@every_mode
def test_a_solve_is_deterministic(gradient: str) -> None:
    """The same bits, again and with another number of threads."""
    net, y0 = Net(8, 32), leaf(1000, 8)
    results = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        sol = ctorch.solve_ode(net, y0, times(0.0, 0.5), gradient=gradient, rtol=1e-4, atol=1e-4)
        results.append((sol.y, sol.stats.nfe, torch.autograd.grad(sol.y.sum(), y0)[0]))
    for y, nfe, g in results[1:]:
        assert nfe == results[0][1]
        assert torch.equal(y, results[0][0])
        if (
            gradient != "adjoint"
        ):  # its steps hang on products of matrices, which BLAS sums as it likes
            assert torch.equal(g, results[0][2])
    assert torch.equal(results[0][2], results[1][2])


SOLVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batched": {"batched": True},
    "dense": {"dense": True},
    "rk4": {"method": "rk4"},
    "explicit_adams": {"method": "explicit_adams", "options": {"step_size": 0.2}},
}


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("how", SOLVES.values(), ids=list(SOLVES))
def test_a_solution_that_is_dropped_frees_its_graph_at_once(
    how: dict[str, Any], gradient: str
) -> None:
    y0, weight = leaf(3, 4), leaf(4)
    held = weakref.ref(weight)  # by the graph, in the end by it alone
    gc.collect()
    gc.disable()
    try:
        solution = ctorch.solve_ode(
            lambda t, y, w: y.sin() * w, y0, T, gradient=gradient, args=(weight,), **how
        )
        del weight
        assert held() is not None
        del solution
        assert held() is None
    finally:
        gc.enable()


def test_the_users_tensors_are_left_alone() -> None:
    y0, t = leaf(2).detach(), times(0.0, 1.0)
    before = y0.clone()
    net = Net()
    ctorch.solve_ode(net, y0, t).y.sum().backward()
    assert not y0.requires_grad
    assert torch.equal(y0, before)
    assert t.grad is None
