// Threads that work together through a solve: they are made once and called many times.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <cstdint>
#include <vector>

namespace ct::native {

// Where processors are short nobody waits for a thread that has not begun: the others do its share.
// (Without <atomic> and <thread>: a compiler takes longer to read them than for a small field.)
class Team {
 public:
  // As many as are asked for and can be had, the calling one among them.
  explicit Team(int64_t count) : size(count), shares(count) {
    for (Share& share : shares) share.team = this;
    for (int64_t i = 1; i < count; ++i) {
      pthread_t other;
      if (pthread_create(&other, nullptr, begin_to_serve, &shares[i]) != 0) break;  // no more
      others.push_back(other);
    }
  }

  ~Team() {
    __atomic_store_n(&over, true, __ATOMIC_RELEASE);
    call(calls + 1);
    for (pthread_t other : others) pthread_join(other, nullptr);
    pthread_cond_destroy(&called);
    pthread_mutex_destroy(&door);
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
    __atomic_store_n(&left, count, __ATOMIC_RELAXED);
    const uint32_t number = calls + 1;
    for (int64_t i = 0; i < size; ++i)
      __atomic_store_n(&shares[i].open, uint64_t{number} << 32 | (begin(i + 1) - begin(i)),
                       __ATOMIC_RELEASE);
    call(number);
    take_part(0, number);
    // what others are still at
    for (int i = 0; __atomic_load_n(&left, __ATOMIC_ACQUIRE) > 0; ++i)
      if (i < kLooks)
        pause();
      else
        sched_yield();
  }

 private:
  static constexpr int kLooks = 256;  // some microseconds

  // The call, and how many of a share's pieces nobody has taken: what is taken keeps the call open.
  struct alignas(64) Share {
    uint64_t open = 0;
    Team* team;

    // The number of a piece, or -1.
    int64_t take(uint32_t call) {
      uint64_t now = __atomic_load_n(&open, __ATOMIC_ACQUIRE);
      while (now >> 32 == call && static_cast<uint32_t>(now) > 0)
        if (__atomic_compare_exchange_n(&open, &now, now - 1, true, __ATOMIC_ACQ_REL,
                                        __ATOMIC_ACQUIRE))
          return static_cast<uint32_t>(now) - 1;
      return -1;
    }
  };

  int64_t begin(int64_t share) const { return share * count / size; }

  void call(uint32_t number) {
    __atomic_store_n(&calls, number, __ATOMIC_SEQ_CST);
    // who sleeps from here on has seen the call
    if (__atomic_load_n(&asleep, __ATOMIC_SEQ_CST) == 0) return;
    pthread_mutex_lock(&door);
    pthread_mutex_unlock(&door);
    pthread_cond_broadcast(&called);
  }

  // The number of the call after ``seen``.
  uint32_t next_call(uint32_t seen) {
    // it is mostly near
    for (int i = 0; i < kLooks; ++i, pause())
      if (const uint32_t now = __atomic_load_n(&calls, __ATOMIC_ACQUIRE); now != seen) return now;
    pthread_mutex_lock(&door);
    __atomic_add_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
    uint32_t now;
    while ((now = __atomic_load_n(&calls, __ATOMIC_SEQ_CST)) == seen)
      pthread_cond_wait(&called, &door);
    __atomic_sub_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&door);
    return now;
  }

  // The pieces of the thread's own share, then what is left of the others'.
  void take_part(int64_t thread, uint32_t call) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t share = (thread + i) % size;
      for (int64_t piece; (piece = shares[share].take(call)) >= 0;) {
        work(argument, begin(share) + piece);
        __atomic_fetch_sub(&left, 1, __ATOMIC_ACQ_REL);
      }
    }
  }

  static void* begin_to_serve(void* share) {
    Team& team = *static_cast<Share*>(share)->team;
    team.serve(static_cast<Share*>(share) - team.shares.data());
    return nullptr;
  }

  void serve(int64_t thread) {
    for (uint32_t seen = 0;;) {
      seen = next_call(seen);
      if (__atomic_load_n(&over, __ATOMIC_ACQUIRE)) return;
      take_part(thread, seen);
    }
  }

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t size;
  std::vector<Share> shares;
  uint32_t calls = 0;
  int64_t left = 0;
  bool over = false;
  // of the call; read by those who have taken a piece
  void (*work)(const void*, int64_t) = nullptr;
  const void* argument = nullptr;
  int64_t count = 0;
  int64_t asleep = 0;
  pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t called = PTHREAD_COND_INITIALIZER;
  std::vector<pthread_t> others;
};

}  // namespace ct::native
