"""Values that carry derivatives: dispatch, in-place functions, errors, transforms, user's rules."""

from __future__ import annotations

import functools
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctorch.autodiff import Jet, MissingRuleError, jet, register_jet_rule
from ctorch.autodiff._propagated import RULES, Propagated, rule


def value(*shape, order=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return Jet(torch.rand(order + 1, *shape, dtype=dtype, generator=g) + 0.2, order)


def same(a: Jet, b: Jet) -> None:
    torch.testing.assert_close(a.stack(), b.stack())


# ---- in place


def test_in_place_functions_replace_the_whole_series():
    x, y = value(2, 3), value(2, 3)
    for f, g in (
        (lambda x: x.relu_(), torch.relu),
        (lambda x: x.add_(y, alpha=2), lambda x: x + 2 * y),
        (lambda x: x.mul_(3), lambda x: 3 * x),
        (lambda x: x.tanh_(), torch.tanh),
        (lambda x: x.clamp_(max=0.5), lambda x: x.clamp(max=0.5)),
        (lambda x: F.elu(x, inplace=True), F.elu),
        (lambda x: F.leaky_relu(x, 0.1, True), lambda x: F.leaky_relu(x, 0.1)),
        (lambda x: F.hardtanh_(x), F.hardtanh),
        (lambda x: x.masked_fill_(x > 0.5, 0.0), lambda x: x.masked_fill(x > 0.5, 0.0)),
        (
            lambda x: x.index_add_(0, torch.tensor([1]), y[:1]),
            lambda x: x.index_add(0, torch.tensor([1]), y[:1]),
        ),
        (lambda x: x.copy_(y), lambda x: y),
        (lambda x: x.zero_(), lambda x: 0 * x),
        (lambda x: x.fill_(2.0), lambda x: 0 * x + 2),
        (lambda x: x.floor_(), lambda x: 0 * x + x.floor()),
    ):
        z = x.clone()
        assert f(z) is z
        same(z, g(x))


def test_augmented_assignment():
    x, z = value(3), value(3)
    z += x
    z *= 2
    z -= 1
    z /= x
    same(z, (4 * x - 1) / x)


def test_nets_with_in_place_activations():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.SiLU(inplace=True)).double()
    plain = nn.Sequential(net[0], nn.ReLU(), nn.SiLU())
    same(net(value(2, 3)), plain(value(2, 3)))


def test_writing_to_a_view_whose_other_side_lives_is_refused():
    x = value(2, 3)
    row = x[0]
    with pytest.raises(TypeError, match="shares memory"):
        row.add_(1)
    with pytest.raises(TypeError, match="clone"):
        x += 1
    with pytest.raises(TypeError, match="shares memory"):
        x.view(6).mul_(2)


def test_writing_is_fine_once_views_are_gone():
    x = value(2, 3)
    y = x.clone()
    total = y[0] + y.T[:, 1]  # views that do not outlive the statement
    y += 1
    same(y, x + 1)
    same(total, x[0] + x[1])
    y = y.reshape(6)  # the other side of this view is gone
    y *= 2
    same(y, (2 * (x + 1)).reshape(6))


def test_writing_into_a_plain_tensor_is_refused():
    x, out = value(3), torch.zeros(3, dtype=torch.float64)
    for write in (
        lambda: out.__setitem__(slice(None), x),
        lambda: out.add_(x),
        lambda: out.copy_(x),
        lambda: out.index_add_(0, torch.arange(3), x),
    ):
        with pytest.raises(TypeError, match=r"torch\.cat, torch\.stack or torch\.where"):
            write()
    with pytest.raises(TypeError, match="out="):
        torch.sin(x, out=out)
    assert not out.any()


# ---- errors


def test_a_missing_rule_names_the_function_and_the_remedy():
    for f, name in (
        (torch.geqrf, "torch.geqrf"),
        (torch.special.airy_ai, "torch.special.airy_ai"),
        (lambda x: F.ctc_loss(x, x, (1,), (1,)), "torch.nn.functional.ctc_loss"),
        (lambda x: torch.linalg.ldl_factor(x), "torch.linalg.ldl_factor"),
        (lambda x: x.geqrf(), "torch.Tensor.geqrf"),
        (torch.ops.aten.im2col, "torch.ops.aten.im2col"),
    ):
        with pytest.raises(MissingRuleError, match=name.replace(".", r"\.")) as error:
            f(value(2, 2))
        assert f"register_jet_rule({name}" in str(error.value)


def test_leaving_torch_is_refused():
    x = value()
    for leave in (
        float,
        int,
        complex,
        np.array,
        np.sin,
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: math.sin(x),
    ):
        with pytest.raises(TypeError, match="detach"):
            leave(x)


