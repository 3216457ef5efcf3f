"""How a long loop shows where it is: a live bar (rich, on a terminal) or plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

_LINES = 20  # plain lines per run


class Display(Protocol):
    """What a loop calls."""

    def update(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def display(total: int, start: int = 0, title: str = "", wanted: bool = True) -> Display:
    """The best display that this process can show; ``start``: steps that are done already."""
    if not wanted:
        return _Silent()
    if sys.stderr.isatty():
        try:
            return _Bar(total, start, title)
        except ImportError:
            pass
    return _Lines(total, start, title)


def formatted(values: Mapping[str, float]) -> str:
    """Values as ``loss 0.123  nfe 62  3.1 ms``; a key ``seconds`` is the time of one iteration."""
    parts = []
    for name, value in values.items():
        if name == "seconds":
            parts.append(f"{value * 1e3:.3g} ms/it")
        elif float(value).is_integer() and abs(value) < 1e9:
            parts.append(f"{name} {int(value)}")
        else:
            parts.append(f"{name} {value:.4g}")
    return "  ".join(parts)


class _Silent:
    def update(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    """A line now and then, for logs and pipes."""

    def __init__(self, total: int, start: int, title: str) -> None:
        self.total, self.title = total, title
        self.every = max(1, (total - start) // _LINES)
        self.start, self.width = start, len(str(total))

    def update(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.total or step == self.start + 1 or step % self.every == 0:
            head = f"{self.title} " if self.title else ""
            print(f"{head}{step:>{self.width}}/{self.total}  {formatted(values)}", flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A live bar; redrawn ten times a second at most."""

    def __init__(self, total: int, start: int, title: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns: list[Any] = [TextColumn("{task.description}")] if title else []
        columns += [
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
        ]
        self.progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        self.task = self.progress.add_task(title, total=total, completed=start, values="")
        self.total, self.drawn = total, 0.0
        self.progress.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.progress.update(self.task, completed=step, values=formatted(values))
        if now - self.drawn > 0.1 or step == self.total:
            self.drawn = now
            self.progress.refresh()

    def close(self) -> None:
        self.progress.stop()
