"""Whatever a vector field holds its settings in: a changed one is seen by its address."""

from __future__ import annotations

import collections
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

needs_kernels = pytest.mark.skipif(
    not _kernels.HAS_KERNELS, reason="compiled code compares addresses"
)
STILL = 'extern "C" long still(const void*) { return 0; }'


@needs_kernels
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


class One:
    k = 2.0

    def __init__(self) -> None:
        self.more, self.table = 1.0, collections.OrderedDict(a=1.0, b=2.0)


class Two(One):
    k = 3.0


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [
        lambda held: setattr(held, "__class__", Two),
        lambda held: setattr(held, "__dict__", dict(vars(held))),
        lambda held: held.table.move_to_end("a"),
    ],
    ids=["class", "dict", "order"],
)
def test_what_an_object_is_and_has_is_seen(change: Callable[[One], None]) -> None:
    held = One()
    still = unchanged(lambda t, y: held.k * y * held.more * next(iter(held.table.values())))
    assert still()
    change(held)
    assert not still()
