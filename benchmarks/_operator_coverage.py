"""How many operators each tool differentiates, and how many of its answers are wrong."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from _operator_bench import Bench
from torch import Tensor

from tests.autodiff.operator_list import F64, PEER_LIST, TORCH_LIST, Operator, _matrix
from tests.autodiff.references import nested_reverse

ORDER = 3
TOLERANCE = 1e-6  # looser than in the tests: which tools lose digits is not the question here


def verdict(run: Callable[[], np.ndarray], truth: np.ndarray) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = run()
    except Exception as failure:
        return f"raises {type(failure).__name__}"
    scale = max(float(np.abs(truth).max()), 1e-2)
    close = got.shape == truth.shape and np.abs(got - truth).max() <= TOLERANCE * scale
    return "right" if close else "wrong"


def third(operator: Operator) -> np.ndarray:
    x, v = operator.inputs()
    return nested_reverse(lambda s: operator.reference(x + s * v), ORDER)[ORDER].numpy()


def traced(operator: Operator) -> np.ndarray:
    """Laplacian of each output, by nested reverse mode."""
    x, _ = operator.inputs()
    total = 0
    for i in range(x.numel()):
        e = torch.zeros(x.numel(), dtype=F64)
        e[i] = 1
        e = e.reshape(x.shape)
        total = total + nested_reverse(lambda s, e=e: operator.reference(x + s * e), 2)[2]
    return total.numpy()


def ours(operator: Operator, order: int = ORDER) -> np.ndarray:
    import ctorch

    x, v = operator.inputs()
    return ctorch.derivative(operator.fn, x, v, order=order).detach().numpy()


def ours_laplacian(operator: Operator, w: Tensor) -> np.ndarray:
    import ctorch

    x, _ = operator.inputs()
    scalar = lambda z: (operator.fn(z.reshape(x.shape)) * w).sum()  # noqa: E731
    return ctorch.laplacian(scalar, x.reshape(-1))[2].detach().numpy()


def nested(operator: Operator) -> np.ndarray:
    from _operator_torch import tangent

    x, v = operator.inputs()
    f = lambda s: operator.fn(x + s * v)  # noqa: E731
    for _ in range(ORDER):
        f = tangent(f)
    return f(torch.zeros((), dtype=F64)).detach().numpy()


def torch_jet(operator: Operator) -> np.ndarray:
    from jet._jet import jet

    x, v = operator.inputs()
    zero = torch.zeros_like(v)
    return jet(operator.fn, (x,))((x, v, zero, zero))[-1].detach().numpy()


def jax_jet(operator: Operator) -> np.ndarray:
    import jax.numpy as jnp
    from _jax_operators import forms
    from jax.experimental.jet import jet

    x, v = (jnp.asarray(t.numpy()) for t in operator.inputs())
    fn = forms(_matrix(3).numpy())[operator.name]
    series = (v,) + (jnp.zeros_like(v),) * (ORDER - 1)
    return np.asarray(jet(fn, (x,), (series,))[1][-1])


def folx_laplacian(operator: Operator) -> np.ndarray:
    import folx
    import jax
    import jax.numpy as jnp
    from _jax_operators import forms

    fn = forms(_matrix(3).numpy())[operator.name]
    x = jnp.asarray(operator.inputs()[0].numpy())
    return np.asarray(jax.jit(folx.forward_laplacian(fn, 0))(x).laplacian)


def peers(bench: Bench) -> dict[str, Callable[[Operator], np.ndarray]]:
    found: dict[str, Callable[[Operator], np.ndarray]] = {"nested torch.func.jvp": nested}
    if "jet" in bench.installed:
        found["torch-jet"] = torch_jet
    if "jax" in bench.installed:
        found["jax.jet"] = jax_jet
    return found


def coverage(bench: Bench) -> None:
    print("\n### Coverage of 46 operators: third derivative, and Laplacian, in float64\n")
    if "jax" in bench.installed:
        import jax

        jax.config.update("jax_enable_x64", True)
    ways = {"ctorch.derivative": ours, **peers(bench)}
    has_folx = "folx" in bench.installed
    names = [*ways, "ctorch.laplacian", *(["folx"] if has_folx else [])]
    print("| operator | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    counts = {name: Counter[str]() for name in names}
    for operator in PEER_LIST:
        truth, trace = third(operator), traced(operator)
        w = torch.randn(trace.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
        found = {n: verdict(lambda f=f, o=operator: f(o), truth) for n, f in ways.items()}
        projected = (torch.from_numpy(np.asarray(trace)) * w).sum().numpy()
        found["ctorch.laplacian"] = verdict(lambda o=operator, w=w: ours_laplacian(o, w), projected)
        if has_folx:
            found["folx"] = verdict(lambda o=operator: folx_laplacian(o), trace)
        print(f"| `{operator.name}` | " + " | ".join(found.values()) + " |", flush=True)
        for name, what in found.items():
            counts[name][what.split()[0]] += 1
    for what in ("right", "wrong", "raises"):
        print(f"| {what} | " + " | ".join(str(counts[name][what]) for name in names) + " |")
    ours_count = counts["ctorch.derivative"]
    bench.figure("46 operators, third derivative: right", ours_count["right"], 44, least=True)
    bench.figure("46 operators, third derivative: wrong", ours_count["wrong"], 0, least=False)
    bench.figure("58 operators, orders 1 to 4: right", right_of_58(), 58, least=True)


def right_of_58() -> int:
    count = 0
    for operator in TORCH_LIST:
        x, v = operator.inputs()
        truth = nested_reverse(lambda s, o=operator, x=x, v=v: o.reference(x + s * v), 4)
        verdicts = [
            verdict(lambda o=operator, k=k: ours(o, k), truth[k].numpy()) for k in range(1, 5)
        ]
        count += verdicts == ["right"] * 4
    return count
