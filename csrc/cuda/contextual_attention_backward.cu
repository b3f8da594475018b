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
// Blocks of a walk that a multiprocessor shall hold at least: 64 registers a thread, and loads of so many warps under
// way that memory is busy.
template <class T>
constexpr int kWalkBlocks = sizeof(T) == 4 ? 8 : 1;

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

  // <A, dA> of the query at `cell`, its own; the other cells of its patch lie to the right and below, all in the tile.
  // The share of one thread.
  __device__ T dot(const AttentionTile& tile, int64_t own_cell) const {
    T dot = 0;
    for (int64_t phase = 0; phase < phases; ++phase) {
      for (int64_t ey = 0; ey < reach_y(tile, phase); ++ey) {
        for (int64_t ex = 0; ex < reach_x(tile, phase); ++ex) {
          const int64_t cell = own_cell + ey * tile.cell_width + ex;
          const T* sums =
              dots + phase * dot_stride + ((cell * reach_y(tile, phase) + ey) * reach_x(tile, phase) + ex) * warps;
          for (int64_t j = threadIdx.x; j < warps; j += blockDim.x) dot += sums[j];
        }
      }
    }
    return dot;
  }

  // Gradients of the weights of the cell (ey, ex) away from `own_cell`, from line ey of the key cells on: to dA of key
  // (v, u), the own query's, adds what lies at v * key_cell_width + u + ex.
  __device__ const T* shifted(const AttentionTile& tile, int64_t phase, int64_t own_cell, int ey, int ex) const {
    const int64_t cell = (phase * tile.samples * tile.cells() + own_cell) + ey * tile.cell_width + ex;
    return weights + cell * tile.key_cells() + ey * tile.key_cell_width;
  }
};

// Elements [shift, shift + 4) of a line from an aligned address on, which has `count` more elements, a multiple of 4;
// what lies beyond them is 0.
template <class T>
__device__ __forceinline__ Quad<T> shifted_quad(const T* address, int shift, int count) {
  const int low_at = shift / kQuad * kQuad, high_at = low_at + kQuad;
  Quad<T> low{}, high{};
  if (low_at < count) low = load_quad(address + low_at);
  if (shift == low_at) return low;
  if (high_at < count) high = load_quad(address + high_at);
  switch (shift - low_at) {
    case 1:
      return {low.at[1], low.at[2], low.at[3], high.at[0]};
    case 2:
      return {low.at[2], low.at[3], high.at[0], high.at[1]};
    default:
      return {low.at[3], high.at[0], high.at[1], high.at[2]};
  }
}

template <class T>
__device__ __forceinline__ void add_to(Quad<T>& sum, const Quad<T>& term) {
#pragma unroll
  for (int k = 0; k < kQuad; ++k) sum.at[k] += term.at[k];
}

// dA of one query. kReach: steps that a pasted patch spans on both axes, in a call with one group of phases; 0: any.
template <class T, int kReach>
class QueryGradients {
 public:
  __device__ QueryGradients(const AttentionTile& tile, const PasteGradients<T>& pasted, int64_t own_cell) {
#pragma unroll
    for (int ey = 0; ey < kReach; ++ey) {
#pragma unroll
      for (int ex = 0; ex < kReach; ++ex) weights_[ey][ex] = pasted.shifted(tile, 0, own_cell, ey, ex);
    }
  }

  // Those of four keys from logit column j on, to whose right their line of key cells has `count` columns.
  __device__ Quad<T> of_keys(int j, int count) const {
    Quad<T> sum{};
#pragma unroll
    for (int ey = 0; ey < kReach; ++ey) {
#pragma unroll
      for (int ex = 0; ex < kReach; ++ex) add_to(sum, shifted_quad(weights_[ey][ex] + j, ex, count));
    }
    return sum;
  }

 private:
  const T* weights_[kReach][kReach];
};

template <class T>
class QueryGradients<T, 0> {
 public:
  __device__ QueryGradients(const AttentionTile& tile, const PasteGradients<T>& pasted, int64_t own_cell)
      : tile_(tile), pasted_(pasted), own_cell_(own_cell) {}

