"""odeint_adjoint and the callbacks: what torchdiffeq's users rely on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch

from .problems import F64, Net, leaf, same, times

T = times(0.0, 0.5, 1.0)
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


class TestErrors:
    def test_a_function_needs_adjoint_params(self) -> None:
        with pytest.raises(ValueError, match=r"nn\.Module"):
            ctorch.odeint_adjoint(lambda t, y: -y, leaf(2), T)
        ctorch.odeint_adjoint(lambda t, y: -y, leaf(2), T, adjoint_params=())

    def test_another_method_needs_options_of_its_own(self) -> None:
        how = {"method": "rk4", "options": {"step_size": 0.1}, "adjoint_method": "euler"}
        with pytest.raises(ValueError, match="adjoint_options"):
            ctorch.odeint_adjoint(Net(), leaf(2), T, **how)
        ctorch.odeint_adjoint(Net(), leaf(2), T, adjoint_options={"step_size": 0.1}, **how)

    def test_an_unknown_norm_is_named(self) -> None:
        with pytest.raises(ValueError, match="seminorm"):
            ctorch.odeint_adjoint(Net(), leaf(2), T, adjoint_options={"norm": 3})


def test_listed_parameters_alone_get_gradients() -> None:
    net, y0 = Net(), leaf(2)
    listed = (net.outer.weight,)
    y = ctorch.odeint_adjoint(net, y0, T, adjoint_params=listed, **TIGHT)
    y.sum().backward()
    assert net.outer.weight.grad is not None
    assert net.inner.weight.grad is None
    exact = torch.autograd.grad(ctorch.odeint(net, y0, T, **TIGHT).sum(), net.outer.weight)
    same([net.outer.weight.grad], exact, 1e-6)


def test_a_listed_parameter_without_gradient_is_left_out_with_a_warning() -> None:
    net, y0 = Net(), leaf(2)
    net.inner.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="without requiring gradient"):
        y = ctorch.odeint_adjoint(
            net, y0, T,
            adjoint_params=tuple(net.parameters()),
            adjoint_options={"norm": lambda parts: parts[0].abs().max()},
        )  # fmt: skip
    y.sum().backward()
    assert net.inner.weight.grad is None
    assert net.outer.weight.grad is not None


def test_unused_parameters_get_zeros() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2, dtype=F64), nn.Linear(2, 2, dtype=F64)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(self.used(y))

    field = Field()
    ctorch.odeint_adjoint(field, leaf(2), T).sum().backward()
    assert field.unused.weight.grad is not None
    assert not field.unused.weight.grad.any()
    assert field.used.weight.grad is not None
    assert field.used.weight.grad.any()


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "midpoint", "implicit_adams"])
def test_the_backward_solve_may_have_another_method(method: str) -> None:
    net, y0 = Net(), leaf(2)
    fixed = method not in ("dopri5", "bosh3")
    options = {"step_size": 0.02} if fixed else {}
    y = ctorch.odeint_adjoint(
        net, y0, T, adjoint_method=method, adjoint_options=options, adjoint_rtol=1e-7,
        adjoint_atol=1e-7, **TIGHT,
    )  # fmt: skip
    wanted = [y0, *net.parameters()]
    exact = torch.autograd.grad(ctorch.odeint(net, y0, T, **TIGHT).sum(), wanted)
    same(torch.autograd.grad(y.sum(), wanted), exact, 1e-3 if method == "midpoint" else 1e-4)


def test_looser_adjoint_tolerances_evaluate_less() -> None:
    calls = []
    for tol in (1e-10, 1e-3):
        net, y0 = Net(), leaf(2)
        count = [0]
        net.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        y = ctorch.odeint_adjoint(net, y0, T, adjoint_rtol=tol, adjoint_atol=tol, **TIGHT)
        before = count[0]
        y.sum().backward()
        calls.append(count[0] - before)
    assert calls[1] < 0.5 * calls[0]


class TestNorms:
    def run(self, options: dict[str, Any] | None, tuple_state: bool = False) -> tuple[Any, int]:
        net, y0 = Net(), leaf(2)
        calls = [0]

        class Field(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, t: Tensor, y: Any) -> Any:
                calls[0] += 1
                return (net(t, y[0]), -y[1]) if tuple_state else net(t, y)

        state = (y0, torch.ones(3, dtype=F64)) if tuple_state else y0
        y = ctorch.odeint_adjoint(Field(), state, T, adjoint_options=options, rtol=1e-7)
        before = calls[0]
        (y[0].sum() + y[1].sum() if tuple_state else y.sum()).backward()
        return y, calls[0] - before

    def test_the_seminorm_does_not_evaluate_more(self) -> None:
        assert self.run({"norm": "seminorm"})[1] <= self.run(None)[1]

    def test_a_function_gets_time_state_adjoint_and_parameters(self) -> None:
        seen = set()

        def norm(parts: tuple[Tensor, ...]) -> Tensor:
            seen.add(tuple(tuple(p.shape) for p in parts))
            return torch.stack([p.abs().max() for p in parts[:3]]).max()

        parameters = tuple(tuple(p.shape) for p in Net().parameters())
        self.run({"norm": norm})
        assert seen == {((), (2,), (2,), *parameters)}
        seen.clear()
        self.run({"norm": norm}, tuple_state=True)
        assert seen == {((), (2,), (3,), (2,), (3,), *parameters)}

    def test_a_larger_norm_evaluates_more(self) -> None:
        def norm(parts: tuple[Tensor, ...]) -> Tensor:
            return 1e5 * torch.stack([p.abs().max() for p in parts]).max()

        assert self.run({"norm": norm})[1] > 1.3 * self.run(None)[1]

    def test_the_norm_can_be_replaced_in_the_graph_before_backward(self) -> None:
        """torchdiffeq's own tests do this."""
        used = []
        net, y0 = Net(), leaf(2)
        y = ctorch.odeint_adjoint(net, y0, T)
        options = y.grad_fn.adjoint_options
        original = options["norm"]

        def spy(parts: tuple[Tensor, ...]) -> Tensor:
            used.append(len(parts))
            return original(parts)

        options["norm"] = spy
        y.sum().backward()
        assert set(used) == {3 + len(list(net.parameters()))}

    def test_for_tuples_the_node_lies_behind_a_view_and_a_slice(self) -> None:
        class Pair(nn.Module):
            def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                return -y[0], -y[1]

        y = ctorch.odeint_adjoint(Pair(), (leaf(2), leaf(3)), T)
        node = y[0].grad_fn.next_functions[0][0].next_functions[0][0]
        assert "norm" in node.adjoint_options


