// contextual_attention, backward, on CUDA: the passes between the matrix products of a tile. The forward's kernels have
// computed its logits, statistics and weights again, and with the weights the sums of A dA over keys.
//
//   softmax_backward gradient of the paste's weights -> gradient of the fused scores, in place of the logits
//   fuse_backward    ... -> gradient of the patch scores over their norm, and the sums for the norm's own gradient
//   patch_backward   ... -> gradient of the pixel correlations
//
// A tile holds whole queries, so what its queries do not reach is zero; the host adds the products of all tiles. Every
// result has one writer and a fixed order of additions.
#include "contextual_attention_tiles.cuh"

namespace inpaint {
namespace {

constexpr int kSoftmaxThreads = 256;
// Columns of one block of softmax_backward: few enough that a small tile gives work to a whole GPU, so many that the
// sum over a query's keys, which each block reads, stays cheap.
constexpr int64_t kSoftmaxColumns = 16384;
// The positions of patch scores are cut into this many pieces, whose sums for the norm are kept apart: enough threads,
// and an order of additions that no device changes.
constexpr int kNormPieces = 32;

// ---- Softmax -----------------------------------------------------------------------------------------------------

// The sum of a value over a block, in every thread; the same order whatever runs beside it.
template <class T>
__device__ T block_sum(T value) {
  __shared__ T sums[kSoftmaxThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int step = kSoftmaxThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  const T total = sums[0];
  __syncthreads();
  return total;
}

// Of all groups of phases, which are 1, or 4 in the order (y, x) of which the second of an axis spans one step less:
// gradients dB [phases, samples, cells, key cells], and what paste_weights has summed of A dA [phases][samples, cells,
// reach_y * reach_x, warps], `dot_stride` apart.
template <class T>
struct PasteGradients {
  const T* __restrict__ weights;
  const T* __restrict__ dots;
  int64_t phases, warps, dot_stride;

  __device__ int64_t reach_y(const AttentionTile& tile, int64_t phase) const { return tile.reach_y - phase / 2; }
  __device__ int64_t reach_x(const AttentionTile& tile, int64_t phase) const { return tile.reach_x - phase % 2; }
};

// dS = A (dA - <A, dA>) factor, in place of the logits, dA(p, q) being the sum of dB(p + e, q + e) over e and phases.
// One block per query and kSoftmaxColumns, four keys a thread. Where a floor replaced a probability, its gradient
// stops.
template <class T>
__global__ void __launch_bounds__(kSoftmaxThreads, 1)
    contextual_attention_softmax_backward_kernel(AttentionTile tile, PasteGradients<T> pasted,
                                                 const T* __restrict__ factor, Masking<T> masking,
                                                 const T* __restrict__ statistics, T* __restrict__ logits) {
  const int64_t sample = blockIdx.z, row = blockIdx.x;
  masking = masking.of_sample(tile, sample);
  factor += sample * tile.logit_columns();
  statistics += sample * 2 * tile.queries();
  T* own = logits + (sample * tile.queries() + row) * tile.logit_columns();
  // The query's own cell; the others of its patch lie to the right and below, all of them in the tile.
  const int64_t y = tile.top + row / tile.width - tile.cell_top, x = tile.left + row % tile.width - tile.cell_left;
  const int64_t first_cell = sample * tile.cells() + y * tile.cell_width + x;
  T dot = 0;
  for (int64_t phase = 0; phase < pasted.phases; ++phase) {
    const int64_t reach_y = pasted.reach_y(tile, phase), reach_x = pasted.reach_x(tile, phase);
    for (int64_t ey = 0; ey < reach_y; ++ey) {
      for (int64_t ex = 0; ex < reach_x; ++ex) {
        const int64_t cell = first_cell + ey * tile.cell_width + ex;
        const T* sums = pasted.dots + phase * pasted.dot_stride + ((cell * reach_y + ey) * reach_x + ex) * pasted.warps;
        for (int64_t j = threadIdx.x; j < pasted.warps; j += blockDim.x) dot += sums[j];
      }
    }
  }
  dot = block_sum(dot);
  const T maximum = statistics[row], inverse_sum = statistics[tile.queries() + row];
  for (int64_t chunk = blockIdx.y * kSoftmaxColumns; chunk < tile.logit_columns();
       chunk += gridDim.y * kSoftmaxColumns) {
    const int64_t end = min(chunk + kSoftmaxColumns, tile.logit_columns());
    for (int64_t j = chunk + kQuad * int64_t{threadIdx.x}; j < end; j += kQuad * kSoftmaxThreads) {
      const int v = static_cast<int>(j) / static_cast<int>(tile.key_cell_width);
      const int64_t u = j - v * tile.key_cell_width;
      Quad<T> sum{};
      for (int64_t phase = 0; phase < pasted.phases; ++phase) {
        const T* weights = pasted.weights + phase * tile.samples * tile.cells() * tile.key_cells();
        for (int64_t ey = 0; ey < pasted.reach_y(tile, phase); ++ey) {
          for (int64_t ex = 0; ex < pasted.reach_x(tile, phase); ++ex) {
            const int64_t cell = first_cell + ey * tile.cell_width + ex;
            const T* line = weights + cell * tile.key_cells() + (v + ey) * tile.key_cell_width;
            const Quad<T> term = quad_from(line, u + ex, tile.key_cell_width);
#pragma unroll
            for (int k = 0; k < kQuad; ++k) sum.at[k] += term.at[k];
          }
        }
      }
      const Quad<T> logit = load_quad(own + j), factors = load_quad(factor + j);
      Quad<T> keep{T(1), T(1), T(1), T(1)}, result{};
      if (masking.keep != nullptr) keep = load_quad(masking.keep + j);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (u + k >= tile.key_width) continue;
        const T p = softmax(logit.at[k], maximum, inverse_sum) * keep.at[k];
        result.at[k] = p * ((p < masking.floor ? T(0) : sum.at[k]) - dot) * factors.at[k];
      }
      store_quad(own + j, result);
    }
  }
}

// ---- Walks over positions ------------------------------------------------------------------------------------------

// The positions of a walk: rows [kWalk * walk, ...) of a list of positions, most of them each other's neighbours.
struct PositionCursor {
  int64_t p = -2, y = 0, x = 0;
  bool follows = false;  // whether this position is the right neighbour of the one before

