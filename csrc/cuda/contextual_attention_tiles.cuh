// What the forward and the backward CUDA kernels of contextual_attention share: the geometry of a tile of queries, and
// the neighbours along which scores are summed.
//
// A tile is a rectangle of queries with all keys, for several samples of a batch at once: a block's sample is
// blockIdx.z. Its pixel correlations G [samples, pixels, key columns] come from a matrix product;
// inpaint_kernels/cuda_kernels/contextual_attention.py cuts the tiles and calls the products.
//
// Memory. Logits, and weights of key cells, lie on one grid of keys, whose lines are padded to a multiple of kQuad:
// four keys from a multiple of four on are one access of 16 bytes (8 of half precision), lie in one line, and what a
// pasted patch adds to them lies `reach` keys further on, in the same line. So one thread takes four keys in the passes
// between logits and weights, in both directions. Correlations and patch scores, whose diagonals run on past line ends,
// have no such padding. Passes over them give neighbouring keys to neighbouring threads: along a diagonal every step is
// one key further, so no two accesses of a thread have one alignment, and a warp reads 128 consecutive bytes anyway.
#pragma once

#include "../common.h"
#include "../math/contextual_attention.h"
#include "device.cuh"

namespace inpaint {
namespace {

// Of a block of threads that walk along diagonals: one query further along a row, its key one further with each, so
// that all but one column of the terms of a diagonal sum are those of the step before, and stay in registers.
constexpr int kWalkThreads = 128;

// A tile as the host hands it over: int64 values in this order.
struct AttentionTile {
  int64_t query_height, query_width, key_height, key_width;
  int64_t patch, half;                                   // side of the patches, reach of the fuse (0: none)
  int64_t top, left, height, width;                      // queries of the tile
  int64_t cell_top, cell_left, cell_height, cell_width;  // output cells of the tile
  int64_t reach_y, reach_x;  // steps that a pasted patch spans, for the pixels that are pasted
  int64_t key_cell_height, key_cell_width;
  int64_t samples, pixels, positions;  // samples of the batch; rows of correlations and of patch scores
  int64_t key_columns;                 // columns of these: the keys, padded

  INPAINT_HOST_DEVICE int64_t queries() const { return height * width; }
  INPAINT_HOST_DEVICE int64_t cells() const { return cell_height * cell_width; }
  INPAINT_HOST_DEVICE int64_t keys() const { return key_height * key_width; }
  INPAINT_HOST_DEVICE int64_t key_cells() const { return key_cell_height * key_cell_width; }
  // Columns of logits, factors and offsets: key (v, u) is column v * key_cell_width + u.
  INPAINT_HOST_DEVICE int64_t logit_columns() const { return key_height * key_cell_width; }
  INPAINT_HOST_DEVICE int before() const { return static_cast<int>((patch - 1) / 2); }
  INPAINT_HOST_DEVICE int after() const { return static_cast<int>(patch - 1) - before(); }
  // Row of query (y, x) in the tile's matrices; -1 if it is not in the tile.
  INPAINT_HOST_DEVICE int64_t row(int64_t y, int64_t x) const {
    const int64_t i = y - top, j = x - left;
    return i >= 0 && i < height && j >= 0 && j < width ? i * width + j : -1;
  }
};

// Blocks of a tile's samples: the host never asks for more of them than a grid holds.
inline unsigned grid_z(const AttentionTile& tile) {
  STD_TORCH_CHECK(tile.samples <= 65535, "a tile has at most 65535 samples, got ", tile.samples);
  return static_cast<unsigned>(tile.samples);
}

// ---- Probabilities -----------------------------------------------------------------------------------------------

// What happens to probabilities after the softmax.
template <class T>
struct Masking {
  const T* keep;  // [samples, logit columns], 0 where a probability becomes 0; null: 1
  T floor;        // smallest probability; negative: none

