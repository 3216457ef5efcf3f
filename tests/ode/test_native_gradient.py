"""The gradient of a native solve is the eager one's: exact for the steps as they were taken."""

from __future__ import annotations

import gc
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch.codegen import Untraceable, build
from ctorch.ode.native_gradient import _Tape

from . import native_fields as fields

pytestmark = pytest.mark.usefixtures("quick_compiler")

F64 = torch.float64
T = torch.tensor([0.0, 0.0, 0.3, 1.0, 2.0], dtype=F64)


def inputs(batch: int, dtype: torch.dtype = F64) -> tuple[fields.Net, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    y0 = torch.randn(batch, 2, dtype=dtype, generator=generator).requires_grad_()
    gain = 1 + torch.rand(batch, 1, dtype=dtype, generator=generator)
    return fields.Net(dtype), y0, gain.requires_grad_()


def gradients(net: fields.Net, y0: Tensor, gain: Tensor, t: Tensor = T, **how: Any) -> list[Tensor]:
    sol = ctorch.solve_ode(net, y0, t, args=(gain,), **how)
    weights = torch.linspace(-1, 1, sol.y.numel(), dtype=y0.dtype).reshape(sol.y.shape)
    return list(torch.autograd.grad((weights * sol.y).sum(), [y0, gain, *net.parameters()]))


CASES: dict[str, dict[str, Any]] = {
    "batched": {"batched": True},
    "joint": {},
    "late and further stages": {"method": "vern7", "batched": True},
    "bosh3": {"method": "bosh3", "batched": True},
    "rk4": {"method": "rk4", "dt0": 0.11},
    "perturbed": {"method": "midpoint", "dt0": 0.11, "options": {"perturb": True}},
}


@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("how", CASES.values(), ids=list(CASES))
def test_it_is_the_eager_gradient(how: dict[str, Any], batch: int) -> None:
    net, y0, gain = inputs(batch)
    for t in (T, T.flip(0)):
        mine = gradients(net, y0, gain, t, native=True, **how)
        eager = gradients(net, y0, gain, t, **how)
        torch.testing.assert_close(mine, eager, rtol=1e-8, atol=1e-10)


def test_a_field_that_is_a_derivative_by_torch_func_has_it() -> None:
    energy, y0, _ = inputs(5)

    def hamiltonian(t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        slope = torch.func.vmap(torch.func.grad(lambda q: energy(t, q[None], 1.0).sum()))(y)
        return gain * torch.stack([slope[:, 1], -slope[:, 0]], -1)

    gain = torch.tensor(1.3, dtype=F64, requires_grad=True)
    found = []
    for native in (True, False):
        y = ctorch.solve_ode(hamiltonian, y0, T[2:], args=(gain,), native=native).y
        wanted = [y0, gain, *energy.parameters()]
        found.append(torch.autograd.grad(y[-1].sum(), wanted, materialize_grads=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_a_field_that_jumps_is_differentiated_on_the_side_it_was_taken() -> None:
    def jumping(t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        return torch.where(t < 1.0, gain, 3 * gain) * y

    _, y0, gain = inputs(5)
    t = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    # a step ends on the jump, and the next one takes over the slope from before it
    how = {"rtol": 1e3, "atol": 1e3, "dt0": 0.25, "options": {"max_step": 0.25}, "args": (gain,)}
    how["gradient"] = "backprop"
    for batched in (True, False):
        found = []
        for native in (True, False):
            sol = ctorch.solve_ode(jumping, y0, t, native=native, batched=batched, **how)
            found.append(torch.autograd.grad(sol.y[..., -1].sum(), [y0, gain]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batched", [True, False])
def test_a_solve_that_stands_still_has_no_gradient_in_what_samples_own(batched: bool) -> None:
    net, y0, gain = inputs(40)
    for _ in range(5):
        torch.full((40, 1), 7.0, dtype=F64)  # memory that gradients may find again
        found = gradients(net, y0, gain, torch.zeros(3, dtype=F64), native=True, batched=batched)
        assert torch.equal(found[1], torch.zeros_like(gain))


@pytest.mark.parametrize("how", [CASES["batched"], CASES["rk4"]], ids=["batched", "rk4"])
def test_a_wrong_one_is_refused_or_solved_eagerly_with_one_warning(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing = sys.modules["ctorch.codegen.trace"]
    right = tracing._cotangents

    def wrong(*given: Any) -> Any:
        derivative = right(*given)
        derivative.ct_own = derivative.graph.map("neg", derivative.ct_own)
        return derivative

    def decay(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        return torch.cos(t) - rate * y

    def gradient(native: bool | str) -> Tensor:
        sol = ctorch.solve_ode(decay, y0, T, args=(rate,), native=native, **how)
        return torch.autograd.grad(sol.y[-1].sum(), rate)[0]

    monkeypatch.setattr(tracing, "_cotangents", wrong)
    y0, rate = torch.ones(3, 2, dtype=F64), torch.ones(3, 1, dtype=F64, requires_grad=True)
    with pytest.raises(Untraceable, match=r"gradient with respect to args .* without native"):
        gradient(native=True)
    with pytest.warns(UserWarning, match="solving eagerly, .*gradient with respect to args"):
        found = gradient(native="try")
    assert torch.equal(found, gradient(native=False))


def test_double_backward_has_the_eager_values() -> None:
    net, y0, gain = inputs(3)
    found = []
    for native in (True, False):
        sol = ctorch.solve_ode(net, y0, T, args=(gain,), native=native)
        (first,) = torch.autograd.grad(sol.y.square().sum(), [y0], create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [y0, gain, *net.parameters()])
        found.append([first, *second])
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_threads_do_not_change_a_bit_of_it() -> None:
    net, y0, gain = inputs(200)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(gradients(net, y0, gain, native=True, batched=True))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_training_compiles_once_and_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from ctorch.codegen import build

    net, y0, gain = inputs(19)
    gradients(net, y0, gain, native=True)
    monkeypatch.setattr(build, "load", lambda source: pytest.fail("compiled again"))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
    mine = gradients(net, y0, gain, native=True)
    torch.testing.assert_close(mine, gradients(net, y0, gain), rtol=1e-8, atol=1e-10)


def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    net, y0, gain = inputs(19)
    sol = ctorch.solve_ode(net, y0, T, args=(gain,), native=True)
    with torch.no_grad():
        net.net[0].weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        sol.y.sum().backward()


def test_the_steps_are_freed_with_the_graph() -> None:
    net, y0, gain = inputs(2)

    def tapes() -> int:
        gc.collect()
        return sum(isinstance(x, _Tape) for x in gc.get_objects())

    before = tapes()
    sol = ctorch.solve_ode(net, y0, T, args=(gain,), native=True)
    assert tapes() == before + 1
    del sol
    assert tapes() == before


def of_a_network(width: int, batch: int, native: bool) -> list[Tensor]:
    net = fields.Net(F64, width)
    y0 = torch.linspace(-1.0, 1.0, 2 * batch, dtype=F64).view(batch, 2).requires_grad_()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    sol = ctorch.solve_ode(net, y0, t, rtol=1e-8, atol=1e-8, native=native)
    assert sol.stats.accepted > 4
    return list(torch.autograd.grad(sol.y.square().sum(), [y0, *net.parameters()]))


@pytest.mark.parametrize("batch", [11, 128])
def test_a_field_between_small_and_large(batch: int) -> None:
    """Where solve and gradient take other numbers of samples side by side."""
    mine, eager = (of_a_network(32, batch, native) for native in (True, False))
    torch.testing.assert_close(mine, eager, rtol=1e-9, atol=1e-9)


def test_steps_for_whose_evaluations_there_is_no_room_are_computed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With room for two steps, and for none."""
    eager = of_a_network(48, 128, False)
    for room in ("size_t{1} << 21", "0"):
        include = tmp_path / f"include{len(room)}"
        shutil.copytree(build.include_folder(), include)
        tape = include / "native/tape.h"
        assert "size_t{1} << 27" in tape.read_text()
        tape.write_text(tape.read_text().replace("size_t{1} << 27", room))
        with monkeypatch.context() as patch:
            patch.setenv("CTORCH_CACHE_DIR", str(include))
            patch.setenv("CTORCH_NATIVE_FLAGS", "-O1")
            patch.setattr(build, "include_folder", lambda folder=include: folder)
            for known in (
                "codegen.build._loaded",
                "ode.native._libraries",
                "ode.native_quick._recipes",
            ):
                patch.setattr(f"ctorch.{known}", {})
            mine = of_a_network(48, 128, True)
        torch.testing.assert_close(mine, eager, rtol=1e-9, atol=1e-9)


class Uneven(nn.Module):
    """Layers of one unit, of fewer than a register holds, of many, with a remainder."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 300, 17, 1, 3]
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList(nn.Linear(n, k, dtype=F64) for n, k in pairs)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(torch.tanh(y))
        return y


@pytest.mark.parametrize("batch", [21, 277])
def test_layers_and_batches_of_uneven_sizes_have_it(batch: int) -> None:
    """In memory that an earlier gradient has left, too, and by threads that share the samples."""
    net = Uneven()

    def solve(shift: float, native: bool = True) -> list[Tensor]:
        y0 = torch.linspace(-1, 1, 3 * batch, dtype=F64).view(batch, 3) + shift
        y0.requires_grad_()
        sol = ctorch.solve_ode(net, y0, T, rtol=1e-8, atol=1e-8, native=native)
        return list(torch.autograd.grad(sol.y.square().sum(), [y0, *net.parameters()]))

    first = solve(0.0)
    torch.testing.assert_close(first, solve(0.0, native=False), rtol=1e-9, atol=1e-9)
    solve(1.0)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, solve(0.0), first))
    finally:
        torch.set_num_threads(threads)
