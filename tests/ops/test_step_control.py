"""The operators of step control meet their obligations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ctorch.ode import StepController
from ctorch.ops import step_control as control
from tests.ops.obligations import ForwardObligations, Problem, needs_cuda

F64 = torch.float64
SIZES = [0, 1, 2, 7, 33, 600]
ABSCISSAE = torch.tensor([0.2, 0.0, 0.5, 1.0, 1.0], dtype=F64)
CONTROLLERS = [
    StepController(),
    StepController(never_shrinks=True),
    StepController.pi(),
    StepController.pid(),
]


class Batch:
    """Samples of every fate on their way, in both directions, with outputs, errors and states."""

    def __init__(self, size: int, seed: int, device: str = "cpu", late: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.device = device

        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=F64)

        tau = rand(size) * 3 - 1
        if late:  # where time does not resolve such steps
            tau[5::13] += 2.0**53
        reach = rand(size)
        self.samples = torch.stack(
            [
                tau,
                rand(size) * 0.3,
                tau + torch.where(reach < 0.5, reach, reach * 0.05),  # some within reach
                torch.where(rand(size) < 0.5, -1.0, 1.0),
                rand(size),
                -5 * rand(size),
                -5 * rand(size),
            ]
        ).to(device)
        goals = torch.cat([tau.unsqueeze(1) + 0.3 * rand(size, 6)], 1).sort(1).values
        goals = torch.cat([tau.unsqueeze(1), goals.minimum(self.samples[2].cpu().unsqueeze(1))], 1)
        goals[:, -1] = self.samples[2].cpu()
        self.goals = goals.to(device)
        fate = (rand(size) * 7).long() - 2
        steps = (rand(2, size) * 30).long()
        output = (goals <= tau.unsqueeze(1)).sum(1)
        self.counts = torch.stack([fate.clamp_min(0), output, output - 1, *steps]).to(device)
        error = rand(size) * 2
        for at, value in enumerate((0.0, math.nan, math.inf, 1.0)):
            error[(at + 2) :: 11] = value
        self.error = error.to(device)
        self.states = [rand(size, 3).to(device) for _ in range(4)]
        self.moved = (rand(size) < 0.5).to(device)
        self.like = rand(size).view(size, 1, 1).to(device)

    def numbers(self, controller: StepController, min_step: float = 0.0) -> Tensor:
        return controller.numbers(5, min_step, 0.25, 40)

    def plan(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return control.plan(self.samples, self.counts, ABSCISSAE, numbers, self.like)


class StepControl(ForwardObligations):
    """What the tests of these operators share."""

    def batch(self, data: st.DataObject) -> Batch:
        size = data.draw(st.sampled_from(SIZES), "size")
        seed, late = data.draw(st.integers(0, 1000), "seed"), data.draw(st.booleans(), "late")
        return Batch(size, seed, self.device, late)

    def numbers(self, data: st.DataObject, batch: Batch) -> Tensor:
        controller = data.draw(st.sampled_from(CONTROLLERS), "controller")
        return batch.numbers(controller, data.draw(st.sampled_from([0.0, 0.02]), "min_step"))

    def build(self, batch: Batch, numbers: Tensor) -> Problem:
        raise NotImplementedError

    def draw(self, data: st.DataObject) -> Problem:
        batch = self.batch(data)
        return self.build(batch, self.numbers(data, batch))

    def problems(self) -> list[Problem]:
        batch = Batch(40, 3, self.device)
        return [self.build(batch, batch.numbers(c)) for c in CONTROLLERS[::2]]

    def huge(self) -> Problem:
        batch = Batch(1_000_003, 1, self.device)
        batch.error.nan_to_num_()  # NaN equals nothing
        return self.build(batch, batch.numbers(StepController.pi()))


class TestPlan(StepControl):
    def build(self, batch: Batch, numbers: Tensor) -> Problem:
        def of(plan: Callable[..., Any]) -> Callable[[Tensor, Tensor], Any]:
            def call(samples: Tensor, like: Tensor) -> Any:
                samples = samples.contiguous()
                step, lands, times = plan(samples, batch.counts, ABSCISSAE, numbers, like)
                return times, step.to(like.dtype), lands.to(like.dtype)

            return call

        inputs = (batch.samples, batch.like)
        return Problem(of(torch.ops.ctorch.rk_plan.default), of(control.plan), inputs, exact=(0,))

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        b = Batch(5, 1, self.device)
        numbers = b.numbers(StepController())
        return [
            (torch.ops.ctorch.rk_plan.default, (b.samples, b.counts, ABSCISSAE, numbers, b.like))
        ]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        b = Batch(5, 1, self.device)
        n = b.numbers(StepController())
        plan = control.rk_plan
        if not has_kernels():
            return []
        return [
            (lambda: plan(b.samples[:6], b.counts, ABSCISSAE, n, b.like), RuntimeError, "samples"),
            (
                lambda: plan(b.samples.float(), b.counts, ABSCISSAE, n, b.like),
                RuntimeError,
                "sampl",
            ),
            (
                lambda: plan(b.samples, b.counts[:, :4], ABSCISSAE, n, b.like),
                RuntimeError,
                "counts",
            ),
            (
                lambda: plan(b.samples, b.counts, ABSCISSAE.float(), n, b.like),
                RuntimeError,
                "c must",
            ),
            (lambda: plan(b.samples, b.counts, ABSCISSAE, n[:5], b.like), RuntimeError, "control"),
            (lambda: plan(b.samples, b.counts, ABSCISSAE, n, b.like[:3]), RuntimeError, "like"),
        ]

    def test_law(self) -> None:
        """Steps lie within the interval and the limits; all stages lie before the step's end."""
        b = Batch(600, 5, self.device)
        step, lands, times = control.rk_plan(
            b.samples, b.counts, ABSCISSAE, b.numbers(StepController(), 0.02), b.like
        )
        running = b.counts[control.FATE] == control.RUNNING
        direction, end = b.samples[control.DIRECTION], b.samples[control.END]
        tau1 = direction * step[control.STOP]
        length = direction * step[control.SIGNED]
        assert (tau1 <= end).all()
        assert torch.equal(tau1[lands], end[lands])
        assert lands[running].any()
        assert not lands[running].all()
        assert not lands[~running].any()
        assert (length[running & ~lands] >= 0.02).all()
        assert (length <= 1.001 * 0.25).all()
        assert (length[~running] == 0).all()
        inside = direction * times.reshape(len(ABSCISSAE), -1) < tau1
        assert inside[:, running].all()
        at_end = torch.nextafter(step[control.STOP], step[control.START])
        assert torch.equal(times[-1].reshape(-1), at_end)


