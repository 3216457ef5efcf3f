// Runs CUDA kernels on the CPU: one std::thread for each CUDA thread of a block, the blocks in
// turn.
//
// What it shows: indices, bounds, barriers and shared memory, under ThreadSanitizer and
// AddressSanitizer where there is no GPU. What it cannot show: races between blocks, effects of
// diverging warps, speed.
#pragma once

#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define threadIdx emu::thread_index
#define blockIdx emu::block_index
#define blockDim emu::block_size
#define gridDim emu::grid_size

using cudaStream_t = void*;

struct dim3 {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};

namespace emu {

constexpr int kWarp = 32;

struct Warp {
  explicit Warp(int lanes) : together(lanes) {}
  std::barrier<> together;
  double slot[kWarp] = {};
};

struct Block {
  explicit Block(int threads) : together(threads) {
    for (int first = 0; first < threads; first += kWarp)
      warps.push_back(std::make_unique<Warp>(threads - first < kWarp ? threads - first : kWarp));
    votes.resize(threads);
  }
  std::barrier<> together;
  std::vector<char> votes;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<double> memory;  // that was launched with it
};

inline thread_local dim3 thread_index, block_index, block_size, grid_size;
inline thread_local Block* block = nullptr;
inline size_t launched_bytes = 0;

template <typename Kernel, typename... Args>
void launch(Kernel kernel, dim3 grid, int threads, const Args&... args) {
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      Block shared(threads);
      shared.memory.resize((launched_bytes + 7) / 8, -7.0);
      std::vector<std::thread> running;
      for (int t = 0; t < threads; ++t)
        running.emplace_back([&, t] {
          thread_index = dim3(t), block_index = dim3(x, y), block_size = dim3(threads),
          grid_size = grid;
          block = &shared;
          kernel(args...);
        });
      for (std::thread& thread : running) thread.join();
    }
}

}  // namespace emu

inline void __syncthreads() {
#ifndef EMU_WITHOUT_BARRIER  // the tests leave it out to see that the race is found
  emu::block->together.arrive_and_wait();
#endif
}

inline int __syncthreads_or(int vote) {
  emu::Block& block = *emu::block;
  block.votes[threadIdx.x] = vote != 0;
  block.together.arrive_and_wait();
  int any = 0;
  for (char each : block.votes) any |= each;
  block.together.arrive_and_wait();
  return any;
}

namespace emu {

inline Warp& warp() { return *block->warps[threadIdx.x / kWarp]; }

// The value that lane `source` of the warp has; its own where `source` is negative.
template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(double));
  Warp& all = warp();
  std::memcpy(&all.slot[threadIdx.x % kWarp], &value, sizeof(T));
  all.together.arrive_and_wait();
  T result = value;
  if (source >= 0) std::memcpy(&result, &all.slot[source], sizeof(T));
  all.together.arrive_and_wait();
  return result;
}

inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

}  // namespace emu

inline void __syncwarp() { emu::warp().together.arrive_and_wait(); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int offset, int width = emu::kWarp) {
  const bool inside = emu::lane() % width + offset < width;
  return emu::exchange(value, inside ? emu::lane() + offset : -1);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int offset) {
  return emu::exchange(value, emu::lane() - offset);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emu::exchange(value, emu::lane() ^ mask);
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emu::exchange(value, source);
}

inline unsigned long long atomicOr(unsigned long long* to, unsigned long long bits) {
  return __atomic_fetch_or(to, bits, __ATOMIC_RELAXED);
}

inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

#define CT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (emu::launched_bytes = shared_bytes, emu::launch(kernel, grid, block, __VA_ARGS__))

#define CT_LAUNCHED_MEMORY(name) \
  unsigned char* const name = reinterpret_cast<unsigned char*>(emu::block->memory.data())
