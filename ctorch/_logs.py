"""Where the numbers of a training run go: JSON lines, CSV, TensorBoard."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
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
        ValueError: the name ends otherwise.
    """
    path = Path(path)
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


class _JsonLines:
    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:
                    break  # a line that a killed process left half-written
        self.file = path.open("w")
        self.file.writelines(kept)

    def write(self, record: Mapping[str, float]) -> None:
        self.file.write(json.dumps(dict(record)) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _Csv:
    """Its columns are those of the first record."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.columns: list[str] = []
        kept: list[dict[str, Any]] = []
        if step and path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or [])
                complete = [row for row in reader if None not in row.values()]
                kept = [row for row in complete if int(float(row["step"])) <= step]
        self.file = path.open("w", newline="")
        self.writer: csv.DictWriter[str] | None = None
        if self.columns:
            self._start()
            assert self.writer is not None
            self.writer.writerows(kept)

    def write(self, record: Mapping[str, float]) -> None:
        if self.writer is None:
            self.columns = list(record)
            self._start()
        assert self.writer is not None
        self.writer.writerow(record)
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def _start(self) -> None:
        self.writer = csv.DictWriter(
            self.file, self.columns, restval="", extrasaction="ignore", lineterminator="\n"
        )
        self.writer.writeheader()


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
