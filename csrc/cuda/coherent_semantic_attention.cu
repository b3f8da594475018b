// coherent_semantic_attention on CUDA: packing, and the search for the best known vector of every masked one.
//
//   pack      maps -> rows, norms, and the part of the results that known positions have
//   search    scores of query tiles with key tiles in one fixed order, and the best key of every query
//   operands  rows -> operands of half precision for the tensor cores
//   filter    approximate products of queries with keys -> the keys that can be the best, each scored in the fixed
//   order
//
// The value of a score is one chain of FMAs over the channels, then times 1 / (length of the key + 1e-8): whichever
// kernel computes it, and the CPU's, give the same bits.
#include "../kernel_resources.h"
#include "coherent_semantic_attention.cuh"

namespace inpaint {
namespace {

// ---- Packing -----------------------------------------------------------------------------------------------------

// Eight positions are 32 bytes of float32, which memory delivers at once. Few of them in a block make many blocks, and
// so many channels at once that a map of 512 is on its way in two steps.
constexpr int kPackPositions = 8;
constexpr int kPackChannels = 256;
constexpr int kPackThreads = 256;
constexpr int kPackElements = kPackPositions * kPackChannels / kPackThreads;
static_assert(kPackElements == kPackPositions && kPackThreads == kPackChannels);

// A thread's elements of a tile of positions and channels, along the map's lines: the positions lie next to each other
// in memory, or the channels do. Element i is at `first` + i * `step` of the map.
struct PackElements {
  bool along_positions;
  int position, channel;  // of element 0
  int64_t first, step;

  __device__ PackElements(const CoherentLayout& layout, int64_t first_position)
      : along_positions(layout.position_stride == 1) {
    const int thread = threadIdx.x;
    position = along_positions ? thread % kPackPositions : 0;
    channel = along_positions ? thread / kPackPositions : thread;
    first = channel * layout.channel_stride + (first_position + position) * layout.position_stride;
    step = along_positions ? kPackThreads / kPackPositions * layout.channel_stride : layout.position_stride;
  }
  __device__ int position_of(int i) const { return along_positions ? position : i; }
  __device__ int channel_of(int i) const {
    return along_positions ? channel + i * (kPackThreads / kPackPositions) : channel;
  }
};

// What known positions hold in the results; null pointers: there are no results to fill.
template <class V, class T>
struct CoherentResults {
  V* output;       // as the map
  int64_t* index;  // [samples, positions], and so are the others
  T *alpha, *beta, *total;
};

// rows [samples, positions, channels], or [samples, most_masked, channels] of masked positions alone. norm, which may
// be null: lengths of the rows. A block takes kPackPositions positions of a sample.
template <class V>
__global__ void __launch_bounds__(kPackThreads, sizeof(V) == 8 ? 1 : 4)
    coherent_semantic_attention_pack_kernel(CoherentLayout layout, const int32_t* __restrict__ row_of,
                                            const int32_t* __restrict__ known, const V* __restrict__ map,
                                            bool masked_only, V* __restrict__ rows, ScoreType<V>* __restrict__ norm,
                                            CoherentResults<V, ScoreType<V>> results) {
  using T = ScoreType<V>;
  __shared__ V tile[kPackChannels][kPackPositions + 1];
  __shared__ int32_t row_at[kPackPositions];  // -1: nothing to pack
  __shared__ bool is_known[kPackPositions];
  const int64_t sample = blockIdx.z, first = int64_t{blockIdx.x} * kPackPositions;
  const int32_t known_count = known[layout.plan_of(sample)];
  const int64_t rows_of_sample = masked_only ? layout.most_masked : layout.positions;
  if (threadIdx.x < kPackPositions) {
    const int64_t p = first + threadIdx.x;
    const int32_t row = p < layout.positions ? row_of[layout.plan_stride * sample + p] : -1;
    is_known[threadIdx.x] = row >= 0 && row < known_count;
    row_at[threadIdx.x] = !masked_only ? row : row >= known_count ? row - known_count : -1;
    if (results.index != nullptr && row >= 0 && row < known_count) {
      const int64_t at = sample * layout.positions + p;
      results.index[at] = -1;
      results.alpha[at] = results.beta[at] = results.total[at] = 0;
    }
  }
  __syncthreads();
  const PackElements elements(layout, first);
  map += sample * layout.sample_size() + elements.first;
  if (results.output != nullptr) results.output += sample * layout.sample_size() + elements.first;
  rows += sample * rows_of_sample * layout.channels;
  T squared = 0;
  V next[kPackElements];
  const auto load = [&](int64_t channel) {
#pragma unroll
    for (int i = 0; i < kPackElements; ++i) {
      const bool exists = row_at[elements.position_of(i)] >= 0 && channel + elements.channel_of(i) < layout.channels;
      next[i] = exists ? map[channel * layout.channel_stride + i * elements.step] : static_cast<V>(0.0f);
    }
  };
  load(0);
  for (int64_t channel = 0; channel < layout.channels; channel += kPackChannels) {
#pragma unroll
    for (int i = 0; i < kPackElements; ++i) {
      const int position = elements.position_of(i), c = elements.channel_of(i);
      tile[c][position] = next[i];
      if (results.output != nullptr && is_known[position] && channel + c < layout.channels)
        results.output[channel * layout.channel_stride + i * elements.step] = next[i];
    }
    __syncthreads();
    load(channel + kPackChannels);
#pragma unroll
    for (int position = 0; position < kPackPositions; ++position) {
      const int64_t c = channel + threadIdx.x;
      if (row_at[position] >= 0 && c < layout.channels)
        rows[row_at[position] * layout.channels + c] = tile[threadIdx.x][position];
    }
    if (norm != nullptr && threadIdx.x < kPackPositions) {
      // Channels past the last one are zeros, which change nothing.
#pragma unroll 16
      for (int c = 0; c < kPackChannels; ++c) {
        const T value = static_cast<T>(tile[c][threadIdx.x]);
        squared = fma(value, value, squared);
      }
    }
    __syncthreads();
  }
  if (norm != nullptr && threadIdx.x < kPackPositions && row_at[threadIdx.x] >= 0)
    norm[sample * rows_of_sample + row_at[threadIdx.x]] = sqrt(squared);
}

// ---- Search ------------------------------------------------------------------------------------------------------

// A block's tile of queries and keys, and the channels of it that shared memory holds at once; a thread's part of it is
// kMicro x kMicro.
template <int kTileQueries, int kTileKeys, int kMicroSide, int kChannels>
struct SearchTile {
  static constexpr int kQueries = kTileQueries, kKeys = kTileKeys, kMicro = kMicroSide, kDepth = kChannels;
  static constexpr int kRowThreads = kQueries / kMicro, kColumnThreads = kKeys / kMicro;
  static constexpr int kThreads = kRowThreads * kColumnThreads;
  static_assert(kColumnThreads == 16, "half a warp has the keys of one query");
};
// Small tiles leave little for a multiprocessor to switch to: the loads of the next channels take as long as 32
// channels of FMAs. In double precision so many would not fit.
using SmallTile = SearchTile<32, 64, 4, 32>;
using SmallDoubleTile = SearchTile<32, 64, 4, 16>;
using LargeTile = SearchTile<128, 128, 8, 16>;

// The rows of a tile in shared memory, as in the map's: a line is a row, four channels are one access, and eight lines
// from one after the other lie in different banks.
template <class T, int kRows, int kDepth>
struct SearchLines {
  static constexpr int kStride = kDepth + kQuad;
  T values[kRows * kStride];

