"""C++ for single operators and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

_ARITHMETIC = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}"}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_LOGIC = {"and": "{} & {}", "or": "{} | {}"}
#: Elementwise operators by what the native headers call them.
FUNCTIONS = {
    "abs", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sin", "cos",
    "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "sigmoid",
    "softplus", "erf", "erfc", "floor", "ceil", "trunc", "nearbyint", "sign", "normal_cdf",
    "lgamma", "pow", "atan2", "fmod", "hypot", "copysign", "maximum", "minimum",
}  # fmt: skip


class Operand:
    """A number in the text.

    Args:
        text: an expression that can stand anywhere.
        kind: "lanes" (of the type in which the statement computes), "number" or "mask".
    """

    __slots__ = ("kind", "text")

    def __init__(self, text: str, kind: str) -> None:
        self.text, self.kind = text, kind

    def full(self, lanes: str) -> str:
        """As lanes of that type."""
        if self.kind == "lanes" or (lanes == "real" and self.kind == "number"):
            return self.text
        if self.kind == "number":
            return f"all<{lanes}>({self.text})"
        return f"select({self.text}, all<{lanes}>(1), all<{lanes}>(0))"

    def plain(self, lanes: str) -> str:
        """As what arithmetic with lanes takes."""
        return self.text if self.kind != "mask" else self.full(lanes)

    def mask(self, lanes: str) -> str:
        """As a truth value."""
        if self.kind == "mask":
            return self.text
        return f"({self.full(lanes)} != all<{lanes}>(0))"


def literal(value: float) -> Operand:
    """A constant."""
    if math.isnan(value):
        text = "std::numeric_limits<real>::quiet_NaN()"
    elif math.isinf(value):
        text = f"{'-' if value < 0 else ''}std::numeric_limits<real>::infinity()"
    else:
        text = repr(float(value))
    return Operand(f"real({text})", "number")


def expression(op: str, exponent: int, operands: Sequence[Operand], lanes: str) -> str:
    """An elementwise operator on operands; of a logical one the mask."""
    if op in _ARITHMETIC:
        texts = [x.plain(lanes) for x in operands]
        if all(x.kind == "number" for x in operands):
            texts[0] = operands[0].full(lanes)
        return _ARITHMETIC[op].format(*texts)
    if op in _COMPARISONS:
        return f"{operands[0].full(lanes)} {_COMPARISONS[op]} {operands[1].full(lanes)}"
    if op in _LOGIC:
        return _LOGIC[op].format(*(x.mask(lanes) for x in operands))
    if op == "not":
        return f"negated({operands[0].mask(lanes)})"
    if op == "select":
        chosen = ", ".join(x.full(lanes) for x in operands[1:])
        return f"select({operands[0].mask(lanes)}, {chosen})"
    x = operands[0].full(lanes)
    if op == "isnan":
        return f"{x} != {x}"
    if op == "neg":
        return f"-{x}"
    if op == "reciprocal":
        return f"all<{lanes}>(1) / {x}"
    if op == "relu":
        return f"select({x} < all<{lanes}>(0), all<{lanes}>(0), {x})"
    if op == "power":
        return f"power<{exponent}>({x})"
    if op == "copy":
        return x
    if op not in FUNCTIONS:
        raise ValueError(f"operator {op}")
    return f"ct::native::{op}({', '.join(x.full(lanes) for x in operands)})"
