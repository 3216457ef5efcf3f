"""Traced PyTorch functions lowered to C++."""

from ctorch.codegen.build import CompileError, NoCompiler
from ctorch.codegen.lower import supported_operators
from ctorch.codegen.lower_source import MixesSamples, Untraceable
from ctorch.codegen.trace import Field, Traced, clear, trace
from ctorch.codegen.trace_values import trace_values

__all__ = [
    "CompileError", "Field", "MixesSamples", "NoCompiler", "Traced", "Untraceable", "clear",
    "supported_operators", "trace", "trace_values",
]  # fmt: skip
