"""Whether a solve runs under ``torch.func`` transforms or forward-mode AD."""

from __future__ import annotations

import torch
from torch import Tensor


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform or a forward-mode AD level is at work."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def follows(times: Tensor) -> bool:
    """Whether derivatives in the user's times may be asked for."""
    return times.requires_grad or transforms_active()


def under_vmap(x: Tensor) -> bool:
    """Whether ``x`` stands for a batch whose values cannot be looked at."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False