class Noting(nn.Module):
    """A field that notes all callbacks."""

    def __init__(self, tuple_state: bool = False) -> None:
        super().__init__()
        self.net = Net()
        self.tuple_state = tuple_state
        self.seen: dict[str, list[tuple[float, Any, float]]] = {}
        for kind in ("step", "accept_step", "reject_step"):
            for suffix in ("", "_adjoint"):
                name = f"callback_{kind}{suffix}"
                self.seen[name] = []
                setattr(self, name, self._noter(name))

    def _noter(self, name: str) -> Any:
        def note(t: Tensor, y: Any, dt: Tensor) -> None:
            assert isinstance(t, Tensor)
            assert isinstance(dt, Tensor)
            self.seen[name].append((float(t), y, float(dt)))

        return note

    def forward(self, t: Tensor, y: Any) -> Any:
        if self.tuple_state:
            return self.net(t, y[0]), torch.sin(20 * t) * y[1]
        return self.net(t, y) + torch.sin(20 * t)

    def count(self, name: str) -> int:
        return len(self.seen[f"callback_{name}"])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tuple_state", [False, True])
def test_adaptive_callbacks_see_every_step(reverse: bool, tuple_state: bool) -> None:
    field = Noting(tuple_state)
    y0: Any = (leaf(2), leaf(3)) if tuple_state else leaf(2)
    t = T.flip(0) if reverse else T
    y = ctorch.odeint_adjoint(field, y0, t, rtol=1e-5, atol=1e-5, options={"first_step": 0.9})
    assert field.count("step") == field.count("accept_step") + field.count("reject_step")
    assert field.count("reject_step") > 0
    for time, state, dt in field.seen["callback_accept_step"]:
        assert dt > 0
        assert -0.5 <= time <= 1.5
        if tuple_state:
            assert [x.shape for x in state] == [(2,), (3,)]
        else:
            assert state.shape == (2,)
    starts = [time for time, *_ in field.seen["callback_accept_step"]]
    assert starts == sorted(starts, reverse=reverse), "time is the field's own, not a mirrored one"
    assert starts[0] == float(t[0])
    assert field.count("step_adjoint") == 0
    (y[0].sum() if tuple_state else y.sum()).backward()
    back = [time for time, *_ in field.seen["callback_accept_step_adjoint"]]
    assert len(back) >= 2
    assert back[0] == float(t[-1])
    assert field.count("step_adjoint") == len(back) + field.count("reject_step_adjoint")


def test_fixed_steps_call_one_callback_and_warn_of_the_others() -> None:
    class Field(nn.Module):
        steps = 0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            self.steps += 1

    field = Field()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctorch.odeint(field, leaf(2), T, method="rk4")
    assert field.steps == 2
    field.callback_reject_step = field.callback_step  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="callback_reject_step"):
        ctorch.odeint(field, leaf(2), T, method="rk4")
    if pytest.importorskip("scipy"):
        with pytest.warns(UserWarning, match="callback_step"), torch.no_grad():
            ctorch.odeint(field, leaf(2), T, method="scipy_solver")
