"""Random numbers that belong to a sample's index: the same however an ensemble is cut."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BITS = 52  # so that the middle of every interval is a float64 below 1


class Draws:
    """Random numbers for some samples of an ensemble.

    A number is a hash of the seed, the sample's index, the call (the first, the second, ...) and
    the place in the shape. It depends neither on the chunk that the sample is in, nor on the
    process or device. The hash is the output function of SplitMix64 (Steele, Lea and Flood, Fast
    splittable pseudorandom number generators, OOPSLA 2014), applied twice.

    Args:
        seed: any integer.
        indices: [n] int64, the samples.
        stream: sets apart those who draw with one seed for the same samples.

    Example:
        >>> import torch
        >>> from ctorch.ode import Draws
        >>> whole = Draws(7, torch.arange(10)).normal(3)
        >>> part = Draws(7, torch.arange(4, 6)).normal(3)
        >>> whole.shape, torch.equal(whole[4:6], part)
        (torch.Size([10, 3]), True)
    """

    def __init__(self, seed: int, indices: Tensor, stream: int = 0) -> None:
        self._indices = indices.to(torch.int64)
        self._key = _mix_number(_mix_number(seed & _MASK) + stream)
        self._calls = 0

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Numbers uniform between 0 and 1, new ones at every call.

        In float64 neither bound occurs; in a narrower dtype numbers are rounded, and 1 may.

        Args:
            *shape: of what one sample gets; nothing: one number.
            dtype: of the result.

        Returns:
            [n, *shape], on the device of the indices.
        """
        self._calls += 1
        start = _mix_number(self._key + self._calls)
        count = math.prod(shape)
        places = torch.arange(1, count + 1, device=self._indices.device)
        rows = _mix(self._indices * _signed(_GOLDEN) + _signed(start))
        bits = _mix(rows[:, None] + places * _signed(_GOLDEN))
        middle = _shifted(bits, 64 - _BITS).double() + 0.5
        return (middle * 2.0**-_BITS).to(dtype).view(len(self._indices), *shape)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Normal numbers of mean 0 and variance 1; arguments and result as for ``uniform``."""
        return torch.special.ndtri(self.uniform(*shape)).to(dtype)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(_FACTORS[0])
    x = (x ^ _shifted(x, 27)) * _signed(_FACTORS[1])
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix_number(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _FACTORS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _FACTORS[1]) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x
