"""Every rule under the forward Laplacian: the same second derivatives as Taylor series have.

Rules are checked under ``jet`` against stencils and nested reverse mode. Here the sum of second
derivatives along all inputs is compared with theirs, of which a rule shares the formula alone.
Arguments are parts of one vector seen with the shape of the argument, so that rows begin compact.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctorch.autodiff import derivative, laplacian
from tests.autodiff.rule_checks import Case, flat


def _cases() -> dict[str, Case]:
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_rules_*.py")):
        module = importlib.import_module(f"tests.autodiff.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, list) and value and all(isinstance(x, Case) for x in value):
                found.update({f"{path.stem[11:]}-{case}": case for case in value})
    return found


CASES = _cases()


def test_there_are_rules_to_check():
    assert len(CASES) > 100


def _function(case: Case) -> tuple[object, Tensor]:
    """The case's results, weighted, as a function of one vector; and a point."""
    g = torch.Generator().manual_seed(0)
    sizes = [torch.Size(shape).numel() for shape in case.shapes]
    x = torch.rand(sum(sizes), generator=g, dtype=torch.float64)
    x = x * (case.high - case.low) + case.low

    def results(x):
        parts = x.split(sizes) if len(sizes) > 1 else [x]
        return case.f(*(p.reshape(shape) for p, shape in zip(parts, case.shapes, strict=True)))

    count = len(flat(results(x)))
    weights = torch.randn(count, generator=g, dtype=torch.float64)

    def f(x):
        leaves = torch.utils._pytree.tree_leaves(results(x))
        total, begin = 0.0, 0
        for leaf in leaves:
            if not hasattr(leaf, "is_floating_point"):
                continue
            if leaf.is_complex():
                leaf = torch.stack([leaf.real, leaf.imag], -1)
            elif not leaf.is_floating_point():
                continue
            n = leaf.numel()
            total = total + (leaf.reshape(-1) * weights[begin : begin + n]).sum()
            begin += n
        return total

    return f, x


def _uses_batch_statistics(f, x: Tensor) -> bool:
    class Watch(torch.overrides.TorchFunctionMode):
        seen = False

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.nn.functional.batch_norm, torch.batch_norm):
                Watch.seen |= bool(args[5] if len(args) > 5 else (kwargs or {}).get("training"))
            return func(*args, **(kwargs or {}))

    with Watch():
        f(x)
    return Watch.seen


@pytest.mark.parametrize("name", CASES)
def test_laplacian_and_gradient_are_those_of_taylor_series(name):
    f, x = _function(CASES[name])
    if _uses_batch_statistics(f, x):
        with pytest.raises(ValueError, match="mixes samples"):
            laplacian(f, x)
        return
    value, gradient, lap = laplacian(f, x)
    basis = torch.eye(len(x), dtype=x.dtype)
    torch.testing.assert_close(value, f(x), rtol=1e-11, atol=1e-12)
    first = torch.stack([derivative(f, x, e, 1) for e in basis])
    second = torch.stack([derivative(f, x, e, 2) for e in basis])
    torch.testing.assert_close(
        gradient, first, rtol=1e-10, atol=1e-11 * (1 + float(first.abs().max()))
    )
    scale = 1 + float(second.abs().max())
    torch.testing.assert_close(lap, second.sum(), rtol=1e-10, atol=1e-10 * scale)
