"""Recording what a function of tensors computes, operator by operator, as a ``Graph``.

The ids of a complex tensor are those of pairs: [*shape, 2].

The function runs on real tensors while a dispatch mode watches, below autograd: the operators of a
backward pass are seen like those of a forward pass. Each storage has a twin that holds ids, so that
views and writes in place are what they are in PyTorch, without a rule for any of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ctorch.codegen import (
    lower_algebra,
    lower_complex,
    lower_convolution,
    lower_elementwise,
    lower_places,
    lower_structure,
)
from ctorch.codegen.graph import ZERO, Graph, Ids
from ctorch.codegen.lower_algebra import FACTORED, factors_transpose
from ctorch.codegen.lower_complex import Complex
from ctorch.codegen.lower_expression import Expr
from ctorch.codegen.lower_places import BY_VALUE, index_put_by_mask
from ctorch.codegen.lower_source import refuse
from ctorch.codegen.lower_structure import MOVEMENTS, PLACES, SHAPE_ONLY

_COMPOUND: dict[str, Callable[..., Any]] = {
    **lower_structure.RULES,
    **lower_places.RULES,
    **lower_algebra.RULES,
    **lower_convolution.RULES,
}
RULES: dict[str, Callable[..., Any]] = {**lower_elementwise.RULES, **_COMPOUND}


def supported_operators() -> dict[str, list[str]]:
    """Names of the ATen operators that are lowered, by what becomes of them."""
    moved = MOVEMENTS | CONVERSIONS | SHAPE_ONLY
    return {
        "computed, element by element": sorted(lower_elementwise.RULES),
        "reductions, products, algebra, searches": sorted(_COMPOUND),
        "moved, with nothing left to compute": sorted(moved),
        "those of them for complex numbers": sorted(
            lower_complex.RULES.keys() | lower_complex.PARTWISE
        ),
    }


#: What has no fixed sequence of operators.
DATA_DEPENDENT = {
    "_local_scalar_dense": "reads a tensor's value into Python (item(), float(), `if` on a tensor)",
    "is_nonzero": "is a branch on a tensor's value",
    "equal": "compares tensors into a Python bool",
    "nonzero": "has a result whose shape depends on values",
    "masked_select": "has a result whose shape depends on values",
    "_unique2": "has a result whose shape depends on values",
}
#: Questions about shapes and types, and about errors that are looked for only when tracing.
QUESTIONS = {"is_same_size", "_has_same_storage_numel", "_linalg_check_errors"}
#: Methods by which numbers leave PyTorch unseen.
ESCAPES = {"numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "untyped_storage", "item"}
#: Conversions of type or place.
CONVERSIONS = {"_to_copy", "to", "copy"}

_PLACEMENT = {"layout", "device", "pin_memory", "memory_format", "non_blocking", "out"}
_UNLIFTED, _UNKNOWN = -1, -2

#: Called with a tensor from outside: what of its storage is an input, with ids; None: a constant.
Lift = Callable[[Tensor], "list[tuple[Tensor, Ids]] | None"]


class Recorder(TorchDispatchMode):
    """Records what runs within it.

    Args:
        graph: what the record is written to.
        dtype: of the numbers: ``torch.float32`` or ``torch.float64``.
        lift: what becomes of a tensor that comes from outside.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype, lift: Lift) -> None:
        super().__init__()
        self.graph = graph
        self.dtype = dtype
        self._lift = lift
        self._twins: dict[int, Tensor] = {}
        self._constants: set[int] = set()
        self._outside: set[int] = set()
        self._alive: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that torch.compile wants costs an import of seconds

    # ---- what tensors hold

    def give(self, tensor: Tensor, ids: Ids) -> None:
        """Say what a tensor from outside holds."""
        self._outside.add(_key(tensor))
        self._hold(tensor, ids)

    def ids(self, tensor: Tensor) -> Ids:
        """The ids of a tensor that was met, or made, here."""
        if not self.traced(tensor):
            return self.graph.constant_array(tensor)
        ids = self._twin(tensor).numpy().copy()  # what is there may be written over
        if (ids < 0).any():
            refuse("a by-product", "is used that is not lowered", "write it otherwise")
        return self._lazy(tensor, ids)

    def _lazy(self, tensor: Tensor, ids: Ids) -> Ids:
        """The ids of numbers from those in memory, or the other way round: a lazy conjugate or
        negative is the memory of another tensor.
        """
        if tensor.is_conj():
            ids = np.stack([ids[..., 0], self.graph.map("neg", ids[..., 1])], -1)
        return self.graph.map("neg", ids) if tensor.is_neg() else ids

    def traced(self, tensor: Tensor) -> bool:
        """Whether values depend on what the function is given."""
        return _key(tensor) in self._twins

    def meet(self, tensor: Tensor) -> None:
        """See to it that a tensor is known."""
        key = _key(tensor)
        if key in self._constants:
            return
        if key in self._twins and not bool((self._twin(tensor) == _UNLIFTED).any()):
            return
        lifted = self._lift(tensor)
        self._outside.add(key)
        if lifted is None:
            self._made(tensor)
        else:
            for part, ids in lifted:
                self.give(part, ids)

    def _hold(self, tensor: Tensor, ids: Ids | np.ndarray) -> None:
        key = _key(tensor)
        if key not in self._twins:
            self._alive[key] = tensor.untyped_storage()
            size = self._alive[key].nbytes() // tensor.itemsize * _numbers(tensor)
            self._twins[key] = torch.full((size,), _UNLIFTED, dtype=torch.int64)
            self._constants.discard(key)
        twin = self._twin(tensor)
        spread = np.array(np.broadcast_to(ids, tuple(twin.shape)))
        twin.copy_(torch.from_numpy(self._lazy(tensor, spread)))

    def _twin(self, tensor: Tensor) -> Tensor:
        flat = self._twins[_key(tensor)]
        if tensor.is_complex():
            strides = (*(2 * stride for stride in tensor.stride()), 1)
            return flat.as_strided((*tensor.shape, 2), strides, 2 * tensor.storage_offset())
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _made(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key not in self._twins:
            self._alive[key] = tensor.untyped_storage()
            self._constants.add(key)

    def _opened(self, tensor: Tensor) -> None:
        """A tensor of constants is going to be written to: note what is there now."""
        if not self.traced(tensor):
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self._hold(whole, self.graph.constant_array(whole))

    # ---- operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor)]
        for tensor in tensors:
            _check_kind(tensor, name)
            if name == "lift_fresh" and _key(tensor) not in self._alive:
                self._made(tensor)
            self.meet(tensor)
        if torch.Tag.nondeterministic_seeded in func.tags:
            refuse(name, "draws random numbers", "draw them before the solve, give them in args")
        written = _written(func, args, kwargs)
        if any(_key(x) in self._outside for x in written):
            refuse(name, "writes into a tensor from outside", "use an operation out of place")
        if any(x.is_conj() or x.is_neg() for x in written):
            refuse(name, "writes into a lazy conjugate", "use an operation out of place")
        if not any(self.traced(x) for x in tensors):
            return self._constant(func(*args, **kwargs))
        if name in DATA_DEPENDENT:
            refuse(name, DATA_DEPENDENT[name], "use torch.where, or solve without native")
        self.graph.derivative = torch._C._current_autograd_node() is not None
        base = name[:-1] if written and name.endswith("_") else name
        if base in QUESTIONS or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        if base in SHAPE_ONLY and not written:
            return self._constant(func(*args, **kwargs))
        for tensor in written:
            self._opened(tensor)
        pairs = lower_complex.involved(base, pytree.arg_tree_leaves(*args, **kwargs))
        rules = {*lower_complex.RULES, *lower_complex.PARTWISE} if pairs else RULES
        if base not in rules and base not in MOVEMENTS and base not in CONVERSIONS:
            return self._other(func, name, args, kwargs)
        results = self._results(func, base, args, kwargs, pairs)
        out = func(*args, **kwargs)
        # what is moved was checked when it was made; scalars may have a type of their own
        scalars = base == "where" and not any(x.dim() for x in tensors[1:])
        checked = base not in MOVEMENTS and not scalars
        self._keep(written or pytree.tree_leaves(out), results, base, checked)
        return out

    def _constant(self, out: Any) -> Any:
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._made(leaf)
        return out

    def _keep(
        self, tensors: list[Tensor], results: list[Ids | None], name: str, checked: bool = True
    ) -> None:
        results += [None] * (len(tensors) - len(results))
        for tensor, ids in zip(tensors, results, strict=True):
            if not isinstance(tensor, Tensor):
                continue
            if checked:
                self._check_dtype(tensor, name)
            self._hold(tensor, np.full(1, _UNKNOWN) if ids is None else ids)

    def _check_dtype(self, tensor: Tensor, name: str) -> None:
        real = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
        if real.is_floating_point and real != self.dtype and tensor.dim():
            refuse(
                name,
                f"computes in {tensor.dtype} for a state of {self.dtype}",
                "compute in the state's dtype, without autocast or casts",
            )

    def _results(
        self, func: Any, base: str, args: Any, kwargs: Any, pairs: bool
    ) -> list[Ids | None]:
        kwargs = {k: v for k, v in kwargs.items() if k not in _PLACEMENT}
        if base in CONVERSIONS:
            return [self._converted(base, args, kwargs)]
        place = PLACES.get(base)
        by_value = place is not None and self._chosen_by_value(args[place])
        if by_value and (pairs or base not in BY_VALUE):
            refuse(base, "takes places that depend on values", "use torch.where")
        if base in MOVEMENTS and not by_value:
            return self._moved(func, args, kwargs, place)
        partwise = pairs and base in lower_complex.PARTWISE
        rule = self._rule_by_value(base, args[place]) if by_value else RULES.get(base)
        operand: Callable[[Tensor], Any] = self._operand
        if pairs and not partwise:
            rule, operand = lower_complex.RULES[base], self._complex_operand

        def run(operand: Callable[[Tensor], Any]) -> list[Ids | None]:
            operands = [
                x if i == place and not by_value else pytree.tree_map_only(Tensor, operand, x)
                for i, x in enumerate(args)
            ]
            assert rule is not None
            try:
                result = rule(*operands, **pytree.tree_map_only(Tensor, operand, kwargs))
            except (NotImplementedError, TypeError, AttributeError) as error:
                refuse(base, f"is not lowered with these arguments ({error})", "write it otherwise")
            results = result if isinstance(result, tuple) else (result,)
            return [None if x is None else x.ids for x in results]

        if partwise:
            return _stacked([run(functools.partial(self._part_operand, k)) for k in (0, 1)])
        results = run(operand)
        place = FACTORED.get(base, -1)
        factors = results[place]
        if place >= 0 and factors is not None and factors_transpose(func, place, *args, **kwargs):
            results[place] = factors.swapaxes(-1, -2)
        return results

    def _operand(self, x: Tensor) -> Expr | None:
        if self.traced(x) and x.numel() and bool((self._twin(x) == _UNKNOWN).all()):
            return None  # a by-product that is not computed; a rule may not need it
        return Expr(self.graph, self.ids(x))

    def _complex_operand(self, x: Tensor) -> Complex:
        ids = self.ids(x)
        if x.is_complex():
            return Complex.from_ids(self.graph, ids)
        return Complex(self.graph, Expr(self.graph, ids), None)

    def _part_operand(self, part: int, x: Tensor) -> Expr:
        ids = self.ids(x)
        if x.is_complex():
            ids = ids[..., part]
        elif part and x.is_floating_point():
            ids = np.full_like(ids, ZERO)
        return Expr(self.graph, ids)

    def _rule_by_value(self, base: str, places: Any) -> Any:
        if not any(x.dtype == torch.bool for x in pytree.tree_leaves(places) if x is not None):
            return BY_VALUE[base]
        if "put" not in base:
            refuse(base, "has a result whose shape depends on values", "use torch.where")
        return index_put_by_mask

    def _chosen_by_value(self, places: Any) -> bool:
        leaves = pytree.tree_leaves(places)
        return any(isinstance(x, Tensor) and self.traced(x) for x in leaves)

    def _moved(self, func: Any, args: Any, kwargs: Any, place: int | None) -> list[Ids | None]:
        def ids(tensor: Tensor, part: int) -> Tensor:
            held = torch.from_numpy(np.asarray(self.ids(tensor)))
            if self.traced(tensor) and not (tensor.is_conj() or tensor.is_neg()):
                held = self._twin(tensor)  # a view in place of a view
            if tensor.is_complex():
                return held[..., part]
            return torch.full_like(held, ZERO) if part else held.view(tensor.shape)

        def moved(part: int) -> list[Ids | None]:
            given = [
                x if i == place else pytree.tree_map_only(Tensor, lambda x: ids(x, part), x)
                for i, x in enumerate(args)
            ]
            if func._schema.name == "aten::constant_pad_nd" and len(given) == 3:
                value = complex(given[2])
                value = value.imag if part else value.real
                given[2] = self.graph.constant(value) if value else ZERO
            out = func(*given, **kwargs)
            return [x.numpy() for x in pytree.tree_leaves(out)]

        values = pytree.tree_leaves([x for i, x in enumerate(args) if i != place])
        if any(isinstance(x, Tensor) and x.is_complex() for x in values):
            return _stacked([moved(0), moved(1)])
        return moved(0)

    def _converted(self, base: str, args: Any, kwargs: Any) -> Ids:
        source = args[1] if base == "copy" else args[0]
        target = args[0].dtype if base == "copy" else kwargs.get("dtype") or source.dtype
        ids = self.ids(source)
        if source.is_complex() and not target.is_complex:
            ids = ids[..., 0]
        if target.is_complex and not source.is_complex():
            ids = np.stack([ids, np.full_like(ids, ZERO)], -1)
        if target == torch.bool and source.dtype != torch.bool:
            return Expr(self.graph, ids).call("ne", 0.0).ids
        whole = not (target.is_floating_point or target.is_complex)
        if source.dtype.is_floating_point and whole:
            return Expr(self.graph, ids).call("trunc").ids
        return ids

    def _other(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """An operator without a rule of its own: a view, or one that torch can take apart."""
        if func.is_view or name in ("lift_fresh", "unsafe_split", "unsafe_chunk", "_unsafe_view",
                                    "unsafe_split_with_sizes", "_reshape_alias"):  # fmt: skip
            out = func(*args, **kwargs)
            leaves = pytree.tree_leaves(out)
            if not all(self.traced(x) for x in leaves):  # flatten and its like may copy
                self._keep(leaves, self._moved(func, args, kwargs, None), name)
            return out
        with self:
            out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            import torch._decomp as decompositions

            rule = decompositions.decomposition_table.get(func)
            if rule is not None and name not in _OPAQUE:
                return rule(*args, **kwargs)
        given = pytree.arg_tree_leaves(*args, **kwargs)
        kind = " for complex numbers" if lower_complex.involved(name, given) else ""
        return refuse(name, f"has no lowering{kind}", "write it with other operators")


#: Operators whose decomposition in torch calls themselves again, or reads values.
_OPAQUE = {"_cdist_forward"}


class Watch(TorchFunctionMode):
    """Refuses what a recorder cannot see: numbers that leave PyTorch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ESCAPES and args and isinstance(args[0], Tensor):
            with _disable_current_modes():
                self._recorder.meet(args[0])
            if self._recorder.traced(args[0]):
                refuse(f"{name}()", "takes numbers out of PyTorch", "use PyTorch's operators")
        if name == "__getitem__" and len(args) == 2:
            return self._item(func, *args)
        return func(*args, **(kwargs or {}))

    def _item(self, func: Any, x: Tensor, index: Any) -> Any:
        """``x[index]``, of which a scalar tensor that is traced is not read as a number."""
        entries = list(index) if isinstance(index, tuple) else [index]
        places = [i for i, entry in enumerate(entries) if self._traced_scalar(entry)]
        if not places:
            return func(x, index)
        scalars = [entries[i] for i in places]
        for i in places:
            entries[i] = slice(None)
        rest = func(x, tuple(entries))
        for place, scalar in reversed(list(zip(places, scalars, strict=True))):
            dim = _dimension(entries, place, x.dim())
            rest = rest.index_select(dim, scalar.reshape(1)).squeeze(dim)
        return rest

    def _traced_scalar(self, entry: Any) -> bool:
        if not isinstance(entry, Tensor) or entry.dim() or entry.dtype == torch.bool:
            return False
        with _disable_current_modes():
            self._recorder.meet(entry)
        return self._recorder.traced(entry)


def _dimension(entries: Sequence[Any], place: int, dims: int) -> int:
    """Which dimension of ``x[entries]`` the entry at a place, a whole slice, has become."""
    taken = sum(1 for x in entries if x is not None and x is not Ellipsis)
    dim = 0
    for entry in entries[:place]:
        if entry is Ellipsis:
            dim += dims - taken
        elif not isinstance(entry, int):
            dim += 1
    return dim


def _numbers(tensor: Tensor) -> int:
    """How many real numbers an element is."""
    return 2 if tensor.is_complex() else 1


def _stacked(parts: list[list[Ids | None]]) -> list[Ids | None]:
    """Ids of real and imaginary parts as pairs."""
    return [
        None if re is None or im is None else np.stack([re, im], -1)
        for re, im in zip(*parts, strict=True)
    ]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes into."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if i >= len(args) else args[i]
            found += [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
    return found


def _check_kind(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        refuse(name, f"takes a tensor of {tensor.layout} on {tensor.device}", "use a dense tensor")
