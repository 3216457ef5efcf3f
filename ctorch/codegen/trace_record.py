"""One recorded evaluation of a vector field, or of its vector-Jacobian product."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctorch.codegen.graph import Graph, Ids, as_reals
from ctorch.codegen.guards import Guards
from ctorch.codegen.lower import Recorder, Watch
from ctorch.codegen.lower_source import Untraceable
from ctorch.codegen.trace_leaves import Leaves


@dataclass
class Inputs:
    """What one evaluation is given.

    Attributes:
        t: time.
        y: leaves of the state.
        own: tensors that belong to the samples.
        shared: tensors that all samples share.
    """

    t: Tensor
    y: list[Tensor]
    own: list[Tensor]
    shared: list[Tensor]

    def leaves(self) -> list[Tensor]:
        """All of them: t, y, own, shared."""
        return [self.t, *self.y, *self.own, *self.shared]

    def differentiable(self) -> Inputs:
        """Copies that require gradients."""
        copies = [x.detach().clone().requires_grad_(True) for x in self.leaves()]
        ends = np.cumsum([1, len(self.y), len(self.own)])
        return Inputs(copies[0], copies[1 : ends[1]], copies[ends[1] : ends[2]], copies[ends[2] :])


#: What the user's function returns for inputs, checked: the leaves of the slope.
Call = Callable[[Inputs], "list[Tensor]"]


class Lifted:
    """Tensors from outside that an evaluation uses, in the order in which they are met.

    Args:
        guards: where they are found.
        first: how many shared arrays stand before them.
    """

    def __init__(self, guards: Guards, first: int) -> None:
        self.tensors: list[Tensor] = []
        self.constants: list[Tensor] = []
        self._first = first
        self._guards = guards

    def leaves(self) -> Leaves:
        """Of all tensors that the function reaches."""
        return Leaves([found.tensor for found in self._guards.tensors])

    def into(self, graph: Graph) -> Callable[[Tensor], list[tuple[Tensor, Ids]] | None]:
        """The recorder's question, what a tensor stands for in a graph."""
        given: dict[int, Ids] = {}

        def lift(tensor: Tensor) -> list[tuple[Tensor, Ids]] | None:
            held = self._holders(tensor)
            if not (held[0].is_floating_point() or held[0].is_complex()):
                self.constants += [x for x in held if all(x is not y for y in self.constants)]
                return None
            for holder in held:
                index = self._first + self.place(holder)
                if index not in given:
                    given[index] = graph.input("shared", shape_of(holder), index)
            return [(holder.detach(), given[self._first + self.place(holder)]) for holder in held]

        return lift

    def place(self, tensor: Tensor) -> int:
        """Where a tensor stands, or has come to stand now."""
        for index, known in enumerate(self.tensors):
            if known is tensor:
                return index
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _holders(self, tensor: Tensor) -> list[Tensor]:
        """The tensors that the function reaches whose memory a tensor is in."""
        storage = tensor.untyped_storage()._cdata
        held = [
            found.tensor
            for found in self._guards.tensors
            if found.tensor.layout == torch.strided
            and found.tensor.untyped_storage()._cdata == storage
        ]
        for exact in held:
            same = exact.data_ptr() == tensor.data_ptr() and exact.shape == tensor.shape
            if exact is tensor or (same and exact.stride() == tensor.stride()):
                return [exact]
        if not held:
            raise Untraceable(
                f"func uses a tensor of shape {list(tensor.shape)} that is not found in what it "
                "holds (closure, attributes, modules, globals): hold it there, or give it in args."
            )
        return held


@dataclass
class Record:
    """A recorded evaluation.

    Attributes:
        graph: what it computes.
        outputs: ids of what was asked for; None where there is nothing.
        slope: ids of the leaves of the slope.
        values: what the function returned.
    """

    graph: Graph
    outputs: list[Ids | None]
    slope: list[Ids]
    values: list[Tensor]


def record_value(call: Call, inputs: Inputs, dtype: torch.dtype, lifted: Lifted) -> Record:
    """Record the slope; outputs are its leaves."""
    recorder = _recorder(inputs, dtype, lifted)
    with _settings(), torch.no_grad(), Watch(recorder), recorder:
        values = call(inputs)
    slope = [_ids(recorder, x) for x in values]
    return Record(recorder.graph, [*slope], slope, values)


