// Matrix products by the BLAS inside libtorch, found at the first use.
//
// libtorch_cpu exports sgemm_ and dgemm_ where it was built with a BLAS (MKL in the wheels for
// x86). Where it does not, available() is false and the Python side takes the reference.
#pragma once

#include <dlfcn.h>

#include <cstdint>

namespace ct::mlp {
namespace {

// Fortran's interface. Sizes are passed as 64-bit integers by reference, which on little-endian
// machines is also what a BLAS with 32-bit integers reads.
template <typename T>
using Gemm = void (*)(const char*, const char*, const int64_t*, const int64_t*, const int64_t*,
                      const T*, const T*, const int64_t*, const T*, const int64_t*, const T*, T*,
                      const int64_t*);

inline const char* gemm_name(float) { return "sgemm_"; }
inline const char* gemm_name(double) { return "dgemm_"; }

// The routine, if there is one and it computes what it should.
template <typename T>
Gemm<T> find_gemm() {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
  return nullptr;
#endif
  const auto gemm = reinterpret_cast<Gemm<T>>(dlsym(RTLD_DEFAULT, gemm_name(T())));
  if (gemm == nullptr) return nullptr;
  const T a[6] = {1, 2, 3, 4, 5, 6}, b[6] = {1, -1, 2, 0, 3, 1}, one = 1, two = 2;
  T c[4] = {1, 1, 1, 1};  // columns first: c = a^T b + 2 c for a [3, 2], b [3, 2]
  const int64_t m = 2, n = 2, k = 3;
  gemm("T", "N", &m, &n, &k, &one, a, &k, b, &k, &two, c, &m);
  return c[0] == 7 && c[1] == 13 && c[2] == 11 && c[3] == 23 ? gemm : nullptr;
}

template <typename T>
Gemm<T> gemm_routine() {
  static const Gemm<T> found = find_gemm<T>();
  return found;
}

// While it lives, MKL uses one thread for the products of this one: our loops share out blocks of
// samples themselves, and results must not depend on the number of threads.
class OneBlasThread {
 public:
  OneBlasThread() : before_(set() ? set()(1) : 0) {}
  ~OneBlasThread() {
    if (set()) set()(before_);
  }
  OneBlasThread(const OneBlasThread&) = delete;
  OneBlasThread& operator=(const OneBlasThread&) = delete;

 private:
  using Set = int (*)(int);
  static Set set() {
    static const auto found =
        reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
    return found;
  }
  int before_;
};

// All matrices are stored by rows.

// c [m, n] = alpha a [m, k] w^T + beta c, w [n, k]
template <typename T>
void multiply_transposed(int64_t m, int64_t n, int64_t k, const T* a, const T* w, T* c, T alpha = 1,
                         T beta = 0) {
  gemm_routine<T>()("T", "N", &n, &m, &k, &alpha, w, &k, a, &k, &beta, c, &n);
}

// c [m, n] = alpha a [m, k] w [k, n] + beta c
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, const T* w, T* c, T alpha = 1,
              T beta = 0) {
  gemm_routine<T>()("N", "N", &n, &m, &k, &alpha, w, &n, a, &k, &beta, c, &n);
}

// c [m, n] = alpha a^T b + beta c, a [k, m], b [k, n]
template <typename T>
void multiply_outer(int64_t m, int64_t n, int64_t k, const T* a, const T* b, T* c, T beta,
                    T alpha = 1) {
  gemm_routine<T>()("N", "T", &n, &m, &k, &alpha, b, &n, a, &m, &beta, c, &n);
}

// c [m, n] = a^T w^T + beta c, w [n, k]; a [k, m], its rows `stride` apart
template <typename T>
void multiply_twice_transposed(int64_t m, int64_t n, int64_t k, const T* a, int64_t stride,
                               const T* w, T* c, T beta = 0) {
  const T one = 1;
  gemm_routine<T>()("T", "T", &n, &m, &k, &one, w, &k, a, &stride, &beta, c, &n);
}

}  // namespace
}  // namespace ct::mlp
