"""Hollow nets: no context sees its own dimension, and all others may."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import ctorch
from ctorch.autodiff import check_hollow
from ctorch.nn import HollowAttention, HollowMLP, HollowSum, hollow_sum
from ctorch.nn import hollow_mlp as mlp
from tests.nn.hollow_nets import F64, NETS, make, points

EXACT = pytest.mark.parametrize("name", NETS)
HALVES = (torch.float16, torch.bfloat16)


def jacobian_of_context(net: nn.Module, t: Tensor, x: Tensor) -> Tensor:
    """``d h_i / d x_j`` [d, H, d] at one sample, by one backward pass for each number."""
    x = x.detach().requires_grad_()
    h = net.conditioner(t, x)
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in h.flatten()]
    return torch.stack(rows).reshape(*h.shape, x.shape[-1])


@EXACT
@pytest.mark.parametrize("dtype", [torch.float32, F64, *HALVES])
@pytest.mark.parametrize("d", [1, 2, 5, 12])
def test_the_derivative_of_a_context_in_its_own_dimension_is_exactly_zero(name, dtype, d):
    net = make(name, d).to(dtype)
    t, x = (y.to(dtype) for y in points(d, 1))
    slopes = jacobian_of_context(net, t[0], x[0])
    own = slopes.diagonal(dim1=0, dim2=2)
    assert slopes.dtype == dtype
    assert torch.equal(own, torch.zeros_like(own))


@EXACT
@pytest.mark.parametrize("dtype", [torch.float32, F64, *HALVES])
@pytest.mark.parametrize("d", [1, 2, 5, 70, 130])
def test_a_context_keeps_its_bits_when_its_dimension_changes(name, dtype, d):
    net = make(name, d).to(dtype)
    t, x = (y.to(dtype) for y in points(d, 2))
    h = net.conditioner(t, x)
    for i in {0, 1 % d, d // 2, d - 1}:
        for value in (-3.0, 1e3):
            moved = x.clone()
            moved[:, i] = value
            assert torch.equal(net.conditioner(t, moved)[:, i], h[:, i])


@EXACT
@pytest.mark.parametrize("d", [2, 5, 12])
def test_each_output_depends_on_all_dimensions(name, d):
    net = make(name, d, time=False)
    _, x = points(d, 1)
    slopes = torch.autograd.functional.jacobian(lambda x: net(None, x), x[0])
    assert slopes.shape == (d, d)
    assert bool((slopes.abs() > 1e-9).all())


@EXACT
def test_each_output_depends_on_time_and_on_every_parameter(name):
    for d in (1, 5):
        net = make(name, d)
        t, x = points(d)
        t.requires_grad_()
        value = net(t, x)
        (rate,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        assert bool((rate != 0).all())
        if d > 1:
            grads = torch.autograd.grad(value.square().sum(), list(net.parameters()))
            assert all(bool((g != 0).any()) for g in grads)


@EXACT
def test_time_may_be_a_number_or_a_tensor(name):
    net = make(name)
    _, x = points()
    expected = net(torch.full((3, 1), 0.25, dtype=F64), x)
    for t in (0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.full((1, 1), 0.25)):
        assert_close(net(t, x), expected, rtol=1e-13, atol=1e-13)
    assert_close(net(1, x), net(torch.tensor(1), x))
    assert_close(net(0.25, x[0]), expected[0], rtol=1e-13, atol=1e-13)
    assert_close(net(0.25, x.expand(2, 3, 5))[1], expected, rtol=1e-13, atol=1e-13)
    for t in (torch.zeros(3), torch.zeros(4, 1), torch.zeros(1, 3, 1)):
        with pytest.raises(ValueError, match=r"t: expected a number or .* broadcasts to \(3, 1\)"):
            net(t, x)
    with pytest.raises(ValueError, match="takes time"):
        net(None, x)


@EXACT
def test_a_net_without_time_ignores_it(name):
    net = make(name, time=False)
    t, x = points()
    assert torch.equal(net(t, x), net(None, x))
    assert "time=False" in repr(net)


@EXACT
def test_a_state_and_a_copy_hold_the_whole_net(name):
    net, other = make(name), NETS[name](dtype=F64)
    t, x = points()
    other.load_state_dict(net.state_dict())
    copies = [other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    assert all(torch.equal(each(t, x), net(t, x)) for each in copies)
    assert {key for key, _ in net.named_parameters()} == set(net.state_dict())


@EXACT
def test_no_sample_and_nan(name):
    net = make(name)
    t, x = points()
    assert net(t[:0], x[:0]).shape == (0, 5)
    assert net(0.0, x[:0]).shape == (0, 5)
    x[1, 2] = torch.nan
    bad = net(t, x).isnan()
    assert bool(bad[1].all())
    assert not bool(bad[[0, 2]].any())


@pytest.mark.parametrize("d", [2, 3, 8, 9, 17, 64, 100])
@pytest.mark.parametrize("width", [1, 2, 7, 31, 128])
def test_masks_are_those_of_two_strict_mades_and_windows_lose_nothing(d, width):
    into, inner, seen = mlp._masks(d, width)
    paths = (seen[:, :width].int() @ inner[0].int() @ into[:width].int()) > 0
    assert torch.equal(paths, paths.triu(1))  # the row of units that fall looks at the end of x
    paths = (seen[:, width:].int() @ inner[1].int() @ into[width:].int()) > 0
    assert torch.equal(paths, paths.tril(-1))
    if width >= d - 1:
        both = seen.int() @ into.int() > 0
        assert torch.equal(both, ~torch.eye(d, dtype=torch.bool))
    step, windows = mlp._windows(seen)
    count, chunk, window = windows.shape
    whole = torch.zeros(count * chunk, 2 * width, dtype=torch.bool)
    for c in range(count):
        whole[c * chunk : (c + 1) * chunk, c * step : c * step + window] = windows[c]
    assert torch.equal(whole[:d], seen)
    assert not bool(whole[d:].any())
    assert (count - 1) * step + window == 2 * width
    if width >= d - 1 and d >= 16:
        assert window < 1.5 * width + 2  # of 2 width: half the products are left out


def test_layers_of_any_depth_are_as_dense_as_masks_allow():
    net = make("mlp, deep, own tau", 4, time=False)
    a = torch.randn(1, 4, dtype=F64)
    (first,) = torch.autograd.grad(net.conditioner(None, a.requires_grad_())[0, 0].sum(), a)
    assert first[0, 0] == 0
    assert bool((first[0, 1:] != 0).all())


def test_a_shared_sum_is_permutation_equivariant_and_takes_any_number():
    net = HollowSum(6, shared=True, dtype=F64)
    order = torch.randperm(6)
    t, x = points(6)
    assert_close(net(t, x[:, order]), net(t, x)[:, order], rtol=1e-12, atol=1e-12)
    assert net(t, x[:, :4]).shape == (3, 4)
    assert not torch.allclose(net(t, x[:, :4]), net(t, x)[:, :4])


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_of_samples_are_the_batch(shared, monkeypatch):
    net = HollowSum(5, shared=shared, dtype=F64)
    t, x = points(batch=7)
    expected = [net(t, x), net(0.3, x), net(t[:1], x)]
    monkeypatch.setattr(hollow_sum, "BLOCK", 3 * 5 * 16)
    got = [net(t, x), net(0.3, x), net(t[:1], x)]
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("d", [1, 5, 64, 65, 200])
def test_sums_leave_out_their_own_term(d):
    x = torch.randn(d, 3, dtype=F64)
    assert_close(hollow_sum.sums_of_others(x), x.sum(0) - x, rtol=1e-12, atol=1e-12)


class TestAttention:
    def test_without_positions_it_is_permutation_equivariant(self):
        net = make("attention, sets")
        order = torch.randperm(7)
        t, x = points(7)
        assert_close(net(t, x[:, order]), net(t, x)[:, order], rtol=1e-12, atol=1e-12)

    def test_with_positions_it_is_not_and_takes_shorter_sequences(self):
        net = HollowAttention(7, dtype=F64)
        t, x = points(7)
        order = torch.arange(7).flip(0)
        assert not torch.allclose(net(t, x[:, order]), net(t, x)[:, order])
        assert net(t, x[:, :4]).shape == (3, 4)
        with pytest.raises(ValueError, match="expected at most 7 dimensions"):
            net(t, torch.randn(3, 8, dtype=F64))

    @pytest.mark.parametrize("positions", [None, 6])
    def test_absent_dimensions_are_as_if_they_were_not_there(self, positions):
        net = HollowAttention(positions, dtype=F64)
        t, x = points(6)
        lengths = torch.tensor([6, 1, 3])
        mask = torch.arange(6) < lengths[:, None]
        x = torch.where(mask, x, torch.nan).requires_grad_()
        masked = net.masked(mask)
        check_hollow(masked, torch.randn(3, 6, dtype=F64), t)
        value, derivatives = ctorch.dimwise_derivative(masked, x, 3, t)
        (grad,) = torch.autograd.grad(derivatives.sum(), x)
        assert_close(value, masked(t, x), rtol=1e-12, atol=1e-12)
        for b, n in enumerate(lengths.tolist()):
            alone, of_alone = ctorch.dimwise_derivative(net, x[b, :n], 3, t[b])
            assert_close(value[b, :n], alone, rtol=1e-12, atol=1e-12)
            assert_close(derivatives[:, b, :n], of_alone, rtol=1e-12, atol=1e-12)
            assert not value[b, n:].any()
            assert not derivatives[:, b, n:].any()
            assert bool((grad[b, :n] != 0).all())
            assert not grad[b, n:].any()

    def test_a_mask_must_hold_booleans(self):
        with pytest.raises(TypeError, match="mask: expected a tensor of booleans"):
            make("attention").masked(torch.ones(5))

    def test_stacked_masked_self_attention_would_leak(self):
        """What the two streams are for: contents that take up contexts reach home again."""

        class Naive(HollowAttention):
            def conditioner(self, t, x):
                c = self.seed + x.unsqueeze(-1) * self.weight_in
                own = torch.zeros(5, 5).fill_diagonal_(-torch.inf)
                h = torch.zeros_like(c)
                for layer in self.layers:
                    k, v = layer.content(c).chunk(2, -1)
                    h = h + layer.join(layer._attend(layer.query(h), k, v, own))
                    c = h
                return self.out(h)

        with pytest.raises(ValueError, match=r"h\[\.\.\., 0, :\] depends on x\[\.\.\., 0\]"):
            check_hollow(Naive(5, time=False, dtype=F64), points()[1])


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Loss(nn.Module):
    """As one trains through an operator under DDP: it is called within forward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        value, div = ctorch.divergence(self.net, x, method="hollow", t=t)
        return value.square().sum() + div.square().sum()


