// contextual_attention, backward, on CUDA: the passes between the matrix products of a tile, whose logits and
// statistics the forward's kernels have computed again.
//
//   paste_backward   gradient of the paste's weights -> gradient of the probabilities
//   softmax_backward ... -> gradient of the fused scores
//   fuse_backward    ... -> gradient of the patch scores over their norm, and the sums for the norm's own gradient
//   patch_backward   ... -> gradient of the pixel correlations
//
// A tile holds whole queries, so what its queries do not reach is zero; the host adds the products of all tiles. Every
// result has one writer and a fixed order of additions.
#include "contextual_attention_tiles.cuh"

namespace inpaint {
namespace {

constexpr int kBackwardThreads = 256;
// The positions of patch scores are cut into this many pieces, whose sums for the norm are kept apart: enough threads,
// and an order of additions that no device changes.
constexpr int kNormPieces = 32;

// gradients [queries, keys] (+)= sum of dB(p + e, q + e) over e in [0, reach_y) x [0, reach_x); dB [cells, key cells].
template <class T>
__global__ void contextual_attention_paste_backward_kernel(AttentionTile tile, const T* __restrict__ weight_gradients,
                                                           T* __restrict__ gradients, bool accumulate) {
  for (int64_t row = blockIdx.y; row < tile.queries(); row += gridDim.y) {
    const int64_t y = tile.top + row / tile.width - tile.cell_top, x = tile.left + row % tile.width - tile.cell_left;
    for (int64_t q = global_thread(); q < tile.keys(); q += grid_stride()) {
      const int64_t v = q / tile.key_width, u = q - v * tile.key_width;
      T sum = accumulate ? gradients[row * tile.keys() + q] : T(0);
      for (int64_t ey = 0; ey < tile.reach_y; ++ey) {
        for (int64_t ex = 0; ex < tile.reach_x; ++ex) {
          if (y + ey < 0 || y + ey >= tile.cell_height || x + ex < 0 || x + ex >= tile.cell_width) continue;
          const int64_t cell = (y + ey) * tile.cell_width + x + ex;
          sum += weight_gradients[cell * tile.key_cells() + (v + ey) * tile.key_cell_width + u + ex];
        }
      }
      gradients[row * tile.keys() + q] = sum;
    }
  }
}

// The sum of a value over a block, in every thread; the same order whatever runs beside it.
template <class T>
__device__ T block_sum(T value) {
  __shared__ T sums[kBackwardThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int step = kBackwardThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  const T total = sums[0];
  __syncthreads();
  return total;
}

// dS = A (dA - <A, dA>) factor, in place of dA; one block per query. Where a floor replaced a probability, its gradient
// stops there.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    contextual_attention_softmax_backward_kernel(AttentionTile tile, const T* __restrict__ factor,
                                                 const T* __restrict__ keep, T floor, const T* __restrict__ logits,
                                                 const T* __restrict__ statistics, T* __restrict__ gradients) {
  const Masking<T> unclamped{keep, T(-1)};
  for (int64_t row = blockIdx.x; row < tile.queries(); row += gridDim.x) {
    const T* own = logits + row * tile.keys();
    T* gradient = gradients + row * tile.keys();
    const T maximum = statistics[row], inverse_sum = statistics[tile.queries() + row];
    T dot = 0;
    for (int64_t q = threadIdx.x; q < tile.keys(); q += blockDim.x) {
      const T p = probability(own[q], maximum, inverse_sum, unclamped, q);
      if (p < floor) gradient[q] = 0;
      dot += p * gradient[q];
    }
    dot = block_sum(dot);
    for (int64_t q = threadIdx.x; q < tile.keys(); q += blockDim.x)
      gradient[q] = probability(own[q], maximum, inverse_sum, unclamped, q) * (gradient[q] - dot) * factor[q];
  }
}

// For the positions of patch scores: score_gradients [positions, keys] = dS0 / n, dS0 being the sum of the dS whose
// fused score contains it, and norm_sums[piece, q] += sum over a piece of the positions of dS0 S0. A thread owns a key.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    contextual_attention_fuse_backward_kernel(AttentionTile tile, const T* __restrict__ gradients,
                                              Correlations<T> correlations, const T* __restrict__ inverse_norm,
                                              const int32_t* __restrict__ positions, int64_t count,
                                              T* __restrict__ score_gradients, T* __restrict__ norm_sums) {
  const int64_t piece = ceil_div(count, kNormPieces), begin = blockIdx.y * piece, end = min(begin + piece, count);
  for (int64_t q = global_thread(); q < tile.keys(); q += grid_stride()) {
    T norm_sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = positions[i];
      T gradient = 0;
      for_each_fusing_pair(tile, p, q, [&](int64_t p_term, int64_t q_term) {
        const int64_t row = tile.row(p_term / tile.query_width, p_term % tile.query_width);
        if (row >= 0) gradient += gradients[row * tile.keys() + q_term];
      });
      if (gradient != T(0)) norm_sum += gradient * inverse_norm[q] * patch_score<T>(tile, p, q, correlations);
      score_gradients[i * tile.keys() + q] = gradient * inverse_norm[q];
    }
    norm_sums[blockIdx.y * tile.keys() + q] += norm_sum;
  }
}

