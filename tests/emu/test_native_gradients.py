"""Gradients by the kernels of native solves, run on the CPU, are those of the other solvers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.codegen import cuda
from ctorch.ode import native_cuda
from tests.emu.native_kernels import Emulated, emulated_device, needs_compiler
from tests.ode import native_fields as fields

pytestmark = [needs_compiler, pytest.mark.usefixtures("folder")]
F64 = torch.float64
T = torch.tensor([0.0, 0.0, 0.3, 1.0, 2.0], dtype=F64)
SAMPLES = cuda.BLOCK + 5  # a block and a part of one


def inputs(dtype: torch.dtype = F64) -> tuple[fields.Net, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    y0 = torch.randn(SAMPLES, 2, dtype=dtype, generator=generator).requires_grad_()
    gain = 1 + torch.rand(SAMPLES, 1, dtype=dtype, generator=generator)
    return fields.Net(dtype, 8), y0, gain.requires_grad_()


def loss(y: Tensor) -> Tensor:
    return (torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) * y).sum()


def gradients(net: fields.Net, y0: Tensor, gain: Tensor, t: Tensor = T, **how: Any) -> list[Tensor]:
    sol = ctorch.solve_ode(net, y0, t, args=(gain,), **how)
    wanted = [y0, gain, *net.parameters(), *[t] * t.requires_grad]
    return list(torch.autograd.grad(loss(sol.y), wanted))


CASES: dict[str, dict[str, Any]] = {
    "batched": {"batched": True},
    "joint, late and further stages": {"method": "vern7"},
    "fixed, perturbed": {"method": "midpoint", "dt0": 0.11, "options": {"perturb": True}},
}


@pytest.mark.parametrize("how", CASES.values(), ids=list(CASES))
def test_it_is_the_eager_gradient(how: dict[str, Any], folder: Path) -> None:
    net, y0, gain = inputs()
    for t in (T, T.clone().requires_grad_(), T.flip(0).requires_grad_()):
        with emulated_device(folder):
            mine = gradients(net, y0, gain, t, native=True, **how)
        eager = gradients(net, y0, gain, t, **how)
        torch.testing.assert_close(mine, eager, rtol=1e-8, atol=1e-10)


def test_times_of_samples_have_gradients(folder: Path) -> None:
    net, y0, gain = inputs()
    t = (
        T * torch.linspace(-1, 2, SAMPLES, dtype=F64)[:, None]
    ).requires_grad_()  # one stands still
    with emulated_device(folder):
        mine = gradients(net, y0, gain, t, native=True, batched=True)
    eager = gradients(net, y0, gain, t, batched=True)
    torch.testing.assert_close(mine, eager, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("moves", [True, False], ids=["moving", "constant"])
def test_a_grid_that_moves_has_gradients(moves: bool, folder: Path) -> None:
    net, y0, gain = inputs()
    how: dict[str, Any] = {"method": "midpoint", "options": {"grid_constructor": None}}
    found, ends = [], torch.linspace(0, 1, 7, dtype=F64)
    for native in (True, False):
        t = T.clone().requires_grad_()
        how["options"]["grid_constructor"] = lambda f, y, t: (t if moves else t.detach())[-1] * ends
        with emulated_device(folder):
            found.append(gradients(net, y0, gain, t, native=native, **how))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_a_block_goes_back_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its samples do alone, wherever it adds up the gradients of the weights."""
    net, y0, gain = inputs()
    net, t = fields.Net(F64, 34), T.clone().requires_grad_()
    how: dict[str, Any] = {"batched": True, "method": "bosh3", "rtol": 1e-3, "atol": 1e-3}
    asked: list[int] = []
    launch = cuda.launch
    monkeypatch.setattr(
        cuda, "launch", lambda *given: asked.append(sum(given[3:])) or launch(*given)
    )

    def made() -> list[Tensor]:
        asked.clear()
        with emulated_device(folder):
            return gradients(net, y0, gain, t, native=True, **how)

    mine = made()
    assert max(asked) == 8 * sum(x.numel() for x in net.parameters())
    torch.testing.assert_close(mine, gradients(net, y0, gain, t, **how), rtol=1e-8, atol=1e-10)
    assert all(map(torch.equal, made(), mine))
    monkeypatch.setattr(Emulated, "room", 1 << 10)
    assert all(map(torch.equal, made(), mine))
    assert max(asked) == 0
    monkeypatch.setattr(native_cuda, "_MOST_BLOCKS", 1)  # it takes several tiles of samples
    torch.testing.assert_close(made(), mine, rtol=1e-12, atol=1e-12)


