"""Complex numbers as pairs of real ones: arrays of them, and the lowering rules that they need.

Rules that are written with ``+ - * /`` and products are those of real numbers. Derivatives in
PyTorch conjugate what a real rule does not, so that only rules named here are applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ctorch.codegen import lower_elementwise, lower_structure
from ctorch.codegen.graph import ZERO, Graph, Ids
from ctorch.codegen.lower_expression import Expr

#: A real or imaginary part; None where all of it is known to be zero.
Part = Expr | None


class Complex:
    """An array of complex numbers, with the operators and methods of ``Expr`` that rules use.

    Args:
        graph: where the numbers belong.
        re, im: arrays of one shape, or of shapes that broadcast.
    """

    __slots__ = ("graph", "im", "re")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, graph: Graph, re: Part, im: Part) -> None:
        self.graph, self.re, self.im = graph, re, im

    @classmethod
    def from_ids(cls, graph: Graph, ids: Ids) -> Complex:
        """Of pairs: [*shape, 2]."""
        zeros = (ZERO, graph.constant(0.0))
        parts = [
            None if ids[..., k].size and np.isin(ids[..., k], zeros).all() else ids[..., k]
            for k in (0, 1)
        ]
        if parts[0] is None:  # one part tells the shape
            parts[0] = ids[..., 0]
        return cls(graph, *(None if part is None else Expr(graph, part) for part in parts))

    @property
    def ids(self) -> Ids:
        """The pairs: [*shape, 2]."""
        zero = np.array(ZERO, np.int64)
        parts = (zero if part is None else part.ids for part in (self.re, self.im))
        return np.stack(np.broadcast_arrays(*parts), -1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.ids.shape[:-1]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def of(self, other: Any) -> Complex:
        """A number, or an array of real ones, as an array of complex ones."""
        if isinstance(other, Complex):
            return other
        if isinstance(other, Expr):
            return Complex(self.graph, other, None)
        number = complex(other)

        def part(x: float) -> Part:
            return Expr(self.graph, np.array(self.graph.constant(x), np.int64)) if x else None

        return Complex(self.graph, part(number.real), part(number.imag))

    def parts(self) -> tuple[Expr, Expr]:
        """Both of them."""
        zero = Expr(self.graph, np.array(ZERO, np.int64))
        return zero if self.re is None else self.re, zero if self.im is None else self.im

    def conj(self) -> Complex:
        """The conjugate."""
        return Complex(self.graph, self.re, _neg(self.im))

    def call(self, op: str, *others: Any) -> Any:
        """A function of complex numbers by the name that it has in a graph."""
        if op == "mul":
            return self * others[0]
        if op not in FUNCTIONS:
            raise NotImplementedError(f"{op} of complex numbers")
        return FUNCTIONS[op](self)

    # ---- arithmetic

    def __add__(self, other: Any) -> Complex:
        b = self.of(other)
        return Complex(self.graph, _add(self.re, b.re), _add(self.im, b.im))

    def __sub__(self, other: Any) -> Complex:
        return self + -self.of(other)

    def __rsub__(self, other: Any) -> Complex:
        return self.of(other) - self

    def __neg__(self) -> Complex:
        return Complex(self.graph, _neg(self.re), _neg(self.im))

    def __mul__(self, other: Any) -> Complex:
        return self._times(self.of(other), lambda a, b: a * b)

    def __truediv__(self, other: Any) -> Complex:
        b = self.of(other)
        if b.im is None:
            divisor = b.parts()[0]
            divided = (None if part is None else part / divisor for part in (self.re, self.im))
            return Complex(self.graph, *divided)
        re, im = b.parts()
        # by numbers of moderate size, whose squares are finite
        size = re.call("abs").call("maximum", im.call("abs"))
        re, im = re / size, im / size
        scale = size * (re * re + im * im)
        return self * Complex(self.graph, re / scale, -(im / scale))

    def __pow__(self, other: Any) -> Complex:
        if isinstance(other, (Complex, Expr, complex)):
            raise NotImplementedError("an exponent that is no real number")
        if other == round(other) and 0 <= abs(other) <= 16:
            power = self.of(1.0)
            for _ in range(int(abs(other))):
                power = self * power
            return power if other >= 0 else self.of(1.0) / power
        if other < 0:
            return self.of(1.0) / self**-other
        zero = _abs(self).same(0.0)
        return _choose(zero, self.of(0.0), _exp(_log(self) * other))

    def _times(self, b: Complex, times: Callable[[Any, Any], Expr]) -> Complex:
        def product(x: Part, y: Part) -> Part:
            return None if x is None or y is None else times(x, y)

        re = _add(product(self.re, b.re), _neg(product(self.im, b.im)))
        im = _add(product(self.re, b.im), product(self.im, b.re))
        return Complex(self.graph, re, im)

    def matmul(self, other: Complex) -> Complex:
        """[batch, m, k] times [batch, k, n]."""
        return self._times(other, lambda a, b: a.matmul(b))

    # ---- movements

    def _each(self, move: Callable[[Expr], Expr]) -> Complex:
        moved = (None if part is None else move(part) for part in (self.re, self.im))
        return Complex(self.graph, *moved)

    def reshape(self, *shape: int) -> Complex:
        """As of arrays."""
        return self._each(lambda x: x.reshape(*shape))

    def swap(self, a: int = -1, b: int = -2) -> Complex:
        """Two dimensions exchanged."""
        return self._each(lambda x: x.swap(a, b))

    def unsqueeze(self, dim: int) -> Complex:
        """A dimension of size 1."""
        return self._each(lambda x: x.unsqueeze(dim))

    def __getitem__(self, index: Any) -> Complex:
        return self._each(lambda x: x[index])


def _add(a: Part, b: Part) -> Part:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _neg(x: Part) -> Part:
    return None if x is None else -x


def _choose(condition: Expr, yes: Complex, no: Complex) -> Complex:
    pairs = zip(yes.parts(), no.parts(), strict=True)
    return Complex(no.graph, *(condition.where(a, b) for a, b in pairs))


def _abs(z: Complex) -> Expr:
    re, im = z.parts()
    return re.call("abs") if z.im is None else re.call("hypot", im)


def _angle(z: Complex) -> Expr:
    re, im = z.parts()
    return im.call("atan2", re)


def _exp(z: Complex) -> Complex:
    re, im = z.parts()
    if z.im is None:
        return Complex(z.graph, re.call("exp"), None)
    unit = Complex(z.graph, im.call("cos"), im.call("sin"))
    return unit if z.re is None else unit * re.call("exp")


def _log(z: Complex) -> Complex:
    return Complex(z.graph, _abs(z).call("log"), _angle(z))


def _sqrt(z: Complex) -> Complex:
    re, im = z.parts()
    root = ((re.call("abs") + _abs(z)) * 0.5).call("sqrt")
    other = root.same(0.0).where(0.0, im / (root * 2))
    right = Complex(z.graph, root, other)
    left = Complex(z.graph, other.call("abs"), root.call("copysign", im))
    return _choose(re < 0, left, right)


def _sinh(z: Complex) -> Complex:
    re, im = z.parts()
    return Complex(
        z.graph,
        re.call("sinh") * im.call("cos"),
        re.call("cosh") * im.call("sin"),
    )


def _cosh(z: Complex) -> Complex:
    re, im = z.parts()
    return Complex(
        z.graph,
        re.call("cosh") * im.call("cos"),
        re.call("sinh") * im.call("sin"),
    )


def _tanh(z: Complex) -> Complex:
    re, im = z.parts()
    a, b = re.call("tanh"), im.call("tan")
    scale = 1 / (a * a * b * b + 1)
    return Complex(z.graph, a * (b * b + 1) * scale, b * (1 - a * a) * scale)


def _turned(z: Complex) -> Complex:
    """Times i."""
    return Complex(z.graph, _neg(z.im), z.re)


def _sign(z: Complex) -> Complex:
    size = _abs(z)
    return _choose(size.same(0.0), z.of(0.0), z / size)


#: By the names of a graph's operators.
FUNCTIONS: dict[str, Callable[[Complex], Any]] = {
    "neg": lambda z: -z, "abs": _abs, "exp": _exp, "log": _log, "sqrt": _sqrt, "sinh": _sinh,
    "cosh": _cosh, "tanh": _tanh, "sin": lambda z: -_turned(_sinh(_turned(z))),
    "cos": lambda z: _cosh(_turned(z)), "tan": lambda z: -_turned(_tanh(_turned(z))),
    "reciprocal": lambda z: z.of(1.0) / z, "sign": _sign,
    "sigmoid": lambda z: z.of(1.0) / (_exp(-z) + 1.0),
}  # fmt: skip

_SAME = (
    "add", "sub", "rsub", "div", "square", "addcmul", "addcdiv", "lerp", "neg", "abs",
    "exp", "log", "sqrt", "sin", "cos", "tan", "sinh", "cosh", "tanh", "sigmoid", "reciprocal",
    "sgn", "fill", "mm", "bmm", "addmm", "addmv", "baddbmm", "mv", "dot", "linear",
)  # fmt: skip
_REAL_RULES = {**lower_elementwise.RULES, **lower_structure.RULES}


def _vector_norm(z: Complex, *args: Any, **kwargs: Any) -> Expr:
    return _REAL_RULES["linalg_vector_norm"](_abs(z), *args, **kwargs)


def _equal(a: Complex, b: Any) -> Expr:
    (re, im), (other_re, other_im) = a.parts(), a.of(b).parts()
    return re.same(other_re).call("and", im.same(other_im))


def _made(re: Complex, im: Complex) -> Complex:
    return Complex(re.graph, re.re, im.re)


def _polar(size: Complex, angle: Complex) -> Complex:
    return _exp(Complex(size.graph, None, angle.re)) * size


#: Rules for operators with complex numbers among operands or results; tensors are ``Complex``.
RULES: dict[str, Callable[..., Any]] = {
    **{name: _REAL_RULES[name] for name in _SAME},
    "mul": lambda a, b: a * b, "pow": lambda a, b: a**b, "angle": _angle,
    "conj_physical": Complex.conj, "_conj_physical": Complex.conj, "eq": _equal,
    "ne": lambda a, b: _equal(a, b).call("not"), "complex": _made, "polar": _polar,
    "where": lambda condition, yes, no: _choose(condition.re, condition.of(yes), condition.of(no)),
    "masked_fill": lambda z, mask, value: _choose(mask.re, z.of(value), z),
    "vdot": lambda a, b: _REAL_RULES["dot"](a.conj(), b),
    "linalg_vector_norm": _vector_norm, "norm": _vector_norm,
    "tanh_backward": lambda g, y: g * (y.of(1.0) - y * y).conj(),
    "sigmoid_backward": lambda g, y: g * ((y.of(1.0) - y) * y).conj(),
}  # fmt: skip

#: Operators that act on real and imaginary parts alike.
PARTWISE = {
    "sum", "mean", "cumsum", "trace", "index_put", "_unsafe_index_put", "scatter_add",
    "scatter", "index_add",
}  # fmt: skip
#: Operators whose results are complex where their operands are real.
MAKERS = {"complex", "polar"}


def involved(base: str, given: Sequence[Any]) -> bool:
    """Whether an operator computes with complex numbers: tensors or numbers of Python."""
    return base in MAKERS or any(
        isinstance(x, complex) or (isinstance(x, Tensor) and x.is_complex()) for x in given
    )
