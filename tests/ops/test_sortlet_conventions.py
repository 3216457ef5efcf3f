"""What sortlets are, how smooth they are, and what they do with ties, NaN, infinities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ctorch
from ctorch.ops import sortlet as ops

F64 = torch.float64
PHI = {"linear": lambda g: g, "tanh": torch.tanh}


def psi(x: Tensor, gap: str = "linear") -> Tensor:
    sign, logabs = ctorch.sortlet(x, gap)
    return sign * logabs.exp()


def permutation_sum(x: Tensor, gap: str) -> Tensor:
    """The antisymmetrizer by its definition: a signed sum over all orders of the scores."""
    n, total = x.shape[-1], torch.zeros(x.shape[:-1], dtype=x.dtype)
    for order in itertools.permutations(range(n)):
        sign = torch.linalg.det(torch.eye(n, dtype=F64)[list(order)]).round()
        gaps = x[..., list(order)].diff(dim=-1)
        total += sign * torch.where((gaps > 0).all(-1), PHI[gap](gaps).prod(-1), 0.0)
    return total


@pytest.mark.parametrize("gap", PHI)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_equals_the_sum_over_permutations(n, gap):
    x = torch.randn(20, n, dtype=F64, generator=torch.Generator().manual_seed(n))
    assert_close(psi(x, gap), permutation_sum(x, gap), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [2, 5, 16, 64, 65, 512, 1024, 1025, 5000])
def test_any_permutation_changes_the_sign_by_its_parity(n, dtype):
    x = torch.arange(n, dtype=dtype) + 0.3 * torch.rand(n, generator=torch.manual_seed(n)).to(dtype)
    for count in (3, 20):  # few lists go one at a time, many side by side
        orders = torch.stack([torch.randperm(n) for _ in range(count)])
        signs, logs = ctorch.sortlet(x[orders])
        for order, sign in zip(orders.tolist(), signs.tolist(), strict=True):
            assert sign == parity(order)
        expected = x.double().diff().log().sum().to(dtype)
        assert_close(
            logs, expected.expand(count), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5
        )


def parity(order: list[int]) -> int:
    sign, order = 1, list(order)
    for i in range(len(order)):
        while order[i] != i:
            j = order[i]
            order[i], order[j] = order[j], j
            sign = -sign
    return sign


@pytest.mark.parametrize("gap", PHI)
@pytest.mark.parametrize("at", ["end", "inside"])
def test_once_but_not_twice_continuously_differentiable_at_a_tie(gap, at):
    others = [1.3] if at == "end" else [-0.9, 1.3]
    v = torch.tensor([-0.5, 0.5] + [0.0] * len(others), dtype=F64)

    def along(u: float) -> tuple[float, float, float]:
        """psi and two derivatives where the first two scores are u apart."""
        x = torch.tensor([0.0, 0.0, *others], dtype=F64) + u * v
        sign = ctorch.sortlet(x, gap)[0].item()
        value, first, second = (
            ctorch.jet(lambda x: ctorch.sortlet(x, gap)[1].exp(), (x,), ([v, 0 * v],))[0],
            *ctorch.jet(lambda x: ctorch.sortlet(x, gap)[1].exp(), (x,), ([v, 0 * v],))[1],
        )
        return sign * value.item(), sign * first.item(), sign * second.item()

    below, above = along(-1e-7), along(1e-7)
    assert abs(below[0] - above[0]) < 1e-6
    assert abs(below[1] - above[1]) < 1e-6
    assert abs(below[1]) > 0.1
    assert_close(below[2], -above[2], rtol=1e-4, atol=0)  # it jumps
    assert abs(below[2]) > 1e-3


def test_of_two_scores_it_is_their_difference():
    x = torch.tensor([[0.3, 0.5], [0.5, 0.3], [0.4, 0.4]], dtype=F64)
    assert_close(psi(x), x[:, 1] - x[:, 0])


@pytest.mark.parametrize("gap", PHI)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [3, 70])
def test_a_tie_gives_zero_and_a_finite_gradient(n, dtype, gap):
    x = torch.arange(n, dtype=dtype)
    x[2] = x[0] = 1.0
    x[1] = 0.0
    x.requires_grad_()
    sign, logabs = ctorch.sortlet(x, gap)
    assert (sign.item(), logabs.item()) == (0.0, -math.inf)
    (g,) = torch.autograd.grad(logabs, x)
    # Only the gap below the tie and the one above it pull; equal scores keep their order.
    w = 1.0 if gap == "linear" else 2 / math.sinh(2)
    assert_close(
        g[:3].double(),
        torch.tensor(
            [
                w,
                -w,
                0.0 if n == 3 else -0.5 * (gap == "linear") - (gap == "tanh") * 2 / math.sinh(4),
            ],
            dtype=F64,
        ),
    )
    assert g.isfinite().all()


@pytest.mark.parametrize("n", [1, 3, 20, 70])
def test_nan_spoils_its_own_list_alone(n):
    x = torch.arange(2.0 * n).reshape(2, n)
    x[0, n // 2] = math.nan
    x.requires_grad_()
    sign, logabs = ctorch.sortlet(x)
    (g,) = torch.autograd.grad(logabs.sum(), x)
    assert sign[0].isnan()
    assert logabs[0].isnan()
    assert g[0].isnan().all()
    assert sign[1] == 1
    assert logabs[1] == 0
    assert g[1].isfinite().all()


def test_infinite_scores():
    inf = math.inf
    x = torch.tensor([[-inf, 0.0, 1.0], [inf, 0.0, 1.0], [inf, inf, 0.0]], requires_grad=True)
    sign, logabs = ctorch.sortlet(x)
    assert sign.tolist() == [1, 1, 0]
    assert logabs.tolist() == [inf, inf, -inf]
    (g,) = torch.autograd.grad(logabs.sum(), x)
    assert g.tolist() == [[0, -1, 1], [0, -1, 1], [0, 0, 0]]
    assert_close(ctorch.sortlet(x, "tanh")[1][:2], torch.full((2,), math.log(math.tanh(1))))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("n", [8, 64, 200])
def test_huge_and_tiny_scores(n, scale, dtype):
    x = torch.arange(n, dtype=dtype).mul(scale).requires_grad_()
    sign, logabs = ctorch.sortlet(x)
    assert sign == 1
    assert_close(logabs.item(), (n - 1) * math.log(scale), rtol=1e-5, atol=0)
    (g,) = torch.autograd.grad(logabs, x)
    assert_close(g[0].item(), -1 / scale, rtol=1e-5, atol=0)


def test_the_smallest_gaps_that_there_are():
    for dtype, tiny in ((torch.float32, 2.0**-149), (F64, 2.0**-1074)):
        x = torch.tensor([0.0, tiny, 1.0], dtype=dtype, requires_grad=True)
        _, logabs = ctorch.sortlet(x)
        assert_close(logabs.item(), math.log(tiny), rtol=1e-6, atol=0)
        (g,) = torch.autograd.grad(logabs, x, create_graph=True)
        (h,) = torch.autograd.grad(g[2], x)
        assert not g.isnan().any()
        assert not h.isnan().any()


def test_no_score_or_one():
    for n in (0, 1):
        x = torch.zeros(3, n, requires_grad=True)
        sign, logabs = ctorch.sortlet(x)
        assert sign.tolist() == [1, 1, 1]
        assert logabs.tolist() == [0, 0, 0]
        assert torch.autograd.grad(logabs.sum(), x)[0].tolist() == [[0] * n] * 3
    assert ctorch.sortlet(torch.zeros(0, 4))[1].shape == (0,)


# ---- sums


def plain_sum(x: Tensor, c: Tensor, gap: str) -> Tensor:
    return (c.exp() * permutation_sum(x, gap)).sum(-1)


@pytest.mark.parametrize("gap", PHI)
def test_a_sum_is_the_sum(gap):
    x = torch.randn(20, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    c = torch.tensor([0.1, -0.5, 0.3], dtype=F64)
    sign, logabs = ctorch.sum_of_sortlets(x, c, gap=gap)
    assert_close(sign * logabs.exp(), plain_sum(x, c, gap), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gap", PHI)
def test_the_gradient_of_a_sum_is_continuous_across_a_tie_of_a_term(gap):
    x = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    c = torch.zeros(2, dtype=F64)
    results = []
    for apart in (-1e-9, 0.0, 1e-9):
        near = x.clone()
        near[0, 3] = near[0, 1] + apart
        near.requires_grad_()
        value = ctorch.sum_of_sortlets(near, c, gap=gap)[1]
        results.append((value.detach(), torch.autograd.grad(value, near)[0]))
    for value, g in results:
        assert_close(value, results[1][0], rtol=0, atol=1e-7)
        assert_close(g, results[1][1], rtol=0, atol=1e-7)
    assert results[1][1][0].abs().max() > 0.01


def test_a_sum_of_zeros():
    x = torch.zeros(2, 3, 4, requires_grad=True)
    c = torch.zeros(3, requires_grad=True)
    sign, logabs = ctorch.sum_of_sortlets(x, c)
    assert sign.tolist() == [0, 0]
    assert logabs.tolist() == [-math.inf] * 2
    for g in torch.autograd.grad(logabs.sum(), (x, c)):
        assert (g == 0).all()
    assert (
        ctorch.sum_of_sortlets(torch.zeros(2, 0, 4), torch.zeros(0))[1].tolist() == [-math.inf] * 2
    )


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_coefficients_of_any_size(size):
    x = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
    c = torch.tensor([size, size - 1], requires_grad=True)
    sign, logabs = ctorch.sum_of_sortlets(x, c)
    assert sign == 1
    assert_close(logabs.item(), size + math.log(2 - math.exp(-1)), rtol=1e-6, atol=0)
    (g,) = torch.autograd.grad(logabs, c)
    assert_close(g.sum().item(), 1.0)


class Wavefunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        self.c = nn.Parameter(torch.zeros(3))

    def forward(self, r: Tensor) -> Tensor:
        scores = self.net(r).mT
        return ctorch.sum_of_sortlets(scores, self.c)[1] + ctorch.sortlet(scores[..., 0, :])[1]


def test_inside_a_compiled_module_and_under_functional_transforms():
    torch.manual_seed(0)
    module, r = Wavefunction().double(), torch.randn(5, 4, 2, dtype=F64)
    expected = module(r)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(r), expected)
    assert_close(torch.func.vmap(module)(r), expected)
    leaf = r[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(module(leaf), leaf)
    assert_close(torch.func.grad(module)(r[0]), g)
    assert_close(torch.func.jvp(module, (r[0],), (torch.ones_like(r[0]),))[1], g.sum())
    hessian = torch.func.hessian(module)(r[0])
    assert_close(hessian, torch.autograd.functional.hessian(module, r[0]))


def test_kernels_refuse_what_does_not_fit():
    from ctorch.ops import _kernels

    if not _kernels.HAS_KERNELS:
        pytest.skip("needs the kernels")
    x, g = torch.ones(3, 4), torch.ones(3)
    for call, pattern in [
        (lambda: torch.ops.ctorch.sortlet_gradient(x, g[:2], 0), "g must have the shape"),
        (lambda: torch.ops.ctorch.sortlet_gradient(x, g.double(), 0), "g must have the dtype"),
        (lambda: torch.ops.ctorch.sortlet_hessian(x, g, x[:, :2], 0), "v must have the shape"),
        (lambda: torch.ops.ctorch.sortlet(x, 2), "gap must"),
        (lambda: torch.ops.ctorch.sortlet(x.int(), 0), "dtype must be float32 or float64"),
    ]:
        with pytest.raises(RuntimeError, match=pattern):
            call()


def test_operators_are_those_of_the_public_functions():
    x = torch.randn(3, 4)
    assert_close(ops.log_sortlet(x, 1)[1], ctorch.sortlet(x, "tanh")[1])