class TestJudge(StepControl):
    def build(self, batch: Batch, numbers: Tensor) -> Problem:
        step, lands, _ = batch.plan(numbers)

        def of(judge: Callable[..., Any]) -> Callable[[Tensor, Tensor], Any]:
            def call(error: Tensor, goals: Tensor) -> Any:
                samples, counts = batch.samples.clone(), batch.counts.clone()
                ends = step.clone()
                moved, flags = judge(samples, counts, ends, lands, error, goals, numbers)
                return tuple(x.to(error.dtype) for x in (samples, counts, ends, moved, flags))

            return call

        inputs = (batch.error, batch.goals)
        return Problem(of(torch.ops.ctorch.rk_judge.default), of(control.judge), inputs, exact=(1,))

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        b = Batch(5, 1, self.device)
        n = b.numbers(StepController.pi())
        step, lands, _ = b.plan(n)
        return [
            (
                torch.ops.ctorch.rk_judge.default,
                (b.samples, b.counts, step, lands, b.error, b.goals, n),
            )
        ]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        _, (samples, counts, step, lands, error, goals, n) = self.calls()[0]
        judge = control.rk_judge
        if not has_kernels():
            return []
        return [
            (
                lambda: judge(samples, counts, step[:2], lands, error, goals, n),
                RuntimeError,
                "step",
            ),
            (lambda: judge(samples, counts, step, error, error, goals, n), RuntimeError, "lands"),
            (
                lambda: judge(samples, counts, step, lands, error[:2], goals, n),
                RuntimeError,
                "error",
            ),
            (
                lambda: judge(samples, counts, step, lands, error, goals[:2], n),
                RuntimeError,
                "goals",
            ),
            (
                lambda: judge(samples.t().contiguous().t(), counts, step, lands, error, goals, n),
                RuntimeError,
                "samples must be contiguous",
            ),
        ]

    @pytest.mark.parametrize("controller", CONTROLLERS)
    def test_law(self, controller: StepController) -> None:  # type: ignore[override]
        """Every sample is controlled as a solve of its own is."""
        b = Batch(600, 7, self.device)
        n = b.numbers(controller)
        step, lands, _ = b.plan(n)
        before, counts = b.samples.clone(), b.counts.clone()
        length = step[control.SIGNED].abs().tolist()
        moved, flags = control.rk_judge(b.samples, b.counts, step, lands, b.error, b.goals, n)
        checked = set()
        for i, error in enumerate(b.error.tolist()):
            if counts[control.FATE, i] != control.RUNNING:
                assert torch.equal(b.samples[:, i], before[:, i])
                assert not moved[i]
                continue
            past = [math.exp(before[row, i]) for row in (control.LOG_LAST, control.LOG_BEFORE)]
            factor = controller.factor(error, 5, (past[0], past[1]))
            accepted = error <= 1
            proposed = length[i] * (factor if accepted else min(factor, 1.0))
            if accepted and lands[i]:
                proposed = max(proposed, before[control.LENGTH, i].item())
            assert b.samples[control.LENGTH, i].item() == pytest.approx(proposed, rel=1e-12)
            assert bool(moved[i]) == accepted
            assert b.counts[control.ACCEPTED, i] - counts[control.ACCEPTED, i] == accepted
            assert b.counts[control.REJECTED, i] - counts[control.REJECTED, i] == (not accepted)
            checked.add((accepted, bool(lands[i]), math.isfinite(error)))
        assert len(checked) >= 5  # the batch holds every case
        passed = b.counts[control.OUTPUT] - b.counts[control.OUTPUT_BEFORE]
        assert flags[1] == passed.sum()
        assert (b.goals.gt(b.samples[control.TAU].unsqueeze(1)).int().argmax(1) > 0).any()

    @pytest.mark.parametrize(
        "bit", [control.MOVED, control.INSIDE, control.NOT_FINITE, control.BUSY]
    )
    def test_one_sample_raises_a_flag(self, bit: int) -> None:
        """Of many samples that are done, a single one is enough, wherever it is."""
        size, at = 3000, 2741
        b = Batch(size, 1, self.device)
        b.counts[control.FATE] = control.DONE
        n = b.numbers(StepController())
        assert self.flags(b, n) == [0, 0]
        b.counts[:, at] = 0
        b.samples[:, at] = torch.tensor([0.0, 0.1, 1.0, 1.0, 0.0, 0.0, 0.0])
        b.error[at] = math.nan if bit == control.NOT_FINITE else 0.5
        b.goals[at] = torch.tensor([0.0, 0.05, 0.05, 0.1, 0.1, 0.5, 1.0])
        b.counts[control.OUTPUT, at] = 1
        bits, passed = self.flags(b, n)
        assert bits & bit
        assert passed == (0 if bit == control.NOT_FINITE else 4)

    def flags(self, b: Batch, numbers: Tensor) -> list[int]:
        step, lands, _ = b.plan(numbers)
        _, flags = control.rk_judge(b.samples, b.counts, step, lands, b.error, b.goals, numbers)
        return flags.tolist()

    @pytest.mark.parametrize(
        ("fate", "error", "length", "steps"),
        [
            (control.DONE, 0.5, 2.0, 39),
            (control.SPENT, 0.5, 0.1, 39),
            (control.STUCK, 9.0, 1e-17, 0),
            (control.WILD, math.nan, 1e-17, 39),
            (control.RUNNING, 0.5, 0.1, 38),
        ],
    )
    def test_fates(self, fate: int, error: float, length: float, steps: int) -> None:
        b = Batch(1, 1, self.device)
        b.samples[:, 0] = torch.tensor([0.5, length, 1.0, 1.0, 0.0, 0.0, 0.0])
        b.counts[:, 0] = torch.tensor([control.RUNNING, 7, 6, steps, 0])
        b.error[0] = error
        n = StepController().numbers(5, 0.0, math.inf, 40)
        step, lands, _ = b.plan(n)
        control.rk_judge(b.samples, b.counts, step, lands, b.error, b.goals, n)
        assert b.counts[control.FATE, 0] == fate


