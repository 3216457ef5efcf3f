"""Rules of torch functions, by subject; importing this package fills the table."""

from ctorch.autodiff.rules import _writing as _writing
from ctorch.autodiff.rules import activations as activations
from ctorch.autodiff.rules import attention as attention
from ctorch.autodiff.rules import bessel as bessel
from ctorch.autodiff.rules import convolution as convolution
from ctorch.autodiff.rules import einsum as einsum
from ctorch.autodiff.rules import elementwise as elementwise
from ctorch.autodiff.rules import fourier as fourier
from ctorch.autodiff.rules import hollow as hollow
from ctorch.autodiff.rules import indexing as indexing
from ctorch.autodiff.rules import laplacian as laplacian
from ctorch.autodiff.rules import laplacian_attention as laplacian_attention
from ctorch.autodiff.rules import laplacian_linalg as laplacian_linalg
from ctorch.autodiff.rules import laplacian_norms as laplacian_norms
from ctorch.autodiff.rules import linalg as linalg
from ctorch.autodiff.rules import linalg_jet as linalg_jet
from ctorch.autodiff.rules import losses as losses
from ctorch.autodiff.rules import normalization as normalization
from ctorch.autodiff.rules import norms as norms
from ctorch.autodiff.rules import piecewise as piecewise
from ctorch.autodiff.rules import polynomials as polynomials
from ctorch.autodiff.rules import products as products
from ctorch.autodiff.rules import recurrent as recurrent
from ctorch.autodiff.rules import reductions as reductions
from ctorch.autodiff.rules import resampling as resampling
from ctorch.autodiff.rules import shapes as shapes
from ctorch.autodiff.rules import sortlet as sortlet
from ctorch.autodiff.rules import special as special
from ctorch.autodiff.rules import variants as variants

_writing.register()  # from the rules of the others
