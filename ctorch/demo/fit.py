"""Fits both models to the training years and judges them by the years held out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctorch import _checkpoint
from ctorch.demo.data import HELD_OUT, record
from ctorch.demo.model import LotkaVolterra, UniversalODE
from ctorch.nn import NeuralODE
from ctorch.training import History, train

TOLERANCE = 1e-5  # of the solves; the data are good to a few percent


@dataclasses.dataclass
class Fit:
    """One fitted model.

    Attributes:
        name: for tables and legends.
        field: the vector field.
        history: of its training.
        path: [T, 2] its counts in all years.
        error: root mean square error of the log-counts in the training years and in the years held
            out.
    """

    name: str
    field: LotkaVolterra
    history: History
    path: Tensor
    error: tuple[float, float]

    def forecast_error(self, column: int) -> float:
        """Root mean square error of one species' log-counts in the years held out."""
        _, pelts = record()
        misses = (self.path.log() - pelts.log())[-HELD_OUT:, column]
        return float(misses.square().mean().sqrt())

    def solve(self, t: Tensor) -> Tensor:
        """Counts [T, 2] at times ``t`` [T] in years since 1900."""
        with torch.no_grad():
            model = NeuralODE(self.field, t, rtol=1e-7, atol=1e-7, gradient="none")
            counts: Tensor = model(self.field.start).exp()
            return counts


@dataclasses.dataclass
class Settings:
    """What a checkpoint must agree about with the run that resumes it."""

    seed: int
    steps: int

    def state_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if dict(state) != self.state_dict():
            raise ValueError(
                f"it was written with --seed {state['seed']} and {state['steps']} steps; this run "
                f"has --seed {self.seed} and {self.steps} steps"
            )


def fit_both(
    seed: int, steps: int, folder: Path, resume: bool = False, hint: str = "", progress: bool = True
) -> tuple[Fit, Fit]:
    """Plain Lotka-Volterra, then the universal ODE that starts from it.

    Args:
        seed: of the network's first weights.
        steps: of the universal ODE; plain Lotka-Volterra, cheap and slow to settle, takes half as
            many again.
        folder: for the checkpoints of both.
        resume: continue from the checkpoints there; without it they are deleted.
        hint: how to resume, said when the run is interrupted.
        progress: show it.
    """
    if not resume:
        for name in ("plain", "universal"):  # and nothing else: the folder may be another's, too
            for path in _checkpoint.in_folder(folder / name):
                path.unlink()
    t, pelts = record()
    log_counts = pelts.log()[:-HELD_OUT]
    common: dict[str, Any] = {"resume": resume, "resume_hint": hint, "progress": progress}

    plain = LotkaVolterra(log_counts)
    many = steps + steps // 2
    settings = Settings(seed, steps)
    history = _fit(plain, t, log_counts, many, 0.03, folder / "plain", settings, common)
    first = _judge("Lotka-Volterra", plain, history, t, pelts)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        universal = UniversalODE(plain, log_counts)
    history = _fit(universal, t, log_counts, steps, 0.02, folder / "universal", settings, common)
    return first, _judge("universal ODE", universal, history, t, pelts)


def _fit(
    field: LotkaVolterra,
    t: Tensor,
    log_counts: Tensor,
    steps: int,
    rate: float,
    folder: Path,
    settings: Settings,
    common: dict[str, Any],
) -> History:
    """Maximum likelihood under log-normal errors, plus the model's penalty, by Adam."""
    model = NeuralODE(
        field, t[: len(log_counts)], rtol=TOLERANCE, atol=TOLERANCE, gradient="backprop"
    )
    optimizer = torch.optim.Adam(field.parameters(), lr=rate)

    def loss() -> tuple[Tensor, dict[str, float]]:
        solution = model.solve(field.start)
        misfit = (solution.y - log_counts).square().mean()
        return misfit + field.penalty(solution.y), {"nfe": solution.stats.nfe}

    return train(
        loss,
        field,
        optimizer,
        steps=steps,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps)),
        clip=1.0,
        checkpoint=folder,
        every=50,
        state={"settings": settings},
        title="universal ODE " if isinstance(field, UniversalODE) else "Lotka-Volterra",
        **common,
    )


def _judge(name: str, field: LotkaVolterra, history: History, t: Tensor, pelts: Tensor) -> Fit:
    fit = Fit(name, field, history, pelts, (math.nan, math.nan))
    fit.path = fit.solve(t)
    squares = (fit.path.log() - pelts.log()).square()
    seen, unseen = squares[:-HELD_OUT].mean().sqrt(), squares[-HELD_OUT:].mean().sqrt()
    fit.error = float(seen), float(unseen)
    return fit
