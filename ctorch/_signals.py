"""Ctrl-C and SIGTERM, taken when the program is ready for them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def postponed() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT or SIGTERM came; a second SIGINT stops at once.

    A signal that nobody asked about after it came is raised again at the end.
    """
    came: list[int] = []
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield lambda: False
        return

    def handle(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    def ask() -> bool:
        asked[:] = came
        return bool(asked)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ask
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if came and not asked:
        signal.raise_signal(came[0])