  __device__ __forceinline__ T* at(int row, int channel) { return values + row * kStride + channel; }
};

template <class T, class V>
__device__ __forceinline__ Quad<T> converted(const Quad<V>& values) {
  Quad<T> result;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) result.at[j] = static_cast<T>(values.at[j]);
  return result;
}

// Four channels of a row from `channel` on, of none: zeros; they change no sum but one of -0, which nobody can tell.
template <class V>
__device__ __forceinline__ Quad<V> load_channels(const V* __restrict__ row, int64_t channel, int64_t channels,
                                                 bool in_quads) {
  Quad<V> result;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) result.at[j] = static_cast<V>(0.0f);
  if (in_quads) {
    if (row != nullptr && channel < channels) result = load_quad(row + channel);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      if (row != nullptr && channel + j < channels) result.at[j] = row[channel + j];
  }
  return result;
}

// How the blocks of a sample share its tiles: split `s` of query tile `t` is item t * splits + s.
struct SearchWork {
  int64_t tiles, splits, key_tiles, key_tiles_of_split;

  INPAINT_HOST_DEVICE SearchWork(int64_t queries, int64_t keys, int tile_queries, int tile_keys, int64_t blocks)
      : tiles(ceil_div(queries, tile_queries)), key_tiles(ceil_div(keys, tile_keys)) {
    int64_t wanted = tiles > 0 ? blocks / tiles : 1;
    wanted = wanted < 1 ? 1 : wanted > key_tiles ? key_tiles : wanted;
    key_tiles_of_split = ceil_div(key_tiles, wanted);
    splits = ceil_div(key_tiles, key_tiles_of_split);
  }
  // Items never outnumber this, whatever the number of queries up to `most_queries`.
  INPAINT_HOST_DEVICE static int64_t most_items(int64_t most_queries, int tile_queries, int64_t blocks) {
    const int64_t tiles = ceil_div(most_queries, tile_queries);
    return tiles > blocks ? tiles : blocks;
  }
};

// The queries of a search: all of a sample, or those that the filter has listed.
struct SearchQueries {
  const int32_t* listed;  // [samples, most_masked]; null: all
  const int32_t* count;   // [samples]

  __device__ int64_t count_of(const CoherentSample& of, int64_t sample) const {
    return listed == nullptr ? of.masked : count[sample];
  }
};

