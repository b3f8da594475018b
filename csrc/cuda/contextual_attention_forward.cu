// contextual_attention, forward, on CUDA: the passes between the two matrix products of a tile.
//
//   scores         pixel correlations -> logits and, per query and warp, maximum and sum of exponentials
//   statistics     these partial ones -> maximum and 1 / sum of every query
//   paste_weights  exp, normalise, mask and sum along diagonals: the matrix that multiplies the value cells
//   paste          cells -> output pixels
//
// Statistics come before probabilities because the paste adds those of several queries: no sum can be corrected later.
// Every result has one writer and a fixed order of additions, so runs are bit-equal.
#include <cstring>

#include "contextual_attention_tiles.cuh"

namespace inpaint {
namespace {

constexpr int kPasteThreads = 256;

// ---- Rows of the correlations ------------------------------------------------------------------------------------

// The pixels of a tile, ascending, as runs: runs[2 i] is the first position, runs[2 i + 1] the first row.
constexpr int kMaxRuns = 480;
struct PixelRuns {
  int32_t count;
  int32_t rows;  // in all
  int32_t runs[2 * kMaxRuns];
};

// row_of[p] = row of position p, -1 if it has none; position_of[row] is its inverse.
__global__ void contextual_attention_rows_kernel(PixelRuns pixels, int32_t* __restrict__ row_of,
                                                 int32_t* __restrict__ position_of, int64_t positions) {
  for (int64_t p = global_thread(); p < positions; p += grid_stride()) {
    int first = 0, last = pixels.count;  // the last run that begins at or before p lies in [first, last)
    while (last - first > 1) {
      const int middle = (first + last) / 2;
      (pixels.runs[2 * middle] <= p ? first : last) = middle;
    }
    const int32_t begin_row = pixels.runs[2 * first + 1];
    const int32_t end_row = first + 1 < pixels.count ? pixels.runs[2 * first + 3] : pixels.rows;
    const int64_t row = begin_row + p - pixels.runs[2 * first];
    const bool found = row >= begin_row && row < end_row;
    row_of[p] = found ? static_cast<int32_t>(row) : -1;
    if (found) position_of[row] = static_cast<int32_t>(p);
  }
}

// ---- Scores ------------------------------------------------------------------------------------------------------

// Steps of the fuse that stay in the query map and, downwards, in the key map.
struct PlainSteps {
  int first_e = 1, last_e = 0, first_d = 1, last_d = 0;

  PlainSteps() = default;  // none
  __device__ PlainSteps(const AttentionTile& tile, const GridPosition& p, const GridPosition& q, int half) {
    first_e = max(-half, -min(p.y, q.y));
    last_e = min(half, static_cast<int>(min(tile.query_height - p.y, tile.key_height - q.y)) - 1);
    first_d = max(-half, -p.x);
    last_d = min(half, static_cast<int>(tile.query_width) - 1 - p.x);
  }
  __device__ bool has_down(int e) const { return e >= first_e && e <= last_e; }
  __device__ bool has_right(int d) const { return d >= first_d && d <= last_d; }
  __device__ bool are_all(int half) const {
    return has_down(-half) && has_down(half) && has_right(-half) && has_right(half);
  }
};

// What S(p, q) sums beyond the plain steps, term by term: everything for a general patch and fuse, a third or less at
// the borders, where steps wrap around.
template <class T>
__device__ T wrapping_score(const AttentionTile& tile, const Pairs<T>& correlations, const T* inverse_norm,
                            const GridPosition& p, const GridPosition& q, const PlainSteps& plain) {
  T sum = 0;
  for_each_fused_pair(tile, p, q, [&](const GridPosition& p_term, const GridPosition& q_term, int e, int d) {
    if (!plain.has_down(e) || !plain.has_right(d)) {
      sum += inverse_norm[q_term.y * tile.key_width + q_term.x] *
             patch_score<T>(tile, p_term, q_term, -tile.before(), tile.after(), correlations);
    }
  });
  return sum;
}

// The correlations that S of a walk's present step sums, as a window that slides along the diagonal. It has those of
// plain steps of the fuse; among them key columns may wrap, and patches may reach outside of the maps.
template <class T, int kPatch, int kHalf>
class DiagonalWindow {
 public:
  static constexpr int kBefore = (kPatch - 1) / 2, kAfter = kPatch - 1 - kBefore;
  static constexpr int kLow = kBefore + kHalf, kHigh = kAfter + kHalf, kSide = kLow + kHigh + 1;

