"""Derivative operators on functions: functions in, functions' derivatives out."""

from ctorch.autodiff import _stream_linalg as _stream_linalg
from ctorch.autodiff import rules as rules
from ctorch.autodiff._jet import Jet as Jet
from ctorch.autodiff._lap import Lap as Lap
from ctorch.autodiff._propagated import MissingRuleError as MissingRuleError
from ctorch.autodiff._propagated import Propagated as Propagated
from ctorch.autodiff._propagated import register_jet_rule as register_jet_rule
from ctorch.autodiff.divergence import divergence as divergence
from ctorch.autodiff.fokker_planck import LogDensity as LogDensity
from ctorch.autodiff.fokker_planck import fokker_planck as fokker_planck
from ctorch.autodiff.fokker_planck import log_density_derivatives as log_density_derivatives
from ctorch.autodiff.hollow import Hollow as Hollow
from ctorch.autodiff.hollow import check_hollow as check_hollow
from ctorch.autodiff.hollow import dimwise_derivative as dimwise_derivative
from ctorch.autodiff.jet import derivative as derivative
from ctorch.autodiff.jet import jet as jet
from ctorch.autodiff.laplacian import Laplacian as Laplacian
from ctorch.autodiff.laplacian import laplacian as laplacian
from ctorch.autodiff.series import Autonomous as Autonomous
from ctorch.autodiff.series import taylor_series as taylor_series
from ctorch.autodiff.stochastic import Estimate as Estimate
from ctorch.autodiff.stochastic import stochastic_bilaplacian as stochastic_bilaplacian
from ctorch.autodiff.stochastic import stochastic_laplacian as stochastic_laplacian
from ctorch.autodiff.stochastic import stochastic_operator as stochastic_operator
