"""The rule of einsum: pairs of operands, each a linear or a bilinear function."""

from __future__ import annotations

from typing import Any

import torch

from ctorch.autodiff._propagated import constant, kind_of, rule
from ctorch.autodiff.rules._common import unpacked

Term = tuple[str, Any]  # the letters of an operand, and the operand


@rule("einsum", torch.functional.einsum)
def einsum(equation: Any, *operands: Any) -> Any:
    if not isinstance(equation, str):
        equation, operands = _from_lists(equation, *operands)
    operands = unpacked(operands)
    inputs, output = _named(equation.replace(" ", ""), operands)
    parts = [_diagonal(s, x) for s, x in zip(inputs, operands, strict=True)]
    while len(parts) > 2:  # the two that leave the smallest product, first
        i, j = _next_pair(parts, output)
        b, a = parts.pop(j), parts.pop(i)
        later = set(output).union(*(letters for letters, _ in parts))
        both = "".join(sorted(set(a[0] + b[0]) & later))
        parts.append((both, _pair(*a, *b, both)))
    if len(parts) == 1:
        ((s, a),) = parts
        return a.linear(lambda x: torch.einsum(f"...{s}->...{output}", x))
    return _pair(*parts[0], *parts[1], output)


def _pair(s: str, a: Any, r: str, b: Any, output: str) -> Any:
    if constant(a) and constant(b):
        return torch.einsum(f"{s},{r}->{output}", a, b)
    if constant(b):
        return a.linear(lambda x: torch.einsum(f"...{s},{r}->...{output}", x, b))
    if constant(a):
        return b.linear(lambda x: torch.einsum(f"{s},...{r}->...{output}", a, x))
    fn = lambda x, y: torch.einsum(f"...{s},...{r}->...{output}", x, y)  # noqa: E731
    return kind_of(a, b).bilinear(fn, a, b)


def _next_pair(parts: list[Term], output: str) -> tuple[int, int]:
    """The pair whose product has the fewest elements; constants go together before others."""
    sizes = {c: n for s, x in parts for c, n in zip(s, x.shape, strict=True) if n != 1}

    def cost(i: int, j: int) -> tuple[int, int]:
        others = [s for k, (s, _) in enumerate(parts) if k not in (i, j)]
        kept = set(parts[i][0] + parts[j][0]) & set(output).union(*others)
        carried = sum(not constant(parts[k][1]) for k in (i, j))
        elements = 1
        for c in kept:
            elements *= sizes.get(c, 1)
        return (elements * (1 + carried), carried)

    pairs = [(i, j) for j in range(len(parts)) for i in range(j)]
    return min(pairs, key=lambda pair: cost(*pair))


def _diagonal(s: str, x: Any) -> Term:
    """An operand without repeated letters."""
    for c in sorted(set(s)):
        while s.count(c) > 1:
            i, j = [k for k, letter in enumerate(s) if letter == c][:2]
            x = torch.diagonal(x, 0, i, j)
            s = s[:i] + s[i + 1 : j] + s[j + 1 :] + c
    return s, x


def _named(equation: str, operands: tuple[Any, ...]) -> tuple[list[str], str]:
    """The operands' letters and the result's, with letters for the dims of ellipses."""
    given, arrow, output = equation.partition("->")
    terms = given.split(",")
    if len(terms) != len(operands):
        raise ValueError(f"einsum: {len(terms)} operands in {equation!r}, {len(operands)} given")
    if not arrow:
        letters = given.replace("...", "").replace(",", "")
        output = "..." if "..." in given else ""
        output += "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    counts = [
        x.ndim - len(term.replace("...", "")) if "..." in term else 0
        for term, x in zip(terms, operands, strict=True)
    ]
    most = max(counts)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    free = [c for c in letters if c not in equation][:most]
    named = [
        term.replace("...", "".join(free[most - n :])) if n else term.replace("...", "")
        for term, n in zip(terms, counts, strict=True)
    ]
    return named, output.replace("...", "".join(free))


def _from_lists(first: Any, *rest: Any) -> tuple[str, tuple[Any, ...]]:
    """torch's other form: ``einsum(x, [0, 1], y, [1, 2], [0, 2])``."""
    given = (first, *rest)
    operands, lists = given[: len(given) // 2 * 2 : 2], given[1::2]
    terms = ["".join(_letter(i) for i in numbers) for numbers in lists]
    equation = ",".join(terms)
    if len(given) % 2:
        equation += "->" + "".join(_letter(i) for i in given[-1])
    return equation, operands


def _letter(i: Any) -> str:
    if i is Ellipsis:
        return "..."
    return chr(ord("A") + i) if i < 26 else chr(ord("a") + i - 26)


@rule("trace")
def trace(x: Any) -> Any:
    return torch.diagonal(x).sum(-1)


@rule("vander", torch.linalg.vander)
def vander(x: Any, N: int | None = None, increasing: bool = False) -> Any:
    powers = [torch.ones_like(x.value)]
    for _ in range(1, x.shape[-1] if N is None else N):
        powers.append(powers[-1] * x)
    return torch.stack(powers if increasing else powers[::-1], -1)


@rule(torch.linalg.vander)
def linalg_vander(x: Any, *, N: int | None = None) -> Any:
    return vander(x, N, increasing=True)


@rule("block_diag", torch.functional.block_diag)
def block_diag(*tensors: Any) -> Any:
    parts = [x.reshape(1, -1) if x.ndim < 2 else x for x in unpacked(tensors)]
    width, before, rows = sum(x.shape[1] for x in parts), 0, []
    for x in parts:
        after = width - before - x.shape[1]
        rows.append(torch.nn.functional.pad(x, (before, after)))
        before += x.shape[1]
    return torch.cat(rows, 0)


@rule("meshgrid", torch.functional.meshgrid)
def meshgrid(*tensors: Any, indexing: str | None = None) -> Any:
    parts = [x.reshape(-1) for x in unpacked(tensors)]
    sizes, n = [x.shape[0] for x in parts], len(parts)
    grids = [
        x.reshape((1,) * i + (-1,) + (1,) * (n - 1 - i)).expand(sizes) for i, x in enumerate(parts)
    ]
    if indexing == "xy" and n >= 2:
        grids = [torch.transpose(grid, 0, 1) for grid in grids]
    return tuple(grids)


@rule("cartesian_prod", torch.functional.cartesian_prod)
def cartesian_prod(*tensors: Any) -> Any:
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([x.reshape(-1) for x in meshgrid(*tensors, indexing="ij")], -1)


@rule("cov")
def cov(x: Any, *, correction: int = 1, fweights: Any = None, aweights: Any = None) -> Any:
    if fweights is not None or aweights is not None:
        raise NotImplementedError("cov: weights have no rule; scale the samples")
    if x.ndim < 2:
        return torch.var(x, correction=correction)
    centered = x - x.mean(1, keepdim=True)
    c = torch.matmul(centered, torch.conj(centered).mT) / max(x.shape[1] - correction, 0)
    return c.reshape(()) if c.shape == (1, 1) else c


@rule("corrcoef")
def corrcoef(x: Any) -> Any:
    c = cov(x)
    if c.ndim == 0:
        return c / c
    size = torch.rsqrt(torch.diagonal(c))
    return c * size.unsqueeze(0) * size.unsqueeze(1)
