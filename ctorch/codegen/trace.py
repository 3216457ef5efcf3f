"""Tracing a vector field: the function on its batch becomes the arithmetic of one sample."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctorch.codegen.emit_field import Derivative, field_source
from ctorch.codegen.graph import Ids, as_reals
from ctorch.codegen.guards import Guards
from ctorch.codegen.lower_source import MixesSamples, Untraceable
from ctorch.codegen.trace_problem import Problem
from ctorch.codegen.trace_record import (
    Inputs,
    Lifted,
    Record,
    count_of,
    record_value,
    record_vjp,
)
from ctorch.codegen.trace_verify import Evaluate, PullBack, close, verify

_MANY_KEYS, _MANY_ENTRIES = 256, 8
_cache: collections.OrderedDict[Any, list[Field]] = collections.OrderedDict()


@dataclass
class Field:
    """What was traced, apart from the tensors of one call.

    Attributes:
        source: ``struct Field`` in C++.
        dtype: of its numbers.
        dim: numbers in the state of one sample.
        own_size: numbers in ``args`` that each sample has for itself.
        split: whether the first dimension of the state counts independent samples; else the whole
            state is one.
        owned: which tensors of ``args`` belong to the samples.
        differentiated: which shared arrays have gradients.
        derivative_error: why there is no ``vjp``; "" where there is one.
        shapes: of the tensors in ``args``; of one that belongs to the samples: of one row.
        check: the shared arrays that a problem's func holds; None where its values have changed.
        sizes: the numbers of samples for which the field was compared with func.
    """

    source: str
    dtype: torch.dtype
    dim: int
    own_size: int
    split: bool
    owned: tuple[bool, ...]
    differentiated: tuple[bool, ...]
    derivative_error: str
    shapes: list[tuple[int, ...]]
    check: Callable[[Any], list[Tensor] | None]
    sizes: set[int] = field(default_factory=set)

    def shared_of(self, problem: Problem) -> list[Tensor] | None:
        """The shared arrays as a problem has them now; None where this is not its trace."""
        if not problem.tensors:
            return self.check(problem.root)
        for leaf, own, shape in zip(problem.tensors, self.owned, self.shapes, strict=True):
            if tuple(leaf.shape[1:] if own else leaf.shape) != shape:
                return None
            if own and leaf.shape[0] != problem.batch:
                return None
        lifted = self.check(problem.root)
        if lifted is None:
            return None
        return [x for x, own in zip(problem.tensors, self.owned, strict=True) if not own] + lifted


@dataclass
class Traced:
    """A traced vector field with the tensors of one call.

    Attributes:
        field: what does not depend on the call; ``field.source`` is the C++.
        shared: the shared arrays, in the order of ``Field::shared``: tensors of ``args`` that
            samples share, then parameters, buffers and other tensors that func holds.
        own: [B, own], what samples have for themselves of ``args``.
        problem: the call that was traced.
    """

    field: Field
    shared: list[Tensor]
    problem: Problem

    @property
    def source(self) -> str:
        """``struct Field`` in C++."""
        return self.field.source

    @property
    def dim(self) -> int:
        """Numbers in the state of one sample."""
        return self.field.dim

    @property
    def own(self) -> Tensor:
        """[B, own]; differentiable."""
        leaves = [x for x, mine in zip(self.problem.tensors, self.field.owned, strict=True) if mine]
        batch = self.problem.batch if self.field.split else 1
        if not leaves:
            return self.problem.y[0].new_zeros((batch, 0)).detach()
        flat = [as_reals(x).to(self.field.dtype).reshape(batch, -1) for x in leaves]
        return torch.cat(flat, 1) if len(flat) > 1 else flat[0]

    def still_valid(self) -> bool:
        """Whether func's values are what they were; the shared arrays are looked up again."""
        shared = self.field.shared_of(self.problem)
        if shared is not None:
            self.shared = shared
        return shared is not None

    def verify(
        self, evaluate: Evaluate, pull_back: PullBack | None = None, points: int = 3
    ) -> None:
        """Compare compiled code with func at random points near the example: see ``verify``."""
        verify(self, evaluate, pull_back, points)