def test_kinds_do_not_mix():
    class Other(Jet):
        pass

    x, y = value(3, 3), Other(value(3, 3).coefficients, 2)
    for f in (
        torch.add,
        torch.mul,
        torch.div,
        torch.matmul,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(x > 0, x, y),
    ):
        with pytest.raises(TypeError, match="do not nest"):
            f(x, y)


def test_control_flow_looks_at_the_value():
    x = value(3)
    assert bool((x > 0).all())
    assert len(x) == 3
    assert x.shape == (3,)
    assert x.argmax() == x.value.argmax()
    assert x.sum() > 0
    assert not isinstance(x > 0, Propagated)


def test_numpy_arrays_are_constants():
    x, array = value(3), np.array([1.0, 2.0, 3.0])
    same(array * x, torch.from_numpy(array) * x)
    same(array - x, torch.from_numpy(array) - x)


def test_unknown_attributes_are_attribute_errors():
    x = value(3)
    assert not hasattr(x, "no_such_thing")
    assert not hasattr(x, "__cuda_array_interface__")


# ---- users' rules


def test_a_user_can_register_a_rule():
    assert torch.special.airy_ai not in RULES
    try:

        @register_jet_rule(torch.special.airy_ai)
        def airy(x):
            return torch.sin(x)

        same(torch.special.airy_ai(value(3)), torch.sin(value(3)))
    finally:
        del RULES[torch.special.airy_ai]


def test_a_user_can_register_a_rule_of_a_library_operator():
    @torch.library.custom_op("ctorch_tests::cube", mutates_args=())
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    with pytest.raises(MissingRuleError, match=r"torch\.ops\.ctorch_tests\.cube"):
        torch.ops.ctorch_tests.cube(value(3))
    register_jet_rule(torch.ops.ctorch_tests.cube, lambda x: x**3)
    same(torch.ops.ctorch_tests.cube(value(3)), value(3) ** 3)
    same(torch.ops.ctorch_tests.cube.default(value(3)), value(3) ** 3)


def test_operators_of_aten_have_the_rules_of_their_functions():
    x = value(2, 3)
    same(torch.ops.aten.tanh(x), torch.tanh(x))
    same(torch.ops.aten.mul.Tensor(x, x), x * x)
    same(torch.ops.aten.addmm.default(x[0], x, x.mT @ x), torch.addmm(x[0], x, x.mT @ x))


def test_a_rule_of_one_kind_comes_first():
    class Kind(Jet):
        pass

    rule(torch.tanh, kind=Kind)(lambda x: "own")
    assert torch.tanh(Kind(value(3).coefficients, 2)) == "own"
    assert isinstance(torch.tanh(value(3)), Jet)


def test_what_cannot_be_called_is_no_rule():
    with pytest.raises(TypeError, match="rule"):
        register_jet_rule(torch.tanh, 3)
    with pytest.raises(TypeError, match="kind"):
        register_jet_rule(torch.tanh, torch.tanh, kind="Lap")


def plain(x):
    return x**3


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**3


@pytest.mark.parametrize(
    "function",
    [
        plain,
        functools.partial(torch.pow, exponent=3),
        torch.nn.Tanh(),
        torch.nn.Tanh,
        math.sin,
        np.sin,
        torch.nn.functional.tanh,  # which calls a method that has a rule
        torch.func.vmap(plain),
        Cube.apply,
    ],
    ids=["plain", "partial", "module", "class", "math", "numpy", "functional", "vmap", "Function"],
)
def test_a_function_that_does_not_dispatch_takes_no_rule(function):
    before = dict(RULES)
    with pytest.raises(TypeError, match=r"does not dispatch.*wrap_torch_function"):
        register_jet_rule(function, plain)
    assert before == RULES


def test_the_remedies_for_functions_that_do_not_dispatch_work():
    @torch.library.custom_op("ctorch_tests::cube_again", mutates_args=())
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    wrapped = torch.overrides.wrap_torch_function(lambda x: (x,))(lambda x: x.detach() ** 3)
    for function in (cube, wrapped):
        register_jet_rule(function, plain)
        same(function(value(3)), value(3) ** 3)


def test_functions_of_torch_take_rules():
    """Of each make: compiled, methods, in Python with dispatch within or through others."""
    functions = (torch.lgamma, F.softplus, F.max_pool2d, torch.Tensor.cumsum, torch.Tensor.__add__)
    functions += (torch.einsum, F.softmax, torch.linalg.inv, torch.fft.fft, torch.special.i0)
    functions += (torch.Tensor.mT.__get__, torch._C._nn.gelu)
    before = dict(RULES)
    for function in functions:
        register_jet_rule(function, before.get(function, plain))
        if function not in before:
            del RULES[function]
    assert before == RULES


# ---- state and randomness


def test_running_statistics_are_those_of_the_value():
    x = value(5, 3, 4)
    ours, theirs = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    ours(x), theirs(x.value)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    ours, theirs = (nn.InstanceNorm1d(3, track_running_stats=True).double() for _ in range(2))
    ours(x), theirs(x.value)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("f", [F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout])
