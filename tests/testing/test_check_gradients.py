"""The gradient check passes what is right and finds what is planted."""

from __future__ import annotations

import functools
import re
import sys

import pytest
import torch
from torch import Tensor, nn

from ctorch.testing import GradientMismatch, check_gradients, tensors

from . import planted

WRONG = [
    planted.sign,
    planted.factor,
    planted.zero,
    planted.detached_term,
    planted.one_element,
]
GLOBAL_NET = nn.Linear(2, 2)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("fn", WRONG, ids=lambda f: f.__name__)
def test_a_planted_error_is_found_in_every_mode_and_order(fn, mode, order):
    with pytest.raises(GradientMismatch) as caught:
        check_gradients(fn, torch.zeros(3), modes=(mode,), order=order, examples=10)
    assert caught.value.mode == mode
    assert caught.value.variable == "input"
    assert caught.value.max_error > 0


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_wrong_second_derivative_is_found_at_order_two_only(mode):
    check_gradients(planted.second_derivative, torch.zeros(3), modes=(mode,), examples=10)
    with pytest.raises(GradientMismatch, match="second derivative") as caught:
        check_gradients(planted.second_derivative, torch.zeros(3), modes=(mode,), order=2)
    assert caught.value.order == 2


def test_a_library_op_without_forward_formula_is_found_in_forward_mode():
    # torch.func.jvp through such an op returns zeros without a word
    with torch.library._scoped_library("ctorch_testing", "FRAGMENT"):
        op = torch.library.custom_op(
            "ctorch_testing::double",
            lambda x: 2 * x,
            mutates_args=(),
            schema="(Tensor x) -> Tensor",
        )
        op.register_autograd(lambda ctx, g: 2 * g)
        check_gradients(op, torch.zeros(3), modes=("reverse",), examples=5)
        with pytest.raises(GradientMismatch) as caught:
            check_gradients(op, torch.zeros(3), modes=("forward",), examples=5)
    assert caught.value.mode == "forward"


@pytest.mark.parametrize(
    "fn",
    [planted.cube, torch.sin, lambda x: x.flip(0) * x, torch.relu, lambda x: (x, x.exp(), 3)],
    ids=["cube", "sin", "flip", "relu", "tuple"],
)
def test_right_functions_pass_in_every_mode_and_order(fn):
    check_gradients(
        fn, torch.zeros(2, 3), order=2, modes=("reverse", "forward", "batched"), examples=8
    )


def test_a_network_passes_and_keeps_its_dtype_gradients_and_buffers():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    net(torch.ones(5, 3)).sum().backward()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    gradient = net[0].weight.grad
    check_gradients(net, torch.zeros(5, 3), modes=("reverse",), examples=3, atol=1e-6)
    for key, value in net.state_dict().items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key])
    assert net[0].weight.grad is gradient


