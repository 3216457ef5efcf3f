"""Checkpoint files: written at once or not at all, readable without running code."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import re
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = "ctorch checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d{8,})\.ckpt")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or does not fit the run; the message names file and cure."""


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings and containers of them) to ``path`` atomically.

    The bytes go to a temporary file in the same folder, are flushed to the disk and renamed: a
    process that is killed at any moment leaves the old file or the new one, never a part of one.

    Raises:
        CheckpointError: the file cannot be written, or ``load`` would refuse what is in it.
    """
    path = Path(path)
    data = _bytes(path, state)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}."
        handle, temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from error
    _sync_folder(path.parent)


def _bytes(path: Path, state: dict[str, Any]) -> memoryview:
    """The file, in memory: torch hides what goes wrong with a disk, or Ctrl-C, as it writes."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **state}, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} could not be read again: a state_dict may hold tensors, numbers, strings and "
            f"containers of them ({_reason(error)})."
        ) from error
    return buffer.getbuffer()


def _reason(error: Exception) -> str:
    """What torch says of a file, in a line."""
    lines = str(error).strip().splitlines()
    told = [line.strip() for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (told or lines or [type(error).__name__])[0].partition(". ")[0]


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what ``save`` wrote, tensors to the CPU. No code in the file is run.

    Raises:
        CheckpointError: the file is damaged, is no checkpoint of ctorch, or is of a later version.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    cure = "delete it and resume from an earlier one, or start anew"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # checks every part against its checksum
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # bytes that are no archive raise nearly everything
        reason = _reason(error)
        raise CheckpointError(f"{path} is damaged or no checkpoint ({reason}); {cure}.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of ctorch's training loop; {cure}.")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {state.get('version')}, this ctorch reads {VERSION}: resume with "
            "the ctorch that wrote it, or start anew."
        )
    return state


def make_folder(folder: Path) -> None:
    """Makes the folder for checkpoints, so that what is wrong with it is known before the work.

    Raises:
        CheckpointError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(f"checkpoints cannot be kept in {folder}: {why}.") from error


def path_at(folder: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of a step lies in its folder."""
    return Path(folder) / f"step-{step:08d}.ckpt"


def in_folder(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    paths = Path(folder).glob("step-*.ckpt")
    found = [(int(m[1]), p) for p in paths if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


def prune(folder: str | os.PathLike[str], keep: int) -> None:
    """Deletes all but the last ``keep`` checkpoints, and what killed processes half wrote."""
    for path in in_folder(folder)[:-keep]:
        path.unlink(missing_ok=True)
    for path in Path(folder).glob(".step-*.ckpt.*.tmp"):
        path.unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """The states of the global random generators: torch (CPU, CUDA if used), numpy, Python."""
    legacy: Any = np.random.get_state()  # noqa: NPY002 - it belongs to the user, who may use it
    name, keys, position, has_gauss, gauss = legacy
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state:
        if torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])
        else:
            warnings.warn(
                f"the checkpoint holds random states of {len(state['cuda'])} CUDA devices, this "
                f"machine has {torch.cuda.device_count()}: random numbers drawn there will differ",
                stacklevel=2,
            )


def _sync_folder(folder: Path) -> None:
    """Flushes the rename itself to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
