"""Linear algebra, convolutions, searches, indexing by values: lowered and compared with eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctorch.codegen import Untraceable, trace

from .checks import check

F64 = torch.float64


def state(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def table(n: int) -> Tensor:
    return state(n, seed=5).requires_grad_(True)


KNOTS = torch.linspace(-2.0, 2.0, 9, dtype=F64)
WEIGHT = {n: table(n) for n in (9, 12)}


def spd(y: Tensor) -> Tensor:
    return y @ y.mT + torch.eye(y.shape[-2], dtype=F64)


ALGEBRA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "solve": lambda t, y: torch.linalg.solve(y[..., :3], y),
    "solve, contiguous": lambda t, y: torch.linalg.solve(y[..., :3] + 0, y),
    "solve from the right, contiguous": lambda t, y: torch.linalg.solve(
        y[..., :3] + 0, y[..., :3], left=False
    ) @ y,
    "det, contiguous": lambda t, y: torch.linalg.det(y[..., :3] + 0)[..., None, None] * y,
    "solve a vector": lambda t, y: torch.linalg.solve(spd(y), y[..., 0])[..., None] * y,
    "solve from the right": lambda t, y: torch.linalg.solve(y[..., :3], y[..., :3], left=False)
    @ y,
    "inv": lambda t, y: torch.linalg.inv(y[..., :3]) @ y,
    "det": lambda t, y: torch.linalg.det(y[..., :3])[..., None, None] * y,
    "slogdet": lambda t, y: torch.linalg.slogdet(y[..., :3])[1][..., None, None] + y,
    "sign": lambda t, y: torch.linalg.slogdet(y[..., :3])[0][..., None, None] * y,
    "logdet": lambda t, y: torch.logdet(spd(y))[..., None, None] + y,
    "cholesky": lambda t, y: torch.linalg.cholesky(spd(y)) @ y,
    "upper cholesky": lambda t, y: torch.linalg.cholesky(spd(y), upper=True) @ y,
    "triangular": lambda t, y: torch.linalg.solve_triangular(spd(y).tril(), y, upper=False),
    "unit triangular": lambda t, y: torch.linalg.solve_triangular(
        spd(y).triu(), y, upper=True, unitriangular=True
    ),
    "triangular from the right": lambda t, y: torch.linalg.solve_triangular(
        spd(y).triu(), y.mT, upper=True, left=False
    ).mT,
    "cdist": lambda t, y: torch.cdist(y, y + 1).sum(-1, keepdim=True) * y,
    "cdist with itself": lambda t, y: torch.cdist(y, y).sum(-1, keepdim=True) * y,
    "cdist 1": lambda t, y: torch.cdist(y, y + 1, p=1.0).sum(-1, keepdim=True) * y,
    "cdist 3": lambda t, y: torch.cdist(y, y + 1, p=3.0).sum(-1, keepdim=True) * y,
    "cdist inf": lambda t, y: torch.cdist(y, y + 1, p=torch.inf).sum(-1, keepdim=True) * y,
    "bilinear": lambda t, y: F.bilinear(y, y, WEIGHT[12].outer(WEIGHT[9][:4]).reshape(4, 4, 3)[
        :, :, [0, 1, 2, 0]
    ], WEIGHT[9][:4]),
}  # fmt: skip


@pytest.mark.parametrize("name", ALGEBRA)
def test_algebra(name: str) -> None:
    check(ALGEBRA[name], state(4, 3, 4), factor=100.0)


def test_the_inverse_of_a_product_in_loops() -> None:
    check(lambda t, y: torch.linalg.inv(spd(y)) @ y, state(3, 3), batched=False, factor=100.0)


@pytest.mark.parametrize("name", ["inv", "det"])
def test_a_square_state_is_one_system(name: str) -> None:
    """With two of its three rows there is no such matrix: they are no samples."""
    fields = {
        "inv": lambda t, y: torch.linalg.inv(y),
        "det": lambda t, y: torch.linalg.det(y) * y,
    }
    traced = check(fields[name], state(3, 3), batched=False, factor=100.0)
    assert not traced.field.split


def test_elimination_exchanges_rows() -> None:
    """Zeros, and small numbers, on the diagonal."""
    turn = torch.tensor([[0.0, 1e-3, 2.0], [1.0, 0.0, 1e-9], [1e-12, 3.0, 0.0]], dtype=F64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        a = turn * (1 + 0.1 * y[:, :1, :1] ** 2)
        return torch.linalg.solve(a, y) + torch.linalg.det(a)[:, None, None]

    check(func, state(4, 3, 2), factor=100.0)


CONVOLUTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "1d": lambda t, y: F.conv1d(y, WEIGHT[12].reshape(2, 2, 3), WEIGHT[9][:2], padding=1),
    "circular": lambda t, y: F.conv1d(
        F.pad(y, (1, 1), mode="circular"), WEIGHT[12].reshape(2, 2, 3)
    ),
    "dilated groups": lambda t, y: F.conv1d(
        y, WEIGHT[12][:6].reshape(2, 1, 3), padding=2, dilation=2, groups=2
    ),
    "strided and back": lambda t, y: F.conv_transpose1d(
        F.conv1d(y, WEIGHT[12].reshape(3, 2, 2), stride=2),
        WEIGHT[12].reshape(3, 2, 2), WEIGHT[9][:2], stride=2,
    ),
    "transposed groups": lambda t, y: F.conv_transpose1d(
        y, WEIGHT[12][:6].reshape(2, 1, 3), padding=1, groups=2
    ),
    "transposed, longer": lambda t, y: F.conv_transpose1d(
        y[..., ::2], WEIGHT[12].reshape(2, 2, 3), stride=2, padding=1, output_padding=1
    ),
    "2d": lambda t, y: F.conv2d(
        y.unflatten(-1, (2, 3)), WEIGHT[12].reshape(1, 2, 3, 2)[..., :2], padding=(1, 1)
    )[..., :3].flatten(-2).expand_as(y),
    "3d": lambda t, y: F.conv3d(
        y.unflatten(-1, (1, 2, 3)), WEIGHT[12].reshape(2, 2, 1, 1, 3), padding=(0, 0, 1)
    ).flatten(-3),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions(name: str, batch: int) -> None:
    check(CONVOLUTIONS[name], state(batch, 2, 6), factor=10.0)


def test_weights_copied_in_another_order_are_not_read_as_they_stand() -> None:
    """Of one sample in long loops, products read matrices that were turned round beforehand."""
    kernel = table(27).reshape(3, 3, 3).requires_grad_()
    gain = table(15).reshape(3, 5)
    check(
        lambda t, y, by: F.conv1d(by * y, kernel, padding=1), state(3, 3, 5), args=(gain,), width=1
    )


def test_a_convolution_of_one_system() -> None:
    check(CONVOLUTIONS["1d"], state(3, 2, 6), batched=False)
    check(lambda t, y: F.conv1d(y, WEIGHT[9].reshape(3, 3, 1)), state(3, 7), batched=False)


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
def test_padding_by_what_is_there(mode: str) -> None:
    """Its derivative adds up what was copied to several places."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        line = F.pad(y, (3, 2), mode=mode).unfold(-1, 6, 1) @ WEIGHT[12][:6]
        plane = F.pad(y.unflatten(-1, (2, 3)), (2, 1, 1, 0), mode=mode)
        block = F.pad(y.reshape(-1, 1, 2, 2, 3), (0, 2, 1, 1, 1, 0), mode=mode)
        ends = plane.flatten(-2).square()[..., -6:] + block.flatten(1).sin()[:, None, -6:]
        return line + ends

    check(func, state(3, 2, 6), factor=10.0)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm(dim: int | None) -> None:
    layer = torch.nn.Linear(6, 6, dtype=F64)
    torch.nn.utils.parametrizations.weight_norm(layer, dim=dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-1, 1.5, parameter.numel()).view(parameter.shape))
    check(lambda t, y: torch.tanh(layer(y)), state(3, 6), factor=10.0)


