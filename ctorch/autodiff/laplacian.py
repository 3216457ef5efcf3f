"""The forward Laplacian: value, gradient and Laplacian of a function in one pass."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ctorch._numbers import as_int
from ctorch.autodiff import _lap_rows as forms
from ctorch.autodiff._arguments import outermost
from ctorch.autodiff._blocks import rounding
from ctorch.autodiff._lap import Lap
from ctorch.autodiff._propagated import MissingRuleError, propagate
from ctorch.autodiff._seeds import Seeds, seeds_of
from ctorch.autodiff.mlp import mlp_for
from ctorch.ops import mlp as mlp_ops
from ctorch.ops._op import transforms_active
from ctorch.ops.mlp import MLP

Function = Callable[..., Any]

# Rows of a chunk of samples should stay in a core's cache; on a GPU a chunk only bounds memory.
# In bytes.
_CACHE = 4 << 20
_CUDA_MEMORY = 1 << 29

_sizes: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()
_independent: weakref.WeakSet[Any] = weakref.WeakSet()


class Laplacian(NamedTuple):
    """What ``laplacian`` returns.

    Attributes:
        value: ``f(x)``, ``[..., *out]``.
        gradient: ``df/dx``, ``[..., *out, d]``.
        laplacian: ``sum_ij A_ij d^2 f / dx_i dx_j``, ``[..., *out]``.
    """

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


def laplacian(
    f: Function,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    directions: Tensor | None = None,
    chunk_size: int | None = -1,
) -> Laplacian:
    """Value, gradient and Laplacian of ``f`` at each of a batch of points, in one forward pass.

    The pass carries the value, its derivatives along ``d`` seeds and the Laplacian through ``f``:
    ``d + 2`` times the cost of ``f``'s linear maps, where a loop over Hessian-vector products takes
    about ``4 d`` times. It finds by itself what it can save: derivatives that are the same for all
    samples (up to the first nonlinear function) are held once; where ``f`` views ``x`` as
    ``[..., N, k]`` (N electrons), features of one of the N, or of pairs of them, hold derivatives
    by their own ``k`` (or ``2 k``) coordinates alone, up to where features mix. The batch passes in
    chunks that stay in cache. Differentiable (once, by autograd) in ``x`` and ``f``'s parameters.

    Args:
        f: ``[..., d] -> [...]``, made of torch functions, ``nn.Module`` among them; or
            ``[..., d] -> [..., *out]``, each output with derivatives of its own. It acts on each
            sample alone.
        x: ``[..., d]``, floating point.
        weight: the matrix ``A`` of ``sum_ij A_ij d_i d_j``: ``[d, d]`` symmetric, or
            ``[..., d, d]`` with a matrix for each sample, or its diagonal ``[d]``. Default: the
            unit matrix. Fewer nonzero eigenvalues make the pass cheaper. A diagonal and a positive
            definite matrix are differentiable.
        directions: in place of ``weight``: ``[R, d]`` or ``[R, ..., d]``, the vectors ``v_r`` of a
            sum of second directional derivatives ``sum_r d^2/ds^2 f(x + s v_r)``. They are one
            graph for ``torch.compile``; a weight is not, since the signs of its eigenvalues decide
            what is to be done: give the rows of C, of ``weight = C^T C``, in its place.
        chunk_size: how many entries of ``x``'s first dim pass at a time; -1: as many as fit in
            cache, by the measured size of ``f``'s derivatives; None: all of them.

    Returns:
        ``(value, gradient, laplacian)``: ``[..., *out]``, ``[..., *out, d]``, ``[..., *out]``. The
        gradient is that of ``f``, whatever the weight.

    Raises:
        TypeError, ValueError: arguments do not fit, or ``f`` mixes samples.
        MissingRuleError: ``f`` calls a torch function without a rule; the message names it.

    Source: Li et al., "A computational framework for neural network-based variational Monte Carlo
    with Forward Laplacian" (2024); Dangel et al., "Collapsing Taylor Mode" (2025).

    Example:
        >>> import torch, ctorch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> value, gradient, lap = ctorch.laplacian(lambda x: (x**3).sum(-1), x)
        >>> lap
        tensor([18., 42.])
    """
    _check_x(f, x)
    chunk_size = _check_chunk(chunk_size)
    seeds = seeds_of(x, weight, directions)
    parts = [_pass(f, x, part, chunk_size) for part in (seeds.positive, seeds.negative) if part]
    if not parts:
        parts = [_pass(f, x, Seeds(x.new_zeros(1, *x.shape)), chunk_size)]
        seeds.gradient = None
    value, rows, lap = parts[0]
    if len(parts) == 2:
        lap = lap - parts[1][2]
    elif seeds.positive is None:
        lap = -lap
    gradient = rows.movedim(0, -1) if seeds.gradient is not None else _gradient(f, x)
    if seeds.gradient is not None and seeds.gradient is not True:
        gradient = gradient / seeds.gradient
    return Laplacian(value, gradient, lap)


# ---- one pass


def _pass(
    f: Function, x: Tensor, seeds: Seeds, chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``f(x)``, its derivatives along seeds ``[R, .., *out]`` and the sum of its second ones."""
    net = mlp_for(f, x)
    if net is not None and x.numel() and seeds.shared:
        return _of_mlp(net, x, seeds)
    single = x.ndim < 2 or x.shape[0] < 2 or transforms_active() or is_compiling()
    if single:
        return _whole(f, x, seeds)
    key = _key(f)
    where = (tuple(x.shape[1:]), x.dtype, len(seeds.rows))
    count = x.shape[0]
    known = _sizes.get(key, {}).get(where) if key is not None else None
    chunk = _chunk(x, known if known else _guess(x, seeds)) if chunk_size == -1 else chunk_size
    chunk = count if chunk is None else min(chunk, count)
    outputs = []
    begin = 0
    while begin < count:
        end = min(count, begin + chunk)
        forms.METER.largest = 0
        apart = chunk_size != -1 or end - begin == count  # no other way is left
        try:
            outputs.append(_whole(f, x[begin:end], seeds.narrowed(x, begin, end)))
        except (RuntimeError, ValueError) as error:
            if begin or apart or isinstance(error, MissingRuleError):
                raise
            chunk = count  # f may hold data of the batch's size
            continue
        if not begin:
            if not _check_independent(f, x[:end], outputs[0][0], end == count, apart):
                chunk = count
                outputs.clear()
                continue
            if not known:
                known = -(-forms.METER.largest // (end - begin))
                if key is not None:
                    _sizes.setdefault(key, {})[where] = known
                if chunk_size == -1:
                    chunk = _chunk(x, known, count - end)
        begin = end
    if len(outputs) == 1:
        return outputs[0]
    values, rows, laps = zip(*outputs, strict=True)
    return torch.cat(values), torch.cat(rows, 1), torch.cat(laps)


def _of_mlp(net: MLP, x: Tensor, seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    """The pass of a plain MLP, by a kernel that keeps blocks of the batch in cache."""
    directions = None if seeds.unit else seeds.rows.flatten(0, -2)
    value, gradient, lap = mlp_ops.laplacian(net, x, directions=directions)
    assert gradient is not None
    return value, gradient.movedim(-1, 0), lap


def _whole(f: Function, x: Tensor, seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    out = propagate(f, Lap(x, seeds.rows, None, (), seeds.scales))
    batch = x.shape[:-1]
    if not isinstance(out, (Lap, Tensor)):
        raise TypeError(f"f: expected to return one tensor, got {type(out).__name__}")
    if not (out.is_floating_point() or out.is_complex()):
        raise TypeError(f"f: expected to return floating point, got {out.dtype}")
    if out.shape[: len(batch)] != batch:
        raise ValueError(
            f"f: expected [..., d] -> [...]; for x of shape {tuple(x.shape)} it returned "
            f"{tuple(out.shape)}, which does not begin with {tuple(batch)}. Samples (all dims but "
            f"the last) must be kept apart: reduce over the last dims alone"
        )
    if isinstance(out, Tensor):  # a constant
        zero = torch.zeros_like(out)
        return out, zero.expand(len(seeds.rows), *out.shape), zero
    return out.value, out.dense().expand(-1, *out.shape), out.laplacian()


def _gradient(f: Function, x: Tensor) -> Tensor:
    """The gradient by reverse mode, where rows along the seeds do not hold it."""
    value, pull = cast(Any, torch.func.vjp(f, x))
    batch = x.ndim - 1
    if value.ndim == batch:
        return pull(torch.ones_like(value))[0]
    shape = value.shape[batch:]
    basis = torch.eye(shape.numel(), dtype=value.dtype, device=value.device)
    basis = basis.reshape(len(basis), *(1,) * batch, *shape).expand(-1, *value.shape)
    if not basis.numel():
        return value.new_zeros(*value.shape, x.shape[-1])
    rows = [pull(e)[0] for e in basis]
    return torch.stack(rows, -2).unflatten(-2, shape)


# ---- chunks


def _key(f: Any) -> Any:
    """What to remember a function by: the code, so that a new closure is known again."""
    f = getattr(f, "__func__", f)
    key = getattr(f, "__code__", f)
    try:
        weakref.ref(key)
        hash(key)
    except TypeError:
        return None
    return key


def _guess(x: Tensor, seeds: Seeds) -> int:
    """Elements of the largest rows of one sample, before they have been measured."""
    return len(seeds.rows) * 16 * x[0].numel()


def _chunk(x: Tensor, elements: int, left: int | None = None) -> int:
    """Entries of the first dim whose rows fit in cache, in chunks of about one size."""
    left = x.shape[0] if left is None else left
    budget = _CUDA_MEMORY if x.is_cuda else _CACHE
    fit = max(1, budget // max(1, elements * x.element_size()))
    return max(1, -(-left // -(-left // fit))) if left else 1


def _check_independent(f: Function, x: Tensor, values: Tensor, whole: bool, last: bool) -> bool:
    """Whether ``f`` takes a part of the batch; refuses one that shows to mix samples.

    Args:
        x: the samples that were passed, ``values`` what they gave.
        whole: whether these are the whole batch, so that data of its size may be in ``f``.
        last: whether there is no other way than this, so that False is not an answer.
    """
    with contextlib.suppress(TypeError):  # of what cannot be hashed
        if f in _independent:
            return True
    at = (slice(-1, None),) * (x.ndim - 1)  # the last: x[:1] suits data[: len(x)]
    single, expected = x.detach()[at], values.detach()[at]
    tolerance = 1e-5 if x.dtype == torch.float64 else rounding(x.dtype)
    with torch.no_grad():
        try:
            alone = f(single.clone())  # which f may write into
            if _close(alone, expected, tolerance):
                with contextlib.suppress(TypeError):
                    _independent.add(f)
                return True
            if not _close(alone, f(single.clone()), tolerance):  # random
                return True
        except Exception:  # f holds data of the batch's size
            if last and not whole:
                raise
        if not last:
            return False
        if whole and _close(f(single.expand_as(x).clone())[at], expected, tolerance):
            return True
    raise ValueError(
        "f: expected a function that acts on each sample alone, but the value of a sample depends "
        "on the other samples (batch statistics, a reduction over the first dim), or on their "
        "number, as data[: len(x)] with chunk_size does: keep samples apart, put normalization "
        "layers into eval mode"
    )


def _close(a: Any, b: Tensor, tolerance: float) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    return torch.allclose(a.to(b.dtype), b, tolerance, tolerance, equal_nan=True)


# ---- arguments


def _check_x(f: Any, x: Any) -> None:
    if not callable(f):
        raise TypeError(f"f: expected a function, got {type(f).__name__}")
    outermost(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a real floating point dtype, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [..., d] with d >= 1, got {tuple(x.shape)}")


def _check_chunk(chunk_size: Any) -> int | None:
    if chunk_size is None:
        return None
    number = as_int(chunk_size)
    if number is None:
        raise TypeError(f"chunk_size: expected an int or None, got {type(chunk_size).__name__}")
    if number != -1 and number < 1:
        raise ValueError(f"chunk_size: expected >= 1, -1 (automatic) or None (all), got {number}")
    return number