  __device__ Quad<T> of_keys(int j, int count) const {
    Quad<T> sum{};
    for (int64_t phase = 0; phase < pasted_.phases; ++phase) {
      const int reach_y = pasted_.reach_y(tile_, phase), reach_x = pasted_.reach_x(tile_, phase);
      for (int ey = 0; ey < reach_y; ++ey) {
        for (int ex = 0; ex < reach_x; ++ex)
          add_to(sum, shifted_quad(pasted_.shifted(tile_, phase, own_cell_, ey, ex) + j, ex, count));
      }
    }
    return sum;
  }

 private:
  const AttentionTile& tile_;
  const PasteGradients<T>& pasted_;
  int64_t own_cell_;
};

// dS = A (dA - <A, dA>) factor, in place of the logits, dA(p, q) being the sum of dB(p + e, q + e) over e and phases.
// One block per query and kSoftmaxColumns, four keys a thread. Where a floor replaced a probability, its gradient
// stops.
template <class T, int kReach>
__global__ void __launch_bounds__(kSoftmaxThreads, 1)
    contextual_attention_softmax_backward_kernel(AttentionTile tile, PasteGradients<T> pasted,
                                                 const T* __restrict__ factor, Masking<T> masking,
                                                 const T* __restrict__ statistics, T* __restrict__ logits) {
  const int64_t sample = blockIdx.z, row = blockIdx.x;
  masking = masking.of_sample(tile, sample);
  factor += sample * tile.logit_columns();
  statistics += sample * 2 * tile.queries();
  logits += (sample * tile.queries() + row) * tile.logit_columns();
  const int64_t y = tile.top + row / tile.width - tile.cell_top, x = tile.left + row % tile.width - tile.cell_left;
  const int64_t own_cell = sample * tile.cells() + y * tile.cell_width + x;
  const QueryGradients<T, kReach> gradients(tile, pasted, own_cell);
  const T dot = block_sum(pasted.dot(tile, own_cell));
  const T maximum = statistics[row], inverse_sum = statistics[tile.queries() + row];
  const int columns = static_cast<int>(tile.logit_columns()), width = static_cast<int>(tile.key_width);
  const int line = static_cast<int>(tile.key_cell_width), step = kQuad * kSoftmaxThreads % line;
  for (int64_t chunk = blockIdx.y * kSoftmaxColumns; chunk < columns; chunk += gridDim.y * kSoftmaxColumns) {
    const int begin = static_cast<int>(chunk) + kQuad * static_cast<int>(threadIdx.x);
    const int end = static_cast<int>(min(chunk + kSoftmaxColumns, int64_t{columns}));
    int u = begin % line;
    for (int j = begin; j < end; j += kQuad * kSoftmaxThreads) {
      const Quad<T> sum = gradients.of_keys(j, line - u);
      const Quad<T> logit = load_quad(logits + j), factors = load_quad(factor + j);
      Quad<T> keep{T(1), T(1), T(1), T(1)}, result{};
      if (masking.keep != nullptr) keep = load_quad(masking.keep + j);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const T p = softmax(logit.at[k], maximum, inverse_sum) * keep.at[k];
        const T gradient = p * ((p < masking.floor ? T(0) : sum.at[k]) - dot) * factors.at[k];
        result.at[k] = u + k < width ? gradient : T(0);
      }
      store_quad(logits + j, result);
      u += step;  // without a division: `step` is less than a line
      if (u >= line) u -= line;
    }
  }
}

// ---- Walks over positions ------------------------------------------------------------------------------------------
//
// A thread walks along a diagonal: positions of a list, most of them each other's right neighbours, and a key that is
// one further with each. Instructions, not memory, would bound these passes if every step looked up the rows of its
// terms and compared their coordinates. Hence a walk is cut into stretches of neighbours. The rows of neighbours are
// neighbours too, so a term's address grows by one number with each step; and which steps have a term is known before
// the first, one bit for each.

