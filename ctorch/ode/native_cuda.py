"""Native solves on CUDA: the kernels of a solve, called as compiled solves of the CPU are."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctorch.codegen import Traced, cuda
from ctorch.ode.coefficients import coefficients
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
_STATE, _STEP = 512, 48  # bytes: of JointState at most, of KeptStep
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
    ]


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
        if not task.tape:
            return self._solve(task, None)
        accepted = self._accepted[task.tape] = self._empty(task.batch, torch.int64)
        return self._solve(task, _Tape(accepted=accepted.data_ptr()))

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
        size = ctypes.sizeof(Task)
        pointers = ctypes.string_at(task.shared, 8 * self.shared) if self.shared else b""
        memory = self._empty(size + len(pointers) + ctypes.sizeof(_Tape), torch.uint8)
        task.shared = memory.data_ptr() + size
        task.tape = None if tape is None else task.shared + len(pointers)
        parts = bytes(task) + pointers + bytes(tape or _Tape())
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

    def ct_pull_back(self, task_reference: Any, given_reference: Any) -> None:
        """Make the solve again, with room for its steps, and pull back the rows' cotangents.

        Args:
            task_reference: ``ctypes.byref`` of the ``Task`` that was solved.
            given_reference: of the ``Cotangents``.
        """
        task = Task.from_buffer_copy(task_reference._obj)
        shared = task.shared
        accepted = self._accepted[task.tape]
        begins = torch.zeros(task.batch + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(accepted, 0, out=begins[1:])
        count = int(begins[-1]) + 1  # and one for what must not happen
        again = torch.empty_like(accepted)
        steps = self._empty(count * _STEP, torch.uint8)
        states = self._empty(count * self.dim, self.dtype)
        # what the first solve returned is the caller's
        rows = self._empty(task.batch * task.rows * self.dim, self.dtype)
        numbers = torch.empty((7, task.batch), dtype=torch.int64, device=self.device)
        task.out, task.counts = rows.data_ptr(), numbers.data_ptr()
        task.status, task.last = numbers[3].data_ptr(), numbers[4].data_ptr()
        tape = _Tape(*[x.data_ptr() for x in (again, begins, steps, states)])
        self._solve(task, tape)
        if not torch.equal(again, accepted):
            raise RuntimeError(
                "the solve is made again for its gradient, and took other steps than before: times"
                " or tolerances were changed in place since."
            )
        task.shared = shared
        self._sweep(self._on_device(task, tape), task.batch, given_reference._obj)

    def _sweep(self, memory: Tensor, batch: int, given: Cotangents) -> None:
        wanted: list[int | None] = _array(ctypes.c_void_p, given.shared, self.shared)
        sizes = _array(ctypes.c_int64, given.sizes, self.shared)
        sizes = [size if to else 0 for to, size in zip(wanted, sizes, strict=True)]
        ends = [0, *itertools.accumulate(sizes)]
        count, size = ends[-1], ends[-1] * self.dtype.itemsize
        kernel, launched = self.kernels["ct_pull_back"], 0
        if self.together:
            slots = min(-(-batch // cuda.BLOCK), _MOST_BLOCKS, max(1, _MOST_SUMS // max(size, 1)))
            threads, apart = slots * cuda.BLOCK, (count, 1)
            launched = size if size <= min(kernel.room, _MOST_LAUNCHED) else 0
        else:
            threads = slots = _slots(batch, size)
            apart = 1, slots
        sums = torch.zeros(count * slots, dtype=self.dtype, device=self.device)
        starts = self._numbers(*ends)
        mine = _Cotangents(
            out=given.out, y0=given.y0, own=given.own, t=given.t, times=given.times,
            sums=sums.data_ptr(), slots=slots, starts=starts.data_ptr(), launched=launched > 0,
        )  # fmt: skip
        numbers = torch.frombuffer(bytearray(bytes(mine)), dtype=torch.uint8).to(self.device)
        cuda.launch(kernel, threads, [memory, numbers], launched)
        for to, start, length in zip(wanted, ends, sizes, strict=False):
            if to and length:
                begin = sums.data_ptr() + start * apart[1] * self.dtype.itemsize
                where = self._numbers(slots, *apart, begin, to)
                cuda.launch(self.kernels["ct_add_up"], length * cuda.BLOCK, [where])


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
    traced.verify(made.evaluate)
    return made
