"""Whatever a vector field holds its settings in: a changed one is seen."""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import dataclasses
import enum
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctorch.codegen import Untraceable, clear, trace
from tests.codegen import imports_within  # noqa: F401 (it adds cases)
from tests.codegen.cases import CASES, Case, case

Y = torch.ones(3, 2, dtype=torch.float64)
SCALE = 2.0


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    clear()
    yield
    clear()


@case
def an_array() -> Case:
    held = array.array("d", [2.0])
    return lambda: held[0], lambda: held.__setitem__(0, 3.0)


@case
def the_type_of_an_array_of_the_same_bytes() -> Case:
    held: dict[str, Any] = {"k": array.array("i", [1])}
    change = {"k": array.array("f", held["k"].tobytes())}
    return lambda: float(held["k"][0]), lambda: held.update(change)


@case
def bytes_that_change() -> Case:
    held = bytearray(b"\x02")
    return lambda: held[0], lambda: held.__setitem__(0, 3)


@case
def a_view_of_memory() -> Case:
    memory = bytearray(b"\x02")
    held = memoryview(memory)
    return lambda: held[0], lambda: memory.__setitem__(0, 3)


@case
def how_a_view_of_memory_reads_it() -> Case:
    held: dict[str, Any] = {"k": memoryview(b"\x01\x00\x00\x00").cast("i")}
    change = {"k": memoryview(b"\x01\x00\x00\x00").cast("f")}
    return lambda: float(held["k"][0]), lambda: held.update(change)


@case
def the_shape_of_a_view_of_memory() -> Case:
    held: dict[str, Any] = {"k": memoryview(bytes(6)).cast("B", (2, 3))}
    change = {"k": memoryview(bytes(6)).cast("B", (3, 2))}
    return lambda: float(held["k"].shape[0]), lambda: held.update(change)


@case
def a_number_of_c() -> Case:
    held = ctypes.c_double(2.0)
    return lambda: held.value, lambda: setattr(held, "value", 3.0)


@case
def an_array_of_c() -> Case:
    held = (ctypes.c_double * 2)(2.0, 1.0)
    return lambda: held[0], lambda: held.__setitem__(0, 3.0)


@case
def a_structure_of_c() -> Case:
    held = type("Held", (ctypes.Structure,), {"_fields_": [("k", ctypes.c_double)]})(2.0)
    return lambda: held.k, lambda: setattr(held, "k", 3.0)


@case
def a_union_of_c() -> Case:
    fields = [("k", ctypes.c_double), ("bits", ctypes.c_int64)]
    held = type("Held", (ctypes.Union,), {"_fields_": fields})(2.0)
    return lambda: held.k, lambda: setattr(held, "k", 3.0)


@case
def a_number_of_numpy() -> Case:
    held = {"k": np.float32(2.0)}
    return lambda: float(held["k"]), lambda: held.update(k=np.float32(3.0))


@case
def the_dtype_of_an_array_of_the_same_bytes() -> Case:
    held: dict[str, Any] = {"k": np.array([1, 0], np.int32)}
    change = {"k": held["k"].view(np.float32)}
    return lambda: float(held["k"][0]), lambda: held.update(change)


@case
def the_shape_of_an_array_of_the_same_bytes() -> Case:
    held = {"k": np.ones((2, 3))}
    return lambda: held["k"].shape[0], lambda: held.update(k=np.ones((3, 2)))


@case
def an_array_of_numpy() -> Case:
    held = np.array([2.0, np.nan])
    return lambda: float(held[0]), lambda: held.__setitem__(0, 3.0)


@case
def the_sign_of_a_zero() -> Case:
    held = np.array([0.0])
    return lambda: float(np.copysign(1, held[0])), lambda: held.__setitem__(0, -0.0)


@case
def an_array_of_records() -> Case:
    held = np.zeros(1, dtype=[("k", "f8")])
    return lambda: float(held["k"][0]), lambda: held.__setitem__("k", 3.0)


@case
def an_array_of_objects() -> Case:
    held = np.array([{"k": 2.0}], dtype=object)
    return lambda: held[0]["k"], lambda: held[0].__setitem__("k", 3.0)


@case
def a_view_of_a_dict() -> Case:
    memory = {"k": 2.0}
    held = types.MappingProxyType(memory)
    return lambda: held["k"], lambda: memory.__setitem__("k", 3.0)


@case
def the_values_of_a_dict() -> Case:
    memory = {"k": 2.0}
    held = memory.values()
    return lambda: max(held), lambda: memory.__setitem__("k", 3.0)


@case
def a_chain_of_dicts() -> Case:
    memory = {"k": 2.0}
    held = collections.ChainMap({}, memory)
    return lambda: held["k"], lambda: memory.__setitem__("k", 3.0)


@case
def the_order_of_a_dict() -> Case:
    held = {"a": 2.0, "b": 3.0}
    return lambda: next(iter(held.values())), lambda: held.update(a=held.pop("a"))