def trace(
    func: Callable[..., Any], y: Any, t: Any = None, args: tuple[Any, ...] = (), *, batched: bool
) -> Traced:
    """Trace ``func(t, y, *args)`` to C++ for one sample, or find the trace that was made before.

    A trace is used again where func has the same code, the state and the tensors in ``args`` have
    the same shapes, and all Python values that func reaches are the same; tensors that func holds
    are looked up anew, so that training does not trace again.

    Args:
        func: the vector field.
        y: example of the state: a tensor or a pytree of tensors; with ``batched`` [B, ..] each.
        t: example of the time.
        args: further arguments. Floating tensors are inputs, which belong to the samples where
            their first dimension is that of the state and func, called with some samples, takes as
            many of their rows; all else is compared by value.
        batched: every sample has its own time; a field that mixes samples is refused. Else such a
            field is traced as one system, the whole state.

    Returns:
        The field in C++, with the tensors of this call.

    Raises:
        Untraceable: an operator is not supported, or the result cannot be known from one trace.
    """
    return find_trace(Problem(func, y, t, args, batched))


def find_trace(problem: Problem) -> Traced:
    """The trace of a problem, made or found.

    Raises:
        Untraceable: as ``trace``.
    """
    key = problem.key
    entries = _cache.get(key)
    if entries is not None:
        _cache.move_to_end(key)
        for entry in entries:
            shared = entry.shared_of(problem)
            if shared is not None:
                if entry.split and problem.batch not in entry.sizes:
                    _check_rows(problem, entry.owned, (1,))
                    entry.sizes.add(problem.batch)
                return Traced(entry, shared, problem)
    entry = _build(problem)
    entries = _cache.setdefault(key, [])
    entries.insert(0, entry)
    del entries[_MANY_ENTRIES:]
    while len(_cache) > _MANY_KEYS:
        _cache.popitem(last=False)
    shared = entry.shared_of(problem)
    if shared is None:
        raise Untraceable("func's values change from one look at them to the next.")
    return Traced(entry, shared, problem)


def clear() -> None:
    """Forget all traces."""
    _cache.clear()


def _build(problem: Problem) -> Field:
    guards = Guards(problem.root)
    whole = tuple(False for _ in problem.tensors)
    failure: Exception | None = None
    if problem.batched or problem.may_split:
        for owned in _assignments(problem):
            try:
                return _samples(problem, guards, owned)
            except Untraceable as error:
                if error.operator:
                    raise
                failure = failure or error
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                failure = failure or error
    if problem.batched:
        if isinstance(failure, Untraceable):
            raise failure
        raise Untraceable(
            "func cannot be called with some of the samples: it must work for any number of them, "
            f"and tensors that belong to samples must be in args. It raised: {failure}"
        ) from failure
    return _finished(problem, guards, whole, None)


def _assignments(problem: Problem) -> list[tuple[bool, ...]]:
    """Which of the arguments may belong to samples, the likeliest first."""
    can = [x.dim() > 0 and x.shape[0] == problem.batch for x in problem.tensors]
    if not problem.batch:
        return []
    choices = [(True, False) if possible else (False,) for possible in can]
    return list(itertools.islice(itertools.product(*choices), 16))


def _samples(problem: Problem, guards: Guards, owned: tuple[bool, ...]) -> Field:
    """One sample's field, where the samples are shown to be independent."""
    inputs = problem.inputs(owned, 2)
    lifted = Lifted(guards, len(inputs.shared))
    two = record_value(problem.call(owned, 2), inputs, problem.dtype, lifted)
    _check_independent(two, inputs)
    _check_rows(problem, owned, (1, 2))
    return _finished(problem, guards, owned, 1)


def _check_independent(two: Record, inputs: Inputs) -> None:
    """Of two samples, no number of one depends on a number of the other."""
    rows = {"y": _rows(inputs.y), "own": _rows(inputs.own)}
    if inputs.t.dim():
        rows["t"] = _rows([inputs.t])
    seeds = {
        position: rows[node.op]
        for position, node in enumerate(two.graph.nodes)
        if node.kind == "input" and node.op in rows
    }
    bits = two.graph.dependence(seeds)
    for ids in two.outputs:
        assert ids is not None
        for row, other in ((0, 2), (1, 1)):
            if (bits[two.graph.offsets(ids[row])] & other).any():
                raise MixesSamples(
                    "func mixes samples: the slope of one sample depends on the state of another. "
                    "Solve it with batched=False, as one system."
                )


