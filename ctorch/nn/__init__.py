"""Building blocks used by several models."""

from ctorch.nn.hollow_attention import HollowAttention as HollowAttention
from ctorch.nn.hollow_mlp import HollowMLP as HollowMLP
from ctorch.nn.hollow_sum import HollowSum as HollowSum
from ctorch.nn.neural_ode import NeuralODE as NeuralODE

__all__ = ["HollowAttention", "HollowMLP", "HollowSum", "NeuralODE"]
