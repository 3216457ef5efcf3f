"""Seeds of a forward Laplacian: vectors ``v_r`` with ``sum_r v_r v_r^T = A``, apart by sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._dtypes import HALF


@dataclass
class Seeds:
    """Vectors ``[R, 1.., d]`` or, where samples have their own, ``[R, .., d]``.

    Attributes:
        scales: ``[d]`` where the vectors are these multiples of the unit vectors.
    """

    rows: Tensor
    scales: Tensor | None = None

    @property
    def shared(self) -> bool:
        """Whether all samples have the same."""
        return all(size == 1 for size in self.rows.shape[1:-1])

    @property
    def unit(self) -> bool:
        """Whether these are the unit vectors."""
        return self.scales is not None and self.scales.stride(0) == 0

    def narrowed(self, x: Tensor, begin: int, end: int) -> Seeds:
        """The seeds of some entries of ``x``'s first dim."""
        if self.rows.shape[1] == 1 and x.shape[0] != 1:
            return self
        return Seeds(self.rows[:, begin:end], self.scales)


@dataclass
class SignedSeeds:
    """Seeds of the positive and of the negative part of a weight.

    Attributes:
        gradient: what derivatives along the first part's seeds are to be divided by to give the
            gradient: True for 1, None where they do not hold it.
    """

    positive: Seeds | None
    negative: Seeds | None = None
    gradient: Any = None


def seeds_of(x: Tensor, weight: Any, directions: Any) -> SignedSeeds:
    """Seeds for ``laplacian``'s arguments."""
    d = x.shape[-1]
    if directions is not None:
        if weight is not None:
            raise ValueError("weight, directions: give one of them")
        return SignedSeeds(Seeds(_directions(x, directions)))
    if weight is None:
        scales = torch.ones((), dtype=x.dtype, device=x.device).expand(d)
        return SignedSeeds(Seeds(_lined(torch.diag(scales), x), scales), gradient=True)
    _check(x, weight)
    if weight.ndim == 1:
        return _of_diagonal(x, weight)
    return _of_matrix(x, weight)


def _lined(rows: Tensor, x: Tensor) -> Tensor:
    """``[R, d] -> [R, 1.., d]``."""
    return rows.reshape(rows.shape[0], *(1,) * (x.ndim - 1), rows.shape[-1])


def _of_diagonal(x: Tensor, weight: Tensor) -> SignedSeeds:
    if weight.requires_grad and not bool(weight.detach().all()):
        raise ValueError(
            "weight: derivatives by entries that are zero are not computed; detach it, or give the "
            "other entries' unit vectors, scaled, as directions"
        )
    parts: list[Seeds | None] = []
    for signed in (weight, -weight):
        keep = signed.detach() > 0
        if bool(keep.all()):
            scales = signed.sqrt()
            parts.append(Seeds(_lined(torch.diag(scales), x), scales))
        elif bool(keep.any()):
            parts.append(Seeds(_lined(torch.diag(torch.where(keep, signed, 1).sqrt())[keep], x)))
        else:
            parts.append(None)
    positive, negative = parts
    full = positive is not None and positive.scales is not None
    return SignedSeeds(positive, negative, positive.scales if full and positive else None)


def _of_matrix(x: Tensor, weight: Tensor) -> SignedSeeds:
    if weight.dtype in HALF:  # which torch decomposes in float32 alone
        seeds = _of_matrix(x.float(), weight.float())
        for part in (seeds.positive, seeds.negative):
            if part is not None:
                part.rows = part.rows.to(x.dtype)
        return seeds
    factor, info = torch.linalg.cholesky_ex(weight)
    if not bool(info.any()) and bool(_well(factor.detach())):
        return SignedSeeds(_columns(x, factor))
    if weight.requires_grad:
        raise ValueError(
            "weight: derivatives by a matrix that is not positive definite are not computed; "
            "detach it, or give a factor of it as directions"
        )
    values, vectors = torch.linalg.eigh(weight)
    size = values.abs().amax(-1, keepdim=True)
    small = size * weight.shape[-1] * torch.finfo(x.dtype).eps
    parts: list[Seeds | None] = []
    for signed in (values, -values):
        keep = signed > small
        used = keep.reshape(-1, keep.shape[-1]).any(0)
        scaled = vectors * torch.where(keep, signed, torch.zeros_like(signed)).sqrt().unsqueeze(-2)
        parts.append(_columns(x, scaled[..., used]) if bool(used.any()) else None)
    return SignedSeeds(*parts)


def _well(factor: Tensor) -> Tensor:
    """Whether a Cholesky factor shows its matrix to have full rank."""
    pivots = factor.diagonal(0, -2, -1)
    return (pivots.amin(-1) > pivots.amax(-1) * 1e-4).all()


def _columns(x: Tensor, factor: Tensor) -> Seeds:
    """``[d, R]`` or ``[.., d, R]`` by samples, as seeds."""
    rows = factor.movedim(-1, 0)
    return Seeds(_lined(rows, x) if rows.ndim == 2 else rows)


def _directions(x: Tensor, directions: Any) -> Tensor:
    _check_like("directions", x, directions)
    d = x.shape[-1]
    if directions.ndim == 2 and directions.shape[-1] == d and len(directions):
        return _lined(directions, x)
    if directions.ndim == x.ndim + 1 and directions.shape[1:] == x.shape and len(directions):
        return directions
    raise ValueError(
        f"directions: expected [R, {d}] or [R, {', '.join(map(str, x.shape))}] with R >= 1, got "
        f"{list(directions.shape)}"
    )


def _check(x: Tensor, weight: Any) -> None:
    _check_like("weight", x, weight)
    d = x.shape[-1]
    shapes = [(d,), (d, d), (*x.shape, d)]
    if tuple(weight.shape) not in shapes:
        allowed = ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"weight: expected one of {allowed}, got {list(weight.shape)}")
    if not bool(weight.detach().isfinite().all()):
        raise ValueError("weight: expected finite entries, got NaN or infinity among them")
    if weight.ndim > 1:
        matrix = weight.detach()
        gap = (matrix - matrix.mT).abs().max()
        if not bool(gap <= 1e-5 * matrix.abs().max()):
            raise ValueError(
                f"weight: expected a symmetric matrix, got one whose entries differ from its "
                f"transpose by up to {float(gap):.2g}; give (weight + weight.mT) / 2, which is the "
                f"same operator"
            )


def _check_like(name: str, x: Tensor, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.dtype != x.dtype or given.device != x.device:
        raise ValueError(
            f"{name}: expected {x.dtype} on {x.device} as x, got {given.dtype} on {given.device}"
        )