def test_a_kernel_of_too_many_registers_goes_back_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one of few does the same, where slopes of some samples have no derivative."""
    net = fields.Net(F64, 34)

    def stopping(t: Tensor, y: Tensor, end: Tensor) -> Tensor:
        return torch.sqrt((end - t).clamp(min=0) * y) + 0.1 * net(t, y)

    y0 = torch.rand(5, 2, dtype=F64).add_(1).requires_grad_()
    end = torch.tensor([2.0, 1.0, 1.0, 2.0, 1.0], dtype=F64)[:, None].requires_grad_()
    t = torch.tensor([0.0, 0.999, 1.0], dtype=F64, requires_grad=True)
    found = []
    for threads in (cuda.BLOCK, cuda.BLOCK - 1):
        monkeypatch.setattr(Emulated, "threads", threads)
        with emulated_device(folder):
            sol = ctorch.solve_ode(stopping, y0, t, args=(end,), native=True, batched=True)
        total = sol.y[[0, 3], 1].sum() + sol.y[:, 2].sum()
        found.append(torch.autograd.grad(total, [y0, end, t, *net.parameters()]))
    assert all(bool(x.isfinite().all()) for x in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_it_is_the_gradient_on_the_cpu(folder: Path) -> None:
    net, y0, gain = inputs(torch.float32)
    how = {"rtol": 1e-4, "atol": 1e-4, "native": True, "batched": True, "method": "bosh3"}
    expected = gradients(net, y0, gain, **how)
    with emulated_device(folder):
        mine = gradients(net, y0, gain, **how)
    torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-4)


def test_a_thread_that_takes_several_samples_adds_them_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, y0, gain = inputs()
    with emulated_device(folder):
        expected = gradients(net, y0, gain, native=True, batched=True)
        again = gradients(net, y0, gain, native=True, batched=True)
        monkeypatch.setattr(native_cuda, "_MOST_SUMS", 1)
        mine = gradients(net, y0, gain, native=True, batched=True)
    assert all(map(torch.equal, again, expected))
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    # only the order of the sums is another
    assert all(map(torch.equal, mine[:2], expected[:2]))
    assert not all(map(torch.equal, mine[2:], expected[2:]))


def test_parameters_without_a_gradient_get_none(folder: Path) -> None:
    net, y0, gain = inputs()
    net.net[2].requires_grad_(False)
    with emulated_device(folder):
        sol = ctorch.solve_ode(net, y0, T, args=(gain,), native=True, batched=True)
        loss(sol.y).backward()
    assert net.net[2].weight.grad is None
    assert y0.grad is not None
    eager = ctorch.solve_ode(net, y0, T, args=(gain,), batched=True)
    wanted = [y0, gain, net.net[0].weight, net.net[4].bias]
    expected = torch.autograd.grad(loss(eager.y), wanted)
    torch.testing.assert_close([x.grad for x in wanted], list(expected), rtol=1e-8, atol=1e-10)


def test_a_field_that_jumps_is_differentiated_on_the_side_it_was_taken(folder: Path) -> None:
    def jumping(t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        return torch.where(t < 1.0, gain, 3 * gain) * y

    _, y0, gain = inputs()
    t = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    # a step ends on the jump, and the next one takes over the slope from before it
    how = {"rtol": 1e3, "atol": 1e3, "dt0": 0.25, "options": {"max_step": 0.25}, "args": (gain,)}
    found = []
    for native in (True, False):
        with emulated_device(folder):
            sol = ctorch.solve_ode(jumping, y0, t, native=native, batched=True, **how)
        found.append(torch.autograd.grad(sol.y[..., -1].sum(), [y0, gain]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_samples_that_failed_pull_back_what_they_reached(folder: Path) -> None:
    y0 = torch.linspace(0.1, 0.9, 9, dtype=F64)[:, None].requires_grad_()
    how: dict[str, Any] = {"batched": True, "throw": False, "max_steps": 300, "native": True}
    t = torch.tensor([0.0, 1.0, 2.0], dtype=F64)

    def gradient() -> Tensor:
        sol = ctorch.solve_ode(fields.blow_up, y0, t, **how)
        assert sol.y.isnan().any()
        return torch.autograd.grad(sol.y[:, 1].sum() + sol.y[:4].sum(), y0)[0]

    expected = gradient()
    with emulated_device(folder):
        torch.testing.assert_close(gradient(), expected, rtol=1e-8, atol=1e-8)


def test_rows_before_a_failure_have_gradients(folder: Path) -> None:
    """The steps behind them lead up to where the field has no derivative."""
    y0 = torch.tensor([[1.0], [-8.0], [-6.0]], dtype=F64, requires_grad=True)
    gain = torch.tensor(1.0, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.1, 2.0], dtype=F64)
    found = []
    for native in (True, False):
        with emulated_device(folder):
            sol = ctorch.solve_ode(
                lambda t, y: gain * (torch.sqrt(1.5 - y) + 1), y0, t, batched=True, throw=False,
                native=native,
            )  # fmt: skip
        assert sol.status.ne(0).tolist() == [True, False, False]
        found.append(torch.autograd.grad(sol.y[:, 1].sum() + sol.y[1, 2].sum(), [y0, gain]))
    assert bool(found[0][0].isfinite().all())
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def test_a_slope_without_a_cotangent_needs_no_derivative(folder: Path) -> None:
    def stopping(t: Tensor, y: Tensor) -> Tensor:
        return torch.sqrt((0.99 - t).clamp(min=0) * y)

    y0 = torch.rand(5, 2, dtype=F64).add_(1).requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=F64)
    # the root is zero in the last stage alone, which y1 does not read
    how = {"method": "bosh3", "rtol": 1e3, "atol": 1e3, "dt0": 0.25, "options": {"max_step": 0.25}}
    with emulated_device(folder):
        sol = ctorch.solve_ode(stopping, y0, t, native=True, batched=True, **how)
    mine = torch.autograd.grad(sol.y[:, 1].sum(), y0)
    sol = ctorch.solve_ode(stopping, y0, t, native=True, batched=True, **how)
    torch.testing.assert_close(mine, torch.autograd.grad(sol.y[:, 1].sum(), y0))
    assert bool(mine[0].isfinite().all())


@pytest.mark.parametrize("batched", [True, False])
def test_a_solve_that_stands_still_has_no_gradient_in_what_samples_own(
    batched: bool, folder: Path
) -> None:
    net, y0, gain = inputs()
    with emulated_device(folder):
        torch.full((SAMPLES, 1), 7.0, dtype=F64)  # memory that gradients may find again
        found = gradients(net, y0, gain, torch.zeros(3, dtype=F64), native=True, batched=batched)
    assert torch.equal(found[0], loss_rows(y0, batched))
    assert all(not x.any() for x in found[1:])


def loss_rows(y0: Tensor, batched: bool) -> Tensor:
    """The gradient of the loss where all rows are y0."""
    rows = torch.stack([y0, y0, y0], 1 if batched else 0)
    return torch.autograd.grad(loss(rows), y0)[0]


COMPLEX: dict[str, dict[str, Any]] = {
    "batched": {"batched": True},
    "joint": {},
    "joint, largest error": {"options": {"norm": "max"}},
}


def turning(t: Tensor, y: Any, gain: Tensor) -> Any:
    """Of complex numbers, in one tensor or two."""
    if isinstance(y, Tensor):
        return 1j * gain * y - 0.1 * y * y.conj().flip(-1)
    z, w = y
    return 1j * gain * z - 0.1 * w.sum(-1, keepdim=True), 0.5 * w * z.conj()


@pytest.mark.parametrize("how", COMPLEX.values(), ids=list(COMPLEX))
def test_complex_states(how: dict[str, Any], folder: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    leaves = [
        torch.randn(SAMPLES, n, dtype=torch.complex128, generator=generator).requires_grad_()
        for n in (1, 2)
    ]
    y0 = tuple(leaves) if "batched" in how else leaves[1]
    gain = inputs()[2]
    how = {"args": (gain,), "rtol": 1e-5, "atol": 1e-6, **how}
    found = []
    for native in (True, False):
        with emulated_device(folder):
            sol = ctorch.solve_ode(turning, y0, T[:4], native=native, **how)
        rows = sol.y if isinstance(sol.y, tuple) else (sol.y,)
        numbers = torch.cat([torch.view_as_real(x).flatten() for x in rows])
        counts = [torch.as_tensor(x) for x in (sol.stats.accepted, sol.stats.rejected)]
        wanted = [*(y0 if isinstance(y0, tuple) else (y0,)), gain]
        found.append((rows, counts, torch.autograd.grad(loss(numbers), wanted)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)


def test_one_system_of_all_samples(folder: Path) -> None:
    pull = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def pulled(t: Tensor, y: Tensor) -> Tensor:
        return pull * y.mean(0) - y**3

    y0 = inputs()[1][:6].detach().requires_grad_()
    found = []
    for native in (True, False):
        with emulated_device(folder):
            sol = ctorch.solve_ode(pulled, y0, T, native=native)
        found.append(torch.autograd.grad(loss(sol.y), [y0, pull]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_times_that_were_changed_in_place_are_noticed(folder: Path) -> None:
    net, y0, gain = inputs()
    t = T.clone()
    with emulated_device(folder):
        sol = ctorch.solve_ode(net, y0, t, args=(gain,), native=True, batched=True)
    t.numpy()[-1] = 9.0  # unseen by torch
    with pytest.raises(RuntimeError, match="changed in place"):
        loss(sol.y).backward()
