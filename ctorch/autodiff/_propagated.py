"""Values that carry derivatives through plain torch code, and the rules by which they do.

A ``Propagated`` takes the place of a tensor in a call of a user's function. It is a plain class
with ``__torch_function__``: every torch function that meets one looks up a rule. A rule is written
once, in terms of a few primitives (``linear``, ``shift``, ``join``, ``unary``, ``integrate``,
``times``, ``bilinear``, ``over``) that each kind of propagation implements: ``Jet`` carries Taylor
coefficients, ``Stream`` computes them order by order, ``Lap`` carries Jacobian rows and a
Laplacian. A function without a rule raises; nothing falls back to a computation that would drop
derivatives.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ctorch.autodiff._functions import dispatches, name_of, no_rule, targets, writes
from ctorch.autodiff._keywords import Arguments, arranged

Function = Callable[..., Any]
P = TypeVar("P", bound="Propagated")

RULES: dict[Any, Function] = {}  # torch function, or (kind, torch function) -> rule
METHODS: dict[Any, Function] = {}  # name of a method of tensors, or (kind, name) -> rule


class _Shared:
    """What a value and its views hold in common: as many references as there are of them."""

    __slots__ = ()


class MissingRuleError(NotImplementedError, AttributeError):
    """A torch function met a value that carries derivatives and has no rule for it.

    The message names the function; ``register_jet_rule`` adds a rule.
    """


class Propagated:
    """A tensor together with derivative information; see the module's text.

    Attributes:
        value: the tensor itself, ``[*shape]``.
        order: how many times a change of the value, ``x - x.value``, may be multiplied with itself
            (or another's) before nothing of it is left: the order K of ``Jet``, 2 of ``Lap``.
    """

    __slots__ = ("_aliased",)
    __array_priority__ = 1000  # numpy leaves binary operations to this class
    _aliased: _Shared
    order: int
    _own_dispatch = False  # whether a subclass has a __torch_function__ of its own

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._own_dispatch = cls.__torch_function__.__func__ is not _TORCH_FUNCTION  # type: ignore[attr-defined]

    # ---- what a kind of propagation implements

    @property
    def value(self) -> Tensor:
        raise NotImplementedError

    def linear(self: P, fn: Function) -> P:
        """``fn(x)``; ``fn: [*lead, *shape] -> [*lead, *out]`` is linear, for any leading dims."""
        raise NotImplementedError

    def shift(self: P, constant: Tensor | complex) -> P:
        """``x + constant``, which may broadcast the shape up."""
        raise NotImplementedError

    def affine(self: P, fn: Function, constant: Tensor) -> P:
        """``fn(x) + constant`` with a linear ``fn`` that returns new memory."""
        return self.linear(fn).shift(constant)

    @classmethod
    def join(cls: type[P], fn: Function, parts: Sequence[Any]) -> P:
        """``fn(parts)``, linear in all parts jointly, as ``cat`` is; constants are tensors.

        ``fn`` gets a list of tensors ``[*lead, *shape_i]`` with the same leading dims.
        """
        raise NotImplementedError

    def unary(self: P, name: str, param: float = 0.0) -> P:
        """An elementwise function of ``ctorch.ops.jet.UNARY``."""
        raise NotImplementedError

    def integrate(self: P, value: Tensor, slope: P | Tensor) -> P:
        """The ``y`` with this value and ``dy = slope * dx``: any ``f(x)`` from a rule of ``f'``."""
        raise NotImplementedError

    def times(self: P, other: P) -> P:
        """Elementwise product of two that carry derivatives; shapes broadcast."""
        raise NotImplementedError

    def over(self: P, other: P) -> P:
        """Elementwise quotient of two that carry derivatives; shapes broadcast."""
        raise NotImplementedError

    @classmethod
    def bilinear(cls: type[P], fn: Function, a: P, b: P) -> P:
        """``fn(a, b)``, linear in each; ``fn: [*lead, ..], [*lead, ..] -> [*lead, ..]``."""
        raise NotImplementedError

    def _assign(self: P, other: P) -> None:
        """Takes over the contents of another of the same kind, for in-place functions."""
        raise NotImplementedError

    # ---- what it has in common with a tensor

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def layout(self) -> torch.layout:
        return self.value.layout

    @property
    def requires_grad(self) -> bool:
        return self.value.requires_grad

    @property
    def is_nested(self) -> bool:
        return False

    @property
    def is_sparse(self) -> bool:
        return False

    @property
    def is_quantized(self) -> bool:
        return False

    @property
    def is_cuda(self) -> bool:
        return self.value.is_cuda

    @property
    def is_cpu(self) -> bool:
        return self.value.is_cpu

    def dim(self) -> int:
        return self.value.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.value.shape if dim is None else self.value.shape[dim]

    def numel(self) -> int:
        return self.value.numel()

    nelement = numel

    def is_floating_point(self) -> bool:
        return self.value.is_floating_point()

    def is_complex(self) -> bool:
        return self.value.is_complex()

    def is_contiguous(self, *_: Any, **__: Any) -> bool:
        return True

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError(
                f"len() of a {type(self).__name__} of no dims; torch.tensor and torch.as_tensor do "
                f"not take values that carry derivatives: use torch.stack or torch.cat"
            )
        return len(self.value)

    def __iter__(self) -> Any:
        return iter(cast(Any, self).unbind(0))

    def __bool__(self) -> bool:
        return bool(self.value)  # control flow looks at the value alone

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(self.value.detach(), spec) if spec else repr(self)  # to be printed

    def _leaves(self, what: str) -> Any:
        raise TypeError(
            f"{what} of a {type(self).__name__} would drop its derivatives; compute with torch "
            f"functions, or use .detach() where the value alone is meant"
        )

    def __float__(self) -> float:
        return cast(float, self._leaves("float()"))

    def __int__(self) -> int:
        return cast(int, self._leaves("int()"))

    def __complex__(self) -> complex:
        return cast(complex, self._leaves("complex()"))

    def __array__(self, *_: Any, **__: Any) -> Any:
        self._leaves("a numpy array")

    def item(self) -> float:
        return cast(float, self._leaves(".item()"))

    def numpy(self, *_: Any, **__: Any) -> Any:
        self._leaves(".numpy()")

    def tolist(self) -> Any:
        self._leaves(".tolist()")

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise MissingRuleError(no_rule(type(self), f"torch.Tensor.{name}"))

    # ---- dispatch

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch._tensor" and is_compiling():
            name = func.__name__  # Dynamo does not find such functions in a table
            rule = METHODS.get((cls, name)) or METHODS.get(name)
        else:
            rule = RULES.get((cls, func)) or RULES.get(func) or _rule_of_aten(cls, func)
        if rule is None:
            raise MissingRuleError(no_rule(cls, name_of(func), writes(func)))
        if not torch.is_grad_enabled() and getattr(_running, "recorded", False):
            _check_recorded(rule, func, cls)
        if kwargs:
            if kwargs.get("out") is not None:
                raise TypeError(f"{name_of(func)}: out= cannot take a {cls.__name__}; drop it")
            args, kwargs = _arguments(rule, func, args, kwargs)
            return rule(*args, **kwargs)
        return rule(*args)


_TORCH_FUNCTION = Propagated.__torch_function__.__func__  # type: ignore[attr-defined]


def rule(*functions: Function | str, kind: type[Propagated] | None = None) -> Any:
    """Decorator: registers a rule for torch functions.

    A string stands for all of ``torch.NAME``, ``torch.special.NAME`` and ``torch.Tensor.NAME``, and
    gives ``Propagated`` a method of this name. With ``kind`` the rule serves that kind alone.
    """

    def register(function: Function) -> Function:
        for key in functions:
            for target in targets(key) if isinstance(key, str) else [key]:
                RULES[target if kind is None else (kind, target)] = function
            name = key if isinstance(key, str) else getattr(key, "__name__", "")
            method = getattr(Tensor, name, None)
            if callable(method) and (name is key or method is key):
                METHODS[name if kind is None else (kind, name)] = function
                if name not in Propagated.__dict__:
                    setattr(Propagated, name, _method(name, method))
        return function

    return register


_register = rule


def register_jet_rule(
    function: Function, rule: Function | None = None, *, kind: type[Propagated] | None = None
) -> Any:
    """Tells derivative operators how to go through a torch function that they do not know.

    The rule is called with the function's own arguments, in which values that carry derivatives
    stand for tensors. It computes the same result out of functions that have rules; where that is
    not possible, out of the primitives of ``ctorch.autodiff.Propagated``: ``x.value`` is the
    tensor, ``x.linear(fn)`` applies a linear function, ``x.integrate(value, slope)`` an elementwise
    function given by its value and (the rule of) its derivative. One rule serves ``jet``,
    ``derivative``, ``taylor_series``, ``laplacian`` and ``divergence``.

    Args:
        function: a torch function, method or operator, as ``torch.special.i0`` or
            ``torch.ops.mylib.myop``: what dispatches through ``__torch_function__``.
        rule: the rule; without it, this is a decorator.
        kind: ``ctorch.autodiff.Jet`` or ``Lap``, where the rule serves values of this kind alone: a
            closed form of a Laplacian, say.

    Returns:
        The rule.

    Raises:
        TypeError: ``function`` or ``rule`` cannot be called; ``function`` does not dispatch, so
            that its rule would never be used; ``kind`` is no kind of value.

    Example:
        >>> import torch, ctorch
        >>> @ctorch.autodiff.register_jet_rule(torch.special.spherical_bessel_j0)
        ... def j0(x):
        ...     return torch.sinc(x / torch.pi)
    """
    if rule is None:
        return lambda given: register_jet_rule(function, given, kind=kind)
    for name, given in (("function", function), ("rule", rule)):
        if not callable(given):
            raise TypeError(f"{name}: expected something callable, got {type(given).__name__}")
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, Propagated)):
        raise TypeError(f"kind: expected ctorch.autodiff.Jet, Lap or None, got {kind!r}")
    overload = getattr(function, "_opoverload", None)  # of torch.library.custom_op
    if overload is not None:
        function = overload.overloadpacket
    if not dispatches(function):
        raise TypeError(
            f"function: {name_of(function)} does not dispatch through __torch_function__: it runs "
            f"as it is, and a rule for it would never be used. Derivative operators go through "
            f"what it calls; give the rule to the one among these that has none, make it an "
            f"operator by torch.library.custom_op, or let it dispatch: "
            f"f = torch.overrides.wrap_torch_function(lambda x: (x,))(f), called and registered "
            f"under that name"
        )
    _register(function, kind=kind)(rule)
    return rule


