// What every kernel file shares: host checks, dtype dispatch, index helpers and, for CUDA sources, the launch context.
// Only headers of LibTorch's stable ABI are used, so one library serves every torch >= 2.10, with or without CUDA.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define INPAINT_HOST_DEVICE __host__ __device__
#else
#define INPAINT_HOST_DEVICE
#endif

namespace inpaint {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- Host checks -------------------------------------------------------------------------------------------------
// User-facing errors are raised in Python, by name; these are the backstop that keeps a kernel inside its memory.

inline void check_rank(const Tensor& tensor, const char* name, int64_t rank) {
  STD_TORCH_CHECK(tensor.dim() == rank, name, ": expected ", rank, " dimensions, got ", tensor.dim());
}

inline void check_dense(const Tensor& tensor, const char* name, int64_t rank) {
  check_rank(tensor, name, rank);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

// ---- dtype dispatch ----------------------------------------------------------------------------------------------

// Calls `body` with a zero of the C++ type that `type` names: `using scalar_t = decltype(zero)` inside the body.
template <class Body>
auto dispatch_float_double(ScalarType type, const char* name, Body&& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    default:
      STD_TORCH_CHECK(false, name, ": expected float32 or float64, got ", torch::headeronly::toString(type));
  }
}

// ---- Index arithmetic: int64 throughout, one score matrix of a 2000x2000 image has 3.9e9 entries -------------------

INPAINT_HOST_DEVICE constexpr int64_t ceil_div(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

}  // namespace inpaint

#ifdef __CUDACC__

// CPU builds of torch lack these symbols. Declared weak, they are null there and the library still loads; on a CUDA
// build they resolve through libtorch.so, which the library therefore has to name as needed (see setup.py).
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
__attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t err, const char* filename,
                                                              const char* function_name, uint32_t line_number,
                                                              bool include_device_assertions, char** error_msg);
__attribute__((weak)) void torch_c10_cuda_free_error_msg(char* error_msg);
}

namespace inpaint {

// Makes the tensor's device current for its lifetime and holds torch's current stream there. Both in one struct: a
// kernel that is launched on `launch.stream` cannot have forgotten the guard.
struct CudaLaunch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit CudaLaunch(const Tensor& tensor)
      : guard(require_cuda(tensor)), stream(current_stream(tensor.get_device())) {}

  // Throws if the launch before it failed.
  void check() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

 private:
  static int32_t require_cuda(const Tensor& tensor) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr && &torch_c10_cuda_check_msg != nullptr,
                    "inpaint_kernels: a CUDA kernel was called, but the torch that is loaded has no CUDA support");
    STD_TORCH_CHECK(tensor.is_cuda(), "inpaint_kernels: a CUDA kernel was called with a tensor on another device");
    return tensor.get_device();
  }

  static cudaStream_t current_stream(int32_t device) {
    // This library links its own copy of the CUDA runtime; tell it which device the guard has just made current.
    STD_CUDA_CHECK(cudaSetDevice(device));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
  }
};

constexpr int kThreadsPerBlock = 256;

// Blocks for a grid-stride loop over `count` elements, capped at what a grid may hold.
inline unsigned blocks_for(int64_t count) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  const int64_t blocks = ceil_div(count, kThreadsPerBlock);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ inline int64_t global_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_stride() { return int64_t{gridDim.x} * blockDim.x; }

}  // namespace inpaint

#endif  // __CUDACC__