def _rows(leaves: Sequence[Tensor]) -> Ids:
    """Of the numbers of two samples, leaf by leaf, to which they belong: bits 1 and 2."""
    parts = [np.repeat(np.array([1, 2]), count_of([x]) // 2) for x in leaves]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _finished(problem: Problem, guards: Guards, owned: tuple[bool, ...], rows: int | None) -> Field:
    """Trace value and derivative, and see that nothing changed meanwhile."""
    inputs = problem.inputs(owned, rows)
    lifted = Lifted(guards, len(inputs.shared))
    call = problem.call(owned, rows)
    value = record_value(call, inputs, problem.dtype, lifted)
    error, derivative = "", None
    try:
        derivative = record_vjp(call, inputs, problem.dtype, lifted)
    except (Untraceable, RuntimeError) as reason:  # autograd may fail where the value does not
        error = str(reason)
    counters = guards.changed(Guards(problem.root))
    dim, own = count_of(inputs.y), count_of(inputs.own)
    count = len(inputs.shared) + len(lifted.tensors)
    results = [count_of(value.values)]
    source = field_source(
        problem.dtype, (dim, own, count), (value.graph, _joined(value.outputs, results)),
        None if derivative is None else _cotangents(derivative, inputs),
    )  # fmt: skip
    differentiated = [True] * len(inputs.shared) + [x.requires_grad for x in lifted.tensors]
    shapes = [
        tuple(x.shape[1:] if mine else x.shape)
        for x, mine in zip(problem.tensors, owned, strict=True)
    ]
    check = guards.checker([*lifted.tensors, *lifted.constants], counters)
    return Field(
        source, problem.dtype, dim, own, rows is not None, owned, tuple(differentiated), error,
        shapes, _first_of(check, len(lifted.tensors)) if lifted.constants else check,
        {problem.batch},
    )  # fmt: skip


def _first_of(
    check: Callable[[Any], list[Tensor] | None], count: int
) -> Callable[[Any], list[Tensor] | None]:
    def first(root: Any) -> list[Tensor] | None:
        found = check(root)
        if found is not None:
            del found[count:]
        return found

    return first


def _joined(outputs: Sequence[Ids | None], sizes: Sequence[int]) -> Ids:
    parts = [x.reshape(-1) for x in outputs if x is not None]
    assert sum(len(x) for x in parts) == sum(sizes)
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _cotangents(record: Record, inputs: Inputs) -> Derivative:
    ends = np.cumsum([1, len(inputs.y), len(inputs.own)])

    def flat(start: int, end: int, like: Sequence[Tensor]) -> Ids:
        parts = [
            np.zeros(count_of([x]), np.int64) if ids is None else ids.reshape(-1)
            for ids, x in zip(record.outputs[start:end], like, strict=True)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    shared = [None if x is None else x.reshape(-1) for x in record.outputs[ends[2] :]]
    return Derivative(
        record.graph,
        _joined(record.slope, [count_of(record.values)]),
        flat(0, 1, [inputs.t]),
        flat(1, ends[1], inputs.y),
        flat(ends[1], ends[2], inputs.own),
        shared,
    )


def _check_rows(problem: Problem, owned: tuple[bool, ...], counts: Sequence[int]) -> None:
    """Func on a few samples is func on all of them, for the samples that it is given."""
    for seed in range(3):
        with torch.no_grad():
            inputs = problem.inputs(
                owned, max(problem.batch, 2), torch.Generator().manual_seed(seed) if seed else None
            )
            everything = problem.call(owned, None)(inputs)
            for count in counts:
                some = Inputs(
                    inputs.t[:count] if problem.batched else inputs.t,
                    [x[:count] for x in inputs.y],
                    [x[:count] for x in inputs.own],
                    inputs.shared,
                )
                few = problem.call(owned, count)(some)
                for a, b in zip(few, everything, strict=True):
                    if not close(a, b[:count]):
                        raise Untraceable(
                            "func gives a sample another result when it is called with other "
                            "samples (or called again): it mixes samples, or is random."
                        )