// partial [samples, items, queries of a tile]: the best key of a split. Every value has one writer.
template <class V, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    coherent_semantic_attention_search_kernel(CoherentLayout layout, CoherentPlan plan, const V* __restrict__ rows,
                                              const ScoreType<V>* __restrict__ norm, SearchQueries queries,
                                              ScoreType<V>* __restrict__ partial_score,
                                              int32_t* __restrict__ partial_key, int64_t most_items) {
  using T = ScoreType<V>;
  constexpr int kMicro = Tile::kMicro, kDepth = Tile::kDepth;
  constexpr int kLineThreads = kDepth / kQuad;              // that load one row
  constexpr int kLoadStep = Tile::kThreads / kLineThreads;  // rows between two loads of a thread
  constexpr int kQueryLoads = Tile::kQueries / kLoadStep, kKeyLoads = Tile::kKeys / kLoadStep;
  static_assert(kQueryLoads * kLoadStep == Tile::kQueries && kKeyLoads * kLoadStep == Tile::kKeys);
  alignas(16) __shared__ SearchLines<T, Tile::kQueries, kDepth> query_tile[2];
  alignas(16) __shared__ SearchLines<T, Tile::kKeys, kDepth> key_tile[2];
  __shared__ int32_t query_row[Tile::kQueries];  // -1: none
  const int64_t sample = blockIdx.z;
  const CoherentSample of(layout, plan, sample);
  const int64_t channels = of.channels, count = queries.count_of(of, sample);
  rows += sample * layout.sample_size();
  norm += sample * layout.positions;
  const SearchWork work(count, of.known, Tile::kQueries, Tile::kKeys, gridDim.x);
  const int thread = threadIdx.x, column = thread % Tile::kColumnThreads, row = thread / Tile::kColumnThreads;
  const int load_channel = thread % kLineThreads * kQuad, load_row = thread / kLineThreads;
  const bool in_quads = channels % kQuad == 0;
  for (int64_t item = blockIdx.x; item < work.tiles * work.splits; item += gridDim.x) {
    const int64_t tile = item / work.splits, split = item - tile * work.splits;
    __syncthreads();
    for (int i = thread; i < Tile::kQueries; i += Tile::kThreads) {
      const int64_t at = tile * Tile::kQueries + i;
      const int64_t query = at >= count                 ? -1
                            : queries.listed == nullptr ? at
                                                        : queries.listed[sample * layout.most_masked + at];
      query_row[i] = query < 0 ? -1 : static_cast<int32_t>(of.known + query);
    }
    __syncthreads();
    Match<T> best[kMicro];
#pragma unroll
    for (int m = 0; m < kMicro; ++m) best[m] = Match<T>::none();
    const int64_t last_tile = min(work.key_tiles, (split + 1) * work.key_tiles_of_split);
    for (int64_t tile_of_keys = split * work.key_tiles_of_split; tile_of_keys < last_tile; ++tile_of_keys) {
      const int64_t first_key = tile_of_keys * Tile::kKeys;
      const V *query_rows[kQueryLoads], *key_rows[kKeyLoads];
#pragma unroll
      for (int i = 0; i < kQueryLoads; ++i) {
        const int32_t from = query_row[load_row + i * kLoadStep];
        query_rows[i] = from >= 0 ? rows + from * channels : nullptr;
      }
#pragma unroll
      for (int i = 0; i < kKeyLoads; ++i) {
        const int64_t from = first_key + load_row + i * kLoadStep;
        key_rows[i] = from < of.known ? rows + from * channels : nullptr;
      }
      Quad<V> next_queries[kQueryLoads], next_keys[kKeyLoads];
      const auto load = [&](int64_t channel) {
#pragma unroll
        for (int i = 0; i < kQueryLoads; ++i)
          next_queries[i] = load_channels(query_rows[i], channel + load_channel, channels, in_quads);
#pragma unroll
        for (int i = 0; i < kKeyLoads; ++i)
          next_keys[i] = load_channels(key_rows[i], channel + load_channel, channels, in_quads);
      };
      const auto store = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < kQueryLoads; ++i)
          store_quad(query_tile[buffer].at(load_row + i * kLoadStep, load_channel), converted<T>(next_queries[i]));
#pragma unroll
        for (int i = 0; i < kKeyLoads; ++i)
          store_quad(key_tile[buffer].at(load_row + i * kLoadStep, load_channel), converted<T>(next_keys[i]));
      };
      T sums[kMicro][kMicro] = {};
      load(0);
      store(0);
      __syncthreads();
      int buffer = 0;
      for (int64_t channel = 0; channel < channels; channel += kDepth, buffer ^= 1) {
        load(channel + kDepth);  // behind the last channel: zeros
#pragma unroll
        for (int c = 0; c < kDepth; c += kQuad) {
          Quad<T> q[kMicro], k[kMicro];
#pragma unroll
          for (int m = 0; m < kMicro; ++m) {
            q[m] = load_quad(query_tile[buffer].at(m * Tile::kRowThreads + row, c));
            k[m] = load_quad(key_tile[buffer].at(m * Tile::kColumnThreads + column, c));
          }
#pragma unroll
          for (int j = 0; j < kQuad; ++j)
#pragma unroll
            for (int m = 0; m < kMicro; ++m)
#pragma unroll
              for (int n = 0; n < kMicro; ++n) sums[m][n] = fma(q[m].at[j], k[n].at[j], sums[m][n]);
        }
        store(buffer ^ 1);
        __syncthreads();
      }
#pragma unroll
      for (int n = 0; n < kMicro; ++n) {
        const int64_t key = first_key + n * Tile::kColumnThreads + column;
        if (key >= of.known) continue;
        const T inverse = inverse_length(norm[key]);
#pragma unroll
        for (int m = 0; m < kMicro; ++m) best[m].update(sums[m][n] * inverse, static_cast<int32_t>(key));
      }
    }
#pragma unroll
    for (int m = 0; m < kMicro; ++m) {
      best[m] = best_of_lanes(best[m], Tile::kColumnThreads);
      if (column == 0) {
        const int64_t at = (sample * most_items + item) * Tile::kQueries + m * Tile::kRowThreads + row;
        partial_score[at] = best[m].score;
        partial_key[at] = best[m].key;
      }
    }
  }
}

constexpr int kMatchThreads = 128;

// What the filter knows of every query; null pointers: there was no filter.
template <class T>
struct FilterState {
  float* maximum;  // [samples, most_masked], and so are the others: the largest product so far
  T* score;        // the best key so far
  int32_t* key;
  int32_t* candidates;  // how many keys were scored; -1 - i: too many, the query is entry i of the list
};

