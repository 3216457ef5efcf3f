"""What the tests of emulated native kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """For compiled code, that of all workers, by a compiler that does not try hard."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    made = shared / "emulated"
    made.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTORCH_CACHE_DIR", str(made))
        patch.setenv("CTORCH_NATIVE_FLAGS", "-Og")
        yield made
