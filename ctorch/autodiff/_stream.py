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
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from ctorch.autodiff import _dtypes as dtypes
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

    __slots__ = ("_buffers", "_stack", "coefficients", "degree", "inputs", "step", "tape")

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
        self._buffers: dict[bool, _Buffer] = {}
        tape.nodes.append(self)

    def append(self, coefficient: Tensor) -> None:
        """Give coefficient k from outside."""
        self.coefficients.append(coefficient)

    def advance(self, k: int) -> None:
        """Compute coefficient k."""
        if k <= self.degree and self.step is not None:
            self.coefficients.append(self.step(k))

    def at(self, k: int) -> Tensor | None:
        """Coefficient k, or None where it is zero."""
        return self.coefficients[k] if k <= self.degree else None

    def top(self, k: int) -> int:
        """The highest coefficient up to k that is not zero."""
        return k if k <= self.degree else int(self.degree)

    def between(self, first: int, last: int) -> Tensor:
        """Coefficients first to last, ``[.., *shape]``."""
        if self.tape.buffered:
            return self._buffer(False).between(first, last)
        if self._stack is None or self._stack[0] <= last:
            self._stack = last + 1, torch.stack(self.coefficients[: last + 1])
        return self._stack[1][first : last + 1]

    def downward(self, last: int, first: int) -> Tensor:
        """Coefficients last down to first, ``[.., *shape]``."""
        if self.tape.buffered:
            return self._buffer(True).between(first, last)
        return self.between(first, last).flip(0)

    def padded(self, k: int) -> Tensor:
        """Coefficients 0 to k, ``[k + 1, *shape]``, zeros among them."""
        stack = self.between(0, self.top(k))
        missing = k + 1 - stack.shape[0]
        if not missing:
            return stack
        return torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])])

    def _buffer(self, downward: bool) -> _Buffer:
        if downward not in self._buffers:
            self._buffers[downward] = _Buffer(self, downward)
        return self._buffers[downward]


class _Buffer:
    """A node's coefficients side by side in memory, upwards or downwards: no copies of stacks."""

    __slots__ = ("downward", "filled", "node", "rows", "stack")

    def __init__(self, node: Node, downward: bool) -> None:
        value = node.coefficients[0]
        self.stack = value.new_empty(node.top(node.tape.order) + 1, *value.shape)
        self.rows = self.stack.unbind(0)[:: -1 if downward else 1]
        self.node, self.downward, self.filled = node, downward, 0

    def between(self, first: int, last: int) -> Tensor:
        for k in range(self.filled, last + 1):
            self.rows[k].copy_(self.node.coefficients[k])
        self.filled = max(self.filled, last + 1)
        if not self.downward:
            return self.stack[first : last + 1]
        count = self.stack.shape[0]
        return self.stack[count - 1 - last : count - first]


