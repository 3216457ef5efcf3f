"""Threads that work together do every piece once, and nobody goes on before all are done."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import pytest

from ctorch.codegen import build

pytestmark = pytest.mark.usefixtures("quick_compiler")

SOURCE = """
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "native/team.h"

namespace {
void sleep(int microseconds) {
  std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}
}  // namespace

// How many pieces were not done once, over many calls with different counts.
extern "C" long pieces(long threads, long calls) {
  ct::native::Team team(threads);
  long wrong = 0;
  for (long call = 0; call < calls; ++call) {
    const long count = call % 41;
    std::vector<std::atomic<int>> done(count);
    team.divide(count, [&](int64_t i) { ++done[i]; });
    for (long i = 0; i < count; ++i) wrong += done[i] != 1;
  }
  return wrong;
}

// How many pieces were still being done when the call was over; the others are slow.
extern "C" long unfinished(long threads, long calls) {
  ct::native::Team team(threads);
  const auto caller = std::this_thread::get_id();
  long wrong = 0;
  for (long call = 0; call < calls; ++call) {
    std::atomic<int> done{0};
    team.divide(4 * threads, [&](int64_t) {
      const bool slow = std::this_thread::get_id() != caller;
      sleep(slow ? 2000 : 300);
      ++done;
    });
    wrong += done != 4 * threads;
    sleep(call % 3 == 0 ? 3000 : 0);  // they fall asleep in between
  }
  return wrong;
}

// How many threads took part.
extern "C" long helpers(long threads, long) {
  ct::native::Team team(threads);
  sleep(20000);  // they sleep, and have to be woken
  std::vector<std::thread::id> who(threads);
  team.divide(threads, [&](int64_t i) {
    sleep(50000);
    who[i] = std::this_thread::get_id();
  });
  std::sort(who.begin(), who.end());
  return std::unique(who.begin(), who.end()) - who.begin();
}
"""


@pytest.fixture(scope="module")
def team(quick_compiler: None) -> ctypes.CDLL:
    return build.load(SOURCE)


def within(seconds: float, call: Callable[[], int]) -> int:
    """What a call returns, which may hang."""
    found: list[int] = []
    caller = threading.Thread(target=lambda: found.append(call()), daemon=True)
    caller.start()
    caller.join(seconds)
    assert found, "it hangs"
    return found[0]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_piece_is_done_once(team: ctypes.CDLL, threads: int) -> None:
    assert within(60, lambda: team.pieces(threads, 2000)) == 0


def test_nobody_goes_on_before_all_are_done(team: ctypes.CDLL) -> None:
    assert within(60, lambda: team.unfinished(3, 40)) == 0


def test_those_who_sleep_are_woken(team: ctypes.CDLL) -> None:
    assert within(60, lambda: team.helpers(4, 0)) >= 3