  __device__ DiagonalWindow(const AttentionTile& tile, const Pairs<T>& correlations, const T* inverse_norm)
      : tile_(tile), correlations_(correlations), inverse_norm_(inverse_norm) {}

  // The column of terms `kHigh` to the right of (y, x) and key f enters, the leftmost one leaves.
  __device__ void slide(int64_t y, int64_t x, int64_t f) {
#pragma unroll
    for (int a = 0; a < kSide; ++a) {
#pragma unroll
      for (int b = 0; b + 1 < kSide; ++b) window_[a][b] = window_[a][b + 1];
      window_[a][kSide - 1] = term(y + a - kLow, x + kHigh, f + kHigh + (a - kLow) * tile_.key_width);
    }
#pragma unroll
    for (int e = 0; e <= 2 * kHalf; ++e) {
#pragma unroll
      for (int d = 0; d < 2 * kHalf; ++d) norm_[e][d] = norm_[e][d + 1];
      const int64_t q = f + kHalf + (e - kHalf) * tile_.key_width;
      norm_[e][2 * kHalf] = q >= 0 && q < tile_.keys() ? inverse_norm_[q] : T(0);
    }
  }

  // The part of S(p, key f) that plain steps contribute, f in column u of the keys.
  __device__ T score(int64_t u, const PlainSteps& plain) const {
    T sum = 0;
#pragma unroll
    for (int d = 0; d <= 2 * kHalf; ++d) {
      if (!plain.has_right(d - kHalf)) continue;
      int64_t column = u + d - kHalf;  // of the fused neighbour, which may lie in the row before or after
      column += column < 0 ? tile_.key_width : column >= tile_.key_width ? -tile_.key_width : 0;
      T across[kSide];
#pragma unroll
      for (int a = 0; a < kSide; ++a) {
        across[a] = 0;
#pragma unroll
        for (int dx = 0; dx < kPatch; ++dx) {
          const int64_t at = column + dx - kBefore;
          if (at >= 0 && at < tile_.key_width) across[a] += window_[a][d + dx];
        }
      }
#pragma unroll
      for (int e = 0; e <= 2 * kHalf; ++e) {
        if (!plain.has_down(e - kHalf)) continue;
        T patch = 0;
#pragma unroll
        for (int dy = 0; dy < kPatch; ++dy) patch += across[e + dy];
        sum += patch * norm_[e][d];
      }
    }
    return sum;
  }

 private:
  __device__ T term(int64_t y, int64_t x, int64_t q) const {
    if (y < 0 || y >= tile_.query_height || x < 0 || x >= tile_.query_width || q < 0 || q >= tile_.keys()) return T(0);
    return correlations_(y * tile_.query_width + x, q);
  }

  const AttentionTile& tile_;
  const Pairs<T>& correlations_;
  const T* inverse_norm_;
  T window_[kSide][kSide] = {};
  T norm_[2 * kHalf + 1][2 * kHalf + 1] = {};
};

// Maximum and sum of exponentials of a warp's logits of one query, in every lane; a lane without one passes -inf.
template <class T>
__device__ void warp_statistics(T logit, T* maximum, T* sum) {
  T most = logit;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, most, step);
    most = other > most ? other : most;
  }
  T total = most == -INFINITY ? T(0) : exp(logit - most);
  if (logit != logit) total = logit;  // a NaN shall reach every probability of its query
  *maximum = most;
  *sum = warp_sum(total);
}

