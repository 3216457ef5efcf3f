"""The cache on disk: whole files only, shared by processes, found where the user wants it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ctorch.codegen import cache


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "made.so"
    path.write_bytes(b"a library" * 100)
    return path


def test_what_was_put_is_found(own_cache: Path, library: Path) -> None:
    assert cache.find("key") is None
    path = cache.put("key", library)
    assert path == cache.find("key")
    assert path.parent == own_cache
    assert path.read_bytes().startswith(library.read_bytes())
    assert cache.find("another") is None


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data[:10] + bytes([data[10] ^ 1]) + data[11:],
        lambda data: data + b"x",
    ],
    ids=["half", "cut", "empty", "flipped", "longer"],
)
def test_a_damaged_file_is_not_found(library: Path, harm: object) -> None:
    path = cache.put("key", library)
    path.write_bytes(harm(path.read_bytes()))  # type: ignore[operator]
    assert cache.find("key") is None
    cache.put("key", library)
    assert cache.find("key") is not None


def test_the_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTORCH_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "mine"
    monkeypatch.delenv("CTORCH_CACHE_DIR")
    assert cache.root() == tmp_path / "xdg/ctorch"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.root() == Path.home() / ".cache/ctorch"
    assert cache.folder().name == f"native-{cache.VERSION}"


def test_nothing_half_written_stays(
    own_cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.put("key", library)
    assert list(own_cache.iterdir()) == []


def test_what_a_killed_process_left_is_swept(own_cache: Path, library: Path) -> None:
    own_cache.mkdir(parents=True)
    old, new = own_cache / ".old-abc", own_cache / ".new-abc"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.put("key", library)
    assert not old.exists()
    assert new.exists()  # another process may still be at work on it


def test_a_folder_that_cannot_be_written_is_replaced_with_a_warning(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CTORCH_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="CTORCH_CACHE_DIR"):
        path = cache.put("key", library)
    assert path.exists()


def test_clearing_removes_every_version(own_cache: Path, library: Path) -> None:
    cache.put("one", library)
    cache.put("two", library)
    older = own_cache.parent / "native-0"
    older.mkdir()
    (older / "three.so").write_bytes(b"x")
    held = cache.contents()
    assert (held.libraries, held.folder) == (2, own_cache)
    assert held.size > 2 * library.stat().st_size
    assert cache.clear() == held
    assert not own_cache.exists()
    assert not older.exists()
    assert cache.contents().libraries == 0


def test_clearing_leaves_what_is_no_file(own_cache: Path, library: Path) -> None:
    cache.put("one", library)
    (own_cache / "folder").mkdir()
    assert cache.clear().libraries == 1
    assert [path.name for path in own_cache.iterdir()] == ["folder"]


def test_a_user_without_a_home_is_told_and_compiles_all_the_same(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTORCH_CACHE_DIR", "~nobody-of-that-name/cache")
    with pytest.raises(OSError, match="home folder in CTORCH_CACHE_DIR=~nobody"):
        cache.root()
    assert cache.find("key") is None
    with pytest.warns(UserWarning, match="home folder .* is not known.*CTORCH_CACHE_DIR"):
        path = cache.put("key", library)
    assert path.exists()


def test_info_says_where_compiled_solves_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctorch.cli.info import _cache

    (tmp_path / "file").touch()
    monkeypatch.setenv("CTORCH_CACHE_DIR", str(tmp_path / "new"))
    assert "0 compiled solves" in _cache()[1]
    monkeypatch.setenv("CTORCH_CACHE_DIR", str(tmp_path / "file"))
    assert "cannot be made or written (set CTORCH_CACHE_DIR)" in _cache()[0]
