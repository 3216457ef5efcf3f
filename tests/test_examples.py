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


def test_there_are_examples_and_each_is_short():
    assert len(EXAMPLES) >= 4
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 100, path.name
