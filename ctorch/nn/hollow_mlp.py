"""A hollow net whose conditioner is a masked MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctorch.nn._hollow import HollowNet, check_last, check_size, scaled

DEFAULT_WIDTH = 128
CHUNKS = 8  # of the last layer: more leave out more zeros, in smaller products


class HollowMLP(HollowNet):
    """A net ``f_i = tau(x_i, h_i)`` whose ``h_i`` sees all of x but ``x_i``, through masked layers.

    Two masked MLPs (MADEs) run side by side: in one, a unit of degree m sees ``x_0 .. x_m``, and
    ``h_i`` the units of degree below i; in the other the same from the end of x. Masks of both are
    strictly triangular, and the last layer mixes the two. So every derivative
    ``d^k f_i / d x_i^k`` costs a pass through tau alone; see ``ctorch.dimwise_derivative`` and
    ``ctorch.divergence(net, x, method="hollow", t=t)``.

    The autograd derivative of ``h_i`` in ``x_i`` is exactly 0 in every dtype, and ``h_i`` keeps its
    bits when ``x_i`` changes (as long as that is finite: a mask multiplies by zero).

    Args:
        dim: d.
        width: hidden units in a layer of each of the two MLPs. At least d - 1 are needed for every
            ``h_i`` to see all other dimensions: with fewer it misses its nearest neighbors in the
            order of dimensions. None: 128, or d where that is more. At a fixed width, time grows
            linearly in d.
        depth: their hidden layers.
        context: size H of ``h_i``.
        hidden: widths of the hidden layers of tau.
        shared: True: one tau for all dimensions, which the contexts tell apart; False: one for
            each.
        activation: of all layers: ``"tanh"``, ``"sigmoid"``, ``"softplus"``, ``"silu"``,
            ``"gelu"``, ``"gelu_tanh"`` or ``"sin"``.
        time: whether the net takes time; False: it ignores t.
        dtype, device: of the parameters.

    Raises:
        TypeError, ValueError: arguments do not fit; when called, x is not [..., d], or t is missing
            or not [..., 1].

    Source: Chen and Duvenaud, "Neural Networks with Cheap Differential Operators" (2019); masks:
    Germain et al., "MADE" (2015).

    Example:
        >>> import torch, ctorch
        >>> net = ctorch.nn.HollowMLP(4)
        >>> x = torch.randn(8, 4)
        >>> value, div = ctorch.divergence(net, x, method="hollow", t=0.0)
        >>> torch.allclose(div, ctorch.divergence(lambda x: net(0.0, x), x)[1], atol=1e-5)
        True
    """

    mask_in: Tensor
    mask: Tensor
    mask_out: Tensor

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        depth: int = 1,
        context: int = 16,
        hidden: Sequence[int] = (32,),
        shared: bool = True,
        activation: str = "tanh",
        time: bool = True,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        options = {"dtype": dtype, "device": device}
        copies = 1 if shared else check_size("dim", dim)
        super().__init__(context, hidden, copies, activation, time, options)
        self.dim, self.depth = check_size("dim", dim), check_size("depth", depth)
        self.shared = shared
        width = max(DEFAULT_WIDTH, dim) if width is None else check_size("width", width)
        self.width = width
        into, inner, seen = _masks(dim, width)
        self._step, windows = _windows(seen)
        self.weight_in = scaled((2 * width, dim), _fan_in(into), options)
        self.bias_in = nn.Parameter(torch.zeros(2 * width, **options))
        self.weight_time = scaled((2 * width,), 1, options) if time else None
        self.weights = nn.ParameterList(
            scaled((2, width, width), _fan_in(inner), options) for _ in range(depth - 1)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(2 * width, **options)) for _ in range(depth - 1)
        )
        mask_out = windows.repeat_interleave(context, 1).mT.contiguous()  # [n, window, s H]
        fan_in = windows.sum(-1).clamp(min=1).repeat_interleave(context, 1).unsqueeze(1)
        self.weight_out = scaled(tuple(mask_out.shape), fan_in, options)
        self.bias_out = nn.Parameter(torch.zeros(len(windows), 1, mask_out.shape[-1], **options))
        for name, mask in (("mask_in", into), ("mask", inner), ("mask_out", mask_out)):
            self.register_buffer(name, mask.to(self.weight_in), persistent=False)

    def conditioner(self, t: Any, x: Tensor) -> Tensor:
        check_last(x, self.dim)
        z = F.linear(x, self.weight_in * self.mask_in, self.bias_in)
        t = self._time_of(t, x)
        a = self._act(z if t is None else z + t * self.weight_time)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            up, down = (weight * self.mask).unbind(0)
            falling, rising = a.split(self.width, -1)
            a = self._act(torch.cat([F.linear(falling, up), F.linear(rising, down)], -1) + bias)
        rows = self._stretches(a.reshape(-1, 2 * self.width))
        h = torch.baddbmm(self.bias_out, rows, self.weight_out * self.mask_out)  # [n, B, s H]
        dims = h.shape[0] * h.shape[2] // self.context
        h = h.transpose(0, 1).reshape(*x.shape[:-1], dims, self.context)
        return h if dims == self.dim else h[..., : self.dim, :]

    def _stretches(self, a: Tensor) -> Tensor:
        """The windows [n, B, window] of units [B, 2 W]."""
        count, window, step = *self.weight_out.shape[:2], self._step
        if not a.requires_grad:
            return a.unfold(-1, window, step).transpose(0, 1)  # without a copy
        # the derivative of unfold has no batching rule
        return torch.stack([a.narrow(1, c * step, window) for c in range(count)])

    def extra_repr(self) -> str:
        return self._repr(dim=self.dim, width=self.width, depth=self.depth, shared=self.shared)


def _masks(dim: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What may be seen: by first units of x, by units of units, by contexts of units.

    The units of both MLPs stand in one row, by degree: falling in the one that looks at the end of
    x, then rising in the one that looks at its beginning. So what a context may see of them is one
    stretch, which moves along with its dimension.

    Returns:
        [2 W, d], [2, W, W], [d, 2 W], booleans.
    """
    degrees = torch.arange(width) * (dim - 1) // width if dim > 1 else torch.full((width,), -1)
    dims = torch.arange(dim)
    of_x = dims <= degrees[:, None]  # of the one that rises; the other sees x from the end
    of_units = degrees[:, None] >= degrees
    of_contexts = degrees < dims[:, None]
    into = torch.cat([of_x.flip(0, 1), of_x])
    inner = torch.stack([of_units.flip(0, 1), of_units])
    return into, inner, torch.cat([of_contexts.flip(0, 1), of_contexts], 1)


def _windows(seen: Tensor) -> tuple[int, Tensor]:
    """Cuts what contexts see [d, 2 W] into n windows of as many units, a fixed step apart.

    The last layer is then n dense products of half its size: most of what is left out is zero.

    Returns:
        The step, and the masks of the windows [n, s, window], for s dims each.
    """
    dim, units = seen.shape
    first = seen.int().argmax(1)
    rest = seen.flip(1).int().argmax(1)  # units behind the last one seen
    step = 0
    for count in range(min(CHUNKS, dim), 0, -1):
        chunk = -(-dim // count)
        count = -(-dim // chunk)
        begin, end = first[::chunk].tolist(), rest[chunk - 1 :: chunk].tolist()
        steps = [begin[c] // c for c in range(1, count)]
        steps += [end[c] // (count - 1 - c) for c in range(count - 1)]
        step = min(steps, default=units)
        if step:
            break
    window = units - (count - 1) * step
    padded = F.pad(seen, (0, 0, 0, count * chunk - dim)).reshape(count, chunk, units)
    return step, torch.stack([p[:, c * step : c * step + window] for c, p in enumerate(padded)])


def _fan_in(mask: Tensor) -> Tensor:
    return mask.sum(-1, keepdim=True).clamp(min=1)
