"""Threads of native solves by themselves, under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ctorch.codegen import build

PROGRAM = """
#include <unistd.h>
#include "native/team.h"

// Every piece is done once a call, whether the others are awake or sleep; and they come to an end.
int main() {
  for (int threads : {1, 2, 3, 5}) {
    ct::native::Team team(threads);
    std::vector<long> done(37);
    for (int call = 0; call < 200; ++call) {
      if (call % 40 == 0) usleep(2000);
      team.divide(37, [&](int64_t i) { ++done[i]; });
    }
    for (long times : done)
      if (times != 200) return 1;
  }
  for (int i = 0; i < 50; ++i) {
    ct::native::Team team(4);
    if (i % 2) usleep(500);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_team_does_every_piece_once_and_has_no_race(tmp_path: Path) -> None:
    source, program = tmp_path / "team.cpp", tmp_path / "team"
    source.write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=thread"]
    command = ["g++", *flags, f"-I{build.include_folder()}", str(source), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in made.stderr and "san" in made.stderr:
        pytest.skip("this g++ has no sanitizer libraries")
    assert made.returncode == 0, made.stderr
    # without randomization where that is allowed: the sanitizer wants memory where it expects it
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    if fixed and subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    done = subprocess.run([*fixed, program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[:4000]
