"""Objects whose parts are compared by address: one call of compiled code for all of them."""

from __future__ import annotations

import array
import collections
import gc
import types
from collections.abc import Sequence
from typing import Any


class Objects:
    """Objects with their classes and dicts, and dicts with their entries, as they were found.

    All of them are kept alive, so that no other object comes to lie at an address of theirs.
    """

    def __init__(self) -> None:
        self._owners: dict[int, tuple[Any, type, Any]] = {}
        self._dicts: dict[int, tuple[Any, Sequence[tuple[Any, Any]]]] = {}

    def has(self, item: Any, space: Any) -> bool:
        """Note an object's class, and its ``__dict__`` (None: it has none); whether that can be."""
        if not (space is None or type(space) is dict):
            return False
        self._owners[id(item)] = item, type(item), space
        return True

    def hold(self, item: Any) -> bool:
        """Note the entries of a dict, in their order; whether ``item`` is one that says it all."""
        if type(item) is types.MappingProxyType:  # of a class, or a view of a dict
            (item,) = gc.get_referents(item)
        # (an ordered dict has its order elsewhere)
        if type(item) is not dict and not (type(item) is collections.OrderedDict and len(item) < 2):
            return False
        self._dicts[id(item)] = item, tuple(item.items())
        return True

    def release(self, item: Any) -> None:
        """Keep an object alive no longer: the caller, who has the words, knows when it goes."""
        del self._owners[id(item)]

    def words(self) -> array.array[int]:
        """All addresses, as csrc/core/again.cpp reads them."""
        owners, dicts = self._owners.values(), self._dicts.values()
        words = [len(owners)]
        for item, kind, space in owners:
            words += id(item), id(kind), 0 if space is None else id(space)
        words.append(len(dicts))
        for held, entries in dicts:
            words += id(held), len(entries)
            for key, value in entries:
                words += id(key), id(value)
        return array.array("q", words)
