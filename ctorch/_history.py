"""The records of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class History(Sequence[Mapping[str, float]]):
    """The records of a run, one mapping per step: ``step``, ``loss``, ``gradient``, ``seconds``.

    Metrics that the loss function returns stand beside them.

    ``history["loss"]`` is the column of that name, as a list; ``history[3]`` the fourth record.

    Args:
        records: to begin with.
    """

    def __init__(self, records: Iterable[Mapping[str, float]] = ()) -> None:
        self._records = [dict(r) for r in records]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [r[key] for r in self._records if key in r]
        return self._records[key]

    def __repr__(self) -> str:
        loss = f", loss {self['loss'][-1]:.4g}" if self else ""
        return f"History({len(self)} steps{loss})"

    @property
    def loss(self) -> list[float]:
        """The loss of every step, before the step's update."""
        return list(self["loss"])

    def append(self, record: Mapping[str, float]) -> None:
        """Adds the record of a step."""
        self._records.append(dict(record))

    def state_dict(self) -> dict[str, Any]:
        """Columns as float64 tensors; NaN where a record lacks one."""
        names = dict.fromkeys(name for r in self._records for name in r)
        return {
            name: torch.tensor([r.get(name, math.nan) for r in self._records], dtype=torch.float64)
            for name in names
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> History:
        """What ``state_dict`` was made from."""
        columns = {name: column.tolist() for name, column in state.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return cls({k: v for k, v in row.items() if v == v} for row in rows)