// logits [samples, queries, logit columns]; partial [samples][2][queries][partials]: one maximum and one sum of
// exponentials per query and warp. Block (i, j): keys from i * kWalkThreads - (kWalk - 1) on, walk j. kPatch 0: any
// patch and fuse.
template <class T, int kPatch, int kHalf>
__global__ void __launch_bounds__(kWalkThreads, 1)
    contextual_attention_scores_kernel(AttentionTile tile, Pairs<T> correlations, const T* __restrict__ inverse_norm,
                                       const T* __restrict__ factor, const T* __restrict__ offset,
                                       T* __restrict__ logits, T* __restrict__ partial, int64_t partials) {
  constexpr bool kWindowed = kPatch > 0;
  using Window = DiagonalWindow<T, kWindowed ? kPatch : 1, kHalf>;
  const int64_t sample = blockIdx.z;
  correlations.values += sample * tile.pixels * tile.key_columns;
  inverse_norm += sample * tile.keys();
  factor += sample * tile.logit_columns();
  offset += sample * tile.logit_columns();
  logits += sample * tile.queries() * tile.logit_columns();
  partial += sample * 2 * tile.queries() * partials;
  const int64_t walks = ceil_div(tile.width, kWalk);
  const int64_t lane_key = global_thread() - (kWalk - 1);
  const int64_t warp = global_thread() / kWarp;
  for (int64_t walk = blockIdx.y; walk < tile.height * walks; walk += gridDim.y) {
    const int64_t y = tile.top + walk / walks, x_begin = tile.left + walk % walks * kWalk;
    const int64_t x_end = min(x_begin + kWalk, tile.left + tile.width);
    Window window(tile, correlations, inverse_norm);
    if (kWindowed)
      for (int64_t lead = -(Window::kSide - 1); lead < 0; ++lead) window.slide(y, x_begin + lead, lane_key + lead);
    KeyCursor key(tile, lane_key);
    for (int64_t x = x_begin; x < x_end; ++x, key.advance(tile)) {
      if (kWindowed) window.slide(y, x, key.f);
      T logit = -INFINITY;
      const int64_t row = tile.row(y, x);
      if (key.f >= 0 && key.f < tile.keys()) {
        const GridPosition p{static_cast<int>(y), static_cast<int>(x)}, q{key.v, key.u};
        const PlainSteps plain = kWindowed ? PlainSteps(tile, p, q, kHalf) : PlainSteps();
        T score = kWindowed ? window.score(key.u, plain) : T(0);
        if (!kWindowed || !plain.are_all(kHalf)) score += wrapping_score(tile, correlations, inverse_norm, p, q, plain);
        const int64_t at = key.v * tile.key_cell_width + key.u;
        logit = score * factor[at] + offset[at];
        logits[row * tile.logit_columns() + at] = logit;
      }
      T maximum, sum;
      warp_statistics(logit, &maximum, &sum);
      if (threadIdx.x % kWarp == 0) {
        partial[row * partials + warp] = maximum;
        partial[(tile.queries() + row) * partials + warp] = sum;
      }
    }
  }
}

// partial [samples, 2, queries, partials], a multiple of four of them -> statistics [samples, 2, queries]: maximum, and
// 1 / sum of exponentials or 0. One warp per query.
template <class T>
__global__ void contextual_attention_statistics_kernel(const T* __restrict__ partial, T* __restrict__ statistics,
                                                       int64_t samples, int64_t queries, int64_t partials) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarp);
  for (int64_t i = global_thread() / kWarp; i < samples * queries; i += warps) {
    const int64_t row = i / queries * 2 * queries + i % queries;
    const T* maxima = partial + row * partials;
    const T* sums = partial + (queries + row) * partials;
    T most = -INFINITY;
    for (int64_t j = kQuad * lane; j < partials; j += kQuad * kWarp) {
      const Quad<T> four = load_quad(maxima + j);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) most = four.at[k] > most ? four.at[k] : most;
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(0xffffffffu, most, step);
      most = other > most ? other : most;
    }
    T total = 0;
    for (int64_t j = kQuad * lane; j < partials; j += kQuad * kWarp) {
      const Quad<T> maximum = load_quad(maxima + j), sum = load_quad(sums + j);
#pragma unroll
      for (int k = 0; k < kQuad; ++k)
        total += maximum.at[k] == -INFINITY ? sum.at[k] : sum.at[k] * exp(maximum.at[k] - most);
    }
    total = warp_sum(total);
    if (lane == 0) {
      statistics[row] = most == -INFINITY ? T(0) : most;
      statistics[queries + row] = total == T(0) ? T(0) : T(1) / total;
    }
  }
}

