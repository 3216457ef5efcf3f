"""A solve inside ``DistributedDataParallel``: gradients are averaged as for any module."""

from __future__ import annotations

import gc
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import ctorch

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo back end")
TIMES = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
GRADIENTS = ["backprop", "checkpoint"]


class Model(nn.Module):
    """A linear layer before a solve, so that the solve's input requires grad."""

    def __init__(self, gradient: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift = nn.Linear(2, 3).double()
        self.field = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        field = self.field
        solution = ctorch.solve_ode(
            lambda t, y: field(y), self.lift(x), TIMES, gradient=self.gradient
        )
        return solution.y[-1]


def batch(rank: int) -> Tensor:
    return torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    for gradient in GRADIENTS:
        model = DistributedDataParallel(Model(gradient))
        for _ in range(2):  # the second backward pass finds the reducer's buckets rebuilt
            model.zero_grad()
            model(batch(rank)).square().mean().backward()
        if rank == 0:
            torch.save([p.grad for p in model.module.parameters()], Path(folder) / gradient)
        # The group must die last, without the interpreter's lock: where the model holds the last
        # reference, torch waits with the lock for a thread of gloo that waits for the lock.
        del model
        gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes computed. Once: each imports torch."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_are_averaged_over_processes(processes: Path, gradient: str) -> None:
    averaged = torch.load(processes / gradient, weights_only=True)
    model = Model(gradient)
    losses = [model(batch(rank)).square().mean() for rank in range(2)]
    # each process chooses steps for its own half, as these two solves do
    wanted = torch.autograd.grad(sum(losses) / 2, list(model.parameters()))
    for got, want in zip(averaged, wanted, strict=True):
        assert_close(got, want, rtol=1e-12, atol=1e-12)
