"""Property-based gradient checks that users run on their own functions."""

from ctorch.testing._report import GradientMismatch as GradientMismatch
from ctorch.testing.gradients import check_gradients as check_gradients
from ctorch.testing.strategies import tensors as tensors

__all__ = ["GradientMismatch", "check_gradients", "tensors"]