class _Spoilt(nn.Module):
    """A linear layer that detaches one parameter."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach() if self.name == "weight" else self.weight
        bias = self.bias.detach() if self.name == "bias" else self.bias
        return x @ weight + bias


def _holders(net: nn.Module):
    """The ways in which a function may hold a module."""

    class Field:
        def __init__(self) -> None:
            self.nets = [net]

        def __call__(self, x: Tensor) -> Tensor:
            return self.nets[0](x)

        def method(self, x: Tensor) -> Tensor:
            return self.nets[0](x)

    def with_default(x: Tensor, net: nn.Module = net) -> Tensor:
        return net(x)

    def inner(x: Tensor) -> Tensor:
        return net(x)

    return {
        "module": net,
        "closure": inner,
        "nested closure": lambda x: inner(x),
        "default": with_default,
        "partial": functools.partial(lambda net, x: net(x), net),
        "object": Field(),
        "method": Field().method,
    }


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("holder", list(_holders(nn.Identity())))
def test_a_detached_parameter_is_found_and_named_wherever_the_module_is_held(holder, name, mode):
    fn = _holders(_Spoilt(name))[holder]
    with pytest.raises(GradientMismatch) as caught:
        check_gradients(fn, torch.zeros(3, 2), modes=(mode,), examples=3)
    assert caught.value.variable.endswith(name)
    check_gradients(_holders(_Spoilt("none"))[holder], torch.zeros(3, 2), modes=(mode,), examples=3)


def test_a_module_named_as_a_global_is_checked():
    def fn(x: Tensor) -> Tensor:
        return nn.functional.linear(x, GLOBAL_NET.weight.detach()) + GLOBAL_NET.bias

    with pytest.raises(GradientMismatch) as caught:
        check_gradients(fn, torch.zeros(3, 2), examples=3)
    assert caught.value.variable == "GLOBAL_NET.weight"


def test_a_global_that_only_an_inner_function_names_is_found():
    def fn(x: Tensor) -> Tensor:
        return (lambda y: GLOBAL_NET(y))(x)

    check_gradients(fn, torch.zeros(3, 2), examples=3)
    with pytest.raises(GradientMismatch) as caught:
        check_gradients(
            lambda x: (lambda y: y @ GLOBAL_NET.weight.detach())(x), torch.zeros(3, 2), examples=3
        )
    assert caught.value.variable == "GLOBAL_NET.weight"


def test_a_tensor_in_a_closure_is_checked():
    w = torch.ones(3, requires_grad=True)
    check_gradients(lambda x: x * w.exp(), torch.zeros(3), order=2, examples=5)
    with pytest.raises(GradientMismatch) as caught:
        check_gradients(lambda x: x * w.detach().exp(), torch.zeros(3), examples=5)
    assert caught.value.variable == "w"
    assert w.dtype == torch.float32


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_memory_layouts_catch_code_that_ignores_strides(mode):
    with pytest.raises(GradientMismatch, match="memory layout"):
        check_gradients(planted.strided_input, torch.zeros(3, 2), modes=(mode,))


def test_strided_cotangents_catch_a_backward_that_ignores_strides():
    with pytest.raises(GradientMismatch, match="reverse-mode"):
        check_gradients(planted.strided_cotangent, torch.zeros(3, 2), modes=("reverse",))


def test_the_failing_case_is_shrunk():
    def wrong_above_one(x: Tensor) -> Tensor:
        return torch.where(x.detach() > 1, x.detach() ** 2, x**2)

    with pytest.raises(GradientMismatch) as caught:
        check_gradients(wrong_above_one, torch.zeros(4), modes=("reverse",), examples=50)
    values = re.search(r"input: float64 \[4\].* = (\[.*\])", str(caught.value))
    assert values is not None
    numbers = torch.tensor([float(v) for v in values[1].strip("[]").split(",")])
    assert int((numbers != 0).sum()) == 1
    assert numbers.max() == 1.03125  # the smallest multiple of 1/32 that fails


def test_the_report_names_case_values_and_seed():
    with pytest.raises(GradientMismatch) as caught:
        check_gradients(planted.sign, (torch.zeros(2),), seed=7, modes=("reverse",))
    text = str(caught.value)
    for part in (
        "reverse-mode",
        "analytic",
        "numeric",
        "largest error",
        "at element (",
        "seed=7",
        "sign",
    ):
        assert part in text
    assert caught.value.analytic == pytest.approx(-caught.value.numeric, rel=1e-4)


def test_the_same_seed_gives_the_same_report_and_another_seed_other_cases():
    def report(seed: int) -> str:
        with pytest.raises(GradientMismatch) as caught:
            check_gradients(planted.factor, torch.zeros(5, 4), seed=seed)
        return str(caught.value)

    def cases(seed: int) -> list[float]:
        seen: list[float] = []
        check_gradients(
            lambda x: seen.append(x.sum().item()) or x.sin(), torch.zeros(4), seed=seed, examples=5
        )
        return seen

    assert report(3) == report(3)
    assert cases(3) == cases(3) != cases(4)


def test_only_the_floating_inputs_are_drawn():
    index = torch.tensor([2, 0])

    def fn(table: Tensor, rows: Tensor, scale: float, extra: dict[str, Tensor]) -> Tensor:
        assert torch.equal(rows, index)
        assert scale == 2.0
        return table[rows] * scale + extra["shift"]

    check_gradients(fn, (torch.zeros(3, 2), index, 2.0, {"shift": torch.zeros(2)}), examples=5)


def test_strategies_keep_inputs_in_the_domain():
    check_gradients(torch.log, tensors((3,), low=0.1, high=10.0), order=2, examples=10)
    with pytest.raises(ValueError, match="domain"):
        check_gradients(lambda x: (-1 - x.abs()).log(), torch.zeros(3), examples=5)


def test_complex_inputs_are_checked():
    x = torch.zeros(2, 2, dtype=torch.complex64)
    check_gradients(lambda z: z.exp() * z.conj(), x, order=2, examples=6)
    with pytest.raises(GradientMismatch) as caught:
        check_gradients(lambda z: z.exp() * z.detach().conj(), x, examples=6)
    assert isinstance(caught.value.analytic, complex)


def test_dropout_is_checked_for_one_mask_and_unseeded_randomness_is_named():
    check_gradients(lambda x: nn.functional.dropout(x, 0.5) ** 2, torch.zeros(6), examples=5)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(GradientMismatch, match="not deterministic") as caught:
        check_gradients(lambda x: x * torch.rand(3, generator=generator), torch.zeros(3))
    assert caught.value.mode == "value"


def test_a_checkpoint_that_does_not_replay_dropout_is_found():
    def fn(x: Tensor, preserve: bool) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            lambda y: nn.functional.dropout(y, 0.5) ** 2,
            x,
            use_reentrant=False,
            preserve_rng_state=preserve,
        )

    check_gradients(fn, (torch.zeros(6), True), modes=("reverse",), examples=5)
    with pytest.raises(GradientMismatch):
        check_gradients(fn, (torch.zeros(6), False), modes=("reverse",), examples=5)


def test_a_function_with_a_rough_surface_is_not_judged():
    def fn(x: Tensor) -> Tensor:  # as the steps of a loose adaptive solve are
        return x + 1e-4 * (x.detach() * 1e9).frac()

    with pytest.raises(GradientMismatch, match="did not settle"):
        check_gradients(fn, torch.zeros(3), modes=("reverse",))


def test_errors_of_the_function_itself_come_through():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        check_gradients(nn.Linear(3, 2), torch.zeros(4, 2))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
def test_an_error_of_the_function_carries_its_case_as_a_note():
    def fn(x: Tensor) -> Tensor:
        if (x < 0).any():
            raise ArithmeticError("negative")
        return x

    with pytest.raises(ArithmeticError, match="negative") as caught:
        check_gradients(fn, torch.zeros(2))
    assert "input: float64 [2] = [" in caught.value.__notes__[0]


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_derivative_that_is_not_finite_is_shown_with_the_way_to_bound_the_inputs(mode):
    with pytest.raises(GradientMismatch) as caught:
        check_gradients(torch.sqrt, torch.zeros(2), modes=(mode,))
    assert re.search(r"analytic +-?inf\n", str(caught.value))
    assert "low=" in str(caught.value)


def test_missing_forward_mode_is_reported_with_the_way_to_leave_it_out():
    with pytest.raises(GradientMismatch, match="not supported") as caught:
        check_gradients(lambda x: _ReverseOnly.apply(x), torch.zeros(2))
    assert 'modes=("reverse",)' in str(caught.value)
    check_gradients(lambda x: _ReverseOnly.apply(x), torch.zeros(2), modes=("reverse",), examples=3)


class _ReverseOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"order": 3}, ValueError, "order must be 1 or 2"),
        ({"modes": ("backward",)}, ValueError, "modes must be"),
        ({"modes": ()}, ValueError, "modes must be"),
        ({"modes": "reverse"}, ValueError, "modes must be"),
        ({"examples": 0}, ValueError, "examples must be"),
        ({"rtol": -1e-5}, ValueError, "rtol must be"),
        ({"atol": float("nan")}, ValueError, "atol must be"),
        ({"seed": "0"}, TypeError, "seed must be"),
        ({"fn": 3}, TypeError, "fn must be callable"),
        ({"inputs": 3}, ValueError, "neither inputs nor fn"),
        ({"fn": lambda x: torch.ones(3)}, ValueError, "no differentiable output"),
        ({"fn": lambda x: x.argmax()}, ValueError, "no differentiable output"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    arguments = {"fn": torch.sin, "inputs": torch.zeros(3)} | change
    with pytest.raises(error, match=text):
        check_gradients(
            arguments.pop("fn"),
            arguments.pop("inputs"),
            examples=arguments.pop("examples", 3),
            **arguments,
        )


def test_a_missing_hypothesis_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r'pip install "ctorch\[testing\]"'):
        check_gradients(torch.sin, torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"low": 1.0}, ValueError),
        ({"low": 2.0, "high": 1.0}, ValueError),
        ({"layouts": ("diagonal",)}, ValueError),
        ({"dtype": torch.int64}, TypeError),
    ],
)
def test_bad_arguments_of_the_strategy_are_named(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        tensors((3,), **arguments)


def test_every_layout_is_drawn():
    seen = set()

    def fn(x: Tensor) -> Tensor:
        seen.add((x.stride(), x.storage_offset() > 0))
        return x.sin()

    check_gradients(fn, torch.zeros(3, 2), examples=40)
    assert seen >= {
        ((2, 1), False),
        ((1, 3), False),
        ((4, 2), True),
        ((2, 1), True),
        ((0, 1), False),
    }