def test_dropout_draws_one_mask_as_torch_does(f):
    x = value(4, 5, 3, 2)
    torch.manual_seed(0)
    y = f(x, 0.4, training=True)
    torch.manual_seed(0)
    expected = f(x.value, 0.4, training=True)
    torch.testing.assert_close(y.value, expected)
    dropped = y.coefficients[1] == 0
    assert dropped.any()
    assert torch.equal(dropped, y.coefficients[2] == 0)
    assert f(x, 0.4, training=False) is x


# ---- transforms


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4), nn.GELU(), nn.Softmax(-1)
    ).double()


def third(net, x, v):
    """The value and third derivative along v."""
    y, terms = jet(net, (x,), ([v, torch.zeros_like(v), torch.zeros_like(v)],))
    return y, terms[2]


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 3, dtype=torch.float64, generator=g) for _ in range(2))


def test_compile_in_one_graph(inputs):
    net = small_net()

    def f(x, v):
        h, mask = torch.sin(x), x > 0
        return third(lambda x: net(torch.where(mask, x, x * h) ** 2)[..., 1:].sum(-1), x, v)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    for a, b in zip(compiled(*inputs), f(*inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_of_layers(inputs):
    for net in (
        nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
        nn.GRUCell(4, 3),
        nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.SiLU()).eval(),
    ):
        net = net.double()
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        x = x[0] if isinstance(net, nn.GRUCell) else x

        def f(x, net=net):
            y, terms = jet(lambda x: torch.sum(_first(net(x)), -1), (x,), ([x, 0 * x],))
            return y, terms[1]

        compiled = torch.compile(f, fullgraph=True, backend="eager")
        for a, b in zip(compiled(x), f(x), strict=True):
            torch.testing.assert_close(a, b)


def _first(y):
    return y[0] if isinstance(y, tuple) else y


def test_vmap_is_a_loop(inputs):
    net = small_net()
    mapped = torch.func.vmap(lambda x, v: third(net, x, v))(*inputs)
    looped = [third(net, x, v) for x, v in zip(*inputs, strict=True)]
    for got, *parts in zip(mapped, *looped, strict=True):
        torch.testing.assert_close(got, torch.stack(parts))


def test_gradients_by_all_routes_agree(inputs):
    net = small_net()
    x, v = inputs
    loss = lambda x: third(net, x, v)[1][..., 0].sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.jacrev(loss)(x), expected)
    along = torch.func.jvp(loss, (x,), (v,))[1]
    torch.testing.assert_close(along, (expected * v).sum())
    step = 1e-5
    difference = (loss(x + step * v) - loss(x - step * v)) / (2 * step)
    torch.testing.assert_close(difference, along, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: F.linear(torch.tanh(x), w),
        lambda x, w: F.layer_norm(x @ w.mT, (2,)),
        lambda x, w: F.scaled_dot_product_attention(x, x, F.gelu(x) @ w.mT @ w),
        lambda x, w: F.conv1d(x.unsqueeze(0).sin(), w.unsqueeze(0)),
        lambda x, w: torch.logsumexp(torch.lgamma(x.exp() + 1) * w, -1),
        lambda x, w: F.rms_norm(torch.sinc(x), (3,)) / torch.linalg.vector_norm(w),
        lambda x, w: torch.fft.rfft(x * w).abs(),
    ],
    ids=["linear", "layer_norm", "attention", "conv", "lgamma", "rms_norm", "fft"],
)
def test_gradients_of_coefficients_in_inputs_and_parameters(f):
    g = torch.Generator().manual_seed(2)
    x, v, w = (
        torch.rand(2, 3, dtype=torch.float64, generator=g, requires_grad=True) for _ in "xvw"
    )

    def coefficients(x, v, w):
        y, terms = jet(lambda x: f(x, w), (x,), ([v, v * x],))
        return (y, *terms)

    assert torch.autograd.gradcheck(coefficients, (x, v, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(coefficients, (x, v, w), fast_mode=True)


def test_half_precision_goes_through():
    x = value(3, order=3, dtype=torch.float32)
    low = Jet(x.coefficients.bfloat16(), 3)
    y, z = torch.softmax(low * low, 0), torch.softmax(x * x, 0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.coefficients.float(), z.coefficients, rtol=0.1, atol=0.05)


# ---- speed


def test_dispatch_is_cheap():
    """On tiny values, an operation costs a few plain ones; the bound leaves room for noise."""
    x, plain = value(4, order=1, dtype=torch.float32), torch.rand(2, 4)

    def cost(f):
        best = math.inf
        for _ in range(20):
            start = time.thread_time()
            for _ in range(50):
                f()
            best = min(best, (time.thread_time() - start) / 50)
        return best

    with torch.no_grad():
        assert cost(lambda: x * 2.0) < 12 * cost(lambda: plain * 2.0)
