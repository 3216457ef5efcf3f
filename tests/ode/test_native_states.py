"""States and arguments other than a real tensor are solved natively as the eager solver does,
with its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import ctorch

F32, F64 = torch.float32, torch.float64
T = torch.tensor([0.0, 0.3, 1.0, 2.0], dtype=F64)


@pytest.fixture(autouse=True, scope="module")
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own, and a compiler that does not try hard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTORCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CTORCH_NATIVE_FLAGS", "-O1")
        yield


def drawn(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * len(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()


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
