"""Rules of Fourier transforms, and of the parts of complex values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff._propagated import (
    Propagated,
    constant,
    kind_of,
    rule,
    value_of,
)
from ctorch.autodiff.rules._common import as_tensor, negative, negatives, on_batch
from ctorch.autodiff.rules.shapes import view


def _transform(name: str) -> None:
    function = getattr(torch.fft, name)

    def apply(x: Any, n: Any = None, dim: int = -1, norm: Any = None, *, out: None = None) -> Any:
        at = negative(dim, x.ndim)
        return x.linear(lambda s: function(s, n, at, norm))

    rule(function)(apply)


def _transform_nd(name: str, default: Any) -> None:
    function = getattr(torch.fft, name)

    def apply(
        x: Any, s: Any = None, dim: Any = default, norm: Any = None, *, out: None = None
    ) -> Any:
        if dim is None and s is not None:
            dim = list(range(-len(s), 0))
        dims = negatives(dim, x.ndim)
        return x.linear(lambda stack: function(stack, s, dims, norm))

    rule(function)(apply)


for _name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    _transform(_name)
    _transform_nd(f"{_name}2", (-2, -1))
    _transform_nd(f"{_name}n", None)


def _windowed(name: str, event: int) -> None:
    """stft of signals ``[B, T]`` or ``[T]``, istft of spectra ``[B, N, T]`` or ``[N, T]``."""
    function = getattr(torch, name)

    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        if constant(x) or not all(map(constant, (*args, *kwargs.values()))):
            raise NotImplementedError(f"{name}: a window that carries derivatives has no rule")
        return x.linear(on_batch(lambda s: function(s, *args, **kwargs), event))

    rule(name, getattr(torch.functional, name, function))(apply)


_windowed("stft", 1)
_windowed("istft", 2)


def _shifted(name: str) -> None:
    function = getattr(torch.fft, name)

    def apply(x: Any, dim: Any = None) -> Any:
        dims = negatives(dim, x.ndim)
        return x.linear(lambda s: function(s, dims))

    rule(function)(apply)


_shifted("fftshift")
_shifted("ifftshift")


# ---- complex values: linear over the real numbers


@rule("real")
def real(x: Any) -> Any:
    return view(x, lambda s: s.real) if x.dtype.is_complex else x


@rule("imag")
def imag(x: Any) -> Any:
    if not x.dtype.is_complex:
        raise RuntimeError(f"imag: expected a complex value, got {x.dtype}")
    return view(x, lambda s: s.imag)


Propagated.real = property(real)  # type: ignore[attr-defined]
Propagated.imag = property(imag)  # type: ignore[attr-defined]


@rule("conj", "conj_physical", "resolve_conj")
def conj(x: Any) -> Any:
    return view(x, lambda s: s.conj().resolve_conj()) if x.dtype.is_complex else x


@rule("resolve_neg")
def resolve_neg(x: Any) -> Any:
    return x.linear(lambda s: s.resolve_neg())


@rule("view_as_real")
def view_as_real(x: Any) -> Any:
    return view(x, torch.view_as_real)


@rule("view_as_complex")
def view_as_complex(x: Any) -> Any:
    return view(x, lambda s: torch.view_as_complex(s.contiguous()))


@rule("complex")
def complex_(real: Any, imag: Any) -> Any:
    like = real if constant(imag) else imag
    parts = torch.broadcast_tensors(as_tensor(real, like), as_tensor(imag, like))
    return kind_of(*parts).join(lambda s: torch.complex(*_contiguous(s)), list(parts))


def _contiguous(stacks: list[Tensor]) -> list[Tensor]:
    return [s.expand(broadcast_shapes(*(t.shape for t in stacks))) for s in stacks]


@rule("polar")
def polar(size: Any, angle: Any) -> Any:
    return torch.complex(size * torch.cos(angle), size * torch.sin(angle))


@rule("angle")
def angle(x: Any) -> Any:
    if x.dtype.is_complex:
        return torch.atan2(x.imag, x.real)
    return torch.angle(value_of(x))
