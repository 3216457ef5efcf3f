"""What a traced function holds besides its arguments: tensors, found anew at every call, and values
that are part of the traced code, compared at every call.

The objects that a function reaches (closure, globals that it names, attributes, modules, classes of
its objects) are walked once; the walk is then a generated function of straight Python, which
costs some tens of nanoseconds for each value.
"""

from __future__ import annotations

import argparse
import collections
import enum
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctorch._objects import Objects
from ctorch.codegen.guards_counters import only_counts
from ctorch.codegen.guards_parts import ENDING, MEMORY, content, imports, names, parts
from ctorch.codegen.guards_tensors import Held, is_number
from ctorch.codegen.lower_source import Untraceable
from ctorch.ops._direct import same_form

#: More objects than this are not walked.
MANY = 20_000

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format, slice, range, type(Ellipsis), enum.Enum,
)  # fmt: skip
_LIBRARIES = ("torch", "numpy", "ctorch", "builtins", "math", "functools", "itertools", "typing",
              "collections", "operator", "scipy", "abc", "enum", "types", "os", "sys",
              "_pytest")  # fmt: skip
#: Of the standard library's classes, those whose objects are bags of the user's values.
_BAGS = (
    types.SimpleNamespace, argparse.Namespace, collections.UserDict, collections.UserList,
    collections.ChainMap,
)  # fmt: skip
#: of which a user's class may be derived; its objects may have attributes besides
_CONTAINERS = (list, tuple, collections.deque, dict, set, frozenset)
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
#: Of a module, what has no influence on its result.
_BOOKKEEPING = {
    "_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_is_full_backward_hook",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_compiled_call_impl",
    "__doc__", "__module__", "__weakref__", "__dict__", "__annotations__", "__firstlineno__",
    "__static_attributes__", "__parameters__", "__orig_bases__", "__abstractmethods__",
}  # fmt: skip


@dataclass
class Found:
    """A tensor that a function reaches.

    Attributes:
        name: of the variable of the generated function that holds it.
        path: how it is reached, for messages.
    """

    name: str
    path: str
    tensor: Tensor


class Line(NamedTuple):
    """A line of the generated function.

    Attributes:
        text: it.
        path: of the value that it compares, if it does.
        held: it holds in any case where ``Guards.objects`` are what they were.
    """

    text: str
    path: str
    held: bool


