"""``ctorch.ops.mlp.derivative`` by address, where there is nothing around that could tell.

For a net that takes a fraction of a millisecond, the checks of each tensor and the way through the
dispatcher are a tenth of the work. A form that was found fit once, of a net and a batch, is known
again by one look at its tensors; their addresses are asked for at each call, so that parameters may
be replaced. The arithmetic is the operator's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctorch.ops import _kernels
from ctorch.ops import _mlp_kernels as kernels
from ctorch.ops._direct import empty_strided, nothing_around, same_form

LARGEST_ORDER = 12  # multiples of its factorial are far from the end of either dtype
_MOST = 64

Kinds = list[tuple[str, float]]


class _Form:
    """Sizes and types of a net's tensors and of its arguments, which the kernel takes.

    Args:
        tensors: x, v, then weights, then those biases that there are; all of them fit.
        alike: says whether others have their form.
        widths: the outputs of each layer.
        kinds: activations and their parameters.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        alike: Callable[..., bool],
        widths: list[int],
        kinds: Kinds,
    ) -> None:
        x = tensors[0]
        self.count, self.kinds = len(tensors), kinds
        self.alike = alike
        self.recorded = any(tensor.requires_grad for tensor in tensors)
        self.batch, self.dtype, self.wide = x.shape[0], x.dtype, x.dtype is torch.float64
        self.sizes, self.strides = (self.batch, widths[-1]), (widths[-1], 1)
        numbers = [kernels.NUMBERS[name] for name, _ in kinds]
        self._numbers = torch.tensor([x.shape[1], *widths, *numbers], dtype=torch.int64)
        self._params = torch.tensor([param for _, param in kinds], dtype=torch.float64)
        self.numbers, self.params = self._numbers.data_ptr(), self._params.data_ptr()


_forms: dict[tuple[int, torch.Size], _Form] = {}


def derivative(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kinds: Kinds,
    x: Tensor,
    v: Tensor,
    order: int,
) -> Tensor | None:
    """``d^order/ds^order f(x + s v)`` of a net of at least one layer; x and v [B, d].

    None where arguments do not fit or are not at hand as they are, where there is a graph to
    record, a transform, a mode, or a profiler.
    """
    if not nothing_around() or not 0 < order <= LARGEST_ORDER:
        return None
    if torch.autograd._profiler_enabled():  # which is to say what the time goes to
        return None
    tensors = [x, v, *weights]
    for bias in biases:
        if bias is not None:
            tensors.append(bias)
    key = (id(weights[0]), x.shape)
    form = _forms.get(key)
    if (
        form is None
        or form.count != len(tensors)
        or form.kinds != kinds
        or not form.alike(*tensors)
    ):
        form = _new_form(weights, biases, kinds, tensors)
        if form is None:
            return None
        if len(_forms) >= _MOST:
            _forms.clear()
        _forms[key] = form
    if form.recorded and torch.is_grad_enabled():
        return None
    parameters: list[int] = []
    for weight, bias in zip(weights, biases, strict=True):
        if not (address := weight.data_ptr()):
            return None
        parameters += (address, 0 if bias is None else bias.data_ptr())
    out = empty_strided(form.sizes, form.strides, form.dtype)
    _kernels.library.mlp_derivative(
        out.data_ptr(), x.data_ptr(), v.data_ptr(), form.batch, order, form.wide,
        form.numbers, form.params, *parameters,
    )  # fmt: skip
    return out


def _new_form(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], kinds: Kinds, tensors: list[Tensor]
) -> _Form | None:
    """The form of these arguments, or None where the kernel does not take them."""
    x, v = tensors[:2]
    if len(weights) < 2 or not kernels.available("mlp_derivative"):
        return None
    dtype, shape = x.dtype, x.shape
    if dtype not in kernels.DTYPES or x.dim() != 2 or v.shape != shape or 0 in shape:
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    before, widths = shape[1], []
    for weight, bias in zip(weights, biases, strict=True):
        size = weight.shape
        if len(size) != 2 or size[1] != before or not size[0]:
            return None
        before = size[0]
        if bias is not None and bias.shape != (before,):
            return None
        widths.append(before)
    for tensor in tensors:
        kind = type(tensor)
        plain = kind is Tensor or kind is torch.nn.Parameter
        if not plain or tensor.dtype is not dtype or tensor.layout is not torch.strided:
            return None
        if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_neg():
            return None
    alike = same_form(tensors)
    return None if alike is None else _Form(tensors, alike, widths, list(kinds))
