"""Native solves: vector field and solver compiled together, one call for the whole integration."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch import codegen
from ctorch.codegen import Traced, Untraceable, build
from ctorch.codegen.graph import as_reals
from ctorch.ode import methods
from ctorch.ode.adaptive import PATIENCE
from ctorch.ode.arguments import check_rows
from ctorch.ode.native_outcome import Outcome, batched_run, joint_run
from ctorch.ode.native_source import Form, solve_source
from ctorch.ode.native_task import Task
from ctorch.ode.problem import Problem
from ctorch.ode.run import (
    Run,
)
from ctorch.ode.transforms import transforms_active

if TYPE_CHECKING:
    from ctorch.codegen.trace_verify import PullBack
    from ctorch.ode.native_values import Values
    from ctorch.ode.solve import Request


class Unsupported(NotImplementedError):
    """A solve that cannot be native; the message says why.

    Args:
        message: it.
        functions: those of the user's that cannot be traced, if it is for them.
    """

    def __init__(self, message: str, functions: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.functions = functions


_MODES = (True, False, "try")
_DTYPES = (torch.float32, torch.float64)
_mode: contextvars.ContextVar[bool | str] = contextvars.ContextVar("native", default=False)


@contextlib.contextmanager
def native_solves(mode: bool | str) -> Iterator[None]:
    """Solves inside the block are native unless they say otherwise.

    Args:
        mode: True: every solve is native, or an error says why it cannot be; "try": native where
            possible; False: eager.

    Yields:
        Nothing; when the block ends, the mode before it holds again.

    Raises:
        ValueError: another mode.

    Example:
        >>> import torch, ctorch
        >>> with ctorch.native_solves("try"):
        ...     y = ctorch.odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]))
    """
    token = _mode.set(check_mode(mode))
    try:
        yield
    finally:
        _mode.reset(token)


def check_mode(mode: Any) -> bool | str:
    """The mode given, or (None) the one in force.

    Raises:
        ValueError: it is none.
    """
    if mode is None:
        return _mode.get()
    if mode not in _MODES:
        raise ValueError(f'native must be True, False or "try", but is {mode!r}.')
    return mode


def solve(request: Request) -> tuple[Run, Tensor, Problem] | None:
    """Solve natively; None: it cannot be, a warning said why, and the mode is "try".

    Raises:
        Unsupported, ctorch.codegen.Untraceable, ctorch.codegen.build.NoCompiler: with
        ``native=True``, why it cannot be.
    """
    events = [event.fn for event in request.events]
    functions = (request.func, *events, request.options.get("norm"))
    if request.native == "try" and any(refused(function) for function in functions):
        return None
    try:
        return _solve(request)
    except (Unsupported, Untraceable, build.NoCompiler, build.CompileError) as error:
        if request.native is True:
            raise
        named = (request.func,) if isinstance(error, Untraceable) else ()
        for function in getattr(error, "functions", named):
            with contextlib.suppress(TypeError):  # no weak reference to it, or no hash
                _refused.add(function)
        warnings.warn(f"native: solving eagerly, for {error}", stacklevel=4)
        return None


#: functions that could not be traced: "try" does not try again
_refused: weakref.WeakSet[Any] = weakref.WeakSet()


def refused(func: Any) -> bool:
    """Whether ``func`` was found untraceable, and "try" has warned of it."""
    try:
        return func in _refused
    except TypeError:
        return False


def _solve(request: Request) -> tuple[Run, Tensor, Problem]:
    problem = request.problem()
    check_supported(request, problem)
    layout = request.layout
    state = request.y0 if layout.plain else layout.unpack(problem.y0.detach())
    traced = codegen.trace(
        request.func, state, problem.t.detach(), request.args, batched=layout.batched
    )
    call = call_of(request, problem, traced)
    if request.key is not None:
        from ctorch.ode import native_quick

        native_quick.remember(request.key, call)
    run = call.run()
    return run, run.rows, problem


# -- what can be native
# ------------------------------------------------------------------------------------------


def check_supported(request: Request, problem: Problem) -> None:
    """Raise ``Unsupported`` where a request has no native form, and ``ValueError`` where its times
    are those of another batch.
    """
    if request.layout.batched:
        check_rows(problem.t, problem.y0.shape[0])
    what = _objection(request, problem)
    if what:
        raise Unsupported(f"{what} is not built natively yet: use native=False.")


def _objection(request: Request, problem: Problem) -> str:
    """What of a request has no native form; empty: nothing."""
    layout, method, y0 = request.layout, request.method, problem.y0
    if method not in (methods.ADAPTIVE if layout.batched else (*methods.ADAPTIVE, *methods.FIXED)):
        return f"method {method!r}" + " with batched=True" * layout.batched
    if layout.dtype not in _DTYPES:
        return f"a state of {layout.user_dtype}"
    if layout.device.type not in ("cpu", "cuda"):
        return f"a state on {layout.device}"
    observed = looked_at_for(request, problem)
    if observed and layout.batched:
        return f"{observed} with batched=True"
    if layout.device.type != "cpu" and (request.events or problem.norm is not None):
        what = "events" if request.events else 'a function as options["norm"]'
        return f"{what} on {layout.device}"
    if problem.callbacks:
        return "a callback"
    if not y0.numel():
        return "a state without elements"
    return "a torch.func transform or forward-mode AD" if transforms_active() else ""


def looked_at_for(request: Request, problem: Problem) -> str:
    """For what the steps of a solve have to be looked at; empty: for nothing."""
    if request.events:
        return "events"
    if request.dense:
        return "dense=True"
    stops = request.method in methods.ADAPTIVE and (problem.step_t or problem.jump_t)
    return "step_t or jump_t" if stops else ""


# -- the call
# ------------------------------------------------------------------------------------------


def batch_of(problem: Problem, traced: Traced) -> int:
    """How many samples there are; one where the field mixes them."""
    return problem.y0.shape[0] if traced.field.split else 1


def form_of(
    request: Request, problem: Problem, traced: Traced, batch: int, gradient: bool = False
) -> Form:
    """What the compiled solve of a request is made for."""
    layout = request.layout
    alone = batch == 1
    entry = "solve_joint"
    if request.method in methods.FIXED:
        entry = "solve_fixed"
    elif layout.batched or alone:
        entry = "solve_samples"
    method = request.coefficients()
    numbers = 2 if layout.is_complex else 1
    segments = tuple(numbers * n for n in layout.segments) or (traced.dim,)
    return Form(
        method.tableau.name,
        request.interpolant,
        entry,
        registers_for(batch),
        segments,
        layout.is_complex,
        problem.max_norm,
        problem.tolerances.rtol.dim() > 0,
        gradient,
        str(layout.device),
    )


def registers_for(batch: int) -> int:
    """How many registers the samples may fill side by side."""
    return 0 if batch == 1 else 1 if batch < _MANY else 2


#: samples from which on two registers of them are mostly full
_MANY = 128
_libraries: dict[tuple[str, Form], Any] = {}


def known_library(traced: Traced, form: Form) -> Any:
    """The compiled solve, if this process has it."""
    return _libraries.get((traced.source, form))


def library_of(traced: Traced, form: Form) -> Any:
    """The compiled solve; made where it is not there, and compared with the vector field."""
    library = _libraries.get((traced.source, form))
    if library is None and form.device != "cpu":
        from ctorch.ode import native_cuda

        library = _libraries[traced.source, form] = native_cuda.library(traced, form)
    elif library is None:
        library = build.load(solve_source(traced.source, form))
        pointer = ctypes.c_void_p
        library.ct_solve.restype, library.ct_solve.argtypes = ctypes.c_int64, [pointer]
        if form.gradient:
            library.ct_tape.restype = pointer
            library.ct_free.restype, library.ct_free.argtypes = None, [pointer]
            library.ct_pull_back.restype = None
            library.ct_pull_back.argtypes = [pointer, pointer]
            library.ct_stand_still.restype = None
            library.ct_stand_still.argtypes = [pointer]
        traced.verify(_evaluation(library), _derivative(library, traced, form))
        _libraries[traced.source, form] = library
    return library


def _evaluation(library: ctypes.CDLL) -> Callable[[Tensor, Tensor, Tensor, list[Tensor]], Tensor]:
    """The compiled vector field as a function of t [B], y [B, dim], own [B, own] and shared."""
    evaluate = library.ct_eval
    evaluate.restype, evaluate.argtypes = None, [ctypes.c_int64, *[ctypes.c_void_p] * 5]

    def call(t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
        t, y, own = t.double().contiguous(), y.contiguous(), own.contiguous()
        arrays = [plain(x, y.dtype) for x in shared]
        slope = torch.empty_like(y)
        pointers = (ctypes.c_void_p * len(arrays))(*[x.data_ptr() for x in arrays])
        evaluate(len(y), t.data_ptr(), y.data_ptr(), own.data_ptr(), pointers, slope.data_ptr())
        return slope

    return call


def _derivative(library: Any, traced: Traced, form: Form) -> PullBack | None:
    """The compiled derivative of the vector field, if it is there."""
    if not form.gradient:
        return None
    from ctorch.ode.native_gradient import derivative_of

    def stand_still(task: Task, t: Tensor) -> None:
        library.ct_stand_still(ctypes.byref(task))

    return derivative_of(library, stand_still, traced, form)


def call_of(request: Request, problem: Problem, traced: Traced) -> Call:
    """The call that a request needs."""
    if looked_at_for(request, problem):
        from ctorch.ode.native_observed import ObservedCall

        return ObservedCall(request, problem, traced)
    return Call(request, problem, traced)


def settings(problem: Problem) -> Task:
    """Everything in a task but the arrays."""
    control, tolerances = problem.controller, problem.tolerances
    task = Task(
        p=control.p, i=control.i, d=control.d, safety=control.safety,
        min_factor=control.min_factor, max_factor=control.max_factor,
        never_shrinks=control.never_shrinks, min_step=problem.min_step,
        max_step=problem.max_step, max_steps=problem.max_steps,
        first_step=-1.0 if problem.first_step is None else problem.first_step,
        overshoot=problem.overshoot, perturb=problem.perturb,
        patience=PATIENCE,
    )  # fmt: skip
    if not tolerances.rtol.dim():
        task.rtol, task.atol = tolerances.rtol.item(), tolerances.atol.item()
    return task


def execute(
    function: Callable[[Any], int],
    task: Task,
    sizes: tuple[int, int],
    shape: tuple[int, ...],
    y0: Tensor,
    t: Tensor,
    own: Tensor | None,
    shared: Sequence[Tensor],
    rows_first: bool,
    spare: int = 0,
) -> Outcome:
    """Make the call.

    Args:
        function: the compiled solve; returns how many samples failed, or a negative number.
        task: its settings.
        sizes: samples B, and numbers dim in the state of one.
        shape: of the rows; in memory they are [T, B, dim] or [B, T, dim].
        y0: B * dim numbers, contiguous.
        t: float64, [T] or [B, T], contiguous.
        own: [B, own], contiguous; None: nothing.
        shared: contiguous, of the dtype of y0.
        rows_first: the result is [T, B, dim], not [B, T, dim].
        spare: rows beyond those of the times.
    """
    batch, dim = sizes
    rows, space = t.shape[-1], t.shape[-1] + spare
    out = y0.new_empty(shape)
    numbers: Any
    if batch == 1 and rows_first and y0.is_cpu:
        numbers = _Eight()
        base = ctypes.addressof(numbers)
    else:
        numbers = torch.empty((8, batch), dtype=torch.int64, device=y0.device)
        base = numbers.data_ptr()
    size = 8 * batch
    task.batch, task.rows, task.threads = batch, rows, torch.get_num_threads()
    task.t, task.t_stride = t.data_ptr(), rows if t.dim() == 2 else 0
    task.y0, task.out = y0.data_ptr(), out.data_ptr()
    task.out_sample, task.out_row = (dim, batch * dim) if rows_first else (space * dim, dim)
    task.counts, task.status, task.last = base, base + 3 * size, base + 4 * size
    task.worst = base + 7 * size
    if own is not None:
        task.own = own.data_ptr()
    if shared:
        pointers = _array_of(len(shared))(*[x.data_ptr() for x in shared])
        task.shared = ctypes.addressof(pointers)
    failed = function(ctypes.byref(task))
    if failed < 0:
        failed = int(torch.as_tensor(numbers[3]).count_nonzero())
    return Outcome(out, numbers, failed)


_Eight = ctypes.c_int64 * 8


@functools.lru_cache
def _array_of(count: int) -> type[ctypes.Array[ctypes.c_void_p]]:
    return ctypes.c_void_p * count


class Call:
    """One native solve: the library, the arrays, the settings.

    Attributes:
        request, problem, traced: of the solve.
        gradient: some input requires grad, and a gradient may be asked for.
        batch: how many samples there are.
        y0, t, own, shared: the arrays, as compiled code reads them.
        spare: how many rows there may be beyond those of the times.
    """

    spare = 0

    def __init__(self, request: Request, problem: Problem, traced: Traced) -> None:
        self.request, self.problem, self.traced = request, problem, traced
        layout, own = request.layout, traced.own
        self.batch = batch_of(problem, traced)
        knots = request.knots(problem)  # appends a grid with gradients to the times
        self.gradient = request.differentiates and self._check_gradient(own)
        self.y0 = problem.y0.detach().reshape(self.batch, -1).contiguous()
        self.t = plain(request.t.detach(), torch.float64, layout.device)
        self.own = plain(own.detach(), layout.dtype, layout.device)
        self.shared = [plain(x.detach(), layout.dtype, layout.device) for x in traced.shared]
        self.norm = self._norm()
        self.form = self._form()
        self.library = library_of(traced, self.form)
        self.task = settings(problem)
        if self.norm is not None:
            self.norm.verify(self.library, "ct_norm")
            self.task.norm_shared = ctypes.addressof(self.norm.pointers)
        self._held: list[Any] = []  # what the task points to
        if knots is not None:
            self._give_knots(knots)
        if self.form.tolerances:
            for name in ("rtol", "atol"):
                part = getattr(problem.tolerances, name).reshape(self.batch, -1)
                part = part.repeat_interleave(2 if layout.is_complex else 1, 1).contiguous()
                setattr(self.task, f"{name}s", part.data_ptr())
                self._held.append(part)

    def _form(self) -> Form:
        form = form_of(self.request, self.problem, self.traced, self.batch, self.gradient)
        if self.norm is None:
            return form
        return dataclasses.replace(form, norm=self.norm.source("Norm"))

    def _norm(self) -> Values | None:
        if self.problem.norm is None or self.request.method in methods.FIXED:
            return None
        from ctorch.ode.native_values import norm_of

        return norm_of(self.request, self.problem)

    def _give_knots(self, knots: Callable[[], Iterator[tuple[float, int]]]) -> None:
        ends, given = zip(*knots(), strict=True)
        device = self.y0.device
        grid = torch.tensor(ends, dtype=torch.float64, device=device)
        anchors = torch.tensor(given, dtype=torch.int64, device=device)
        self.task.knots, self.task.knot_count = grid.data_ptr(), len(grid)
        self.task.anchors = anchors.data_ptr()
        self._held += [grid, anchors]

    def _check_gradient(self, own: Tensor) -> bool:
        inputs = (self.problem.y0, self.problem.t, own, *self.traced.shared)
        if not any(x.requires_grad for x in inputs):
            return False
        error = self.traced.field.derivative_error
        if error:
            raise Unsupported(f"the gradient is not built natively, for {error}")
        if self.request.adjoint:
            raise Unsupported(
                'gradient="adjoint" is not built natively: use "checkpoint", which is exact.'
            )
        return True

    def run(self) -> Run:
        """Solve; the rows have their graph where one is wanted."""
        if not self.gradient:
            return self.result(self.make())
        from ctorch.ode.native_gradient import with_gradient

        return with_gradient(self)

    def make(self) -> Outcome:
        """Make the call."""
        batched, y0 = self.request.layout.batched, self.problem.y0
        return execute(
            self.library.ct_solve, self.task, (self.batch, self.y0.shape[1]),
            rows_shape(y0, self.t, batched, self.spare), self.y0, self.t, self.own, self.shared,
            rows_first=not batched, spare=self.spare,
        )  # fmt: skip

    def result(self, outcome: Outcome) -> Run:
        """What came of it, in the user's shapes."""
        made = batched_run if self.request.layout.batched else joint_run
        return made(self.problem, outcome.rows, outcome)


def rows_shape(y0: Tensor, t: Tensor, batched: bool, spare: int = 0) -> tuple[int, ...]:
    """The shape of a solve's rows: [T + spare, *y0], batched [B, T + spare, ..]."""
    shape, rows = y0.shape, t.shape[-1] + spare
    return (shape[0], rows, *shape[1:]) if batched else (rows, *shape)


_CPU = torch.device("cpu")


def plain(x: Tensor, dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """As a compiled solve reads it: real, complex numbers as pairs."""
    if x.dtype is dtype and x.is_contiguous() and x.device == device:
        return x
    return as_reals(x.detach()).to(device, dtype).contiguous()
