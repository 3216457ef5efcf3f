"""A function is recognised as an MLP where it is one, and nowhere else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import ctorch
from ctorch.autodiff import mlp as ctorch_mlp
from ctorch.autodiff.mlp import MLP, as_mlp, derivative_of_numbers
from ctorch.ops import _mlp_direct, mlp
from ctorch.ops import _mlp_kernels as kernels

ACTIVATIONS = [
    (nn.Tanh(), "tanh"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Softplus(), "softplus"),
    (nn.Softplus(beta=2), "softplus"),
    (nn.SiLU(), "silu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.ReLU(), "relu"),
]


def net(activation: nn.Module | None = None, **settings: Any) -> nn.Sequential:
    a = activation or nn.Tanh()
    return nn.Sequential(nn.Linear(3, 5, **settings), a, nn.Linear(5, 4), a, nn.Linear(4, 2))


@pytest.mark.parametrize(("module", "name"), ACTIVATIONS)
def test_a_recognised_net_computes_what_the_module_computes(module: nn.Module, name: str) -> None:
    f = net(module).double()
    found = as_mlp(f)
    assert found is not None
    assert found.activation == name
    x = torch.linspace(-3, 3, 30, dtype=torch.float64).reshape(10, 3)
    assert_close(found(x), f(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("first", "second", "kinds"),
    [
        (nn.Tanh(), nn.SiLU(), (("tanh", 0.0), ("silu", 0.0))),
        (nn.Softplus(1), nn.Softplus(2), (("softplus", 1.0), ("softplus", 2.0))),
        (nn.GELU(), nn.Softplus(3), (("gelu", 0.0), ("softplus", 3.0))),
    ],
    ids=str,
)
def test_each_layer_may_have_an_activation_of_its_own(
    first: nn.Module, second: nn.Module, kinds: Any
) -> None:
    f = nn.Sequential(nn.Linear(3, 5), first, nn.Linear(5, 4), second, nn.Linear(4, 2)).double()
    found = as_mlp(f)
    assert found is not None
    assert found.kinds == kinds
    x = torch.linspace(-3, 3, 30, dtype=torch.float64).reshape(10, 3)
    assert_close(found(x), f(x), rtol=1e-13, atol=1e-13)


def test_holds_the_parameters_themselves() -> None:
    f = net(bias=False)
    found = as_mlp(f)
    assert found is not None
    assert found.weights[1] is f[2].weight
    assert found.biases == (None, f[2].bias, f[4].bias)


def test_nesting_identity_and_idle_dropout_are_passed_over() -> None:
    inner = nn.Sequential(nn.Linear(5, 4), nn.Identity(), nn.Tanh())
    f = nn.Sequential(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Dropout(0.0), inner, nn.Linear(4, 2)
    )
    found = as_mlp(f)
    assert found is not None
    assert len(found.weights) == 3
    with_dropout = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))
    assert as_mlp(with_dropout) is None
    assert as_mlp(with_dropout.eval()) is not None


def test_one_layer_is_a_net() -> None:
    for f in (nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))):
        found = as_mlp(f)
        assert found is not None
        assert len(found.weights) == 1


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Twice(nn.Tanh):
    pass


def hooked(kind: str, part: int | None) -> nn.Module:
    f = net()
    getattr(f if part is None else f[part], kind)(lambda *_: None)
    return f


def with_own_forward() -> nn.Module:
    f = net()
    f[0].forward = lambda x: x  # type: ignore[method-assign]
    return f


def pruned() -> nn.Module:
    f = net()
    prune.l1_unstructured(f[0], "weight", 0.5)
    return f


OTHERS: dict[str, Any] = {
    "a function": torch.tanh,
    "nothing": None,
    "ends in an activation": nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
    "starts with an activation": nn.Sequential(nn.Tanh(), nn.Linear(3, 3)),
    "two layers in a row": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh()),
    "two activations in a row": nn.Sequential(
        nn.Linear(3, 3), nn.Tanh(), nn.Tanh(), nn.Linear(3, 3)
    ),
    "two kinds of activation, one without a kernel": nn.Sequential(
        nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Hardswish(), nn.Linear(3, 3)
    ),
    "softplus with a low threshold": net(nn.Softplus(threshold=3)),
    "an activation without a kernel": net(nn.Hardswish()),
    "layer norm": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)),
    "sizes that do not fit": nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(4, 3)),
    "empty": nn.Sequential(),
    "subclass of a layer": nn.Sequential(Doubling(3, 3)),
    "subclass of a container": Residual(nn.Linear(3, 3)),
    "subclass of an activation": net(Twice()),
    "forward hook on a layer": hooked("register_forward_hook", 0),
    "forward hook on an activation": hooked("register_forward_hook", 1),
    "forward hook on the whole": hooked("register_forward_hook", None),
    "pre hook": hooked("register_forward_pre_hook", 2),
    "backward hook": hooked("register_full_backward_hook", 2),
    "forward set on a module": with_own_forward(),
    "weight norm": nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
    "spectral norm": nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3))),
    "pruned": pruned(),
    "lazy": nn.Sequential(nn.LazyLinear(3)),
    "complex": nn.Linear(3, 3, dtype=torch.complex64),
    "compiled": torch.compile(net(), backend="eager"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_nothing_else_is_recognised(what: str) -> None:
    assert as_mlp(OTHERS[what]) is None


def test_a_global_hook_makes_every_module_unknown() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert as_mlp(net()) is None
    finally:
        handle.remove()
    assert as_mlp(net()) is not None


class TimeDependent(nn.Module):
    """``f(x) = net([x, t])`` at a time of its own: t is a term of the first bias."""

    def __init__(self, layers: Any, t: float) -> None:
        super().__init__()
        self.net, self.t = layers, t

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, x.new_full((*x.shape[:-1], 1), self.t)], -1))

    def __ctorch_mlp__(self) -> Any:
        inner = as_mlp(self.net)
        if inner is None:
            return None
        first, *weights = inner.weights
        bias = first[:, -1] * self.t + (0 if inner.biases[0] is None else inner.biases[0])
        biases = (bias, *inner.biases[1:])
        return MLP((first[:, :-1], *weights), biases, inner.activation, inner.param)


def test_an_object_says_that_it_is_one() -> None:
    f, x = TimeDependent(net(), 0.3), torch.randn(4, 2)
    found = as_mlp(f)
    assert found is not None
    assert_close(found(x), f(x))
    assert as_mlp(TimeDependent(nn.Tanh(), 0.3)) is None


def test_what_it_says_is_checked() -> None:
    class Wrong:
        def __ctorch_mlp__(self) -> Any:
            return [torch.ones(2, 2)]

    with pytest.raises(TypeError, match=r"Wrong.__ctorch_mlp__\(\) must return .*MLP.* got list"):
        as_mlp(Wrong())


def test_a_net_is_checked_when_made() -> None:
    w = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"weights\[1\] must be \[out, 3\].*\(2, 2\)"):
        MLP((w, torch.ones(2, 2)), (None, None), "tanh")
    with pytest.raises(ValueError, match=r"biases\[0\] must be \[3\]"):
        MLP((w,), (torch.ones(2),), "tanh")
    with pytest.raises(ValueError, match=r"activation must be one of identity, .*'swishy'"):
        MLP((w,), (None,), "swishy")
    with pytest.raises(ValueError, match="one each a layer, got 1 and 0"):
        MLP((w,), (), "tanh")
    with pytest.raises(ValueError, match="beta of softplus"):
        MLP((w,), (None,), "softplus")
    square = (torch.ones(3, 3),) * 3, (None,) * 3
    with pytest.raises(ValueError, match=r"activation must be one for all 2 .* got \('tanh',"):
        MLP(*square, ("tanh",))
    with pytest.raises(ValueError, match=r"param must be one for all 2 .* got \(1.0, 2.0, 3.0\)"):
        MLP(*square, "softplus", (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"beta of softplus, must be positive, got 0\.0"):
        MLP(*square, ("tanh", "softplus"), (1.0, 0.0))
    with pytest.raises(TypeError, match=r"one real floating dtype, got torch.float32 and .*64"):
        MLP((w, torch.ones(2, 3, dtype=torch.float64)), (None, None), "tanh")


class TestDerivativeOfNumbers:
    """The short way of ``ctorch.derivative`` is the long one, wherever it is taken."""

    @pytest.fixture
    def short(self) -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.Softplus(2.0)]
        return nn.Sequential(*layers, nn.Linear(5, 2)).double()

    @pytest.mark.parametrize("order", [1, 3, 12])
    def test_gives_what_the_operator_gives(self, short: nn.Sequential, order: int) -> None:
        x, v = torch.randn(2, 7, 3, dtype=torch.float64).unbind()
        found = as_mlp(short)
        assert found is not None
        with torch.no_grad():
            quick, slow = (
                derivative_of_numbers(short, x, v, order),
                mlp.derivative(found, x, v, order),
            )
            assert torch.equal(ctorch.derivative(short, x, v, order), slow)
        if kernels.available("mlp_derivative"):
            assert quick is not None
            assert torch.equal(quick, slow)
        else:
            assert quick is None

    def test_sees_every_change_of_the_module(self, short: nn.Sequential) -> None:
        x, v = torch.randn(2, 7, 3, dtype=torch.float64).unbind()

        def changed(change: Callable[[], Any]) -> None:
            before = ctorch.derivative(short, x, v, 2)
            change()
            after = ctorch.derivative(short, x, v, 2)
            wrapped = ctorch.derivative(lambda y: short(y), x, v, 2)
            assert not torch.equal(before, after)
            torch.testing.assert_close(after, wrapped, rtol=1e-12, atol=1e-12)

        with torch.no_grad():
            changed(lambda: short[0].weight.mul_(2))
            changed(lambda: setattr(short[2].weight, "data", torch.randn(8, 5).double().t()))
            changed(lambda: setattr(short, "1", nn.Sigmoid()))
            changed(lambda: short[3].__setattr__("beta", 1.0))
            changed(lambda: short[4].register_forward_hook(lambda m, i, out: 3 * out))

    def test_leaves_everything_else_alone(self, short: nn.Sequential) -> None:
        x, v = torch.randn(2, 7, 3, dtype=torch.float64).unbind()
        assert derivative_of_numbers(short, x, v, 2) is None  # there is a graph to record
        assert ctorch.derivative(short, x, v, 2).requires_grad
        with torch.no_grad():
            for a, b, order in (
                (x, v, 0),
                (x, v, 13),
                (x[0], v[0], 2),
                (x, v[:1], 2),
                (x[:0], v[:0], 2),
                (x.float(), v.float(), 2),
                (x[:, :2], v[:, :2], 2),
                (x.t().contiguous().t(), v, 2),
            ):
                assert derivative_of_numbers(short, a, b, order) is None
            assert derivative_of_numbers(nn.Linear(3, 2).double(), x, v, 2) is None
            with torch.autocast("cpu", torch.bfloat16):
                assert derivative_of_numbers(short, x, v, 2) is None
            each = torch.vmap(lambda a, b: ctorch.derivative(short, a, b, 2))(
                x[:, None], v[:, None]
            )
            torch.testing.assert_close(each[:, 0], ctorch.derivative(short, x, v, 2))

    def test_everyone_who_watches_sees_the_operator(self, short: nn.Sequential) -> None:
        if not kernels.available("mlp_derivative"):
            pytest.skip("no kernels")
        x, v = torch.randn(2, 7, 3, dtype=torch.float64).unbind()

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
                names.append(str(func))
                return func(*args, **(kwargs or {}))

        class Called(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
                return func(*args, **(kwargs or {}))

        names: list[str] = []
        with torch.no_grad():
            expected = derivative_of_numbers(short, x, v, 2)
            assert expected is not None
            with Seen():
                assert torch.equal(ctorch.derivative(short, x, v, 2), expected)
            assert "ctorch.mlp_derivative.default" in names
            with Called():
                assert derivative_of_numbers(short, x, v, 2) is None
            with torch.profiler.profile() as profiler:
                ctorch.derivative(short, x, v, 2)
            assert "ctorch::mlp_derivative" in [event.name for event in profiler.events()]

    def test_a_form_that_was_fit_is_looked_at_again(self, short: nn.Sequential) -> None:
        """Each change keeps the net's place in memory or its sizes, by which forms are found."""
        if not kernels.available("mlp_derivative"):
            pytest.skip("no kernels")
        x, v = torch.randn(2, 7, 3, dtype=torch.float64).unbind()
        with torch.no_grad():
            kept = ctorch.derivative(short, x, v, 2)
        for parameter in short.parameters():
            parameter.requires_grad_(False)
        assert torch.equal(derivative_of_numbers(short, x, v, 2), kept)  # nothing to record
        for parameter in short.parameters():
            parameter.requires_grad_(True)
            assert derivative_of_numbers(short, x, v, 2) is None
            assert ctorch.derivative(short, x, v, 2).requires_grad
            parameter.requires_grad_(False)
        assert derivative_of_numbers(short, x.clone().requires_grad_(), v, 2) is None
        short[2].weight.data = torch.randn(5, 8).double()  # elsewhere in memory
        fresh = ctorch.derivative(lambda y: short(y), x, v, 2)
        torch.testing.assert_close(derivative_of_numbers(short, x, v, 2), fresh)
        short[2].weight.data = torch.randn(8, 5).double().t()
        assert derivative_of_numbers(short, x, v, 2) is None  # not contiguous
        short[2].weight.data = torch.randn(5, 8)
        assert derivative_of_numbers(short, x, v, 2) is None  # of another dtype
        short[2].weight.data = torch.randn(6, 8).double()
        assert derivative_of_numbers(short, x, v, 2) is None  # of another size
        short[2].weight.data = torch.randn(5, 8).double()
        short[4] = nn.Linear(5, 4, bias=False).double().requires_grad_(False)
        fresh = ctorch.derivative(lambda y: short(y), x, v, 2)
        torch.testing.assert_close(derivative_of_numbers(short, x, v, 2), fresh)
        given = torch.randn(2, 7, 3, dtype=torch.complex128)
        for imaginary in (given[0].conj().imag, given[0].imag):
            expected = ctorch.derivative(lambda y: short(y), imaginary.clone(), v, 2)
            torch.testing.assert_close(ctorch.derivative(short, imaginary, v, 2), expected)

    @pytest.mark.parametrize(
        "change",
        [
            lambda f: setattr(f[1], "__class__", nn.Sigmoid),
            lambda f: setattr(f, "__class__", nn.ModuleList),
            lambda f: setattr(f[1], "forward", torch.sin),
            lambda f: f[3].train(),
            lambda f: f.append(nn.Tanh()),
            lambda f: f.insert(1, nn.Flatten()),
            lambda f: f[0].register_forward_pre_hook(lambda m, given: (2 * given[0],)),
            lambda f: setattr(f[5], "bias", None),
        ],
    )
    def test_a_module_that_was_seen_is_looked_at_again(
        self, change: Callable[[nn.Sequential], Any]
    ) -> None:
        f = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.5))
        f = f.extend([nn.Tanh(), nn.Linear(8, 2)]).eval()
        known = ctorch_mlp._parts_again(f)
        assert known is not None
        if kernels.available("mlp_derivative"):
            assert ctorch_mlp._parts_again(f) is known
        change(f)
        assert ctorch_mlp._parts_again(f) is not known
        assert str(ctorch_mlp._parts_again(f)) == str(ctorch_mlp._parts(f))

    def test_a_global_hook_is_seen_by_a_module_that_was_seen(self, short: nn.Sequential) -> None:
        assert ctorch_mlp._parts_again(short) is not None
        handle = nn.modules.module.register_module_forward_hook(lambda m, given, out: None)
        try:
            assert ctorch_mlp._parts_again(short) is None
        finally:
            handle.remove()
        assert ctorch_mlp._parts_again(short) is not None

    def test_many_nets_leave_nothing_behind(self) -> None:
        x = torch.randn(2, 3)
        before = len(ctorch_mlp._known)
        with torch.no_grad():
            for _ in range(200):
                f = net()
                ctorch.derivative(f, x, x, 2)
        gone = weakref.ref(f[0])
        del f
        assert gone() is None
        assert len(ctorch_mlp._known) <= before
        assert len(_mlp_direct._forms) <= 64