def interpolated(t: Tensor, y: Tensor) -> Tensor:
    right = torch.searchsorted(KNOTS, y.detach()).clamp(1, 8)
    left = right - 1
    share = (y - KNOTS[left]) / (KNOTS[right] - KNOTS[left])
    return WEIGHT[9][left] * (1 - share) + WEIGHT[9][right] * share


def places(y: Tensor, n: int) -> Tensor:
    return (y.detach() * 1.7).round().long().clamp(-n, n - 1)


def masked(t: Tensor, y: Tensor) -> Tensor:
    out = y.clone()
    out[y > 0.3] = 2.0
    out[(y < -0.5).all(-1)] = -1.0
    return out


PLACES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "interpolation": interpolated,
    "bucketize": lambda t, y: WEIGHT[12][torch.bucketize(y, KNOTS, right=True)] * y,
    "a row each": lambda t, y: torch.searchsorted(
        y.sort(-1).values, y.flip(-1).contiguous()
    ).to(F64),
    "index": lambda t, y: WEIGHT[12].reshape(4, 3)[places(y, 4)].sum(-1) * y,
    "two indices": lambda t, y: WEIGHT[12].reshape(4, 3)[places(y, 4), places(y + t, 3)] * y,
    "indices apart": lambda t, y: WEIGHT[12].reshape(2, 3, 2)[places(y, 2), :, places(y, 2)].sum(-1)
    * y,
    "index inside": lambda t, y: WEIGHT[12].reshape(2, 3, 2)[:, places(y, 3)].sum((0, -1)) * y,
    "a write": lambda t, y: (y * 2).index_put((torch.arange(len(y)),
                                               places(y, 4).abs()[:, 0]), y[:, 1]),
    "sums into places": lambda t, y: torch.zeros(len(y), 4, dtype=F64).index_put(
        (torch.arange(len(y))[:, None].expand(-1, 4), places(y, 4)), y**2, accumulate=True
    ),
    "take": lambda t, y: torch.take(WEIGHT[12], places(y, 12)) * y,
    "take along": lambda t, y: torch.take_along_dim(y, places(y, 4) % 4, -1) * y,
    "index_select": lambda t, y: torch.vmap(lambda row: row.index_select(0, places(row, 4) % 4))(y),
    "sort": lambda t, y: y.sort(-1).values * y,
    "descending": lambda t, y: y.sort(dim=-1, descending=True, stable=True).values * y,
    "argsort": lambda t, y: y.argsort(-1) + y,
    "topk": lambda t, y: y.topk(2, -1).values.repeat(1, 2) * y.topk(4, largest=False).values,
    "mask": masked,
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_places_that_depend_on_values(name: str) -> None:
    check(PLACES[name], state(5, 4), vjp="searchsorted" not in name)


