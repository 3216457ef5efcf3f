"""States and arguments other than a real tensor are solved natively as the eager solver does,
with its gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import ctorch

pytestmark = pytest.mark.usefixtures("quick_compiler")

F32, F64 = torch.float32, torch.float64
T = torch.tensor([0.0, 0.3, 1.0, 2.0], dtype=F64)


def drawn(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * len(shape))
    return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()


def solved(func: Any, y0: Any, args: Any, t: Tensor = T, **how: Any) -> tuple[Any, list[Tensor]]:
    """The solution, and gradients for all that is given."""
    t = t.clone().requires_grad_()
    inputs = [x for x in pytree.tree_leaves((y0, t, args)) if isinstance(x, Tensor)]
    inputs = [x for x in inputs if x.requires_grad]
    sol = ctorch.solve_ode(func, y0, t, args=args, **how)
    loss = torch.zeros((), dtype=F64)
    for leaf in pytree.tree_leaves(sol.y):
        numbers = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        weights = torch.linspace(-1, 2, numbers.numel(), dtype=F64).reshape(numbers.shape)
        loss = loss + (weights * numbers).sum()
    return sol, list(torch.autograd.grad(loss, inputs, materialize_grads=True))


def agree(func: Any, y0: Any, args: Any, tolerance: float = 1e-9, **how: Any) -> None:
    """Solution, statistics and gradients are the eager ones."""
    (mine, mine_grads), (eager, grads) = (
        solved(func, y0, args, native=native, **how) for native in (True, False)
    )
    assert pytree.tree_structure(mine.y) == pytree.tree_structure(eager.y)
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(mine.y, eager.y, **close)
    torch.testing.assert_close(mine_grads, grads, **close)
    for name in ("accepted", "rejected"):
        torch.testing.assert_close(getattr(mine.stats, name), getattr(eager.stats, name))


# -- several tensors
# ------------------------------------------------------------------------------------------


def coupled(t: Tensor, y: dict[str, Any], p: dict[str, Any]) -> dict[str, Any]:
    """Tensors of several shapes, nested, that act on each other; p as nested as they are."""
    slow, (fast, matrix) = y["slow"], y["rest"]
    rate, (phase,) = p["rate"], p["more"]
    pulled = -rate * slow + torch.tanh(fast).sum(-1, keepdim=True)
    pushed = fast * torch.cos(t) * phase - slow
    return {"slow": pulled, "rest": [pushed, p["scale"] * matrix - 0.1 * slow[..., None]]}


def coupled_inputs(*lead: int) -> tuple[Any, Any]:
    # one tensor is float32: the state is float64, and its gradient float32
    y0 = {"slow": drawn(*lead, 1), "rest": (drawn(*lead, 3, dtype=F32), drawn(*lead, 2, 2))}
    p = {"rate": drawn(*lead, 1, seed=1), "more": (drawn(3, seed=2),), "scale": 0.1}
    return y0, (p,)


WAYS: dict[str, dict[str, Any]] = {
    "joint": {},
    "fixed steps": {"method": "rk4", "dt0": 0.1},
    "further stages": {"method": "vern7"},
    "a tolerance for each": {"rtol": (1e-3, 1e-5, 1e-4), "atol": 1e-6},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("lead", [(), (4,)], ids=["", "with samples"])
def test_several_tensors(lead: tuple[int, ...], how: dict[str, Any]) -> None:
    y0, args = coupled_inputs(*lead)
    agree(coupled, y0, args, 2e-7, **how)  # a gradient in float32


@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("how", [WAYS["joint"], WAYS["a tolerance for each"]], ids=["", "each"])
def test_several_tensors_of_samples(how: dict[str, Any], batch: int) -> None:
    y0, args = coupled_inputs(batch)
    agree(coupled, y0, args, 2e-7, batched=True, **how)


def test_the_error_is_that_of_the_worst_tensor() -> None:
    def two(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.sin(9 * t) * y[0], -0.01 * y[1]

    for sizes in ((1, 50), (50, 1)):  # over all numbers together the error would be another
        y0 = tuple(torch.ones(n, dtype=F64) for n in sizes)
        agree(two, y0, ())


def test_double_backward_of_several_tensors() -> None:
    y0, args = coupled_inputs(2)
    found = []
    for native in (True, False):
        sol = ctorch.solve_ode(coupled, y0, T, args=args, native=native)
        inputs = [x for x in pytree.tree_leaves((y0, args)) if isinstance(x, Tensor)]
        loss = sum(x.square().sum() for x in pytree.tree_leaves(sol.y))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        total = sum(x.double().square().sum() for x in first)
        found.append([*first, *torch.autograd.grad(total, inputs)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_another_structure_is_another_trace() -> None:
    def swapped(t: Tensor, y: Any) -> Any:
        first, second = y.values() if isinstance(y, dict) else y
        return {"a": second, "b": -first} if isinstance(y, dict) else (second, -first)

    a, b = drawn(2), drawn(2, seed=1)
    agree(swapped, {"a": a, "b": b}, ())
    agree(swapped, (a, b), ())
    agree(swapped, [a, b], ())


# -- complex numbers
# ------------------------------------------------------------------------------------------


class Driven(torch.nn.Module):
    """A quantum system in a field, with a phase for its parts: what it holds is complex, too."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        matrix = drawn(3, 3, dtype=dtype, seed=4).detach()
        self.hamiltonian = torch.nn.Parameter(matrix + matrix.mH)
        self.register_buffer("phase", torch.polar(torch.ones(3), torch.arange(3.0)).to(dtype))

    def forward(self, t: Tensor, psi: Tensor, drive: Tensor, coupling: Tensor) -> Tensor:
        turned = -1j * torch.cos(drive * t) * (psi @ self.hamiltonian.mT)
        pushed = coupling * torch.exp(1j * psi.real) * self.phase.conj()
        return turned + pushed - 1j * psi / (1 + psi.abs() ** 2)


