"""Finding every tensor that a vector field uses, so that gradients reach it without being told.

Three sources: what ``func`` visibly holds (parameters of modules, tensors in closures and
    attributes), what one
recorded evaluation touches, and the graph of every evaluation that is differentiated: a tensor that
    first appears
there (a branch on t, say) is noticed, never lost.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ctorch.ode.field import Stage
from ctorch.ode.linear_layers import Places

Node = torch.autograd.graph.Node
Evaluate = Callable[[Tensor, Tensor], Stage]


class UnknownTensor(Exception):
    """An evaluation, ``stage``, used tensors that the solve does not differentiate in."""

    def __init__(self, tensors: list[Tensor], stage: Stage) -> None:
        super().__init__()
        self.tensors = tensors
        self.stage = stage


class Captured:
    """The tensors, other than state and time, in which a vector field is differentiated.

    Args:
        tensors: candidates; those without gradient are dropped. A tensor computed from another one
            in the list stands for its own history there, which would be counted twice: then leaves
            replace all such tensors.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        unique = _once(tensors)
        nodes = _nodes(unique)
        computed = [node for x, node in zip(unique, nodes, strict=True) if x.grad_fn is not None]
        if any(_reaches(node, {*nodes} - {node}) for node in computed):
            unique = _once([*[x for x in unique if x.grad_fn is None], *leaves_of(computed)])
            nodes = _nodes(unique)
        self.tensors: tuple[Tensor, ...] = tuple(unique)
        self._known = {*nodes}
        self._places = Places(self.tensors, nodes)

    def audit(self, stage: Stage) -> None:
        """Note how the graph of an evaluation reaches the known tensors; raise ``UnknownTensor``
        where it reaches a leaf outside them.
        """
        root = stage.k.grad_fn
        if root is None or root in self._known:
            return
        unknown, layers, seen = _walk(stage, root, self._known, self._places)
        if unknown:
            raise UnknownTensor(unknown, stage)
        stage.reached = self._places.reached(layers, seen)


def _walk(
    stage: Stage, root: Node, known: set[Node], places: Places
) -> tuple[list[Tensor], list[Any], set[Node]]:
    """Go through the graph of an evaluation, up to known nodes.

    Returns:
        The leaves that it met, the linear layers, and all nodes but those of layers' parameters.
    """
    seen, todo = {root}, [root]
    leaves: list[Tensor] = []
    layers = []
    for node in todo:  # which grows on the way
        if node in known:
            continue
        following = node.next_functions
        if not following:
            leaf = getattr(node, "variable", None)
            if leaf is not None and leaf is not stage.y and leaf is not stage.t:
                leaves.append(leaf)
            continue
        layer = places.layer(node, following)
        if layer is not None:
            layers.append(layer)
            following = following[:-1] if layer[-1] is None else following[1:-1]
        for other, _ in following:
            if other is not None and other not in seen:
                seen.add(other)
                todo.append(other)
    return leaves, layers, seen


