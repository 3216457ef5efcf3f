"""The short way to a native solve that has been asked for before with other numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ctorch.codegen import Untraceable, trace
from ctorch.ode import arguments, native
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
    """

    form: Form
    task: bytes


_MOST = 512
_recipes: dict[Any, Recipe] = {}


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
    if call.gradient or call.task.knots:
        return
    if len(_recipes) >= _MOST:
        _recipes.clear()
    _recipes[key] = Recipe(call.form, bytes(call.task))


def solve(
    key: Any, func: Any, y0: Tensor, t: Any, args: tuple[Any, ...], batched: bool, differs: bool
) -> Solution | None:
    """Solve by the recipe with that key; None where there is none, or where something is unusual.

    Args:
        key: of the recipe.
        func, y0, t, args, batched: as for ``solve_ode``.
        differs: whether a gradient would be wanted.
    """
    recipe = _recipes.get(key)
    if recipe is None or native.refused(func) or transforms_active() or not y0.is_contiguous():
        return None
    if any(hasattr(func, name) for name in arguments.CALLBACKS):
        return None
    t = arguments.check_times(t, y0.device, strict=False, batched=batched)
    try:
        traced = trace(func, y0, t, args, batched=batched)
    except Untraceable:
        return None
    library = native.known_library(traced, recipe.form)
    if library is None or (t.dim() == 2 and t.shape[0] != y0.shape[0]):
        return None
    own, shared = traced.own, traced.shared
    inputs = (y0, t, own, *shared)
    if differs and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return None
    shape, rows, dtype = y0.shape, t.shape[-1], y0.dtype
    batch = shape[0] if traced.field.split else 1
    outcome = native.execute(
        library.ct_solve,
        Task.from_buffer_copy(recipe.task),
        y0.detach().view(batch, -1),
        native.plain(t, torch.float64, y0.device),
        native.plain(own, dtype, y0.device),
        [native.plain(x, dtype, y0.device) for x in shared],
        not batched,
    )
    if outcome.failed:  # the long way says why
        return None
    if batched:
        nfe, accepted, rejected, status = outcome.numbers[:4]
        stats = Stats(nfe, accepted, rejected)
        return Solution(t, outcome.rows.view(batch, rows, *shape[1:]), stats, status)
    stats = Stats(*outcome.numbers.select(1, 0).tolist()[:3])
    return Solution(t, outcome.rows.view(rows, *shape), stats, Status.SUCCESS)