@case
def the_type_of_a_key() -> Case:
    held: dict[Any, float] = {1: 2.0}
    return lambda: 2.0 + isinstance(next(iter(held)), bool), lambda: held.update(
        {True: held.pop(1)}
    )


@case
def what_a_dict_gives_for_missing_keys() -> Case:
    memory = {"k": 2.0}
    held = collections.defaultdict(lambda: memory["k"])
    return lambda: held.default_factory(), lambda: memory.__setitem__("k", 3.0)  # type: ignore[misc]


@case
def a_dict_in_a_list_in_a_dict() -> Case:
    held: dict[str, Any] = {"a": [{"b": 2.0}]}
    return lambda: held["a"][0]["b"], lambda: held["a"][0].__setitem__("b", 3.0)


@case
def a_queue() -> Case:
    held = collections.deque([2.0])
    return lambda: held[0], lambda: held.__setitem__(0, 3.0)


@case
def the_size_of_a_queue() -> Case:
    held = {"q": collections.deque([2.0], maxlen=2)}
    change = {"q": collections.deque([2.0], maxlen=3)}
    return lambda: held["q"].maxlen, lambda: held.update(change)


@case
def a_set() -> Case:
    held = {2.0}
    return lambda: max(held), lambda: held.add(3.0)


@case
def the_type_of_an_element() -> Case:
    held: set[Any] = {1}
    return lambda: 2.0 + isinstance(min(held), bool), lambda: (held.clear(), held.add(True))


@case
def an_object_in_a_set() -> Case:
    member = types.FunctionType((lambda: 0).__code__, {})
    member.k = 2.0  # type: ignore[attr-defined]
    held = {member}
    return lambda: next(iter(held)).k, lambda: setattr(member, "k", 3.0)  # type: ignore[attr-defined]


@case
def a_list_with_attributes() -> Case:
    held = type("Listed", (list,), {})([1.0])
    held.k = 2.0
    return lambda: held.k, lambda: setattr(held, "k", 3.0)


@case
def a_dict_with_attributes() -> Case:
    held = type("Mapped", (dict,), {})(a=1.0)
    held.k = 2.0
    return lambda: held.k, lambda: setattr(held, "k", 3.0)


@case
def a_number_with_attributes() -> Case:
    held = type("Number", (float,), {})(1.0)
    held.k = 2.0
    return lambda: held.k, lambda: setattr(held, "k", 3.0)


@case
def a_tensor_with_attributes() -> Case:
    held = nn.Parameter(torch.ones(2, dtype=torch.float64))
    held.k = 2.0  # type: ignore[attr-defined]
    return lambda: held * held.k, lambda: setattr(held, "k", 3.0)  # type: ignore[attr-defined]


class Settings(NamedTuple):
    k: float

    def scaled(self) -> float:
        return self.k * SCALE


@case
def a_global_that_a_tuple_s_method_names() -> Case:
    held = Settings(1.0)
    memory = globals()
    return held.scaled, lambda: memory.__setitem__("SCALE", memory["SCALE"] + 1)


@dataclasses.dataclass(slots=True)
class Slotted:
    k: float = 2.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    k: float = 2.0


@pytest.mark.parametrize("held", [Slotted(), Frozen()])
def test_a_changed_data_class_is_seen(held: Any) -> None:
    func = lambda t, y: y * held.k  # noqa: E731
    first = trace(func, Y, batched=True)
    object.__setattr__(held, "k", 3.0)
    assert not first.still_valid()


class Kind(enum.Enum):
    A = 1
    B = 2

    @property
    def value_of(self) -> float:
        return float(self.value)


@case
def a_member_of_an_enumeration() -> Case:
    held = {"kind": Kind.A}
    return lambda: held["kind"].value_of, lambda: held.update(kind=Kind.B)


@case
def an_attribute_of_a_member() -> Case:
    kind = enum.Enum("kind", ["A"])
    kind.A.extra = 2.0  # type: ignore[attr-defined]
    return lambda: kind.A.extra, lambda: setattr(kind.A, "extra", 3.0)  # type: ignore[attr-defined]


@case
def an_attribute_of_a_class_of_classes() -> Case:
    meta = type("Meta", (type,), {"k": 2.0})
    held = meta("Held", (), {})
    return lambda: held.k, lambda: setattr(meta, "k", 3.0)  # type: ignore[attr-defined]


@case
def an_attribute_that_hides_that_of_a_base() -> Case:
    base = type("Base", (), {"k": 2.0})
    kind = type("Kind", (base,), {})
    held = kind()
    return lambda: held.k, lambda: setattr(kind, "k", 3.0)  # type: ignore[attr-defined]


@case
def an_attribute_that_a_function_gets() -> Case:
    def held() -> float:
        return getattr(held, "k", 2.0)

    return held, lambda: setattr(held, "k", 3.0)


@case
def a_property() -> Case:
    held = type("Held", (), {"k": property(lambda self: self.inner)})()
    held.inner = 2.0
    return lambda: held.k, lambda: setattr(held, "inner", 3.0)


@case
def what_a_remembered_result_came_from() -> Case:
    memory = {"k": 2.0}

    @functools.lru_cache
    def held() -> float:
        return memory["k"]

    return held, lambda: (memory.update(k=3.0), held.cache_clear())


