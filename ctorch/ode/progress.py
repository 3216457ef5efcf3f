"""A progress bar over the time of a solve."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor


@contextlib.contextmanager
def progress_bar(wanted: bool, t: Tensor) -> Iterator[Callable[[float], None] | None]:
    """Yields a function to call with the time reached, or None where no bar is wanted.

    Raises:
        ImportError: rich is missing; names the pip command.
    """
    if not wanted:
        yield None
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        raise ImportError('progress=True needs rich: pip install "ctorch[demo]".') from error
    times = t.detach().double().reshape(-1)
    start, end = float(times[0]), float(times[-1])
    span = (end - start) or 1.0
    columns = (TextColumn("solving"), BarColumn(), TextColumn("t = {task.fields[t]:.4g}"))
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("solve", total=1.0, t=start)
        yield lambda reached: bar.update(
            task, completed=min(1.0, (reached - start) / span), t=reached
        )
