"""One case of a check: a function, a point, and its outputs as a list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch.testing._captured import Captured


@dataclass
class Leaf:
    """A tensor argument as storage plus a view of it: every evaluation sees the same layout."""

    name: str
    storage: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Leaf:
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        storage = torch.as_strided(tensor, (count,), (1,), 0)
        return cls(
            name, storage, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        )

    def view(self, storage: Tensor) -> Tensor:
        """The argument whose storage is ``storage``."""
        return torch.as_strided(storage, self.shape, self.stride, self.offset)

    def position(self, flat: int) -> int:
        """Where in the storage the element at a flat logical position lies."""
        index = torch.unravel_index(torch.tensor(flat), self.shape) if self.shape else ()
        return self.offset + sum(int(i) * s for i, s in zip(index, self.stride, strict=True))


class System:
    """``fn`` at one point, as a function of the storages of its inputs and of the captured tensors.

    ``eager`` reads captured tensors where they are (they hold the values already); ``pure`` gets
    everything as arguments, as ``torch.func`` wants it. Both return the floating-point and complex
    outputs as a list.
    """

    order = 1

    def __init__(
        self,
        fn: Callable[..., Any],
        leaves: Sequence[Any],
        spec: Any,
        captured: Sequence[Captured],
        rng_seed: int,
    ) -> None:
        self.fn = fn
        self.arguments = list(leaves)
        self.spec = spec
        self.captured = [c for c in captured if c.checked and c.tensor.numel()]
        self.slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Leaf)]
        self.inputs: list[Leaf] = [leaves[i] for i in self.slots]
        self.rng_seed = rng_seed
        self.point = [leaf.storage.clone() for leaf in self.inputs]
        self.point += [c.tensor.detach().clone() for c in self.captured]
        self.names = [leaf.name for leaf in self.inputs] + [c.name for c in self.captured]

    @property
    def input_count(self) -> int:
        return len(self.inputs)

    def view(self, i: int, value: Tensor) -> Tensor:
        """Variable ``i`` as the function sees it, from its storage."""
        return self.inputs[i].view(value) if i < len(self.inputs) else value

    def eager(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs for inputs given as views; captured tensors keep their present values."""
        arguments = list(self.arguments)
        for slot, value in zip(self.slots, inputs, strict=True):
            arguments[slot] = value
        with seeded(self.rng_seed):
            result = self.fn(*pytree.tree_unflatten(arguments, self.spec))
        return differentiable(result)

    def pure(self, variables: Sequence[Tensor]) -> list[Tensor]:
        """Outputs as a function of all variables (inputs as views, then captured tensors)."""
        with ExitStack() as stack:
            for held, value in zip(self.captured, variables[len(self.inputs) :], strict=True):
                if value is not held.tensor:
                    stack.enter_context(held.replaced(value))
            return self.eager(variables[: len(self.inputs)])

    def leaves(self) -> list[Tensor]:
        """Fresh autograd leaves for the inputs, and the captured tensors themselves."""
        own = [
            leaf.view(value.clone()).detach().requires_grad_()
            for leaf, value in zip(self.inputs, self.point, strict=False)
        ]
        return own + [c.tensor for c in self.captured]

    def at(self, point: Sequence[Tensor]) -> list[Tensor]:
        """Plain values of the outputs at another point."""
        n = len(self.inputs)
        with self.captured_at(point[n:]):
            views = [
                leaf.view(value).detach().requires_grad_()
                for leaf, value in zip(self.inputs, point[:n], strict=True)
            ]
            return [y.detach().clone() for y in self.eager(views)]

    @contextmanager
    def captured_at(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Within the block the captured tensors hold other values (dual numbers too)."""
        with torch.no_grad():
            for held, value in zip(self.captured, values, strict=True):
                held.tensor.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for held, value in zip(self.captured, self.point[len(self.inputs) :], strict=True):
                    held.tensor.copy_(value)


class GradientSystem(System):
    """The vector-Jacobian product of a system; the cotangents join its inputs."""

    order = 2

    def __init__(self, inner: System, cotangents: Sequence[Leaf]) -> None:
        self.inner = inner
        self.captured = inner.captured
        self.inputs = [*inner.inputs, *cotangents]
        self.cotangents = list(cotangents)
        n = len(inner.inputs)
        self.point = [*inner.point[:n], *(c.storage for c in cotangents), *inner.point[n:]]
        self.names = [leaf.name for leaf in self.inputs] + [c.name for c in self.captured]

    def eager(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        n = len(self.inner.inputs)
        outputs = self.inner.eager(inputs[:n])
        pairs = [(y, u) for y, u in zip(outputs, inputs[n:], strict=True) if y.requires_grad]
        wanted = [*inputs[:n], *(c.tensor for c in self.captured)]
        if not pairs:
            return [torch.zeros_like(x) for x in wanted]
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            wanted,
            [u for _, u in pairs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return list(grads)

    def pure(self, variables: Sequence[Tensor]) -> list[Tensor]:
        n, m = len(self.inner.inputs), len(self.inputs)
        for held in self.captured:
            if not held.places:
                raise NotImplementedError(f"{held.name} is held where it cannot be replaced")
        pullback = torch.func.vjp(
            lambda *v: tuple(self.inner.pure(v)), *variables[:n], *variables[m:]
        )[1]
        return list(pullback(tuple(variables[n:m])))


def differentiable(result: Any) -> list[Tensor]:
    """The tensors in a result that can have a gradient."""
    leaves = pytree.tree_leaves(result)
    return [
        y
        for y in leaves
        if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()) and y.numel()
    ]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same torch random state for every evaluation: dropout draws the same mask."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield
