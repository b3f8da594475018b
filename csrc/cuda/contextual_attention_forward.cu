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

#include "contextual_attention_scores.cuh"

namespace inpaint {
namespace {

constexpr int kPasteThreads = 256;
constexpr int kPasteCells = 16;  // neighbours, over which a thread walks

// Blocks of paste_weights that shall share a multiprocessor. It waits for memory: four blocks of warps that take one
// line of cells are quicker than two that take two and look up a line of logits less (H200, 62,500 keys: 9.6 and 12.0
// ms).
template <class T, bool kDots>
constexpr int kPasteBlocks = sizeof(T) > 4 ? 1
                             : kDots       ? 2
                                           : 4;

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

// ---- Statistics --------------------------------------------------------------------------------------------------

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
// reach_x). A thread takes four neighbouring w and walks over kPasteCells neighbouring c.
//
// dots, for the backward, or null: also sums of A dA over keys, by query and steps of the paste. dA(p, q) is a sum of
// weight gradients dB(p + e, q + e); a thread that holds dB(c, w) has the probabilities of all pairs that share it.
// dots [samples, cells, reach_y * reach_x, warps]: of query c - e, by one warp of keys.
template <class T, class W>
struct PasteWeights {
  Masking<T> masking;
  const T* __restrict__ logits;
  const T* __restrict__ statistics;
  const T* __restrict__ gradients;
  W* __restrict__ weights;
  T* __restrict__ dots;

  __device__ PasteWeights of_sample(const AttentionTile& tile, int64_t sample, int64_t warps) const {
    const int64_t cells = sample * tile.cells();
    return {masking.of_sample(tile, sample),
            logits + sample * tile.queries() * tile.logit_columns(),
            statistics + sample * 2 * tile.queries(),
            gradients == nullptr ? nullptr : gradients + cells * tile.key_cells(),
            weights + cells * tile.key_cells(),
            dots == nullptr ? nullptr : dots + cells * tile.reach_y * tile.reach_x * warps};
  }
};

template <class T, class W>
__device__ __forceinline__ void store_rounded(W* address, const T (&values)[kQuad]) {
  Quad<W> rounded;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) rounded.at[k] = static_cast<W>(values[k]);
  store_quad(address, rounded);
}

// Four neighbouring key cells: their line, and the place of the first one in it.
struct KeyCells {
  int y, x;

  __device__ KeyCells(const AttentionTile& tile, int64_t thread) {
    const int at = kQuad * static_cast<int>(thread), width = static_cast<int>(tile.key_cell_width);
    y = at / width;
    x = at - y * width;
  }
  __device__ bool exist(const AttentionTile& tile) const { return y < tile.key_cell_height; }
  __device__ int first(const AttentionTile& tile) const { return y * static_cast<int>(tile.key_cell_width) + x; }
};

// The probabilities of one query line and one key line, for a thread that walks over the queries with its key cells
// fixed. Key -1 is the one in front of the first: what a query adds to a cell, its left neighbour adds one key further,
// so that three of four probabilities serve two cells.
template <class T>
class PastedLine {
 public:
  PastedLine() = default;
  // Of queries in line `line` of the tile and keys from (v, x) on.
  __device__ PastedLine(const AttentionTile& tile, const Masking<T>& masking, const T* logits, const T* statistics,
                        int line, int v, int x)
      : exists_(v >= 0 && v < tile.key_height && line >= 0 && line < tile.height) {
    if (!exists_) return;
    const int at = v * static_cast<int>(tile.key_cell_width) + x;
    logits_ = logits + line * tile.width * tile.logit_columns() + at;
    statistics_ = statistics + line * tile.width;
#pragma unroll
    for (int k = 0; k <= kQuad; ++k) {
      const int u = x - 1 + k;
      has_ |= (u >= 0 && u < tile.key_width ? 1 : 0) << k;
      keep_[k] = masking.keep != nullptr && has(k) ? masking.keep[at - 1 + k] : T(1);
    }
  }

  // What the probabilities of a query are made of.
  struct Logits {
    Quad<T> four;
    T before, maximum, inverse_sum;
  };

  // Of query `column` of the tile; where there is none its probabilities are 0.
  __device__ __forceinline__ Logits load(const AttentionTile& tile, int column) const {
    Logits loaded{{}, T(0), T(0), T(0)};
    if (!exists_ || static_cast<unsigned>(column) >= static_cast<unsigned>(tile.width)) return loaded;
    const T* line = logits_ + column * tile.logit_columns();
    loaded.four = load_quad(line);
    if (has(0)) loaded.before = line[-1];
    loaded.maximum = statistics_[column];
    loaded.inverse_sum = statistics_[column + tile.queries()];
    return loaded;
  }