class Stream(Propagated):
    """``x(s) = sum_k x_k s^k`` whose coefficients become known one order after the other."""

    __slots__ = ("node", "order")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.order = node.tape.order  # the highest coefficient that will be asked for

    @property
    def value(self) -> Tensor:
        return self.node.coefficients[0]

    def then(self, value: Tensor, step: Step, *others: Node, degree: float | None = None) -> Stream:
        """A value that follows from this one (and others)."""
        degree = self.node.degree if degree is None else degree
        _same_tape(self.node, *others)
        return Stream(Node(self.node.tape, value, (self.node, *others), step, degree))

    def linear(self, fn: Function) -> Stream:
        x = self.node
        return self.then(fn(self.value), lambda k: fn(x.coefficients[k]))

    def shift(self, constant: Tensor | complex) -> Stream:
        x = self.node
        value = self.value + constant
        shape = value.shape
        if shape == x.coefficients[0].shape:
            return self.then(value, lambda k: x.coefficients[k])
        return self.then(value, lambda k: x.coefficients[k].expand(shape))

    def affine(self, fn: Function, constant: Tensor) -> Stream:
        x = self.node
        flat = fn(self.value)
        value = flat + constant
        if value.shape != flat.shape:
            return self.linear(fn).shift(constant)
        return self.then(value, lambda k: fn(x.coefficients[k]))

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
        return streams[0].then(
            fn(values), lambda k: fn([term(i, k) for i in range(len(nodes))]), *rest, degree=degree
        )

    def unary(self, name: str, param: float = 0.0) -> Stream:
        x = self.node
        value = dtypes.unary(self.value.unsqueeze(0), name, 0, param, last=True)

        def step(k: int) -> Tensor:
            return dtypes.unary(x.padded(k), name, k, param, last=True)

        return self.then(value, step, degree=0 if x.degree == 0 else math.inf)

    def integrate(self, value: Tensor, slope: Any) -> Stream:
        x = self.node
        if constant(slope):
            return self.then(value, lambda k: x.coefficients[k] * slope)
        s = slope.node

        def step(k: int) -> Tensor:  # k y_k = sum_j j x_j s_(k-j)
            last, first = x.top(k), max(1, k - s.top(k))
            if last < first:
                return torch.zeros_like(value)
            real = dtypes.real_of(value.dtype)
            weights = torch.arange(first, last + 1, dtype=real, device=value.device) / k
            change = x.between(first, last) * weights.reshape(-1, *(1,) * value.ndim)
            return _inner(change, s.downward(k - first, k - last))

        return self.then(value, step, s, degree=0 if x.degree == 0 else math.inf)

    def times(self, other: Stream) -> Stream:
        a, b = self.node, other.node

        def step(k: int) -> Tensor:
            return _inner(*_meeting(a, b, k))

        return self.then(self.value * other.value, step, b, degree=a.degree + b.degree)

    @classmethod
    def bilinear(cls, fn: Function, a: Stream, b: Stream) -> Stream:
        left, right = a.node, b.node

        def step(k: int) -> Tensor:
            return fn(*_meeting(left, right, k)).sum(0)

        degree = left.degree + right.degree
        return a.then(fn(a.value, b.value), step, right, degree=degree)

    def over(self, other: Stream) -> Stream:
        a, b = self.node, other.node
        if b.degree == 0:
            return self.then(
                self.value / other.value, lambda k: a.coefficients[k] / b.coefficients[0], b
            )
        value = self.value / other.value

        def step(k: int) -> Tensor:  # b_0 y_k = a_k - sum_(j>=1) b_j y_(k-j)
            last = b.top(k)
            rest = _inner(b.between(1, last), out.node.downward(k - 1, k - last))
            found = a.at(k)
            return (-rest if found is None else found - rest) / b.coefficients[0]

        out = self.then(value, step, b, degree=math.inf)
        return out

    def _assign(self, other: Stream) -> None:
        self.node = other.node

    # ---- rules that jets have and streams have not

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if RULES.get((cls, func)) is None and RULES.get(func) is None:  # Dynamo knows no "in" here
            rule = RULES.get((Jet, func))
            if rule is not None:
                return _by_jets(rule, args, kwargs or {})
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

    def output(i: int, x: Any) -> Any:
        if not isinstance(x, Jet):
            return x
        return Stream(Node(nodes[0].tape, x.value, tuple(nodes), partial(term, i), math.inf))

    return pytree.tree_unflatten([output(i, x) for i, x in enumerate(first)], spec)


def _same_tape(*nodes: Node) -> None:
    if any(node.tape is not nodes[0].tape for node in nodes[1:]):
        raise TypeError("values of two calls of taylor_series meet: do not nest them")


def _meeting(a: Node, b: Node, k: int) -> tuple[Tensor, Tensor]:
    """The coefficients ``a_j`` and ``b_(k-j)`` that are not zero, for all j, as two stacks."""
    last, first = a.top(k), k - b.top(k)
    return a.between(first, last), b.downward(k - first, k - last)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """``sum_j a_j b_j``; the shapes broadcast."""
    if a.dtype is b.dtype and not a.dtype.is_complex:
        if a.dtype in dtypes.HALF:
            return _inner(a.float(), b.float()).to(a.dtype)
        return cast(Tensor, ops.jet_correlate(a, b, 0)[0])
    ndim = max(a.ndim, b.ndim)
    a, b = (x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:]) for x in (a, b))
    return (a * b).sum(0)
