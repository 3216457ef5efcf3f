// Threads that work together through a solve: they are made once and called many times.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace ct::native {

// Where processors are short nobody waits for a thread that has not begun: the others do its share.
class Team {
 public:
  // As many as are asked for and can be had, the calling one among them.
  explicit Team(int64_t count) : size(count), shares(new Share[count]) {
    try {
      for (int64_t i = 1; i < count; ++i) others.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error&) {  // the system has no more
    }
  }

  ~Team() {
    over.store(true, std::memory_order_release);
    call(calls.load(std::memory_order_relaxed) + 1);
    for (std::thread& other : others) other.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // body(0), ..., body(count - 1). A thread begins with the same ones at every call, and finds what
  // they read in its cache.
  template <class Body>
  void divide(int64_t count_, const Body& body) {
    work = [](const void* given, int64_t i) { (*static_cast<const Body*>(given))(i); };
    argument = &body;
    count = count_;
    left.store(count, std::memory_order_relaxed);
    const uint32_t number = calls.load(std::memory_order_relaxed) + 1;
    for (int64_t i = 0; i < size; ++i)
      shares[i].open.store(uint64_t{number} << 32 | (begin(i + 1) - begin(i)),
                           std::memory_order_release);
    call(number);
    take_part(0, number);
    // what others are still at
    const auto at_work = [&] { return left.load(std::memory_order_acquire) > 0; };
    for (int i = 0; at_work(); ++i)
      if (i < kLooks)
        pause();
      else
        std::this_thread::yield();
  }

 private:
  static constexpr int kLooks = 256;  // some microseconds

  // The call, and how many of a share's pieces nobody has taken: what is taken keeps the call open.
  struct alignas(64) Share {
    std::atomic<uint64_t> open{0};

    // The number of a piece, or -1.
    int64_t take(uint32_t call) {
      uint64_t now = open.load(std::memory_order_acquire);
      while (now >> 32 == call && static_cast<uint32_t>(now) > 0)
        if (open.compare_exchange_weak(now, now - 1, std::memory_order_acq_rel))
          return static_cast<uint32_t>(now) - 1;
      return -1;
    }
  };

  int64_t begin(int64_t share) const { return share * count / size; }

  void call(uint32_t number) {
    calls.store(number, std::memory_order_release);
    calls.notify_all();
  }

  // The pieces of the thread's own share, then what is left of the others'.
  void take_part(int64_t thread, uint32_t call) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t share = (thread + i) % size;
      for (int64_t piece; (piece = shares[share].take(call)) >= 0;) {
        work(argument, begin(share) + piece);
        left.fetch_sub(1, std::memory_order_acq_rel);
      }
    }
  }

  void serve(int64_t thread) {
    uint32_t seen = 0;
    for (;;) {
      // the next call is mostly near
      for (int i = 0; i < kLooks && calls.load(std::memory_order_acquire) == seen; ++i) pause();
      calls.wait(seen, std::memory_order_acquire);
      if (over.load(std::memory_order_acquire)) return;
      seen = calls.load(std::memory_order_acquire);
      take_part(thread, seen);
    }
  }

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t size;
  const std::unique_ptr<Share[]> shares;
  std::atomic<uint32_t> calls{0};
  std::atomic<int64_t> left{0};
  std::atomic<bool> over{false};
  // of the call; read by those who have taken a piece
  void (*work)(const void*, int64_t) = nullptr;
  const void* argument = nullptr;
  int64_t count = 0;
  std::vector<std::thread> others;
};

}  // namespace ct::native
