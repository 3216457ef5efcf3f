"""Headers compiled once for all the programs that tests compile: most of what these include is the
standard library, which takes g++ longer than a small field does.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def included(folder: Path, text: str, command: Sequence[str]) -> list[str]:
    """Flags that include ``text``, already compiled where the compiler can do that.

    Args:
        folder: where they are kept.
        text: ``#include`` lines.
        command: the compiler with the flags of the programs, which must be the same.
    """
    name = hashlib.sha256("\0".join([text, *command]).encode()).hexdigest()[:16]
    header = folder / f"{name}.h"
    compiled = folder / f"{name}.h.gch"
    if not compiled.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(header, text)
        made = folder / f"{name}.{os.getpid()}"
        subprocess.run(
            [*command, "-x", "c++-header", str(header), "-o", str(made)], capture_output=True
        )
        if made.exists():  # else the header is read as it is
            made.rename(compiled)
    return ["-include", str(header)]


def write(path: Path, text: str) -> None:
    """In one step: other workers do the same."""
    passing = path.with_suffix(f".{os.getpid()}")
    passing.write_text(text)
    passing.rename(path)