  // Keys -1 to 3; 0 where there is none.
  __device__ __forceinline__ void probabilities(const Logits& loaded, T (&p)[kQuad + 1]) const {
#pragma unroll
    for (int k = 0; k <= kQuad; ++k) {
      const T logit = k == 0 ? loaded.before : loaded.four.at[k - 1];
      const T probability = softmax(logit, loaded.maximum, loaded.inverse_sum) * keep_[k];
      p[k] = has(k) ? probability : T(0);
    }
  }

 private:
  __device__ bool has(int k) const { return (has_ >> k & 1) != 0; }

  bool exists_ = false;
  int has_ = 0;  // bit k: key k - 1 lies in the line
  const T* __restrict__ logits_ = nullptr;
  const T* __restrict__ statistics_ = nullptr;
  T keep_[kQuad + 1] = {};
};

// Two steps along either axis and no floor, as nearly all networks have it.
template <class T, class W, bool kDots>
__device__ void paste_two_by_two(const AttentionTile& tile, const PasteWeights<T, W>& paste, int64_t warp,
                                 int64_t warps) {
  constexpr int kReach = 2;
  const KeyCells keys(tile, global_thread());
  const bool exist = keys.exist(tile);
  const int cell_height = static_cast<int>(tile.cell_height), cell_width = static_cast<int>(tile.cell_width);
  const int walks = (cell_width + kPasteCells - 1) / kPasteCells;
  const int to_line = static_cast<int>(tile.cell_top - tile.top);
  const int to_column = static_cast<int>(tile.cell_left - tile.left);
  for (int walk = blockIdx.y; walk < cell_height * walks; walk += gridDim.y) {
    const int cell_y = walk / walks, begin = (walk - cell_y * walks) * kPasteCells;
    const int end = min(begin + kPasteCells, cell_width);
    PastedLine<T> lines[kReach];                  // of the cells, and above it
    typename PastedLine<T>::Logits next[kReach];  // asked for a step ahead
    T left[kReach][kQuad + 1];                    // of the query before
#pragma unroll
    for (int ey = 0; ey < kReach; ++ey) {
      lines[ey] = PastedLine<T>(tile, paste.masking, paste.logits, paste.statistics, cell_y + to_line - ey, keys.y - ey,
                                keys.x);
      lines[ey].probabilities(lines[ey].load(tile, begin - 1 + to_column), left[ey]);
      next[ey] = lines[ey].load(tile, begin + to_column);
    }
#pragma unroll 1
    for (int cell_x = begin; cell_x < end; ++cell_x) {
      const int64_t cell = int64_t{cell_y} * cell_width + cell_x, at = cell * tile.key_cells() + keys.first(tile);
      T sum[kQuad] = {};
      Quad<T> gradient{};
      if (kDots && exist) gradient = load_quad(paste.gradients + at);
#pragma unroll
      for (int ey = 0; ey < kReach; ++ey) {
        T p[kQuad + 1], dot[kReach] = {};
        const auto loaded = next[ey];
        next[ey] = lines[ey].load(tile, cell_x + 1 + to_column);
        lines[ey].probabilities(loaded, p);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          sum[k] += p[k + 1];
          sum[k] += left[ey][k];
          if (kDots) dot[0] += p[k + 1] * gradient.at[k];
          if (kDots) dot[1] += left[ey][k] * gradient.at[k];
        }
#pragma unroll
        for (int ex = 0; kDots && ex < kReach; ++ex) {
          const T total = warp_sum(dot[ex]);
          if (threadIdx.x % kWarp == 0) paste.dots[((cell * kReach + ey) * kReach + ex) * warps + warp] = total;
        }
#pragma unroll
        for (int k = 0; k <= kQuad; ++k) left[ey][k] = p[k];
      }
      if (exist) store_rounded(paste.weights + at, sum);
    }
  }
}

