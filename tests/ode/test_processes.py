"""Solves in processes that were forked from one that has used threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORKED = """
import multiprocessing, sys
import torch, ctorch

def solve():
    y0, t = torch.ones(6, 2), torch.tensor([0.0, 0.5, 1.0])
    rate = torch.tensor(1.0, requires_grad=True)
    y = ctorch.solve_ode(lambda t, y: -rate * y, y0, t, batched=sys.argv[1] == "batched").y
    y.sum().backward()

torch.set_num_threads(2)
torch.rand(10**6).sin()  # starts OpenMP's threads, which a forked child has not
solve()
child = multiprocessing.get_context("fork").Process(target=solve)
child.start()
child.join(60)
sys.exit(child.exitcode if child.exitcode is not None else child.kill() or "the child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("form", ["one", "batched"])
def test_small_solves_work_in_a_forked_child(form: str) -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": root}
    command = [sys.executable, "-c", FORKED, form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