  INPAINT_HOST_DEVICE Masking of_sample(const AttentionTile& tile, int64_t sample) const {
    return {keep == nullptr ? nullptr : keep + sample * tile.logit_columns(), floor};
  }
};

template <class T>
__device__ __forceinline__ T softmax(T logit, T maximum, T inverse_sum) {
  return exp_of_difference(logit, maximum) * inverse_sum;  // 0 where no logit is finite: maximum and inverse_sum are
}

template <class T>
__device__ __forceinline__ T at_least(T p, T floor) {
  return floor >= T(0) && p < floor ? floor : p;
}

// ---- Pairs of a query position and a key ---------------------------------------------------------------------------

// A matrix of type V of pairs of a query position, which may have no row, and a key; sums are of type T.
template <class T, class V = T>
struct Pairs {
  const V* __restrict__ values;        // [rows, columns]
  const int32_t* __restrict__ row_of;  // [queries]
  int64_t columns;

  __device__ T operator()(int64_t p, int64_t q) const {
    const int32_t row = row_of[p];
    return row < 0 ? T(0) : static_cast<T>(values[row * columns + q]);
  }
};

// A position of a grid by its coordinates, so that the fuse's steps (row_neighbour, column_neighbour) need no division:
// 64 bits have none in hardware, and at the borders every score takes dozens of steps.
struct GridPosition {
  int y, x;

  // `step` further in column-major order, on past the end of a column into the next one; false past the grid's ends.
  INPAINT_HOST_DEVICE bool step_down(int step, int64_t height, int64_t width) {
    for (y += step; y < 0; --x) y += static_cast<int>(height);
    for (; y >= height; ++x) y -= static_cast<int>(height);
    return x >= 0 && x < width;
  }
  // The same in row-major order.
  INPAINT_HOST_DEVICE bool step_right(int step, int64_t height, int64_t width) {
    for (x += step; x < 0; --y) x += static_cast<int>(width);
    for (; x >= width; ++y) x -= static_cast<int>(width);
    return y >= 0 && y < height;
  }
};

// The sum of value(p', q') over the patches around p and q, offsets [first, last] per axis; zero outside the maps.
// [-before, after] gives S0(p, q) without its norm, [-after, before] its adjoint.
template <class T, class Value>
__device__ T patch_score(const AttentionTile& tile, const GridPosition& p, const GridPosition& q, int first, int last,
                         const Value& value) {
  T sum = 0;
  for (int dy = first; dy <= last; ++dy) {
    if (p.y + dy < 0 || p.y + dy >= tile.query_height || q.y + dy < 0 || q.y + dy >= tile.key_height) continue;
    for (int dx = first; dx <= last; ++dx) {
      if (p.x + dx < 0 || p.x + dx >= tile.query_width || q.x + dx < 0 || q.x + dx >= tile.key_width) continue;
      sum += value((p.y + dy) * tile.query_width + p.x + dx, (q.y + dy) * tile.key_width + q.x + dx);
    }
  }
  return sum;
}

// Key f = v * key_width + u of a thread that walks; f may be negative or past the last key.
struct KeyCursor {
  int f, v, u;

  __device__ KeyCursor(const AttentionTile& tile, int64_t key) : f(static_cast<int>(key)) {
    const int width = static_cast<int>(tile.key_width);
    v = f >= 0 ? f / width : -((width - 1 - f) / width);
    u = f - v * width;
  }
  __device__ void advance(const AttentionTile& tile) {
    ++f;
    if (++u == static_cast<int>(tile.key_width)) u = 0, ++v;
  }
};

// Calls visit(p', q') for every pair whose patch score the fused score of (p, q) sums: steps along columns, then along
// rows, both running on past line ends.
template <class Visit>
__device__ void for_each_fused_pair(const AttentionTile& tile, const GridPosition& p, const GridPosition& q,
                                    const Visit& visit) {
  const int half = static_cast<int>(tile.half);
  for (int e = -half; e <= half; ++e) {
    GridPosition p_column = p, q_column = q;
    const bool exists = p_column.step_down(e, tile.query_height, tile.query_width);
    if (!q_column.step_down(e, tile.key_height, tile.key_width) || !exists) continue;
    for (int d = -half; d <= half; ++d) {
      GridPosition p_row = p_column, q_row = q_column;
      const bool row_exists = p_row.step_right(d, tile.query_height, tile.query_width);
      if (q_row.step_right(d, tile.key_height, tile.key_width) && row_exists) visit(p_row, q_row);
    }
  }
}

}  // namespace
}  // namespace inpaint
