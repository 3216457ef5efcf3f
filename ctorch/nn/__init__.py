"""Building blocks used by several models."""

from ctorch.nn.neural_ode import NeuralODE as NeuralODE

__all__ = ["NeuralODE"]
