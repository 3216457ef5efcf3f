"""Stochastic differential equations."""

from ctorch.sde.fokker_planck import LogDensity as LogDensity
from ctorch.sde.fokker_planck import fokker_planck as fokker_planck
from ctorch.sde.fokker_planck import log_density_derivatives as log_density_derivatives

__all__ = ["LogDensity", "fokker_planck", "log_density_derivatives"]
