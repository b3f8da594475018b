// Correct kernels that use every feature of the emulation once; tests/test_emulation.py compares them with NumPy.
#include "../../csrc/common.h"
#include "launchers.h"

namespace features {
namespace {

using inpaint::dynamic_shared;
using inpaint::global_thread;
using inpaint::grid_stride;
using inpaint::launch_kernel;

struct Size {
  unsigned x, y, z;
  dim3 dim() const { return {x, y, z}; }
};

// out [blocks, threads of a block, 12]: blockIdx, threadIdx, gridDim, blockDim.
__global__ void indices_kernel(int* __restrict__ out) {
  const int64_t block = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t thread = (int64_t{threadIdx.z} * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* row = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 12;
  const unsigned values[] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z,
                             gridDim.x,  gridDim.y,  gridDim.z,  blockDim.x,  blockDim.y,  blockDim.z};
  for (int i = 0; i < 12; ++i) row[i] = static_cast<int>(values[i]);
}
void launch_indices(int* out, const Size& blocks, const Size& threads, int64_t shared_bytes, cudaStream_t stream) {
  launch_kernel(indices_kernel, blocks.dim(), threads.dim(), static_cast<size_t>(shared_bytes), stream, out);
}

// out [4, threads]: each kind of shuffle, every lane with its own operand.
template <class T>
__global__ void shuffles_kernel(const T* __restrict__ in, const int* __restrict__ operand, T* __restrict__ out,
                                unsigned mask, int width) {
  const unsigned t = threadIdx.x, n = blockDim.x;
  const T value = in[t];
  T results[4] = {};
  if (mask >> t % 32 & 1) {
    results[0] = __shfl_sync(mask, value, operand[t], width);
    results[1] = __shfl_up_sync(mask, value, static_cast<unsigned>(operand[n + t]), width);
    results[2] = __shfl_down_sync(mask, value, static_cast<unsigned>(operand[2 * n + t]), width);
    results[3] = __shfl_xor_sync(mask, value, operand[3 * n + t], width);
  }
  for (unsigned i = 0; i < 4; ++i) out[i * n + t] = results[i];
}
template <class T>
void launch_shuffles(const T* in, const int* operand, T* out, unsigned mask, int width, unsigned threads,
                     cudaStream_t stream) {
  launch_kernel(shuffles_kernel<T>, 1, threads, 0, stream, in, operand, out, mask, width);
}

// out [3, threads]: ballot, any, all.
__global__ void votes_kernel(const int* __restrict__ in, unsigned* __restrict__ out, unsigned mask) {
  const unsigned t = threadIdx.x, n = blockDim.x;
  unsigned results[3] = {};
  if (mask >> t % 32 & 1) {
    results[0] = __ballot_sync(mask, in[t]);
    results[1] = static_cast<unsigned>(__any_sync(mask, in[t]));
    results[2] = static_cast<unsigned>(__all_sync(mask, in[t]));
  }
  for (unsigned i = 0; i < 3; ++i) out[i * n + t] = results[i];
}
void launch_votes(const int* in, unsigned* out, unsigned mask, unsigned threads, cudaStream_t stream) {
  launch_kernel(votes_kernel, 1, threads, 0, stream, in, out, mask);
}

// The two halves of a warp shuffle different numbers of times before the whole warp does: out[t] is the sum over the
// half, in the lower half three times over, plus that of the partner in the other half.
__global__ void half_warps_kernel(const int* __restrict__ in, int* __restrict__ out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int total = 0;
  for (unsigned round = 0; round < (lane < 16 ? 3u : 1u); ++round) {
    int sum = in[threadIdx.x];
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
    total += sum;
  }
  __syncwarp();
  out[threadIdx.x] = total + __shfl_xor_sync(0xffffffffu, total, 16);
}
void launch_half_warps(const int* in, int* out, unsigned threads, cudaStream_t stream) {
  launch_kernel(half_warps_kernel, 1, threads, 0, stream, in, out);
}

// sums [blocks]: every block sums its share of `in` in a fixed order, through shuffles and dynamic shared memory.
template <class T>
__global__ void __launch_bounds__(1024)
    block_sums_kernel(const T* __restrict__ in, T* __restrict__ sums, int64_t count) {
  T* const partial = dynamic_shared<T>();
  T sum = 0;
  for (int64_t i = global_thread(); i < count; i += grid_stride()) sum += __ldg(in + i);
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned step = blockDim.x / 2; step >= 32; step /= 2) {
    if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
    __syncthreads();
  }
  sum = partial[threadIdx.x % 32];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
template <class T>
void launch_block_sums(const T* in, T* sums, int64_t count, unsigned blocks, unsigned threads, cudaStream_t stream) {
  launch_kernel(block_sums_kernel<T>, blocks, threads, threads * sizeof(T), stream, in, sums, count);
}

// out [columns, rows] = in [rows, columns], by tiles in static shared memory; any size.
template <class T>
__global__ void transpose_kernel(const T* __restrict__ in, T* __restrict__ out, int rows, int columns) {
  __shared__ T tile[16][17];
  const int row = static_cast<int>(blockIdx.y * 16 + threadIdx.y),
            column = static_cast<int>(blockIdx.x * 16 + threadIdx.x);
  if (row < rows && column < columns) tile[threadIdx.y][threadIdx.x] = in[row * columns + column];
  __syncthreads();
  const int to_row = static_cast<int>(blockIdx.x * 16 + threadIdx.y),
            to_column = static_cast<int>(blockIdx.y * 16 + threadIdx.x);
  if (to_row < columns && to_column < rows) out[to_row * rows + to_column] = tile[threadIdx.x][threadIdx.y];
}
template <class T>
void launch_transpose(const T* in, T* out, int rows, int columns, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((columns + 15) / 16), static_cast<unsigned>((rows + 15) / 16));
  launch_kernel(transpose_kernel<T>, blocks, dim3(16, 16), 0, stream, in, out, rows, columns);
}

// Statistics of `in` by atomics: sum, minimum, maximum, and how many threads won a race for cell 3.
template <class T>
__global__ void atomics_kernel(const T* __restrict__ in, T* __restrict__ out, int64_t count) {
  for (int64_t i = global_thread(); i < count; i += grid_stride()) {
    atomicAdd(out, in[i]);
    if constexpr (std::is_integral_v<T>) {
      atomicMin(out + 1, in[i]);
      atomicMax(out + 2, in[i]);
      if (atomicCAS(out + 3, T(0), T(1)) == 0) atomicAdd(out + 4, T(1));
    }
  }
}
template <class T>
void launch_atomics(const T* in, T* out, int64_t count, unsigned blocks, cudaStream_t stream) {
  launch_kernel(atomics_kernel<T>, blocks, 64, 0, stream, in, out, count);
}

// To a 16-bit type and back.
template <class T>
__global__ void narrow_kernel(const float* __restrict__ in, T* __restrict__ narrow, float* __restrict__ out,
                              int64_t count) {
  for (int64_t i = global_thread(); i < count; i += grid_stride()) {
    if constexpr (std::is_same_v<T, __half>) {
      narrow[i] = __float2half_rn(in[i]);
      out[i] = __half2float(narrow[i]);
    } else {
      narrow[i] = __float2bfloat16_rn(in[i]);
      out[i] = __bfloat162float(narrow[i]);
    }
  }
}
template <class T>
void launch_narrow(const float* in, T* narrow, float* out, int64_t count, cudaStream_t stream) {
  launch_kernel(narrow_kernel<T>, 4, 256, 0, stream, in, narrow, out, count);
}

template <class T>
__global__ void narrow_double_kernel(const double* __restrict__ in, T* __restrict__ narrow, int64_t count) {
  for (int64_t i = global_thread(); i < count; i += grid_stride()) narrow[i] = static_cast<T>(in[i]);
}
template <class T>
void launch_narrow_double(const double* in, T* narrow, int64_t count, cudaStream_t stream) {
  launch_kernel(narrow_double_kernel<T>, 4, 256, 0, stream, in, narrow, count);
}

// out [8]: what min and max make of a NaN, and the addresses' remainders by 16 of a local variable, of static and of
// dynamic shared memory; then a float4 that went through all three.
__global__ void alignment_kernel(const float4* __restrict__ in, float* __restrict__ out) {
  alignas(16) __shared__ float tile[4];
  float4* const dynamic = dynamic_shared<float4>();
  alignas(16) float4 local = in[0];
  volatile float4* const pinned = &local;  // keeps it in memory
  *dynamic = make_float4(pinned->x, pinned->y, pinned->z, pinned->w);
  *reinterpret_cast<float4*>(tile) = *dynamic;
  out[0] = min(NAN, 1.0f) + max(2.0f, NAN);
  out[1] = static_cast<float>(reinterpret_cast<uintptr_t>(pinned) % 16);
  out[2] = static_cast<float>(reinterpret_cast<uintptr_t>(tile) % 16);
  out[3] = static_cast<float>(reinterpret_cast<uintptr_t>(dynamic) % 16);
  for (int i = 0; i < 4; ++i) out[4 + i] = tile[i];
}
void launch_alignment(const float4* in, float* out, cudaStream_t stream) {
  launch_kernel(alignment_kernel, 1, 1, sizeof(float4), stream, in, out);
}

void copy_and_clear(const float* from, float* to, int64_t count, cudaStream_t stream) {
  const size_t half = static_cast<size_t>(count) / 2;
  inpaint::check_cuda(cudaMemcpyAsync(to, from, half * sizeof(float), cudaMemcpyDeviceToDevice, stream));
  inpaint::check_cuda(cudaMemsetAsync(to + half, 0, (static_cast<size_t>(count) - half) * sizeof(float), stream));
}

void expose_features(emulation::Exposed& exposed) {
  exposed.add<&launch_indices>("indices");
  exposed.add<&launch_shuffles<int32_t>>("shuffles_int32");
  exposed.add<&launch_shuffles<int64_t>>("shuffles_int64");
  exposed.add<&launch_shuffles<float>>("shuffles_float32");
  exposed.add<&launch_shuffles<double>>("shuffles_float64");
  exposed.add<&launch_shuffles<__half>>("shuffles_float16");
  exposed.add<&launch_shuffles<__nv_bfloat16>>("shuffles_uint16");
  exposed.add<&launch_votes>("votes");
  exposed.add<&launch_half_warps>("half_warps");
  exposed.add<&launch_block_sums<float>>("block_sums_float32");
  exposed.add<&launch_block_sums<double>>("block_sums_float64");
  exposed.add<&launch_transpose<float>>("transpose_float32");
  exposed.add<&launch_transpose<int64_t>>("transpose_int64");
  exposed.add<&launch_atomics<int>>("atomics_int32");
  exposed.add<&launch_atomics<unsigned>>("atomics_uint32");
  exposed.add<&launch_atomics<unsigned long long>>("atomics_uint64");
  exposed.add<&launch_atomics<float>>("atomics_float32");
  exposed.add<&launch_atomics<double>>("atomics_float64");
  exposed.add<&launch_narrow<__half>>("narrow_float16");
  exposed.add<&launch_narrow<__nv_bfloat16>>("narrow_bfloat16");
  exposed.add<&launch_narrow_double<__half>>("narrow_double_float16");
  exposed.add<&launch_alignment>("alignment");
  exposed.add<&copy_and_clear>("copy_and_clear");
}

}  // namespace
}  // namespace features
