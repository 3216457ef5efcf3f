"""Rules of torch functions, by subject; importing this package fills the table."""

from ctorch.autodiff.rules import elementwise as elementwise
from ctorch.autodiff.rules import products as products
from ctorch.autodiff.rules import reductions as reductions
from ctorch.autodiff.rules import shapes as shapes
from ctorch.autodiff.rules import laplacian as laplacian
from ctorch.autodiff.rules import laplacian_attention as laplacian_attention
from ctorch.autodiff.rules import laplacian_linalg as laplacian_linalg
from ctorch.autodiff.rules import laplacian_norms as laplacian_norms