@contextlib.contextmanager
def hooks_waiting(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Without the hooks of these tensors: they are for the gradient of a whole solve, and not for
    the shares of single evaluations on the way to it.
    """
    waiting = [(x._backward_hooks, dict(x._backward_hooks)) for x in tensors if x._backward_hooks]
    for hooks, _ in waiting:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, held in waiting:
            hooks.update(held)


def leaves_of(nodes: Iterable[Node]) -> list[Tensor]:
    """The leaf tensors at the ends of a graph."""
    seen: set[Node] = set()
    todo = list(nodes)
    leaves = []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions and hasattr(node, "variable"):
            leaves.append(node.variable)
        todo.extend(other for other, _ in node.next_functions if other is not None)
    return leaves


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each of the tensors that require grad once."""
    return list({id(x): x for x in tensors if x.requires_grad}.values())


def _nodes(tensors: Sequence[Tensor]) -> list[Node]:
    """The nodes that stand for tensors in graphs."""
    found: list[Any] = []
    with torch.enable_grad():  # the node of a leaf shows behind something that is made from it
        for x in tensors:
            behind: Any = x.view_as(x).grad_fn if x.grad_fn is None else None
            found.append(x.grad_fn if behind is None else behind.next_functions[0][0])
    return found


def _reaches(root: Node, targets: set[Node]) -> bool:
    seen: set[Node] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if node in targets:
            return True
        if node not in seen:
            seen.add(node)
            todo.extend(other for other, _ in node.next_functions if other is not None)
    return False


class Recording(TorchFunctionMode):
    """Notes every tensor that requires grad and comes from outside the evaluation that it
    watches.
    """

    def __init__(self, inside: Iterable[Tensor]) -> None:
        super().__init__()
        self.outside: dict[int, Tensor] = {}
        self._inside: dict[int, Any] = {id(x): x for x in inside}

    def made(self, x: Tensor) -> bool:
        """Whether ``x`` was given to the evaluation, or made in it."""
        return id(x) in self._inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in _tensors((*args, *kwargs.values())):
            if id(x) not in self._inside and x.requires_grad:
                self.outside[id(x)] = x
        result = func(*args, **kwargs)
        for x in _tensors((result,)):
            if id(x) not in self.outside:
                self._inside[id(x)] = x  # kept alive, so that its id is not used again
        return result


def _tensors(items: Iterable[Any]) -> Iterator[Tensor]:
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif not isinstance(item, (int, float, str, types.NoneType)):
            yield from (x for x in pytree.tree_leaves(item) if isinstance(x, Tensor))


def discover(
    evaluate: Callable[[], Stage], inside: list[Tensor], held: Any
) -> tuple[Stage, list[Tensor]]:
    """Evaluate once, watching; returns the stage and all tensors that it or ``held`` (func and
    args) bring in.

    Args:
        evaluate: evaluates the field with its graph.
        inside: the state and time that it is given.
        held: objects to look through.
    """
    with Recording(inside) as recording:
        stage = evaluate()
    found = _once([*recording.outside.values(), *held_tensors(held)])
    if stage.k.grad_fn is not None:
        # what C++ code reached without a torch function call
        stop = {*_nodes([*found, stage.y])}
        leaves, _, _ = _walk(stage, stage.k.grad_fn, stop, Places((), ()))
        found += [leaf for leaf in leaves if not recording.made(leaf)]
    return stage, found


def watched(evaluate: Evaluate, captured: Captured) -> Evaluate:
    """``evaluate``, looking at every tensor that comes into every evaluation: slow, misses none.

    For fields whose graphs say too little, such as those that make leaves of their own.
    """
    known = {id(x) for x in captured.tensors}

    def watching(t: Tensor, y: Tensor) -> Stage:
        with Recording([t, y]) as recording:
            stage = evaluate(t, y)
        unknown = [x for key, x in recording.outside.items() if key not in known]
        if unknown:
            raise UnknownTensor(unknown, stage)
        return stage

    return watching


def held_tensors(held: Any) -> list[Tensor]:
    """Tensors that require grad in modules, closures, bound objects, partials and containers."""
    return _once(x for x in _held(held) if isinstance(x, Tensor))


def held_buffers(held: Any) -> list[Tensor]:
    """Buffers of the modules in the same places."""
    modules = (x for x in _held(held, into_modules=False) if isinstance(x, torch.nn.Module))
    return list({id(x): x for module in modules for x in module.buffers()}.values())


def _held(held: Any, into_modules: bool = True) -> Iterator[Any]:
    seen: set[int] = set()
    inner: set[int] = set()  # modules whose parameters and buffers have been given
    todo = [(held, 6)]
    while todo:
        item, depth = todo.pop()
        if isinstance(item, Tensor):
            yield item
            continue
        if depth < 0 or id(item) in seen or isinstance(item, (type, types.ModuleType)):
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, torch.nn.Module):
            if not into_modules:
                continue
            if id(item) not in inner:  # else its tensors came with those of the outermost module
                for module in item.modules():
                    inner.add(id(module))
                    yield from module._parameters.values()
                    yield from module._buffers.values()
        todo += [
            (part, depth - 1)
            for part in reversed([*_parts(item)])
            if part.__class__ not in _ATOMS and (part.__class__ not in _CONTAINERS or part)
        ]


_ATOMS = {bool, int, float, str, type(None)}
_CONTAINERS = {dict, OrderedDict, list, tuple, set}


def _parts(item: Any) -> Iterable[Any]:
    if isinstance(item, torch.nn.Module):
        return [v for k, v in item.__dict__.items() if k not in ("_parameters", "_buffers")]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, types.FunctionType):
        return _function_parts(item)
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, (list, tuple, set)):
        return list(item)
    if type(item).__module__.startswith(("torch", "builtins", "numpy")):
        return ()
    return _attributes(item)


def _attributes(item: Any) -> list[Any]:
    return [v for k, v in getattr(item, "__dict__", {}).items() if not k.startswith("__")]


def _function_parts(function: types.FunctionType) -> list[Any]:
    parts: list[Any] = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # a name not bound yet
            continue
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    parts += [
        x
        for x in named
        if isinstance(x, (Tensor, torch.nn.Module, types.FunctionType, list, tuple, dict))
    ]
    return parts
