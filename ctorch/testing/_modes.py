"""Reverse, forward and batched derivatives of one system, each held against finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ctorch.testing._differences import Difference, difference
from ctorch.testing._report import Finding, element
from ctorch.testing._system import Leaf, System
from ctorch.testing.strategies import with_layout

_ELEMENTS = 64  # elements of a variable that a report differentiates one at a time
_CAPTURED_ALONE = 4  # more captured tensors than this are checked along one joint direction
_OUTSIDE = (
    "fn itself is finite; if it is not meant for such inputs, bound them: "
    "ctorch.testing.tensors(shape, low=..., high=...)"
)
_COTANGENTS = ("contiguous", "expanded", "sliced")


@dataclass
class Tolerance:
    """What counts as agreement, on top of the estimated error of the differences."""

    rtol: float
    atol: float


@dataclass
class Probe:
    """One direction: its variables, what moves in every storage, the differences along it."""

    variables: list[int]
    direction: list[Tensor | None]
    difference: Difference


@dataclass
class Check:
    """A system with its random cotangents and directions: what all modes have in common."""

    system: System
    tolerance: Tolerance
    seed: int
    layout: int = 0
    base: list[Tensor] = field(default_factory=list)
    cotangents: list[Tensor] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.base = self.system.at(self.system.point)
        layout = _COTANGENTS[self.layout % len(_COTANGENTS)]
        self.cotangents = [with_layout(self.random(y), layout) for y in self.base]
        for variables in self._groups():
            direction: list[Tensor | None] = [None] * len(self.system.point)
            for i in variables:
                direction[i] = self.random(self.system.point[i])
            found = difference(self.system.at, self.base, self.system.point, direction)
            self.probes.append(Probe(variables, direction, found))

    def random(self, like: Tensor) -> Tensor:
        """Random numbers away from zero, so that no element of a derivative is overlooked."""
        return _random(like, self.generator)

    def settled(self) -> bool:
        return all(p.difference.settled(1e-3, self.tolerance.atol) for p in self.probes)

    def _groups(self) -> Iterator[list[int]]:
        """Inputs one at a time; captured tensors too, or all of them jointly if they are many."""
        n, total = self.system.input_count, len(self.system.point)
        yield from ([i] for i in range(n))
        if total - n > _CAPTURED_ALONE:
            yield list(range(n, total))
        else:
            yield from ([i] for i in range(n, total))


def reverse(check: Check) -> Finding | None:
    """Vector-Jacobian products against the differences."""
    system = check.system
    leaves = system.leaves()
    outputs = system.eager(leaves[: system.input_count])
    grads = _pull(outputs, leaves, check.cotangents)
    again = _pull(outputs, leaves, check.cotangents)
    for i, (g, g2) in enumerate(zip(grads, again, strict=True)):
        if not torch.allclose(g, g2, rtol=1e-9, atol=1e-12, equal_nan=True):
            text = f"a second backward pass over one graph gives another {_what(system, i)}"
            return Finding("reverse", system.order, system.names[i], text)
    attached = any(y.requires_grad for y in outputs)
    for probe in check.probes:
        finding = _judge_pullback(check, probe, grads, "reverse")
        if finding is not None:
            if not attached:
                finding.hint = "no output carries a graph: detached, or computed in no_grad"
                finding.locate = None
            return finding
    return None


def forward(check: Check) -> Finding | None:
    """Jacobian-vector products by dual numbers and by torch.func.jvp; one may be unsupported."""
    errors: list[Exception] = []
    for way in (_push_dual, _push_func):
        for probe in check.probes:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore"
                    )  # torch warns once about as_strided and the like
                    tangents = way(check.system, probe)
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                errors.append(error)
                break
            finding = _judge_pushforward(check, probe, tangents, way is _push_func)
            if finding is not None:
                return finding
    if len(errors) == 2:
        dual, func = (str(e).strip().splitlines() or [repr(e)] for e in errors)
        text = (
            "forward mode is not supported: dual numbers raise "
            f"{dual[0]!r}, torch.func.jvp {func[0]!r}"
        )
        names = ", ".join(check.system.names)
        finding = Finding("forward", check.system.order, names, text)
        finding.hint = 'where only reverse mode is needed: modes=("reverse",)'
        return finding
    return None


def batched(check: Check) -> Finding | None:
    """Vector-Jacobian products at once (``is_grads_batched``) against one after the other."""
    system = check.system
    leaves = system.leaves()
    outputs = system.eager(leaves[: system.input_count])
    rows = [[check.random(y) for y in check.base] for _ in range(2)]
    singly = [_pull(outputs, leaves, row) for row in rows]
    stacked = [torch.stack(ys) for ys in zip(*rows, strict=True)]
    jointly = _pull(outputs, leaves, stacked, batch=2)
    for i, joint in enumerate(jointly):
        expected = torch.stack([one[i] for one in singly])
        gap = (joint - expected).abs()
        allowed = check.tolerance.atol + check.tolerance.rtol * expected.abs().max()
        if gap.numel() and not bool((gap <= allowed).all()):
            worst = int(torch.nan_to_num(gap, nan=torch.inf).argmax())
            text = f"is_grads_batched=True gives another {_what(system, i)} than single passes"
            return Finding(
                "batched",
                system.order,
                system.names[i],
                text,
                joint.reshape(-1)[worst].item(),
                expected.reshape(-1)[worst].item(),
                float(gap.reshape(-1)[worst]),
                float(allowed),
                element(joint.shape, worst),
            )
    return None


def _pull(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    batch: int = 0,
) -> list[Tensor]:
    pairs = [(y, u) for y, u in zip(outputs, cotangents, strict=True) if y.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if pairs:
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            list(leaves),
            [u for _, u in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=bool(batch),
        )
    lead = (batch,) if batch else ()
    return [
        x.new_zeros(lead + tuple(x.shape)) if g is None else g.detach()
        for x, g in zip(leaves, grads, strict=True)
    ]


def _push_dual(system: System, probe: Probe) -> list[Tensor]:
    with forward_ad.dual_level():
        values = [
            x.clone() if v is None else forward_ad.make_dual(x.clone(), v.clone())
            for x, v in zip(system.point, probe.direction, strict=True)
        ]
        n = system.input_count
        with system.captured_at(values[n:]):
            views = [
                _with_graph(leaf.view(value))
                for leaf, value in zip(system.inputs, values[:n], strict=True)
            ]
            outputs = system.eager(views)
            parts = [forward_ad.unpack_dual(y) for y in outputs]
            return [
                torch.zeros_like(p.primal).detach() if p.tangent is None else p.tangent.detach()
                for p in parts
            ]


def _push_func(system: System, probe: Probe) -> list[Tensor]:
    held = [c.tensor for c in system.captured]

    def outputs(*moved: Tensor) -> tuple[Tensor, ...]:
        variables: list[Tensor] = [
            leaf.view(x) for leaf, x in zip(system.inputs, system.point, strict=False)
        ] + held
        for i, x in zip(probe.variables, moved, strict=True):
            variables[i] = system.view(i, x)
        return tuple(system.pure(variables))

    n = system.input_count
    for i in probe.variables:
        if i >= n and not system.captured[i - n].places:
            raise NotImplementedError(f"{system.names[i]} is held where it cannot be replaced")
    primals = tuple(system.point[i].clone() for i in probe.variables)
    directions = [probe.direction[i] for i in probe.variables]
    tangents = tuple(v.clone() for v in directions if v is not None)
    return [y.detach() for y in torch.func.jvp(outputs, primals, tangents)[1]]


def _with_graph(x: Tensor) -> Tensor:
    """A dual input that a function may differentiate with autograd.grad inside, too."""
    return x if x.requires_grad else x.requires_grad_()


def _judge_pullback(
    check: Check, probe: Probe, grads: Sequence[Tensor], mode: str
) -> Finding | None:
    analytic = 0.0
    for i in probe.variables:
        v = probe.direction[i]
        assert v is not None
        if not bool(torch.isfinite(grads[i]).all()):
            return _not_finite(check, i, grads[i], mode)
        analytic += float(_inner(grads[i], check.system.view(i, v)))
    numeric, scale, slack = 0.0, 0.0, 0.0
    for u, d, e in zip(
        check.cotangents, probe.difference.value, probe.difference.error, strict=True
    ):
        numeric += float(_inner(u, d))
        scale += float((u.abs() * d.abs()).sum())
        slack += float((u.abs() * e).sum())
    allowed = check.tolerance.atol + check.tolerance.rtol * scale + slack
    if abs(analytic - numeric) <= allowed:
        return None
    names = ", ".join(check.system.names[i] for i in probe.variables)
    text = f"wrong {mode}-mode {_order(check.system)} with respect to {names}"
    gap, where = abs(analytic - numeric), ", along a random direction"
    coarse = Finding(mode, check.system.order, names, text, analytic, numeric, gap, allowed, where)
    coarse.locate = lambda: _worst_element(check, probe, grads, coarse)
    return coarse


def _not_finite(check: Check, i: int, grad: Tensor, mode: str) -> Finding:
    """NaN or infinity where the function itself is finite."""
    k = int((~torch.isfinite(grad)).reshape(-1).int().argmax())
    numeric, slack = _element_difference(check, i, k)
    name = check.system.names[i]
    text = f"the {mode}-mode {_order(check.system)} is not finite with respect to {name}"
    got, limit = grad.reshape(-1)[k].item(), check.tolerance.atol + slack
    finding = Finding(mode, check.system.order, name, text, got, numeric, float("inf"), limit)
    finding.where, finding.hint = element(grad.shape, k), _OUTSIDE
    return finding


def _judge_pushforward(
    check: Check, probe: Probe, tangents: Sequence[Tensor], functional: bool
) -> Finding | None:
    system = check.system
    for k, (t, d, e) in enumerate(
        zip(tangents, probe.difference.value, probe.difference.error, strict=True)
    ):
        allowed = check.tolerance.atol + check.tolerance.rtol * d.abs().max() + e
        gap = (t - d).abs()
        if bool((gap <= allowed).all()):
            continue
        worst = int(torch.nan_to_num(gap - allowed, nan=torch.inf).argmax())
        names = ", ".join(system.names[i] for i in probe.variables)
        way = "torch.func.jvp" if functional else "forward_ad dual numbers"
        text = f"wrong forward-mode {_order(system)} with respect to {names} (by {way})"
        hint = ""
        if bool((t == 0).all()):
            hint = "the tangent is zero everywhere: forward mode does not see this function"
        elif not bool(torch.isfinite(t).all()):
            hint = _OUTSIDE
        return Finding(
            "forward",
            system.order,
            names,
            text,
            t.reshape(-1)[worst].item(),
            d.reshape(-1)[worst].item(),
            float(torch.nan_to_num(gap.reshape(-1)[worst], nan=torch.inf)),
            float(allowed.reshape(-1)[worst]),
            f", derivative of output {k}{element(d.shape, worst)} along a random direction",
            hint,
        )
    return None


def _worst_element(check: Check, probe: Probe, grads: Sequence[Tensor], coarse: Finding) -> Finding:
    """Names the element of the gradient that is off most, or the random direction."""
    system, found, largest = check.system, coarse, 0.0
    for i in probe.variables:
        grad = grads[i]
        for k in range(min(grad.numel(), _ELEMENTS)):
            value, slack = _element_difference(check, i, k)
            got = grad.reshape(-1)[k].item()
            gap = abs(got - value)
            gap = gap if gap == gap else float("inf")
            if gap - slack > largest:
                largest = gap - slack
                text = (
                    f"wrong {coarse.mode}-mode {_order(system)} with respect to {system.names[i]}"
                )
                limit = check.tolerance.atol + slack
                where = element(grad.shape, k)
                found = Finding(
                    coarse.mode, system.order, system.names[i], text, got, value, gap, limit, where
                )
    return found


def _element_difference(check: Check, i: int, k: int) -> tuple[complex | float, float]:
    """Derivative of <cotangents, outputs> by one element, in autograd's convention."""
    system = check.system
    position = system.inputs[i].position(k) if i < system.input_count else k
    parts: list[float] = []
    slack = 0.0
    for unit in (1.0, 1.0j) if system.point[i].is_complex() else (1.0,):
        direction: list[Tensor | None] = [None] * len(system.point)
        moved = torch.zeros_like(system.point[i])
        moved.view(-1)[position] = torch.tensor(unit, dtype=moved.dtype)
        direction[i] = moved
        found = difference(system.at, check.base, system.point, direction)
        parts.append(
            sum(float(_inner(u, d)) for u, d in zip(check.cotangents, found.value, strict=True))
        )
        slack += sum(
            float((u.abs() * e).sum()) for u, e in zip(check.cotangents, found.error, strict=True)
        )
    return (complex(*parts) if len(parts) == 2 else parts[0]), slack


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product that autograd's gradients of complex tensors refer to."""
    if a.is_complex() or b.is_complex():
        return (a.conj() * b).real.sum()
    return (a * b).sum()


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    def numbers() -> Tensor:
        unit = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        sign = 2.0 * torch.randint(0, 2, like.shape, generator=generator) - 1
        return ((0.5 + unit) * sign).to(like.device)

    drawn = torch.complex(numbers(), numbers()) if like.is_complex() else numbers()
    return drawn.to(like.dtype)


def _order(system: System) -> str:
    return "gradient" if system.order == 1 else "second derivative"


def _what(system: System, i: int) -> str:
    return f"{_order(system)} with respect to {system.names[i]}"


def cotangent_leaves(check: Check) -> list[Leaf]:
    """The cotangents of a first-order check as inputs of its gradient."""
    return [
        Leaf.of(f"cotangent of output {k}", u.detach().clone())
        for k, u in enumerate(check.cotangents)
    ]