@case
def a_function_chosen_by_type() -> Case:
    memory = {"k": 2.0}

    @functools.singledispatch
    def held(x: Any) -> float:
        return 1.0

    @held.register
    def _(x: Tensor) -> float:
        return memory["k"]

    return lambda: held(Y), lambda: memory.update(k=3.0)


@case
def a_method_chosen_by_type() -> Case:
    memory = {"k": 2.0}

    class Held:
        @functools.singledispatchmethod
        def get(self, x: Any) -> float:
            return 1.0

        @get.register
        def _(self, x: Tensor) -> float:
            return memory["k"]

        del _

    held = Held()
    return lambda: held.get(Y), lambda: memory.update(k=3.0)


@case
def what_any_type_gives_where_a_method_is_chosen_by_it() -> Case:
    memory = {"k": 2.0}

    class Held:
        @functools.singledispatchmethod
        def get(self, x: Any) -> float:
            return memory["k"]

    held = Held()
    return lambda: held.get(Y), lambda: memory.update(k=3.0)


@case
def a_property_that_is_computed_once() -> Case:
    memory = {"k": 2.0}

    class Held:
        @functools.cached_property
        def k(self) -> float:
            return memory["k"]

    return lambda: Held().k, lambda: memory.update(k=3.0)


@case
def an_argument_of_a_partial() -> Case:
    memory = {"k": 2.0}

    def get(source: dict[str, float]) -> float:
        return source["k"]

    return functools.partial(get, memory), lambda: memory.update(k=3.0)


@case
def an_argument_of_a_partial_method() -> Case:
    memory = {"k": 2.0}

    class Held:
        def get(self, source: dict[str, float]) -> float:
            return source["k"]

        read = functools.partialmethod(get, memory)

    held = Held()
    return lambda: held.read(), lambda: memory.update(k=3.0)


@case
def a_bound_method_of_a_dict() -> Case:
    memory = {"k": 2.0}
    held = memory.get
    return lambda: held("k"), lambda: memory.update(k=3.0)


@case
def another_method_of_a_list() -> Case:
    memory = [1.0, 2.0, 2.0]
    held = {"f": memory.count}
    return lambda: held["f"](2.0), lambda: held.update(f=memory.index)


@case
def a_weak_reference() -> Case:
    target = nn.Identity()
    target.k = 2.0  # type: ignore[assignment]
    held = weakref.ref(target)
    return lambda: held().k, lambda: setattr(target, "k", 3.0)  # type: ignore[union-attr]


@case
def a_context_variable() -> Case:
    held: contextvars.ContextVar[float] = contextvars.ContextVar("held", default=2.0)
    return held.get, lambda: held.set(3.0)


@case
def a_closure_of_a_closure() -> Case:
    k = 2.0

    def inner() -> float:
        return k

    def change() -> None:
        nonlocal k
        k = 3.0

    return lambda: inner(), change


@case
def a_default() -> Case:
    def held(k: float = 2.0, *, more: float = 1.0) -> float:
        return k * more

    return held, lambda: held.__kwdefaults__.update(more=3.0)


@case
def a_global_by_its_name_in_a_string() -> Case:
    memory = globals()
    return lambda: globals()["SCALE"], lambda: memory.__setitem__("SCALE", memory["SCALE"] + 1)


@case
def a_global_that_a_function_within_names() -> Case:
    memory = globals()
    return lambda: (lambda: SCALE)(), lambda: memory.__setitem__("SCALE", memory["SCALE"] + 1)


@case
def a_buffer_that_becomes_a_number() -> Case:
    held = nn.Module()
    held.register_buffer("b", torch.full((2,), 2.0, dtype=torch.float64))
    return lambda: held.b, lambda: (delattr(held, "b"), setattr(held, "b", 3.0))


def test_a_generator_is_refused_by_name() -> None:
    held = iter([2.0] * 100)
    numbers = (x for x in held)
    with pytest.raises(Untraceable, match="numbers is a generator"):
        trace(lambda t, y: y * next(numbers), Y, batched=True)


def test_fresh_objects_of_equal_content_use_the_same_trace() -> None:
    def make() -> Callable[..., Tensor]:
        memory = {"k": 2.0, "a": array.array("d", [1.0])}
        held = types.MappingProxyType(memory)
        pair, table, one = Settings(1.0), np.ones(2), np.float32(1.0)
        return lambda t, y: (
            y * held["k"] * held["a"][0] * pair.scaled() * float(table[0]) * float(one)
        )

    first = trace(make(), Y, batched=True)
    assert trace(make(), Y, batched=True).field is first.field


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_a_change_is_seen(make: Callable[[], Case]) -> None:
    read, change = make()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return y * read()

    first = trace(func, Y, batched=True)
    assert first.still_valid()
    before = func(Y, Y)
    change()
    assert not torch.equal(before, func(Y, Y)), "the case changes nothing"
    assert not first.still_valid()
    assert trace(func, Y, batched=True).field is not first.field
