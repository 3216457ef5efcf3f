"""The functions of torch: what they are called, and which of them ask arguments for a rule."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


def targets(name: str) -> list[Function]:
    """The functions of torch that a name stands for."""
    # under torch.einsum, torch.norm and others lies one of the same name, with its own dispatch
    places: tuple[Any, ...] = (torch, torch.special, torch._C._VariableFunctions)
    if name.startswith("__"):
        places = ()
    return [getattr(place, name) for place in (*places, Tensor) if hasattr(place, name)]


def name_of(func: Any) -> str:
    """What a user calls the function."""
    name = getattr(func, "__name__", None) or str(func)
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{func}"
    if getattr(Tensor, name, None) is func:
        return f"torch.Tensor.{name}"
    for place, prefix in ((torch, "torch"), (torch.nn.functional, "torch.nn.functional")):
        if getattr(place, name, None) is func:
            return f"{prefix}.{name}"
    for part in ("special", "fft", "linalg"):  # torch._C._special.special_erfcx and the like
        if name.startswith(f"{part}_"):
            return f"torch.{part}.{name[len(part) + 1 :]}"
    return f"{getattr(func, '__module__', None) or 'torch'}.{name}"


def writes(func: Any) -> bool:
    """Whether a function works in place."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def dispatches(function: Any) -> bool:
    """Whether a function asks its arguments for a rule."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    if isinstance(function, types.FunctionType):  # in Python: says so itself, or torch lists it
        return (
            "handle_torch_function" in function.__code__.co_names
            or function in torch.overrides.get_testing_overrides()
        )
    if isinstance(function, types.BuiltinFunctionType):
        return (function.__module__ or "torch").partition(".")[0] == "torch"
    if isinstance(function, types.MethodWrapperType):  # the __get__ of an attribute
        function = function.__self__
    return getattr(function, "__objclass__", None) in Tensor.__mro__[:-1]  # a method of tensors


def no_rule(kind: type, name: str, in_place: bool = False) -> str:
    """The message of a missing rule."""
    if in_place:
        return (
            f"{name}: in-place writing has no rule for a {kind.__name__}; use the function that "
            f"returns a new value, or torch.cat, torch.stack, torch.where"
        )
    return (
        f"{name} has no rule to carry derivatives ({kind.__name__}); express it by functions that "
        f"have one, or register a rule:\n"
        f"    @ctorch.autodiff.register_jet_rule({name})\n"
        f"    def rule(x, ...):  # the arguments of {name}; returns the same out of known functions"
    )
