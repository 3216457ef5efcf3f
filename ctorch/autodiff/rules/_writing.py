"""Rules of in-place functions, from those of the functions that return new values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff._propagated import RULES, in_place, rule

_NOT_WRITING = ("detach_", "requires_grad_", "squeeze_", "unsqueeze_", "transpose_", "t_", "swapdims_")


def _register() -> None:
    for place in (torch, Tensor, F, torch._C._nn):
        for name in dir(place):
            if not name.endswith("_") or name.endswith("__") or name in _NOT_WRITING:
                continue
            function, base = getattr(place, name), getattr(place, name[:-1], None)
            if not callable(base) or base not in RULES or function in RULES:
                continue
            if place is Tensor:
                rule(name)(in_place(RULES[base]))
            else:
                rule(function)(in_place(RULES[base]))


_register()