@pytest.mark.parametrize(
    ("width", "batch"),
    [(40, 1111), (256, 128), (700, 97)],
    ids=["panels of each thread", "few samples", "shared panels"],
)
@pytest.mark.parametrize("graph", [False, True])
def test_the_same_bits_for_any_number_of_threads(width: int, batch: int, graph: bool) -> None:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    f.append(nn.Linear(width, 2))
    x, v = torch.randn(2, batch, 3).unbind()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.set_grad_enabled(graph):
                y = ctorch.derivative(f, x, v, 3)
            grads = torch.autograd.grad(y.square().sum(), f[0].weight) if graph else ()
            found.append(torch.cat([t.detach().reshape(-1) for t in (y, *grads)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(  # and where no kernel serves
        found[0][: len(x) * 2].reshape(-1, 2),
        ctorch.derivative(lambda y: f(y), x, v, 3).detach(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_rounding_of_long_sums_is_kept_small_in_float32() -> None:
    if not kernels.available("mlp_derivative"):
        pytest.skip("no kernels")
    errors = []
    for seed in range(7):
        torch.manual_seed(seed)
        f = nn.Sequential(
            nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 64)
        ).requires_grad_(False)
        x, v = torch.randn(2, 128, 64)
        found = ctorch.derivative(f, x, v, order=6)
        exact = ctorch.derivative(f.double(), x.double(), v.double(), order=6)
        errors.append(float((found - exact).abs().max() / exact.abs().max()))
    # sums one term after the other give twice as much
    assert sorted(errors)[3] < 6.5e-7, errors
