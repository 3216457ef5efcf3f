"""Every test has a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctorch.codegen import build, cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has loaded nothing."""
    monkeypatch.setenv("CTORCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", {})
    return cache.folder()