class TestAccept(StepControl):
    def build(self, batch: Batch, numbers: Tensor) -> Problem:
        return Problem(
            lambda *states: torch.ops.ctorch.rk_accept.default(batch.moved, *states),
            lambda *states: control.accept(batch.moved, *states),
            tuple(batch.states),
        )

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        b = Batch(5, 1, self.device)
        return [(torch.ops.ctorch.rk_accept.default, (b.moved, *b.states))]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        b = Batch(5, 1, self.device)
        y, y1, k0, k1 = b.states
        accept = control.rk_accept
        if not has_kernels():
            return []
        return [
            (lambda: accept(b.moved[:2], y, y1, k0, k1), RuntimeError, r"y must be \[B"),
            (lambda: accept(b.moved.long(), y, y1, k0, k1), RuntimeError, "moved must"),
            (lambda: accept(b.moved, y, y1[:, :2], k0, k1), RuntimeError, "y1 must"),
            (lambda: accept(b.moved, y, y1, k0, k1.float()), RuntimeError, "k1 must"),
        ]

    def test_law(self) -> None:
        """Nothing of a sample that did not move is looked at, and nothing old of one that did."""
        b = Batch(40, 2, self.device)
        y, y1, k0, k1 = b.states
        y1[~b.moved], k1[~b.moved] = math.nan, math.nan
        y[b.moved], k0[b.moved] = math.nan, math.nan
        next_y, next_k = control.rk_accept(b.moved, y, y1, k0, k1)
        assert torch.equal(next_y, y.nan_to_num(0) + y1.nan_to_num(0))
        assert torch.equal(next_k, k0.nan_to_num(0) + k1.nan_to_num(0))


