"""Rules of elementwise functions, activations and softmaxes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.autodiff.rule_checks import Case, check

S = torch.special


def c(f, low=0.2, high=0.9, shapes=((2, 3),), **options):
    name = options.pop("name", getattr(f, "__name__", "f"))
    return Case(name, f, shapes, low, high, **options)


PLAIN = """tanh sigmoid exp exp2 expm1 log log2 log10 log1p sin cos tan sqrt rsqrt reciprocal erf erfc
erfinv asin acos atan sinh cosh asinh atanh square sinc lgamma digamma abs neg positive frac deg2rad
rad2deg i0 logit arcsin arctan relu selu celu nan_to_num""".split()

ELEMENTWISE = [
    *(c(getattr(torch, name), name=name) for name in PLAIN),
    c(torch.acosh, 1.3, 2.5),
    *(c(getattr(torch, name), -2.0, 2.0, name=f"{name} through zero") for name in
      ("tanh", "erf", "sinh", "asinh", "atan", "expm1", "exp2", "erfc", "sigmoid", "i0")),
    c(torch.sinc, -0.05, 0.05, name="sinc at zero", reference="none"),
    c(torch.sinc, 0.55, 2.0, name="sinc far"),
    c(S.i1, name="i1"),
    c(S.i0, 11.0, 13.0, name="i0 far", reference="none"),
    c(S.i1e, name="i1e"),
    c(S.i0e, name="i0e"),
    c(S.ndtr, name="ndtr"),
    c(S.log_ndtr, name="log_ndtr"),
    c(S.log_ndtr, -6.0, -1.0, name="log_ndtr in its tail"),
    c(S.ndtri, name="ndtri"),
    c(S.erfcx, name="erfcx"),
    c(S.entr, name="entr"),
    c(S.expit, name="expit"),
    c(S.gammaln, 0.4, 3.0, name="gammaln"),
    c(lambda x: torch.polygamma(2, x), name="polygamma"),
    c(lambda x: x.polygamma(1), name="x.polygamma"),
    c(lambda x: torch.mvlgamma(x, 3), 1.5, 3.0, name="mvlgamma"),
    c(lambda x: torch.logit(x, 0.3), 0.35, 0.6, name="logit eps"),
    c(lambda x, y: torch.xlogy(x, y), shapes=((2, 3), (3,)), name="xlogy"),
    c(lambda x, y: S.xlog1py(x, y), shapes=((2, 3), (3,)), name="xlog1py"),
    c(lambda x: torch.xlogy(x, 0.3), name="xlogy number"),
    c(torch.atan2, -1.0, 1.0, shapes=((2, 3), (2, 3))),
    c(torch.hypot, shapes=((2, 3), (1, 3))),
    c(torch.logaddexp, -1, 1, shapes=((2, 3), (2, 1))),
    c(torch.logaddexp2, -1, 1, shapes=((2, 3), (2, 1))),
    c(lambda x, y: x**y, shapes=((2, 3), (3,)), name="x**y"),
    c(lambda x: x**1.7, name="x**1.7"),
    c(lambda x: x**-2, name="x**-2"),
    c(lambda x: x**5, -0.5, 0.5, name="x**5"),
    c(lambda x: 2.5**x, name="2.5**x"),
    c(lambda x: torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64) ** x, name="t**x",
      reference="none"),
    c(lambda x: torch.float_power(x, 3), name="float_power"),
    c(lambda x: x % 0.35, 0.05, 0.3, name="remainder"),
    c(lambda x, y: torch.remainder(-x, 1 + y), shapes=((2, 3), (3,)), name="remainder of two",
      reference=lambda x, y: 1 + y - x),
    c(lambda x: torch.fmod(-x, 0.25), 0.58, 0.65, step=0.02, name="fmod"),
    c(lambda x: torch.copysign(x, torch.tensor(-1.0)), name="copysign"),
    c(lambda x: torch.lerp(x, x * x, 0.3), name="lerp"),
    c(lambda x: torch.addcmul(x, x, x, value=0.5), name="addcmul"),
    c(lambda x: torch.addcdiv(x, x, 1 + x, value=0.5), name="addcdiv"),
    c(lambda x: torch.ldexp(x, torch.tensor([1, 2, 3])), name="ldexp"),
]

TORCH_LACKS = {"hardsigmoid": lambda x: ((x + 3) / 6).clamp(0, 1)}
APART = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)

# where a kink is near, the stencil must not cross it
ACTIVATIONS = [
    *(c(getattr(F, name), low, high, name=f"{name} {side}", reference=TORCH_LACKS.get(name))
      for name in """softplus logsigmoid silu gelu mish elu selu celu leaky_relu relu relu6 hardtanh
      hardswish hardsigmoid softsign tanhshrink hardshrink softshrink rrelu""".split()
      for low, high, side in ((0.1, 0.4, "above"), (-0.4, -0.1, "below"))),
    *(c(f, 0.6, 0.9, name=name) for name, f in (("softshrink", F.softshrink),
      ("hardshrink", F.hardshrink))),
    *(c(f, 6.5, 7.0, name=f"{f.__name__} saturated", reference=TORCH_LACKS.get(f.__name__))
      for f in (F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid)),
    c(lambda x: F.gelu(x, approximate="tanh"), -1.0, 1.0, name="gelu tanh"),
    c(lambda x: F.softplus(x, beta=2.0), -1.0, 1.0, name="softplus beta"),
    c(lambda x: F.softplus(x, threshold=1.0), 0.2, 0.5, name="softplus threshold"),
    c(lambda x: F.softplus(x, threshold=1.0), 1.5, 1.8, name="softplus above threshold"),
    c(lambda x: F.elu(x, 0.7), -0.4, -0.1, name="elu alpha"),
    c(lambda x: F.celu(x, 0.7), -0.4, -0.1, name="celu alpha",
      reference=lambda x: 0.7 * torch.expm1(x / 0.7)),
    c(lambda x: F.threshold(x, 0.1, 20.0), -0.5, 0.0, name="threshold below", step=0.01),
    c(lambda x: F.threshold(x, 0.1, 20.0), name="threshold above"),
    c(lambda x: F.glu(x), -1, 1, shapes=((2, 4),), name="glu"),
    c(lambda x, w: F.prelu(x, w), -0.4, -0.1, shapes=((2, 3, 4), (3,)), name="prelu"),
    c(lambda x: torch.clamp(x, 0.0, 1.0), name="clamp inside"),
    c(lambda x: torch.clamp(x, max=0.1), 0.5, 0.9, name="clamp outside"),
    c(lambda x: x.clip(torch.zeros(3), torch.ones(3)), name="clip by tensors"),
    c(lambda x, y: torch.clamp(x, min=y + APART), name="clamp by value", shapes=((2, 3), (3,))),
    *(c(lambda x, y, f=f: f(x, torch.sin(y) + APART), shapes=((2, 3), (3,)), name=f.__name__)
      for f in (torch.maximum, torch.minimum, torch.fmax, torch.fmin, torch.max, torch.min)),
    c(lambda x: torch.where(APART > 0, x * x, torch.sin(x)), name="where"),
    c(lambda x: torch.where(APART > 0, x * x, 0.0), name="where number"),
]

W = dict(shapes=((2, 4),), low=-2.0, high=2.0)
SOFTMAX = [
    c(lambda x: torch.softmax(x, -1), name="softmax", reference=lambda x: _softmax(x, -1), **W),
    c(lambda x: F.softmax(x, 0), name="F.softmax", reference=lambda x: _softmax(x, 0), **W),
    c(lambda x: F.softmin(x, 1), name="softmin", reference=lambda x: _softmax(-x, 1), **W),
    c(lambda x: S.softmax(x, 1), name="special.softmax", reference=lambda x: _softmax(x, 1), **W),
    c(lambda x: F.log_softmax(x, 1), name="log_softmax",
      reference=lambda x: _softmax(x, 1).log(), **W),
    c(lambda x: torch.logsumexp(x, -1), name="logsumexp",
      reference=lambda x: x.exp().sum(-1).log(), **W),
    c(lambda x: torch.logsumexp(x, (0, 1), keepdim=True), name="logsumexp of dims",
      reference=lambda x: x.exp().sum((0, 1), keepdim=True).log(), **W),
    c(lambda x: torch.logcumsumexp(x, 1), name="logcumsumexp",
      reference=lambda x: x.exp().cumsum(1).log(), **W),
]


def _softmax(x, dim):
    e = x.exp()
    return e / e.sum(dim, keepdim=True)


@pytest.mark.parametrize("case", ELEMENTWISE + ACTIVATIONS + SOFTMAX, ids=str)
def test_series_of_an_elementwise_function(case):
    check(case)


def test_softmax_takes_large_and_infinite_scores():
    from ctorch.autodiff import jet

    x = torch.tensor([1000.0, 999.0, -torch.inf], dtype=torch.float64)
    v = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    y, (d1, d2) = jet(lambda x: torch.softmax(x, 0), (x,), ([v, 0 * v],))
    z, (e1, e2) = jet(lambda x: torch.softmax(x, 0), (x[:2] - 999,), ([v[:2], 0 * v[:2]],))
    for a, b in ((y, z), (d1, e1), (d2, e2)):
        torch.testing.assert_close(a[:2], b)
        assert a[2] == 0


@pytest.mark.parametrize(
    "f", [torch.tanh, F.gelu, F.softplus, torch.sinh, torch.expm1, torch.log1p, torch.sinc, torch.asinh]
)
def test_single_precision_is_kept_near_zero(f):
    from ctorch.autodiff import jet

    x = torch.tensor([1e-6, 1e-3, 0.3, 1.7])
    terms = [torch.full_like(x, 0.5), torch.full_like(x, -0.2), torch.zeros_like(x)]
    y, ds = jet(f, (x,), (terms,))
    z, es = jet(f, (x.double(),), ([t.double() for t in terms],))
    torch.testing.assert_close(y.double(), z, rtol=1e-6, atol=0)
    for d, e in zip(ds, es, strict=True):
        torch.testing.assert_close(d.double(), e, rtol=2e-6, atol=2e-7)