// For the pixels of a tile: gradients [pixels, keys] = sum of dS0 / n over the patches that contain both pixels.
template <class T>
__global__ void contextual_attention_patch_backward_kernel(AttentionTile tile, Correlations<T> score_gradients,
                                                           const int32_t* __restrict__ pixels, int64_t count,
                                                           T* __restrict__ gradients) {
  for (int64_t i = blockIdx.y; i < count; i += gridDim.y) {
    const int64_t p = pixels[i], y = p / tile.query_width, x = p % tile.query_width;
    for (int64_t q = global_thread(); q < tile.keys(); q += grid_stride()) {
      const int64_t v = q / tile.key_width, u = q - v * tile.key_width;
      T sum = 0;
      for (int dy = -tile.before(); dy <= tile.after(); ++dy) {
        if (y - dy < 0 || y - dy >= tile.query_height || v - dy < 0 || v - dy >= tile.key_height) continue;
        for (int dx = -tile.before(); dx <= tile.after(); ++dx) {
          if (x - dx < 0 || x - dx >= tile.query_width || u - dx < 0 || u - dx >= tile.key_width) continue;
          sum += score_gradients((y - dy) * tile.query_width + x - dx, (v - dy) * tile.key_width + u - dx);
        }
      }
      gradients[i * tile.keys() + q] = sum;
    }
  }
}

// ---- Launchers ---------------------------------------------------------------------------------------------------

template <class T>
void launch_paste_backward(const AttentionTile& tile, const T* weight_gradients, T* gradients, bool accumulate,
                           cudaStream_t stream) {
  launch_kernel(contextual_attention_paste_backward_kernel<T>, dim3(blocks_for(tile.keys()), grid_y(tile.queries())),
                dim3(kThreadsPerBlock), 0, stream, tile, weight_gradients, gradients, accumulate);
}

template <class T>
void launch_softmax_backward(const AttentionTile& tile, const T* factor, const T* keep, T floor, const T* logits,
                             const T* statistics, T* gradients, cudaStream_t stream) {
  launch_kernel(contextual_attention_softmax_backward_kernel<T>, dim3(static_cast<unsigned>(tile.queries())),
                dim3(kBackwardThreads), 0, stream, tile, factor, keep, floor, logits, statistics, gradients);
}

// positions: of patch scores, `count` of them; norm_sums [kNormPieces, keys].
template <class T>
void launch_fuse_backward(const AttentionTile& tile, const T* gradients, const T* correlations, const int32_t* row_of,
                          const T* inverse_norm, const int32_t* positions, int64_t count, T* score_gradients,
                          T* norm_sums, cudaStream_t stream) {
  launch_kernel(contextual_attention_fuse_backward_kernel<T>, dim3(blocks_for(tile.keys()), kNormPieces),
                dim3(kBackwardThreads), 0, stream, tile, gradients, Correlations<T>{correlations, row_of, tile.keys()},
                inverse_norm, positions, count, score_gradients, norm_sums);
}

// row_of: rows of the positions of patch scores; pixels: `count` of them.
template <class T>
void launch_patch_backward(const AttentionTile& tile, const T* score_gradients, const int32_t* row_of,
                           const int32_t* pixels, int64_t count, T* gradients, cudaStream_t stream) {
  launch_kernel(contextual_attention_patch_backward_kernel<T>, dim3(blocks_for(tile.keys()), grid_y(count)),
                dim3(kThreadsPerBlock), 0, stream, tile, Correlations<T>{score_gradients, row_of, tile.keys()}, pixels,
                count, gradients);
}

}  // namespace
}  // namespace inpaint

