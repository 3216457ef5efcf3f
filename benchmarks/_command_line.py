"""The command line of a program without sections."""

from __future__ import annotations

import argparse

import torch
from _measure import CLOCKS


def command_line(doc: str | None, rounds: int) -> argparse.Namespace:
    """The options of a program without sections, set in force."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, few sizes")
    parser.add_argument("--rounds", type=int, default=rounds, help="timings of each case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: one thread")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {chosen.threads} thread(s), {chosen.clock} clock")
    return chosen