_running = threading.local()


def propagate(f: Function, *values: Any) -> Any:
    """``f(*values)`` for a derivative operator.

    Raises:
        TypeError: another operator is running ``f`` from outside: a value of the outer one, caught
            by a closure, would be taken for one of the inner.
    """
    if is_compiling():
        return f(*values)
    if getattr(_running, "inside", False):
        raise TypeError(
            "derivative operators do not nest: within a function that one of them differentiates, "
            "take further derivatives by torch.autograd.grad around it, or ask for a higher order"
        )
    _running.inside, _running.recorded = True, torch.is_grad_enabled()
    try:
        return f(*values)
    finally:
        _running.inside = _running.recorded = False


def constant(x: Any) -> bool:
    """Whether a value carries no derivatives."""
    return not isinstance(x, Propagated)


def value_of(x: Any) -> Any:
    """The tensor of a value, or the thing itself."""
    return x.value if isinstance(x, Propagated) else x


def kind_of(*values: Any) -> type[Propagated]:
    """The one kind of propagation among some values."""
    if len(values) == 2 and type(values[0]) is type(values[1]) and not constant(values[0]):
        return type(values[0])
    kinds = {type(x) for x in values if isinstance(x, Propagated)}
    if len(kinds) != 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"values of several derivative operators meet ({names}): do not nest them")
    return kinds.pop()


