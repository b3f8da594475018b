// The search of coherent_semantic_attention: for every masked vector the known one with the largest normalised product.
//
// The value of one score is one chain of (fused, where the processor has it) multiply-adds over the channels, so it
// does not depend on how queries and keys are cut into tiles, and neither does the largest of them: larger wins, of
// equal ones the lower index. Products are never split over the channels for that reason.
#pragma once

#include "../common.h"
#include "simd.h"

namespace inpaint {

// The best known vector of every masked one so far: `index` counts the known vectors of the sample in raster order.
template <class T>
struct Best {
  T* score;
  int32_t* index;
};

// Keys that are packed together, panels[channel][columns], with 1 / n(key) of each; `valid` of them are keys, zeros
// follow up to a whole panel.
template <class T>
struct KeyBlock {
  const T* panels;
  const T* inverse_norm;
  int64_t valid, first;  // `first`: index of the first key
};

// Whether a score takes the place of the best one: it is larger, or the first NaN. Keys come in ascending order, so an
// equal score is a later key's.
template <class T>
INPAINT_INLINE bool is_better(T score, T best) {
  return score > best || (score != score && best == best);
}

// Asks for one of `parts` equal parts of `length` elements.
template <class T>
INPAINT_INLINE void prefetch_part(const T* from, int64_t length, int64_t part, int64_t parts) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t share = ceil_div(length, parts), end = std::min(length, (part + 1) * share);
  for (int64_t at = part * share; at < end; at += line) __builtin_prefetch(from + at, 0, 2);
}

// Panels come from the second-level cache; so many channels ahead they are asked for.
constexpr int64_t kChannelsAhead = 8;

// `rows` queries, apart by `stride`, against a panel of two vectors of keys.
template <class T, int rows, int bytes>
INPAINT_INLINE void search_panel(const T* queries, int64_t stride, int64_t channels, const T* panel,
                                 const T* inverse_norm, int64_t first, int64_t valid, const Best<T>& best) {
  typedef typename VectorOf<T, bytes>::type V;
  typedef typename VectorOf<LaneInt<T>, bytes>::type Mask;
  constexpr int lanes = bytes / sizeof(T);
  V sum[rows][2] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const T* ahead = panel + (c + kChannelsAhead) * 2 * lanes;
    for (int line = 0; line < 2 * bytes; line += 64) __builtin_prefetch(ahead + line / sizeof(T));
    const V keys[2] = {load<V>(panel + c * 2 * lanes), load<V>(panel + c * 2 * lanes + lanes)};
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const V query = queries[r * stride + c] - V{};
      sum[r][0] += query * keys[0];
      sum[r][1] += query * keys[1];
    }
  }
  const V norms[2] = {load<V>(inverse_norm), load<V>(inverse_norm + lanes)};
  Mask better = {};
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const V least = best.score[r] - V{};
    for (int j = 0; j < 2; ++j) {
      sum[r][j] *= norms[j];
      better |= ~(sum[r][j] <= least);  // also where either is NaN
    }
  }
  if (!any_lane(better)) return;
  T scores[2 * lanes];
  for (int r = 0; r < rows; ++r) {
    store(scores, sum[r][0]);
    store(scores + lanes, sum[r][1]);
    for (int64_t k = 0; k < std::min<int64_t>(valid, 2 * lanes); ++k) {
      if (!is_better(scores[k], best.score[r])) continue;
      best.score[r] = scores[k];
      best.index[r] = static_cast<int32_t>(first + k);
    }
  }
}

// A group of queries stays near while the panels of the block pass; with every panel a part of the next group is asked
// for (measured with 512 channels on Zen 3, 91 GFLOP/s at most: 62 to 75 without asking ahead, 79 to 82 with both).
template <class T, int rows, int bytes>
INPAINT_INLINE void search_block_body(const T* queries, int64_t stride, int64_t count, int64_t channels,
                                      const KeyBlock<T>& keys, const Best<T>& best) {
  constexpr int64_t columns = 2 * bytes / sizeof(T);
  const int64_t panels = ceil_div(keys.valid, columns);
  for (int64_t i = 0; i < count; i += rows) {
    const T* group = queries + i * stride;
    const int64_t next = i + rows < count ? rows * stride : 0;
    for (int64_t k = 0; k < panels; ++k) {
      prefetch_part(group + rows * stride, next, k, panels);
      search_panel<T, rows, bytes>(group, stride, channels, keys.panels + k * columns * channels,
                                   keys.inverse_norm + k * columns, keys.first + k * columns, keys.valid - k * columns,
                                   {best.score + i, best.index + i});
    }
  }
}

// search_block(queries, stride, count, channels, keys, best): `count` is a multiple of search_tile(zero).rows.
// One version per register file, as in tile_gemm.h: 12 x 2 vectors of 64 bytes in 32 registers, 6 x 2 of 32 or 16 bytes
// in 16. A panel is at least kChunk keys wide. The last version has no fused multiply-add: its scores are rounded twice
// per channel, in the same order.
struct SearchTile {
  int64_t rows, columns;
};
#define INPAINT_SEARCH_BLOCK(T, attributes, tile_rows, bytes)                                            \
  attributes inline SearchTile search_tile(T) { return {tile_rows, 2 * bytes / sizeof(T)}; }             \
  attributes inline void search_block(const T* queries, int64_t stride, int64_t count, int64_t channels, \
                                      const KeyBlock<T>& keys, const Best<T>& best) {                    \
    search_block_body<T, tile_rows, bytes>(queries, stride, count, channels, keys, best);                \
  }

#ifdef INPAINT_X86_VERSIONS
INPAINT_SEARCH_BLOCK(float, __attribute__((target("arch=x86-64-v4"))), 12, 64)
INPAINT_SEARCH_BLOCK(float, __attribute__((target("arch=x86-64-v3"))), 6, 32)
INPAINT_SEARCH_BLOCK(float, __attribute__((target("default"))), 6, 16)
INPAINT_SEARCH_BLOCK(double, __attribute__((target("arch=x86-64-v4"))), 12, 64)
INPAINT_SEARCH_BLOCK(double, __attribute__((target("arch=x86-64-v3"))), 6, 32)
INPAINT_SEARCH_BLOCK(double, __attribute__((target("default"))), 3, 32)
#else
INPAINT_SEARCH_BLOCK(float, , 6, 16)
INPAINT_SEARCH_BLOCK(double, , 3, 32)
#endif

}  // namespace inpaint
