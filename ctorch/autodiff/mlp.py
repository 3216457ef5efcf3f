"""Recognises plain MLPs, whose derivative operators have kernels of their own (ctorch.ops.mlp)."""

from __future__ import annotations

import array
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ctorch._objects import Objects
from ctorch.ops import _kernels, _mlp_direct
from ctorch.ops.mlp import MLP as MLP

__all__ = ["MLP", "as_mlp"]


def as_mlp(f: Any) -> MLP | None:
    """The MLP that a function is, or None where it is not known to be one.

    Recognised are ``nn.Linear`` and ``nn.Sequential``, nested as deep as may be, of linear layers
    and smooth activation modules: layer, activation, layer, ... , layer; each activation may be
    another. Identity, and dropout that does nothing (in eval mode, or with p = 0), are passed over.
    A module of a subclass, with hooks, with a parametrization, or with a forward of its own is not
    recognised, since it may compute something else.

    Another object says that it is an MLP by a method ``__ctorch_mlp__()`` that returns one (or None
    where, in its present state, it is not). Its weights may be made on the fly from parameters:
    time as a further input is a term of the first bias, a gate behind the first layer rescales its
    rows; gradients flow through.

    Args:
        f: a module or any callable.

    Returns:
        The layers as they are now: the parameters themselves, not copies. Ask again after a change
        of the module.

    Raises:
        TypeError: ``__ctorch_mlp__`` returned something else.
    """
    protocol = getattr(type(f), "__ctorch_mlp__", None)
    if protocol is not None:
        said = protocol(f)
        if said is not None and not isinstance(said, MLP):
            raise TypeError(
                f"{type(f).__name__}.__ctorch_mlp__() must return a ctorch.autodiff.mlp.MLP "
                f"or None, got {type(said).__name__}"
            )
        return said
    parts = _parts(f) if is_compiling() else _parts_again(f)
    if parts is None:
        return None
    weights, biases, kinds = parts
    names: Any
    params: Any
    if not kinds:
        names, params = "identity", 0.0
    elif kinds.count(kinds[0]) == len(kinds):
        names, params = kinds[0]
    else:
        names, params = zip(*kinds, strict=True)
    try:
        return MLP(weights, biases, names, params)
    except (TypeError, ValueError):  # sizes that do not follow on each other, an integer dtype, ...
        return None


def derivative_of_numbers(f: Any, x: Tensor, v: Tensor, order: int) -> Tensor | None:
    """``d^order/ds^order f(x + s v)`` of a module that is an MLP, where its kernel is all there is
    to do: nothing to record, plain tensors of one shape. None elsewhere.

    It is the way of ``ctorch.ops.mlp.derivative`` in few words: to find out what else might be
    asked for takes longer than a small net.
    """
    if is_compiling() or getattr(type(f), "__ctorch_mlp__", None) is not None:
        return None
    parts = _parts_again(f)
    return None if parts is None else _mlp_direct.derivative(*parts, x, v, order)


def mlp_for(f: Any, x: Tensor) -> MLP | None:
    """The MLP that a function is, where the kernels of ``ctorch.ops.mlp`` take it with this input.

    Not while compiling, nor under autocast, which would run the layers in another precision.
    """
    if x.ndim == 0 or is_compiling():
        return None
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return None
    net, dtype = as_mlp(f), x.dtype
    if net is None or (dtype is not torch.float32 and dtype is not torch.float64):
        return None
    first = net.weights[0]
    fits = x.shape[-1] == first.shape[1] and dtype is first.dtype and x.device == first.device
    return net if fits else None


Parts = tuple[tuple[Any, ...], tuple[Any, ...], list[tuple[str, float]]]


class _Known(NamedTuple):
    """What a module was made of, and what says whether it still is: its class, its attributes, its
    hooks, and all that of the modules in it, but for itself kept alive.
    """

    parts: Parts
    words: array.array[int]
    address: int
    objects: Objects
    module: weakref.ref[Any]


_known: dict[int, _Known] = {}
_MOST = 64


