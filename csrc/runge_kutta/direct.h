// Kernels of a small step by address: a step of a small state costs less than the way through the
// dispatcher to the operators that make it. The arithmetic is theirs, block by block.
//
// The caller (ctorch/ops/_direct.py, through the Python module) answers for the addresses: dense
// memory on the CPU, of float64 where `wide`, else float32; numbers of the method, steps and times
// are float64. Nothing is looked at, nothing is allocated.
#pragma once

#include <cstdint>
#include <vector>

namespace ct::rk::direct {

// k[slot] = slope; out = y + h * sum_{j < terms} a[j] k[j]. A null y stands for zeros. Elements
// come in samples of `row`; the step of sample i is h[i * stride].
void stage(void* out, const void* y, void* k, const void* slope, int64_t slot, const double* a,
           int64_t terms, const double* h, int64_t stride, int64_t numel, int64_t row, bool wide);

// k[slot] = slope (unless it is null); returns the norm of the whole state's scaled error. Where
// `norms` is not null, the norm of each sample goes there instead, and 0 is returned.
double error(void* norms, const void* y, const void* y1, void* k, const void* slope, int64_t slot,
             const double* e, int64_t terms, const double* h, int64_t stride, double rtol,
             double atol, bool maximum, int64_t numel, int64_t row, bool wide);

// Times of stages with abscissae c in a step from t to t1 = t + h, each to an address of its own;
// at its end (c = 1), if `before_end`, the number just before it.
void times(const double* c, double t, double h, double t1, bool before_end, bool wide,
           const std::vector<void*>& out);

// The operators of step control (control.h), with the matrices that ctorch/ops/step_control.py
// describes. `judge` returns the bits of what it found, and above kFlagBits of them the number of
// output times passed.
constexpr int kFlagBits = 4;

void plan(const double* samples, const int64_t* counts, const double* c, int64_t stages,
          const double* control, int64_t batch, double* step, bool* lands, void* times, bool wide);

int64_t judge(double* samples, int64_t* counts, double* step, const bool* lands, const void* error,
              const double* goals, int64_t goal_count, const double* control, int64_t batch,
              bool* moved, bool wide);

void accept(const bool* moved, const void* y, const void* y1, const void* k0, const void* k1,
            void* next_y, void* next_k, int64_t batch, int64_t row, bool wide);

}  // namespace ct::rk::direct