COMPLEX: dict[str, dict[str, Any]] = {
    "joint": {},
    "batched": {"batched": True},
    "fixed steps": {"method": "rk4", "dt0": 0.1},
    "the largest error": {"method": "vern7", "options": {"norm": "max"}},
    "tolerances": {"rtol": torch.tensor([1e-3, 1e-5, 1e-7], dtype=F64), "atol": 1e-7},
}


@pytest.mark.parametrize("how", COMPLEX.values(), ids=list(COMPLEX))
@pytest.mark.parametrize("batch", [1, 11])
def test_complex_states(batch: int, how: dict[str, Any]) -> None:
    field = Driven(torch.complex128)
    psi = drawn(batch, 3, dtype=torch.complex128)
    args = (drawn(seed=5), drawn(batch, 1, dtype=torch.complex128, seed=6))
    agree(field, psi, args, 1e-8, **how)


@pytest.mark.parametrize("batched", [True, False])
def test_complex64(batched: bool) -> None:
    field = Driven(torch.complex64)
    psi, drive = drawn(5, 3, dtype=torch.complex64), drawn(dtype=F32, seed=5)
    args = (drive, drawn(5, 1, dtype=torch.complex64, seed=6))
    agree(field, psi, args, 2e-4, batched=batched, rtol=1e-3, atol=1e-3)


def test_parameters_that_are_complex_have_gradients_and_may_change() -> None:
    field, psi = Driven(torch.complex128), drawn(4, 3, dtype=torch.complex128)
    args = (torch.tensor(1.3, dtype=F64), torch.tensor(0.1 + 0.2j, dtype=torch.complex128))
    for _ in range(2):
        found = []
        for native in (True, False):
            sol = ctorch.solve_ode(field, psi, T, args=args, native=native, batched=True)
            (grad,) = torch.autograd.grad(sol.y.real.sum(), [field.hamiltonian])
            found.append(grad)
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            field.hamiltonian.mul_(0.5 + 0.1j)


def test_a_pytree_of_real_and_complex_tensors() -> None:
    def func(t: Tensor, y: dict[str, Tensor], k: Tensor) -> dict[str, Tensor]:
        a, b = y["a"], y["b"]
        return {"a": -k * a.conj() + b.sum(-1, keepdim=True), "b": 1j * b * a.abs() * torch.cos(t)}

    for batch, batched in ((4, True), (4, False)):
        y0 = {"a": drawn(batch, 1), "b": drawn(batch, 2, dtype=torch.complex128)}
        agree(func, y0, (drawn(seed=3),), 1e-8, batched=batched)


def test_the_norm_of_a_complex_error_takes_moduli() -> None:
    def turning(t: Tensor, y: Tensor) -> Tensor:
        return 9j * t * y  # real and imaginary parts pass through zero

    y0 = torch.ones(1, dtype=torch.complex128)
    for options in ({}, {"norm": "max"}):
        agree(turning, y0, (), rtol=1e-7, atol=1e-12, options=options)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 9),
    st.sampled_from(["tsit5", "rk4"]),
    st.booleans(),
    st.floats(-1, 1).filter(lambda end: abs(end) > 1e-3),
)
def test_drawn_complex_problems(batch: int, method: str, batched: bool, end: float) -> None:
    field = Driven(torch.complex128)
    psi = drawn(batch, 3, dtype=torch.complex128, seed=batch)
    args = (drawn(seed=5), drawn(batch, 1, dtype=torch.complex128, seed=6))
    how: dict[str, Any] = {"method": method, "t": end * T}
    how |= {"dt0": 0.1} if method == "rk4" else {"batched": batched}
    agree(field, psi, args, 1e-8, **how)


def test_a_compiled_solve_of_complex_numbers() -> None:
    y0 = drawn(4, 2, dtype=torch.complex128).detach()
    for batched in (True, False):
        solve = ctorch.ode.compile(lambda t, y: 1j * t * y, batched=batched)
        eager = ctorch.solve_ode(lambda t, y: 1j * t * y, y0, T, batched=batched)
        for _ in range(2):
            torch.testing.assert_close(solve(y0, T).y, eager.y, rtol=1e-9, atol=1e-9)


def test_a_compiled_solve_follows_the_default_dtype() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * (0.1 if torch.tensor(1.0).dtype == F32 else 0.2)

    solve, y0 = ctorch.ode.compile(func), torch.ones(1, dtype=F64)
    try:
        for dtype, rate in ((F32, 0.1), (F64, 0.2), (F32, 0.1)):
            torch.set_default_dtype(dtype)
            exact = torch.exp(rate * T)[:, None]
            torch.testing.assert_close(solve(y0, T).y, exact, rtol=1e-5, atol=0)
    finally:
        torch.set_default_dtype(F32)
