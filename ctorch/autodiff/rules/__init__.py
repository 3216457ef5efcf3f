"""Rules of torch functions, by subject; importing this package fills the table."""

from ctorch.autodiff.rules import elementwise as elementwise
from ctorch.autodiff.rules import products as products
from ctorch.autodiff.rules import reductions as reductions
from ctorch.autodiff.rules import shapes as shapes
