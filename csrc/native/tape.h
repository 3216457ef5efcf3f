// The accepted steps of a solve, from which the exact gradient is made.
#pragma once

#include <cstdint>
#include <vector>

#include "pages.h"
#include "task.h"

namespace ct::native {

struct Taped {
  double t, h, stop;
  int64_t anchor;              // on what the end hangs
  int64_t before;              // the sample's step before, or -1
  int64_t first_row, end_row;  // the output times in it
  bool jumped = false;         // its first slope was evaluated just after its start
};

// The steps of a run of samples.
template <class Real>
struct Run {
  int64_t begin = 0, end = 0;
  std::vector<Taped> steps;
  std::vector<Real> states;   // at the starts of the steps
  std::vector<int64_t> last;  // of every sample, or -1
  // the last with output times in it: nothing is read behind that, and a failed sample's steps
  // there may lead up to where the field has no derivative
  std::vector<int64_t> read;

  void open(int64_t begin_, int64_t end_) {
    begin = begin_, end = end_;
    last.assign(end - begin, -1);
    read.assign(end - begin, -1);
  }

  // Room for the state, which the caller fills.
  Real* add(int64_t sample, double t, double h, double stop, int64_t anchor, int64_t first_row,
            int64_t end_row, long dim) {
    int64_t& at = last[sample - begin];
    const int64_t number = static_cast<int64_t>(steps.size());
    steps.push_back({t, h, stop, anchor, at, first_row, end_row});
    at = number;
    if (end_row > first_row) read[sample - begin] = number;
    states.resize(states.size() + dim);
    return states.data() + number * dim;
  }
};

// Of samples that step together also what the evaluations left for their derivatives, from the
// first step on as far as it takes no more memory than this; what is not here is computed again.
constexpr size_t kRecordBytes = size_t{1} << 27;

template <class Real>
struct Tape {
  std::vector<Run<Real>> runs;
  std::vector<char*> records;  // by steps
  size_t record_bytes = 0;     // of each

  Tape() = default;
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;
  ~Tape() {
    for (char* array : records) spare_arrays.give(array, record_bytes);
  }

  // The record of a step, of so many bytes as every one has; null: there is no room for it.
  char* record(size_t step, size_t bytes) {
    if ((step + 1) * bytes > kRecordBytes) return nullptr;
    record_bytes = bytes;
    if (step == records.size())
      if (void* const array = spare_arrays.take(bytes))
        records.push_back(static_cast<char*>(array));
    return step < records.size() ? records[step] : nullptr;
  }
};

}  // namespace ct::native