def record_vjp(call: Call, inputs: Inputs, dtype: torch.dtype, lifted: Lifted) -> Record:
    """Record the vector-Jacobian product; outputs are the gradients of t, y, own, shared and of
    the lifted tensors.
    """
    inputs = inputs.differentiable()
    recorder = _recorder(inputs, dtype, lifted)
    leaves = lifted.leaves()
    with _settings(), torch.enable_grad(), Watch(recorder), leaves, recorder:
        values = call(inputs)
        wanted = [*inputs.leaves(), *map(leaves.of, lifted.tensors)]
        seeds = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in values]
    slope = [_ids(recorder, x) for x in values]
    _give(recorder, "ct", seeds)
    with _settings(), torch.enable_grad(), Watch(recorder), recorder:
        first = len(inputs.leaves())
        grads = pulled_back(values, seeds, wanted, leaves, lambda x: first + lifted.place(x))
    outputs = [None if grad is None else _ids(recorder, grad) for grad in grads]
    return Record(recorder.graph, outputs, slope, values)


def pulled_back(
    values: Sequence[Tensor],
    seeds: Sequence[Tensor],
    wanted: Sequence[Tensor],
    leaves: Leaves,
    place: Callable[[Tensor], int],
) -> list[Tensor | None]:
    """By autograd, cotangents of ``wanted`` for those of ``values``, ``seeds``; None where none is.

    Args:
        values, seeds, wanted: as above.
        leaves: under which ``values`` were computed.
        place: where among ``wanted`` a tensor stands that was passed by.
    """
    grads: list[Tensor | None] = [None] * len(wanted)
    used = [(x, seed) for x, seed in zip(values, seeds, strict=True) if x.requires_grad]
    if not used:
        return grads
    # a sum has no cotangents to be given, for which autograd would import sympy
    terms = [(as_reals(x) * as_reals(seed)).sum() for x, seed in used]
    total = sum(terms, torch.zeros((), dtype=terms[0].dtype))
    places = [i for i, x in enumerate(wanted) if x.requires_grad]
    sources = [wanted[i] for i in places]
    for x in leaves.passed_by(total):
        places.append(place(x))
        sources.append(x)
    found = torch.autograd.grad(total, sources, allow_unused=True)
    for i, grad in zip(places, found, strict=True):
        before = grads[i]
        grads[i] = grad if before is None else before + grad
    return grads


def _recorder(inputs: Inputs, dtype: torch.dtype, lifted: Lifted) -> Recorder:
    graph = Graph(torch.finfo(dtype).max)
    recorder = Recorder(graph, dtype, lifted.into(graph))
    for name, leaves in (("t", [inputs.t]), ("y", inputs.y), ("own", inputs.own)):
        _give(recorder, name, leaves)
    for index, leaf in enumerate(inputs.shared):
        recorder.give(leaf, graph.input("shared", shape_of(leaf), index))
    return recorder


def _give(recorder: Recorder, name: str, leaves: Sequence[Tensor]) -> None:
    ids, start = recorder.graph.input(name, (count_of(leaves),)), 0
    for leaf in leaves:
        shape = shape_of(leaf)
        recorder.give(leaf, ids[start : start + math.prod(shape)].reshape(shape))
        start += math.prod(shape)


def shape_of(x: Tensor) -> tuple[int, ...]:
    """Of the real numbers that a tensor holds."""
    return (*x.shape, 2) if x.is_complex() else tuple(x.shape)


def count_of(leaves: Sequence[Tensor]) -> int:
    """How many real numbers tensors hold."""
    return sum(math.prod(shape_of(x)) for x in leaves)


def _ids(recorder: Recorder, x: Tensor) -> Ids:
    recorder.meet(x)
    return recorder.ids(x).copy()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Attention and transformer layers as their formulas, compiled functions as they are written,
    and the lines of a backward pass.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    math: Any = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    written: Any = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes seconds to import
        written = torch.compiler.set_stance("force_eager")
    try:
        with (
            warnings.catch_warnings(),
            math,
            written,
            torch.autograd.set_detect_anomaly(True, check_nan=False),
        ):
            warnings.filterwarnings("ignore", message="Error detected in")  # it is raised
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
