"""Kernels called by address: the operators' bits, and the operators wherever that could be told."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ctorch.ops import _direct, _kernels, step_control
from ctorch.ops._direct import BatchControl, Buffer, Weights, stage_times
from ctorch.ops.runge_kutta import rk_error, rk_stage

pytestmark = pytest.mark.skipif(not _kernels.HAS_KERNELS, reason="needs the compiled kernels")

SHAPES = [(1,), (3,), (1, 2), (256, 2), (5, 7, 3), (1030,), (600, 2), (2, 700), ()]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function of the library is called."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    names = [name for name in dir(_kernels.library) if name.startswith("rk_")]
    library = {name: counted(name, getattr(_kernels.library, name)) for name in names}
    monkeypatch.setattr(_kernels, "library", types.SimpleNamespace(**library))
    return counts


def slopes(shape: tuple[int, ...], dtype: torch.dtype, stages: int = 7) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(stages, *shape, dtype=dtype)


def some_weights(count: int) -> Weights:
    values = torch.linspace(-1, 2, count, dtype=torch.float64)
    if count > 2:
        values[1] = 0.0
    return Weights(values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_stage_has_the_bits_of_the_operator(
    shape: tuple[int, ...], dtype: torch.dtype, with_state: bool, per_sample: bool, calls: Any
) -> None:
    if per_sample and not shape:
        pytest.skip("no samples")
    k = slopes(shape, dtype)
    k[6] = torch.nan  # a stage that is not computed yet
    y, slope = torch.randn(2, *shape, dtype=dtype)
    steps = torch.rand(3, shape[0] if shape else 1, dtype=torch.float64)
    h = steps[1] if per_sample else torch.tensor(0.3, dtype=torch.float64)
    ours, theirs = k.clone(), k.clone()
    stage = Buffer(ours, y).stage(h)
    for slot in range(6):
        a = some_weights(slot + 1)
        made = stage(y if with_state else None, slope * slot, slot, a)
        want = rk_stage(y if with_state else None, theirs, slope * slot, slot, a.tensor, h)
        assert torch.equal(made, want)
        assert made.shape == want.shape
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert calls["rk_stage"] == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16385,), (150, 211), (32768,)])
def test_bits_do_not_depend_on_threads(
    shape: tuple[int, ...], dtype: torch.dtype, calls: Any
) -> None:
    """Of states that two threads and more share, whose last block is full, or not."""
    k, (y, slope) = slopes(shape, dtype), torch.randn(2, *shape, dtype=dtype)
    h, a = torch.tensor(0.3, dtype=torch.float64), some_weights(7)
    tolerances = (torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1e-6, dtype=torch.float64))

    def made(threads: int) -> tuple[Tensor, Any, Tensor]:
        torch.set_num_threads(threads)
        buffer = Buffer(k.clone(), y)
        y1 = buffer.stage(h)(y, slope, 6, a)
        error = buffer.error(h, a, 5, tolerances, [], False)(y, y1, slope)
        return y1, error, buffer.k

    before = torch.get_num_threads()
    try:
        once, *others = [made(threads) for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    want = y + 0.3 * torch.einsum(
        "s,s...->...", a.tensor.to(dtype), torch.cat([k[:6], slope[None]])
    )
    torch.testing.assert_close(once[0], want, rtol=1e-4, atol=1e-4)
    for other in others:
        assert torch.equal(other[0], once[0])
        assert other[1] == once[1]
        assert torch.equal(other[2], once[2])
    assert calls["rk_stage"] == calls["rk_error"] == 3


def test_the_step_is_read_at_every_call() -> None:
    k, y = slopes((4,), torch.float64), torch.zeros(4, dtype=torch.float64)
    h = torch.ones((), dtype=torch.float64)
    stage, a = Buffer(k, y).stage(h), some_weights(1)
    once = stage(y, k[1].clone(), 0, a)
    h.fill_(2.0)
    assert torch.equal(stage(y, k[1].clone(), 0, a), 2 * once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_norm", [True, False])
@pytest.mark.parametrize("given", ["slope", "late"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_an_error_norm_has_the_bits_of_the_operator(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    max_norm: bool,
    given: str,
    per_sample: bool,
    calls: Any,
) -> None:
    if per_sample and not shape:
        pytest.skip("no samples")
    k, (y, y1, slope) = slopes(shape, dtype), torch.randn(3, *shape, dtype=dtype)
    rtol, atol = (torch.tensor(x, dtype=torch.float64) for x in (1e-3, 1e-4))
    h = torch.rand(shape[:1] if per_sample else (), dtype=torch.float64)
    last = slope if given == "slope" else None
    e = some_weights(7 if given == "slope" else 6)
    ours, theirs = k.clone(), k.clone()
    error = Buffer(ours, y).error(h, e, 6, (rtol, atol), [], max_norm, per_sample)
    norm = error(y, y1, last)
    want = rk_error(
        y, y1, theirs, last, 6, e.tensor, h, rtol, atol, [], max_norm, per_sample
    )  # fmt: skip
    assert torch.equal(norm, want) if per_sample else norm == want.item()
    assert torch.equal(ours, theirs)
    assert calls["rk_error"] == 1


def test_tolerances_for_each_element_and_parts_take_the_operator(calls: Any) -> None:
    k, (y, y1, slope) = slopes((6,), torch.float64), torch.randn(3, 6, dtype=torch.float64)
    one, h = torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for tolerances, parts in [((one, torch.rand(6).double()), []), ((one, one), [2, 4])]:
        error = Buffer(k, y).error(h, some_weights(7), 6, tolerances, parts, False)
        args = (y, y1, k, slope, 6, some_weights(7).tensor, h, *tolerances, parts, False, False)
        assert error(y, y1, slope) == rk_error(*args).item()
    assert calls["rk_error"] == 0


class Labelled(Tensor):
    """A subclass, which must see every operator."""


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def odd_slopes(dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(1, 2, dtype=dtype)
    return {
        "strided": torch.randn(2, 4, dtype=dtype)[:, ::2],
        "transposed": torch.randn(2, 4, dtype=dtype).T,
        "expanded": torch.randn(1, 1, dtype=dtype).expand(1, 2),
        "negated": torch.complex(x, x)[:, :1].conj().imag,
        "zero": torch._efficientzerotensor((1, 2), dtype=dtype),
        "subclass": x.as_subclass(Labelled),
        "parameter": torch.nn.Parameter(x),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", odd_slopes(torch.float32))
@torch.no_grad()
def test_a_slope_that_is_no_plain_memory_takes_the_operator(
    kind: str, dtype: torch.dtype, calls: Any
) -> None:
    slope = odd_slopes(dtype)[kind]
    y = torch.randn(slope.shape, dtype=dtype)
    k = slopes(tuple(slope.shape), dtype)
    h = torch.tensor(0.3, dtype=torch.float64)
    ours, theirs, a = k.clone(), k.clone(), some_weights(3)
    buffer = Buffer(ours, y)
    made = buffer.stage(h)(y, slope, 2, a)
    want = y + 0.3 * sum(w * x for w, x in zip(a.tensor.to(dtype), [*k[:2], slope], strict=True))
    rk_stage(y, theirs, slope, 2, a.tensor, h)
    torch.testing.assert_close(torch.as_tensor(made).as_subclass(Tensor), want.as_subclass(Tensor))
    assert torch.equal(ours, theirs)
    one = torch.ones((), dtype=torch.float64)
    error = buffer.error(h, some_weights(7), 6, (one, one), [], False)
    args = (y, y, theirs, slope, 6, some_weights(7).tensor, h, one, one, [], False, False)
    assert error(y, y, slope) == rk_error(*args).item()
    assert not calls


@pytest.mark.parametrize("guard", ["torch's", "ours"])
def test_alike_are_plain_tensors_of_one_form_without_a_graph(
    guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if guard == "ours":
        monkeypatch.setattr(_direct, "same_form", lambda tensors: None)
    like, same = torch.zeros(1, 2), torch.randn(1, 2)
    alike = _direct._alike(like)
    assert alike(same)
    odd = odd_slopes(torch.float32).values()
    assert not any(alike(x) and x.data_ptr() for x in odd)  # (a zero tensor has no memory)
    for other in (None, [same], same.double(), same[0], same.repeat(2, 1)):
        assert not alike(other)
    assert not alike(same.clone().requires_grad_())


@pytest.mark.parametrize("late", [False, True])
def test_a_step_evaluates_at_the_stages_of_the_operator(late: bool, calls: Any) -> None:
    y, first = torch.randn(2, 5, 2)
    weights, h = [some_weights(i + 1) for i in range(4)], torch.tensor(0.3, dtype=torch.float64)
    ours, theirs = slopes((5, 2), torch.float32), slopes((5, 2), torch.float32)
    times = [torch.tensor(float(i)) for i in range(4)]
    evaluations = 3 if late else 4
    amended: list[float] = []

    def field(t: Tensor, y: Tensor) -> Any:
        if t == 1.0:
            return strided(torch.sin(y))  # the operator copes with it
        return torch.sin(y).double() if t == 2.0 else torch.sin(y)

    def amend(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        amended.append(t.item())
        return k.float()

    y1, last, slope = Buffer(ours, y).step(h, weights, evaluations)(field, amend, y, first, times)
    state, k = y, first
    for slot, a in enumerate(weights):
        before, state = state, rk_stage(y, theirs, k, slot, a.tensor, h)
        if slot < evaluations:
            k = torch.sin(state)
    assert torch.equal(y1, state)
    assert torch.equal(last, before if late else state)
    assert torch.equal(slope, k)
    assert torch.equal(ours, theirs)
    assert amended == [1.0, 2.0]
    assert calls["rk_stage"] == 3


def test_a_step_amends_where_the_state_was_changed() -> None:
    y, h = torch.ones(2), torch.ones((), dtype=torch.float64)
    amended: list[Tensor] = []

    def amend(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        amended.append(y)
        return k

    step = buffer_of(shape=(2,)).step(h, [some_weights(1)], 1)
    _, last, _ = step(lambda t, y: y.mul_(2.0).clone(), amend, y, y.clone(), [h])
    assert [x is last for x in amended] == [True]


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Calling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def buffer_of(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3,)) -> Buffer:
    return Buffer(torch.zeros(7, *shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


def test_modes_see_the_operators() -> None:
    assert buffer_of().by_address
    k, y, h = slopes((3,), torch.float32), torch.zeros(3), torch.ones((), dtype=torch.float64)
    with Watching() as mode:
        buffer = Buffer(k, y)
        buffer.stage(h)(y, y.clone(), 0, some_weights(1))
    assert not buffer.by_address
    assert "ctorch.rk_stage.default" in mode.seen
    with Calling():
        assert not buffer_of().by_address
        assert stage_times(some_weights(3), torch.float32, True) is None


def test_transforms_and_forward_mode_see_the_operators() -> None:
    found: list[bool] = []

    def note(x: Tensor) -> Tensor:
        found.append(buffer_of().by_address)
        return x

    torch.func.vmap(note)(torch.ones(2))
    torch.func.jvp(note, (torch.ones(2),), (torch.ones(2),))
    torch.func.grad(lambda x: note(x).sum())(torch.ones(2))
    with forward_ad.dual_level():
        note(torch.ones(2))
    assert found == [False] * 4


def test_a_compiler_sees_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not buffer_of().by_address


def test_without_the_library_the_operators_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "library", None)
    buffer, y = buffer_of(), torch.ones(3)
    assert not buffer.by_address
    made = buffer.stage(torch.ones((), dtype=torch.float64))(y, y, 0, some_weights(1))
    torch.testing.assert_close(made, torch.zeros(3))
    assert stage_times(some_weights(3), torch.float32, True) is None


@pytest.mark.parametrize(
    ("dtype", "shape", "taken"),
    [
        (torch.float16, (3,), False),
        (torch.bfloat16, (3,), False),
        (torch.float64, (0, 2), False),
        (torch.float64, (_direct.LARGEST,), True),
        (torch.float64, (_direct.LARGEST + 1,), False),
    ],
)
def test_only_small_states_of_known_dtype(
    dtype: torch.dtype, shape: tuple[int, ...], taken: bool
) -> None:
    assert buffer_of(dtype, shape).by_address is taken


@pytest.mark.parametrize("kind", odd_slopes(torch.float32))
def test_a_state_that_is_no_plain_memory_takes_the_operators(kind: str) -> None:
    y = odd_slopes(torch.float32)[kind]
    assert not Buffer(torch.zeros(7, *y.shape), y).by_address


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before_end", [True, False])
@pytest.mark.parametrize(("t", "h"), [(0.1, 0.7), (-3.0, 1e-9), (2.0, -0.3), (1e4, 0.1)])
def test_times_are_those_of_python(
    dtype: torch.dtype, before_end: bool, t: float, h: float
) -> None:
    c = [0.2, 0.3, 8 / 9, 0.0, 1.0]
    times = stage_times(Weights(torch.tensor(c, dtype=torch.float64)), dtype, before_end)
    assert times is not None
    t1 = t + h
    end = torch.tensor(t1, dtype=dtype)
    if before_end:
        end = torch.nextafter(
            end, torch.tensor(-float("inf") if h > 0 else float("inf"), dtype=dtype)
        )
    want = [torch.tensor(t + x * h, dtype=dtype) for x in c[:-1]]
    assert torch.equal(torch.stack(times(t, h, t1)), torch.stack([*want, end]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 700])
def test_batched_control_has_the_bits_of_the_operators(
    dtype: torch.dtype, size: int, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def controls() -> tuple[BatchControl, Tensor, Tensor]:
        torch.manual_seed(1)
        samples = torch.rand(7, size, dtype=torch.float64)
        samples[step_control.END] = 2.0
        samples[step_control.DIRECTION] = torch.where(torch.rand(size) > 0.5, 1.0, -1.0)
        counts = torch.zeros(5, size, dtype=torch.int64)
        counts[step_control.FATE, ::3] = step_control.DONE
        goals = torch.linspace(0, 2, 9, dtype=torch.float64).expand(size, -1)
        numbers = torch.tensor([0.2, 0.7, 0, 0.9, 0.2, 10, 0, 5, 0, 9, 99], dtype=torch.float64)
        c = torch.tensor([0.2, 0.8, 1.0], dtype=torch.float64)
        buffer = Buffer(slopes((size, 2), dtype), torch.zeros(size, 2, dtype=dtype))
        like = torch.zeros(size, 3, dtype=dtype)[:, :1]
        made = BatchControl(samples, counts, goals, numbers, c, like, buffer)
        return made, samples, counts

    ours, *our_state = controls()
    with monkeypatch.context() as patch:
        patch.setattr(_kernels, "library", None)
        theirs, *their_state = controls()
    assert ours.by_address
    assert not theirs.by_address
    times, given = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        error = 2 * torch.rand(size, dtype=dtype)
        error[-1] = torch.nan if seed == 2 else 0.0
        y, y1, k0, k1 = torch.randn(4, size, 2, dtype=dtype)
        mine, other = ours.plan(), theirs.plan()
        for a, b in zip([*mine[:2], *mine[2]], [*other[:2], *other[2]], strict=True):
            assert torch.equal(a, b)
            assert a.shape == b.shape
        moved, *flags = ours.judge(error)
        also, *like = theirs.judge(error)
        assert torch.equal(moved, also)
        assert flags == like
        assert torch.equal(mine[0], other[0])
        for a, b in zip(our_state, their_state, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
        args = (y, y1, k0.T.contiguous().T if seed == 3 else k0, k1)
        for a, b in zip(ours.accept(moved, *args), theirs.accept(also, *args), strict=True):
            assert torch.equal(a, b)
        times.append([t.clone() for t in mine[2]])
        given.append(mine[2])
    assert calls == {"rk_plan": 4, "rk_judge": 4, "rk_accept": 3 if size > 1 else 4}
    for now, then in zip(given, times, strict=True):  # times are given away
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))


def test_arguments_are_counted() -> None:
    with pytest.raises(TypeError, match="takes 12 arguments, got 1"):
        _kernels.library.rk_stage(0)
    with pytest.raises(TypeError):
        _kernels.library.rk_stage(*"abcdefghijkl")
    a = torch.ones(40, dtype=torch.float64)
    k = torch.zeros(40, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="more than 32 nonzero"):
        _kernels.library.rk_stage(
            k[1].data_ptr(), 0, k.data_ptr(), k[2].data_ptr(), 39, a.data_ptr(), 40, a.data_ptr(),
            0, 1, 1, 1,
        )  # fmt: skip
