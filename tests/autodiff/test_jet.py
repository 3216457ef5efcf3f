"""jet and derivative: right coefficients in both conventions, mixed partials, clear errors."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import ctorch
from ctorch.autodiff import Jet, MissingRuleError, derivative, jet


def nested(f, order):
    """d^k/ds^k of a function of a number by nested reverse mode, k = 0..order, at 0."""
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    out = f(s)
    weights = torch.randn_like(out)  # one number stands for all entries
    y = (out * weights).sum()
    found = [y]
    for _ in range(order):
        (y,) = torch.autograd.grad(y, s, create_graph=True, allow_unused=True)
        y = torch.zeros_like(s) if y is None else y
        y = y + 0 * s
        found.append(y)
    return [float(y) for y in found], weights


def smooth(x, y):
    return torch.tanh(x * y) + torch.exp(-y) / (1 + x**2)


@pytest.mark.parametrize("order", range(7))
def test_series_of_several_arguments(order):
    generator = torch.Generator().manual_seed(order)
    draw = lambda: torch.randn(4, dtype=torch.float64, generator=generator)  # noqa: E731
    x, y = draw(), draw()
    dx, dy = [draw() for _ in range(order)], [draw() for _ in range(order)]

    def along(s):
        path = lambda p, d: p + sum(c * s**k / math.factorial(k) for k, c in enumerate(d, 1))  # noqa: E731
        return smooth(path(x, dx), path(y, dy))

    expected, weights = nested(along, order)
    value, series = jet(smooth, (x, y), (dx, dy))
    got = [float((term * weights).sum()) for term in [value, *series]]
    assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_taylor_coefficients_are_derivatives_over_factorials():
    x, v = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    c = [v, 0.3 * v, -v]
    scaled = [math.factorial(k) * term for k, term in enumerate(c, 1)]
    _, series = jet(torch.sin, (x,), (c,), factorial_scaled=False)
    _, derivatives = jet(torch.sin, (x,), (scaled,))
    for k, (a, b) in enumerate(zip(series, derivatives, strict=True), 1):
        assert_close(a * math.factorial(k), b)


def test_short_series_stand_for_zeros_and_results_keep_their_structure():
    x = torch.randn(3, dtype=torch.float64)
    f = lambda x, y: {"sum": x + y, "rest": (x * 2, torch.ones(2))}  # noqa: E731
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    value, series = jet(f, (x, x), ([one], [one, one, one]))
    assert_close(value["sum"], 2 * x)
    assert_close(series["sum"], [2 * one, one, one])
    assert_close(series["rest"][0], [2 * one, zero, zero])
    assert_close(series["rest"][1], [torch.zeros(2)] * 3)


def test_order_zero():
    x = torch.randn(3)
    value, series = jet(torch.sin, (x,), ([],))
    assert_close(value, x.sin())
    assert series == []
    assert_close(derivative(torch.sin, x, torch.ones_like(x), 0), x.sin())


@pytest.mark.parametrize("orders", [(1, 1), (2, 1), (1, 3), (1, 1, 1), (2, 0, 2), (0, 0)])
def test_mixed_partials(orders):
    generator = torch.Generator().manual_seed(sum(orders))
    x = torch.randn(4, dtype=torch.float64, generator=generator)
    directions = [torch.randn(4, dtype=torch.float64, generator=generator) for _ in orders]
    f = lambda x: torch.sin(x[..., 0] * x[..., 1]) * torch.exp(x[..., 2] * x[..., 3] / 2)  # noqa: E731
    inner = x.clone().requires_grad_()
    y = f(inner)
    for k, v in zip(orders, directions, strict=True):
        for _ in range(k):
            (g,) = torch.autograd.grad(y, inner, create_graph=True)
            y = (g * v).sum()
    assert_close(derivative(f, x, tuple(directions), orders), y.detach(), rtol=1e-10, atol=1e-10)


def test_a_recognized_network_and_an_arbitrary_module_agree():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    net, x, v = net.double(), torch.randn(5, 3).double(), torch.randn(5, 3).double()
    for order in range(1, 7):
        assert_close(derivative(net, x, v, order), derivative(lambda x: net(x), x, v, order))


def test_float32_keeps_its_accuracy_at_order_six():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh())
    net.append(nn.Linear(256, 64))
    x, v = torch.randn(128, 64), torch.randn(128, 64)
    with torch.no_grad():
        results = [derivative(net, x, v, 6), derivative(lambda x: net(x), x, v, 6)]
        exact = derivative(net.double(), x.double(), v.double(), 6)
    for got in results:
        assert (got - exact).abs().max() / exact.abs().max() < 2e-6


@pytest.mark.parametrize(
    "fill",
    [
        lambda z, t: torch.full_like(z, t),
        lambda z, t: z.new_full(z.shape, t),
        lambda z, t: torch.full(z.shape, t),
    ],
)
def test_a_tensor_filled_with_a_value_carries_its_derivatives(fill):
    t = torch.tensor(2.0)
    got = derivative(lambda t: fill(torch.ones(3), t) ** 2, t, torch.ones_like(t), 1)
    assert_close(got, torch.full((3,), 4.0))


def test_derivatives_are_differentiable_twice():
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    f = lambda x, v, w: derivative(lambda x: torch.sin(x @ w) * x, x, v, 3)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, v, weight))
    assert torch.autograd.gradgradcheck(f, (x, v, weight), fast_mode=True)


def test_control_flow_may_depend_on_values():
    f = lambda x: x * x if x.sum() > 0 else x  # noqa: E731
    one = torch.ones(2)
    assert_close(derivative(f, one, one, 2), 2 * one)
    assert_close(derivative(f, -one, one, 2), 0 * one)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (
            lambda x: torch.special.airy_ai(x),
            MissingRuleError,
            r"torch\.special\.airy_ai.*register",
        ),
        (lambda x: x.as_strided((2,), (1,)), MissingRuleError, "as_strided"),
        (lambda x: torch.zeros(3).__setitem__(0, x[0]), TypeError, "plain tensor.*torch.stack"),
        (lambda x: torch.zeros(3).add_(x), TypeError, "plain tensor"),
        (lambda x: torch.zeros(3).copy_(x), (TypeError, MissingRuleError), "plain|in-place"),
        (lambda x: torch.sin(x, out=torch.zeros(3)), TypeError, "out="),
        (lambda x: x.numpy(), TypeError, "drop its derivatives"),
        (lambda x: float(x.sum()), TypeError, "drop its derivatives"),
        (lambda x: (x[1:], x.add_(1)), TypeError, "clone"),
    ],
)
def test_what_would_drop_derivatives_raises(f, error, message):
    x = torch.rand(3)
    with pytest.raises(error, match=f"(?s){message}"):
        jet(f, (x,), ([x],))


@pytest.mark.parametrize(
    ("primals", "series", "error", "message"),
    [
        (torch.ones(2), [[torch.ones(2)]], TypeError, "primals"),
        ((torch.ones(2),), (), ValueError, "series"),
        ((torch.ones(2, dtype=torch.int64),), ([],), TypeError, "floating point"),
        ((torch.ones(2),), ([torch.ones(3)],), ValueError, r"series\[0\]\[0\]"),
        ((torch.ones(2),), ([torch.ones(2, dtype=torch.float64)],), ValueError, "float64"),
        ((torch.ones(2),), ([1.0],), TypeError, r"series\[0\]\[0\]"),
    ],
)
def test_bad_arguments_of_jet(primals, series, error, message):
    with pytest.raises(error, match=message):
        jet(torch.sin, primals, series)


@pytest.mark.parametrize(
    ("v", "order", "error", "message"),
    [
        (torch.ones(3), 1, ValueError, "v: expected"),
        (torch.ones(2), -1, ValueError, "order"),
        (torch.ones(2), 1.5, (TypeError, ValueError), "order"),
        ((torch.ones(2),), (1, 1), ValueError, "as many"),
        ((torch.ones(2), torch.ones(2)), (1, -1), ValueError, "order"),
    ],
)
def test_bad_arguments_of_derivative(v, order, error, message):
    with pytest.raises(error, match=message):
        derivative(torch.sin, torch.ones(2), v, order)


def test_nesting_is_right_or_refused():
    x, v = torch.rand(2), torch.ones(2)
    inner = lambda y: derivative(lambda z: z**2 * y, x, v, 1)  # noqa: E731  = 2 x y
    with pytest.raises(TypeError, match="nest"):
        derivative(inner, x, v, 1)


def test_names():
    assert ctorch.jet is jet
    assert ctorch.derivative is derivative
    assert Jet.__doc__


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, w):
        ctx.save_for_backward(w)
        return z * w

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


def test_gradients_switched_off_within_the_function_are_refused():
    x, w = torch.rand(3), torch.rand(3, requires_grad=True)

    def without(z):
        with torch.no_grad():
            scale = 1 / z
        return scale * z

    for f in (without, lambda z: Scaled.apply(z, w)):
        with pytest.raises(TypeError, match="switched off"):
            derivative(f, x, x, 1)

    def index(z):
        with torch.no_grad():  # what has no derivatives may be computed there
            best = z.argmax()
        return z[best] * 2

    assert_close(derivative(index, x, x, 1), 2 * x.max())


def test_conversion_of_a_number_that_carries_derivatives_names_the_remedy():
    x = torch.rand(3)
    with pytest.raises(TypeError, match=r"torch\.stack"):
        derivative(lambda z: torch.tensor([z[0], z[1]]), x, x, 1)


# ---- orders whose factorials leave the range of the dtype


@pytest.mark.parametrize(
    ("dtype", "order"),
    [
        (torch.float32, 21),
        (torch.float32, 36),
        (torch.float32, 101),
        (torch.float64, 99),
        (torch.float64, 201),
    ],
)
def test_high_orders_neither_overflow_nor_vanish(dtype, order):
    """sin, whose derivatives are 1 at most, and a plain MLP with slopes of about one."""
    x = torch.tensor([[0.3], [1.2]], dtype=dtype)
    v = torch.ones_like(x)
    exact = torch.sin(x.double() + order * math.pi / 2)
    tolerance = {"rtol": 0, "atol": 1e3 * torch.finfo(dtype).eps}
    found = ctorch.derivative(torch.sin, x, v, order)
    assert_close(found.double(), exact, **tolerance)
    series = [v, *[torch.zeros_like(x)] * (order - 1)]
    found = ctorch.jet(torch.sin, (x,), (series,))[1]
    assert_close(found[-1].double(), exact, **tolerance)
    assert_close(found[2], -torch.cos(x))
    assert_close(
        found[order // 2].double(),
        torch.sin(x.double() + (order // 2 + 1) * math.pi / 2),
        **tolerance,
    )


@pytest.mark.parametrize(("dtype", "order"), [(torch.float32, 40), (torch.float64, 180)])
def test_high_orders_of_a_recognized_network(dtype, order):
    """Slopes so small that the derivative is of order one: s = 2 / pi keeps tanh's pole at k!."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1, bias=False)).to(dtype)
    slope = math.exp(-math.lgamma(order + 1) / order) * math.pi / 2
    with torch.no_grad():
        net[0].weight.fill_(slope)
        net[0].bias.fill_(0.0)
        net[2].weight.fill_(1.0)
    x = torch.tensor([[0.25]], dtype=dtype)
    found = ctorch.derivative(net, x, torch.ones_like(x), order)
    wide = [
        torch.tensor([[0.25 * slope]], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.float64),
    ]
    coefficients = ctorch.jet(
        torch.tanh, wide[:1], [[wide[1], *[0 * wide[1]] * (order - 1)]], factorial_scaled=False
    )[1]  # of tanh(z), whose k-th is about (2 / pi)^k
    exact = coefficients[-1] * (math.pi / 2) ** order
    assert_close(found.double(), exact, rtol=1e3 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ctorch.derivative(torch.sin, x, x, 600),
        lambda x: ctorch.jet(torch.sin, (x,), ([x] * 600,)),
        lambda x: ctorch.derivative(torch.sin, x, (x, x), (20, 20)),
        lambda x: ctorch.ode.regularizers.taylor(40)(lambda t, y: y)(0.0, (x[None], x.sum())),
    ],
)
def test_orders_beyond_all_range_name_the_remedy(call):
    with pytest.raises(ValueError, match=r"order: .*float32.*factorial_scaled=False"):
        call(torch.ones(2))


def test_dividing_by_a_number_that_float32_does_not_hold_keeps_float64():
    x = torch.ones(3, dtype=torch.float64)
    assert_close(ctorch.derivative(lambda x: x / 1.3, x, x, 1), x / 1.3, rtol=1e-15, atol=0)


def test_mixed_derivatives_are_one_compiled_graph():
    x, v, w = torch.rand(3, 4, 2, dtype=torch.float64).unbind()

    def f(x):
        return derivative(lambda x: torch.sin(x) * x[..., :1], x, (v, w), (1, 2))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))