// ---- Paste -------------------------------------------------------------------------------------------------------

// weights [samples, cells, key cells] of type W: B(c, w) = sum of A(c - e, w - e) over e in [0, reach_y) x [0,
// reach_x). A thread takes four neighbouring w. Terms with e_x = 0 are one access of 16 bytes, the others two and a
// shift.
//
// kDots, for the backward: also sums of A dA over keys, by query and steps of the paste. dA(p, q) is a sum of weight
// gradients dB(p + e, q + e); a thread that holds dB(c, w) has the probabilities of all pairs that share it. dots
// [samples, cells, reach_y * reach_x, warps]: of query c - e, by one warp of keys.
template <class T, class W, bool kDots>
__global__ void __launch_bounds__(kPasteThreads, 1)
    contextual_attention_paste_weights_kernel(AttentionTile tile, Masking<T> masking, const T* __restrict__ logits,
                                              const T* __restrict__ statistics, const T* __restrict__ weight_gradients,
                                              W* __restrict__ weights, T* __restrict__ dots) {
  const int64_t sample = blockIdx.z;
  masking = masking.of_sample(tile, sample);
  logits += sample * tile.queries() * tile.logit_columns();
  statistics += sample * 2 * tile.queries();
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = global_thread() / kWarp, warps = int64_t{gridDim.x} * (blockDim.x / kWarp);
  const int64_t w = kQuad * global_thread(), w_y = w / tile.key_cell_width, w_x = w - w_y * tile.key_cell_width;
  const bool exists = w < tile.key_cells();
  for (int64_t cell = blockIdx.y; cell < tile.cells(); cell += gridDim.y) {
    const int64_t y = tile.cell_top + cell / tile.cell_width, x = tile.cell_left + cell % tile.cell_width;
    const int64_t at = sample * tile.cells() + cell;
    Quad<T> sum{}, gradient{};
    if (kDots && exists) gradient = load_quad(weight_gradients + at * tile.key_cells() + w);
    for (int64_t ey = 0; ey < tile.reach_y; ++ey) {
      const int64_t v = w_y - ey;
      for (int64_t ex = 0; ex < tile.reach_x; ++ex) {
        const int64_t row = tile.row(y - ey, x - ex);
        T dot = 0;
        if (exists && v >= 0 && v < tile.key_height && row >= 0) {
          const T* line = logits + row * tile.logit_columns() + v * tile.key_cell_width;
          const T maximum = statistics[row], inverse_sum = statistics[tile.queries() + row];
          const Quad<T> logit = quad_from(line, w_x - ex, tile.key_cell_width);
          Quad<T> keep{T(1), T(1), T(1), T(1)};
          if (masking.keep != nullptr)
            keep = quad_from(masking.keep + v * tile.key_cell_width, w_x - ex, tile.key_cell_width);
#pragma unroll
          for (int k = 0; k < kQuad; ++k) {
            const int64_t u = w_x - ex + k;
            if (u < 0 || u >= tile.key_width) continue;
            const T p = softmax(logit.at[k], maximum, inverse_sum) * keep.at[k];
            sum.at[k] += at_least(p, masking.floor);
            if (kDots && !(p < masking.floor)) dot += p * gradient.at[k];
          }
        }
        if (kDots) {
          dot = warp_sum(dot);
          if (lane == 0) dots[((at * tile.reach_y + ey) * tile.reach_x + ex) * warps + warp] = dot;
        }
      }
    }
    if (exists) {
      Quad<W> rounded;
#pragma unroll
      for (int k = 0; k < kQuad; ++k) rounded.at[k] = static_cast<W>(sum.at[k]);
      store_quad(weights + at * tile.key_cells() + w, rounded);
    }
  }
}

// The pixels of one group of phases: pixel (rate * cell + phase - pad) of a map, per axis phase in [first, last).
struct CellPhases {
  int64_t rate, pad, first_y, last_y, first_x, last_x;

