// What every kernel file shares: host checks, dtype dispatch, index helpers and, for CUDA sources, the launch context.
// Only headers of LibTorch's stable ABI are used, so one library serves every torch >= 2.10, with or without CUDA.
//
// CUDA sources are also compiled by g++ and executed on the CPU: with INPAINT_EMULATION defined, the headers of
// tests/emulation stand in for the CUDA toolkit, and there is no torch. For that, a file in csrc/cuda keeps these rules
// (tests/test_emulation.py looks for violations):
//
//  1. Kernels and the device functions with shared memory stand in an anonymous namespace inside namespace inpaint:
//     AddressSanitizer puts red zones around their static arrays only there.
//  2. Launchers are plain functions of raw pointers, sizes and a cudaStream_t, and launch through launch_kernel() only.
//  3. Dynamic shared memory comes from dynamic_shared<T>(), never from `extern __shared__`. A shared array that needs
//     an alignment says so first: `alignas(16) __shared__ float tile[...]`.
//  4. No return before a barrier, a shuffle or a vote: all threads of the block (lanes of the mask) reach each of them.
//     Threads without work carry a predicate along.
//  5. Inline PTX, mma and cp.async stand in csrc/cuda/ptx.cuh only, as functions that each have a plain C++ body under
//     INPAINT_EMULATION. A function that exchanges data between lanes is built there on the shuffles or on
//     emulation::warp_values().
//  6. Whatever needs torch stands at the end of the .cu file, under `#ifndef INPAINT_EMULATION`.
//  7. tests/emulation/module.cpp includes every .cu file and exposes its launchers to the tests.
#pragma once

#ifndef INPAINT_EMULATION
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#endif

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__) || defined(INPAINT_EMULATION)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define INPAINT_HOST_DEVICE __host__ __device__
#else
#define INPAINT_HOST_DEVICE
#endif

#ifndef INPAINT_EMULATION

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

}  // namespace inpaint

#endif  // INPAINT_EMULATION

namespace inpaint {

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

}  // namespace inpaint

#endif  // __CUDACC__

#if defined(__CUDACC__) || defined(INPAINT_EMULATION)

namespace inpaint {

// ---- Launching ---------------------------------------------------------------------------------------------------

// Throws if a call of the CUDA runtime failed.
inline void check_cuda(cudaError_t error) {
#ifdef INPAINT_EMULATION
  STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
#else
  STD_CUDA_CHECK(error);
#endif
}

// What a block gets without asking for more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

// The one way to launch a kernel. Throws if the launch fails; an empty grid is no launch.
template <class... P, class... A>
void launch_kernel(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream,
                   A... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
#ifdef INPAINT_EMULATION
  static_cast<void>(stream);
  emulation::run_grid(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  if (shared_bytes > kDefaultSharedBytes) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)));
  }
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  check_cuda(cudaGetLastError());
#endif
}

constexpr int kThreadsPerBlock = 256;

// Blocks for a grid-stride loop over `count` elements, capped at what a grid may hold.
inline unsigned blocks_for(int64_t count) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  const int64_t blocks = ceil_div(count, kThreadsPerBlock);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// ---- In kernels --------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ T* dynamic_shared() {
#ifdef INPAINT_EMULATION
  return static_cast<T*>(emulation::dynamic_shared_memory());
#else
  extern __shared__ __align__(16) unsigned char inpaint_dynamic_shared_memory[];
  return reinterpret_cast<T*>(inpaint_dynamic_shared_memory);
#endif
}

__device__ inline int64_t global_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_stride() { return int64_t{gridDim.x} * blockDim.x; }

}  // namespace inpaint

#endif  // __CUDACC__ or INPAINT_EMULATION
