// All that a cuda.cu needs of its surroundings: the stream torch is using, the device guard, the
// launch and its check.
//
//   Launch launch(x);  // current device and stream are now those of x, until the end of the scope
//   CT_LAUNCH((kernel<scalar_t>), grid, block, shared_bytes, launch.stream, args...);
//
// With CT_EMULATE the same file is compiled by g++: cuda_emu.h (on the include path) then stands in
// for the CUDA runtime and defines CT_LAUNCH, and tensors are on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if defined(CT_EMULATE)
#include <cuda_emu.h>
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

// Exported by CUDA builds of libtorch only. Weak, so that one library loads under a CPU build of
// torch as well.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace ct {

#if defined(CT_EMULATE)

struct Launch {
  explicit Launch(const torch::stable::Tensor&) {}
  cudaStream_t stream = nullptr;
};

inline void launch_check(const char*) {}

#else

inline cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "ctorch: a CUDA kernel was called, but this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Launch {
  explicit Launch(const torch::stable::Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

inline void launch_check(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess, "ctorch: launch of ", kernel,
                  " failed: ", cudaGetErrorString(status));
}

#endif

}  // namespace ct

// A kernel with several template arguments goes in parentheses, since a macro splits at commas.
#ifndef CT_LAUNCH
#define CT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)         \
  do {                                                                    \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::ct::launch_check(#kernel);                                          \
  } while (false)
#endif