  INPAINT_HOST_DEVICE int64_t count_y() const { return last_y - first_y; }
  INPAINT_HOST_DEVICE int64_t count_x() const { return last_x - first_x; }
};

// output [samples, channels, rate * hq, rate * wq] = products [samples, cells, channels * phases] * weight, for the
// pixels of the tile's cells; row_weight and column_weight [pixels of an axis], wanted [hq, wq] or null. Neighbouring
// threads write neighbouring pixels of a row; four of them need not begin at a multiple of four.
template <class T, class V>
__global__ void contextual_attention_paste_kernel(AttentionTile tile, CellPhases phases, int64_t channels,
                                                  const T* __restrict__ products, const T* __restrict__ row_weight,
                                                  const T* __restrict__ column_weight, const bool* __restrict__ wanted,
                                                  V* __restrict__ output) {
  const int64_t height = phases.rate * tile.query_height, width = phases.rate * tile.query_width;
  const int64_t rows = tile.cell_height * phases.count_y(), columns = tile.cell_width * phases.count_x();
  const int64_t stride = channels * phases.count_y() * phases.count_x();
  products += int64_t{blockIdx.z} * tile.cells() * stride;
  output += int64_t{blockIdx.z} * channels * height * width;
  for (int64_t i = global_thread(); i < channels * rows * columns; i += grid_stride()) {
    const int64_t c = i / (rows * columns), row = i / columns % rows, column = i % columns;
    const int64_t phase_y = row % phases.count_y(), phase_x = column % phases.count_x();
    const int64_t cell_y = row / phases.count_y(), cell_x = column / phases.count_x();
    const int64_t y = phases.rate * (tile.cell_top + cell_y) + phases.first_y + phase_y - phases.pad;
    const int64_t x = phases.rate * (tile.cell_left + cell_x) + phases.first_x + phase_x - phases.pad;
    if (y < 0 || y >= height || x < 0 || x >= width) continue;
    if (wanted != nullptr && !wanted[y / phases.rate * tile.query_width + x / phases.rate]) continue;
    const int64_t product = (c * phases.count_y() + phase_y) * phases.count_x() + phase_x;
    const T value = products[(cell_y * tile.cell_width + cell_x) * stride + product];
    output[(c * height + y) * width + x] = static_cast<V>(value * row_weight[y] * column_weight[x]);
  }
}

// ---- Matches -----------------------------------------------------------------------------------------------------

// index, maximum [samples, hq * wq]: the most probable key of every wanted query of the tile and its probability; the
// first of equal ones. One warp per query, four keys a lane.
template <class T>
__global__ void contextual_attention_matches_kernel(AttentionTile tile, Masking<T> masking,
                                                    const T* __restrict__ logits, const T* __restrict__ statistics,
                                                    const bool* __restrict__ wanted, int64_t* __restrict__ index,
                                                    T* __restrict__ maximum) {
  const int64_t sample = blockIdx.z;
  masking = masking.of_sample(tile, sample);
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarp);
  for (int64_t i = global_thread() / kWarp; i < tile.queries(); i += warps) {
    const int64_t p = (tile.top + i / tile.width) * tile.query_width + tile.left + i % tile.width;
    const int64_t row = sample * 2 * tile.queries() + i;
    const T most = statistics[row], inverse_sum = statistics[tile.queries() + row];
    const T* own = logits + (sample * tile.queries() + i) * tile.logit_columns();
    T best = 0;
    int64_t at = 0;
    for (int64_t j = kQuad * lane; j < tile.logit_columns(); j += kQuad * kWarp) {
      const int v = static_cast<int>(j) / static_cast<int>(tile.key_cell_width);
      const int64_t u = j - v * tile.key_cell_width;
      const Quad<T> logit = load_quad(own + j);
      Quad<T> keep{T(1), T(1), T(1), T(1)};
      if (masking.keep != nullptr) keep = load_quad(masking.keep + j);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (u + k >= tile.key_width) continue;
        const T here = at_least(softmax(logit.at[k], most, inverse_sum) * keep.at[k], masking.floor);
        if (here > best) best = here, at = v * tile.key_width + u + k;
      }
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(0xffffffffu, best, step);
      const int64_t other_at = __shfl_xor_sync(0xffffffffu, static_cast<long long>(at), step);
      if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    if (lane == 0 && (wanted == nullptr || wanted[p])) {
      const int64_t place = sample * tile.query_height * tile.query_width + p;
      index[place] = at;
      maximum[place] = best;
    }
  }
}

