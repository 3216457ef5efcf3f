"""Where the numbers of a training run go: JSON lines, CSV, TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Log(Protocol):
    """A place for records."""

    def write(self, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_log(path: str | os.PathLike[str], step: int) -> Log:
    """The log at ``path``: ``*.jsonl``, ``*.csv``, or a folder for TensorBoard.

    A run that resumes after ``step`` drops what an earlier process wrote for later steps.

    Raises:
        ImportError: a folder is given and TensorBoard is not installed.
        OSError: it cannot be written; the message names it.
        ValueError: the name ends otherwise.
    """
    try:
        path = Path(path)
    except TypeError:
        raise TypeError(f"log: expected a file name or a folder, got {path!r}") from None
    if path.suffix == ".jsonl":
        return _JsonLines(path, step)
    if path.suffix == ".csv":
        return _Csv(path, step)
    if path.suffix == "":
        return _TensorBoard(path, step)
    raise ValueError(
        "log: expected a name ending in .jsonl or .csv, or a folder for TensorBoard, "
        f"got {str(path)!r}"
    )


class _File:
    """A text file that grows by a line a record."""

    def __init__(self, path: Path, kept: Iterable[str]) -> None:
        """Begins with the lines kept; the file that they come from is whole until they are."""
        self.path = path
        path = path.resolve()  # a link stays one
        beside = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text("".join(kept))
            os.replace(beside, path)
            self.file = path.open("a")
        except OSError as error:
            raise self._named(error) from error

    def add(self, line: str) -> None:
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise self._named(error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was said
            self.file.close()

    def _named(self, error: OSError) -> OSError:
        what = f"the log cannot be written: {error.strerror or error}"
        return type(error)(error.errno, what, str(self.path))


class _JsonLines(_File):
    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:
                    break  # a line that a killed process left half-written
        super().__init__(path, kept)

    def write(self, record: Mapping[str, float]) -> None:
        self.add(json.dumps(dict(record)) + "\n")


class _Csv(_File):
    """Its columns are those of the first record."""

    def __init__(self, path: Path, step: int) -> None:
        self.columns: list[str] = []
        kept: list[dict[str, Any]] = []
        if step and path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or [])
                complete = [row for row in reader if None not in row.values()]
                kept = [row for row in complete if int(float(row["step"])) <= step]
        head = [self._line(dict(zip(self.columns, self.columns, strict=True)))]
        super().__init__(path, head + [self._line(row) for row in kept] if self.columns else [])

    def write(self, record: Mapping[str, Any]) -> None:
        if not self.columns:
            self.columns = list(record)
            self.add(self._line(dict(zip(self.columns, self.columns, strict=True))))
        self.add(self._line(record))

    def _line(self, record: Mapping[str, Any]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(
            text, self.columns, restval="", extrasaction="ignore", lineterminator="\n"
        )
        writer.writerow(record)
        return text.getvalue()


class _TensorBoard:
    def __init__(self, path: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"log={str(path)!r} is a TensorBoard folder: pip install tensorboard, or name "
                "a .jsonl file"
            ) from error
        self.writer: Any = SummaryWriter(str(path), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        self.writer.close()
