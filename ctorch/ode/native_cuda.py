"""Native solves on CUDA: the kernels of a solve, called as compiled solves of the CPU are."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctorch.codegen import Traced, cuda
from ctorch.ode.coefficients import coefficients
from ctorch.ode.native_gradient import derivative_of
from ctorch.ode.native_observed import Observation
from ctorch.ode.native_source import (
    Form,
    cuda_gradient_source,
    cuda_source,
    multiplies_together,
)
from ctorch.ode.native_task import Cotangents, Task

UNCOUNTED = -1
#: steps of a joint solve that are launched before it is asked whether it is done
_FIRST_LAUNCHES, _MOST_LAUNCHES = 8, 128
_DONE = 4  # Phase of csrc/native/cuda_joint.h
_FREE = -1  # kFree of csrc/native/task.h
_STATE, _STEP = 512, 56  # bytes: of JointState at most, of KeptStep
#: bytes of the sums that threads or blocks have for themselves in the gradient, and blocks at most
_MOST_SUMS, _MOST_BLOCKS = 256 << 20, 1024
#: bytes of these that a block keeps in shared memory: of more, too few blocks would run at a time
_MOST_LAUNCHED = 32 << 10


class _Tape(ctypes.Structure):
    """``CudaTape`` of csrc/native/cuda_tape.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("accepted", "begins", "steps", "states")]


class _Cotangents(ctypes.Structure):
    """``CudaCotangents`` of csrc/native/cuda_adjoint.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("out", "y0", "own", "t")],
        ("times", ctypes.c_int64),
        ("sums", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("launched", ctypes.c_int64),
        *[
            (name, ctypes.c_void_p)
            for name in ("states", "slopes", "piece_starts", "piece_lengths")
        ],
    ]


class _Observation(ctypes.Structure):
    """``CudaObservation`` of csrc/native/cuda_tape.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("stops", "jumps", "anchors")],
        *[(name, ctypes.c_int64) for name in ("stop_count", "dense")],
    ]


@dataclasses.dataclass
class _Kept:
    """A solve that was made again, with its steps.

    Attributes:
        memory: its task, as kernels read it.
        batch: how many samples there are.
        arrays: to which the task points.
    """

    memory: Tensor
    batch: int
    arrays: list[Tensor]