class TestOutputs(StepControl):
    def build(self, batch: Batch, numbers: Tensor) -> Problem:
        step, lands, _ = batch.plan(numbers)
        counts = batch.counts.clone()
        state = (batch.samples.clone(), counts, step, lands)
        _, flags = control.judge(*state, batch.error, batch.goals, numbers)
        count = int(flags[1])

        def of(outputs: Callable[..., Any]) -> Callable[[Tensor], Any]:
            def call(goals: Tensor) -> Any:
                times = goals.double() * batch.samples[control.DIRECTION].unsqueeze(1)
                return tuple(x.to(goals.dtype) for x in outputs(counts, step, times, count))

            return call

        return Problem(of(torch.ops.ctorch.rk_outputs.default), of(control.outputs), (batch.goals,))

    def calls(self) -> list[tuple[Any, tuple[Any, ...]]]:
        b = Batch(5, 1, self.device)
        b.counts[control.OUTPUT] = 2
        b.counts[control.OUTPUT_BEFORE] = 1
        step, _, _ = b.plan(b.numbers(StepController()))
        return [(torch.ops.ctorch.rk_outputs.default, (b.counts, step, b.goals, 5))]

    def bad_calls(self) -> list[tuple[Callable[[], Any], type[Exception], str]]:
        _, (counts, step, goals, _) = self.calls()[0]
        return [
            (lambda: control.rk_outputs(counts, step, goals, 4), RuntimeError, "count is 4"),
            (lambda: control.rk_outputs(counts, step, goals, 6), RuntimeError, "count is 6"),
        ]

    def test_law(self) -> None:
        """An output lies at the fraction of the step that its time says."""
        b = Batch(600, 4, self.device)
        n = b.numbers(StepController())
        step, lands, _ = b.plan(n)
        _, flags = control.rk_judge(b.samples, b.counts, step, lands, b.error, b.goals, n)
        times = b.goals * b.samples[control.DIRECTION].unsqueeze(1)
        sample, index, theta, at_end = control.rk_outputs(b.counts, step, times, int(flags[1]))
        t = step[control.START][sample] + theta * step[control.SIGNED][sample]
        torch.testing.assert_close(t, times[sample, index])
        assert ((theta > 0) & (theta <= 1)).all()
        assert at_end.any()
        assert (theta[at_end] == 1).all()
        assert not at_end.all()
        pairs = list(zip(sample.tolist(), index.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs) > 100


def has_kernels() -> bool:
    from ctorch.ops import _kernels

    return bool(_kernels.HAS_KERNELS)


class TestPlanCUDA(TestPlan):
    device, pytestmark = "cuda", needs_cuda


class TestJudgeCUDA(TestJudge):
    device, pytestmark = "cuda", needs_cuda


class TestAcceptCUDA(TestAccept):
    device, pytestmark = "cuda", needs_cuda


class TestOutputsCUDA(TestOutputs):
    device, pytestmark = "cuda", needs_cuda