  __device__ GridPosition at() const { return {static_cast<int>(y), static_cast<int>(x)}; }

  __device__ void move_to(const AttentionTile& tile, int64_t position) {
    follows = position == p + 1 && x + 1 < tile.query_width;
    p = position;
    if (follows) {
      ++x;
    } else {
      y = static_cast<int>(p) / static_cast<int>(tile.query_width);
      x = p - y * tile.query_width;
    }
  }
};

// ---- Fuse --------------------------------------------------------------------------------------------------------

// The gradients of fused scores that contain the patch score of a walk's present step, as a window that slides along
// the diagonal. Holds where the steps of the fuse stay in the query map and in the rows of the key map.
template <class T, int kHalf>
class FuseWindow {
 public:
  static constexpr int kSide = 2 * kHalf + 1;

  __device__ FuseWindow(const AttentionTile& tile, const T* gradients) : tile_(tile), gradients_(gradients) {}

  // The terms `kHalf` to the right of query (y, x), and as far after the key in row-major order, enter.
  __device__ void slide(int64_t y, int64_t x, const KeyCursor& key) {
    int64_t v = key.v, u = key.u + kHalf;
    if (u >= tile_.key_width) u -= tile_.key_width, ++v;
    const bool exists = key.f + kHalf >= 0 && key.f + kHalf < tile_.keys();
#pragma unroll
    for (int a = 0; a < kSide; ++a) {
#pragma unroll
      for (int b = 0; b + 1 < kSide; ++b) window_[a][b] = window_[a][b + 1];
      const int64_t row = tile_.row(y + a - kHalf, x + kHalf), key_row = v + a - kHalf;
      const bool inside = exists && row >= 0 && key_row >= 0 && key_row < tile_.key_height;
      window_[a][kSide - 1] =
          inside ? gradients_[row * tile_.logit_columns() + key_row * tile_.key_cell_width + u] : T(0);
    }
  }