def in_place(function: Function) -> Function:
    """The rule of an in-place function from that of the function: the result goes into ``x``."""

    def assign(x: Any, *args: Any, **kwargs: Any) -> Any:
        return write(x, function(x, *args, **kwargs), "an in-place function")

    return assign


def write(x: Any, result: Any, what: str, shape: Any = None) -> Propagated:
    """Puts the result of an in-place function into ``x``, of this (or x's) shape, if it is safe."""
    if constant(x):
        raise TypeError(
            f"{what} would write a {type(result).__name__} into a plain tensor, which drops its "
            f"derivatives: build the result with torch.cat, torch.stack or torch.where, or start "
            f"from a value that carries derivatives (x.clone(), torch.zeros_like(x) * x)"
        )
    if result.shape != (x.shape if shape is None else shape):
        raise ValueError(f"{what} would change the shape {tuple(x.shape)} to {tuple(result.shape)}")
    if isinstance(result, Tensor):  # a constant
        result = x.linear(torch.zeros_like).shift(result)
    if _is_shared(x):
        raise TypeError(
            f"{what} would change a {type(x).__name__} that shares memory with a view of it: use "
            f"the function that returns a new value, or clone() first"
        )
    x._assign(result)
    return cast(Propagated, x)


def aliased(x: Any, view: Any) -> Any:
    """Marks views of a value: while both live, neither may be written in place."""
    shared = getattr(x, "_aliased", None)
    if shared is None:
        shared = x._aliased = _Shared()
    if isinstance(view, tuple):
        for part in view:
            part._aliased = shared
    else:
        view._aliased = shared
    return view