// The best of all splits or what the filter found, a warp per query; value [samples, most_masked] (of variant "paper":
// the cosine), match, likewise: the key's row; index [samples, positions].
template <class T>
__global__ void coherent_semantic_attention_matches_kernel(CoherentLayout layout, CoherentPlan plan,
                                                           const T* __restrict__ norm, SearchQueries queries,
                                                           const T* __restrict__ partial_score,
                                                           const int32_t* __restrict__ partial_key, int64_t most_items,
                                                           int tile_queries, int tile_keys, int64_t blocks,
                                                           FilterState<T> state, bool is_paper, T* __restrict__ value,
                                                           int32_t* __restrict__ match, int64_t* __restrict__ index) {
  const int64_t sample = blockIdx.z;
  const CoherentSample of(layout, plan, sample);
  const SearchWork work(queries.count_of(of, sample), of.known, tile_queries, tile_keys, blocks);
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = global_thread() / kWarp; i < of.masked; i += grid_stride() / kWarp) {
    const int64_t at = sample * layout.most_masked + i;
    Match<T> best = Match<T>::none();
    int64_t slot = i;
    if (state.candidates != nullptr) {
      slot = -1 - int64_t{state.candidates[at]};
      if (slot < 0) best = {state.score[at], state.key[at]};
    }
    for (int64_t split = lane; slot >= 0 && split < work.splits; split += kWarp) {
      const int64_t item = slot / tile_queries * work.splits + split;
      const int64_t from = (sample * most_items + item) * tile_queries + slot % tile_queries;
      best.update(partial_score[from], partial_key[from]);
    }
    best = best_of_lanes(best, kWarp);
    if (lane == 0) {
      value[at] = is_paper ? best.score * inverse_length(norm[sample * layout.positions + of.known + i]) : best.score;
      match[at] = best.key;
      index[sample * layout.positions + of.position_of_query(i)] = of.positions[best.key];
    }
  }
}

// ---- Filter ------------------------------------------------------------------------------------------------------
// Tensor cores multiply operands of half precision: queries and keys divided by their lengths, so that products are
// cosines and all have one bound of their error. Which score is the largest they cannot say, but which ones cannot be:
// those of keys whose product is more than twice the error below the largest one. The others are scored again, in the
// order of the search.

constexpr int kOperandThreads = 256;
constexpr int kFilterThreads = 256;
constexpr int kFilterQueue = 2 * kWarp;
// Candidates whose rows a warp reads together, and how many of their channels at once. Of most queries there are few.
constexpr int kFewCandidates = 8, kScoredChannels = 128;
constexpr int kFilterQuads = 8;  // that a lane has on their way at once
// From so many candidates on, the search in tiles is as fast. Flat regions have thousands of equal keys.
constexpr int kMostCandidates = 1024;
// Lengths for which the bound holds: no square overflows, no product becomes 0.
constexpr float kShortest = 0x1p-60f, kLongest = 0x1p60f;

__device__ __forceinline__ bool is_bounded(float length) { return length >= kShortest && length <= kLongest; }

// query_operands [samples, most_masked, columns], key_operands [samples, key rows, columns]: zeros in the padding, a
// multiple of kQuad columns. A warp writes a row. A
// key whose length is out of bounds becomes NaN, and with it all its products: they are candidates. count [samples] =
// 0.
template <class V>
__global__ void __launch_bounds__(kOperandThreads, 1)
    coherent_semantic_attention_operands_kernel(CoherentLayout layout, CoherentPlan plan, const V* __restrict__ rows,
                                                const float* __restrict__ norm, __half* __restrict__ query_operands,
                                                __half* __restrict__ key_operands, int64_t key_rows, int64_t columns,
                                                int32_t* __restrict__ count) {
  const int64_t sample = blockIdx.z;
  const CoherentSample of(layout, plan, sample);
  rows += sample * layout.sample_size();
  norm += sample * layout.positions;
  query_operands += sample * layout.most_masked * columns;
  key_operands += sample * key_rows * columns;
  if (blockIdx.x == 0 && threadIdx.x == 0) count[sample] = 0;
  const bool in_quads = layout.channels % kQuad == 0;
  const int64_t warps = grid_stride() / kWarp;
  for (int64_t i = global_thread() / kWarp; i < key_rows + layout.most_masked; i += warps) {
    const bool is_query = i >= key_rows;
    const int64_t entry = is_query ? i - key_rows : i;
    const bool exists = entry < (is_query ? of.masked : of.known);
    const int64_t row = is_query ? of.known + entry : entry;
    const float length = exists ? norm[row] : 0.0f;
    float factor = is_query && is_bounded(length) ? 1.0f / length : 0.0f;
    if (!is_query && exists) factor = length <= kLongest ? inverse_length(length) : NAN;
    const V* from = exists ? rows + row * layout.channels : nullptr;
    __half* to = (is_query ? query_operands : key_operands) + entry * columns;
#pragma unroll 4
    for (int64_t c = kQuad * (threadIdx.x % kWarp); c < columns; c += kQuad * kWarp) {
      const Quad<V> values = load_channels(from, c, layout.channels, in_quads);
      Quad<__half> operands;
#pragma unroll
      for (int j = 0; j < kQuad; ++j)
        operands.at[j] = __float2half_rn(factor != 0.0f ? static_cast<float>(values.at[j]) * factor : 0.0f);
      store_quad(to + c, operands);
    }
  }
}

// products [samples, queries, key columns] of a tile. One warp per query; tiles of the same queries come one after the
// other, in the order of their keys.
struct ProductTile {
  int64_t first_sample, first_query, queries, first_key, key_columns;
  bool is_first, is_last;  // of the tiles of these queries
};

// What a warp has found and not scored yet.
struct FilterQueue {
  int32_t keys[kFilterQueue];
  float products[kFilterQueue];
  float channels[kFewCandidates][kScoredChannels + 1], query_channels[kScoredChannels];  // of the rows being scored
};