// Steps of a walk as bits. A window holds terms of kMostLead steps before the present one, so those before the walk
// have bits too; and so has the step after its last one, which tells whether a line of keys ends there.
using Steps = uint32_t;
constexpr int kMostSteps = 28, kMostLead = 2, kStepBits = kMostLead + kMostSteps + 1;
static_assert(kStepBits < 32 && kMostSteps + kMostLead <= kWarp);

__device__ __forceinline__ Steps step_bit(int step) { return Steps{1} << (step + kMostLead); }

// The steps [first, end), as far as they have bits.
__device__ __forceinline__ Steps steps_between(int first, int end) {
  const int low = min(max(first + kMostLead, 0), kStepBits);
  const int high = min(max(end + kMostLead, low), kStepBits);
  return (Steps{1} << high) - (Steps{1} << low);
}

// What walks take from a tile, in 32 bits: see sizes_of.
struct WalkSizes {
  int query_height, query_width, top, left, height, width;  // as in AttentionTile
  int keys, key_width, key_columns, logit_columns;
  int key_padding;               // columns of logits between two lines of keys
  int key_stride, logit_stride;  // elements from the term of one step to that of the next one
  int rows, steps;               // positions of the list, and of a walk
};

// The keys of a thread's walk, one further in row-major order with each step; they may lie outside of [0, keys).
struct KeyWalk {
  int first;          // key of step 0
  int lead_line;      // line of step -kMostLead
  Steps line_starts;  // steps whose key is the first one of its line

  __device__ KeyWalk(const WalkSizes& sizes, int key) : first(key), line_starts(0) {
    const int lead = first - kMostLead, width = sizes.key_width;
    lead_line = lead >= 0 ? lead / width : -((width - 1 - lead) / width);
    for (int bit = lead_line * width - lead; bit < kStepBits; bit += width)
      if (bit >= 0) line_starts |= Steps{1} << bit;
  }
  // Steps whose key lies in [begin, end).
  __device__ Steps steps_in(int begin, int end) const { return steps_between(begin - first, end - first); }
  // The line of a step's key.
  __device__ int line(int step) const {
    return lead_line + __popc(line_starts & steps_between(1 - kMostLead, step + 1));
  }
};

// Position i of a grid. Without a sign, a division takes fewer instructions.
__device__ __forceinline__ GridPosition position_at(int i, int width) {
  const int y = static_cast<unsigned>(i) / static_cast<unsigned>(width);
  return {y, i - y * width};
}

// Positions of a walk that are neighbours in a line: the first one, its step, and how many there are.
struct Stretch {
  int y, x, step, length;
};

// Calls visit(stretch) for the stretches of `count` positions in ascending order.
template <class Visit>
__device__ __forceinline__ void for_each_stretch(const WalkSizes& sizes, const int32_t* positions, int count,
                                                 const Visit& visit) {
  for (int step = 0, length; step < count; step += length) {
    const int p = positions[step];
    const GridPosition at = position_at(p, sizes.query_width);
    length = min(count - step, sizes.query_width - at.x);
    while (positions[step + length - 1] != p + length - 1) --length;  // positions ascend: equal if none is left out
    visit(Stretch{at.y, at.x, step, length});
  }
}

// A column of a window: the terms of kSide lines, which all move along the diagonal.
template <class T, class V, int kSide>
struct TermColumn {
  const V* lines[kSide];
  Steps exist[kSide];

  __device__ __forceinline__ void advance(int stride) {
#pragma unroll
    for (int line = 0; line < kSide; ++line) lines[line] += stride;
  }
  __device__ __forceinline__ T term(int line, Steps step) const {
    return (exist[line] & step) != 0 ? static_cast<T>(*lines[line]) : T(0);
  }
  __device__ __forceinline__ T sum(Steps step) const {
    T sum = term(0, step);
#pragma unroll
    for (int line = 1; line < kSide; ++line) sum += term(line, step);
    return sum;
  }
};

// The sums of the columns of a window that slides along the diagonal.
template <class T, int kSide>
struct ColumnSums {
  T at[kSide] = {};

