// Kernels with one bug each, which the emulation must find; for its own tests only.
#include "../../csrc/common.h"
#include "launchers.h"

namespace planted {
namespace {

using inpaint::dynamic_shared;
using inpaint::launch_kernel;

constexpr unsigned kThreads = 64;

// ---- Out of bounds: every thread accesses the element `shift` further ---------------------------------------------

__global__ void static_shift_kernel(const float* __restrict__ in, float* __restrict__ out, int shift) {
  __shared__ float tile[kThreads];
  float* const shifted = tile + shift;
  const int i = static_cast<int>(threadIdx.x);
  shifted[i] = in[i];
  __syncthreads();
  out[i] = shifted[i];
}
void launch_static_shift(const float* in, float* out, int shift, cudaStream_t stream) {
  launch_kernel(static_shift_kernel, 1, kThreads, 0, stream, in, out, shift);
}

__global__ void dynamic_shift_kernel(const float* __restrict__ in, float* __restrict__ out, int shift) {
  float* const tile = dynamic_shared<float>();
  const int i = static_cast<int>(threadIdx.x);
  tile[i + shift] = in[i];
  __syncthreads();
  out[i] = tile[i + shift];
}
void launch_dynamic_shift(const float* in, float* out, int shift, cudaStream_t stream) {
  launch_kernel(dynamic_shift_kernel, 1, kThreads, kThreads * sizeof(float), stream, in, out, shift);
}

__global__ void global_shift_kernel(const float* __restrict__ in, float* __restrict__ out, int read, int write) {
  const int i = static_cast<int>(threadIdx.x);
  out[i + write] = in[i + read];
}
void launch_global_shift(const float* in, float* out, int read, int write, cudaStream_t stream) {
  launch_kernel(global_shift_kernel, 1, kThreads, 0, stream, in, out, read, write);
}

// A row of a shared matrix is left, the matrix is not.
__global__ void row_shift_kernel(float* __restrict__ out, int shift) {
  __shared__ float tile[2][kThreads];
  const int i = static_cast<int>(threadIdx.x);
  tile[0][i + shift] = 1;
  __syncthreads();
  out[i] = tile[0][i + shift];
}
void launch_row_shift(float* out, int shift, cudaStream_t stream) {
  launch_kernel(row_shift_kernel, 1, kThreads, 0, stream, out, shift);
}

// A float4 that does not begin at a multiple of 16 bytes, which a GPU refuses.
__global__ void misaligned_kernel(const float* __restrict__ in, float* __restrict__ out, int shift) {
  const float4 value = *reinterpret_cast<const float4*>(in + shift);
  out[0] = value.x + value.y + value.z + value.w;
}
void launch_misaligned(const float* in, float* out, int shift, cudaStream_t stream) {
  launch_kernel(misaligned_kernel, 1, 1, 0, stream, in, out, shift);
}

// ---- Uninitialised: only the first half of the shared array is written, by the first block alone -------------------

template <class T>
__global__ void uninitialised_static_kernel(const T* __restrict__ in, T* __restrict__ out, int shift) {
  __shared__ T tile[2 * kThreads];
  const unsigned i = threadIdx.x;
  if (blockIdx.x == 0) tile[i] = in[i];
  __syncthreads();
  out[blockIdx.x * kThreads + i] = tile[static_cast<int>(i) + shift];
}
template <class T>
void launch_uninitialised_static(const T* in, T* out, int shift, unsigned blocks, cudaStream_t stream) {
  launch_kernel(uninitialised_static_kernel<T>, blocks, kThreads, 0, stream, in, out, shift);
}

template <class T>
__global__ void uninitialised_dynamic_kernel(const T* __restrict__ in, T* __restrict__ out, int shift) {
  T* const tile = dynamic_shared<T>();
  const unsigned i = threadIdx.x;
  if (blockIdx.x == 0) tile[i] = in[i];
  __syncthreads();
  out[blockIdx.x * kThreads + i] = tile[static_cast<int>(i) + shift];
}
template <class T>
void launch_uninitialised_dynamic(const T* in, T* out, int shift, unsigned blocks, cudaStream_t stream) {
  launch_kernel(uninitialised_dynamic_kernel<T>, blocks, kThreads, 2 * kThreads * sizeof(T), stream, in, out, shift);
}

// Nobody ever writes to it.
__global__ void never_written_kernel(float* __restrict__ out) {
  __shared__ float tile[kThreads];
  out[threadIdx.x] = tile[threadIdx.x];
}
void launch_never_written(float* out, cudaStream_t stream) {
  launch_kernel(never_written_kernel, 1, kThreads, 0, stream, out);
}

// ---- Divergence ----------------------------------------------------------------------------------------------------

enum class Barrier { kOneWarp, kSomeLanes, kReturn, kTwoBarriers, kCorrect };

__global__ void divergent_barrier_kernel(Barrier bug, int* __restrict__ out) {
  const unsigned t = threadIdx.x;
  if (bug == Barrier::kOneWarp && t < 32) __syncthreads();
  if (bug == Barrier::kSomeLanes && t % 2 == 0) __syncthreads();
  if (bug == Barrier::kReturn && t == 5) return;
  if (bug == Barrier::kTwoBarriers && t < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = 1;
}
void launch_divergent_barrier(Barrier bug, int* out, cudaStream_t stream) {
  launch_kernel(divergent_barrier_kernel, 1, kThreads, 0, stream, bug, out);
}

enum class Shuffle {
  kSomeLanes,
  kReturn,
  kOtherMasks,
  kNotInMask,
  kReadsOutside,
  kTwoShuffles,
  kBarrier,
  kWidth,
  kCorrect
};

__global__ void divergent_shuffle_kernel(Shuffle bug, int* __restrict__ out) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  int value = t;
  if (bug == Shuffle::kSomeLanes) {
    if (lane < 16) value = __shfl_xor_sync(0xffffffffu, value, 1);
  } else if (bug == Shuffle::kReturn) {
    if (lane == 31) return;
    value = __shfl_down_sync(0xffffffffu, value, 1, 16);
  } else if (bug == Shuffle::kOtherMasks) {
    value = __shfl_xor_sync(lane < 16 ? 0xffffffffu : 0xffff0000u, value, 1);
  } else if (bug == Shuffle::kNotInMask) {
    value = __shfl_xor_sync(0x7fffffffu, value, 0);
  } else if (bug == Shuffle::kReadsOutside) {
    if (lane < 16) value = __shfl_sync(0x0000ffffu, value, 20);
  } else if (bug == Shuffle::kTwoShuffles) {
    if (lane < 16)
      value = __shfl_xor_sync(0xffffffffu, value, 1);
    else
      value = __shfl_xor_sync(0xffffffffu, value, 1);
  } else if (bug == Shuffle::kBarrier) {
    if (lane < 16) value = __any_sync(0xffffffffu, value);
    __syncthreads();
  } else if (bug == Shuffle::kWidth) {
    value = __shfl_xor_sync(0xffffffffu, value, 1, 24);
  } else {
    value = __shfl_xor_sync(0xffffffffu, value, 1);
  }
  out[t] = value;
}
void launch_divergent_shuffle(Shuffle bug, int* out, cudaStream_t stream) {
  launch_kernel(divergent_shuffle_kernel, 1, kThreads, 0, stream, bug, out);
}

// ---- A missing barrier ---------------------------------------------------------------------------------------------

enum class Missing {
  kNothing,
  kAfterWrite,       // threads read what other warps write, in both directions
  kAfterWriteBelow,  // threads read what lower warps write: wrong in descending order only
  kBeforeRewrite,    // threads overwrite what other warps still read
  kWarp,             // the same within a warp: a missing __syncwarp
};

__global__ void missing_barrier_kernel(Missing missing, const float* __restrict__ in, float* __restrict__ out) {
  __shared__ float tile[kThreads];
  const unsigned t = threadIdx.x;
  tile[t] = in[t];
  if (missing != Missing::kAfterWrite && missing != Missing::kAfterWriteBelow && missing != Missing::kWarp)
    __syncthreads();
  unsigned other = kThreads - 1 - t;
  if (missing == Missing::kAfterWriteBelow) other = t % 32;
  if (missing == Missing::kWarp) other = t ^ 1;
  const float first = tile[other];
  if (missing != Missing::kBeforeRewrite) __syncthreads();
  tile[t] = first + 1;
  __syncthreads();
  out[t] = tile[other] + first;
}
void launch_missing_barrier(Missing missing, const float* in, float* out, cudaStream_t stream) {
  launch_kernel(missing_barrier_kernel, 1, kThreads, 0, stream, missing, in, out);
}

// Blocks that read what others write.
__global__ void block_order_kernel(int* __restrict__ counter, int* __restrict__ out) {
  out[blockIdx.x] = atomicAdd(counter, 1);
}
void launch_block_order(int* counter, int* out, unsigned blocks, cudaStream_t stream) {
  launch_kernel(block_order_kernel, blocks, 1, 0, stream, counter, out);
}

void expose_planted(emulation::Exposed& exposed) {
  exposed.add<&launch_static_shift>("static_shift");
  exposed.add<&launch_dynamic_shift>("dynamic_shift");
  exposed.add<&launch_global_shift>("global_shift");
  exposed.add<&launch_row_shift>("row_shift");
  exposed.add<&launch_misaligned>("misaligned");
  exposed.add<&launch_uninitialised_static<float>>("uninitialised_static_float32");
  exposed.add<&launch_uninitialised_static<double>>("uninitialised_static_float64");
  exposed.add<&launch_uninitialised_static<__half>>("uninitialised_static_float16");
  exposed.add<&launch_uninitialised_static<int>>("uninitialised_static_int32");
  exposed.add<&launch_uninitialised_dynamic<float>>("uninitialised_dynamic_float32");
  exposed.add<&launch_uninitialised_dynamic<int>>("uninitialised_dynamic_int32");
  exposed.add<&launch_never_written>("never_written");
  exposed.add<&launch_divergent_barrier>("divergent_barrier");
  exposed.add<&launch_divergent_shuffle>("divergent_shuffle");
  exposed.add<&launch_missing_barrier>("missing_barrier");
  exposed.add<&launch_block_order>("block_order");
}

}  // namespace
}  // namespace planted
