"""Calls of a compiled solve of one sample that differ by nothing but addresses."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

from torch import Tensor

from ctorch.ode.native_task import Task
from ctorch.ops._direct import empty_strided

_TIMES = Task.t.offset  # the address of the times; then their stride, and those of y0 and the rows
_OWN = Task.own.offset
_addresses = struct.Struct("4Q")
_address = struct.Struct("Q")
_seven = struct.Struct("7q")


class Again:
    """A compiled solve on the CPU of one sample with one step for all of it.

    Args:
        function: it; returns how many samples failed.
        settings: its task without arrays.
        dim: numbers in the state.
        rows: an example of the rows that it makes, [T, *y0].
        shared: how many arrays it reads.
    """

    def __init__(
        self, function: Callable[[int], int], settings: bytes, dim: int, rows: Tensor, shared: int
    ) -> None:
        self._function = function
        self._form = tuple(rows.shape), rows.new_empty(rows.shape).stride(), rows.dtype
        self._arrays = struct.Struct(f"{shared}Q")
        self._settings, self._dim, self._count = settings, dim, len(rows)
        self._counts = len(settings) + self._arrays.size
        # tasks that no thread uses now
        self._tasks: list[tuple[ctypes.Array[ctypes.c_char], int]] = []

    def __call__(
        self, y0: Tensor, t: Tensor, own: Tensor | None, shared: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[int, ...], int]:
        """Make the call; arrays as for ``native.execute``; returns what an ``Outcome`` holds."""
        rows = empty_strided(*self._form)
        try:
            kept = self._tasks.pop()
        except IndexError:
            kept = self._task()
        memory, address = kept
        _addresses.pack_into(memory, _TIMES, t.data_ptr(), 0, y0.data_ptr(), rows.data_ptr())
        if own is not None:
            _address.pack_into(memory, _OWN, own.data_ptr())
        self._arrays.pack_into(memory, len(self._settings), *map(_data_ptr, shared))
        failed = self._function(address)
        numbers = _seven.unpack_from(memory, self._counts)
        self._tasks.append(kept)
        return rows, numbers, failed

    def _task(self) -> tuple[ctypes.Array[ctypes.c_char], int]:
        """A task, and behind it the addresses of shared arrays, and the seven results."""
        memory = ctypes.create_string_buffer(self._counts + _seven.size)
        ctypes.memmove(memory, self._settings, len(self._settings))
        address = ctypes.addressof(memory)
        task, counts = Task.from_buffer(memory), address + self._counts
        task.batch, task.rows, task.threads = 1, self._count, 1
        task.out_sample, task.out_row = self._dim, self._dim
        task.shared = address + len(self._settings)
        task.counts, task.status, task.last = counts, counts + 24, counts + 32
        return memory, address


_data_ptr = Tensor.data_ptr
