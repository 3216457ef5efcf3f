"""Rules of recurrent layers and cells: loops over time, the inputs' products taken out at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff._propagated import rule

State = tuple[Any, ...]
Step = Callable[[Any, State, Any, Any], State]  # projected input, state, weights of the state


def _lstm_step(gates: Any, state: State, w: Any, b: Any) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, w, b)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(gates: Any, state: State, w: Any, b: Any) -> State:
    (h,) = state
    r, z, n = gates.chunk(3, -1)
    hr, hz, hn = F.linear(h, w, b).chunk(3, -1)
    reset, update = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
    new = torch.tanh(n + reset * hn)
    return (new + update * (h - new),)


def _simple_step(activation: Any) -> Step:
    def step(gates: Any, state: State, w: Any, b: Any) -> State:
        return (activation(gates + F.linear(state[0], w, b)),)

    return step


_STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _simple_step(torch.tanh),
    "rnn_relu": _simple_step(torch.relu),
}


def _cell(name: str) -> None:
    step = _STEPS[name]

    def apply(x: Any, state: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        given = tuple(state) if name == "lstm" else (state,)
        new = step(F.linear(x, w_ih, b_ih), given, w_hh, b_hh)
        return new if name == "lstm" else new[0]

    rule(getattr(torch, f"{name}_cell"))(apply)


for _name in _STEPS:
    _cell(_name)


# ---- layers


def _direction(
    step: Step, x: Any, state: State, weights: Sequence[Any], sizes: list[int], reverse: bool
) -> tuple[Any, State]:
    """One layer in one direction over ``x [T, B, C]``; at time t the first ``sizes[t]`` run."""
    w_ih, w_hh, b_ih, b_hh, w_out = weights
    gates = F.linear(x, w_ih, b_ih)
    outputs: list[Any] = [None] * len(sizes)
    finished = state
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        now = tuple(s[:n] for s in finished) if n < finished[0].shape[0] else finished
        new = step(gates[t] if n == gates.shape[1] else gates[t][:n], now, w_hh, b_hh)
        if w_out is not None:
            new = (F.linear(new[0], w_out), *new[1:])
        outputs[t] = new[0]
        if n < finished[0].shape[0]:
            new = tuple(torch.cat([a, s[n:]]) for a, s in zip(new, finished, strict=True))
        finished = new
    full = max(sizes)
    padded = [
        y if y.shape[0] == full else F.pad(y, (0, 0, 0, full - y.shape[0])) for y in outputs
    ]
    return torch.stack(padded), finished


def _layers(
    name: str,
    x: Any,
    states: State,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    sizes: list[int],
) -> tuple[Any, State]:
    """All layers over ``x [T, B, C]``; states ``[layers * directions, B, H]``."""
    directions = 2 if bidirectional else 1
    per = len(params) // (num_layers * directions)
    finals: list[State] = []
    for layer in range(num_layers):
        results = []
        for d in range(directions):
            i = layer * directions + d
            given = list(params[i * per : (i + 1) * per])
            biases = given[2:4] if has_biases else [None, None]
            out = given[-1] if per == (5 if has_biases else 3) else None  # LSTM with proj_size
            weights = [*given[:2], *biases, out]
            state = tuple(s[i] for s in states)
            y, final = _direction(_STEPS[name], x, state, weights, sizes, d == 1)
            results.append(y)
            finals.append(final)
        x = results[0] if directions == 1 else torch.cat(results, -1)
        if train and dropout > 0 and layer < num_layers - 1:
            x = F.dropout(x, dropout, True)
    return x, tuple(torch.stack(list(parts)) for parts in zip(*finals, strict=True))


def _recurrent(name: str) -> None:
    function = getattr(torch, name)

    def apply(*args: Any) -> Any:
        if isinstance(args[3], (tuple, list)):
            return _packed(*args)
        x, state, params, has_biases, layers, dropout, train, bidirectional, batch_first = args
        states = tuple(state) if name == "lstm" else (state,)
        if batch_first:
            x = x.transpose(0, 1)
        sizes = [x.shape[1]] * x.shape[0]
        options = (params, has_biases, layers, dropout, train, bidirectional, sizes)
        y, finals = _layers(name, x, states, *options)
        return (y.transpose(0, 1) if batch_first else y, *finals)

    def _packed(
        data: Any,
        batch_sizes: Tensor,
        state: Any,
        params: Any,
        has_biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        sizes = batch_sizes.tolist()
        states = tuple(state) if name == "lstm" else (state,)
        steps = [
            part if part.shape[0] == sizes[0] else F.pad(part, (0, 0, 0, sizes[0] - part.shape[0]))
            for part in torch.split(data, sizes)
        ]
        options = (params, has_biases, layers, dropout, train, bidirectional, sizes)
        y, finals = _layers(name, torch.stack(steps), states, *options)
        return (torch.cat([y[t][:n] for t, n in enumerate(sizes)]), *finals)

    rule(function)(apply)


for _name in _STEPS:
    _recurrent(_name)


# ---- sequences of several lengths: their elements are moved


@rule(torch._pack_padded_sequence)
def pack_padded_sequence(x: Any, lengths: Tensor, batch_first: bool) -> Any:
    first, second = x.shape[:2]
    places = torch.arange(first * second, device=x.device).reshape(first, second)
    index, batch_sizes = torch._pack_padded_sequence(places, lengths, batch_first)
    return x.flatten(0, 1)[index], batch_sizes


@rule(torch._pad_packed_sequence)
def pad_packed_sequence(
    x: Any, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> Any:
    places = torch.arange(1, x.shape[0] + 1, device=x.device)
    index, lengths = torch._pad_packed_sequence(places, batch_sizes, batch_first, 0, total_length)
    padding = torch.full_like(x.value[:1], padding_value)
    return torch.cat([padding, x])[index], lengths
