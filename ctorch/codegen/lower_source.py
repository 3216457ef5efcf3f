"""Where in the user's program an operator was called, and how it is refused."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, NoReturn

import torch

_HERE = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


class Untraceable(ValueError):
    """A function cannot be lowered to native code; the message names the operator and its line.

    Attributes:
        operator: its name, where there is one.
        line: "file:line" of the call, where it is known.
    """

    def __init__(self, message: str, operator: str = "", line: str = "") -> None:
        super().__init__(message)
        self.operator = operator
        self.line = line


class MixesSamples(Untraceable):
    """Samples that should stand alone depend on one another."""


def refuse(operator: str, why: str, remedy: str) -> NoReturn:
    """Raise ``Untraceable`` for an operator that runs now."""
    line, text = here()
    place = f" at {line}" if line else ""
    code = f" ({text})" if text else ""
    raise Untraceable(f"operator {operator}{place}{code} {why}: {remedy}.", operator, line)


def here() -> tuple[str, str]:
    """The user's line that runs now, or whose derivative does: "file:line" and its text."""
    node = torch._C._current_autograd_node()
    if node is not None:
        return _line_of_node(node)
    frame: Any = sys._getframe(1)
    while frame is not None:
        if not _internal(frame.f_code.co_filename):
            return _described(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return "", ""


def _line_of_node(node: Any) -> tuple[str, str]:
    """From what anomaly mode noted of the forward pass."""
    for entry in reversed(node.metadata.get("traceback_", [])):
        for name, line in reversed(re.findall(r'File "([^"]+)", line (\d+)', entry)):
            if not _internal(name):
                return _described(name, int(line))
    return "", ""


def _described(filename: str, line: int) -> tuple[str, str]:
    import linecache

    return f"{filename}:{line}", linecache.getline(filename, line).strip()


def _internal(filename: str) -> bool:
    name = os.path.abspath(filename)
    return name.startswith((_TORCH + os.sep, _HERE + os.sep)) or filename.startswith("<")
