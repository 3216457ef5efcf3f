"""The short way to a native solve that has been asked for before with other numbers."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ctorch.codegen import Traced, Untraceable, trace
from ctorch.ode import arguments, native
from ctorch.ode.native_again import Again, again
from ctorch.ode.native_source import Form
from ctorch.ode.native_task import Task
from ctorch.ode.solution import Solution, Stats, Status
from ctorch.ode.transforms import transforms_active


@dataclasses.dataclass
class Recipe:
    """A solve without its arrays.

    Attributes:
        form: what its library is made for.
        task: its settings.
        call: of one with a gradient, all but func, what was made of it, and tensors.
    """

    form: Form
    task: bytes
    call: native.Call | None


@dataclasses.dataclass
class Short:
    """What solves one vector field by one recipe again, once it was solved some times.

    Attributes:
        func, key: the field, and the key of the recipe.
        again: there may be no such way.
        calls: without it; when there are as many as ``patience`` it is looked for.
    """

    func: Callable[[], Any]
    key: Any
    again: Again | None = None
    calls: int = 0
    patience: int = 2


_T = TypeVar("_T")
_MOST = 512
_recipes: dict[tuple[Any, bool], Recipe] = {}  # by key and whether there is a gradient
_FEW = 8  # what fields reach is kept alive
_short: dict[int, Short] = {}  # by the identity of the field


def key_of(y0: Any, rtol: Any, atol: Any, options: Any, *settings: Any) -> Any:
    """What solves with the same recipe agree in; None: only the long way leads there."""
    if type(y0) is not Tensor or options or not (_is_number(rtol) and _is_number(atol)):
        return None
    if y0.is_complex():  # its pairs are made and taken apart on the long way
        return None
    key = (y0.shape, y0.dtype, y0.device, rtol, atol, *settings)
    try:
        hash(key)
    except TypeError:  # what is wrong is said on the long way
        return None
    return key


def _is_number(x: Any) -> bool:
    return x.__class__ is float or x.__class__ is int


def remember(key: Any, call: native.Call) -> None:
    """Keep how a solve was made."""
    if call.task.knots or call.problem.t.requires_grad:
        return
    if len(_recipes) >= _MOST:
        _recipes.clear()
    kept = None
    if call.gradient:
        request = _changed(call.request, func=None, y0=None, t=None, args=())
        problem = _changed(call.problem, field=None, y0=None, t=None)
        arrays = dict.fromkeys(("traced", "library", "task", "y0", "t", "own", "shared"))
        kept = _changed(call, request=request, problem=problem, **arrays)
    _recipes[key, call.gradient] = Recipe(call.form, bytes(call.task), kept)


def _changed(thing: _T, **attributes: Any) -> _T:
    """A shallow copy with other attributes."""
    copy = object.__new__(type(thing))
    copy.__dict__.update(thing.__dict__, **attributes)
    return copy


def solve(
    key: Any, func: Any, y0: Tensor, t: Any, args: tuple[Any, ...], batched: bool, differs: bool
) -> Solution | None:
    """Solve by the recipe with that key; None where there is none, or where something is unusual.

    Args:
        key: of the recipe.
        func, y0, t, args, batched: as for ``solve_ode``.
        differs: whether a gradient would be wanted.
    """
    if any(hasattr(func, name) for name in arguments.CALLBACKS):
        return None
    short = _short.get(id(func))
    if short is not None and short.again is not None and short.func() is func and short.key == key:
        times = t.double() if type(t) is Tensor and t.is_floating_point() else t
        done = short.again(y0, times, *args)
        if done is not None:
            done.t = t
            return done
    if (key, False) not in _recipes and (key, True) not in _recipes:
        return None
    if native.refused(func) or transforms_active() or not y0.is_contiguous():
        return None
    t = arguments.check_times(t, y0.device, strict=False, batched=batched)
    if t.dim() == 2 and t.shape[0] != y0.shape[0]:
        return None
    try:
        traced = trace(func, y0, t, args, batched=batched)
    except Untraceable:
        return None
    own = traced.own if traced.field.own_size else None
    gradient = False
    if differs and torch.is_grad_enabled():
        if t.requires_grad:
            return None
        gradient = y0.requires_grad or any(x.requires_grad for x in traced.shared)
        gradient = gradient or (own is not None and own.requires_grad)
    recipe = _recipes.get((key, gradient))
    library = None if recipe is None else native.known_library(traced, recipe.form)
    if recipe is None or library is None:
        return None
    if recipe.call is not None:
        return _with_gradient(recipe.call, library, recipe.task, traced, func, y0, t, args)
    done = _without_gradient(library, recipe.task, traced, own, y0, t, batched)
    one = not batched and (not traced.field.split or y0.shape[0] == 1)
    if one and done is not None and y0.is_cpu and all(isinstance(x, Tensor) for x in args):
        field, problem, times = traced.field, traced.problem, t.detach().double()
        _shorten(key, func, lambda: again(library.ct_solve, recipe.task, field, problem, times))
    return done


def _shorten(key: Any, func: Any, find: Callable[[], Again | None]) -> None:
    """Note a solve that took this way; look for a shorter one now and then."""
    short = _short.get(id(func))
    if short is None or short.func() is not func or short.key != key:
        if len(_short) >= _FEW:
            least = [place for place, other in [*_short.items()] if other.again is None]
            _short.pop((least or [*_short])[0], None)
        try:
            short = _short[id(func)] = Short(weakref.ref(func), key)
        except TypeError:  # it cannot be watched
            return
    short.calls += 1
    if short.calls >= short.patience:
        short.calls, short.patience = 0, min(2 * short.patience, 1024)
        short.again = find() or short.again


def _with_gradient(
    kept: native.Call,
    library: Any,
    settings: bytes,
    traced: Traced,
    func: Any,
    y0: Tensor,
    t: Tensor,
    args: tuple[Any, ...],
) -> Solution | None:
    from ctorch.ode.native_gradient import with_gradient

    problem = _changed(kept.problem, y0=y0, t=t)
    batch, dtype, device = native.batch_of(problem, traced), y0.dtype, y0.device
    call = _changed(
        kept,
        library=library,
        request=_changed(kept.request, func=func, y0=y0, t=t, args=args),
        problem=problem,
        traced=traced,
        batch=batch,
        y0=y0.detach().view(batch, -1),
        t=native.plain(t.detach(), torch.float64, device),
        own=native.plain(traced.own.detach(), dtype, device),
        shared=[native.plain(x.detach(), dtype, device) for x in traced.shared],
        task=Task.from_buffer_copy(settings),
    )
    run = with_gradient(call)
    if run.failure is not None:  # the long way says why
        return None
    return Solution(t, run.rows, run.stats, run.status)


def _without_gradient(
    library: Any,
    settings: bytes,
    traced: Traced,
    own: Tensor | None,
    y0: Tensor,
    t: Tensor,
    batched: bool,
) -> Solution | None:
    field, shared, dtype, device = traced.field, traced.shared, y0.dtype, y0.device
    batch = y0.shape[0] if field.split else 1
    outcome = native.execute(
        library.ct_solve,
        Task.from_buffer_copy(settings),
        (batch, field.dim),
        native.rows_shape(y0, t, batched),
        y0,
        native.plain(t, torch.float64, device),
        None if own is None else native.plain(own, dtype, device),
        [native.plain(x, dtype, device) for x in shared],
        not batched,
    )
    if outcome.failed:  # the long way says why
        return None
    if batched:
        nfe, accepted, rejected, status = outcome.numbers[:4]
        stats = Stats(nfe, accepted, rejected)
        return Solution(t, outcome.rows, stats, status)
    return Solution(t, outcome.rows, Stats(*outcome.counts()[:3]), Status.SUCCESS)
