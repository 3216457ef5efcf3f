"""Native solves on CUDA: the kernels of a solve, called as compiled solves of the CPU are."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctorch.codegen import Traced, cuda
from ctorch.ode.native_source import Form, cuda_source
from ctorch.ode.native_task import Task

_NAMES = ("ct_solve", "ct_eval")
UNCOUNTED = -1


class Library:
    """Stands where the CPU has a compiled library.

    Args:
        kernels: by name.
        shared: how many shared arrays the vector field reads.
        device: where the arrays are.
    """

    def __init__(
        self, kernels: Mapping[str, cuda.Kernel], shared: int, device: torch.device
    ) -> None:
        self.kernels, self.shared, self.device = kernels, shared, device

    def ct_solve(self, reference: Any) -> int:
        """Launch the solve that ``ctypes.byref(task)`` tells of; UNCOUNTED: failures are not."""
        task = Task.from_buffer_copy(reference._obj)
        size = ctypes.sizeof(Task)
        pointers = ctypes.string_at(task.shared, 8 * self.shared) if self.shared else b""
        memory = torch.empty(size + len(pointers), dtype=torch.uint8, device=self.device)
        task.shared = memory.data_ptr() + size
        memory.copy_(torch.frombuffer(bytearray(bytes(task) + pointers), dtype=torch.uint8))
        cuda.launch(self.kernels["ct_solve"], task.batch, [memory])
        return UNCOUNTED

    def evaluate(self, t: Tensor, y: Tensor, own: Tensor, shared: list[Tensor]) -> Tensor:
        """The vector field: t [B], y [B, dim], own [B, own] -> [B, dim]."""
        arrays = [x.to(self.device, y.dtype).contiguous() for x in shared]
        slope = torch.empty_like(y, memory_format=torch.contiguous_format)
        numbers = [len(y), *(x.data_ptr() for x in arrays)]
        memory = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        args = [memory, t.double().contiguous(), y.contiguous(), own.contiguous(), slope]
        cuda.launch(self.kernels["ct_eval"], len(y), args)
        return slope


def library(traced: Traced, form: Form) -> Library:
    """The kernels of a solve, compared with the vector field.

    Raises:
        ctorch.codegen.build.NoCompiler, ctorch.codegen.build.CompileError: they cannot be made.
        ctorch.codegen.Untraceable: they differ from the vector field.
    """
    device = torch.device(form.device)
    kernels = cuda.load(cuda_source(traced.source, form), _NAMES, device)
    made = Library(kernels, len(traced.shared), traced.problem.y[0].device)
    traced.verify(made.evaluate)
    return made