// The largest value of a warp, in every lane; a NaN is no value.
__device__ __forceinline__ float most_of_lanes(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// The product of two rows in the order of the search, by one lane.
template <class V>
__device__ float score_alone(const V* __restrict__ query_row, const V* __restrict__ key_row, int64_t channels) {
  float sum = 0;
#pragma unroll 32
  for (int64_t c = 0; c < channels; ++c)
    sum = fma(static_cast<float>(query_row[c]), static_cast<float>(key_row[c]), sum);
  return sum;
}

// The same of the queued keys in `due`, kFewCandidates at most: the warp reads the rows, each lane of `due` then
// multiplies its own.
template <class V>
__device__ float score_few(FilterQueue& queue, const V* __restrict__ query_row, const V* __restrict__ rows,
                           int64_t channels, unsigned due) {
  const int lane = threadIdx.x % kWarp, slot = __popc(due & ((1u << lane) - 1));
  const bool is_due = (due >> lane & 1) != 0;
  constexpr int kChannelsOfLane = kScoredChannels / kWarp;
  float sum = 0;
  for (int64_t first = 0; first < channels && due != 0; first += kScoredChannels) {
    const auto read = [&](const V* row, float* to) {
      V values[kChannelsOfLane];
#pragma unroll
      for (int j = 0; j < kChannelsOfLane; ++j) {
        const int64_t c = first + lane + j * kWarp;
        values[j] = c < channels ? row[c] : static_cast<V>(0.0f);
      }
#pragma unroll
      for (int j = 0; j < kChannelsOfLane; ++j) to[lane + j * kWarp] = static_cast<float>(values[j]);
    };
    read(query_row, queue.query_channels);
    int of_slot = 0;
    for (unsigned left = due; left != 0; left &= left - 1, ++of_slot)
      read(rows + int64_t{queue.keys[__ffs(static_cast<int>(left)) - 1]} * channels, queue.channels[of_slot]);
    __syncwarp();
    if (is_due) {
#pragma unroll 16
      for (int c = 0; c < kScoredChannels; ++c) sum = fma(queue.query_channels[c], queue.channels[slot][c], sum);
    }
    __syncwarp();
  }
  return sum;
}

template <class V>
__global__ void __launch_bounds__(kFilterThreads, 2)
    coherent_semantic_attention_filter_kernel(CoherentLayout layout, CoherentPlan plan, const V* __restrict__ rows,
                                              const float* __restrict__ norm, ProductTile tile,
                                              const float* __restrict__ products, float error, FilterState<float> state,
                                              int32_t* __restrict__ listed, int32_t* __restrict__ count) {
  constexpr int kKeysOfLane = kFilterQuads * kQuad, kKeysOfStep = kKeysOfLane * kWarp;
  __shared__ FilterQueue queues[kFilterThreads / kWarp];
  const int lane = threadIdx.x % kWarp;
  FilterQueue& queue = queues[threadIdx.x / kWarp];
  const int64_t sample = tile.first_sample + blockIdx.z;
  const CoherentSample of(layout, plan, sample);
  rows += sample * layout.sample_size();
  norm += sample * layout.positions;
  products += blockIdx.z * tile.queries * tile.key_columns;
  const auto keys = static_cast<int>(min(of.known - tile.first_key, tile.key_columns));
  const int64_t warps = int64_t{gridDim.x} * (kFilterThreads / kWarp);
  for (int64_t i = global_thread() / kWarp; i < tile.queries; i += warps) {
    const int64_t query = tile.first_query + i, at = sample * layout.most_masked + query;
    const bool exists = query < of.masked;
    const V* query_row = rows + (of.known + query) * of.channels;
    const float* line = products + i * tile.key_columns;
    float most = -INFINITY;
    int candidates = 0;
    Match<float> best = Match<float>::none();
    if (exists && !tile.is_first) most = state.maximum[at], candidates = state.candidates[at];
    if (exists && tile.is_first && !is_bounded(norm[of.known + query])) candidates = kMostCandidates + 1;
    if (lane == 0 && exists && !tile.is_first) best = {state.score[at], state.key[at]};
    int queued = 0;
    // Scores the first `number` of the queue, a lane each; the others move to its front.
    const auto score_queued = [&](int number, float least) {
      __syncwarp();
      const int32_t key = lane < number ? queue.keys[lane] : 0;
      // Of what was queued before a larger product was found, most need no score.
      const bool is_due = lane < number && !(queue.products[lane] < least);
      const unsigned due = __ballot_sync(0xffffffffu, is_due);
      if (__popc(due) <= kFewCandidates) {
        const float score = score_few(queue, query_row, rows, of.channels, due);
        if (is_due) best.update(score * inverse_length(norm[key]), key);
      } else if (is_due) {
        best.update(score_alone(query_row, rows + key * of.channels, of.channels) * inverse_length(norm[key]), key);
      }
      const int32_t moved = queue.keys[lane + kWarp];
      const float moved_product = queue.products[lane + kWarp];
      __syncwarp();
      queue.keys[lane] = moved;
      queue.products[lane] = moved_product;
      __syncwarp();
      queued -= number;
    };
    for (int first = 0; exists && first < keys; first += kKeysOfStep) {
      const auto key_of = [&](int j) { return first + (j / kQuad * kWarp + lane) * kQuad + j % kQuad; };
      Quad<float> values[kFilterQuads];
#pragma unroll
      for (int part = 0; part < kFilterQuads; ++part)
        if (key_of(part * kQuad) < keys) values[part] = load_quad(line + key_of(part * kQuad));
      if (first + kKeysOfStep > keys) {
#pragma unroll
        for (int j = 0; j < kKeysOfLane; ++j)
          if (key_of(j) >= keys) values[j / kQuad].at[j % kQuad] = -INFINITY;
      }
      float most_of_lane = most;
      bool has_nan = false;
#pragma unroll
      for (int j = 0; j < kKeysOfLane; ++j) {
        const float value = values[j / kQuad].at[j % kQuad];
        has_nan |= value != value;
        most_of_lane = max(most_of_lane, value);
      }
      most = most_of_lanes(most_of_lane);
      // The keys to come can only raise it: what is left out here is no candidate.
      const float least = most - 2 * error;
      const bool may_have = candidates <= kMostCandidates && (has_nan || most_of_lane >= least);
      if (!__any_sync(0xffffffffu, may_have)) continue;
      unsigned mine = 0;
#pragma unroll
      for (int j = 0; j < kKeysOfLane; ++j)
        if (key_of(j) < keys && !(values[j / kQuad].at[j % kQuad] < least)) mine |= 1u << j;  // a NaN too
      // One candidate of every lane at a time; there is seldom more than one in the warp.
      for (unsigned all = __ballot_sync(0xffffffffu, mine != 0); all != 0;
           all = __ballot_sync(0xffffffffu, mine != 0)) {
        if (mine != 0) {
          const int place = queued + __popc(all & ((1u << lane) - 1)), key = key_of(__ffs(static_cast<int>(mine)) - 1);
          queue.keys[place] = static_cast<int32_t>(tile.first_key) + key;
          queue.products[place] = line[key];
          mine &= mine - 1;
        }
        queued += __popc(all);
        candidates += __popc(all);
        if (queued >= kWarp) score_queued(kWarp, least);
      }
    }
    if (queued > 0 && candidates <= kMostCandidates) score_queued(queued, most - 2 * error);
    best = best_of_lanes(best, kWarp);
    if (lane == 0 && exists) {
      if (tile.is_last && candidates > kMostCandidates) {
        const int entry = atomicAdd(count + sample, 1);
        listed[sample * layout.most_masked + entry] = static_cast<int32_t>(query);
        candidates = -1 - entry;
      }
      state.maximum[at] = most;
      state.score[at] = best.score;
      state.key[at] = best.key;
      state.candidates[at] = candidates;
    }
    __syncwarp();
  }
}

// ---- Launchers ---------------------------------------------------------------------------------------------------

template <class V>
void launch_coherent_pack(const CoherentLayout& layout, const int32_t* row_of, const int32_t* known, const V* map,
                          bool masked_only, V* rows, ScoreType<V>* norm, V* output, int64_t* index, ScoreType<V>* alpha,
                          ScoreType<V>* beta, ScoreType<V>* total, cudaStream_t stream) {
  launch_kernel(
      coherent_semantic_attention_pack_kernel<V>,
      dim3(static_cast<unsigned>(ceil_div(layout.positions, kPackPositions)), 1, coherent_grid_z(layout.samples)),
      dim3(kPackThreads), 0, stream, layout, row_of, known, map, masked_only, rows, norm,
      CoherentResults<V, ScoreType<V>>{output, index, alpha, beta, total});
}

// Elements of the partial results of a search.
template <class Tile>
int64_t partial_elements(const CoherentLayout& layout, int64_t blocks) {
  return layout.samples * SearchWork::most_items(layout.most_masked, Tile::kQueries, blocks) * Tile::kQueries;
}

// blocks: of each sample. listed, count and the state of the filter may be null.
template <class V, class Tile>
void launch_coherent_search_in(const CoherentLayout& layout, const CoherentPlan& plan, const V* rows,
                               const ScoreType<V>* norm, const SearchQueries& queries, int64_t blocks,
                               ScoreType<V>* partial_score, int32_t* partial_key,
                               const FilterState<ScoreType<V>>& state, bool is_paper, ScoreType<V>* value,
                               int32_t* match, int64_t* index, cudaStream_t stream) {
  using T = ScoreType<V>;
  const int64_t most_items = SearchWork::most_items(layout.most_masked, Tile::kQueries, blocks);
  launch_kernel(coherent_semantic_attention_search_kernel<V, Tile>,
                dim3(static_cast<unsigned>(blocks), 1, coherent_grid_z(layout.samples)), dim3(Tile::kThreads), 0,
                stream, layout, plan, rows, norm, queries, partial_score, partial_key, most_items);
  launch_kernel(coherent_semantic_attention_matches_kernel<T>,
                dim3(static_cast<unsigned>(ceil_div(layout.most_masked, kMatchThreads / kWarp)), 1,
                     coherent_grid_z(layout.samples)),
                dim3(kMatchThreads), 0, stream, layout, plan, norm, queries, partial_score, partial_key, most_items,
                Tile::kQueries, Tile::kKeys, blocks, state, is_paper, value, match, index);
}

template <class V>
void launch_coherent_search(const CoherentLayout& layout, const int32_t* positions, const int32_t* known, const V* rows,
                            const ScoreType<V>* norm, const int32_t* listed, const int32_t* count, int64_t blocks,
                            bool large_tiles, ScoreType<V>* partial_score, int32_t* partial_key,
                            const ScoreType<V>* found_score, const int32_t* found_key, const int32_t* candidates,
                            bool is_paper, ScoreType<V>* value, int32_t* match, int64_t* index, cudaStream_t stream) {
  using T = ScoreType<V>;
  // The state is only read here.
  const FilterState<T> state{nullptr, const_cast<T*>(found_score), const_cast<int32_t*>(found_key),
                             const_cast<int32_t*>(candidates)};
  const CoherentPlan plan{positions, known};
  const SearchQueries queries{listed, count};
  if constexpr (!std::is_same_v<V, double>) {
    if (large_tiles) {
      launch_coherent_search_in<V, LargeTile>(layout, plan, rows, norm, queries, blocks, partial_score, partial_key,
                                              state, is_paper, value, match, index, stream);
      return;
    }
  }
  using Small = std::conditional_t<std::is_same_v<V, double>, SmallDoubleTile, SmallTile>;
  launch_coherent_search_in<V, Small>(layout, plan, rows, norm, queries, blocks, partial_score, partial_key, state,
                                      is_paper, value, match, index, stream);
}

template <class V>
void launch_coherent_operands(const CoherentLayout& layout, const int32_t* positions, const int32_t* known,
                              const V* rows, const float* norm, __half* query_operands, __half* key_operands,
                              int64_t key_rows, int64_t columns, int32_t* count, cudaStream_t stream) {
  launch_kernel(coherent_semantic_attention_operands_kernel<V>,
                dim3(static_cast<unsigned>(ceil_div(key_rows + layout.most_masked, kOperandThreads / kWarp)), 1,
                     coherent_grid_z(layout.samples)),
                dim3(kOperandThreads), 0, stream, layout, CoherentPlan{positions, known}, rows, norm, query_operands,
                key_operands, key_rows, columns, count);
}

// samples: of the tile.
template <class V>
void launch_coherent_filter(const CoherentLayout& layout, const int32_t* positions, const int32_t* known, const V* rows,
                            const float* norm, const float* products, int64_t first_sample, int64_t samples,
                            int64_t first_query, int64_t queries, int64_t first_key, int64_t key_columns, bool is_last,
                            float error, float* maximum, float* found_score, int32_t* found_key, int32_t* candidates,
                            int32_t* listed, int32_t* count, cudaStream_t stream) {
  launch_kernel(coherent_semantic_attention_filter_kernel<V>,
                dim3(static_cast<unsigned>(ceil_div(queries, kFilterThreads / kWarp)), 1, coherent_grid_z(samples)),
                dim3(kFilterThreads), 0, stream, layout, CoherentPlan{positions, known}, rows, norm,
                ProductTile{first_sample, first_query, queries, first_key, key_columns, first_key == 0, is_last},
                products, error, FilterState<float>{maximum, found_score, found_key, candidates}, listed, count);
}

}  // namespace
}  // namespace inpaint