// Any number of steps, and a smallest probability: where it replaces one, the gradient stops.
template <class T, class W, bool kDots>
__device__ void paste_any(const AttentionTile& tile, const PasteWeights<T, W>& paste, int64_t warp, int64_t warps) {
  const KeyCells keys(tile, global_thread());
  const bool exist = keys.exist(tile);
  const int cell_width = static_cast<int>(tile.cell_width), cells = static_cast<int>(tile.cells());
  for (int cell = blockIdx.y; cell < cells; cell += gridDim.y) {
    const int64_t y = tile.cell_top + cell / cell_width, x = tile.cell_left + cell % cell_width;
    T sum[kQuad] = {};
    Quad<T> gradient{};
    if (kDots && exist) gradient = load_quad(paste.gradients + cell * tile.key_cells() + keys.first(tile));
    for (int ey = 0; ey < tile.reach_y; ++ey) {
      const int v = keys.y - ey;
      for (int ex = 0; ex < tile.reach_x; ++ex) {
        const int64_t row = tile.row(y - ey, x - ex);
        T dot = 0;
        if (exist && v >= 0 && v < tile.key_height && row >= 0) {
          const int at = v * static_cast<int>(tile.key_cell_width) + keys.x - ex;
          const T maximum = paste.statistics[row], inverse_sum = paste.statistics[tile.queries() + row];
          for (int k = 0; k < kQuad; ++k) {
            const int u = keys.x - ex + k;
            if (u < 0 || u >= tile.key_width) continue;
            const T keep = paste.masking.keep == nullptr ? T(1) : paste.masking.keep[at + k];
            const T p = softmax(paste.logits[row * tile.logit_columns() + at + k], maximum, inverse_sum) * keep;
            sum[k] += at_least(p, paste.masking.floor);
            if (kDots && !(p < paste.masking.floor)) dot += p * gradient.at[k];
          }
        }
        if (kDots) {
          dot = warp_sum(dot);
          const int64_t step = (cell * tile.reach_y + ey) * tile.reach_x + ex;
          if (threadIdx.x % kWarp == 0) paste.dots[step * warps + warp] = dot;
        }
      }
    }
    if (exist) store_rounded(paste.weights + cell * tile.key_cells() + keys.first(tile), sum);
  }
}

template <class T, class W, bool kTwoByTwo, bool kDots>
__global__ void __launch_bounds__(kPasteThreads, kPasteBlocks<T, kDots>)
    contextual_attention_paste_weights_kernel(AttentionTile tile, PasteWeights<T, W> paste) {
  const int64_t warp = global_thread() / kWarp, warps = int64_t{gridDim.x} * (blockDim.x / kWarp);
  const auto of_sample = paste.of_sample(tile, blockIdx.z, warps);
  if (kTwoByTwo)
    paste_two_by_two<T, W, kDots>(tile, of_sample, warp, warps);
  else
    paste_any<T, W, kDots>(tile, of_sample, warp, warps);
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
  return ceil_div(score_threads(tile), kWalkThreads) * (kWalkThreads / kWarp);
}

// Blocks for the key cells.
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
  STD_TORCH_CHECK(tile.pixels * tile.key_columns < int64_t{1} << 32, "a tile has less than 2^32 correlations, got ",
                  tile.pixels, " x ", tile.key_columns);
  const int64_t partials = score_partials(tile);
  const int64_t walks = ceil_div(tile.height, kScoreLines) * ceil_div(tile.width, kScoreWalk);
  const auto launch = [&](auto kernel, unsigned roles) {
    const dim3 blocks(static_cast<unsigned>(partials / (kWalkThreads / kWarp) * walks), roles, grid_z(tile));
    launch_kernel(kernel, blocks, dim3(kWalkThreads), 0, stream, tile, Pairs<T>{correlations, row_of, tile.key_columns},
                  inverse_norm, factor, offset, logits, partial, static_cast<int>(partials));
  };
  if (tile.patch == 3 && tile.half == 1)
    launch(contextual_attention_scores_kernel<T, 3, 1>, kScoreRoles<3>);
  else if (tile.patch == 3 && tile.half == 0)
    launch(contextual_attention_scores_kernel<T, 3, 0>, kScoreRoles<3>);
  else if (tile.patch == 1 && tile.half == 0)
    launch(contextual_attention_scores_kernel<T, 1, 0>, kScoreRoles<1>);
  else
    launch(contextual_attention_scores_kernel<T, 0, 0>, kScoreRoles<0>);
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
  const PasteWeights<T, W> paste{{keep, floor}, logits, statistics, weight_gradients, weights, dots};
  const auto launch = [&](auto kernel, int64_t walks) {
    launch_kernel(kernel, dim3(static_cast<unsigned>(paste_blocks(tile)), grid_y(walks), grid_z(tile)),
                  dim3(kPasteThreads), 0, stream, tile, paste);
  };
  if (tile.reach_y == 2 && tile.reach_x == 2 && floor < T(0)) {
    const int64_t walks = tile.cell_height * ceil_div(tile.cell_width, kPasteCells);
    if (dots == nullptr)
      launch(contextual_attention_paste_weights_kernel<T, W, true, false>, walks);
    else
      launch(contextual_attention_paste_weights_kernel<T, W, true, true>, walks);
  } else if (dots == nullptr) {
    launch(contextual_attention_paste_weights_kernel<T, W, false, false>, tile.cells());
  } else {
    launch(contextual_attention_paste_weights_kernel<T, W, false, true>, tile.cells());
  }
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