  __device__ T sum() const {
    T sum = 0;
#pragma unroll
    for (int b = 0; b < kSide; ++b) {
#pragma unroll
      for (int a = 0; a < kSide; ++a) sum += window_[a][b];
    }
    return sum;
  }

  // Whether the window has all terms of position (y, x) and a key, and no others.
  __device__ bool is_whole(int64_t y, int64_t x, const KeyCursor& key) const {
    const int64_t first_line = key.v - (key.u < kHalf), last_line = key.v + (key.u + kHalf >= tile_.key_width);
    return y >= kHalf && y + kHalf < tile_.query_height && x >= kHalf && x + kHalf < tile_.query_width &&
           first_line >= kHalf && last_line + kHalf < tile_.key_height;
  }

 private:
  const AttentionTile& tile_;
  const T* gradients_;
  T window_[kSide][kSide] = {};
};

// dS0(p, q) term by term: for any fuse, and at the borders.
template <class T>
__device__ T fusing_gradients(const AttentionTile& tile, const T* gradients, const GridPosition& p,
                              const GridPosition& q) {
  T sum = 0;
  for_each_fusing_pair(tile, p, q, [&](const GridPosition& p_term, const GridPosition& q_term) {
    const int64_t row = tile.row(p_term.y, p_term.x);
    if (row >= 0) sum += gradients[row * tile.logit_columns() + q_term.y * tile.key_cell_width + q_term.x];
  });
  return sum;
}

// For the positions of patch scores: score_gradients [samples, positions, key columns] = dS0 / n, dS0 being the sum of
// the dS whose fused score contains it, rounded to W; norm_sums [samples, piece, 2, keys] += sum over a piece of the
// positions of dS0 S0. kPatch 0: any patch and fuse.
//
// A key's terms for the norm are those of one thread after the other: along the walk the sum moves from lane to lane,
// so that lane `l` holds that of its present key. A warp begins 32 keys after the one before and reaches 15 into it, so
// the sums of neighbouring warps go to two arrays.
template <class T, class W, int kPatch, int kHalf>
__global__ void __launch_bounds__(kWalkThreads, 1)
    contextual_attention_fuse_backward_kernel(AttentionTile tile, const T* __restrict__ gradients,
                                              Pairs<T> correlations, const T* __restrict__ inverse_norm,
                                              const int32_t* __restrict__ positions, W* __restrict__ score_gradients,
                                              T* __restrict__ norm_sums) {
  constexpr bool kWindowed = kPatch > 0;
  constexpr int kBefore = kWindowed ? (kPatch - 1) / 2 : 0, kAfter = kWindowed ? kPatch - 1 - kBefore : 0;
  using Fused = FuseWindow<T, kHalf>;
  using Patch = PatchWindow<T, T, -kBefore, kAfter>;
  constexpr int kLead = (Fused::kSide > Patch::kSide ? Fused::kSide : Patch::kSide) - 1;
  const int64_t sample = blockIdx.z;
  gradients += sample * tile.queries() * tile.logit_columns();
  correlations.values += sample * tile.pixels * tile.key_columns;
  inverse_norm += sample * tile.keys();
  score_gradients += sample * tile.positions * tile.key_columns;
  const int lane = threadIdx.x % kWarp;
  const int64_t lane_key = global_thread() - (kWalk - 1);
  T early_sum = 0, late_sum = 0;  // of keys that have left the warp, one a lane, and of those still in it
  for (int64_t walk = blockIdx.y; walk * kWalk < tile.positions; walk += kNormPieces) {
    Fused fused(tile, gradients);
    Patch patch(tile, correlations);
    PositionCursor position;
    KeyCursor key(tile, lane_key);
    T left = 0, present = 0;
    for (int step = 0; step < kWalk; ++step, key.advance(tile)) {
      const int64_t i = walk * kWalk + step;
      if (i < tile.positions) {
        position.move_to(tile, positions[i]);
        if (kWindowed && !position.follows) {
          KeyCursor lead(tile, key.f - kLead);
          for (int ahead = -kLead; ahead < 0; ++ahead, lead.advance(tile)) {
            fused.slide(position.y, position.x + ahead, lead);
            patch.slide(position.y, position.x + ahead, lead.f);
          }
        }
        if (kWindowed) {
          fused.slide(position.y, position.x, key);
          patch.slide(position.y, position.x, key.f);
        }
        if (key.f >= 0 && key.f < tile.keys()) {
          const bool is_whole = kWindowed && fused.is_whole(position.y, position.x, key);
          const T gradient =
              is_whole ? fused.sum() : fusing_gradients(tile, gradients, position.at(), GridPosition{key.v, key.u});
          const T scaled = gradient * inverse_norm[key.f];
          if (gradient != T(0)) {
            present += scaled * (kWindowed ? patch.sum(key.u)
                                           : patch_score<T>(tile, position.at(), GridPosition{key.v, key.u},
                                                            -tile.before(), tile.after(), correlations));
          }
          score_gradients[i * tile.key_columns + key.f] = static_cast<W>(scaled);
        }
      }
      if (step + 1 < kWalk) {
        const T leaving = __shfl_sync(0xffffffffu, present, 0);
        if (lane == step) left = leaving;
        present = __shfl_down_sync(0xffffffffu, present, 1);
        if (lane == kWarp - 1) present = 0;
      }
    }
    early_sum += left;
    late_sum += present;
  }
  const int64_t first_key = lane_key - lane, warp = global_thread() / kWarp;
  T* sums = norm_sums + ((sample * kNormPieces + blockIdx.y) * 2 + warp % 2) * tile.keys();
  const int64_t early = first_key + lane, late = early + kWalk - 1;
  if (lane < kWalk - 1 && early >= 0 && early < tile.keys()) sums[early] += early_sum;
  if (late >= 0 && late < tile.keys()) sums[late] += late_sum;
}

// ---- Patches -----------------------------------------------------------------------------------------------------

// For the pixels of a tile: gradients [samples, pixels, key columns] of type W = sum of dS0 / n over the patches that
// contain both pixels; 0 in the padding, which the products read. kPatch 0: any patch.
template <class T, class W, int kPatch>
__global__ void __launch_bounds__(kWalkThreads, 1)
    contextual_attention_patch_backward_kernel(AttentionTile tile, Pairs<T, W> score_gradients,
                                               const int32_t* __restrict__ pixels, W* __restrict__ gradients) {
  constexpr bool kWindowed = kPatch > 0;
  constexpr int kBefore = kWindowed ? (kPatch - 1) / 2 : 0, kAfter = kWindowed ? kPatch - 1 - kBefore : 0;
  using Patch = PatchWindow<T, W, -kAfter, kBefore>;
  const int64_t sample = blockIdx.z;
  score_gradients.values += sample * tile.positions * tile.key_columns;
  gradients += sample * tile.pixels * tile.key_columns;
  const int64_t lane_key = global_thread() - (kWalk - 1);
  for (int64_t walk = blockIdx.y; walk * kWalk < tile.pixels; walk += gridDim.y) {
    Patch patch(tile, score_gradients);
    PositionCursor position;
    KeyCursor key(tile, lane_key);
    for (int64_t i = walk * kWalk; i < min(walk * kWalk + kWalk, tile.pixels); ++i, key.advance(tile)) {
      position.move_to(tile, pixels[i]);
      if (kWindowed && !position.follows)
        for (int ahead = 1 - Patch::kSide; ahead < 0; ++ahead)
          patch.slide(position.y, position.x + ahead, key.f + ahead);
      if (kWindowed) patch.slide(position.y, position.x, key.f);
      if (key.f < 0 || key.f >= tile.key_columns) continue;
      T sum = 0;
      if (key.f < tile.keys())
        sum = kWindowed ? patch.sum(key.u)
                        : patch_score<T>(tile, position.at(), GridPosition{key.v, key.u}, -tile.after(), tile.before(),
                                         score_gradients);
      gradients[i * tile.key_columns + key.f] = static_cast<W>(sum);
    }
  }
}

// ---- Launchers ---------------------------------------------------------------------------------------------------

// tile: for the first phases. weight_gradients [phases, samples, cells, key cells]; dots [phases, samples, cells,
// reach_y * reach_x, warps]; logits become the gradients of fused scores.
template <class T>
void launch_softmax_backward(const AttentionTile& tile, const T* weight_gradients, const T* dots, int64_t phases,
                             int64_t warps, const T* factor, const T* keep, T floor, const T* statistics, T* logits,
                             cudaStream_t stream) {
  const PasteGradients<T> pasted{weight_gradients, dots, phases, warps,
                                 tile.samples * tile.cells() * tile.reach_y * tile.reach_x * warps};
  launch_kernel(contextual_attention_softmax_backward_kernel<T>,
                dim3(static_cast<unsigned>(tile.queries()), grid_y(ceil_div(tile.logit_columns(), kSoftmaxColumns)),
                     grid_z(tile)),
                dim3(kSoftmaxThreads), 0, stream, tile, pasted, factor, Masking<T>{keep, floor}, statistics, logits);
}

// Blocks in x of a walk over all keys, or columns.
inline unsigned walk_blocks(int64_t keys) { return static_cast<unsigned>(ceil_div(keys + kWalk - 1, kWalkThreads)); }

// positions: of patch scores; norm_sums [samples, kNormPieces, 2, keys].
template <class T, class W>
void launch_fuse_backward(const AttentionTile& tile, const T* gradients, const T* correlations, const int32_t* row_of,
                          const T* inverse_norm, const int32_t* positions, W* score_gradients, T* norm_sums,
                          cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel, dim3(walk_blocks(tile.keys()), kNormPieces, grid_z(tile)), dim3(kWalkThreads), 0, stream,
                  tile, gradients, Pairs<T>{correlations, row_of, tile.key_columns}, inverse_norm, positions,
                  score_gradients, norm_sums);
  };
  if (tile.patch == 3 && tile.half == 1)
    launch(contextual_attention_fuse_backward_kernel<T, W, 3, 1>);
  else if (tile.patch == 3 && tile.half == 0)
    launch(contextual_attention_fuse_backward_kernel<T, W, 3, 0>);
  else if (tile.patch == 1 && tile.half == 0)
    launch(contextual_attention_fuse_backward_kernel<T, W, 1, 0>);
  else
    launch(contextual_attention_fuse_backward_kernel<T, W, 0, 0>);
}

