"""Attributes that a function only counts with: they change at every call, and nothing depends on
them.
"""

from __future__ import annotations

import dis
import re
import types
from collections.abc import Iterable, Iterator

_SHUFFLES = {
    "CACHE", "COPY", "SWAP", "ROT_TWO", "ROT_THREE", "DUP_TOP", "EXTENDED_ARG", "PRECALL", "NOP",
    "RESUME", "PUSH_NULL",
}  # fmt: skip
_CONSTANTS = {"LOAD_CONST", "LOAD_SMALL_INT"}


def only_counts(path: str, codes: Iterable[types.CodeType]) -> bool:
    """Whether all that the codes do with a name is ``name += constant``, or storing a constant.

    Args:
        path: of the value; its last name counts, whatever object it belongs to.
        codes: all that the function may run.
    """
    name = re.split(r"[.\[\]'\"() ]", path.rstrip("])'\""))[-1]
    if not name.isidentifier():
        return False
    return all(_counts(name, code) for top in codes for code in _within(top))


def _counts(name: str, code: types.CodeType) -> bool:
    run = [x for x in dis.get_instructions(code) if x.opname not in _SHUFFLES]
    for i, one in enumerate(run):
        if one.argval != name or not one.opname.startswith("LOAD"):
            continue
        if one.opname in _CONSTANTS:
            return False  # getattr(self, "name") and the like
        following = run[i + 1 : i + 5]
        adds = [x for x in following[:2] if x.opname in _CONSTANTS]
        steps = [
            x for x in following[:3]
            if x.opname.startswith("INPLACE")
            or (x.opname == "BINARY_OP" and x.argrepr.endswith("="))
        ]  # fmt: skip
        stores = [x for x in following if x.opname.startswith("STORE") and x.argval == name]
        if not (adds and steps and stores):
            return False
    return True


def _within(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _within(constant)