def _parts_again(f: Any) -> Parts | None:
    """``_parts``, which for a module that was seen before takes one call of compiled code."""
    known = _known.get(id(f))
    if known is not None and _kernels.library.unchanged(known.address):
        return known.parts
    parts = _parts(f)
    if parts is not None and _kernels.library is not None:
        _remember(f, parts)
    return parts


def _remember(f: nn.Module, parts: Parts) -> None:
    objects = Objects()
    dicts = [_MODULE[name] for name in _GLOBAL_HOOKS]
    for module in f.modules():
        own = module.__dict__
        dicts += (own, *map(own.__getitem__, ("_modules", "_parameters", *_HOOKS)))
        if not objects.has(module, own):
            return
    if not all(map(objects.hold, dicts)):
        return
    if len(_known) >= _MOST:
        _known.clear()
    words, key = objects.words(), id(f)
    objects.release(f)
    gone = weakref.ref(f, lambda _: _known.pop(key, None))
    _known[key] = _Known(parts, words, words.buffer_info()[0], objects, gone)


def _parts(f: Any) -> Parts | None:
    """Weights, biases and activations of a module made of layer, activation, layer, ... , layer."""
    if not isinstance(f, nn.Module) or _global_hooks():
        return None
    working: list[nn.Module] = []
    if not _flatten(f, working) or len(working) % 2 == 0:
        return None
    weights, biases = [], []
    for layer in working[::2]:
        if type(layer) is not nn.Linear:
            return None
        parameters = layer.__dict__["_parameters"]
        weights.append(parameters["weight"])
        biases.append(parameters["bias"])
    kinds = []
    for part in working[1::2]:
        found = _activation(part)
        if found is None:
            return None
        kinds.append(found)
    return tuple(weights), tuple(biases), kinds


def _flatten(module: nn.Module, working: list[nn.Module]) -> bool:
    """Appends the modules that a module runs one after the other, but for those that do nothing.

    Returns:
        Whether they compute what their classes say.
    """
    if not _untouched(module):
        return False
    kind = type(module)
    if kind is nn.Sequential:
        for part in module.__dict__["_modules"].values():
            if part is not None and not _flatten(part, working):
                return False
    elif kind is nn.Dropout:
        if module.training and module.p != 0:
            working.append(module)
    elif kind is not nn.Identity:
        working.append(module)
    return True


def _activation(module: nn.Module) -> tuple[str, float] | None:
    """The name of an activation in ``ctorch.ops.mlp.ACTIVATIONS`` and its parameter."""
    plain = _PLAIN.get(type(module))
    if plain is not None:
        return plain
    if type(module) is nn.Softplus:  # torch takes it as linear above the threshold
        usual = module.threshold >= 20 and module.beta > 0
        return ("softplus", float(module.beta)) if usual else None
    if type(module) is nn.GELU:
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
        return None if name is None else (name, 0.0)
    return None


_PLAIN = {
    nn.Tanh: ("tanh", 0.0),
    nn.Sigmoid: ("sigmoid", 0.0),
    nn.SiLU: ("silu", 0.0),
    nn.ReLU: ("relu", 0.0),
}


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _untouched(module: nn.Module) -> bool:
    """Whether a module computes what its class says and nothing more."""
    own = module.__dict__  # asked at each call: no look-ups by torch, no loop
    if (
        own.get("_forward_hooks")
        or own.get("_forward_pre_hooks")
        or own.get("_backward_hooks")
        or own.get("_backward_pre_hooks")
        or "forward" in own
        or "__call__" in own
        or "_call_impl" in own
    ):
        return False
    if type(module) is nn.Linear:  # pruning and old-style norms leave tensors that hooks fill
        parameters = own["_parameters"]
        return parameters.keys() == _LINEAR and isinstance(parameters["weight"], Tensor)
    return True


_LINEAR = {"weight", "bias"}


def _global_hooks() -> bool:
    return any(map(_MODULE.get, _GLOBAL_HOOKS))


_MODULE = vars(torch.nn.modules.module)
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
