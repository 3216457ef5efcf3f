// Memory that is touched for the first time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ct::native {

constexpr size_t kPage = size_t{1} << 21;

// madvise of the whole large pages in an array.
inline void advise([[maybe_unused]] void* array, [[maybe_unused]] size_t bytes,
                   [[maybe_unused]] int what) {
#if defined(__linux__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(array);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  last = (begin + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, what);
#endif
}

// Asks for large pages in a large array: the first touch of each page takes microseconds.
inline void ask_for_large_pages(void* array, size_t bytes) {
#if defined(__linux__)
  advise(array, bytes, MADV_HUGEPAGE);
#endif
}

// Large arrays, all of one size, that are no longer used, for the next who asks for such: a
// training step would spend a twelfth of its time on pages' first touches. Their pages are the
// system's if it is short of memory.
class SpareArrays {
 public:
  // No more than this is kept.
  static constexpr size_t kMost = size_t{1} << 27;

  // An array at a multiple of 64; null: there is no memory.
  void* take(size_t bytes) {
    void* array = nullptr;
    if (bytes >= kPage && enter()) {
      if (bytes == size && count > 0) array = arrays[--count];
      leave();
    }
    if (array != nullptr) return array;
    array = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (array != nullptr) ask_for_large_pages(array, bytes);
    return array;
  }

  void give(void* array, size_t bytes) {
    if (bytes >= kPage && enter()) {
      if (bytes != size) {
        while (count > 0) std::free(arrays[--count]);
        size = bytes;
      }
      if ((count + 1) * bytes <= kMost) {
#if defined(MADV_FREE)
        advise(array, bytes, MADV_FREE);
#endif
        arrays[count++] = array;
        array = nullptr;
      }
      leave();
    }
    std::free(array);
  }

 private:
  // Who finds another one here goes without: after a fork it may never leave.
  bool enter() { return !__atomic_test_and_set(&busy, __ATOMIC_ACQUIRE); }
  void leave() { __atomic_clear(&busy, __ATOMIC_RELEASE); }

  void* arrays[kMost / kPage] = {};
  size_t size = 0, count = 0;
  bool busy = false;
};

inline SpareArrays spare_arrays;

}  // namespace ct::native