def _is_shared(x: Any) -> bool:
    shared = getattr(x, "_aliased", None)
    if shared is None:
        return False
    if is_compiling():  # which cannot count references
        return True
    return sys.getrefcount(shared) > 3  # x, the variable, and the argument


# ---- how a rule is found


def _method(name: str, target: Function) -> Function:
    """A method that calls its rule, by name: methods written in Python have no key in Dynamo."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        if kind._own_dispatch:
            return kind.__torch_function__(target, (), (self, *args), kwargs)
        found = METHODS.get((kind, name)) or METHODS.get(name)
        if found is None:  # there is one for another kind
            raise MissingRuleError(no_rule(kind, f"torch.Tensor.{name}", writes(method)))
        if not torch.is_grad_enabled() and getattr(_running, "recorded", False):
            _check_recorded(found, target, kind)
        if kwargs:
            args, kwargs = _arguments(found, target, (self, *args), kwargs)
            return found(*args, **kwargs)
        return found(self, *args)

    method.__name__ = name
    return method


def _arguments(rule: Function, func: Function, args: Any, kwargs: dict[str, Any]) -> Arguments:
    """Arguments as the rule takes them; Dynamo reads no signatures, so there it is one name."""
    if not is_compiling():
        return arranged(rule, func, args, kwargs)
    if args or "input" not in kwargs:
        return args, kwargs
    return (kwargs["input"],), {name: x for name, x in kwargs.items() if name != "input"}


def _rule_of_aten(kind: type[Propagated], func: Any) -> Function | None:
    """The rule of an ``aten`` operator is that of the torch function of the same name."""
    packet = getattr(func, "overloadpacket", func)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    if packet is not func:
        found = RULES.get((kind, packet)) or RULES.get(packet)
        if found is not None:
            return found
    namespace, _, name = packet._qualified_op_name.partition("::")
    target = getattr(torch, name, None) if namespace == "aten" else None
    return RULES.get((kind, target)) or RULES.get(target)


def _check_recorded(rule: Function, func: Function, kind: type[Propagated]) -> None:
    """Refuses derivatives where ``f`` switched gradients off: torch would take a constant."""
    if getattr(rule, "constant", False):
        return
    raise TypeError(
        f"{name_of(func)} of a {kind.__name__} where gradients are switched off within f, by "
        f"torch.no_grad or in the forward of a torch.autograd.Function: what is meant as constant "
        f"takes x.detach(); in place of a Function with a backward of its own, use a torch.library "
        f"operator and give it a rule (ctorch.autodiff.register_jet_rule)"
    )
