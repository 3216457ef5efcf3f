"""An ensemble is one big solve, however it is cut, and whoever solves the pieces."""

from __future__ import annotations

import gc
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

import ctorch
from ctorch.codegen import Untraceable
from ctorch.ode import Draws, EnsembleSolution, Moments, Solution, Status
from ctorch.ode.ensemble_samples import Samples

pytestmark = pytest.mark.usefixtures("quick_compiler")

F64 = torch.float64
N = 53  # a prime: no chunk size divides it
TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
RATES = torch.linspace(0.5, 9.0, N, dtype=F64)[:, None]
START = torch.stack([torch.linspace(-1, 1, N, dtype=F64), torch.ones(N, dtype=F64)], 1)


def swing(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
    return torch.cat([y[:, 1:] * rate, -(rate**2) * y[:, :1].sin() + t.cos()], 1)


def blow_up(t: Tensor, y: Tensor) -> Tensor:
    return y**2


def solved(**how: Any) -> EnsembleSolution:
    how = {"args": (RATES,), "native": False, **how}
    return ctorch.ensemble(swing, how.pop("y0", START), how.pop("t", TIMES), **how)


def one_solve(native: bool = False, **how: Any) -> Solution:
    return ctorch.solve_ode(
        swing, START, TIMES, args=(RATES,), batched=True, gradient="none", native=native, **how
    )


# -- the same as one solve
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 10, 52, 53, 1000])
def test_an_ensemble_is_one_big_solve(chunk_size: int | None) -> None:
    mine, big = solved(chunk_size=chunk_size), one_solve()
    assert_close(mine.y, big.y, rtol=1e-12, atol=1e-12)
    for name in ("accepted", "rejected"):
        assert torch.equal(getattr(mine.stats, name), getattr(big.stats, name)), name
    assert mine.status.tolist() == [0] * N
    assert mine.indices == range(N)
    assert mine.reduced is None
    assert not mine.message
    assert not mine.failed.numel()


@pytest.mark.parametrize("chunk_size", [3, 7, 10, 53])
def test_native_samples_have_the_same_bits_in_any_chunk(chunk_size: int) -> None:
    mine, big = solved(chunk_size=chunk_size, native=True), one_solve(native=True)
    assert torch.equal(mine.y, big.y)
    assert torch.equal(mine.stats.nfe, torch.as_tensor(big.stats.nfe))


def test_large_native_chunks_give_the_same_bits() -> None:
    def final(chunk_size: int) -> Tensor:
        args, y0 = (RATES.repeat(10, 1),), START.repeat(10, 1)
        return ctorch.ensemble(swing, y0, TIMES, args=args, chunk_size=chunk_size, native=True).y

    assert torch.equal(final(133), final(530))  # 530 samples: four chunks of 132 and 133
    assert_close(final(60), final(530), rtol=1e-9, atol=1e-9)


def test_settings_reach_the_solver() -> None:
    how = {"method": "tsit5", "rtol": 1e-3, "atol": torch.tensor([1e-2, 1e-5], dtype=F64)}
    assert_close(solved(chunk_size=9, **how).y, one_solve(**how).y, rtol=1e-9, atol=1e-9)
    assert solved(max_steps=1, throw=False).failed.tolist() == list(range(N))


def test_chunks_are_never_larger_than_asked_for_and_nearly_equal() -> None:
    sizes: list[int] = []
    solved(chunk_size=10, reduce=lambda sol, indices: sizes.append(len(indices)))
    assert sum(sizes) == N
    assert len(sizes) == 6
    assert max(sizes) - min(sizes) == 1


def test_chunks_are_bounded_in_memory_where_no_size_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[ctorch.ensemble.__module__], "_CHUNK_BYTES", 13 * 16 * (16 + 3))
    sizes: list[int] = []
    solved(reduce=lambda sol, indices: sizes.append(len(indices)))
    assert len(sizes) == 5  # 13 samples at most


def test_times_may_be_a_samples_own() -> None:
    t = TIMES * torch.linspace(0.5, 1.5, N, dtype=F64)[:, None]
    big = ctorch.solve_ode(swing, START, t, args=(RATES,), batched=True, gradient="none")
    assert_close(solved(t=t, chunk_size=8).y, big.y, rtol=1e-12, atol=1e-12)


