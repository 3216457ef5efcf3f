"""A hollow net whose conditioner is attention: for sets and sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctorch.autodiff.hollow import Hollow
from ctorch.nn._hollow import ACTIVATIONS, HollowNet, check_size, one_more_dim, scaled
from ctorch.ops.hollow import transform


class HollowAttention(HollowNet):
    """A net ``f_i = tau(x_i, h_i)`` whose ``h_i`` attends to all dimensions but its own.

    Two streams: a content ``e_j``, which stays a function of ``x_j`` alone through all layers, and
    the contexts, which start from positions (or from one learned vector) and attend to the contents
    at every layer, with the diagonal masked. So nothing of ``x_i`` reaches ``h_i`` at any depth; to
    stack masked self-attention would leak it at the second layer. A learned content that all may
    attend to stands beside those of x: a lone dimension has something to look at.

    The autograd derivative of ``h_i`` in ``x_i`` is exactly 0 in every dtype, and ``h_i`` keeps its
    bits when ``x_i`` changes (as long as what it is weighted by zero is finite).

    Without ``dim`` the net is permutation-equivariant and takes sets of any size. Sequences and
    sets of various lengths in one batch: ``net.masked(mask)``.

    Args:
        dim: the largest d, each dimension with a learned position of its own; None: no positions.
        width: of both streams.
        heads: of the attention; they divide ``width``.
        depth: layers.
        context: size H of ``h_i``.
        hidden: widths of the hidden layers of tau.
        shared: True: one tau for all dimensions; False: one for each, for x [..., dim] alone.
        activation: of all layers, see ``HollowMLP``.
        time: whether the net takes time; False: it ignores t.
        dtype, device: of the parameters.

    Raises:
        TypeError, ValueError: arguments do not fit; when called, x has more than ``dim``
            dimensions, or t is missing or not [..., 1].

    Source: Chen and Duvenaud, "Neural Networks with Cheap Differential Operators" (2019); two
    streams as in Yang et al., "XLNet" (2019).

    Example:
        >>> import torch, ctorch
        >>> net = ctorch.nn.HollowAttention(time=False)
        >>> x = torch.randn(2, 5)
        >>> order = torch.tensor([3, 0, 4, 1, 2])
        >>> torch.allclose(net(None, x[:, order]), net(None, x)[:, order], atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        width: int = 32,
        heads: int = 2,
        depth: int = 2,
        context: int = 16,
        hidden: Sequence[int] = (32,),
        shared: bool = True,
        activation: str = "tanh",
        time: bool = True,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        options = {"dtype": dtype, "device": device}
        if dim is None and not shared:
            raise ValueError("shared: without dim all dimensions share tau; give dim, or True")
        copies = 1 if shared or dim is None else check_size("dim", dim)
        super().__init__(context, hidden, copies, activation, time, options)
        self.dim = None if dim is None else check_size("dim", dim)
        self.width, self.heads = check_size("width", width), check_size("heads", heads)
        self.depth, self.shared = check_size("depth", depth), shared
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width = {width}, got {heads}")
        places = 1 if dim is None else dim
        self.seed = scaled((places, width), 1, options)  # of contexts
        self.place = scaled((places, width), 1, options)  # of contents
        self.weight_in = scaled((width,), 1, options)
        self.weight_time = scaled((width,), 1, options) if time else None
        self.nothing = scaled((width,), 1, options)  # the content beside those of x
        self.layers = nn.ModuleList(
            _Layer(width, heads, ACTIVATIONS[activation], options) for _ in range(depth)
        )
        self.out = nn.Linear(width, context, **options)

    def conditioner(self, t: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        d = x.shape[-1]
        if self.dim is not None and (d > self.dim or not (self.shared or d == self.dim)):
            want = f"{'at most ' if self.shared else ''}{self.dim}"
            raise ValueError(f"x: expected {want} dimensions for this net, got {tuple(x.shape)}")
        places = d if self.dim is not None else 1
        e = x.unsqueeze(-1) * self.weight_in + self.place[:places]
        c = self.seed[:places]
        t = self._time_of(t, x)
        if t is not None:
            late = one_more_dim(t) * self.weight_time
            e, c = e + late, c + late
        e = self._act(e)
        e = torch.cat([e, self.nothing.expand(*x.shape[:-1], 1, -1)], -2)
        c = c.expand(*x.shape, -1)
        barrier = _barrier(x, mask)
        for layer in self.layers:
            c, e = layer(c, e, barrier)
        h: Tensor = self.out(c)
        return h

    def masked(self, mask: Tensor) -> MaskedHollowAttention:
        """The same net on a batch in which some dimensions of some samples are absent.

        Args:
            mask: boolean, broadcasts against x [..., d]: True where there is something.

        Returns:
            A hollow net, called as this one is: absent dimensions of x may hold anything and are
            not seen by others; values and derivatives there are 0.

        Example:
            >>> import torch, ctorch
            >>> net = ctorch.nn.HollowAttention(4, time=False)
            >>> x = torch.tensor([[1.0, 2.0, torch.nan, torch.nan]])
            >>> value = net.masked(~x.isnan())(None, x)
            >>> torch.allclose(value[:, :2], net(None, x[:, :2])), value[:, 2:]
            (True, tensor([[0., 0.]]))
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a tensor of booleans, got {got}")
        return MaskedHollowAttention(self, mask)

    def extra_repr(self) -> str:
        shown = {"dim": self.dim, "width": self.width, "heads": self.heads, "depth": self.depth}
        return self._repr(**shown, shared=self.shared)


class MaskedHollowAttention:
    """A ``HollowAttention`` and which dimensions are present; see ``HollowAttention.masked``."""

    def __init__(self, net: HollowAttention, mask: Tensor) -> None:
        self.net, self.mask = net, mask

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        """``f(t, x)`` [..., d], 0 where nothing is."""
        return self.__ctorch_hollow__()(t, x)

    def __ctorch_hollow__(self) -> Hollow:
        transformer, absent = self.net.transformer(), ~self.mask

        def conditioner(t: Any, x: Tensor) -> Tensor:
            return self.net.conditioner(t, x.masked_fill(absent, 0.0), self.mask)

        def tau(t: Any, x: Tensor, h: Tensor) -> Tensor:
            value = transform(x.masked_fill(absent, 0.0), h, transformer)[0]
            return value.masked_fill(absent, 0.0)

        return Hollow(conditioner, tau)


class _Layer(nn.Module):
    """Contents pass through a net, contexts look at them, and pass through a net too."""

    def __init__(
        self, width: int, heads: int, act: Callable[[Tensor], Tensor], options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.heads, self.act = heads, act
        self.query = nn.Linear(width, width, **options)
        self.content = nn.Linear(width, 2 * width, **options)
        self.join = nn.Linear(width, width, **options)
        self.up = nn.Linear(width, 2 * width, **options)
        self.down = nn.Linear(2 * width, width, **options)
        self.up_content = nn.Linear(width, 2 * width, **options)
        self.down_content = nn.Linear(2 * width, width, **options)

    def forward(self, c: Tensor, e: Tensor, barrier: Tensor) -> tuple[Tensor, Tensor]:
        e = e + self.down_content(self.act(self.up_content(e)))
        k, v = self.content(e).chunk(2, -1)
        c = c + self.join(self._attend(self.query(c), k, v, barrier))
        return c + self.down(self.act(self.up(c))), e

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, barrier: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for x in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = (scores + barrier).softmax(-1)
        return (weights @ v).transpose(-2, -3).flatten(-2)


def _barrier(x: Tensor, mask: Tensor | None) -> Tensor:
    """0, or ``-inf`` for contents that a context must not see: its own, and absent ones.

    [d, d + 1], with a mask [..., 1, d, d + 1]; the content beside those of x is the last.
    """
    d = x.shape[-1]
    hidden = torch.eye(d, d + 1, dtype=torch.bool, device=x.device)
    if mask is not None:
        hidden = hidden | nn.functional.pad(~mask, (0, 1), value=False)[..., None, None, :]
    return torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(hidden, -torch.inf)
