"""Derivative operators on functions: functions in, functions' derivatives out."""

from ctorch.autodiff import _stream_linalg as _stream_linalg
from ctorch.autodiff import rules as rules
from ctorch.autodiff._jet import Jet
from ctorch.autodiff._lap import Lap
from ctorch.autodiff._propagated import MissingRuleError, Propagated, register_jet_rule
from ctorch.autodiff.divergence import divergence
from ctorch.autodiff.fokker_planck import LogDensity, fokker_planck, log_density_derivatives
from ctorch.autodiff.hollow import Hollow, check_hollow, dimwise_derivative
from ctorch.autodiff.jet import derivative, jet
from ctorch.autodiff.laplacian import Laplacian, laplacian
from ctorch.autodiff.series import Autonomous, taylor_series
from ctorch.autodiff.stochastic import (
    Estimate,
    stochastic_bilaplacian,
    stochastic_laplacian,
    stochastic_operator,
)

__all__ = [
    "Autonomous", "Estimate", "Hollow", "Jet", "Lap", "Laplacian", "LogDensity", "MissingRuleError",
    "Propagated", "check_hollow", "derivative", "dimwise_derivative", "divergence", "fokker_planck",
    "jet", "laplacian", "log_density_derivatives", "register_jet_rule", "stochastic_bilaplacian",
    "stochastic_laplacian", "stochastic_operator", "taylor_series",
]  # fmt: skip