  __device__ __forceinline__ void push(T sum) {
#pragma unroll
    for (int b = 0; b + 1 < kSide; ++b) at[b] = at[b + 1];
    at[kSide - 1] = sum;
  }
};

// The sum of a matrix of pairs over the patches, offsets [kFirst, kLast] per axis, around a walk's position and key.
// All lanes of a warp walk over the same positions.
template <class T, class V, int kFirst, int kLast>
class SlidingPatch {
 public:
  static constexpr int kSide = kLast - kFirst + 1, kLead = kSide - 1;
  static_assert(kFirst >= -1 && kLast <= 1 && kLead <= kMostLead);

  __device__ __forceinline__ SlidingPatch(const WalkSizes& sizes, const KeyWalk& keys) : sizes_(sizes), keys_(keys) {
#pragma unroll
    for (int a = 0; a < kSide; ++a) key_steps_[a] = keys.steps_in(-key_shift(a), sizes.keys - key_shift(a));
  }

  // Moves to the stretch, just before its first step. False if a line has positions without a row between others: then
  // addresses do not grow evenly, and sums would be wrong.
  __device__ __forceinline__ bool begin(const Pairs<T, V>& pairs, const Stretch& stretch) {
    bool has_all = true;
    const int lane = threadIdx.x % kWarp, first_step = stretch.step - kLead;
    const int x = stretch.x + kFirst + lane;  // the columns that enter, one a lane
    const bool enters = lane < stretch.length + kLead && x >= 0 && x < sizes_.query_width;
#pragma unroll
    for (int a = 0; a < kSide; ++a) {
      const int y = stretch.y + a + kFirst;
      int row = -1;
      if (enters && y >= 0 && y < sizes_.query_height) row = pairs.row_of[y * sizes_.query_width + x];
      const uint32_t found = __ballot_sync(0xffffffffu, row >= 0);
      // Rows ascend with positions: they are consecutive if `found` is one run of bits, to which its lowest bit
      // carries.
      has_all = has_all && (found & (found + (found & -found))) == 0;
      const int row_of_first = __shfl_sync(0xffffffffu, row - lane, __ffs(static_cast<int>(found)) - 1 & (kWarp - 1));
      column_.lines[a] =
          pairs.values + int64_t{row_of_first} * sizes_.key_columns + (keys_.first + first_step + key_shift(a));
      column_.exist[a] = key_steps_[a] & found << (first_step + kMostLead);
    }
    for (int step = first_step; step < stretch.step; ++step) slide(step_bit(step));
    return has_all;
  }

  __device__ __forceinline__ void slide(Steps step) {
    columns_.push(column_.sum(step));
    column_.advance(sizes_.key_stride);
  }

  // A patch ends where the key's line does; the window goes on with the next one.
  __device__ __forceinline__ T sum(Steps step) const {
    T sum = columns_.at[-kFirst];
    if (kFirst < 0 && (keys_.line_starts & step) == 0) sum += columns_.at[0];
    if (kLast > 0 && (keys_.line_starts & step << 1) == 0) sum += columns_.at[kSide - 1];
    return sum;
  }

 private:
  // From the walk's key to the one of the term that enters in a line.
  __device__ __forceinline__ int key_shift(int line) const { return kLast + (line + kFirst) * sizes_.key_width; }

  const WalkSizes& sizes_;
  const KeyWalk& keys_;
  Steps key_steps_[kSide];
  TermColumn<T, V, kSide> column_;
  ColumnSums<T, kSide> columns_;
};

// ---- Fuse --------------------------------------------------------------------------------------------------------

// The sum of the gradients of fused scores that contain the patch score of a walk's position and key, as far as the
// fuse's steps wrap in neither map; those to the right may run on in the next line of keys.
template <class T, int kHalf>
class SlidingFuse {
 public:
  static constexpr int kSide = 2 * kHalf + 1, kLead = kSide - 1;
  static_assert(kLead <= kMostLead);

