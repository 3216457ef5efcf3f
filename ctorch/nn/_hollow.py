"""What hollow nets have in common: transformers, time, and how they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctorch.autodiff.hollow import Hollow
from ctorch.ops.hollow import Transformer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sin": torch.sin,
}


class HollowNet(nn.Module):
    """A net ``f_i = tau(x_i, h_i)``; a subclass gives the conditioner.

    Args:
        context: size H of each ``h_i``.
        hidden: widths of the transformers' hidden layers.
        copies: how many transformers: 1, which all dimensions share, or one for each.
        activation: its name.
        time: whether the net takes time.
        options: dtype and device.
    """

    def __init__(
        self,
        context: int,
        hidden: Sequence[int],
        copies: int,
        activation: str,
        time: bool,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation: expected one of {allowed}, got {activation!r}")
        self.context = check_size("context", context)
        self.hidden = tuple(check_size("hidden", size) for size in hidden)
        if not self.hidden:
            raise ValueError("hidden: expected the width of one hidden layer at least, got none")
        self.activation = activation
        self.time = time
        sizes = (1 + context, *self.hidden, 1)
        self.tau_weights = nn.ParameterList(
            scaled((copies, out, into), into, options) for into, out in pairwise(sizes)
        )
        with torch.no_grad():  # x_i weighs as much as all of h_i
            self.tau_weights[0][..., 0] *= (sizes[0] / 2) ** 0.5
            self.tau_weights[0][..., 1:] *= (sizes[0] / (2 * context)) ** 0.5
        self.tau_biases = nn.ParameterList(
            nn.Parameter(torch.zeros(copies, out, **options)) for out in sizes[1:]
        )

    def forward(self, t: Any, x: Tensor) -> Tensor:
        """``f(t, x)`` [..., d].

        Args:
            t: time, a number or a tensor that broadcasts against [..., 1], as [B, 1]; not looked at
                where the net was made with ``time=False``.
            x: [..., d].
        """
        return self._halves()(t, x)

    def conditioner(self, t: Any, x: Tensor) -> Tensor:
        """The contexts ``h`` [..., d, H]; ``h_i`` does not depend on ``x_i``."""
        raise NotImplementedError

    def __ctorch_hollow__(self) -> Hollow | None:
        changed = type(self).forward is not HollowNet.forward or "forward" in vars(self)
        if changed or self._forward_hooks or self._forward_pre_hooks:
            return None  # it may compute something else than its halves do
        return self._halves()

    def transformer(self) -> Transformer:
        """The nets tau, as ``ctorch.ops.hollow.transform`` takes them."""
        return Transformer(tuple(self.tau_weights), tuple(self.tau_biases), self.activation, 1.0)

    def _halves(self) -> Hollow:
        return Hollow(self.conditioner, self.transformer())

    def _act(self, z: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](z)

    def _time_of(self, t: Any, x: Tensor) -> Any:
        """The time as it enters the net: None, a number, or a tensor like x [..., 1]."""
        if not self.time:
            return None
        if t is None:
            raise ValueError("t: this net takes time; give it, or make the net with time=False")
        if isinstance(t, (int, float)):
            return t
        if not hasattr(t, "shape"):
            raise TypeError(f"t: expected a number or a tensor, got {type(t).__name__}")
        wanted = (*x.shape[:-1], 1)
        sizes = zip(reversed(t.shape), reversed(wanted), strict=False)
        if t.ndim and (t.ndim > len(wanted) or any(a not in (1, b) for a, b in sizes)):
            raise ValueError(
                f"t: expected a number or a tensor that broadcasts to {wanted}, got "
                f"{tuple(t.shape)}; a time for each sample is [B, 1]"
            )
        return t if t.dtype is x.dtype else t.to(x.dtype)

    def _repr(self, **shown: Any) -> str:
        common = {
            "context": self.context,
            "hidden": self.hidden,
            "activation": self.activation,
            "time": self.time,
        }
        return ", ".join(f"{name}={value!r}" for name, value in {**shown, **common}.items())


def scaled(shape: tuple[int, ...], fan_in: float | Tensor, options: dict[str, Any]) -> nn.Parameter:
    """Normal weights of variance ``1 / fan_in``."""
    return nn.Parameter(torch.randn(shape, **options) * torch.as_tensor(fan_in, **options) ** -0.5)


def check_size(name: str, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name}: expected >= 1, got {size}")
    return size


def check_last(x: Any, d: int) -> None:
    """Refuses x that is not [..., d]."""
    if x.ndim < 1 or x.shape[-1] != d:
        raise ValueError(f"x: expected [..., {d}] for this net, got {tuple(x.shape)}")


def one_more_dim(t: Any) -> Any:
    """A time [..., 1] as [..., 1, 1]; a number stays one."""
    return t.unsqueeze(-1) if getattr(t, "ndim", 0) else t