#ifndef INPAINT_EMULATION

#include "coherent_semantic_attention_arguments.cuh"

namespace inpaint {
namespace {

// ---- torch -------------------------------------------------------------------------------------------------------

void coherent_semantic_attention_pack(const Tensor& fields, const Tensor& row_of, const Tensor& known,
                                      const Tensor& map, bool masked_only, Tensor rows, std::optional<Tensor> norm,
                                      std::optional<Tensor> output, std::optional<Tensor> index,
                                      std::optional<Tensor> alpha, std::optional<Tensor> beta,
                                      std::optional<Tensor> total) {
  const CoherentLayout layout = layout_of(fields);
  const int64_t count = layout.samples * (masked_only ? layout.most_masked : layout.positions);
  check_elements(rows, "rows", count * layout.channels);
  check_map(layout, map, "map");
  if (norm) check_elements(*norm, "norm", count);
  if (output) check_map(layout, *output, "output");
  STD_TORCH_CHECK(index.has_value() == output.has_value() && alpha.has_value() == output.has_value() &&
                      beta.has_value() == output.has_value() && total.has_value() == output.has_value(),
                  "output, index, alpha, beta and total: expected all or none of them");
  const CudaLaunch launch(map);
  dispatch_floating(map.scalar_type(), "map", [&](auto zero) {
    using V = decltype(zero);
    using T = ScoreType<V>;
    launch_coherent_pack<V>(layout, plan_data(layout, row_of, layout.positions), plan_data(layout, known, 1),
                            static_cast<const V*>(map.data_ptr()), masked_only, static_cast<V*>(rows.data_ptr()),
                            written_or_null<T>(norm), output ? static_cast<V*>(output->data_ptr()) : nullptr,
                            written_or_null<int64_t>(index), written_or_null<T>(alpha), written_or_null<T>(beta),
                            written_or_null<T>(total), launch.stream);
  });
}

void coherent_semantic_attention_search(const Tensor& fields, const Tensor& positions, const Tensor& known,
                                        const Tensor& rows, const Tensor& norm, const std::optional<Tensor>& listed,
                                        const std::optional<Tensor>& count, int64_t blocks, bool large_tiles,
                                        Tensor partial_score, Tensor partial_key,
                                        const std::optional<Tensor>& found_score,
                                        const std::optional<Tensor>& found_key, const std::optional<Tensor>& candidates,
                                        bool is_paper, Tensor value, Tensor match, Tensor index) {
  const CoherentLayout layout = layout_of(fields);
  const int64_t queries = layout.samples * layout.most_masked;
  STD_TORCH_CHECK(blocks >= 1, "blocks: expected at least 1, got ", blocks);
  const bool is_large = large_tiles && rows.scalar_type() != ScalarType::Double;
  const int64_t elements =
      is_large ? partial_elements<LargeTile>(layout, blocks) : partial_elements<SmallTile>(layout, blocks);
  check_rows(layout, rows, norm);
  check_elements(partial_score, "partial_score", elements);
  check_elements(partial_key, "partial_key", elements);
  check_elements(value, "value", queries);
  check_elements(match, "match", queries);
  check_elements(index, "index", layout.samples * layout.positions);
  const CudaLaunch launch(rows);
  dispatch_floating(rows.scalar_type(), "rows", [&](auto zero) {
    using V = decltype(zero);
    using T = ScoreType<V>;
    launch_coherent_search<V>(layout, plan_data(layout, positions, layout.positions), plan_data(layout, known, 1),
                              static_cast<const V*>(rows.data_ptr()), norm.const_data_ptr<T>(),
                              data_or_null<int32_t>(listed), data_or_null<int32_t>(count), blocks, is_large,
                              partial_score.mutable_data_ptr<T>(), partial_key.mutable_data_ptr<int32_t>(),
                              data_or_null<T>(found_score), data_or_null<int32_t>(found_key),
                              data_or_null<int32_t>(candidates), is_paper, value.mutable_data_ptr<T>(),
                              match.mutable_data_ptr<int32_t>(), index.mutable_data_ptr<int64_t>(), launch.stream);
  });
}

// Calls `body` with a zero of the type of maps that the filter takes.
template <class Body>
void dispatch_filter(const Tensor& rows, Body&& body) {
  const ScalarType type = rows.scalar_type();
  STD_TORCH_CHECK(type != ScalarType::Double, "rows: expected float32, float16 or bfloat16, got float64");
  if (type == ScalarType::Half) return body(__half{});
  if (type == ScalarType::BFloat16) return body(__nv_bfloat16{});
  STD_TORCH_CHECK(type == ScalarType::Float, "rows: expected a floating dtype");
  body(float{});
}

void coherent_semantic_attention_operands(const Tensor& fields, const Tensor& positions, const Tensor& known,
                                          const Tensor& rows, const Tensor& norm, Tensor query_operands,
                                          Tensor key_operands, Tensor count) {
  const CoherentLayout layout = layout_of(fields);
  check_rows(layout, rows, norm);
  check_dense(query_operands, "query_operands", 3);
  check_dense(key_operands, "key_operands", 3);
  const int64_t columns = query_operands.size(2), key_rows = key_operands.size(1);
  STD_TORCH_CHECK(columns >= layout.channels && key_rows >= layout.most_known && key_operands.size(2) == columns,
                  "key_operands: expected at least ", layout.most_known, " rows of ", columns, " columns");
  check_elements(query_operands, "query_operands", layout.samples * layout.most_masked * columns);
  check_elements(key_operands, "key_operands", layout.samples * key_rows * columns);
  check_elements(count, "count", layout.samples);
  const CudaLaunch launch(rows);
  dispatch_filter(rows, [&](auto zero) {
    using V = decltype(zero);
    launch_coherent_operands<V>(layout, plan_data(layout, positions, layout.positions), plan_data(layout, known, 1),
                                static_cast<const V*>(rows.data_ptr()), norm.const_data_ptr<float>(),
                                static_cast<__half*>(query_operands.data_ptr()),
                                static_cast<__half*>(key_operands.data_ptr()), key_rows, columns,
                                count.mutable_data_ptr<int32_t>(), launch.stream);
  });
}

void coherent_semantic_attention_filter(const Tensor& fields, const Tensor& positions, const Tensor& known,
                                        const Tensor& rows, const Tensor& norm, const Tensor& products,
                                        int64_t first_sample, int64_t first_query, int64_t first_key, bool is_last,
                                        double error, Tensor maximum, Tensor found_score, Tensor found_key,
                                        Tensor candidates, Tensor listed, Tensor count) {
  const CoherentLayout layout = layout_of(fields);
  check_rows(layout, rows, norm);
  check_dense(products, "products", 3);
  STD_TORCH_CHECK(products.size(2) % kQuad == 0, "products: expected lines of a multiple of ", kQuad);
  STD_TORCH_CHECK(
      first_sample + products.size(0) <= layout.samples && first_query + products.size(1) <= layout.most_masked,
      "products: expected queries of the layout");
  for (const Tensor* state : {&maximum, &found_score, &found_key, &candidates, &listed})
    check_elements(*state, "state", layout.samples * layout.most_masked);
  check_elements(count, "count", layout.samples);
  const CudaLaunch launch(rows);
  dispatch_filter(rows, [&](auto zero) {
    using V = decltype(zero);
    launch_coherent_filter<V>(layout, plan_data(layout, positions, layout.positions), plan_data(layout, known, 1),
                              static_cast<const V*>(rows.data_ptr()), norm.const_data_ptr<float>(),
                              products.const_data_ptr<float>(), first_sample, products.size(0), first_query,
                              products.size(1), first_key, products.size(2), is_last, static_cast<float>(error),
                              maximum.mutable_data_ptr<float>(), found_score.mutable_data_ptr<float>(),
                              found_key.mutable_data_ptr<int32_t>(), candidates.mutable_data_ptr<int32_t>(),
                              listed.mutable_data_ptr<int32_t>(), count.mutable_data_ptr<int32_t>(), launch.stream);
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CUDA, m) {
  m.impl("coherent_semantic_attention_pack", TORCH_BOX(&inpaint::coherent_semantic_attention_pack));
  m.impl("coherent_semantic_attention_search", TORCH_BOX(&inpaint::coherent_semantic_attention_search));
  m.impl("coherent_semantic_attention_operands", TORCH_BOX(&inpaint::coherent_semantic_attention_operands));
  m.impl("coherent_semantic_attention_filter", TORCH_BOX(&inpaint::coherent_semantic_attention_filter));
}

#endif  // INPAINT_EMULATION