#ifndef INPAINT_EMULATION

#include "contextual_attention_arguments.cuh"

namespace inpaint {
namespace {

// ---- torch -------------------------------------------------------------------------------------------------------

void contextual_attention_paste_backward(const Tensor& tile_fields, const Tensor& weight_gradients, bool accumulate,
                                         Tensor gradients) {
  const AttentionTile tile = tile_of(tile_fields);
  check_elements(weight_gradients, "weight_gradients", tile.cells() * tile.key_cells());
  check_elements(gradients, "gradients", tile.queries() * tile.keys());
  const CudaLaunch launch(gradients);
  dispatch_float_double(gradients.scalar_type(), "gradients", [&](auto zero) {
    using T = decltype(zero);
    launch_paste_backward<T>(tile, weight_gradients.const_data_ptr<T>(), gradients.mutable_data_ptr<T>(), accumulate,
                             launch.stream);
  });
}

void contextual_attention_softmax_backward(const Tensor& tile_fields, const Tensor& factor,
                                           const std::optional<Tensor>& keep, double floor, const Tensor& logits,
                                           const Tensor& statistics, Tensor gradients) {
  const AttentionTile tile = tile_of(tile_fields);
  check_elements(logits, "logits", tile.queries() * tile.keys());
  check_elements(gradients, "gradients", tile.queries() * tile.keys());
  const CudaLaunch launch(gradients);
  dispatch_float_double(gradients.scalar_type(), "gradients", [&](auto zero) {
    using T = decltype(zero);
    launch_softmax_backward<T>(tile, factor.const_data_ptr<T>(), data_or_null<T>(keep), static_cast<T>(floor),
                               logits.const_data_ptr<T>(), statistics.const_data_ptr<T>(),
                               gradients.mutable_data_ptr<T>(), launch.stream);
  });
}

void contextual_attention_fuse_backward(const Tensor& tile_fields, const Tensor& gradients, const Tensor& correlations,
                                        const Tensor& row_of, const Tensor& inverse_norm, const Tensor& positions,
                                        Tensor score_gradients, Tensor norm_sums) {
  const AttentionTile tile = tile_of(tile_fields);
  check_elements(gradients, "gradients", tile.queries() * tile.keys());
  check_elements(score_gradients, "score_gradients", positions.numel() * tile.keys());
  check_elements(norm_sums, "norm_sums", kNormPieces * tile.keys());
  const CudaLaunch launch(gradients);
  dispatch_float_double(gradients.scalar_type(), "gradients", [&](auto zero) {
    using T = decltype(zero);
    launch_fuse_backward<T>(tile, gradients.const_data_ptr<T>(), correlations.const_data_ptr<T>(),
                            row_of.const_data_ptr<int32_t>(), inverse_norm.const_data_ptr<T>(),
                            positions.const_data_ptr<int32_t>(), positions.numel(),
                            score_gradients.mutable_data_ptr<T>(), norm_sums.mutable_data_ptr<T>(), launch.stream);
  });
}

void contextual_attention_patch_backward(const Tensor& tile_fields, const Tensor& score_gradients, const Tensor& row_of,
                                         const Tensor& pixels, Tensor gradients) {
  const AttentionTile tile = tile_of(tile_fields);
  check_elements(gradients, "gradients", pixels.numel() * tile.keys());
  const CudaLaunch launch(gradients);
  dispatch_float_double(gradients.scalar_type(), "gradients", [&](auto zero) {
    using T = decltype(zero);
    launch_patch_backward<T>(tile, score_gradients.const_data_ptr<T>(), row_of.const_data_ptr<int32_t>(),
                             pixels.const_data_ptr<int32_t>(), pixels.numel(), gradients.mutable_data_ptr<T>(),
                             launch.stream);
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CUDA, m) {
  m.impl("contextual_attention_paste_backward", TORCH_BOX(&inpaint::contextual_attention_paste_backward));
  m.impl("contextual_attention_softmax_backward", TORCH_BOX(&inpaint::contextual_attention_softmax_backward));
  m.impl("contextual_attention_fuse_backward", TORCH_BOX(&inpaint::contextual_attention_fuse_backward));
  m.impl("contextual_attention_patch_backward", TORCH_BOX(&inpaint::contextual_attention_patch_backward));
}

#endif  // INPAINT_EMULATION
