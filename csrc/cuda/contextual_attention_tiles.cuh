// What the forward and the backward CUDA kernels of contextual_attention share: the geometry of a tile of queries, and
// the neighbours along which scores are summed.
//
// A tile is a rectangle of queries with all keys. Its pixel correlations G [pixels, keys] come from a matrix product;
// inpaint_kernels/cuda_kernels/contextual_attention.py cuts the tiles and calls the products.
#pragma once

#include "../common.h"
#include "../math/contextual_attention.h"

namespace inpaint {
namespace {

// A tile as the host hands it over: int64 values in this order.
struct AttentionTile {
  int64_t query_height, query_width, key_height, key_width;
  int64_t patch, half;                                   // side of the patches, reach of the fuse (0: none)
  int64_t top, left, height, width;                      // queries of the tile
  int64_t cell_top, cell_left, cell_height, cell_width;  // output cells of the tile
  int64_t reach_y, reach_x;  // steps that a pasted patch spans, for the pixels that are pasted
  int64_t key_cell_height, key_cell_width;

  INPAINT_HOST_DEVICE int64_t queries() const { return height * width; }
  INPAINT_HOST_DEVICE int64_t cells() const { return cell_height * cell_width; }
  INPAINT_HOST_DEVICE int64_t keys() const { return key_height * key_width; }
  INPAINT_HOST_DEVICE int64_t key_cells() const { return key_cell_height * key_cell_width; }
  INPAINT_HOST_DEVICE int before() const { return static_cast<int>((patch - 1) / 2); }
  INPAINT_HOST_DEVICE int after() const { return static_cast<int>(patch - 1) - before(); }
  // Row of query (y, x) in the tile's matrices; -1 if it is not in the tile.
  INPAINT_HOST_DEVICE int64_t row(int64_t y, int64_t x) const {
    const int64_t i = y - top, j = x - left;
    return i >= 0 && i < height && j >= 0 && j < width ? i * width + j : -1;
  }
};

constexpr int kWarp = 32;

// Blocks in y for a loop that strides by them.
inline unsigned grid_y(int64_t count) {
  constexpr int64_t kMostBlocks = 65535;
  return static_cast<unsigned>(count < kMostBlocks ? count : kMostBlocks);
}

// What happens to probabilities after the softmax.
template <class T>
struct Masking {
  const T* keep;  // [keys], 0 where a probability becomes 0; null: 1
  T floor;        // smallest probability; negative: none
};

template <class T>
__device__ __forceinline__ T probability(T logit, T maximum, T inverse_sum, const Masking<T>& masking, int64_t q) {
  T p = inverse_sum == T(0) ? T(0) : exp(logit - maximum) * inverse_sum;
  if (masking.keep != nullptr) p *= masking.keep[q];
  return masking.floor >= T(0) && p < masking.floor ? masking.floor : p;
}

// A matrix of pairs of a query position, which may have no row, and a key.
template <class T>
struct Correlations {
  const T* __restrict__ values;        // [pixels, keys]
  const int32_t* __restrict__ row_of;  // [queries]
  int64_t keys;

  __device__ T operator()(int64_t p, int64_t q) const {
    const int32_t row = row_of[p];
    return row < 0 ? T(0) : values[row * keys + q];
  }
};

// S0(p, q) without its norm: the sum of correlations over the patches around p and q, zero outside the maps.
// `value(p, q)` gives the correlation of two positions.
template <class T, class Value>
__device__ T patch_score(const AttentionTile& tile, int64_t p, int64_t q, const Value& value) {
  const int64_t y = p / tile.query_width, x = p % tile.query_width;
  const int64_t v = q / tile.key_width, u = q % tile.key_width;
  T sum = 0;
  for (int dy = -tile.before(); dy <= tile.after(); ++dy) {
    if (y + dy < 0 || y + dy >= tile.query_height || v + dy < 0 || v + dy >= tile.key_height) continue;
    for (int dx = -tile.before(); dx <= tile.after(); ++dx) {
      if (x + dx < 0 || x + dx >= tile.query_width || u + dx < 0 || u + dx >= tile.key_width) continue;
      sum += value(p + dy * tile.query_width + dx, q + dy * tile.key_width + dx);
    }
  }
  return sum;
}

// Calls visit(p', q') for every pair whose patch score the fused score of (p, q) sums: a step along columns, then one
// along rows, both running on past line ends.
template <class Visit>
__device__ void for_each_fused_pair(const AttentionTile& tile, int64_t p, int64_t q, const Visit& visit) {
  const int half = static_cast<int>(tile.half);
  for (int e = -half; e <= half; ++e) {
    const int64_t p_column = column_neighbour(p, e, tile.query_height, tile.query_width);
    const int64_t q_column = column_neighbour(q, e, tile.key_height, tile.key_width);
    if (p_column < 0 || q_column < 0) continue;
    for (int d = -half; d <= half; ++d) {
      const int64_t p_row = row_neighbour(p_column, d, tile.query_height * tile.query_width);
      const int64_t q_row = row_neighbour(q_column, d, tile.keys());
      if (p_row >= 0 && q_row >= 0) visit(p_row, q_row);
    }
  }
}

// The adjoint: calls visit(p', q') for every pair whose fused score sums the patch score of (p, q).
template <class Visit>
__device__ void for_each_fusing_pair(const AttentionTile& tile, int64_t p, int64_t q, const Visit& visit) {
  const int half = static_cast<int>(tile.half);
  for (int d = -half; d <= half; ++d) {
    const int64_t p_row = row_neighbour(p, d, tile.query_height * tile.query_width);
    const int64_t q_row = row_neighbour(q, d, tile.keys());
    if (p_row < 0 || q_row < 0) continue;
    for (int e = -half; e <= half; ++e) {
      const int64_t p_column = column_neighbour(p_row, e, tile.query_height, tile.query_width);
      const int64_t q_column = column_neighbour(q_row, e, tile.key_height, tile.key_width);
      if (p_column >= 0 && q_column >= 0) visit(p_column, q_column);
    }
  }
}

}  // namespace
}  // namespace inpaint
