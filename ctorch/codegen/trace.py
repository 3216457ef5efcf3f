"""Tracing a vector field: the function on its batch becomes the arithmetic of one sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch.codegen.graph import Graph, Ids
from ctorch.codegen.lower import Lift, Recorder, Watch
from ctorch.codegen.lower_source import Untraceable


@dataclass
class Inputs:
    """What one evaluation is given.

    Attributes:
        t: time.
        y: leaves of the state.
        own: tensors that belong to the samples.
        shared: tensors that all samples share.
    """

    t: Tensor
    y: list[Tensor]
    own: list[Tensor]
    shared: list[Tensor]


@dataclass
class Record:
    """A recorded evaluation.

    Attributes:
        graph: what it computes.
        outputs: ids of the slope's leaves; of a derivative those of t, y, own, and shared.
        lifted: tensors from outside, in the order of their inputs.
    """

    graph: Graph
    outputs: list[Ids | None]
    values: list[Tensor]


def record(
    call: Callable[[Inputs], list[Tensor]],
    inputs: Inputs,
    dtype: torch.dtype,
    lift: Callable[[Graph], Lift],
    finish: Callable[[list[Tensor]], list[Tensor | None]] | None = None,
) -> Record:
    """Record ``call(inputs)``, and what ``finish`` makes of its results."""
    graph = Graph(torch.finfo(dtype).max)
    recorder = Recorder(graph, dtype, lift(graph))
    recorder.give(inputs.t, graph.input("t", (1,)).reshape(tuple(inputs.t.shape)))
    for name, leaves in (("y", inputs.y), ("own", inputs.own)):
        _give(recorder, graph, name, leaves)
    with _settings(), Watch(recorder), recorder:
        results = call(inputs)
        wanted = results if finish is None else finish(results)
    ids = [None if x is None else _read(recorder, x) for x in wanted]
    return Record(graph, ids, results)


def _read(recorder: Recorder, x: Tensor) -> Ids:
    recorder.meet(x)
    return recorder.ids(x)


def _give(recorder: Recorder, graph: Graph, name: str, leaves: Sequence[Tensor]) -> None:
    total = sum(x.numel() for x in leaves)
    ids, start = graph.input(name, (total,)), 0
    for leaf in leaves:
        recorder.give(leaf, ids[start : start + leaf.numel()].reshape(tuple(leaf.shape)))
        start += leaf.numel()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Attention and transformer layers as their formulas, and the lines of a backward pass."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.autograd.set_detect_anomaly(True, check_nan=False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