// ---- Launchers ---------------------------------------------------------------------------------------------------

inline int64_t score_partials(const AttentionTile& tile) {
  return ceil_div(tile.keys() + kWalk - 1, kWalkThreads) * (kWalkThreads / kWarp);
}

inline int64_t paste_blocks(const AttentionTile& tile) { return ceil_div(tile.key_cells(), kQuad * kPasteThreads); }

// Warps of keys that paste_weights sums over.
inline int64_t dot_warps(const AttentionTile& tile) { return paste_blocks(tile) * (kPasteThreads / kWarp); }

// runs: `count` pairs on the host, see PixelRuns.
inline void launch_rows(const int32_t* runs, int64_t count, int64_t rows, int32_t* row_of, int32_t* position_of,
                        int64_t positions, cudaStream_t stream) {
  PixelRuns pixels{static_cast<int32_t>(count), static_cast<int32_t>(rows), {}};
  std::memcpy(pixels.runs, runs, 2 * count * sizeof(int32_t));
  launch_kernel(contextual_attention_rows_kernel, dim3(blocks_for(positions)), dim3(kThreadsPerBlock), 0, stream,
                pixels, row_of, position_of, positions);
}

template <class T>
void launch_scores(const AttentionTile& tile, const T* correlations, const int32_t* row_of, const T* inverse_norm,
                   const T* factor, const T* offset, T* logits, T* partial, cudaStream_t stream) {
  const int64_t partials = score_partials(tile);
  const dim3 blocks(static_cast<unsigned>(partials / (kWalkThreads / kWarp)),
                    grid_y(tile.height * ceil_div(tile.width, kWalk)), grid_z(tile));
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel, blocks, dim3(kWalkThreads), 0, stream, tile, Pairs<T>{correlations, row_of, tile.key_columns},
                  inverse_norm, factor, offset, logits, partial, partials);
  };
  if (tile.patch == 3 && tile.half == 1)
    launch(contextual_attention_scores_kernel<T, 3, 1>);
  else if (tile.patch == 3 && tile.half == 0)
    launch(contextual_attention_scores_kernel<T, 3, 0>);
  else if (tile.patch == 1 && tile.half == 0)
    launch(contextual_attention_scores_kernel<T, 1, 0>);
  else
    launch(contextual_attention_scores_kernel<T, 0, 0>);
}

template <class T>
void launch_statistics(const T* partial, T* statistics, int64_t samples, int64_t queries, int64_t partials,
                       cudaStream_t stream) {
  launch_kernel(contextual_attention_statistics_kernel<T>, dim3(blocks_for(samples * queries * kWarp)),
                dim3(kThreadsPerBlock), 0, stream, partial, statistics, samples, queries, partials);
}

// keep: [samples, logit columns] or null; floor: negative for none; likewise below. weight_gradients and dots: null, or
// both for the backward.
template <class T, class W>
void launch_paste_weights(const AttentionTile& tile, const T* keep, T floor, const T* logits, const T* statistics,
                          const T* weight_gradients, W* weights, T* dots, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel, dim3(static_cast<unsigned>(paste_blocks(tile)), grid_y(tile.cells()), grid_z(tile)),
                  dim3(kPasteThreads), 0, stream, tile, Masking<T>{keep, floor}, logits, statistics, weight_gradients,
                  weights, dots);
  };
  if (dots == nullptr)
    launch(contextual_attention_paste_weights_kernel<T, W, false>);
  else
    launch(contextual_attention_paste_weights_kernel<T, W, true>);
}

template <class T, class V>
void launch_paste(const AttentionTile& tile, const CellPhases& phases, int64_t channels, const T* products,
                  const T* row_weight, const T* column_weight, const bool* wanted, V* output, cudaStream_t stream) {
  const int64_t pixels = tile.cells() * phases.count_y() * phases.count_x();
  launch_kernel(contextual_attention_paste_kernel<T, V>, dim3(blocks_for(channels * pixels), 1, grid_z(tile)),
                dim3(kThreadsPerBlock), 0, stream, tile, phases, channels, products, row_weight, column_weight, wanted,
                output);
}

