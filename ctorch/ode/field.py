"""The vector field as the solver calls it: packed, counted, checked, and with its graph where one
is wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ctorch.ode.layout import Layout
from ctorch.ode.linear_layers import Reached, hooks_so_far


class Stage:
    """One evaluation ``k = f(t, y)``; where a gradient is wanted, ``y`` (and ``t``) are leaves of
    its graph, and ``reached`` says how that reaches the captured tensors, once it was audited.
    """

    __slots__ = ("k", "reached", "t", "y")

    def __init__(self, t: Tensor, y: Tensor, k: Tensor) -> None:
        self.t, self.y, self.k = t, y, k
        self.reached: Reached | None = None


class Keeper:
    """Keeps slopes over later evaluations: a field may write all that it returns to one memory.

    Not for slopes with a graph, in which autograd itself refuses such writing.
    """

    def __init__(self, returned: Tensor) -> None:
        self._returned = returned  # held, so that its memory is given to nobody else

    def first(self) -> Tensor:
        """What the field returned first, out of its reach."""
        return self._returned.clone()

    def keep(self, k: Tensor) -> Tensor:
        """``k``, or a copy if it lies where the first slope was returned."""
        if k.__class__ is Tensor and k.data_ptr() == self._returned.data_ptr():
            return k.clone()
        return k


class UnexpectedGraph(Exception):
    """A slope requires grad where nothing was known to; ``stage`` is the evaluation."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage


class VectorField:
    """``func(t, y, *args)`` on the solver's packed state.

    Attributes:
        nfe: number of evaluations so far.
    """

    def __init__(
        self, func: Callable[..., Any], layout: Layout, args: tuple[Any, ...] = ()
    ) -> None:
        self.func = func
        self.layout = layout
        self.args = args
        #: func of (t, y) alone
        self.call = (lambda t, y: func(t, y, *args)) if args else func
        self.nfe = 0
        #: hooks registered before the first evaluation
        self.hooks = hooks_so_far()
        self.autocast = _autocast_state(layout.device.type)
        self._plain = layout.plain
        self._shape = layout.shape
        self._dtype = layout.dtype

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope at ``(t, y)``, packed. ``t``: 0-dim, or ``[B, 1, ..., 1]`` in a batched
        solve.
        """
        self.nfe += 1
        if self._plain:
            k = self.call(t, y)
            if isinstance(k, Tensor) and k.shape == self._shape and k.dtype is self._dtype:
                return k
            return self.checked(k)
        k = self.call(t, self.layout.unpack(y))
        self.layout.check_like(k, "func")
        packed = self.layout.pack(k)
        return packed if packed.dtype is self._dtype else packed.to(self._dtype)

    def value(self, t: Tensor, y: Tensor) -> Stage:
        """Evaluate without a graph.

        Raises:
            UnexpectedGraph: grad mode is on, and the slope has a graph although the state has none.
        """
        version = _version(y)
        k = self(t, y)
        if _version(y) != version:
            self.refuse_changed_state()
        stage = Stage(t, y, k)
        if k.requires_grad and torch.is_grad_enabled():
            raise UnexpectedGraph(stage)
        return stage

    def amended(self, t: Tensor, y: Tensor, k: Any) -> Tensor:
        """What ``func`` returned for a plain state, looked at closely.

        Raises:
            UnexpectedGraph: grad mode is on, and the slope has a graph although the state has none.
        """
        if k.__class__ is not Tensor or k.dtype is not self._dtype or k.shape != self._shape:
            k = self.checked(k)
        if y._version:
            self.refuse_changed_state()
        if k.requires_grad and torch.is_grad_enabled():
            raise UnexpectedGraph(Stage(t, y, k))
        return k

    def checked(self, k: Any) -> Tensor:
        """What ``func`` returned for a plain state, in its dtype; or the error that says why."""
        self.layout.check_like(k, "func")
        return k.to(self._dtype)

    def refuse_changed_state(self) -> None:
        """``func`` wrote into the state that it was given."""
        raise RuntimeError(
            "func changed its argument y in place, which would corrupt the solve: work on a copy"
            " (y.clone()) or use out-of-place operations."
        )

    def record(self, t: Tensor, y: Tensor) -> Stage:
        """Evaluate with a graph whose leaf is ``y``, a fresh tensor."""
        y.requires_grad_(True)
        if torch.is_grad_enabled():
            return Stage(t, y, self(t, y))
        torch._C._set_grad_enabled(True)  # what `enable_grad` does, without a microsecond of Python
        try:
            return Stage(t, y, self(t, y))
        finally:
            torch._C._set_grad_enabled(False)

    def record_with_time(self, t: Tensor, y: Tensor) -> Stage:
        """Evaluate with a graph whose leaves are ``y`` and ``t``, fresh tensors."""
        t.requires_grad_(True)
        return self.record(t, y)

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Evaluate again as in the forward pass: its autocast state, and buffers as they are after
        it.
        """
        from ctorch.ode.capture import held_buffers  # which imports this file

        buffers = held_buffers((self.func, self.args))
        saved = [b.detach().clone() for b in buffers]
        with contextlib.ExitStack() as stack:
            for context in self.autocast():
                stack.enter_context(context)
            yield
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                if buffer._version and not torch.equal(buffer, value):
                    buffer.copy_(value)


def _version(y: Tensor) -> int:
    return 0 if y.is_inference() else y._version


def _autocast_state(device_type: str) -> Callable[[], list[Any]]:
    """Contexts that bring back the autocast settings in force now."""
    kinds = {device_type, "cpu"}
    state = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in kinds
        if torch.amp.is_autocast_available(kind)
    ]
    cache = torch.is_autocast_cache_enabled()
    return lambda: [
        torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=cache)
        for kind, enabled, dtype in state
        if enabled or torch.is_autocast_enabled(kind)
    ]
