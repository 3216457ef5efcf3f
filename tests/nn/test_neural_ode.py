"""NeuralODE is its vector field, solved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch.nn import NeuralODE
from ctorch.testing import check_gradients

TIMES = torch.tensor([0.0, 0.5, 1.0])


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, t: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return scale * torch.tanh(self.net(y))


def test_the_output_is_the_solution():
    field = Field()
    y0 = torch.randn(4, 2)
    options = {"method": "tsit5", "rtol": 1e-4}
    expected = ctorch.solve_ode(field, y0, TIMES, args=(2.0,), **options)
    model = NeuralODE(field, TIMES, **options)
    assert torch.equal(model(y0, args=(2.0,)), expected.y)
    assert model.solve(y0, args=(2.0,)).stats.nfe == expected.stats.nfe
    assert model(y0, torch.tensor([0.0, 0.1])).shape == (2, 4, 2)


def test_gradients_reach_parameters_and_initial_state():
    times = TIMES.double()
    model = NeuralODE(Field(), times, method="rk4", dt0=0.25)
    check_gradients(model, torch.zeros(2), order=2, examples=5)


def test_the_state_is_that_of_the_field_also_inside_another_module():
    field, model = Field(), NeuralODE(Field(), TIMES)
    assert list(model.state_dict()) == list(field.state_dict()) == ["net.weight", "net.bias"]
    model.load_state_dict(field.state_dict())
    assert torch.equal(model.func.net.weight, field.net.weight)
    whole, other = (nn.Sequential(nn.Linear(2, 2), NeuralODE(Field(), TIMES)) for _ in range(2))
    assert list(whole.state_dict()) == ["0.weight", "0.bias", "1.net.weight", "1.net.bias"]
    whole.load_state_dict(other.state_dict())
    assert torch.equal(whole[1].func.net.weight, other[1].func.net.weight)
    assert torch.equal(whole[0].weight, other[0].weight)


class Encoded(NeuralODE):
    def __init__(self, func, t):
        super().__init__(func, t)
        self.encoder = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(2))


class Named(nn.Module):
    """Has names that its NeuralODE has, too."""

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.ones(2))
        self.func, self.encoder = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, t, y):
        return self.func(self.encoder(y)) * self.t


@pytest.mark.parametrize("field", [Field, Named])
@pytest.mark.parametrize("kind", [NeuralODE, Encoded])
def test_learned_times_and_parts_of_subclasses_are_in_the_state(field, kind):
    def made(seed):
        torch.manual_seed(seed)
        t = nn.Parameter(torch.linspace(0, 1, 3) * (1 + seed))
        return nn.Sequential(nn.Identity(), kind(field(), t))

    first, second = made(0), made(1)
    state = first.state_dict()
    assert len(state) == len([*first.parameters(), *first.buffers()])
    assert "1.t" in state
    second.load_state_dict(state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_that_lacks_a_parameter_is_refused():
    with pytest.raises(RuntimeError, match=r"net\.bias"):
        NeuralODE(Field(), TIMES).load_state_dict({"net.weight": torch.zeros(2, 2)})


def test_what_does_not_fit_is_named_as_the_state_names_it():
    model = nn.Sequential(NeuralODE(Field(), TIMES), nn.Linear(2, 2))
    state = model.state_dict()
    state["0.net.weight"] = torch.zeros(3, 3)
    state["0.other"] = state.pop("0.net.bias")
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    text = str(caught.value)
    assert "size mismatch for 0.net.weight:" in text
    assert '"0.net.bias"' in text
    assert '"0.other"' in text
    assert "func." not in text
    kept = model.load_state_dict({k: state[k] for k in ("1.weight", "1.bias")}, strict=False)
    assert kept.missing_keys == ["0.net.weight", "0.net.bias"]


def test_its_text_shows_method_and_tolerances():
    text = repr(NeuralODE(Field(), TIMES, method="tsit5", rtol=1e-3))
    for part in ("t=[3 times]", "method='tsit5'", "rtol=0.001", "atol=1e-08", "(net): Linear"):
        assert part in text


def test_missing_times_and_bad_fields_are_named():
    with pytest.raises(ValueError, match="output times t"):
        NeuralODE(Field())(torch.zeros(2))
    with pytest.raises(TypeError, match="func must be a module or function"):
        NeuralODE(3)
    with pytest.raises(TypeError, match="toll"):
        NeuralODE(Field(), TIMES, toll=1)(torch.zeros(2))
