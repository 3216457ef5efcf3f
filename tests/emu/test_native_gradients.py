"""Gradients by the kernels of native solves, run on the CPU, are those of the other solvers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.codegen import cuda
from ctorch.ode import native_cuda
from tests.emu.native_kernels import emulated_device, needs_compiler
from tests.ode import native_fields as fields

pytestmark = needs_compiler
F64 = torch.float64
T = torch.tensor([0.0, 0.0, 0.3, 1.0, 2.0], dtype=F64)
SAMPLES = cuda.BLOCK + 5  # a block and a part of one


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For compiled code of this module, by a compiler that does not try hard."""
    made = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTORCH_CACHE_DIR", str(made))
        patch.setenv("CTORCH_NATIVE_FLAGS", "-O1")
        yield made


def inputs(dtype: torch.dtype = F64) -> tuple[fields.Net, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    y0 = torch.randn(SAMPLES, 2, dtype=dtype, generator=generator).requires_grad_()
    gain = 1 + torch.rand(SAMPLES, 1, dtype=dtype, generator=generator)
    return fields.Net(dtype, 8), y0, gain.requires_grad_()


def loss(y: Tensor) -> Tensor:
    return (torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) * y).sum()


def gradients(net: fields.Net, y0: Tensor, gain: Tensor, t: Tensor = T, **how: Any) -> list[Tensor]:
    sol = ctorch.solve_ode(net, y0, t, args=(gain,), **how)
    return list(torch.autograd.grad(loss(sol.y), [y0, gain, *net.parameters()]))


CASES: dict[str, dict[str, Any]] = {
    "batched": {"batched": True},
    "joint, late and further stages": {"method": "vern7"},
    "fixed, perturbed": {"method": "midpoint", "dt0": 0.11, "options": {"perturb": True}},
}


@pytest.mark.parametrize("how", CASES.values(), ids=list(CASES))
def test_it_is_the_eager_gradient(how: dict[str, Any], folder: Path) -> None:
    net, y0, gain = inputs()
    for t in (T, T.flip(0)):
        with emulated_device(folder):
            mine = gradients(net, y0, gain, t, native=True, **how)
        eager = gradients(net, y0, gain, t, **how)
        torch.testing.assert_close(mine, eager, rtol=1e-8, atol=1e-10)


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
