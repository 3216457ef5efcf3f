// What runs of samples add to the gradients of what all of them share.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "task.h"

namespace ct::native {

// Each run adds to arrays of its own; these are added up in the order of the runs, which makes the
// result the same for any number of threads. As soon as that can be: the next run then finds its
// arrays in the cache, and not in memory that is touched for the first time.
template <class Real>
class Shares {
 public:
  Shares(const Cotangents& to_, long count, int64_t runs)
      : to(to_), starts(count + 1), ended(runs) {
    constexpr int64_t kLine = static_cast<int64_t>(kAlign) / sizeof(Real);
    for (long s = 0; s < count; ++s) {
      const int64_t lines = to.shared[s] == nullptr ? 0 : (to.sizes[s] + kLine - 1) / kLine;
      starts[s + 1] = starts[s] + lines * kLine;
    }
  }

  ~Shares() {
    for (Real* numbers : spare) ::operator delete(numbers, kAlign);
    pthread_mutex_destroy(&door);
  }

  Shares(const Shares&) = delete;
  Shares& operator=(const Shares&) = delete;

  // Zeros for a run, and where in them its arrays are; null where none is wanted.
  Real* open(Real** arrays) {
    Real* numbers = nullptr;
    pthread_mutex_lock(&door);
    if (!spare.empty()) numbers = spare.back(), spare.pop_back();
    pthread_mutex_unlock(&door);
    const size_t bytes = starts.back() * sizeof(Real);
    if (numbers == nullptr) numbers = static_cast<Real*>(::operator new(bytes, kAlign));
    std::memset(numbers, 0, bytes);
    for (size_t s = 0; s + 1 < starts.size(); ++s)
      arrays[s] = to.shared[s] == nullptr ? nullptr : numbers + starts[s];
    return numbers;
  }

  // A run is through with what it was given.
  void close(int64_t run, Real* numbers) {
    pthread_mutex_lock(&door);
    ended[run] = numbers;
    for (; next < static_cast<int64_t>(ended.size()) && ended[next] != nullptr; ++next) {
      add(ended[next]);
      spare.push_back(ended[next]);
    }
    pthread_mutex_unlock(&door);
  }

 private:
  static constexpr std::align_val_t kAlign{64};  // of a register, and of a line of the cache

  void add(const Real* numbers) const {
    for (size_t s = 0; s + 1 < starts.size(); ++s) {
      Real* const total = static_cast<Real*>(to.shared[s]);
      for (int64_t j = 0; total != nullptr && j < to.sizes[s]; ++j)
        total[j] += numbers[starts[s] + j];
    }
  }

  const Cotangents& to;
  std::vector<int64_t> starts;  // of the arrays
  std::vector<Real*> ended;     // by runs
  std::vector<Real*> spare;
  int64_t next = 0;  // the first run that is not added yet
  pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER;
};

}  // namespace ct::native