@EXACT
def test_training_under_data_parallel_gives_the_same_gradients(name, process_group):
    net, (t, x) = make(name), points()
    expected = torch.autograd.grad(Loss(net)(t, x), list(net.parameters()))
    DistributedDataParallel(Loss(net))(t, x).backward()
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        assert_close(parameter.grad, grad, rtol=1e-12, atol=1e-12)


@EXACT
def test_a_solver_takes_it(name):
    net = make(name)
    _, x = points()
    times = torch.linspace(0, 1, 3, dtype=F64)
    end = ctorch.solve_ode(net, x, times, rtol=1e-9, atol=1e-9).y[-1]
    batched = ctorch.solve_ode(net, x, times, rtol=1e-9, atol=1e-9, batched=True).y[:, -1]
    assert_close(batched, end, rtol=1e-6, atol=1e-6)


def test_wrong_arguments_are_named():
    for make_net in (HollowMLP, HollowSum, HollowAttention):
        with pytest.raises(ValueError, match="dim: expected >= 1, got 0"):
            make_net(0, shared=False)
        with pytest.raises(TypeError, match="context: expected an int, got float"):
            make_net(2, context=1.5)
        with pytest.raises(ValueError, match=r"activation: expected one of tanh, .*, got 'relu'"):
            make_net(2, activation="relu")
        with pytest.raises(ValueError, match="hidden: expected the width of one hidden layer"):
            make_net(2, hidden=())
    with pytest.raises(ValueError, match="depth: expected >= 1"):
        HollowMLP(2, depth=0)
    with pytest.raises(ValueError, match="heads: expected a divisor of width = 32, got 3"):
        HollowAttention(2, heads=3)
    with pytest.raises(ValueError, match="shared: without dim"):
        HollowAttention(shared=False)
    for net in (HollowMLP(3), HollowSum(3), HollowAttention(3, shared=False)):
        with pytest.raises(ValueError, match=r"x: expected .*3.* for this net"):
            net(0.0, torch.zeros(2, 2))


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softplus", "silu", "gelu", "gelu_tanh"])
def test_conditioner_and_transformers_have_the_same_activation(activation):
    net = HollowMLP(3, width=8, activation=activation, time=False, dtype=F64)
    _, x = points(3)
    h, tau = net.conditioner(None, x), net.transformer()
    z = torch.cat([x.unsqueeze(-1), h], -1) @ tau.weights[0][0].T + tau.biases[0][0]
    expected = net._act(z) @ tau.weights[1][0].T + tau.biases[1][0]
    assert_close(net(None, x), expected.squeeze(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [ctorch.nn.HollowMLP, ctorch.nn.HollowSum])
def test_a_time_that_is_none_is_refused_by_its_type(make):
    with pytest.raises(TypeError, match="t: expected a number or a tensor, got str"):
        make(3)("now", torch.zeros(3))
