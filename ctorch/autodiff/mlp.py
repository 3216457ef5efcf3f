"""Recognises plain MLPs, whose derivative operators have kernels of their own (ctorch.ops.mlp)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ctorch.ops.mlp import MLP as MLP

__all__ = ["MLP", "as_mlp"]


def as_mlp(f: Any) -> MLP | None:
    """The MLP that a function is, or None where it is not known to be one.

    Recognised are ``nn.Linear`` and ``nn.Sequential``, nested as deep as may be, of linear layers
    and smooth activation modules of **one** kind: layer, activation, layer, ... , layer. Identity,
    and dropout that does nothing (in eval mode, or with p = 0), are passed over. A module of a
    subclass, with hooks, with a parametrization, or with a forward of its own is not recognised,
    since it may compute something else.

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
    if not isinstance(f, nn.Module) or _global_hooks():
        return None
    parts = list(_flat(f))
    if not all(_untouched(part) for part in parts):
        return None
    working = [part for part in parts if not _does_nothing(part)]
    layers, between = working[::2], working[1::2]
    if len(working) % 2 == 0 or not all(type(layer) is nn.Linear for layer in layers):
        return None
    kinds = {_activation(part) for part in between}
    if None in kinds or len(kinds) > 1:
        return None
    name, param = (kinds.pop() or ("identity", 0.0)) if kinds else ("identity", 0.0)
    try:
        weights = tuple([cast(Tensor, layer._parameters["weight"]) for layer in layers])
        biases = tuple([layer._parameters["bias"] for layer in layers])
        return MLP(weights, biases, name, param)
    except (TypeError, ValueError):  # sizes that do not follow on each other, an integer dtype, ...
        return None


def mlp_for(f: Any, x: Tensor) -> MLP | None:
    """The MLP that a function is, where the kernels of ``ctorch.ops.mlp`` take it with this input.

    Not while compiling, nor under autocast, which would run the layers in another precision.
    """
    if x.ndim == 0 or is_compiling() or torch.is_autocast_enabled(x.device.type):
        return None
    net = as_mlp(f)
    if net is None:
        return None
    first = net.weights[0]
    fits = (x.shape[-1], x.dtype, x.device) == (first.shape[1], first.dtype, first.device)
    return net if fits and x.dtype in (torch.float32, torch.float64) else None


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a module runs one after the other; containers come before their parts."""
    yield module
    if type(module) is nn.Sequential:
        for part in module._modules.values():
            if part is not None:
                yield from _flat(part)


def _does_nothing(module: nn.Module) -> bool:
    if type(module) is nn.Dropout:
        return not module.training or module.p == 0
    return type(module) in (nn.Sequential, nn.Identity)


def _activation(module: nn.Module) -> tuple[str, float] | None:
    """The name of an activation in ``ctorch.ops.mlp.ACTIVATIONS`` and its parameter."""
    if type(module) is nn.Softplus:  # torch takes it as linear above the threshold
        usual = module.threshold >= 20 and module.beta > 0
        return ("softplus", float(module.beta)) if usual else None
    if type(module) is nn.GELU:
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
        return None if name is None else (name, 0.0)
    name = _PLAIN.get(type(module))
    return None if name is None else (name, 0.0)


_PLAIN = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.ReLU: "relu"}


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _untouched(module: nn.Module) -> bool:
    """Whether a module computes what its class says and nothing more."""
    own = vars(module)  # asked at each call of an operator: no generators, no look-ups by torch
    for name in _HOOKS:
        if own.get(name):
            return False
    if "forward" in own or "__call__" in own or "_call_impl" in own:
        return False
    if type(module) is nn.Linear:  # pruning and old-style norms leave tensors that hooks fill
        parameters = own["_parameters"]
        return parameters.keys() == _LINEAR and isinstance(parameters["weight"], Tensor)
    return True


_LINEAR = {"weight", "bias"}


def _global_hooks() -> bool:
    return any(map(vars(torch.nn.modules.module).get, _GLOBAL_HOOKS))


_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
