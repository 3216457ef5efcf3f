"""What the tests of emulated native kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For compiled code of this module, by a compiler that does not try hard."""
    made = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTORCH_CACHE_DIR", str(made))
        patch.setenv("CTORCH_NATIVE_FLAGS", "-O1")
        yield made
