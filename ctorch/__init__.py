"""ctorch: differentiable scientific computing on PyTorch."""

from ctorch._version import __version__ as __version__
