"""Truncated Taylor series computed order by order, where each order needs the result of the last.

A function runs once, on the values; what it did is kept as a list of nodes. Then coefficient k of
every node follows, node by node, from the coefficients up to k of the nodes before it, and it is
never computed again. So the coefficients of an ODE's solution cost one sweep an order, as many rows
through every linear map as there are samples, where propagating series from the start anew for
every order (``Jet``) takes ``1 + 2 + ... + K`` of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from ctorch.autodiff._jet import Jet
from ctorch.autodiff._propagated import RULES, Propagated, constant
from ctorch.ops import jet as ops
from ctorch.ops._op import transforms_active

Function = Callable[..., Any]
Step = Callable[[int], Tensor]


class Tape:
    """The nodes that one run of a function made, in order.

    Args:
        order: the highest coefficient that will be asked for.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.nodes: list[Node] = []
        self.buffered = not (torch.is_grad_enabled() or transforms_active() or is_compiling())

    def input(self, value: Tensor, degree: float = math.inf) -> Stream:
        """A value whose further coefficients are given from outside, by ``node.append``."""
        return Stream(Node(self, value, (), None, degree))

    def needed(self, outputs: Sequence[Node]) -> list[Node]:
        """The nodes on which some nodes hang and which have to be computed, in order."""
        seen: set[int] = set()
        stack = list(outputs)
        while stack:
            node = stack.pop()
            if id(node) not in seen:
                seen.add(id(node))
                stack.extend(node.inputs)
        return [node for node in self.nodes if id(node) in seen and node.step is not None]


class Node:
    """The coefficients of one value so far, and how the next one follows from other nodes'.

    Attributes:
        coefficients: list of ``[*shape]``, normalized; shorter than the order where the degree is
            lower.
        inputs: the nodes that ``step`` reads.
        step: coefficient k from the inputs' coefficients 0..k; None: given from outside.
        degree: coefficients above it are zero and not computed.
    """

    __slots__ = ("_buffer", "_filled", "_stack", "coefficients", "degree", "inputs", "step", "tape")

    def __init__(
        self,
        tape: Tape,
        value: Tensor,
        inputs: tuple[Node, ...],
        step: Step | None,
        degree: float,
    ) -> None:
        self.tape, self.inputs, self.step, self.degree = tape, inputs, step, degree
        self.coefficients = [value]
        self._stack: tuple[int, Tensor] | None = None
        self._buffer: Tensor | None = None
        self._filled = 0
        tape.nodes.append(self)

    def append(self, coefficient: Tensor) -> None:
        self.coefficients.append(coefficient)

    def advance(self, k: int) -> None:
        """Compute coefficient k."""
        if k <= self.degree and self.step is not None:
            self.coefficients.append(self.step(k))

    def at(self, k: int) -> Tensor | None:
        """Coefficient k, or None where it is zero."""
        return self.coefficients[k] if k <= self.degree else None

    def stack(self, k: int) -> Tensor:
        """Coefficients 0 to ``min(k, degree)`` as one tensor ``[.., *shape]``."""
        count = int(min(k, self.degree)) + 1
        if self.tape.buffered:
            return self._buffered(count)
        if self._stack is None or self._stack[0] != count:
            self._stack = count, torch.stack(self.coefficients[:count])
        return self._stack[1]

    def padded(self, k: int) -> Tensor:
        """Coefficients 0 to k as one tensor ``[k + 1, *shape]``, zeros among them."""
        stack = self.stack(k)
        missing = k + 1 - stack.shape[0]
        if not missing:
            return stack
        return torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])])

    def _buffered(self, count: int) -> Tensor:
        value = self.coefficients[0]
        if self._buffer is None:
            room = int(min(self.tape.order, self.degree)) + 1
            self._buffer = value.new_empty(room, *value.shape)
        for i in range(self._filled, count):
            self._buffer[i] = self.coefficients[i]
        self._filled = max(self._filled, count)
        return self._buffer[:count]


