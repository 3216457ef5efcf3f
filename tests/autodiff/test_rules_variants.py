"""Rules of torch's further names and forms: copies, native norms, polynomials, losses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import ctorch
from ctorch.autodiff import laplacian

from .rule_checks import Case, check

F64 = torch.float64
PLACES = torch.tensor([[0, 1, 1, 0], [2, 2, 0, 1]])
LABELS = torch.tensor([2, 0])
SETS = torch.tensor([[1, 2, -1, 0], [3, -1, 0, 0]])
APART = torch.tensor([0.0, 4.0, 2.0], dtype=F64).unsqueeze(-1)
FACTOR = torch.tensor([0.5, 2.0, 1.5, 0.7], dtype=F64)


def c(name, f, shapes=((2, 3, 4),), **options):
    return Case(name, lambda x, *rest: f(torch.square(x), *rest), shapes, **options)


BAGS = torch.tensor([[0, 2, 2], [1, 0, 1]])
STARTS = torch.tensor([0, 2, 2, 5])  # the second of four bags is empty


def bags(weight, scale=None, padding=None):
    """The vectors of each of the four bags that STARTS cuts BAGS into."""
    flat, ends = BAGS.reshape(-1).tolist(), [*STARTS.tolist()[1:], BAGS.numel()]
    for start, end in zip(STARTS.tolist(), ends, strict=True):
        at = [i for i in range(start, end) if flat[i] != padding]
        one = [weight[flat[i]] * (1 if scale is None else scale.reshape(-1)[i]) for i in at]
        yield torch.stack(one) if one else weight[:0]


def reshaped(name, *args):
    def f(x):
        y = x.clone()
        getattr(y, name)(*args)
        return y

    return f


def normalized(x, dims, eps=0.1):
    mean = x.mean(dims, keepdim=True)
    scale = ((x - mean) ** 2).mean(dims, keepdim=True) + eps
    return (x - mean) * scale**-0.5, mean, scale**-0.5


def scattered_product(x, dim, index, src, include_self):
    rows, met = [list(row) for row in x], set()
    for i, j in itertools.product(*map(range, index.shape)):
        a, b = (int(index[i, j]), j) if dim == 0 else (i, int(index[i, j]))
        alone = not include_self and (a, b) not in met
        rows[a][b] = src[i, j] if alone else rows[a][b] * src[i, j]
        met.add((a, b))
    return torch.stack([torch.stack(row) for row in rows])


FORMS = [
    c("alias_copy", torch.alias_copy),
    c("diagonal_copy", lambda x: torch.diagonal_copy(x, 1, -2, -1)),
    c("expand_copy", lambda x: torch.expand_copy(x, (2, 2, 3, 4))),
    c("narrow_copy", lambda x: torch.narrow_copy(x, 2, 1, 2)),
    c("permute_copy", lambda x: torch.permute_copy(x, (2, 0, 1))),
    c("select_copy", lambda x: torch.select_copy(x, 1, 2)),
    c("slice_copy", lambda x: torch.slice_copy(x, -1, 0, 4, 2)),
    c("split_copy", lambda x: torch.split_copy(x, 3, -1)[1]),
    c("split_with_sizes_copy", lambda x: torch.split_with_sizes_copy(x, [1, 3], -1)[1]),
    c("squeeze_copy", lambda x: torch.squeeze_copy(x[:1])),
    c("t_copy", lambda x: torch.t_copy(x[0])),
    c("transpose_copy", lambda x: torch.transpose_copy(x, 0, 2)),
    c("unbind_copy", lambda x: torch.unbind_copy(x, 1)[2]),
    c("unfold_copy", lambda x: torch.unfold_copy(x, -1, 3, 1)),
    c("unsqueeze_copy", lambda x: torch.unsqueeze_copy(x, 1)),
    c("view_copy", lambda x: torch.view_copy(x, (6, 4))),
    c("aten.slice", lambda x: torch.ops.aten.slice(x, -2, 1, 3)),
    c("unsafe_chunk", lambda x: torch.stack(torch.unsafe_chunk(x, 2, -1))),
    c("unsafe_split", lambda x: torch.unsafe_split(x, 2, -1)[1]),
    c("unsafe_split_with_sizes", lambda x: torch.unsafe_split_with_sizes(x, [1, 3], -1)[1]),
    c("squeeze_", lambda x: reshaped("squeeze_", 1)(x[:, :1])),
    c("unsqueeze_", reshaped("unsqueeze_", -1)),
    c("transpose_", reshaped("transpose_", 0, 2)),
    c("t_", lambda x: reshaped("t_")(x[0])),
    c("fill", lambda x: torch.fill(x, x.sum())),
    c("constant_pad_nd", lambda x: torch.constant_pad_nd(x, (1, 2), 3.0)),
    c("sum_to_size", lambda x: x.sum_to_size(3, 1)),
    c("combinations", lambda x: torch.combinations(x[0, 0], 2)),
    c("diagonal_scatter", lambda x: torch.diagonal_scatter(x, x[..., 0] ** 2, 0, 1, 2)),
    c(
        "diagonal_scatter into a constant",
        lambda x: torch.diagonal_scatter(torch.ones(3, 4, dtype=F64), x[0, :, 0]),
    ),
    *(
        c(
            f"scatter_reduce {kind}, include_self={own}",
            lambda x, kind=kind, own=own: torch.scatter_reduce(
                x[0], 0, PLACES, torch.sin(x[1]), kind, include_self=own
            ),
            reference=lambda x, kind=kind, own=own: torch.scatter_reduce(  # torch wants it cut
                x[0] ** 2, 0, PLACES, torch.sin(x[1, :2] ** 2), kind, include_self=own
            ),
        )
        for kind in ("sum", "mean", "amax", "amin")
        for own in (True, False)
    ),
    *(
        c(
            f"scatter_reduce prod, include_self={own}, along {dim}",
            lambda x, own=own, dim=dim: torch.scatter_reduce(
                x[0], dim, PLACES, torch.sin(x[1]), "prod", include_self=own
            ),
            reference=lambda x, own=own, dim=dim: scattered_product(
                x[0] ** 2, dim, PLACES, torch.sin(x[1] ** 2), own
            ),
        )
        for own in (True, False)
        for dim in (0, 1)
    ),
    c("embedding_bag", lambda x: F.embedding_bag(BAGS, x[0], mode="sum")),
    c(
        "embedding_bag mean, offsets, padding",
        lambda x: F.embedding_bag(BAGS.reshape(-1), x[0], STARTS, mode="mean", padding_idx=1),
        reference=lambda x: torch.stack(
            [b.sum(0) / max(len(b), 1) for b in bags(x[0] ** 2, padding=1)]
        ),
    ),
    c(
        "embedding_bag weighted",
        lambda x: F.embedding_bag(
            BAGS.reshape(-1), x[0], STARTS, mode="sum", per_sample_weights=x[1, :2, :3].reshape(-1)
        ),
        reference=lambda x: torch.stack([b.sum(0) for b in bags(x[0] ** 2, x[1, :2, :3] ** 2)]),
    ),
    c(
        "embedding_bag constant, weighted",
        lambda x: F.embedding_bag(
            BAGS, torch.eye(3, dtype=F64), mode="sum", per_sample_weights=x[1, :2, :3]
        ),
    ),
    c(
        "embedding_bag max",
        lambda x: F.embedding_bag(BAGS.reshape(-1), x[0] + APART, STARTS, mode="max"),
        reference=lambda x: torch.stack(
            [b.amax(0) if len(b) else 0 * x[0, 0] for b in bags(x[0] ** 2 + APART)]
        ),
    ),
    c(
        "embedding_bag max of rows",
        lambda x: F.embedding_bag(BAGS, x[0] + APART, mode="max"),
        reference=lambda x: torch.stack([(x[0] ** 2 + APART)[row].amax(0) for row in BAGS]),
    ),
    c("put", lambda x: x.put(torch.tensor([[0, 5], [-1, 7]]), torch.sin(x[1, :2, :2]))),
    c("put accumulate", lambda x: x[0].put(PLACES, torch.sin(x[1, :2]), accumulate=True)),
    c("put into a constant", lambda x: torch.ones(3, 4, dtype=F64).put(PLACES[0, :2], x[0, 0, :2])),
    c("put_", lambda x: reshaped("put_", torch.tensor([5, 1]), FACTOR[:2])(x)),
    c("_softmax", lambda x: torch._softmax(x, 1, False)),
    c("_log_softmax", lambda x: torch._log_softmax(x, 1, False)),
    c("_safe_softmax", lambda x: torch._safe_softmax(x, 1)),
    c(
        "native_layer_norm",
        lambda x: torch.native_layer_norm(x, [3, 4], None, None, 0.1),
        reference=lambda x: normalized(x * x, (-2, -1)),
    ),
    c(
        "native_group_norm",
        lambda x: torch.native_group_norm(x, None, None, 2, 3, 4, 1, 0.1),
        reference=lambda x: normalized(x * x, (-2, -1)),
    ),
]

NORMS_OF_BATCHES = (  # no list: checks of Laplacians gather those, and here samples mix
    c(
        "native_batch_norm",
        lambda x: torch.native_batch_norm(x, FACTOR[:3], None, None, None, True, 0.1, 0.1)[0],
        reference=lambda x: normalized(x * x, (0, 2))[0] * FACTOR[:3, None],
    ),
    c(
        "_native_batch_norm_legit",
        lambda x: torch._native_batch_norm_legit(x, None, None, True, 0.1, 0.1)[2],
        reference=lambda x: normalized(x * x, (0, 2))[2].reshape(-1),
    ),
    c(
        "native_batch_norm, eval",
        lambda x: torch.native_batch_norm(x, None, None, FACTOR[:3], FACTOR[:3], False, 0.1, 0.1)[
            0
        ],
        reference=lambda x: (x * x - FACTOR[:3, None]) * (FACTOR[:3, None] + 0.1) ** -0.5,
    ),
)

POLYNOMIALS = [
    Case(
        f"{name} of degree {n}",
        lambda x, name=name, n=n: getattr(torch.special, name)(x, n),
        low=-0.9,
        reference="none",  # torch has no derivatives of these: the stencil judges
        orders=4,
    )
    for name in (
        "chebyshev_polynomial_t",
        "chebyshev_polynomial_u",
        "chebyshev_polynomial_v",
        "chebyshev_polynomial_w",
        "shifted_chebyshev_polynomial_t",
        "shifted_chebyshev_polynomial_w",
        "hermite_polynomial_h",
        "hermite_polynomial_he",
        "laguerre_polynomial_l",
        "legendre_polynomial_p",
    )
    for n in (1, 4)
]

FUNCTIONS = [
    Case("igamma", lambda x: torch.igamma(FACTOR, x), low=0.5, high=2.0, orders=1),
    Case("igammac", lambda x: torch.igammac(FACTOR, x), low=0.5, high=2.0, orders=1),
    c("nanquantile", lambda x: torch.nanquantile(x + APART, FACTOR[:1] * 0.6, 1, True)),
    c(
        "multi_margin_loss",
        lambda x: F.multi_margin_loss(x[:, 0], LABELS, 2, 3.0, FACTOR),
        reference=lambda x: sum(
            FACTOR[y] * (3 - row[y] + row[j]) ** 2 / 8
            for row, y in zip(x[:, 0] ** 2, LABELS, strict=True)
            for j in range(4)
            if j != y
        ),
    ),
    c(
        "multilabel_margin_loss",
        lambda x: F.multilabel_margin_loss(x[:, 0], SETS, reduction="sum"),
        reference=lambda x: sum(
            (1 - row[i] + row[j]) / 4
            for row, labels, others in zip(
                x[:, 0] ** 2, ((1, 2), (3,)), ((0, 3), (0, 1, 2)), strict=True
            )
            for i in labels
            for j in others
        ),
    ),
    c(
        "multilabel_soft_margin_loss",
        lambda x: F.multilabel_soft_margin_loss(x[:, 0], (SETS > 0).double(), FACTOR),
        reference=lambda x: (
            -(
                FACTOR
                * torch.where(
                    SETS > 0, torch.sigmoid(x[:, 0] ** 2), torch.sigmoid(-(x[:, 0] ** 2))
                ).log()
            ).mean()
        ),
    ),
    c(
        "triplet_margin_with_distance_loss",
        lambda x: F.triplet_margin_with_distance_loss(
            x[0],
            x[1] + 2,
            x[1] * 1.5 + 2,
            margin=9.0,
            swap=True,
            distance_function=lambda a, b: (a - b).norm(dim=-1),
        ),
    ),
]


@pytest.mark.parametrize("case", FORMS + POLYNOMIALS + FUNCTIONS, ids=str)
def test_further_forms_of_functions(case):
    check(case)


@pytest.mark.parametrize("case", NORMS_OF_BATCHES, ids=str)
def test_native_batch_norm(case):
    check(case)


def test_nanquantile_is_over_what_is_not_nan_in_each_row():
    x = torch.tensor([[3.0, math.nan, 1.0, 2.0], [math.nan] * 4, [1.0, 4.0, 2.0, 8.0]], dtype=F64)
    y, (d,) = ctorch.jet(lambda x: torch.nanquantile(x, 0.5, 1), (x,), ([torch.ones_like(x)],))
    torch.testing.assert_close(y, torch.nanquantile(x, 0.5, 1), equal_nan=True)
    assert d[[0, 2]].tolist() == [1.0, 1.0]


def test_polynomials_of_several_degrees_at_once_are_refused_by_name():
    x = torch.ones(2)
    with pytest.raises(NotImplementedError, match=r"legendre_polynomial_p: .*one degree"):
        ctorch.derivative(
            lambda x: torch.special.legendre_polynomial_p(x, torch.tensor([1, 2])), x, x
        )


def test_native_layer_norm_agrees_with_layer_norm():
    x = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    f = lambda x: torch.native_layer_norm(x, [5], None, None, 1e-5)[0].sin().sum(-1)  # noqa: E731
    g = lambda x: F.layer_norm(x, [5]).sin().sum(-1)  # noqa: E731
    for a, b in zip(laplacian(f, x), laplacian(g, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:size_average")
def test_smooth_l1_loss_without_a_bend_heeds_the_older_arguments():
    x = torch.tensor([0.5, -2.0, 1.0], dtype=F64)
    f = lambda x: F.smooth_l1_loss(x, 0 * x.detach(), size_average=False, beta=0.0)  # noqa: E731
    assert ctorch.derivative(f, x, x, 0) == 3.5
    assert ctorch.derivative(f, x, torch.ones_like(x), 1) == 1


def test_native_batch_norm_is_refused_where_samples_are_to_be_kept_apart():
    def f(x):
        return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 0.1)[0].sum(-1)

    with pytest.raises(ValueError, match="mixes samples"):
        laplacian(f, torch.rand(4, 3))