  __device__ __forceinline__ SlidingFuse(const WalkSizes& sizes, const KeyWalk& keys) : sizes_(sizes), keys_(keys) {
#pragma unroll
    for (int a = 0; a < kSide; ++a) {
      const int down = (a - kHalf) * sizes.key_width;  // both the key to the right and the one below that exist
      key_steps_[a] = keys.steps_in(max(0, -down) - kHalf, sizes.keys - max(0, down) - kHalf);
    }
  }

  // Moves to the stretch, just before its first step.
  __device__ __forceinline__ void begin(const T* gradients, const Stretch& stretch) {
    const int first_step = stretch.step - kLead;
    const int i = stretch.y - kHalf - sizes_.top, j = stretch.x - kHalf - sizes_.left;
    const int column = keys_.first + first_step + kHalf + keys_.line(first_step + kHalf) * sizes_.key_padding;
    const T* line = gradients + int64_t{i * sizes_.width + j} * sizes_.logit_columns + column;
    const Steps in_tile = steps_between(first_step - j, first_step - j + sizes_.width);
#pragma unroll
    for (int a = 0; a < kSide; ++a) {
      const int key_line = sizes_.key_width + sizes_.key_padding;
      column_.lines[a] = line + int64_t{a * sizes_.width} * sizes_.logit_columns + (a - kHalf) * key_line;
      column_.exist[a] = i + a >= 0 && i + a < sizes_.height ? key_steps_[a] & in_tile : 0;
    }
    const bool is_inner_line = stretch.y >= kHalf && stretch.y + kHalf < sizes_.query_height;
    const int first_x = stretch.step - stretch.x;  // the step at x = 0
    const Steps inner_x = steps_between(first_x + kHalf, first_x + sizes_.query_width - kHalf);
    const Steps inner_keys = key_steps_[0] << kLead & key_steps_[kSide - 1];  // those of both outermost corners exist
    whole_ = is_inner_line ? inner_x & inner_keys : 0;
    for (int step = first_step; step < stretch.step; ++step) slide(step_bit(step));
  }

  __device__ __forceinline__ void slide(Steps step) {
    columns_.push(column_.sum(step));
    const bool next_starts_line = (keys_.line_starts & step << (kHalf + 1)) != 0;
    column_.advance(next_starts_line ? sizes_.logit_stride + sizes_.key_padding : sizes_.logit_stride);
  }

  __device__ __forceinline__ T sum() const {
    T sum = columns_.at[0];
#pragma unroll
    for (int b = 1; b < kSide; ++b) sum += columns_.at[b];
    return sum;
  }

  // Whether no step of the fuse wraps.
  __device__ __forceinline__ bool is_whole(Steps step) const { return (whole_ & step) != 0; }

 private:
  const WalkSizes& sizes_;
  const KeyWalk& keys_;
  Steps key_steps_[kSide], whole_;
  TermColumn<T, T, kSide> column_;
  ColumnSums<T, kSide> columns_;
};

// The terms of dS0(p, q), one after the other: those that `SlidingFuse` lacks, or all of them. Queries come before
// keys, because most of those to which a step wraps are not in the tile.
template <class T>
__device__ T fusing_gradients(const AttentionTile& tile, const T* gradients, const GridPosition& p,
                              const GridPosition& q, bool only_wrapping) {
  const int half = static_cast<int>(tile.half);
  T sum = 0;
  for (int d = -half; d <= half; ++d) {
    GridPosition p_row = p, q_row = q;
    const bool wraps = p.x + d < 0 || p.x + d >= tile.query_width;
    if (!p_row.step_right(d, tile.query_height, tile.query_width) ||
        !q_row.step_right(d, tile.key_height, tile.key_width))
      continue;
    for (int e = -half; e <= half; ++e) {
      GridPosition p_term = p_row, q_term = q_row;
      const bool is_plain =
          !wraps && p.y + e >= 0 && p.y + e < tile.query_height && q_row.y + e >= 0 && q_row.y + e < tile.key_height;
      if (only_wrapping && is_plain) continue;
      if (!p_term.step_down(e, tile.query_height, tile.query_width)) continue;
      const int64_t row = tile.row(p_term.y, p_term.x);
      if (row < 0 || !q_term.step_down(e, tile.key_height, tile.key_width)) continue;
      sum += gradients[row * tile.logit_columns() + q_term.y * tile.key_cell_width + q_term.x];
    }
  }
  return sum;
}

