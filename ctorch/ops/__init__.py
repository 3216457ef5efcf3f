"""Operators: each a schema, a reference in plain PyTorch, derivative rules, and often a kernel."""

from ctorch.ops import _kernels
from ctorch.ops import hollow as hollow
from ctorch.ops import jet as jet
from ctorch.ops import mlp as mlp
from ctorch.ops import runge_kutta as runge_kutta
from ctorch.ops import sortlet as sortlet
from ctorch.ops import step_control as step_control

_kernels.load()  # once every operator is defined: the library gives them their kernels