def test_ties_and_nan_are_sorted_as_in_torch() -> None:
    rows = torch.tensor([[1.0, 2.0, 1.0, 2.0], [torch.nan, -1.0, torch.inf, -1.0]], dtype=F64)
    for descending in (False, True):
        check(lambda t, y, d=descending: y.sort(-1, descending=d).values, rows, vjp=False)
        check(
            lambda t, y, d=descending: y.sort(dim=-1, descending=d, stable=True).indices + 0 * t,
            rows, vjp=False,
        )  # fmt: skip


def test_an_index_that_is_a_scalar() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        i = torch.searchsorted(KNOTS, t).clamp(1, 8)
        lines = WEIGHT[12].reshape(1, 12)[None, :, :9]
        return y * WEIGHT[9][i] + lines[0, ..., i - 1] * lines[..., None, i].sum()

    check(func, state(3), batched=False)


def test_a_place_that_is_not_there_is_nan() -> None:
    """Where PyTorch raises, a number would be silently wrong."""
    from .harness import Compiled

    def func(t: Tensor, y: Tensor) -> Tensor:
        return WEIGHT[9][y.long()] + WEIGHT[9].gather(0, y.long().abs()[:, 0])[:, None]

    traced = trace(func, torch.zeros(3, 1, dtype=F64), 0.0, batched=True)
    y = torch.tensor([[8.0], [9.0], [-10.0]], dtype=F64)
    got = Compiled(traced.source).eval(torch.zeros(3, dtype=F64), y, y[:, :0], traced.shared)
    assert got.isnan().flatten().tolist() == [False, True, True]
    assert got[0, 0] == 2 * WEIGHT[9][8]


def test_batch_norm() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).to(F64)
    net[1].running_mean.uniform_()
    net[1].running_var.uniform_(0.5, 2.0)
    check(lambda t, y: net.eval()(y), state(5, 3))
    image = nn.BatchNorm2d(2, affine=False).to(F64).eval()
    check(lambda t, y: image(y), state(3, 2, 2, 3))
    check(
        lambda t, y: F.batch_norm(y, None, None, WEIGHT[12][:2], WEIGHT[9][:2], training=True),
        state(3, 2, 4), batched=False,
    )  # fmt: skip
    with pytest.raises(Untraceable, match=r"batch_norm|outside"):
        trace(lambda t, y: net.train()(y), state(5, 3), 0.0, batched=False)


def refused(func: Callable[..., Any], y: Tensor, text: str) -> None:
    with pytest.raises(Untraceable, match=text):
        trace(func, y, 0.0, batched=False)


def test_what_is_too_large_or_has_no_shape_is_refused_by_name() -> None:
    refused(lambda t, y: torch.linalg.inv(y), state(33, 33), "linalg_inv_ex .*at most 32")
    refused(lambda t, y: y.sort().values, state(65), "sort .*at most 64")
    refused(lambda t, y: y[y > 0].sum() * y, state(4), "index .*shape depends on values")

    def several(t: Tensor, y: Tensor) -> Tensor:
        out = y.clone()
        out[y > 0] = y[y < 0]
        return out

    refused(several, torch.tensor([1.0, -1.0], dtype=F64), "shape depends on values")