// Sums of a warp by keys over a walk, on which a key's sum moves from lane to lane with its key.
template <class T>
struct KeySums {
  T left = 0;     // of the key that has left the warp after the step of this lane's number
  T present = 0;  // of this lane's key

  // Lane l hands its key's sum to lane l - 1.
  __device__ __forceinline__ void pass_on(int step) {
    const int lane = threadIdx.x % kWarp;
    const T leaving = __shfl_sync(0xffffffffu, present, 0);
    if (lane == step) left = leaving;
    present = __shfl_down_sync(0xffffffffu, present, 1);
    if (lane == kWarp - 1) present = 0;
  }
  // After `steps` steps, of which this lane's first one had key `lane_key`: adds the sums to those of all walks. A key
  // is always that of the same lane.
  __device__ __forceinline__ void add_to(T* totals, int lane_key, int steps, int keys) const {
    const int lane = threadIdx.x % kWarp, late_key = lane_key + steps;
    if (lane < steps && lane_key >= 0 && lane_key < keys) totals[lane_key] += left;
    if (lane < kWarp - 1 && late_key >= 0 && late_key < keys) totals[late_key] += present;
  }
};

// For the positions of patch scores: score_gradients [samples, positions, key columns] = dS0 / n, dS0 being the sum of
// the dS whose fused score contains it, rounded to W; norm_sums [samples, piece, 2, keys] += sum over a piece of the
// positions of dS0 S0. kPatch 0: any patch and fuse.
//
// Blocks of all pieces of some keys are neighbours: at any time, the walks under way are those of neighbouring lines of
// positions, whose windows overlap and find most of their terms in the cache. A warp begins 32 keys after the one
// before and reaches less than 32 into it, so the sums of neighbouring warps go to two arrays.
template <class T, class W, int kPatch, int kHalf>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks<T>)
    contextual_attention_fuse_backward_kernel(AttentionTile tile, WalkSizes sizes, const T* __restrict__ gradients,
                                              Pairs<T> correlations, const T* __restrict__ inverse_norm,
                                              const int32_t* __restrict__ positions, W* __restrict__ score_gradients,
                                              T* __restrict__ norm_sums) {
  constexpr bool kWindowed = kPatch > 0;
  constexpr int kBefore = kWindowed ? (kPatch - 1) / 2 : 0, kAfter = kWindowed ? kPatch - 1 - kBefore : 0;
  const int64_t sample = blockIdx.z;
  gradients += sample * tile.queries() * tile.logit_columns();
  correlations.values += sample * tile.pixels * tile.key_columns;
  inverse_norm += sample * tile.keys();
  score_gradients += sample * tile.positions * tile.key_columns;
  const int piece = blockIdx.x % kNormPieces;
  const int thread = blockIdx.x / kNormPieces * kWalkThreads + threadIdx.x;
  norm_sums += ((sample * kNormPieces + piece) * 2 + thread / kWarp % 2) * sizes.keys;
  const KeyWalk keys(sizes, thread - (sizes.steps - 1));
  SlidingFuse<T, kHalf> fused(sizes, keys);
  SlidingPatch<T, T, -kBefore, kAfter> patch(sizes, keys);
  for (int row = piece * sizes.steps; row < sizes.rows; row += kNormPieces * sizes.steps) {
    KeySums<T> sums;
    const int count = min(sizes.steps, sizes.rows - row);
    const auto query = [&](int step) { return position_at(positions[row + step], sizes.query_width); };
    for_each_stretch(sizes, positions + row, count, [&](const Stretch& stretch) {
      if (kWindowed) {
        fused.begin(gradients, stretch);
        patch.begin(correlations, stretch);  // has all rows: those of the pixels of every patch
      }
      const T* norm = inverse_norm + (keys.first + stretch.step);
      W* out = score_gradients + (row + stretch.step) * int64_t{sizes.key_columns} + (keys.first + stretch.step);
      const int end = stretch.step + stretch.length;
      for (int step = stretch.step; step < end; ++step, ++norm, out += sizes.key_stride) {
        const int key = keys.first + step;
        const bool exists = key >= 0 && key < sizes.keys;
        const T inverse = exists ? *norm : T(0);
        T gradient = 0, score = 0;
        if (kWindowed) {
          const Steps bit = step_bit(step);
          fused.slide(bit);
          patch.slide(bit);
          gradient = fused.sum();
          score = patch.sum(bit);
          if (!fused.is_whole(bit) && exists)
            gradient += fusing_gradients(tile, gradients, query(step), position_at(key, sizes.key_width), true);
        } else if (exists) {
          const GridPosition q = position_at(key, sizes.key_width);
          gradient = fusing_gradients(tile, gradients, query(step), q, false);
          if (gradient != T(0))
            score = patch_score<T>(tile, query(step), q, -tile.before(), tile.after(), correlations);
        }
        if (exists) {
          const T scaled = gradient * inverse;
          if (gradient != T(0)) sums.present += scaled * score;
          *out = static_cast<W>(scaled);
        }
        sums.pass_on(step);
      }
    });
    for (int step = count; step < sizes.steps; ++step) sums.pass_on(step);
    sums.add_to(norm_sums, keys.first, sizes.steps, sizes.keys);
  }
}