def test_a_state_may_be_a_pytree() -> None:
    def field(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": y["v"], "v": -y["x"]}

    y0 = {"x": START, "v": RATES.expand(N, 2)}
    mine = ctorch.ensemble(field, y0, TIMES, chunk_size=20, native=False)
    big = ctorch.solve_ode(field, y0, TIMES, batched=True, gradient="none")
    for part in ("x", "v"):
        assert_close(mine.y[part], big.y[part], rtol=1e-12, atol=1e-12)


def test_arguments_that_are_no_rows_are_for_all_samples() -> None:
    def field(t: Tensor, y: Tensor, net: torch.nn.Module, scale: float, shift: Tensor) -> Tensor:
        return net(y) * scale + shift

    net = torch.nn.Linear(2, 2).double()
    args = (net, 0.5, torch.tensor(0.1, dtype=F64))
    mine = ctorch.ensemble(field, START, TIMES, args=args, chunk_size=20, native=False)
    big = ctorch.solve_ode(field, START, TIMES, args=args, batched=True, gradient="none")
    assert_close(mine.y, big.y, rtol=1e-12, atol=1e-12)
    assert not mine.y.requires_grad


@pytest.mark.parametrize("native", [False, True])
def test_arguments_in_a_pytree_are_cut_like_others(native: bool) -> None:
    def field(t: Tensor, y: Tensor, p: dict[str, Any]) -> Tensor:
        return swing(t, y, p["rates"][0]) * p["scale"] + p["shift"]

    def solved_in(chunk_size: int) -> Tensor:
        args = ({"rates": [RATES], "scale": 0.5, "shift": lambda i, draws: draws.uniform(2)},)
        return ctorch.ensemble(
            field, START, TIMES, args=args, seed=1, chunk_size=chunk_size, native=native
        ).y

    assert_close(solved_in(10), solved_in(N), rtol=1e-12, atol=1e-12)


def test_what_mixes_samples_is_not_cut_into_chunks() -> None:
    with pytest.raises(Untraceable, match="func mixes samples"):
        ctorch.ensemble(lambda t, y: y - y.mean(0), START, TIMES, chunk_size=10)


# -- samples that are made as they are needed
# ------------------------------------------------------------------------------------------


def test_functions_of_indices_make_the_same_samples() -> None:
    asked: list[list[int]] = []

    def start(indices: Tensor) -> Tensor:
        asked.append(indices.tolist())
        return START[indices]

    mine = solved(y0=start, args=(lambda i: RATES[i],), size=N, chunk_size=10)
    assert torch.equal(mine.y, solved(chunk_size=10).y)
    assert [i for indices in asked for i in indices] == list(range(N))


def test_draws_belong_to_the_index_and_not_to_the_chunk() -> None:
    def final(chunk_size: int, seed: int) -> Tensor:
        return solved(
            y0=lambda i, draws: draws.normal(2),
            args=(lambda i, draws: draws.uniform(1),),
            size=N, seed=seed, chunk_size=chunk_size,
        ).y  # fmt: skip

    assert_close(final(10, 1), final(17, 1), rtol=1e-12, atol=1e-12)
    assert torch.equal(final(10, 1)[:, 0], final(53, 1)[:, 0])
    assert not torch.equal(final(10, 1)[:, 0], final(10, 2)[:, 0])


def test_functions_with_one_seed_draw_different_numbers() -> None:
    def draw(i: Tensor, draws: Draws) -> Tensor:
        return draws.uniform(3)

    y0, _, (first, second) = Samples(draw, TIMES, (draw, draw), N, 5).of(range(N))
    assert len(torch.cat([y0, first, second]).unique()) == 9 * N


def test_draws_are_independent_and_of_their_distribution() -> None:
    draws = Draws(-3, torch.arange(40_000))
    u, z = draws.uniform(2, 3), draws.normal(4)
    assert u.shape == (40_000, 2, 3)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert_close(z.mean(0), torch.zeros(4, dtype=F64), rtol=0, atol=0.03)
    assert_close(z.pow(4).mean(0), torch.full((4,), 3.0, dtype=F64), rtol=0, atol=0.25)
    numbers = torch.cat([u.flatten(1), z, Draws(-2, torch.arange(40_000)).uniform(3)], 1)
    numbers = torch.cat([numbers[:-1], numbers[1:]], 1)  # the neighbor's too
    assert_close(torch.corrcoef(numbers.T), torch.eye(26, dtype=F64), rtol=0, atol=0.03)
    assert draws.uniform(dtype=torch.float32).dtype == torch.float32


# -- reductions
# ------------------------------------------------------------------------------------------


def test_what_reduce_returns_is_joined_in_order() -> None:
    def ends(sol: Solution, indices: Tensor) -> dict[str, Tensor]:
        return {"end": sol.y[:, -1], "index": indices}

    mine = solved(reduce=ends, chunk_size=10)
    assert mine.y is None
    assert torch.equal(mine.reduced["end"], solved(chunk_size=10).y[:, -1])
    assert mine.reduced["index"].tolist() == list(range(N))


def test_a_chunk_may_keep_some_of_its_samples() -> None:
    mine = solved(reduce=lambda sol, i: i[sol.y[:, -1, 0] > 0], chunk_size=10)
    assert torch.equal(mine.reduced, (one_solve().y[:, -1, 0] > 0).nonzero().reshape(-1))


@pytest.mark.parametrize("merge", ["sum", lambda a, b: (a[0] + b[0], a[1] + b[1])])
def test_results_are_added(merge: Any) -> None:
    mine = solved(reduce=lambda sol, i: (sol.y.sum(0), len(i)), merge=merge, chunk_size=10)
    assert_close(mine.reduced[0], one_solve().y.sum(0), rtol=1e-12, atol=1e-12)
    assert mine.reduced[1] == N


@pytest.mark.parametrize("chunk_size", [1, 10, 53])
def test_moments_are_those_of_all_samples(chunk_size: int) -> None:
    moments = solved(reduce="moments", chunk_size=chunk_size).reduced
    y = one_solve().y
    assert moments.count == N
    assert_close(moments.mean, y.mean(0), rtol=1e-11, atol=1e-11)
    assert_close(moments.std, y.std(0), rtol=1e-11, atol=1e-11)


def test_moments_survive_a_large_offset_in_single_precision() -> None:
    y = 1e4 + torch.randn(N, 2)
    sol = Solution(TIMES, y, None, torch.zeros(N, dtype=torch.int64))  # type: ignore[arg-type]
    one = Moments.of(sol, torch.arange(N))
    assert_close(one.merged(one).mean, y.double().mean(0))
    assert_close(one.merged(one).squares, 2 * y.double().var(0) * (N - 1), rtol=1e-9, atol=0)


def test_reduce_may_accumulate_gradients_chunk_by_chunk() -> None:
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return -rate * y.sin()

    def backward(sol: Solution, indices: Tensor) -> float:
        loss = sol.y[:, -1].square().sum()
        loss.backward()
        return loss.item()

    how: dict[str, Any] = {"gradient": "checkpoint", "native": False}
    ctorch.ensemble(field, START, TIMES, reduce=backward, merge="sum", chunk_size=9, **how)
    end = ctorch.solve_ode(field, START, TIMES, batched=True).y[:, -1]
    (want,) = torch.autograd.grad(end.square().sum(), rate)
    assert_close(rate.grad, want, rtol=1e-11, atol=1e-11)


# -- samples that fail
# ------------------------------------------------------------------------------------------

#: y' = y**2 blows up at t = 1 / y0: before t = 1 for those above 1
FATED = torch.linspace(0.0, 2.0, 21, dtype=F64)[:, None]
LOST = list(range(11, 21))


@pytest.mark.parametrize("native", [False, True])
def test_failed_samples_are_told_by_index_and_the_others_kept(native: bool) -> None:
    fated = FATED.clone()
    fated[10] = 0.9
    sol = ctorch.ensemble(blow_up, fated, TIMES, chunk_size=4, native=native, throw=False)
    assert sol.failed.tolist() == LOST
    assert_close(sol.y[:11, -1], fated[:11] / (1 - fated[:11]), rtol=1e-4, atol=1e-4)
    assert sol.y[LOST, -1].isnan().all()
    assert not sol.y[:, 0].isnan().any()
    assert sol.message.startswith("10 of 21 samples failed (")
    assert "indices 11, 12, 13, 14, 15, 16, 17, 18, ...:"[:-1] in sol.message


def test_an_error_comes_at_the_end_and_holds_everything() -> None:
    with pytest.raises(ctorch.SolveError, match=r"samples failed.*indices 1[01], ") as caught:
        ctorch.ensemble(blow_up, FATED, TIMES, chunk_size=4, native=False)
    whole = caught.value.solution
    assert whole.y.shape == (21, 3, 1)
    assert set(LOST) <= set(whole.failed.tolist())
    assert caught.value.status in (Status.STEP_UNDERFLOW, Status.NONFINITE)


def test_moments_leave_failed_samples_out() -> None:
    how: dict[str, Any] = {"chunk_size": 3, "native": False, "throw": False}
    sol = ctorch.ensemble(blow_up, FATED, TIMES, reduce="moments", **how)
    good = ctorch.ensemble(blow_up, FATED, TIMES, **how)
    kept = good.y[good.status == 0]
    assert sol.reduced.count == len(kept) < 21
    assert_close(sol.reduced.mean, kept.mean(0), rtol=1e-11, atol=1e-11)
    nothing = ctorch.ensemble(blow_up, 5 + FATED, TIMES, reduce="moments", **how).reduced
    assert nothing.count == 0
    assert nothing.std.isnan().all()


# -- native or not, devices, progress
# ------------------------------------------------------------------------------------------


def test_what_cannot_be_native_is_solved_eagerly_with_one_warning() -> None:
    def noisy(t: Tensor, y: Tensor) -> Tensor:
        return -y + 0 * torch.rand_like(y)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sol = ctorch.ensemble(noisy, START, TIMES, chunk_size=10)
    assert [str(x.message)[:26] for x in caught] == ["ensemble: solving eagerly,"]
    assert Path(caught[0].filename) == Path(__file__)
    assert_close(sol.y[:, -1], START * torch.exp(torch.tensor(-1.0)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ctorch.codegen.Untraceable):
        ctorch.ensemble(noisy, START, TIMES, native=True)


def test_devices_take_turns_and_give_the_same() -> None:
    mine = solved(chunk_size=5, devices=["cpu", "cpu"])
    assert_close(mine.y, solved().y, rtol=1e-12, atol=1e-12)
    assert torch.equal(solved(devices="cpu").y, solved().y)
    rate = torch.tensor(1.0, dtype=F64, requires_grad=True)
    how: dict[str, Any] = {"gradient": "checkpoint", "native": False, "devices": ["cpu"] * 2}
    sol = ctorch.ensemble(lambda t, y: -rate * y, START, TIMES, chunk_size=9, **how)
    assert sol.y.requires_grad
    graphs: list[bool] = []
    how["reduce"] = lambda sol, i: graphs.append(sol.y.requires_grad)
    with torch.no_grad():  # the threads too
        ctorch.ensemble(lambda t, y: -rate * y, START, TIMES, chunk_size=9, **how)
    assert graphs == [False] * 6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_chunks_are_solved_on_a_gpu() -> None:
    mine = solved(chunk_size=10, devices=["cuda"], reduce=lambda sol, i: sol.y)
    assert mine.reduced.device.type == "cpu"
    assert_close(mine.reduced, solved().y, rtol=1e-9, atol=1e-9)


def test_progress_counts_samples_and_failures(capsys: pytest.CaptureFixture[str]) -> None:
    how: dict[str, Any] = {"chunk_size": 3, "native": False, "throw": False}
    sol = ctorch.ensemble(blow_up, FATED, TIMES, progress=True, **how)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"ensemble 7/7  samples 21  failed {len(sol.failed)}  per second ")
    ctorch.ensemble(blow_up, FATED, TIMES, **how)
    assert not capsys.readouterr().out


# -- several processes
# ------------------------------------------------------------------------------------------


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    whole = solved(chunk_size=10, group="world")
    share = solved(chunk_size=10, group=dist.group.WORLD, gather=False)
    moments = solved(chunk_size=10, group="world", reduce="moments").reduced
    few = solved(y0=START[:1], args=(RATES[:1],), group="world")
    told = []
    for y0, reduce in ((FATED, None), (START[:, :1], lambda sol, i: 1 / (i[0] - 26).item())):
        try:
            ctorch.ensemble(
                blow_up, y0, TIMES, chunk_size=26, group="world", native=False, reduce=reduce,
                merge="sum" if reduce else "cat",
            )  # fmt: skip
        except (RuntimeError, ZeroDivisionError) as error:
            told.append(f"{type(error).__name__}: {error}")
    parted: dict[str, Any] = {"group": "world", "native": False}
    lost = ctorch.ensemble(blow_up, FATED, TIMES, gather=False, throw=False, **parted).failed
    rate = torch.tensor(1.0, dtype=F64, requires_grad=True)
    try:
        ctorch.ensemble(lambda t, y: -rate * y, FATED, TIMES, gradient="backprop", **parted)
    except ValueError as error:
        told.append(str(error))
    torch.save(
        {
            "lost": lost, "y": whole.y,
            "accepted": whole.stats.accepted, "indices": [*whole.indices],
            "share": share.y, "mine": [*share.indices], "std": moments.std, "few": few.y,
            "told": told,
        },
        Path(folder) / f"{rank}.pt",
    )  # fmt: skip
    gc.collect()  # what a traceback holds of the group goes before it
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo back end")
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    big = one_solve()
    for mine in both:
        assert_close(mine["y"], big.y, rtol=1e-12, atol=1e-12)
        assert torch.equal(mine["accepted"], big.stats.accepted)
        assert mine["indices"] == list(range(N))
        assert_close(mine["std"], big.y.std(0), rtol=1e-11, atol=1e-11)
        assert_close(mine["few"], big.y[:1], rtol=1e-12, atol=1e-12)
        assert "of 21 samples failed" in mine["told"][0]
        assert "results have a graph, which cannot be sent" in mine["told"][2]
    assert_close(torch.cat([x["share"] for x in both]), big.y, rtol=1e-12, atol=1e-12)
    assert set(LOST) <= set(torch.cat([x["lost"] for x in both]).tolist()) <= {10, *LOST}
    assert both[0]["mine"] + both[1]["mine"] == list(range(N))
    assert abs(len(both[0]["mine"]) - len(both[1]["mine"])) <= 1
    assert both[1]["told"][1] == "ZeroDivisionError: division by zero"
    assert both[0]["told"][1] == (
        "RuntimeError: the ensemble's part in rank 1 failed: ZeroDivisionError: division by zero"
    )


def test_the_world_may_be_this_process_alone() -> None:
    assert torch.equal(solved(group="world").y, solved().y)


# -- what is refused
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"args": (RATES[:5],)}, ValueError, r"args\[0\] has shape \[5, 1\] for 53 samples"),
        ({"size": 52}, ValueError, r"y0 and size do not agree on .*\[52, 53\]"),
        ({"y0": lambda i: START[i]}, ValueError, "size is missing"),
        ({"y0": lambda i: START[:1], "size": N}, ValueError, "y0, called with .* must return one"),
        ({"args": (lambda i: 3.0,)}, ValueError, r"args\[0\], called with .*but returned 3.0"),
        ({"y0": torch.tensor(1.0)}, TypeError, "y0 must be a tensor .* but is a 0-dim tensor"),
        ({"y0": [1.0]}, TypeError, "y0 must be a tensor .* but is list"),
        ({"y0": START[:0]}, ValueError, "at least one sample"),
        ({"args": RATES}, TypeError, "args must be a tuple of arguments, but is Tensor"),
        ({"t": TIMES.expand(5, 3)}, ValueError, "t has 5 rows for 53 samples"),
        ({"args": ({"r": RATES[:5]},)}, ValueError, r"args\[0\]\['r'\] has shape \[5, 1\]"),
        ({"y0": lambda i, d: START[i], "size": N}, TypeError, r"y0 is .* without seed .*Give seed"),
        (
            {"args": (lambda i: RATES[i],), "seed": 1},
            TypeError,
            r"args\[0\] is .*\(indices, draws\)",
        ),
        ({"y0": lambda i: START[i], "size": 5.5}, TypeError, "size must be an integer, but is 5.5"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, but is 0.5"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an integer from 1 on, but is 0"),
        ({"chunk_size": 7.5}, ValueError, "chunk_size must be an integer from 1 on, but is 7.5"),
        ({"devices": []}, ValueError, "devices is empty"),
        ({"group": "all"}, ValueError, "group must be"),
        ({"reduce": 3}, TypeError, "reduce must be a function"),
        ({"merge": "sum"}, ValueError, "needs reduce"),
        ({"reduce": "moments", "merge": "sum"}, ValueError, "leave merge out"),
        ({"reduce": len, "merge": "mean"}, ValueError, 'merge must be "cat", "sum"'),
        ({"reduce": lambda sol, i: 1.0}, TypeError, 'returned float, .* merge="sum"'),
        ({"reduce": lambda sol, i: sol.y.sum()}, TypeError, "returned a 0-dim tensor"),
        ({"batched": True}, TypeError, "ensemble has no batched"),
        ({"native": "yes"}, ValueError, "native must be"),
        ({"method": "rk4"}, NotImplementedError, "batched=True with method 'rk4'"),
        ({"gradient": "exact"}, ValueError, "gradient must be one of"),
    ],
)
def test_bad_arguments_are_named(how: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        solved(**how)


def test_chunks_must_return_the_same_structure() -> None:
    def odd(sol: Solution, i: Tensor) -> Any:
        return (i, i) if i[0] else i

    with pytest.raises(TypeError, match="same structure"):
        solved(reduce=odd, chunk_size=10)
