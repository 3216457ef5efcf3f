"""The share of one process in an ensemble, and what the others had."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree


class Team:
    """The processes that solve an ensemble together.

    Args:
        group: a process group; "world": all processes, or this one alone where
            ``torch.distributed`` is not in use; None: this one alone.

    Attributes:
        rank, size: of this process, and of the group.

    Raises:
        ValueError: it is none of these, or this process is not in it.
    """

    def __init__(self, group: Any) -> None:
        self.group: Any = None
        self.rank, self.size = 0, 1
        if isinstance(group, str):
            if group != "world":
                raise ValueError(f'group must be a process group, "world" or None, not {group!r}.')
            if not (dist.is_available() and dist.is_initialized()):
                return
            group = dist.group.WORLD
        if group is not None:
            self.group = group
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError("group: this process is not in it.")

    def exchange(self, mine: Any, error: BaseException | None) -> list[Any]:
        """What every process has, in the order of ranks; tensors come on the CPU.

        Raises:
            RuntimeError: in another process something was raised.
        """
        if self.group is None:
            if error is not None:
                raise error
            return [mine]
        said = None if error is None else f"{type(error).__name__}: {error}"
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, said, group=self.group)
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame, and so the group
        for rank, other in enumerate(errors):
            if other is not None:
                raise RuntimeError(f"the ensemble's part in rank {rank} failed: {other}")
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, on(mine, torch.device("cpu")), group=self.group)
        return everything


def on(tree: Any, device: torch.device) -> Any:
    """A pytree, its tensors on that device."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)