// ---- Patches -----------------------------------------------------------------------------------------------------

// For the pixels of a tile: gradients [samples, pixels, key columns] of type W = sum of dS0 / n over the patches that
// contain both pixels; 0 in the padding, which the products read. kPatch 0: any patch.
template <class T, class W, int kPatch>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks<T>)
    contextual_attention_patch_backward_kernel(AttentionTile tile, WalkSizes sizes, Pairs<T, W> score_gradients,
                                               const int32_t* __restrict__ pixels, W* __restrict__ gradients) {
  constexpr bool kWindowed = kPatch > 0;
  constexpr int kBefore = kWindowed ? (kPatch - 1) / 2 : 0, kAfter = kWindowed ? kPatch - 1 - kBefore : 0;
  const int64_t sample = blockIdx.z;
  score_gradients.values += sample * tile.positions * tile.key_columns;
  gradients += sample * tile.pixels * tile.key_columns;
  const KeyWalk keys(sizes, static_cast<int>(global_thread()) - (sizes.steps - 1));
  SlidingPatch<T, W, -kAfter, kBefore> patch(sizes, keys);
  for (int row = blockIdx.y * sizes.steps; row < sizes.rows; row += gridDim.y * sizes.steps) {
    const int count = min(sizes.steps, sizes.rows - row);
    for_each_stretch(sizes, pixels + row, count, [&](const Stretch& stretch) {
      W* out = gradients + (row + stretch.step) * int64_t{sizes.key_columns} + (keys.first + stretch.step);
      const auto write = [&](int key, T sum) {
        if (key >= 0 && key < sizes.key_columns) *out = static_cast<W>(key < sizes.keys ? sum : T(0));
        out += sizes.key_stride;
      };
      const int end = stretch.step + stretch.length;
      // Around the pixels of a stretch, not every position need have patch scores.
      if (kWindowed && patch.begin(score_gradients, stretch)) {
        for (int step = stretch.step; step < end; ++step) {
          patch.slide(step_bit(step));
          write(keys.first + step, patch.sum(step_bit(step)));
        }
      } else {
        for (int step = stretch.step; step < end; ++step) {
          const int key = keys.first + step;
          T sum = 0;
          if (key >= 0 && key < sizes.keys)
            sum = patch_score<T>(tile, position_at(pixels[row + step], sizes.query_width),
                                 position_at(key, sizes.key_width), -tile.after(), tile.before(), score_gradients);
          write(key, sum);
        }
      }
    });
  }
}

