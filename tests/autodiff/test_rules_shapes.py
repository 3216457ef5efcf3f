"""Rules of functions that move, pick, join, sum and transform elements."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.autodiff.rule_checks import Case, check

I = torch.tensor([2, 0, 1])
M = torch.tensor([[True, False, True], [False, True, True]])


def c(name, f, shapes=((2, 3, 4),), **options):
    """Linear in x, so squared first: otherwise most orders would be zero."""
    options.setdefault("reference", None)
    return Case(name, lambda x, *rest: f(torch.square(x), *rest), shapes, **options)


def put(x, index, value):
    y = x.clone()
    y[index] = value
    return y


SHAPES = [
    c("reshape", lambda x: x.reshape(4, -1)),
    c("view", lambda x: x.view(6, 4)),
    c("flatten", lambda x: torch.flatten(x, 1)),
    c("unflatten", lambda x: x.unflatten(-1, (2, 2))),
    c("ravel", lambda x: x.ravel()),
    c("transpose", lambda x: x.transpose(0, 2)),
    c("T", lambda x: x[0].T @ x[1]),
    c("mT", lambda x: x.mT @ x),
    c("permute", lambda x: x.permute(2, 0, 1)),
    c("movedim", lambda x: x.movedim((0, 1), (2, 0))),
    c("swapaxes", lambda x: x.swapaxes(0, 1)),
    c("unsqueeze", lambda x: x.unsqueeze(1) * x.unsqueeze(-3)),
    c("squeeze", lambda x: x.unsqueeze(1).squeeze(1)),
    c("expand", lambda x: x[:, :1].expand(2, 5, -1)),
    c("broadcast_to", lambda x: torch.broadcast_to(x, (2, 2, 3, 4))),
    c("broadcast_tensors", lambda x: torch.broadcast_tensors(x, x[:, :1])[1]),
    c("atleast_2d", lambda x: torch.atleast_2d(x[0, 0])),
    c("atleast_3d", lambda x: torch.atleast_3d(x[0])),
    c("repeat", lambda x: x.repeat(2, 1, 1, 2)),
    c("tile", lambda x: torch.tile(x, (2, 1))),
    c("repeat_interleave", lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 0]), 1)),
    c("chunk", lambda x: torch.stack(x.chunk(2, -1))),
    c("split", lambda x: torch.split(x, [1, 3], -1)[1]),
    c("tensor_split", lambda x: torch.tensor_split(x, 3, -1)),
    c("hsplit", lambda x: torch.hsplit(x, [1])),
    c("unbind", lambda x: x.unbind(1)[2]),
    c("iteration", lambda x: [row for row in x][1]),
    c("select", lambda x: x.select(1, -1)),
    c("narrow", lambda x: torch.narrow(x, 2, 1, 2)),
    c("diagonal", lambda x: torch.diagonal(x, 1, 1, 2)),
    c("linalg.diagonal", lambda x: torch.linalg.diagonal(x)),
    c("diag_embed", lambda x: torch.diag_embed(x, 1)),
    c("diag", lambda x: torch.diag(x[0, 0], 1)),
    c("x.unfold", lambda x: x.unfold(-1, 3, 1)),
    c("flip", lambda x: x.flip(0, 2)),
    c("rot90", lambda x: torch.rot90(x, 1, (1, 2))),
    c("roll", lambda x: torch.roll(x, (1, 2), (0, 2))),
    c("roll flat", lambda x: torch.roll(x, 5)),
    c("tril", lambda x: x.tril(1)),
    c("triu", lambda x: torch.triu(x)),
    c("cat", lambda x: torch.cat([x, x * x, torch.ones(2, 1, 4, dtype=x.dtype)], 1)),
    c("stack", lambda x: torch.stack([x, torch.ones(2, 3, 4, dtype=x.dtype)], 1)),
    c("hstack", lambda x: torch.hstack([x, x])),
    c("vstack", lambda x: torch.vstack([x[0, 0], x[0]])),
    c("dstack", lambda x: torch.dstack([x[0], x[1]])),
    c("column_stack", lambda x: torch.column_stack([x[0, :, 0], x[0]])),
    c("block_diag", lambda x: torch.block_diag(x[0], x[1, 0], torch.eye(2, dtype=x.dtype))),
    c("meshgrid", lambda x: torch.meshgrid(x[0, 0], x[0, :, 1], indexing="xy")),
    c("cartesian_prod", lambda x: torch.cartesian_prod(x[0, 0], x[0, :, 1])),
    c("pixel_shuffle", lambda x: torch.pixel_shuffle(x.reshape(1, 4, 2, 3), 2)),
    c("pixel_unshuffle", lambda x: torch.pixel_unshuffle(x.reshape(1, 1, 2, 12), 2)),
    c("F.unfold", lambda x: F.unfold(x.unsqueeze(0), 2)),
    c("F.fold", lambda x: F.fold(x.reshape(1, 4, 6), (3, 4), 2)),
    c("to", lambda x: x.to(torch.float64).double().contiguous().clone()),
]

INDEXING = [
    c("x[i]", lambda x: x[1]),
    c("x[..., i:j, None]", lambda x: x[..., 1:3, None]),
    c("x[:, i]", lambda x: x[:, 1, ::2]),
    c("x[tensor]", lambda x: x[:, I]),
    c("x[list]", lambda x: x[:, [0, 2]]),
    c("x[tensor, tensor]", lambda x: x[torch.tensor([[0], [1]]), I]),
    c("x[tensor, :, tensor]", lambda x: x[torch.tensor([0, 1, 1]), :, I]),
    c("x[0, :, tensor]", lambda x: x[0, :, I]),
    c("x[tensor, ..., tensor]", lambda x: x.unsqueeze(1)[torch.tensor([0, 1, 1]), ..., I]),
    c("x[mask]", lambda x: x[M]),
    c("x[:, mask]", lambda x: x.movedim(-1, 0)[:, M]),
    c("masked_select", lambda x: torch.masked_select(x[..., 0], M)),
    c("index_select", lambda x: x.index_select(-2, I)),
    c("gather", lambda x: torch.gather(x, 1, I.reshape(1, 3, 1).expand(2, 3, 2))),
    c("take_along_dim", lambda x: torch.take_along_dim(x, I.reshape(1, 3, 1), 1)),
    c("take", lambda x: torch.take(x, I * 7)),
    c("x[i] = y", lambda x, y: put(x, (slice(None), 1), y), ((2, 3, 4), (4,))),
    c("x[i] = number", lambda x: put(x, (..., 2), 3.0)),
    c("x[tensor, :, tensor] = y", lambda x, y: put(x, (torch.tensor([0, 1, 1]), slice(None), I), y),
      ((2, 3, 4), (3, 3))),
    c("x[mask] = y", lambda x, y: put(x, M, y), ((2, 3, 4), (4,))),
    c("x[mask] = number", lambda x: put(x, x > 0.3, 1.0), low=0.7),
    c("where", lambda x, y: torch.where(M, x, y), ((2, 3), (3,))),
    c("x.where", lambda x, y: x.where(M, y), ((2, 3), (3,))),
    c("masked_fill", lambda x: x.masked_fill(M.unsqueeze(-1), -1.0)),
    c("masked_scatter", lambda x, y: x.masked_scatter(M.unsqueeze(-1), y), ((2, 3, 4), (30,))),
    c("index_put", lambda x, y: x.index_put((torch.tensor([0, 0]), torch.tensor([1, 2])), y),
      ((2, 3, 4), (2, 4))),
    c("index_put accumulate",
      lambda x, y: x.index_put((torch.tensor([0, 0]), torch.tensor([1, 1])), y, accumulate=True),
      ((2, 3, 4), (2, 4))),
    c("scatter", lambda x, y: x.scatter(1, I[:2].reshape(1, 2, 1).expand(2, 2, 4), y),
      ((2, 3, 4), (2, 2, 4))),
    c("scatter number", lambda x: x.scatter(1, I[:2].reshape(1, 2, 1).expand(2, 2, 4), 2.0)),
    c("scatter_add", lambda x, y: x.scatter_add(1, torch.ones(2, 2, 4, dtype=torch.long), y),
      ((2, 3, 4), (2, 2, 4))),
    c("scatter_add of constant",
      lambda x: torch.ones(2, 3, 4, dtype=x.dtype).scatter_add(
          1, torch.ones(2, 3, 4, dtype=torch.long), x)),
    c("index_add", lambda x, y: x.index_add(1, torch.tensor([1, 1]), y), ((2, 3, 4), (2, 2, 4))),
    c("index_copy", lambda x, y: x.index_copy(1, I[:2], y), ((2, 3, 4), (2, 2, 4))),
    c("index_fill", lambda x: x.index_fill(1, I[:2], 0.5)),
    c("select_scatter", lambda x, y: torch.select_scatter(x, y, 1, 2), ((2, 3, 4), (2, 4))),
    c("slice_scatter", lambda x, y: torch.slice_scatter(x, y, 1, 0, 2), ((2, 3, 4), (2, 2, 4))),
    c("embedding", lambda x: F.embedding(torch.tensor([[1, 0], [2, 2]]), x[0])),
]

REDUCTIONS = [
    c("sum", lambda x: x.sum()),
    c("sum of dims", lambda x: x.sum((0, -1), keepdim=True)),
    c("mean", lambda x: torch.mean(x, 1)),
    c("nansum", lambda x: torch.nansum(x, 1)),
    c("cumsum", lambda x: x.cumsum(1)),
    c("diff", lambda x: torch.diff(x, 2, 2)),
    c("diff append", lambda x: torch.diff(x, append=x[..., :1])),
    c("trapezoid", lambda x: torch.trapezoid(x, dx=0.3)),
    c("trapezoid x", lambda y, x: torch.trapezoid(y, x, dim=1), ((2, 3, 4), (3,))),
    c("cumulative_trapezoid", lambda x: torch.cumulative_trapezoid(x)),
    c("prod", lambda x: torch.prod(x, 1)),
    c("prod of all", lambda x: x.prod(), ((2, 3),)),
    c("prod with zero", lambda x: (x - x[0].detach() * 0).prod(-1) * 1, ((2, 5),)),
    c("cumprod", lambda x: x.cumprod(-1)),
    c("var", lambda x: torch.var(x)),
    c("var of dim", lambda x: x.var(1, keepdim=True)),
    c("var biased", lambda x: x.var((0, 2), unbiased=False)),
    c("var correction", lambda x: torch.var(x, dim=1, correction=0)),
    c("std", lambda x: x.std(-1)),
    c("var_mean", lambda x: torch.var_mean(x, 1)),
    c("std_mean", lambda x: torch.std_mean(x, (1, 2))),
    c("cov", lambda x: torch.cov(x[0])),
    c("corrcoef", lambda x: torch.corrcoef(x[0])),
]

# picked by value: elements 1 apart, so that the stencil sees one choice
STAIRS = torch.tensor([[3.0, 1.0, 2.0, 5.0], [0.0, 9.0, 4.0, 7.0]], dtype=torch.float64)


def picked(name, f):
    return Case(name, lambda x: f(torch.square(x) + STAIRS), ((2, 4),))


ORDERED = [
    picked("max", lambda x: x.max()),
    picked("max of dim", lambda x: torch.max(x, 1).values),
    picked("min of dim", lambda x: x.min(dim=0, keepdim=True)[0]),
    picked("amax", lambda x: torch.amax(x, (0, 1))),
    picked("amin", lambda x: x.amin(1, keepdim=True)),
    picked("aminmax", lambda x: torch.aminmax(x, dim=1).max),
    picked("sort", lambda x: torch.sort(x, -1, descending=True).values),
    picked("msort", lambda x: torch.msort(x)),
    picked("topk", lambda x: x.topk(2, 1)[0]),
    picked("kthvalue", lambda x: torch.kthvalue(x, 3, dim=1).values),
    picked("median", lambda x: torch.median(x)),
    picked("median of dim", lambda x: x.median(1).values),
    picked("cummax", lambda x: torch.cummax(x, 1)[0]),
    picked("quantile", lambda x: torch.quantile(x, 0.3, dim=1)),
    picked("quantiles", lambda x: torch.quantile(x, torch.tensor([0.25, 0.6]).double(), 1, True)),
]

FOURIER = [
    c("fft", lambda x: torch.fft.fft(x)),
    c("ifft", lambda x: torch.fft.ifft(x, dim=1)),
    c("rfft", lambda x: torch.fft.rfft(x, n=6)),
    c("irfft", lambda x: torch.fft.irfft(torch.fft.rfft(x), n=4)),
    c("fft2", lambda x: torch.fft.fft2(x, norm="ortho")),
    c("fftn", lambda x: torch.fft.fftn(x)),
    c("rfftn", lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2)), dim=(1, 2))),
    c("fftshift", lambda x: torch.fft.fftshift(x, 2)),
    c("spectrum", lambda x: (torch.fft.fft(x) + 3).abs()),
    c("phase", lambda x: torch.angle(torch.fft.fft(x) + 3)),
    c("real, imag", lambda x: (torch.fft.fft(x).real, torch.fft.fft(x).imag)),
    c("view_as_real", lambda x: torch.view_as_real(torch.fft.fft(x))),
    c("complex products", lambda x: torch.fft.fft(x) * torch.fft.fft(x).conj()),
    c("complex matmul", lambda x: torch.fft.fft(x) @ torch.fft.fft(x).mT),
    c("complex quotient", lambda x: 1 / torch.fft.fft(x)[..., 0] / torch.complex(x, x).sum(-1)),
    c("complex exp", lambda x: torch.exp(torch.complex(x, x * x))),
    c("polar", lambda x: torch.polar(x, x * x)),
    c("spectral derivative", lambda x: torch.fft.ifft(1j * torch.arange(4) * torch.fft.fft(x)).real),
]


@pytest.mark.parametrize("case", SHAPES + INDEXING + REDUCTIONS + ORDERED + FOURIER, ids=str)
def test_series_of_a_function_that_arranges_or_sums(case):
    check(case)


def test_products_through_zero_factors():
    """The quotient rule of torch's cumprod would divide by zero."""
    from ctorch.autodiff import jet

    x = torch.tensor([2.0, 0.0, 3.0, 0.0], dtype=torch.float64)
    v = torch.ones_like(x)
    for f, at in ((torch.prod, ()), (torch.cumprod, (3,))):
        args = () if f is torch.prod else (0,)
        _, (d1, d2, d3) = jet(lambda x, f=f, a=args: f(x, *a), (x,), ([v, 0 * v, 0 * v],))
        got = [float(d[at]) for d in (d1, d2, d3)]
        assert got == [0.0, 12.0, 30.0]  # of t^2 (2 + t)(3 + t)


def test_picked_indices_are_plain_tensors():
    from ctorch.autodiff import jet

    x = STAIRS.clone()
    for f in (torch.sort, torch.max, torch.topk):
        args = (2,) if f is torch.topk else (1,)
        (_, index), _ = jet(lambda x, f=f, a=args: f(x, *a), (x,), ([torch.ones_like(x)],))
        assert torch.equal(index, f(x, *args).indices)
