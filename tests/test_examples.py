"""Every example runs as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: what an example takes from a package that ctorch itself has no use for
NEEDED = {"easy_to_solve": "sklearn"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs_quickly_and_without_complaint(path):
    if path.stem in NEEDED:
        pytest.importorskip(NEEDED[path.stem])
    path_entries = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(path), "--quick"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path_entries))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "path", [p for p in EXAMPLES if "--picture" in p.read_text()], ids=lambda p: p.stem
)
def test_a_picture_without_matplotlib_fails_before_the_work(path, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    done = subprocess.run(
        [sys.executable, str(path), "--quick", "--picture", "x.png"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert 'needs matplotlib: pip install "ctorch[demo]"' in done.stderr
    assert not done.stdout


def test_there_are_examples_and_each_is_short():
    assert len(EXAMPLES) >= 4
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 103, path.name