template <class T>
void launch_matches(const AttentionTile& tile, const T* keep, T floor, const T* logits, const T* statistics,
                    const bool* wanted, int64_t* index, T* maximum, cudaStream_t stream) {
  launch_kernel(contextual_attention_matches_kernel<T>, dim3(blocks_for(tile.queries() * kWarp), 1, grid_z(tile)),
                dim3(kThreadsPerBlock), 0, stream, tile, Masking<T>{keep, floor}, logits, statistics, wanted, index,
                maximum);
}

}  // namespace
}  // namespace inpaint

#ifndef INPAINT_EMULATION

#include "contextual_attention_arguments.cuh"

namespace inpaint {
namespace {

// ---- torch -------------------------------------------------------------------------------------------------------

void contextual_attention_rows(const Tensor& runs, int64_t rows, Tensor row_of, Tensor position_of) {
  check_dense(runs, "runs", 2);
  STD_TORCH_CHECK(runs.size(0) >= 1 && runs.size(0) <= kMaxRuns, "runs: expected 1 to ", kMaxRuns, ", got ",
                  runs.size(0));
  STD_TORCH_CHECK(position_of.numel() >= rows, "position_of: expected at least ", rows, " elements");
  const CudaLaunch launch(row_of);
  launch_rows(runs.const_data_ptr<int32_t>(), runs.size(0), rows, row_of.mutable_data_ptr<int32_t>(),
              position_of.mutable_data_ptr<int32_t>(), row_of.numel(), launch.stream);
}

void contextual_attention_scores(const Tensor& tile_fields, const Tensor& correlations, const Tensor& row_of,
                                 const Tensor& inverse_norm, const Tensor& factor, const Tensor& offset, Tensor logits,
                                 Tensor partial) {
  const AttentionTile tile = tile_of(tile_fields);
  check_elements(correlations, "correlations", tile.samples * tile.pixels * tile.key_columns);
  check_elements(inverse_norm, "inverse_norm", tile.samples * tile.keys());
  check_elements(factor, "factor", tile.samples * tile.logit_columns());
  check_elements(offset, "offset", tile.samples * tile.logit_columns());
  check_logits(tile, logits);
  check_elements(partial, "partial", tile.samples * 2 * tile.queries() * score_partials(tile));
  check_elements(row_of, "row_of", tile.query_height * tile.query_width);
  const CudaLaunch launch(correlations);
  dispatch_float_double(correlations.scalar_type(), "correlations", [&](auto zero) {
    using T = decltype(zero);
    launch_scores<T>(tile, correlations.const_data_ptr<T>(), row_of.const_data_ptr<int32_t>(),
                     inverse_norm.const_data_ptr<T>(), factor.const_data_ptr<T>(), offset.const_data_ptr<T>(),
                     logits.mutable_data_ptr<T>(), partial.mutable_data_ptr<T>(), launch.stream);
  });
}

void contextual_attention_statistics(const Tensor& partial, Tensor statistics) {
  check_dense(partial, "partial", 4);
  STD_TORCH_CHECK(partial.size(3) % kQuad == 0, "partial: expected a multiple of 4 columns, got ", partial.size(3));
  check_elements(statistics, "statistics", partial.size(0) * 2 * partial.size(2));
  const CudaLaunch launch(partial);
  dispatch_float_double(partial.scalar_type(), "partial", [&](auto zero) {
    using T = decltype(zero);
    launch_statistics<T>(partial.const_data_ptr<T>(), statistics.mutable_data_ptr<T>(), partial.size(0),
                         partial.size(2), partial.size(3), launch.stream);
  });
}

void contextual_attention_paste_weights(const Tensor& tile_fields, const std::optional<Tensor>& keep, double floor,
                                        const Tensor& logits, const Tensor& statistics,
                                        const std::optional<Tensor>& weight_gradients, Tensor weights,
                                        std::optional<Tensor> dots) {
  const AttentionTile tile = tile_of(tile_fields);
  check_logits(tile, logits);
  check_keep(tile, keep);
  check_elements(statistics, "statistics", tile.samples * 2 * tile.queries());
  check_elements(weights, "weights", tile.samples * tile.cells() * tile.key_cells());
  STD_TORCH_CHECK(weight_gradients.has_value() == dots.has_value(), "weight_gradients and dots: expected both or none");
  if (dots) {
    check_elements(*weight_gradients, "weight_gradients", tile.samples * tile.cells() * tile.key_cells());
    check_elements(*dots, "dots", tile.samples * tile.cells() * tile.reach_y * tile.reach_x * dot_warps(tile));
  }
  const CudaLaunch launch(logits);
  dispatch_floating(weights.scalar_type(), "weights", [&](auto zero) {
    using W = decltype(zero);
    using T = ScoreType<W>;
    launch_paste_weights<T, W>(tile, data_or_null<T>(keep), static_cast<T>(floor), logits.const_data_ptr<T>(),
                               statistics.const_data_ptr<T>(), data_or_null<T>(weight_gradients),
                               static_cast<W*>(weights.data_ptr()), dots ? dots->mutable_data_ptr<T>() : nullptr,
                               launch.stream);
  });
}

void contextual_attention_paste(const Tensor& tile_fields, const Tensor& phase_fields, const Tensor& products,
                                const Tensor& row_weight, const Tensor& column_weight,
                                const std::optional<Tensor>& wanted, Tensor output) {
  const AttentionTile tile = tile_of(tile_fields);
  const auto phases = struct_of<CellPhases>(phase_fields, "phases");
  check_dense(output, "output", 4);
  STD_TORCH_CHECK(output.size(0) == tile.samples, "output: expected ", tile.samples, " samples, got ", output.size(0));
  check_elements(products, "products",
                 tile.samples * tile.cells() * output.size(1) * phases.count_y() * phases.count_x());
  const CudaLaunch launch(products);
  dispatch_floating(output.scalar_type(), "output", [&](auto zero) {
    using V = decltype(zero);
    using T = ScoreType<V>;
    launch_paste<T, V>(tile, phases, output.size(1), products.const_data_ptr<T>(), row_weight.const_data_ptr<T>(),
                       column_weight.const_data_ptr<T>(), data_or_null<bool>(wanted),
                       static_cast<V*>(output.data_ptr()), launch.stream);
  });
}

void contextual_attention_matches(const Tensor& tile_fields, const std::optional<Tensor>& keep, double floor,
                                  const Tensor& logits, const Tensor& statistics, const std::optional<Tensor>& wanted,
                                  Tensor index, Tensor maximum) {
  const AttentionTile tile = tile_of(tile_fields);
  check_logits(tile, logits);
  check_keep(tile, keep);
  check_elements(index, "index", tile.samples * tile.query_height * tile.query_width);
  const CudaLaunch launch(logits);
  dispatch_float_double(logits.scalar_type(), "logits", [&](auto zero) {
    using T = decltype(zero);
    launch_matches<T>(tile, data_or_null<T>(keep), static_cast<T>(floor), logits.const_data_ptr<T>(),
                      statistics.const_data_ptr<T>(), data_or_null<bool>(wanted), index.mutable_data_ptr<int64_t>(),
                      maximum.mutable_data_ptr<T>(), launch.stream);
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CUDA, m) {
  m.impl("contextual_attention_rows", TORCH_BOX(&inpaint::contextual_attention_rows));
  m.impl("contextual_attention_scores", TORCH_BOX(&inpaint::contextual_attention_scores));
  m.impl("contextual_attention_statistics", TORCH_BOX(&inpaint::contextual_attention_statistics));
  m.impl("contextual_attention_paste_weights", TORCH_BOX(&inpaint::contextual_attention_paste_weights));
  m.impl("contextual_attention_paste", TORCH_BOX(&inpaint::contextual_attention_paste));
  m.impl("contextual_attention_matches", TORCH_BOX(&inpaint::contextual_attention_matches));
}

#endif  // INPAINT_EMULATION
