"""The property-based gradient check: drawn cases, derivatives against differences."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch.testing._captured import Captured, find_captured, widen, widened
from ctorch.testing._modes import (
    Check,
    Tolerance,
    batched,
    cotangent_leaves,
    forward,
    reverse,
)
from ctorch.testing._report import Finding, GradientMismatch, describe
from ctorch.testing._system import GradientSystem, Leaf, System
from ctorch.testing.strategies import LAYOUTS, require_hypothesis, tensors

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

MODES = {"reverse": reverse, "forward": forward, "batched": batched}
_SHRINK_CASES = 150  # cases that may be run to make a failure smaller


def check_gradients(
    fn: Callable[..., Any],
    inputs: Any,
    *,
    order: int = 1,
    modes: Sequence[str] = ("reverse", "forward"),
    examples: int = 20,
    seed: int = 0,
    rtol: float = 1e-5,
    atol: float = 1e-8,
) -> None:
    """Checks the derivatives of ``fn(*inputs)`` against finite differences on many drawn cases.

    Each case draws values, scales and memory layouts (transposed, sliced, offset, expanded), then
    compares with extrapolated central differences along random directions: vector-Jacobian products
    with contiguous and strided cotangents, and Jacobian-vector products by dual numbers and by
    ``torch.func.jvp``. A forward mode that returns zeros for a function it does not know, a
    detached term, a formula that is wrong only for strided memory: each is found. A failure is
    shrunk, and the smallest failing case is printed.

    Checked are the inputs and every leaf that requires a gradient and that ``fn`` holds: the
    parameters of a module, of modules and tensors in closures, in ``functools.partial``, behind a
    bound method, or named as globals. They keep their values. Everything below double precision is
    computed in float64 (complex128) during the check, parameters included; their own data,
    gradients and buffers are back afterwards. Every evaluation starts from the same torch random
    state, so a function with dropout is checked for one mask at a time.

    Args:
        fn: a function, closure or ``torch.nn.Module``. It returns a tensor or a tuple, list or dict
            of them; integer outputs are ignored. What it mutates must not change its values.
        inputs: its argument, or a tuple or list of its arguments: tensors, hypothesis strategies
            that produce tensors (or whole pytrees of them), or tuples, lists and dicts of both. Of
            a floating-point or complex tensor only shape and dtype are kept; use
            :func:`ctorch.testing.tensors` with bounds, or a strategy, where ``fn`` has a limited
            domain. Anything else, integer tensors too, is passed on as it is.
        order: 1, or 2 to check the derivatives of the gradient as well.
        modes: any of ``"reverse"``, ``"forward"`` and ``"batched"`` (gradients under
            ``is_grads_batched=True``).
        examples: number of random cases, spread over the layouts; the simplest case of each layout
            comes on top.
        seed: the same seed draws the same cases.
        rtol: tolerance relative to the size of the derivative. Raise it for functions that are only
            approximately smooth, such as adaptive solves.
        atol: absolute tolerance. The estimated error of the differences comes on top.

    Raises:
        GradientMismatch: an ``AssertionError``: a derivative is wrong, or not reproducible, or not
            supported; the message holds the smallest failing case, the analytic and the numeric
            value, and the error.
        ImportError: hypothesis is not installed.
        TypeError: ``fn`` is not callable, or ``seed`` no integer.
        ValueError: an argument is out of range, nothing can be differentiated, or no drawn case
            lies in the domain.
        Exception: what ``fn`` itself raises, with the case as a note (from Python 3.11 on).

    Example:
        >>> import torch
        >>> from ctorch.testing import check_gradients
        >>> check_gradients(torch.nn.Linear(3, 2), torch.zeros(4, 3), order=2, examples=3)
    """
    _validate(fn, order, modes, examples, seed, {"rtol": rtol, "atol": atol})
    hypothesis = require_hypothesis()
    captured = find_captured(fn)
    if not _has_variables(inputs) and not any(c.checked for c in captured):
        raise ValueError(
            "check_gradients: neither inputs nor fn holds a floating-point or complex tensor to "
            f"differentiate; inputs is {type(inputs).__name__}"
        )
    run = _Run(fn, captured, order, tuple(modes), Tolerance(rtol, atol))
    with torch.enable_grad(), widened(captured):
        _search_layouts(hypothesis, inputs, run, examples, seed)
        if run.failure is not None:
            finding, case = run.failure
            finding = finding.locate() if finding.locate else finding
    if run.failure is not None:
        raise finding.exception(f"check_gradients({run.name})", case, seed, run.tried)
    if run.error is not None:
        raise run.error
    run.conclude()


class _Run:
    """Judges cases; remembers the last failure, which after shrinking is the smallest."""

    def __init__(
        self,
        fn: Callable[..., Any],
        captured: list[Captured],
        order: int,
        modes: tuple[str, ...],
        tolerance: Tolerance,
    ) -> None:
        self.fn, self.captured, self.order, self.modes = fn, captured, order, modes
        self.tolerance = tolerance
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self.failure: tuple[Finding, str] | None = None
        self.error: Exception | None = None
        self.tried = self.judged = self.unsettled = self.connected = 0
        self.after_failure = 0
        self.layout = 0
        self.verdicts: dict[str, tuple[Finding, str] | Exception | None] = {}

    def __call__(self, case: tuple[Any, int]) -> bool:
        """Whether the case lies in the domain; raises GradientMismatch when it fails.

        After a failure only failures of the same kind count, so that shrinking does not change the
        subject, and every verdict is kept, so that it does not change its mind.
        """
        arguments, probe = case
        leaves, spec = pytree.tree_flatten(arguments)
        leaves = [_leaf(i, leaf, len(leaves)) for i, leaf in enumerate(leaves)]
        key = f"{self.layout} {_fingerprint(leaves, probe)}"
        if key not in self.verdicts:
            failed = self.failure is not None or self.error is not None
            self.after_failure += failed
            if failed and self.after_failure > _SHRINK_CASES:
                return True
            self.tried += 1
            self.verdicts[key] = self._judge(leaves, spec, probe)
        verdict = self.verdicts[key]
        if isinstance(verdict, Exception):
            self.error = verdict
            raise GradientMismatch
        if verdict is None:
            return True
        if verdict[0].mode == "domain":
            return False
        if self.failure is None or self.failure[0].kind == verdict[0].kind:
            self.failure = verdict
            raise GradientMismatch
        return True

    def conclude(self) -> None:
        """Errors that only all cases together show."""
        if not self.judged:
            raise ValueError(
                f"check_gradients({self.name}): no drawn case gave finite outputs. Draw inputs "
                "from fn's domain, as ctorch.testing.tensors(shape, low=0.1, high=10.0) does"
            )
        if not self.connected:
            raise ValueError(
                f"check_gradients({self.name}): fn returns no differentiable output: no tensor of "
                "what it returns depends on its inputs or parameters"
            )
        if 2 * self.unsettled > self.judged:
            raise GradientMismatch(
                f"check_gradients({self.name}): finite differences did not settle in "
                f"{self.unsettled} of {self.judged} cases, so nothing could be judged: fn is not "
                "smooth at this scale, computes in low precision inside, or follows a tolerance "
                "(an adaptive solve: tighten it or freeze its steps)"
            )

    def _judge(
        self, leaves: list[Any], spec: Any, probe: int
    ) -> tuple[Finding, str] | Exception | None:
        """The finding with its printed case, what ``fn`` itself raised, or None: all is well."""
        try:
            finding = self._check(System(self.fn, leaves, spec, self.captured, probe), probe)
        except Exception as error:
            if sys.version_info >= (3, 11):
                case = self._describe(leaves)
                error.add_note(f"raised within check_gradients, at or near this case:\n{case}")
            return error
        if finding is None:
            return None
        return finding, self._describe(leaves)

    def _check(self, system: System, probe: int) -> Finding | None:
        outside = _check_values(system, self.tolerance)
        if outside is not None:
            return outside
        check = Check(system, self.tolerance, probe, self.layout)
        self.judged += 1
        self.unsettled += not check.settled()
        for mode in self.modes:
            finding = MODES[mode](check)
            if finding is not None:
                return finding
        self.connected += _connected(check)
        if self.order == 2 and _connected(check):
            second = Check(
                GradientSystem(system, cotangent_leaves(check)),
                self.tolerance,
                probe + 1,
                self.layout,
            )
            for mode in self.modes:
                finding = MODES[mode](second)
                if finding is not None:
                    return finding
        return None

    def _describe(self, leaves: list[Any]) -> str:
        lines = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Leaf):
                lines.append(describe(leaf.name, leaf.view(leaf.storage)))
            else:
                lines.append(f"  {_name(i, len(leaves))}: {leaf!r}")
        lines += [describe(c.name, c.tensor) for c in self.captured if c.checked]
        return "\n".join(lines)


def _check_values(system: System, tolerance: Tolerance) -> Finding | None:
    """The function alone: finite, reproducible, and the same for every memory layout."""
    n = system.input_count

    def dense(shift: float) -> list[Tensor]:
        views = [
            leaf.view(x).contiguous().clone()
            for leaf, x in zip(system.inputs, system.point, strict=False)
        ]
        return [
            y.detach().clone() for y in system.eager([(v + shift).requires_grad_() for v in views])
        ]

    expected = dense(0.0)
    if not all(bool(torch.isfinite(y).all()) for y in expected):
        return Finding("domain", 1, "", "")
    once, twice = dense(1e-3), dense(1e-3)  # at zero, a random factor would not show
    laid_out = system.at(system.point)
    cases = (
        (twice, once, "fn is not deterministic: two evaluations of one input differ", 1e-9),
        (
            laid_out,
            expected,
            "fn gives other values for the same numbers in another memory layout",
            tolerance.rtol,
        ),
    )
    for found, wanted, text, rtol in cases:
        for k, (y, y0) in enumerate(zip(found, wanted, strict=True)):
            gap = torch.nan_to_num((y - y0).abs(), nan=0.0 if wanted is once else torch.inf)
            allowed = 1e-12 + rtol * torch.nan_to_num(y0.abs()).max()
            if not bool((gap <= allowed).all()):
                worst = int(gap.argmax())
                return Finding(
                    "value",
                    1,
                    ", ".join(system.names[:n]),
                    f"{text} (output {k})",
                    y.reshape(-1)[worst].item(),
                    y0.reshape(-1)[worst].item(),
                    float(gap.reshape(-1)[worst]),
                    float(allowed),
                )
    return None


def _connected(check: Check) -> bool:
    """Whether any output moves with any variable."""
    return any(
        bool((d.abs() > e + check.tolerance.atol).any())
        for probe in check.probes
        for d, e in zip(probe.difference.value, probe.difference.error, strict=True)
    ) or any(
        y.requires_grad
        for y in check.system.eager(check.system.leaves()[: check.system.input_count])
    )


def _search_layouts(hypothesis: Any, inputs: Any, run: _Run, examples: int, seed: int) -> None:
    """One search per memory layout: left to chance, a layout might never be drawn."""
    count = len(LAYOUTS)
    shares = [examples // count + (k < examples % count) for k in range(count)]
    for run.layout, share in enumerate(shares):
        if share and run.failure is None and run.error is None:
            _search(hypothesis, _cases(inputs, run.layout), run, share + 1, seed)


def _search(
    hypothesis: Any, strategy: SearchStrategy[Any], run: _Run, examples: int, seed: int
) -> None:
    """Lets hypothesis draw cases until one fails, and shrink it."""

    def cases(case: tuple[Any, int]) -> None:
        if not run(case):
            hypothesis.reject()

    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    test = settings(hypothesis.seed(seed)(hypothesis.given(strategy)(cases)))
    try:
        test()
    except (GradientMismatch, hypothesis.errors.Unsatisfiable):
        return  # what was found lies in run
    except hypothesis.errors.Flaky:
        if run.failure is None and run.error is None:
            raise


def _cases(inputs: Any, layout: int) -> SearchStrategy[tuple[Any, int]]:
    """A strategy for (arguments, probe seed); the tensors among the inputs get other layouts."""
    st = require_hypothesis().strategies
    leaves, spec = _flatten(inputs)
    parts = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, st.SearchStrategy):
            parts.append(leaf)
        elif _can_vary(leaf):
            name = LAYOUTS[1 + (layout - 1 + i) % (len(LAYOUTS) - 1)] if layout else LAYOUTS[0]
            shape, dtype = tuple(leaf.shape), leaf.dtype
            parts.append(tensors(shape, dtype=dtype, device=leaf.device, layouts=(name,)))
        else:
            parts.append(st.just(leaf))
    drawn = st.tuples(*parts).map(lambda items: pytree.tree_unflatten(list(items), spec))
    return st.tuples(drawn, st.integers(0, 2**16))


def _flatten(inputs: Any) -> tuple[list[Any], Any]:
    strategy = require_hypothesis().strategies.SearchStrategy
    arguments = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    return pytree.tree_flatten(arguments, is_leaf=lambda x: isinstance(x, strategy))


def _has_variables(inputs: Any) -> bool:
    strategy = require_hypothesis().strategies.SearchStrategy
    return any(isinstance(x, strategy) or _can_vary(x) for x in _flatten(inputs)[0])


def _can_vary(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _leaf(i: int, value: Any, count: int) -> Any:
    if _can_vary(value):
        return Leaf.of(_name(i, count), widen(value)) if value.numel() else value
    return value


def _name(i: int, count: int) -> str:
    return f"input {i}" if count > 1 else "input"


def _fingerprint(leaves: list[Any], probe: int) -> str:
    digest = hashlib.sha256(str(probe).encode())
    for leaf in leaves:
        if isinstance(leaf, Leaf):
            digest.update(repr((leaf.shape, leaf.stride, leaf.offset)).encode())
            digest.update(leaf.storage.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _validate(
    fn: Any,
    order: int,
    modes: Sequence[str],
    examples: int,
    seed: int,
    tolerances: dict[str, float],
) -> None:
    if not callable(fn):
        raise TypeError(f"check_gradients: fn must be callable, got {type(fn).__name__}")
    if order not in (1, 2):
        raise ValueError(f"check_gradients: order must be 1 or 2, got {order!r}")
    if isinstance(modes, str) or not modes or not set(modes) <= set(MODES):
        raise ValueError(
            f"check_gradients: modes must be a tuple of any of {tuple(MODES)}, got {modes!r}"
        )
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ValueError(
            f"check_gradients: examples must be an integer from 1 on, got {examples!r}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"check_gradients: seed must be an integer, got {seed!r}")
    for name, value in tolerances.items():
        if not 0 <= value < math.inf:
            raise ValueError(
                f"check_gradients: {name} must be a number from 0 on, and finite, got {value!r}"
            )
