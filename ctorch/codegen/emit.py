"""C++ source of a graph's computation: straight lines for small ones, loops for large ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ctorch.codegen import emit_sums as sums
from ctorch.codegen.emit_arrays import Output, Shared
from ctorch.codegen.emit_loops import Access, Piece, Where, affine, pieces
from ctorch.codegen.emit_plan import CONSTANT, TABLE, Allocator, Item, Plan, Step, period
from ctorch.codegen.emit_text import Operand, expression, literal
from ctorch.codegen.graph import Graph, Ids

#: in place of a matrix turned round: it is turned where it is used
_HERE = "static_cast<const real* const*>(nullptr)"


class Body:
    """The statements that compute some outputs.

    Args:
        graph: where they are.
        outputs: what is computed.
        prefix: of the names of tables.
        shared: of the field; what the products here use is added.

    Attributes:
        lines: of C++.
        work: how many lanes of scratch they use.
        tables: declarations of constant arrays, to stand at the top of the function.
    """

    def __init__(
        self, graph: Graph, outputs: Sequence[Output], prefix: str, shared: Shared
    ) -> None:
        self.graph, self.shared = graph, shared
        self.outputs = sums.apart(graph, outputs)
        self.prefix = prefix
        self.lines: list[str] = []
        self.tables: list[str] = []
        self.plan = Plan(graph, [x.ids for x in self.outputs])
        self.steps = self.plan.steps()
        self._allocator = Allocator()
        self._sums = sums.Sums(self)
        self._place_in_outputs()
        last = self._last_uses()
        for number, step in enumerate(self.steps):
            self._allocate(step)
            self._step(step)
            for item in last.get(number, []):
                if item.home[0] == "work":
                    self._allocator.give(item.home[1], item.count)
        for output in self.outputs:
            self._output(output)
        self.work = self._allocator.total

    # ---- arrays

    def pointer(self, item: Item, offset: object = 0) -> str:
        """An address in an item's array."""
        plus = "" if offset in (0, "0", "") else f" + {offset}"
        if item.given:
            index = item.node.index
            at = {"shared": f"[{index}]", "kept": f" + {index}" if index else ""}
            return f"{item.node.op}{at.get(item.node.op, '')}{plus}"
        name, start = item.home
        if item.uniform:
            return f"reinterpret_cast<real*>({name} + {start}){plus}"
        return f"{name} + {start}{plus}"

    def element(self, array: int, place: int) -> Operand:
        """One number."""
        if array == CONSTANT:
            return literal(self.graph.constants.values[place])
        item = self.plan.items[array]
        kind = "number" if item.uniform else "lanes"
        if item.given and item.node.op == "t":
            return Operand("t", kind)
        if item.given or item.stored:
            name = self.pointer(item)
            name = f"({name})" if " " in name else name
            return Operand(f"{name}[{place}]", kind)
        if item.node.logical:
            kind = "mask"
        return Operand(f"v{item.number}_{place}", kind)

    def temporary(self, ids: Ids, lanes: str) -> tuple[str, int]:
        """An array with a copy of numbers: its address and its offset, to be given back."""
        offset = self._allocator.take(ids.size)
        name = f"work + {offset}"
        name = f"reinterpret_cast<real*>({name})" if lanes == "real" else name
        self._copy(name, ids, "write", lanes)
        return name, offset

    def release(self, offset: int, size: int) -> None:
        """Give the places of a temporary array back."""
        self._allocator.give(offset, size)

    def _place_in_outputs(self) -> None:
        """Results that an output takes as they are are computed there."""
        taken: set[int] = set()
        for output in self.outputs:
            if output.mode != "write" or self.plan.straight:
                continue
            where = self.plan.where(output.ids)
            for array in np.unique(where.array):
                item = self.plan.items[array] if array >= 0 else None
                if item is None or item.given or not item.stored or item.uniform:
                    continue
                spots = np.flatnonzero(where.array == array)
                whole = len(spots) == item.count and spots[-1] - spots[0] + 1 == item.count
                if whole and item.number not in taken and item.node.kind != "input":
                    ordered = where.place[spots] == np.arange(item.count)
                    if ordered.all():
                        item.home = (output.pointer, int(spots[0]))
                        taken.add(item.number)

    def _last_uses(self) -> dict[int, list[Item]]:
        last: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            for item in step.items:
                last.setdefault(item.number, number)
                for ids in item.operands:
                    for array in np.unique(self.plan.where(ids).array):
                        if array >= 0:
                            last[int(array)] = number
        self._used_later: set[int] = set()
        for step in self.steps:
            inside = {item.number for item in step.items}
            for item in step.items:
                for ids in item.operands:
                    arrays = np.unique(self.plan.where(ids).array)
                    self._used_later |= {int(a) for a in arrays if int(a) not in inside}
        ends: dict[int, list[Item]] = {}
        for output in self.outputs:
            for array in np.unique(self.plan.where(output.ids).array):
                last.pop(int(array), None)
                self._used_later.add(int(array))
        for array, number in last.items():
            ends.setdefault(number, []).append(self.plan.items[array])
        return ends

    def _allocate(self, step: Step) -> None:
        for item in step.items:
            skipped = len(step.items) > 1 and item.number not in self._used_later
            if item.stored and not item.home[0] and not skipped and not self._sums.takes(item):
                item.home = ("work", self._allocator.take(item.count))

    # ---- steps

    def _step(self, step: Step) -> None:
        first = step.items[0]
        if self._sums.takes(first):
            self._sums.add_product(first)
            return
        if first.straight:
            for item in step.items:
                self._straight(item)
        elif first.node.kind == "map":
            self._loop(step)
        elif first.node.kind == "reduce":
            self._reduction(first)
        else:
            self._product(first)

    def _straight(self, item: Item) -> None:
        lanes = "real" if item.uniform else "V"
        kind = f"const {lanes}" if not item.node.logical else f"const Mask<{lanes}>"
        for i in range(item.count):
            text = self._scalar(item, i, lanes)
            self.lines.append(f"{kind} v{item.number}_{i} = {text};")

    def _scalar(self, item: Item, i: int, lanes: str) -> str:
        node = item.node
        if node.kind == "map":
            operands = [self.number(ids[i]) for ids in item.operands]
            return expression(node.op, node.exponent, operands, lanes)
        if node.kind == "reduce":
            terms = [self.number(x) for x in item.operands[0][i]]
            if node.op in ("add", "mul"):
                sign = " + " if node.op == "add" else " * "
                return sign.join([terms[0].full(lanes), *(x.plain(lanes) for x in terms[1:])])
            text = terms[0].full(lanes)
            for x in terms[1:]:
                text = f"{node.op}({text}, {x.full(lanes)})"
            return text
        a, b = item.operands
        batch, row, column = np.unravel_index(i, node.shape)
        pairs = [
            expression("mul", 0, [self.number(x), self.number(y)], lanes)
            for x, y in zip(a[batch, row], b[batch, :, column], strict=True)
        ]
        return " + ".join(pairs)

    def number(self, number: int) -> Operand:
        """A number of the graph."""
        where = self.plan.where(np.array([number]))
        return self.element(int(where.array[0]), int(where.place[0]))

    # ---- loops of elementwise operators

    def _loop(self, step: Step) -> None:
        inside = {item.number for item in step.items}
        keys: dict[bytes, int] = {}
        wheres: list[Where] = []
        constants: list[Ids] = []
        for item in step.items:
            for ids in item.operands:
                arrays = np.unique(self.plan.where(ids).array)
                if (
                    not (len(arrays) == 1 and int(arrays[0]) in inside)
                    and ids.tobytes() not in keys
                ):
                    keys[ids.tobytes()] = len(wheres)
                    wheres.append(self.plan.operand(ids))
                    constants.append(ids)
        n = step.items[0].count
        shapes = [(n,), *(x.node.shape for x in step.items if math.prod(x.node.shape) == n)]
        lanes = "real" if step.items[0].uniform else "V"
        for piece in pieces(shapes, wheres):
            body = self._reads(piece, constants)
            body += self._members(step, keys, piece)
            self._nest(piece, lanes, body)

    def _reads(self, piece: Piece, constants: list[Ids]) -> list[str]:
        lines = []
        for i, access in enumerate(piece.operands):
            value = self.plan.constant_of(access.array)
            if value is not None:
                lines.append(f"const X u{i} = {literal(value).full('X')};")
                continue
            if access.array == TABLE:
                pointer = self._constant_table(constants[i])
                lines.append(f"const X u{i} = {self._read(pointer, access)};")
                continue
            item = self.plan.items[access.array]
            if (item.given and item.node.op == "t") or (not item.given and not item.stored):
                name = self.element(access.array, access.base)
                text = (
                    name.text if name.kind != "mask" else name.full("real" if item.uniform else "V")
                )
                lines.append(f"const X u{i} = at.wide({text});")
                continue
            lines.append(f"const X u{i} = {self._read(self.pointer(item), access)};")
        return lines

    def _read(self, pointer: str, access: Access) -> str:
        if access.table is not None:
            return f"at.pick({pointer}, {self._int_table(access.table)})"
        start = address(pointer, access)
        return f"at.template read<{access.strides[-1]}>({start})"

    def _members(self, step: Step, keys: dict[bytes, int], piece: Piece) -> list[str]:
        lines = []
        names: dict[int, Operand] = {}
        for item in step.items:
            operands = []
            for ids in item.operands:
                if ids.tobytes() in keys:
                    operands.append(Operand(f"u{keys[ids.tobytes()]}", "lanes"))
                else:
                    operands.append(names[int(self.plan.where(ids[:1]).array[0])])
            text = expression(item.node.op, item.node.exponent, operands, "X")
            kind = "Mask<X>" if item.node.logical else "X"
            name = Operand(f"w{item.number}", "mask" if item.node.logical else "lanes")
            names[item.number] = name
            lines.append(f"const {kind} {name.text} = {text};")
            if item.home[0]:
                start = address(self.pointer(item), piece.own)
                lines.append(
                    f"at.template write<{piece.own.strides[-1]}>({start}, {name.full('X')});"
                )
        return lines

    def _nest(self, piece: Piece, lanes: str, body: list[str]) -> None:
        """A loop over a piece."""
        depth = len(piece.sizes) - 1
        for d, size in enumerate(piece.sizes[:-1]):
            self.lines.append(f"for (long i{d} = 0; i{d} < {size}; ++i{d})" + " {")
        # (the registers of a longer body would not all have room)
        together = len(body) < 12 and any("native::tanh(" in line for line in body)
        most = ", kSideBySide<real>" * together
        self.lines.append(f"sweep<{lanes}, {piece.sizes[-1]}{most}>([&](const auto& at) " + "{")
        self.lines.append("using X = typename std::remove_cvref_t<decltype(at)>::X;")
        self.lines += body
        self.lines.append("});")
        self.lines += ["}"] * depth

    def _constant_table(self, ids: Ids) -> str:
        once = ids.reshape(-1)[: period(ids.reshape(-1))]
        values = ", ".join(literal(self.graph.constants.values[i]).text for i in once)
        return self._table("real", values)

    def _int_table(self, places: Ids) -> str:
        return self._table("int", ", ".join(map(str, places.reshape(-1).tolist())))

    def _table(self, kind: str, values: str) -> str:
        name = f"{self.prefix}_table{len(self.tables)}"
        self.tables.append(f"static constexpr {kind} {name}[] = " + "{" + values + "};")
        return name

    # ---- reductions and products

    def array(
        self, ids: Ids, lanes: bool = False, packed: bool = False
    ) -> tuple[str, tuple[int, ...], int | None, bool]:
        """Numbers [*sizes] in memory.

        Args:
            ids: which.
            lanes: they must be lanes.
            packed: they must be side by side.

        Returns:
            Address, strides, the offset of a copy that was made, and whether they are uniform.
        """
        where = self.plan.operand(ids)
        first = int(where.array.reshape(-1)[0])
        strides = affine(where.place)
        if first >= 0 and strides is not None and (where.array == first).all():
            item = self.plan.items[first]
            fits = not (lanes and item.uniform) and not (
                packed and ids.size > 1 and strides[-1] != 1
            )
            if item.given and item.node.op == "t" and fits:
                return "&t", strides, None, False
            if (item.given or item.stored) and fits:
                start = int(where.place.reshape(-1)[0])
                return self.pointer(item, start), strides, None, item.uniform
        flat = np.ascontiguousarray(ids)
        uniform = all(a < 0 or self.plan.items[a].uniform for a in np.unique(where.array))
        uniform = uniform and not lanes
        name, offset = self.temporary(flat.reshape(-1), "real" if uniform else "V")
        steps = [math.prod(flat.shape[d + 1 :]) for d in range(flat.ndim)]
        return name, tuple(steps), offset, uniform

    def _reduction(self, item: Item) -> None:
        terms = item.operands[0]
        pointer, (outer, inner), copy, _ = self.array(terms, lanes=not item.uniform)
        lanes = "real" if item.uniform else "V"
        binary = "x + y" if item.node.op == "add" else "x * y"
        if item.node.op not in ("add", "mul"):
            binary = f"{item.node.op}(x, y)"
        combine = "[](const auto& x, const auto& y) { return " + binary + "; }"
        count, n = terms.shape
        if item.stored:
            self.lines.append(
                f"reduce_rows<{lanes}, {count}, {n}, {outer}, {inner}>"
                f"({pointer}, {self.pointer(item)}, {combine});"
            )
        else:
            self.lines.append(f"{lanes} v{item.number}_0;")
            self.lines.append(
                f"reduce_rows<{lanes}, {count}, {n}, {outer}, {inner}>"
                f"({pointer}, &v{item.number}_0, {combine});"
            )
        if copy is not None:
            self.release(copy, terms.size)

    def _product(self, item: Item) -> None:
        a, b = item.operands
        target = self.pointer(item) if item.stored else f"&v{item.number}_0"
        lanes = "real" if item.uniform else "V"
        if not item.stored:
            self.lines.append(f"{lanes} v{item.number}_0;")
        for i in range(a.shape[0]):
            left, (rows, along), copy, _ = self.array(a[i])
            right, (down, columns), second, shared = self.array(b[i])
            m, k, n = a.shape[1], a.shape[2], b.shape[2]
            out = f"{target} + {i * m * n}" if i else target
            if (along == 1 or k == 1) and shared:
                apart = item.uniform or second is not None
                turned = _HERE if apart else self._turned(b[i], columns, down)
                for r in range(m):
                    x = f"{left} + {r * rows}" if r * rows else left
                    y = f"{out} + {r * n}" if r else out
                    self.lines.append(
                        f"linear<{n}, {k}, {columns}, {down}>"
                        f"({right}, static_cast<const real*>(nullptr), {x}, {y}, {turned});"
                    )
            else:
                self.lines.append(
                    f"matrix_product<{lanes}, {m}, {k}, {n}, {rows}, {along}, {down}, {columns}>"
                    f"({left}, {right}, {out});"
                )
            for offset, size in ((copy, a[i].size), (second, b[i].size)):
                if offset is not None:
                    self.release(offset, size)

    def _turned(self, b: Ids, row: int, column: int) -> str:
        """Where a shared matrix [k, n] stands as products of one sample read it: not those of what
        all samples share, which many samples need, too; and not a copy of its numbers in another
        order.
        """
        where = self.plan.operand(b)
        item = self.plan.items[int(where.array.reshape(-1)[0])]
        if not item.given:
            return _HERE
        k, n = b.shape
        start = int(where.place.reshape(-1)[0])
        place = self.shared.matrices.place((item.node.index, start, n, k, row, column))
        return f"shared + {place}"

    # ---- results

    def _output(self, output: Output) -> None:
        if output.mode == "sum":
            self._sums.write(output)
        else:
            self._copy(output.pointer, output.ids, output.mode)

    def _copy(self, target: str, ids: Ids, mode: str, lanes: str = "V") -> None:
        where = self.plan.operand(ids)
        if self.plan.straight or ids.size == 1:
            sign = "=" if mode == "write" else "+="
            name = f"({target})" if " " in target else target
            for i, number in enumerate(ids.tolist()):
                text = self.number(number).full(lanes)
                self.lines.append(f"{name}[{i}] {sign} {text};")
            return
        for piece in pieces([(ids.size,)], [where]):
            source = piece.operands[0]
            if source.array >= 0 and (target, piece.own.base) == self._home(source):
                continue  # it was computed in its place
            body = self._reads(piece, [ids])
            start = address(target, piece.own)
            stride = piece.own.strides[-1]
            if mode == "add":
                body.append(f"const X before = at.template read<{stride}>({start});")
            value = "u0" if mode == "write" else "before + u0"
            body.append(f"at.template write<{stride}>({start}, {value});")
            self._nest(piece, lanes, body)

    def sum_piece(self, piece: Piece, pointer: str) -> None:
        """Sums over lanes; the last operand are the places that they are added to."""
        source, target = piece.operands
        depth = len(piece.sizes)
        name = self._source(source)
        for d, size in enumerate(piece.sizes):
            self.lines.append(
                f"for (long i{d} = 0; i{d} < {size}; ++i{d})" + (" {" * (d < depth - 1))
            )
        moves = [self._index(access) for access in (source, target)]
        self.lines.append(f"{pointer}[{moves[1]}] += ct::native::sum(({name})[{moves[0]}]);")
        self.lines += ["}"] * (depth - 1)

    def _index(self, access: Access) -> str:
        if access.table is not None:
            return f"{self._int_table(access.table)}[i0]"
        steps = (f"i{d} * {s}" for d, s in enumerate(access.strides) if s)
        return " + ".join([str(access.base), *steps])

    def _source(self, source: Access) -> str:
        item = self.plan.items[source.array]
        if item.given and item.node.op == "t":
            return "&t"
        if item.given or item.stored:
            return self.pointer(item)
        return f"&{self.element(source.array, source.base).text}"

    def _home(self, source: Access) -> tuple[str, int]:
        name, start = self.plan.items[source.array].home
        return name, start + source.base


def address(pointer: str, access: Access) -> str:
    """Where the innermost loop of a piece begins."""
    terms = [f"i{d} * {s}" for d, s in enumerate(access.strides[:-1]) if s]
    base = [str(access.base)] if access.base else []
    return " + ".join([pointer, *base, *terms])