// ---- Launchers ---------------------------------------------------------------------------------------------------

// Kernels count keys and queries, and a few lines more, in 32 bits.
inline void check_counts(const AttentionTile& tile) {
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(
      tile.key_columns < kMost && tile.logit_columns() < kMost && tile.query_height * tile.query_width < kMost,
      "a grid of queries or keys has less than ", kMost, " positions");
}

// tile: for the first phases. weight_gradients [phases, samples, cells, key cells]; dots [phases, samples, cells,
// reach_y * reach_x, warps]; logits become the gradients of fused scores.
template <class T>
void launch_softmax_backward(const AttentionTile& tile, const T* weight_gradients, const T* dots, int64_t phases,
                             int64_t warps, const T* factor, const T* keep, T floor, const T* statistics, T* logits,
                             cudaStream_t stream) {
  const PasteGradients<T> pasted{weight_gradients, dots, phases, warps,
                                 tile.samples * tile.cells() * tile.reach_y * tile.reach_x * warps};
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel,
                  dim3(static_cast<unsigned>(tile.queries()), grid_y(ceil_div(tile.logit_columns(), kSoftmaxColumns)),
                       grid_z(tile)),
                  dim3(kSoftmaxThreads), 0, stream, tile, pasted, factor, Masking<T>{keep, floor}, statistics, logits);
  };
  check_counts(tile);
  if (phases == 1 && tile.reach_y == 2 && tile.reach_x == 2)
    launch(contextual_attention_softmax_backward_kernel<T, 2>);
  else
    launch(contextual_attention_softmax_backward_kernel<T, 0>);
}

// For walks over `rows` positions, those of a tile's lines and `halo` more in each. A walk has an equal part of a line.
inline WalkSizes sizes_of(const AttentionTile& tile, int64_t rows, int64_t halo) {
  check_counts(tile);
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const int64_t line = min(tile.width + halo, tile.query_width), padding = tile.key_cell_width - tile.key_width;
  return {narrow(tile.query_height),
          narrow(tile.query_width),
          narrow(tile.top),
          narrow(tile.left),
          narrow(tile.height),
          narrow(tile.width),
          narrow(tile.keys()),
          narrow(tile.key_width),
          narrow(tile.key_columns),
          narrow(tile.logit_columns()),
          narrow(padding),
          narrow(tile.key_columns + 1),
          narrow(tile.logit_columns() + 1),
          narrow(rows),
          narrow(ceil_div(line, ceil_div(line, kMostSteps)))};
}

// Blocks of a walk over all keys, or columns.
inline unsigned walk_blocks(int64_t keys, int steps) {
  return static_cast<unsigned>(ceil_div(keys + steps - 1, kWalkThreads));
}

// positions: of patch scores; norm_sums [samples, kNormPieces, 2, keys].
template <class T, class W>
void launch_fuse_backward(const AttentionTile& tile, const T* gradients, const T* correlations, const int32_t* row_of,
                          const T* inverse_norm, const int32_t* positions, W* score_gradients, T* norm_sums,
                          cudaStream_t stream) {
  const WalkSizes sizes = sizes_of(tile, tile.positions, 2 * tile.half);
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel, dim3(walk_blocks(sizes.keys, sizes.steps) * kNormPieces, 1, grid_z(tile)), dim3(kWalkThreads),
                  0, stream, tile, sizes, gradients, Pairs<T>{correlations, row_of, tile.key_columns}, inverse_norm,
                  positions, score_gradients, norm_sums);
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
  const WalkSizes sizes = sizes_of(tile, tile.pixels, 2 * tile.half + tile.patch - 1);
  const auto launch = [&](auto kernel) {
    launch_kernel(
        kernel,
        dim3(walk_blocks(sizes.key_columns, sizes.steps), grid_y(ceil_div(tile.pixels, sizes.steps)), grid_z(tile)),
        dim3(kWalkThreads), 0, stream, tile, sizes, Pairs<T, W>{score_gradients, row_of, tile.key_columns}, pixels,
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