class Stream(Propagated):
    """``x(s) = sum_k x_k s^k`` whose coefficients become known one order after the other."""

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node = node

    @property
    def value(self) -> Tensor:
        return self.node.coefficients[0]

    def _then(
        self, value: Tensor, step: Step, *others: Node, degree: float | None = None
    ) -> Stream:
        """A value that follows from this one (and others)."""
        degree = self.node.degree if degree is None else degree
        _same_tape(self.node, *others)
        return Stream(Node(self.node.tape, value, (self.node, *others), step, degree))

    def linear(self, fn: Function) -> Stream:
        x = self.node
        return self._then(fn(self.value), lambda k: fn(x.coefficients[k]))

    def shift(self, constant: Tensor | complex) -> Stream:
        x = self.node
        value = self.value + constant
        shape = value.shape
        if shape == x.coefficients[0].shape:
            return self._then(value, lambda k: x.coefficients[k])
        return self._then(value, lambda k: x.coefficients[k].expand(shape))

    def affine(self, fn: Function, constant: Tensor) -> Stream:
        x = self.node
        flat = fn(self.value)
        value = flat + constant
        if value.shape != flat.shape:
            return self.linear(fn).shift(constant)
        return self._then(value, lambda k: fn(x.coefficients[k]))

    @classmethod
    def join(cls, fn: Function, parts: Sequence[Any]) -> Stream:
        streams = [part for part in parts if isinstance(part, Stream)]
        nodes = [part.node if isinstance(part, Stream) else None for part in parts]
        values = [part.value if isinstance(part, Stream) else part for part in parts]
        zeros: dict[int, Tensor] = {}

        def term(i: int, k: int) -> Tensor:
            node = nodes[i]
            found = None if node is None else node.at(k)
            if found is None:
                if i not in zeros:
                    zeros[i] = torch.zeros_like(values[i])
                return zeros[i]
            return found

        first, *rest = [stream.node for stream in streams]
        degree = max(node.degree for node in (first, *rest))
        return streams[0]._then(
            fn(values), lambda k: fn([term(i, k) for i in range(len(nodes))]), *rest, degree=degree
        )

    def unary(self, name: str, param: float = 0.0) -> Stream:
        x = self.node
        value = ops.unary(self.value.unsqueeze(0), name, 0, param)[0]
        degree = 0 if x.degree == 0 else math.inf
        return self._then(value, lambda k: ops.unary_last(x.padded(k), name, param), degree=degree)

    def integrate(self, value: Tensor, slope: Any) -> Stream:
        x = self.node
        if constant(slope):
            return self._then(value, lambda k: x.coefficients[k] * slope)
        s = slope.node

        def step(k: int) -> Tensor:  # k y_k = sum_j j x_j s_(k-j)
            last = int(min(k, x.degree))
            first = max(1, k - int(min(k, s.degree)))
            if last < first:
                return torch.zeros_like(value)
            weights = _counting(first, last, value) / k
            change = x.stack(k)[first : last + 1] * weights
            return _inner(change, s.stack(k)[k - last : k - first + 1].flip(0))

        return self._then(value, step, s, degree=0 if x.degree == 0 else math.inf)

    def times(self, other: Stream) -> Stream:
        a, b = self.node, other.node

        def step(k: int) -> Tensor:
            return _inner(*_meeting(a, b, k))

        return self._then(self.value * other.value, step, b, degree=a.degree + b.degree)

    @classmethod
    def bilinear(cls, fn: Function, a: Stream, b: Stream) -> Stream:
        left, right = a.node, b.node

        def step(k: int) -> Tensor:
            return fn(*_meeting(left, right, k)).sum(0)

        degree = left.degree + right.degree
        return a._then(fn(a.value, b.value), step, right, degree=degree)

    def over(self, other: Stream) -> Stream:
        a, b = self.node, other.node
        if b.degree == 0:
            return self._then(
                self.value / other.value, lambda k: a.coefficients[k] / b.coefficients[0], b
            )
        value = self.value / other.value

        def step(k: int) -> Tensor:  # b_0 y_k = a_k - sum_(j>=1) b_j y_(k-j)
            last = int(min(k, b.degree))
            known = out.node.stack(k - 1)[k - last :].flip(0)
            rest = _inner(b.stack(k)[1 : last + 1], known)
            found = a.at(k)
            return (-rest if found is None else found - rest) / b.coefficients[0]

        out = self._then(value, step, b, degree=math.inf)
        return out

    def _assign(self, other: Stream) -> None:
        self.node = other.node

    # ---- rules that jets have and streams have not

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (cls, func) not in RULES and func not in RULES and (Jet, func) in RULES:
            return _by_jets(RULES[Jet, func], args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)


def _by_jets(rule: Function, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function by its rule for jets, run again for every order on the coefficients so far."""
    leaves, tree = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Propagated))
    nodes = [leaf.node for leaf in leaves if isinstance(leaf, Stream)]
    _same_tape(*nodes)

    def run(k: int) -> tuple[list[Any], Any]:
        carried = [
            Jet(leaf.node.padded(k), k) if isinstance(leaf, Stream) else leaf for leaf in leaves
        ]
        given, named = tree.unflatten(carried)
        return pytree.tree_flatten(rule(*given, **named), is_leaf=lambda x: isinstance(x, Jet))

    latest: dict[int, list[Any]] = {}

    def term(i: int, k: int) -> Tensor:
        if k not in latest:
            latest.clear()
            latest[k] = run(k)[0]
        stack = latest[k][i].coefficients
        return stack[k] if k < stack.shape[0] else torch.zeros_like(stack[0])

    first, spec = run(0)
    outputs = [
        Stream(Node(nodes[0].tape, x.value, tuple(nodes), lambda k, i=i: term(i, k), math.inf))
        if isinstance(x, Jet)
        else x
        for i, x in enumerate(first)
    ]
    return pytree.tree_unflatten(outputs, spec)


def _same_tape(*nodes: Node) -> None:
    if any(node.tape is not nodes[0].tape for node in nodes[1:]):
        raise TypeError("values of two calls of taylor_series meet: do not nest them")


def _meeting(a: Node, b: Node, k: int) -> tuple[Tensor, Tensor]:
    """The coefficients ``a_j`` and ``b_(k-j)`` that are not zero, for all j, as two stacks."""
    last = int(min(k, a.degree))
    first = k - int(min(k, b.degree))
    return a.stack(k)[first : last + 1], b.stack(k)[k - last : k - first + 1].flip(0)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """``sum_j a_j b_j``; the shapes broadcast."""
    if a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64):
        return ops.correlate(a, b, 0)[0]
    ndim = max(a.ndim, b.ndim)
    a, b = (x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:]) for x in (a, b))
    return (a * b).sum(0)


def _counting(first: int, last: int, like: Tensor) -> Tensor:
    weights = torch.arange(first, last + 1, dtype=like.dtype, device=like.device)
    return weights.reshape(-1, *(1,) * like.ndim)
