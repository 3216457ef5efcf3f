"""Compiled libraries on disk, by the hash of everything that they were made from.

A library is written beside its place and renamed into it, so that any number of processes share the
folder, and one that is killed leaves nothing half done. Behind the library's own bytes stands their
checksum: a file that was cut or changed is not loaded but made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

#: of the layout of the files; another number begins a new folder
VERSION = 1
_CHECKSUM = 32  # bytes
_STALE = 3600.0  # seconds after which a file still being written was abandoned


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a cache folder holds: where, how many libraries, how many bytes."""

    folder: Path
    libraries: int
    size: int


def root() -> Path:
    """The folder of all versions: ``$CTORCH_CACHE_DIR``, or ``ctorch`` in the user's cache.

    Raises:
        OSError: the user has no home folder, as in a container that does not know them.
    """
    chosen = os.environ.get("CTORCH_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser()
        if base and os.path.isabs(base):  # a relative one is to be ignored, says its specification
            return Path(base) / "ctorch"
        home = Path.home()
    except RuntimeError:
        name = f"the home folder in CTORCH_CACHE_DIR={chosen}" if chosen else "your home folder"
        raise FileNotFoundError(f"{name} is not known") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "ctorch"


def folder() -> Path:
    """The folder of this version's libraries."""
    return root() / f"native-{VERSION}"


def find(key: str) -> Path | None:
    """The library with that key, if it is there and whole."""
    return None if read(key) is None else folder() / f"{key}.so"


def read(key: str) -> bytes | None:
    """What is kept under that key, if it is there and whole."""
    try:
        data = (folder() / f"{key}.so").read_bytes()
    except OSError:
        return None
    body, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    return body if body and hashlib.sha256(body).digest() == checksum else None


def put(key: str, library: Path) -> Path:
    """Copy a library into the cache, in one step; returns where it is.

    Where the folder cannot be written there is a warning, and the library lives in a folder of this
    process.
    """
    body = library.read_bytes()
    data = body + hashlib.sha256(body).digest()
    place = None
    try:
        place = folder()
        return _write(place, key, data)
    except OSError as error:
        where = f" in {place}" if place else ""
        warnings.warn(
            f"compiled solves cannot be kept{where} ({error.strerror or error}): they are compiled"
            " again in every process. Set CTORCH_CACHE_DIR to a folder that can be written.",
            stacklevel=2,
        )
        return _write(Path(_own_folder().name), key, data)


def check_writable() -> None:
    """Raises OSError where nothing could be kept."""
    place = folder()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise PermissionError(f"{folder()} cannot be made or written")


def contents() -> Contents:
    """What the cache holds."""
    sizes = []
    for path in _entries(folder(), "*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process clears
            sizes.append(path.stat().st_size)
    return Contents(folder(), len(sizes), sum(sizes))


def clear() -> Contents:
    """Remove everything, of all versions; returns what there was. Loaded libraries stay loaded.

    What other processes are writing is left to them.
    """
    held = contents()
    for place in root().glob("native-*"):
        _sweep(place)
        for path in _entries(place, "[!.]*"):
            if not path.is_dir():
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process has put something there
            place.rmdir()
    return held


def _write(place: Path, key: str, data: bytes) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    try:
        handle, passing = tempfile.mkstemp(prefix=f".{key}-", dir=place)
    except FileNotFoundError:  # another process has cleared the cache since
        place.mkdir(parents=True, exist_ok=True)
        handle, passing = tempfile.mkstemp(prefix=f".{key}-", dir=place)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(passing, 0o755)
        path = place / f"{key}.so"
        os.replace(passing, path)
    except BaseException:
        os.unlink(passing)
        raise
    return path


def _entries(place: Path, pattern: str) -> list[Path]:
    try:
        return list(place.glob(pattern))
    except FileNotFoundError:  # another process clears
        return []


def _sweep(place: Path) -> None:
    """Remove what killed processes left."""
    for path in _entries(place, ".*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
        except OSError:  # another process was faster
            continue


def _own_folder() -> tempfile.TemporaryDirectory[str]:
    global _own
    if _own is None:
        _own = tempfile.TemporaryDirectory(prefix="ctorch-native-")
    return _own


_own: tempfile.TemporaryDirectory[str] | None = None
