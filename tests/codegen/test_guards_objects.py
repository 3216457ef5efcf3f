"""Whatever a vector field holds its settings in: a changed one is seen by its address."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import pytest
from torch import Tensor

from ctorch.codegen import build
from ctorch.codegen.guards import Guards
from ctorch.ode.native_task import Task
from ctorch.ops import _kernels
from tests.codegen import test_guards_parts  # noqa: F401 (it adds cases)
from tests.codegen.cases import CASES, Case

STILL = 'extern "C" long still(const void*) { return 0; }'


@pytest.mark.skipif(not _kernels.HAS_KERNELS, reason="compiled code compares addresses")
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_a_change_is_seen_by_addresses(make: Callable[[], Case]) -> None:
    read, change = make()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * read()

    still = unchanged(func)
    # (a view of a dict makes its mapping anew each time that it is asked for it)
    fresh = make.__name__ == "the_values_of_a_dict"
    assert still() is not fresh
    assert still() is not fresh
    change()
    assert not still()
    assert unchanged(func)() is not fresh


def unchanged(func: Callable[..., Tensor]) -> Callable[[], bool]:
    """The two halves of the question: the words, which compiled code compares, and the rest."""
    guards = Guards((func, ()))
    words, rest = guards.objects.words(), guards.unchanged([])
    function = ctypes.cast(build.load(STILL).still, ctypes.c_void_p).value
    task = Task(rows=0)
    call = (ctypes.c_char * (16 + ctypes.sizeof(task))).from_buffer_copy(
        struct.pack("2Q", function, words.buffer_info()[0]) + bytes(task)
    )

    def still() -> bool:
        assert len(words) > 1
        assert guards.objects  # alive, as the words
        found = _kernels.library.solve_again(ctypes.addressof(call), 0, 0, 0)
        return rest() and found == (0, 0, 0)

    return still
