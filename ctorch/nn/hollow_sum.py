"""A hollow net whose conditioner is a sum over all other dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctorch.nn._hollow import HollowNet, check_last, check_size, one_more_dim, scaled

CHUNK = 64  # dims that are summed by one product
BLOCK = 1 << 18  # numbers in the contexts of a block of samples, which stays in the cache


class HollowSum(HollowNet):
    """A net ``f_i = tau(x_i, h_i)`` with ``h_i = rho(sum_{j != i} phi_j(x_j))``.

    phi_j is a net of one hidden layer, rho an activation behind a bias and the time. All d contexts
    together cost O(d). With ``shared=True`` the net is permutation-equivariant, and takes any d.

    The sums leave out their own term instead of subtracting it: products with matrices that are 1
    but for a zero diagonal. So ``h_i`` keeps its bits when ``x_i`` changes (as long as that is
    finite), and its autograd derivative in ``x_i`` is exactly 0 in every dtype, where
    ``sum - phi_i`` would be off by the rounding of the sum.

    Args:
        dim: d.
        features: width of the hidden layer of phi.
        context: size H of ``h_i``.
        hidden: widths of the hidden layers of tau.
        shared: False: phi_j and tau_i are nets of each dimension; True: all have the same.
        activation: of all layers, see ``HollowMLP``.
        time: whether the net takes time; False: it ignores t.
        dtype, device: of the parameters.

    Raises:
        TypeError, ValueError: arguments do not fit; when called, x is not [..., d], or t is missing
            or not [..., 1].

    Source: the form of Zaheer et al., "Deep Sets" (2017), as conditioner of Chen and Duvenaud,
    "Neural Networks with Cheap Differential Operators" (2019).

    Example:
        >>> import torch, ctorch
        >>> net = ctorch.nn.HollowSum(4, time=False)
        >>> value, derivatives = ctorch.dimwise_derivative(net, torch.randn(8, 4), order=2)
        >>> derivatives.shape
        torch.Size([2, 8, 4])
    """

    def __init__(
        self,
        dim: int,
        *,
        features: int = 32,
        context: int = 16,
        hidden: Sequence[int] = (32,),
        shared: bool = False,
        activation: str = "tanh",
        time: bool = True,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        options = {"dtype": dtype, "device": device}
        copies = 1 if shared else check_size("dim", dim)
        super().__init__(context, hidden, copies, activation, time, options)
        self.dim, self.shared = check_size("dim", dim), shared
        self.features = check_size("features", features)
        self.weight_in = scaled((copies, 1, features), 1, options)
        self.bias_in = scaled((copies, 1, features), 1, options)
        self.weight_out = scaled((copies, features, context), features, options)
        self.bias_out = nn.Parameter(torch.zeros(copies, context, **options))
        self.weight_time = scaled((context,), 1, options) if time else None

    def conditioner(self, t: Any, x: Tensor) -> Tensor:
        if not self.shared:
            check_last(x, self.dim)
        t = self._time_of(t, x)
        late = None if t is None else one_more_dim(t) * self.weight_time
        rows = x.reshape(_count(x.shape[:-1]), x.shape[-1])
        size = max(1, BLOCK // (x.shape[-1] * self.context))
        blocks = rows.split(size)
        lates: Sequence[Tensor | None] = [late] * len(blocks)
        if late is not None and late.ndim > 1:  # times of samples
            late = late.expand(*x.shape[:-1], 1, self.context)
            lates = late.reshape(rows.shape[0], 1, self.context).split(size)
        h = torch.cat([self._contexts(*pair) for pair in zip(blocks, lates, strict=True)])
        return h if x.ndim == 2 else h.reshape(*x.shape, self.context)

    def _contexts(self, x: Tensor, late: Tensor | None) -> Tensor:
        """Of a block of samples [b, d], and what time adds to them."""
        b, d = x.shape
        columns = x.t().unsqueeze(-1)  # [d, b, 1]: the dims are a batch of nets
        z = torch.addcmul(self.bias_in, columns, self.weight_in)
        phi = self._act(z) @ self.weight_out
        total = sums_of_others(phi.flatten(1), max(d - 1, 1) ** -0.5)
        z = total.unflatten(1, (b, self.context)).transpose(0, 1)
        if late is None or late.ndim == 1:
            return self._act(z + (self.bias_out if late is None else self.bias_out + late))
        return self._act(z + self.bias_out + late)

    def extra_repr(self) -> str:
        return self._repr(dim=self.dim, features=self.features, shared=self.shared)


def sums_of_others(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * sum_{j != i} x_j`` for each i of ``x`` [d, n]; x_i changes no bit of the i-th.

    In O(d): within chunks by a product, and of the chunks' sums in the same way.
    """
    d = x.shape[0]
    chunk = min(d, CHUNK)
    others = scale * (1 - torch.eye(chunk, dtype=x.dtype, device=x.device))
    if d == chunk:
        return others @ x
    count = -(-d // chunk)
    if count * chunk > d:
        x = torch.cat([x, x.new_zeros(count * chunk - d, x.shape[1])])
    parts = x.unflatten(0, (count, chunk))
    within = others @ parts
    return (within + sums_of_others(parts.sum(1), scale).unsqueeze(1)).flatten(0, 1)[:d]


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