class Library:
    """Stands where the CPU has a compiled library.

    Args:
        kernels: by name.
        form: what they are made for.
        dim: numbers of the state of a sample.
        dtype: of these.
        shared: how many shared arrays the vector field reads.
        device: where the arrays are.
        together: the gradient is one of blocks, which go through samples together.
    """

    def __init__(
        self,
        kernels: Mapping[str, cuda.Kernel],
        form: Form,
        dim: int,
        dtype: torch.dtype,
        shared: int,
        device: torch.device,
        together: bool = False,
    ) -> None:
        self.kernels, self.form, self.dim, self.dtype = kernels, form, dim, dtype
        self.shared, self.device, self.together = shared, device, together
        self._names = itertools.count(1)
        self._accepted: dict[int, Tensor] = {}  # by tape: how many steps each sample took
        self._standing: dict[int, _Kept] = {}  # by tape: steps of no length
        self._pieces: list[_Kept] = []  # a solve, until its pieces are taken

    def evaluate(self, t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
        """The vector field: t [B], y [B, dim], own [B, own] -> [B, dim]."""
        arrays = [x.to(self.device, y.dtype).contiguous() for x in shared]
        slope = torch.empty_like(y, memory_format=torch.contiguous_format)
        memory = self._numbers(len(y), *(x.data_ptr() for x in arrays))
        args = [memory, t.double().contiguous(), y.contiguous(), own.contiguous(), slope]
        cuda.launch(self.kernels["ct_eval"], len(y), args)
        return slope

    # -- solves

    def ct_solve(self, reference: Any) -> int:
        """Launch the solve that ``ctypes.byref(task)`` tells of; UNCOUNTED: failures are not."""
        task = Task.from_buffer_copy(reference._obj)
        asked = Observation.from_address(task.observation) if task.observation else None
        dense = asked is not None and bool(asked.dense)
        if asked is not None:
            asked.event = asked.nan_event = -1
        if not task.tape and not dense:
            return self._solve(task, None)
        accepted = self._empty(task.batch, torch.int64)
        if task.tape:
            self._accepted[task.tape] = accepted
        failed = self._solve(task, _Tape(accepted=accepted.data_ptr()))
        if asked is not None and dense:
            asked.piece_count = int(accepted[0])
            self._pieces = [self._again(task, accepted)]
        return failed

    def ct_take(self, reference: Any, starts: int, lengths: int, states: int, slopes: int) -> None:
        """Make the pieces of the last solve, and forget it.

        Args:
            reference: ``ctypes.byref`` of the ``Observation``.
            starts, lengths, states, slopes: addresses of the results; the first two on the CPU.
        """
        kept, count = self._pieces.pop(), reference._obj.piece_count
        spans = self._empty(2 * count, torch.float64)
        where = self._numbers(spans.data_ptr(), spans.data_ptr() + 8 * count, states, slopes, count)
        if count:
            cuda.launch(self.kernels["ct_pieces"], count * kept.batch, [kept.memory, where])
        host = spans.cpu()
        for i, to in enumerate((starts, lengths)):
            ctypes.memmove(to, host.data_ptr() + 8 * count * i, 8 * count)

    def _solve(self, task: Task, tape: _Tape | None) -> int:
        memory = self._on_device(task, tape)
        if self.form.entry == "solve_joint":
            return self._solve_joint(task.batch, memory)
        cuda.launch(self.kernels["ct_solve"], task.batch, [memory])
        return UNCOUNTED

    def _solve_joint(self, batch: int, memory: Tensor) -> int:
        blocks, segments = -(-batch // cuda.BLOCK), len(self.form.segments)
        arrays = 2 + coefficients(self.form.method, self.form.interpolant).total
        state = torch.zeros(_STATE // 8, dtype=torch.int64, device=self.device)
        samples = self._empty(arrays * self.dim * batch, self.dtype)
        partials = self._empty(2 * segments * blocks, torch.float64)
        launches = _FIRST_LAUNCHES
        while True:
            for _ in range(launches):
                args = [memory, state, samples, partials]
                cuda.launch(self.kernels["ct_solve"], batch, args)
                cuda.launch(self.kernels["ct_judge"], 1, [memory, state, partials])
            phase, status = state[:2].tolist()
            if phase == _DONE:
                return int(status != 0)
            launches = min(2 * launches, _MOST_LAUNCHES)

    def _on_device(self, task: Task, tape: _Tape | None) -> Tensor:
        """The task, and behind it what it points to on the CPU."""
        task, size = Task.from_buffer_copy(task), ctypes.sizeof(Task)
        pointers = ctypes.string_at(task.shared, 8 * self.shared) if self.shared else b""
        asked = _asked(task)
        memory = self._empty(size + len(pointers) + len(asked) + ctypes.sizeof(_Tape), torch.uint8)
        task.shared = memory.data_ptr() + size
        task.observation = task.shared + len(pointers) if asked else None
        task.tape = None if tape is None else task.shared + len(pointers) + len(asked)
        parts = bytes(task) + pointers + asked + bytes(tape or _Tape())
        memory.copy_(torch.frombuffer(bytearray(parts), dtype=torch.uint8))
        return memory

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def _numbers(self, *numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    # -- gradients

    def ct_tape(self) -> int:
        """The name of a new tape."""
        return next(self._names)

    def ct_free(self, tape: int) -> None:
        """Forget a tape."""
        self._accepted.pop(tape, None)

    def stand_still(self, task: Task, t: Tensor) -> None:
        """Keep on the task's tape a step of no length for each sample, at times [B] and states."""
        begins = torch.arange(task.batch + 1, device=self.device)
        steps = torch.zeros(task.batch + 1, _STEP // 8, dtype=torch.float64, device=self.device)
        steps[:-1, 0] = steps[:-1, 2] = t  # KeptStep: t, h, stop, anchor, ..
        steps.view(torch.int64)[:, 3] = _FREE
        arrays = [torch.ones_like(begins), begins, steps]
        tape = _Tape(*[x.data_ptr() for x in arrays], task.y0)
        self._standing[task.tape] = _Kept(self._on_device(task, tape), task.batch, arrays)

    def ct_pull_back(self, task_reference: Any, given_reference: Any) -> None:
        """Make the solve again, with room for its steps, and pull back the rows' cotangents; of
        steps of no length, what is kept of them.

        Args:
            task_reference: ``ctypes.byref`` of the ``Task`` that was solved.
            given_reference: of the ``Cotangents``.
        """
        task = task_reference._obj
        kept = self._standing.pop(task.tape, None)
        kept = kept or self._again(task, self._accepted[task.tape])
        self._sweep(kept, given_reference._obj)

    def _again(self, task: Task, accepted: Tensor) -> _Kept:
        """Make a solve again, with room for the steps that it took."""
        task = Task.from_buffer_copy(task)
        begins = torch.zeros(task.batch + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(accepted, 0, out=begins[1:])
        count = int(begins[-1]) + 1  # and one for what must not happen
        again = torch.empty_like(accepted)
        steps = self._empty(count * _STEP, torch.uint8)
        states = self._empty(count * self.dim, self.dtype)
        # what the first solve returned is the caller's
        rows = self._empty(task.batch * task.rows * self.dim, self.dtype)
        numbers = torch.empty((8, task.batch), dtype=torch.int64, device=self.device)
        task.out, task.counts = rows.data_ptr(), numbers.data_ptr()
        task.status, task.last = numbers[3].data_ptr(), numbers[4].data_ptr()
        task.worst = numbers[7].data_ptr()
        tape = _Tape(*[x.data_ptr() for x in (again, begins, steps, states)])
        self._solve(task, tape)
        if not torch.equal(again, accepted):
            raise RuntimeError(
                "the solve is made again to keep its steps, and took other steps than before: times"
                " or tolerances were changed in place since."
            )
        return _Kept(self._on_device(task, tape), task.batch, [again, begins, steps, states])

    def _sweep(self, kept: _Kept, given: Cotangents) -> None:
        wanted: list[int | None] = _array(ctypes.c_void_p, given.shared, self.shared)
        sizes = _array(ctypes.c_int64, given.sizes, self.shared)
        sizes = [size if to else 0 for to, size in zip(wanted, sizes, strict=True)]
        ends = [0, *itertools.accumulate(sizes)]
        count, size = ends[-1], ends[-1] * self.dtype.itemsize
        kernel, launched = self.kernels["ct_pull_back"], 0
        if self.together:
            slots = min(
                -(-kept.batch // cuda.BLOCK), _MOST_BLOCKS, max(1, _MOST_SUMS // max(size, 1))
            )
            threads, apart = slots * cuda.BLOCK, (count, 1)
            launched = size if size <= min(kernel.room, _MOST_LAUNCHED) else 0
        else:
            threads = slots = _slots(kept.batch, size)
            apart = 1, slots
        sums = torch.zeros(count * slots, dtype=self.dtype, device=self.device)
        starts = self._numbers(*ends)
        mine = _Cotangents(
            out=given.out, y0=given.y0, own=given.own, t=given.t, times=given.times,
            sums=sums.data_ptr(), slots=slots, starts=starts.data_ptr(), launched=launched > 0,
            states=given.states, slopes=given.slopes,
            piece_starts=given.starts, piece_lengths=given.lengths,
        )  # fmt: skip
        numbers = torch.frombuffer(bytearray(bytes(mine)), dtype=torch.uint8).to(self.device)
        cuda.launch(kernel, threads, [kept.memory, numbers], launched)
        for to, start, length in zip(wanted, ends, sizes, strict=False):
            if to and length:
                begin = sums.data_ptr() + start * apart[1] * self.dtype.itemsize
                where = self._numbers(slots, *apart, begin, to)
                cuda.launch(self.kernels["ct_add_up"], length * cuda.BLOCK, [where])


def _asked(task: Task) -> bytes:
    """What is asked of the steps, for the device; empty: nothing."""
    if not task.observation:
        return b""
    asked = Observation.from_address(task.observation)
    return bytes(
        _Observation(asked.stops, asked.jumps, asked.anchors, asked.stop_count, asked.dense)
    )


def _slots(batch: int, size: int) -> int:
    """How many threads go through the samples, if each has sums of so many bytes for itself."""
    blocks = max(1, _MOST_SUMS // (cuda.BLOCK * max(size, 1)))
    return min(batch, blocks * cuda.BLOCK)


def _array(kind: Any, address: int, count: int) -> list[Any]:
    return list((kind * count).from_address(address)) if count else []


def library(traced: Traced, form: Form) -> Library:
    """The kernels of a solve, compared with the vector field.

    Raises:
        ctorch.codegen.build.NoCompiler, ctorch.codegen.build.CompileError: they cannot be made.
        ctorch.codegen.Untraceable: they differ from the vector field.
    """
    device = torch.device(form.device)
    names = ["ct_solve", "ct_eval", *["ct_judge"] * (form.entry == "solve_joint")]
    names += ["ct_pieces"] * bool(form.events)
    kernels = dict(cuda.load(cuda_source(traced.source, form), names, device))
    together = form.gradient and multiplies_together(traced.source)
    if form.gradient:
        names = ["ct_pull_back", "ct_add_up"]
        gradient = cuda.load(cuda_gradient_source(traced.source, form, together), names, device)
        if gradient["ct_pull_back"].threads < cuda.BLOCK:  # it takes too many registers
            together = False
            gradient = cuda.load(cuda_gradient_source(traced.source, form, False), names, device)
        kernels |= gradient
    y = traced.problem.y[0]
    made = Library(
        kernels, form, traced.dim, traced.field.dtype, len(traced.shared), y.device, together
    )
    traced.verify(
        made.evaluate,
        derivative_of(made, made.stand_still, traced, form) if form.gradient else None,
    )
    return made