// row_of: rows of the positions of patch scores.
template <class T, class W>
void launch_patch_backward(const AttentionTile& tile, const W* score_gradients, const int32_t* row_of,
                           const int32_t* pixels, W* gradients, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel, dim3(walk_blocks(tile.key_columns), grid_y(ceil_div(tile.pixels, kWalk)), grid_z(tile)),
                  dim3(kWalkThreads), 0, stream, tile, Pairs<T, W>{score_gradients, row_of, tile.key_columns}, pixels,
                  gradients);
  };
  if (tile.patch == 3)
    launch(contextual_attention_patch_backward_kernel<T, W, 3>);
  else if (tile.patch == 1)
    launch(contextual_attention_patch_backward_kernel<T, W, 1>);
  else
    launch(contextual_attention_patch_backward_kernel<T, W, 0>);
}

}  // namespace
}  // namespace inpaint

#ifndef INPAINT_EMULATION

#include "contextual_attention_arguments.cuh"

namespace inpaint {
namespace {

// ---- torch -------------------------------------------------------------------------------------------------------

void contextual_attention_softmax_backward(const Tensor& tile_fields, const Tensor& weight_gradients,
                                           const Tensor& dots, const Tensor& factor, const std::optional<Tensor>& keep,
                                           double floor, const Tensor& statistics, Tensor logits) {
  const AttentionTile tile = tile_of(tile_fields);
  check_logits(tile, logits);
  check_keep(tile, keep);
  check_elements(factor, "factor", tile.samples * tile.logit_columns());
  check_elements(statistics, "statistics", tile.samples * 2 * tile.queries());
  check_dense(dots, "dots", 5);
  const int64_t phases = dots.size(0);
  STD_TORCH_CHECK(phases == 1 || phases == 4, "dots: expected 1 or 4 groups of phases, got ", phases);
  check_elements(dots, "dots", phases * tile.samples * tile.cells() * tile.reach_y * tile.reach_x * dots.size(4));
  check_elements(weight_gradients, "weight_gradients", phases * tile.samples * tile.cells() * tile.key_cells());
  const CudaLaunch launch(logits);
  dispatch_float_double(logits.scalar_type(), "logits", [&](auto zero) {
    using T = decltype(zero);
    launch_softmax_backward<T>(tile, weight_gradients.const_data_ptr<T>(), dots.const_data_ptr<T>(), phases,
                               dots.size(4), factor.const_data_ptr<T>(), data_or_null<T>(keep), static_cast<T>(floor),
                               statistics.const_data_ptr<T>(), logits.mutable_data_ptr<T>(), launch.stream);
  });
}

void contextual_attention_fuse_backward(const Tensor& tile_fields, const Tensor& gradients, const Tensor& correlations,
                                        const Tensor& row_of, const Tensor& inverse_norm, const Tensor& positions,
                                        Tensor score_gradients, Tensor norm_sums) {
  const AttentionTile tile = tile_of(tile_fields);
  check_logits(tile, gradients);
  check_elements(correlations, "correlations", tile.samples * tile.pixels * tile.key_columns);
  check_elements(inverse_norm, "inverse_norm", tile.samples * tile.keys());
  check_elements(positions, "positions", tile.positions);
  check_elements(score_gradients, "score_gradients", tile.samples * tile.positions * tile.key_columns);
  check_elements(norm_sums, "norm_sums", tile.samples * kNormPieces * 2 * tile.keys());
  const CudaLaunch launch(gradients);
  dispatch_floating(score_gradients.scalar_type(), "score_gradients", [&](auto zero) {
    using W = decltype(zero);
    using T = ScoreType<W>;
    launch_fuse_backward<T, W>(tile, gradients.const_data_ptr<T>(), correlations.const_data_ptr<T>(),
                               row_of.const_data_ptr<int32_t>(), inverse_norm.const_data_ptr<T>(),
                               positions.const_data_ptr<int32_t>(), static_cast<W*>(score_gradients.data_ptr()),
                               norm_sums.mutable_data_ptr<T>(), launch.stream);
  });
}

void contextual_attention_patch_backward(const Tensor& tile_fields, const Tensor& score_gradients, const Tensor& row_of,
                                         const Tensor& pixels, Tensor gradients) {
  const AttentionTile tile = tile_of(tile_fields);
  check_elements(score_gradients, "score_gradients", tile.samples * tile.positions * tile.key_columns);
  check_elements(pixels, "pixels", tile.pixels);
  check_elements(gradients, "gradients", tile.samples * tile.pixels * tile.key_columns);
  STD_TORCH_CHECK(score_gradients.scalar_type() == gradients.scalar_type(),
                  "gradients: expected the dtype of score_gradients");
  const CudaLaunch launch(gradients);
  dispatch_floating(gradients.scalar_type(), "gradients", [&](auto zero) {
    using W = decltype(zero);
    using T = ScoreType<W>;
    launch_patch_backward<T, W>(tile, static_cast<const W*>(score_gradients.data_ptr()),
                                row_of.const_data_ptr<int32_t>(), pixels.const_data_ptr<int32_t>(),
                                static_cast<W*>(gradients.data_ptr()), launch.stream);
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CUDA, m) {
  m.impl("contextual_attention_softmax_backward", TORCH_BOX(&inpaint::contextual_attention_softmax_backward));
  m.impl("contextual_attention_fuse_backward", TORCH_BOX(&inpaint::contextual_attention_fuse_backward));
  m.impl("contextual_attention_patch_backward", TORCH_BOX(&inpaint::contextual_attention_patch_backward));
}

#endif  // INPAINT_EMULATION
