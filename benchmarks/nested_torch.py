"""Which nested derivatives of the installed torch are wrong, and by how much.

    python benchmarks/nested_torch.py              the operators that fail, as a Markdown table
    python benchmarks/nested_torch.py --all        every operator
    python benchmarks/nested_torch.py --markdown   the table alone, as docs has it

Each operator of the list of 58 in tests/autodiff/operator_list.py is differentiated one to four
times along a direction, in float64: by torch.func.jvp over torch.func.jvp, and by
torch.autograd.grad over torch.autograd.grad. The truth is reverse mode over reverse mode of the
same function in elementary operations, which a 13-point stencil confirms
(tests/autodiff/test_coverage.py).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.autodiff import elementary
from tests.autodiff.operator_list import TORCH_LIST, Operator
from tests.autodiff.references import error, nested_reverse

ORDERS = 4
RIGHT = 1e-8

HEADS = Operator(
    "scaled_dot_product_attention, [B, H, T, E]",
    lambda x: F.scaled_dot_product_attention(x, x, x),
    lambda x: elementary.attention(x, x, x),
    shape=(2, 2, 4, 6),
    signed=True,
)
OPERATORS = (*TORCH_LIST, HEADS)


@dataclass(frozen=True)
class Outcome:
    """Relative errors of the orders that ran, and the message of the first that did not."""

    errors: tuple[float, ...]
    message: str = ""

    @property
    def right(self) -> bool:
        return not self.message and max(self.errors) < RIGHT

    def __str__(self) -> str:
        shown = ["right" if e < RIGHT else f"**{e:.2g}**" for e in self.errors]
        return ", ".join(shown + (["raises"] if self.message else []))


def forward(operator: Operator, x: Tensor, v: Tensor, truth: Sequence[Tensor]) -> Outcome:
    """torch.func.jvp over torch.func.jvp."""
    curve: Callable[[Tensor], Tensor] = lambda s: operator.fn(x + s * v)  # noqa: E731
    errors: list[float] = []
    for order in range(1, ORDERS + 1):
        curve = _tangent(curve)
        try:
            errors.append(error(curve(torch.zeros((), dtype=x.dtype)), truth[order]))
        except Exception as failure:
            return Outcome(tuple(errors), str(failure).split("\n")[0])
    return Outcome(tuple(errors))


def _tangent(curve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda s: torch.func.jvp(curve, (s,), (torch.ones_like(s),))[1]


def reverse(operator: Operator, x: Tensor, v: Tensor, truth: Sequence[Tensor]) -> Outcome:
    """torch.autograd.grad over torch.autograd.grad, of the outputs in three random projections."""
    worst = [0.0] * ORDERS
    for _ in range(3):
        order = 1
        s = torch.zeros((), dtype=x.dtype, requires_grad=True)
        try:
            y = operator.fn(x + s * v)
            w = torch.randn_like(y)
            derivative = (y * w).sum()
            for order in range(1, ORDERS + 1):
                (derivative,) = torch.autograd.grad(derivative + 0 * s, s, create_graph=True)
                expected = (truth[order] * w).sum()
                worst[order - 1] = max(worst[order - 1], error(derivative.detach(), expected))
        except Exception as failure:
            return Outcome(tuple(worst[: order - 1]), str(failure).split("\n")[0])
    return Outcome(tuple(worst))


@dataclass(frozen=True)
class Row:
    """What torch does with one operator."""

    name: str
    jvp: Outcome
    grad: Outcome
    jvp_no_grad: Outcome

    @property
    def right(self) -> bool:
        return self.jvp.right and self.grad.right and self.jvp_no_grad.right


def measure(operators: Sequence[Operator] = OPERATORS) -> list[Row]:
    rows = []
    for operator in operators:
        torch.manual_seed(0)
        x, v = operator.inputs()
        truth = nested_reverse(lambda s, o=operator, x=x, v=v: o.reference(x + s * v), ORDERS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jvp, grad = forward(operator, x, v, truth), reverse(operator, x, v, truth)
            with torch.no_grad():
                rows.append(Row(operator.name, jvp, grad, forward(operator, x, v, truth)))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| operator | nested `torch.func.jvp` | the same under `no_grad` "
        "| nested `torch.autograd.grad` |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{row.name}` | {row.jvp} | {row.jvp_no_grad} | {row.grad} |" for row in rows]
    return "\n".join(lines)


def _ways(row: Row) -> list[tuple[str, Outcome]]:
    return [("jvp", row.jvp), ("jvp under no_grad", row.jvp_no_grad), ("grad", row.grad)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--all", action="store_true", help="also what is right at every order")
    parser.add_argument("--markdown", action="store_true", help="the table alone")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure()
    wrong = [row for row in rows if not row.right]
    print(markdown(rows if chosen.all else wrong))
    if chosen.markdown:
        return
    print(f"\ntorch {torch.__version__}: {len(rows) - len(wrong)} of {len(rows)} right throughout")
    for row in wrong:
        for way, outcome in _ways(row):
            if outcome.message:
                print(f"{row.name}, {way}, order {len(outcome.errors) + 1}: {outcome.message}")


if __name__ == "__main__":
    main()