class Guards:
    """The values and tensors that a function and its arguments reach.

    Args:
        root: a function, or an object that is called, and a tuple of arguments.

    Attributes:
        tensors: those found.
        values: by path, what is compared.
        objects: those of which most of it hangs.
    """

    def __init__(self, root: tuple[Any, tuple[Any, ...]]) -> None:
        self.tensors: list[Found] = []
        self.values: dict[str, Any] = {}
        self._lines: list[Line] = []
        self._space: dict[str, Any] = {
            "same": same_plain, "content": content, "modules": sys.modules,
        }  # fmt: skip
        self._seen: dict[int, str] = {}
        self._kept: list[Any] = []
        self._codes: set[types.CodeType] = set()
        self._modules: set[tuple[int, frozenset[str]]] = set()
        self._names: set[str] = set()
        self._held: list[tuple[types.ModuleType, str, str]] = []
        self._todo: collections.deque[tuple[Any, str, str, bool]] = collections.deque()
        self.objects = Objects()
        self._add(root[0], "root[0]", "func", held=True)
        self._add(root[1], "root[1]", "args", held=True)
        self._walk()

    def checker(
        self, used: Iterable[Tensor], without: Iterable[str] = ()
    ) -> Callable[[Any], list[Tensor] | None]:
        """A function that returns the tensors ``used``, as another root holds them; None where one
        of its values differs.
        """
        skipped = set(without)
        by_id = {id(found.tensor): found for found in self.tensors}
        chosen = [by_id[id(x)] for x in used]
        lines = _shortened([x.text for x in self._lines if x.path not in skipped])
        lines += self._unlike(chosen)
        for k, found in enumerate(chosen):
            lines += self._together(found)
            if not is_number(found.tensor):
                lines.append(self._same_content(found, f"h{k}"))
        return self._function_of("root", lines, f"[{', '.join(x.name for x in chosen)}]")

    def unchanged(self, used: Sequence[Tensor]) -> Callable[[], bool]:
        """A function that tells, where ``self.objects`` are what they were when walked, whether all
        else that was found is: the same objects, not only equal ones. It does not look at the form
        of tensors; those that are not ``used`` as numbers are compared by content.

        Raises:
            KeyError: a tensor that is used was not found.
        """
        for number, item in enumerate(self._kept):
            self._space[f"v{number}"] = item
            self._space[f"v{number}d"] = getattr(item, "__dict__", None)
        lines = [_compared(x.text) for x in self._lines if not x.held]
        by_id = {id(found.tensor): found for found in self.tensors}
        for tensor in used:
            lines += self._together(by_id[id(tensor)])
        for k, found in enumerate(self.tensors):
            if not is_number(found.tensor):
                lines.append(self._same_content(found, f"w{k}"))
        check = self._function_of("", lines, "True")
        return lambda: check() is True

    def _function_of(self, arguments: str, lines: Iterable[str], result: str) -> Callable[..., Any]:
        body = "\n        ".join([*lines, f"return {result}"])
        text = (
            f"def check({arguments}):\n    try:\n        {body}\n"
            "    except (AttributeError, KeyError, IndexError, TypeError, ValueError):\n"
            "        return None\n"
        )
        exec(compile(text, "<guards>", "exec"), self._space)
        check: Callable[..., Any] = self._space["check"]
        return check

    def _same_content(self, found: Found, name: str) -> str:
        self._space[name] = Held(found.tensor)
        return f"if not {name}.holds({found.name}): return None"

    def _together(self, found: Found) -> Iterator[str]:
        """Tensors that share memory with a used one go on doing so."""
        storage = found.tensor.untyped_storage()._cdata
        for other in self.tensors:
            if other is not found and other.tensor.untyped_storage()._cdata == storage:
                gap = other.tensor.data_ptr() - found.tensor.data_ptr()
                yield (
                    f"if {other.name}.data_ptr() - {found.name}.data_ptr() != {gap}: return None"
                )

    def _unlike(self, chosen: Sequence[Found]) -> list[str]:
        """Lines for tensors of another kind than were found."""
        lines = []
        for found in chosen:
            tensor, name = found.tensor, found.name
            elsewhere = f"{name}.device != {self._constant(tensor.device)}"
            lines.append(
                f"if {name}.shape != {self._constant(tensor.shape)}"
                f" or {name}.dtype is not {self._constant(tensor.dtype)}"
                f" or {name}.requires_grad is not {tensor.requires_grad}"
                f" or {f'not {name}.is_cpu' if tensor.is_cpu else elsewhere}: return None"
            )
        check = same_form([found.tensor for found in chosen])
        if check is None:
            return lines
        self._space["same_form"] = check
        names = ", ".join(found.name for found in chosen)
        return [f"if not same_form({names}):", *(f"    {line}" for line in lines)]

    def changed(self, later: Guards) -> list[str]:
        """Paths whose values differ in a later walk.

        Raises:
            Untraceable: one of them is used for more than counting.
        """
        paths = [
            path for path in {**self.values, **later.values}
            if path not in self.values or path not in later.values
            or not same_plain(self.values[path], later.values[path])
        ]  # fmt: skip
        for path in paths:
            if not only_counts(path, self._codes):
                raise Untraceable(
                    f"{path} is changed by each call of func, so that its result may depend on how "
                    "often it was called: keep state out of the vector field."
                )
        return paths

    # ---- the walk

    def _walk(self) -> None:
        """Visit all that is reached, and of modules that objects hold what any function names."""
        known = -1
        while known < len(self._names):
            known = len(self._names)
            for held in self._held:
                self._global(*held, frozenset(self._names))
            while self._todo:
                self._visit(*self._todo.popleft())
                if len(self._seen) > MANY:
                    raise Untraceable(
                        f"func reaches more than {MANY} Python objects, whose values would be "
                        "compared at every call: let it hold only what it computes with."
                    )

    def _add(self, item: Any, access: str, path: str, held: bool = False) -> None:
        self._todo.append((item, access, path, held))

    def _line(self, line: str, path: str = "", held: bool = False) -> None:
        self._lines.append(Line(line, path, held))

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._space)}"
        self._space[name] = value
        return name

    def _visit(self, item: Any, access: str, path: str, held: bool) -> None:
        mine = not _is_library(type(item).__module__)
        if isinstance(item, _PLAIN) and not (mine and isinstance(item, enum.Enum)):
            self._plain(item, access, path, held)
            if not mine:
                return
        if id(item) in self._seen:
            self._line(f"if {access} is not {self._seen[id(item)]}: return None", held=held)
            return
        name = f"v{len(self._seen)}"
        self._seen[id(item)] = name
        self._kept.append(item)
        self._line(f"{name} = {access}", held=held)
        if isinstance(item, (*_PLAIN, *_CONTAINERS)):
            self._container(item, name, path)
            if mine:
                self._attributes(item, name, path)
        elif isinstance(item, Tensor):
            self.tensors.append(Found(name, path, item))
            for key, value in getattr(item, "__dict__", {}).items():
                self._add(value, f"{name}.__dict__[{key!r}]", f"{path}.{key}")
        elif isinstance(item, MEMORY):
            self._line(f"if content({name}) != {self._constant(content(item))}: return None")
            if isinstance(item, np.ndarray) and item.dtype == np.dtype(object):
                for i, x in enumerate(item.flat):
                    self._add(x, f"{name}.flat[{i}]", f"{path}.flat[{i}]")
        elif isinstance(item, types.FunctionType) and not _is_library(item.__module__):
            self._function(item, name, path)
        elif isinstance(item, types.ModuleType):
            self._held.append((item, name, path))
            self._global(item, name, path, frozenset(self._names))
        elif isinstance(item, ENDING):
            raise Untraceable(
                f"{path} is a {type(item).__name__}, which gives another value at every use: keep "
                "state out of the vector field."
            )
        elif isinstance(item, types.MappingProxyType):
            self._keys(item, name)
            self._dict(item, name, path)
        elif (reached := parts(item)) is not None:
            self._line(f"if type({name}) is not {self._constant(type(item))}: return None")
            for value, way in reached:
                self._add(value, name + way, path + way)
        elif isinstance(item, type):
            self._line(f"if {name} is not {self._constant(item)}: return None", held=True)
            self._class(item, name, path)
        else:
            self._object(item, name, path)

    def _container(self, item: Any, name: str, path: str) -> None:
        if isinstance(item, (list, tuple, collections.deque)):
            self._sequence(item, name, path)
            if isinstance(item, collections.deque):
                self._line(f"if {name}.maxlen != {item.maxlen}: return None")
        elif isinstance(item, dict):
            self._keys(item, name)
            self._dict(item, name, path)
            if isinstance(item, collections.defaultdict):
                self._add(item.default_factory, f"{name}.default_factory", f"{path}'s default")
        elif isinstance(item, (set, frozenset)):
            self._line(f"if {name} != {self._constant(set(item))}: return None")
            kinds = self._constant({(type(x), x) for x in item})
            self._line(f"if {{(type(x), x) for x in {name}}} != {kinds}: return None")
            for x in item:
                if not isinstance(x, _PLAIN):
                    self._add(x, self._constant(x), f"{path}'s elements")

    def _keys(self, item: Any, name: str) -> None:
        """In their order, and of their types."""
        keys, held = tuple(item), self.objects.hold(item)
        known = self._constant(keys)
        if not all(type(key) is str for key in keys):
            self._line(f"if not same(tuple({name}), {known}): return None", held=held)
        elif len(keys) > 1:
            self._line(f"if tuple({name}) != {known}: return None", held=held)

    def _plain(self, item: Any, access: str, path: str, held: bool) -> None:
        self.values[path] = item
        if item is None or item is True or item is False or item is Ellipsis:
            self._line(f"if {access} is not {item}: return None", path, held)
        else:
            self._unequal(access, item, path, held)

    def _unequal(self, access: str, item: Any, path: str, held: bool) -> None:
        """The line for another value than was found; mostly it is the same object."""
        known = self._constant(item)
        line = f"if (x := {access}) is not {known} and not same(x, {known}): return None"
        self._line(line, path, held)

    def _function(self, item: types.FunctionType, name: str, path: str) -> None:
        self._line(f"if {name}.__code__ is not {self._constant(item.__code__)}: return None")
        self._codes.add(item.__code__)
        used = frozenset(names(item.__code__))
        self._names |= used
        if item.__defaults__:
            self._add(item.__defaults__, f"{name}.__defaults__", f"{path}'s defaults")
        if item.__kwdefaults__:
            self._add(item.__kwdefaults__, f"{name}.__kwdefaults__", f"{path}'s defaults")
        if item.__dict__:
            self._add(item.__dict__, f"{name}.__dict__", path)
        else:
            held = self.objects.has(item, item.__dict__) and self.objects.hold(item.__dict__)
            self._line(f"if {name}.__dict__: return None", held=held)
        free = item.__code__.co_freevars
        for i, cell in enumerate(item.__closure__ or ()):
            try:
                content = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            self._global(content, f"{name}.__closure__[{i}].cell_contents", free[i], used)
        for key in sorted(used & item.__globals__.keys()):
            self._global(item.__globals__[key], f"{name}.__globals__[{key!r}]", key, used)
        package = item.__globals__.get("__package__") or ""
        for key in dict.fromkeys(imports(item.__code__, package)):
            if key in sys.modules:
                self._global(sys.modules[key], f"modules[{key!r}]", key, used)

    def _global(self, item: Any, access: str, path: str, used: frozenset[str]) -> None:
        """A variable from outside a function; of a module what the function names."""
        if not isinstance(item, types.ModuleType):
            self._add(item, access, path)
            return
        self._line(f"if {access} is not {self._constant(item)}: return None")
        if _is_library(item.__name__) or (id(item), used) in self._modules:
            return
        self._modules.add((id(item), used))
        for key in sorted(used & item.__dict__.keys()):
            if not key.startswith("__"):
                self._global(item.__dict__[key], f"{access}.{key}", f"{path}.{key}", used)

    def _sequence(self, item: Any, name: str, path: str) -> None:
        held = type(item) is tuple  # which never changes
        self._line(f"if type({name}) is not {self._constant(type(item))}: return None", held=held)
        if all(isinstance(x, (bool, int, float, str)) for x in item):
            self.values[path] = tuple(item)
            self._unequal(f"tuple({name})", tuple(item), path, held)
            return
        self._length(item, name, path, held)
        for i, x in enumerate(item):
            self._add(x, f"{name}[{i}]", f"{path}[{i}]", held)

    def _length(self, item: Any, name: str, path: str, held: bool) -> None:
        self.values[f"len({path})"] = len(item)
        differs = f"len({name}) != {len(item)}" if len(item) else name
        self._line(f"if {differs}: return None", f"len({path})", held)

    def _dict(
        self, item: Mapping[Any, Any], name: str, path: str, skip: Iterable[str] = ()
    ) -> None:
        keys = tuple(key for key in item if key not in skip)
        held = self.objects.hold(item)
        self._length(item, name, path, held)
        for key in keys:
            known = isinstance(key, (str, int, float, bool))
            access = repr(key) if known else self._constant(key)
            attribute = f"{path}.{key}" if isinstance(key, str) and key.isidentifier() else None
            self._add(item[key], f"{name}[{access}]", attribute or f"{path}[{key!r}]", held)

    def _object(self, item: Any, name: str, path: str) -> None:
        kind = type(item)
        held = getattr(item, "__dict__", None)
        module = isinstance(item, torch.nn.Module) and not isinstance(item, torch.jit.ScriptModule)
        opaque = _is_library(kind.__module__) and kind not in _BAGS
        if not module and (opaque or (held is None and not _slots(kind))):
            self._line(f"if {name} is not {self._constant(item)}: return None", held=True)
            return
        if isinstance(item, enum.Enum):
            self._line(f"if {name} is not {self._constant(item)}: return None", held=True)
        self._attributes(item, name, path)

    def _attributes(self, item: Any, name: str, path: str) -> None:
        kind, space = type(item), getattr(item, "__dict__", None)
        held = self.objects.has(item, space)
        self._add(kind, f"type({name})", kind.__qualname__, held)
        if isinstance(space, dict):
            self._line(f"{name}d = {name}.__dict__", held=held)
            self._dict(space, f"{name}d", path, _BOOKKEEPING)
        for slot in _slots(kind):
            if hasattr(item, slot):
                self._add(getattr(item, slot), f"{name}.{slot}", f"{path}.{slot}")

    def _class(self, item: type, name: str, path: str) -> None:
        """What the methods of a user's class use."""
        if not _is_library(type(item).__module__):
            self._add(type(item), f"type({name})", type(item).__qualname__)
        self._line(f"if {name}.__mro__ is not {self._constant(item.__mro__)}: return None")
        for place, base in enumerate(item.__mro__):
            if _is_library(base.__module__):
                continue
            # another attribute may hide one of a base
            space = f"{name}.__mro__[{place}].__dict__"
            held = self.objects.hold(vars(base))
            self._line(f"if len({space}) != {len(vars(base))}: return None", held=held)
            for key, value in list(vars(base).items()):
                if key in _BOOKKEEPING or isinstance(value, _DESCRIPTORS):
                    continue
                access = f"{space}[{key!r}]"
                if isinstance(value, property):
                    value, access = value.fget, f"{access}.fget"
                elif isinstance(value, (staticmethod, classmethod)):
                    value, access = value.__func__, f"{access}.__func__"
                self._add(value, access, f"{path}.{key}", held)


def _compared(line: str) -> str:
    """The line for a name that stands for an object known from before."""
    name, gets, access = line.partition(" = ")
    return f"if {access} is not {name}: return None" if gets and name.isidentifier() else line


def _shortened(lines: Sequence[str]) -> list[str]:
    """Lines without names for what is looked at once and on the spot."""
    uses = collections.Counter(name for line in lines for name in re.findall(r"\bv\d+", line))
    short: list[str] = []
    for line in lines:
        name = line[3:].partition(":")[0]
        known, _, access = short[-1].partition(" = ") if short else ("", "", "")
        if known == name and uses[name] == 2 and line == f"if {name}: return None":
            short[-1] = f"if {access}: return None"
        else:
            short.append(line)
    return short


def same_plain(a: Any, b: Any) -> bool:
    """Equality that tells 1 from 1.0 and -0.0 from 0.0, and holds for NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a.hex() == b.hex() if a != a or not a else a == b
    if isinstance(a, tuple) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(map(same_plain, a, b))
    return bool(a == b)


def _slots(kind: type) -> list[str]:
    if _is_library(kind.__module__):
        return []
    found: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _is_library(module: str | None) -> bool:
    top = (module or "").split(".")[0]
    return top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")
