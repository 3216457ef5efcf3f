"""The arrays of a field: where its results go, and what its products use of the shared ones."""

from __future__ import annotations

from dataclasses import dataclass

from ctorch.codegen.graph import Ids


@dataclass
class Output:
    """Where results go.

    Attributes:
        pointer: the C++ array.
        ids: [n] numbers that go there, in order.
        mode: "write", "add", or "sum": added, summed over lanes, to an array of numbers.
        places: of "sum", where in the array they go.
        array: of "sum", which of the shared arrays that is.
    """

    pointer: str
    ids: Ids
    mode: str = "write"
    places: Ids | None = None
    array: int = 0


class Parts:
    """Parts of shared arrays that the products of a field use in one way or the other.

    Args:
        shared: how many shared arrays there are.
        kind: the C++ template of one of them.
    """

    def __init__(self, shared: int, kind: str) -> None:
        self._shared, self._kind = shared, kind
        self._known: dict[tuple[int, ...], int] = {}

    def place(self, part: tuple[int, ...]) -> int:
        """Where it stands behind the shared arrays. Array, start, rows and columns and the strides
        of both.
        """
        return self._shared + self._known.setdefault(part, len(self._known))

    @property
    def text(self) -> str:
        """The C++ type that lists them."""
        kind = f"ct::native::{self._kind}"
        each = (f"{kind}<{', '.join(map(str, part))}>" for part in self._known)
        return f"{kind}List<{', '.join(each)}>"


class Shared:
    """What the products of a field use of the shared arrays: one object for all its functions.

    Args:
        count: how many shared arrays there are.

    Attributes:
        matrices: factors of products with one sample.
        products: gradients that are sums of outer products.
    """

    def __init__(self, count: int) -> None:
        self.matrices, self.products = Parts(count, "Matrix"), Parts(count, "Product")
