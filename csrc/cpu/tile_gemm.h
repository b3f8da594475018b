// A register-tiled matrix product with a fixed order over the inner index: bit-identical for any number of threads, and
// able to skip inner indices whose whole column of A is zero (a saturated softmax has few others).
//
//   C[12 x kTileColumns] (+)= A[12 x inner] * B[inner x kTileColumns]
//
// A is a row-major tile of kTileInner columns, B a panel of consecutive rows of kTileColumns. 12 x 2 vectors of 64
// bytes fill 24 of AVX-512's 32 registers; measured on a busy Zen 4 core: 84 to 88 GFLOP/s, and
// 72 with unaligned loads that the compiler splits; torch's own GEMMs reach 72 to 105 on an idle one.
#pragma once

#include "simd.h"

namespace inpaint {

constexpr int kTileRows = 12;
constexpr int kTileInner = 256;
constexpr int kTileStride = kTileInner + 16;  // not a multiple of the 4 KiB that would put all rows in one cache set
template <class T>
constexpr int kTileColumns = 128 / sizeof(T);

template <class T>
constexpr int64_t kTileSize = int64_t{kTileRows} * kTileStride;

// Element (r, k) of A: a tile keeps it at a[r * kTileStride + k], a transposed one at a[k * stride + r].
template <class T, bool transposed>
INPAINT_INLINE T element(const T* a, int64_t r, int64_t k, int64_t stride) {
  return transposed ? a[k * stride + r] : a[r * kTileStride + k];
}

template <class T, int rows, int bytes, int vectors, bool transposed, bool accumulate>
INPAINT_INLINE void multiply_block(const T* a, int64_t a_stride, const T* b, const int32_t* inner, int count, T* c,
                                   int64_t c_stride) {
  typedef typename VectorOf<T, bytes>::type V;
  constexpr int lanes = bytes / sizeof(T);
  V sum[rows][vectors] = {};
  for (int t = 0; t < count; ++t) {
    const int64_t k = inner[t];
    V b_row[vectors];
    for (int j = 0; j < vectors; ++j) b_row[j] = load<V>(b + k * kTileColumns<T> + j * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const V broadcast = element<T, transposed>(a, r, k, a_stride) - V{};
      for (int j = 0; j < vectors; ++j) sum[r][j] += broadcast * b_row[j];
    }
  }
  // C is added last: a sum of short sums loses less than one that grows term by term (4e-5 of the result after 62,500
  // terms, and a tenth of that in this order).
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < vectors; ++j) {
      T* to = c + r * c_stride + j * lanes;
      store(to, accumulate ? load<V>(to) + sum[r][j] : sum[r][j]);
    }
  }
}

template <class T, int rows, int bytes, bool transposed, bool accumulate>
INPAINT_INLINE void multiply_in_blocks(const T* a, int64_t a_stride, const T* b, const int32_t* inner, int count, T* c,
                                       int64_t c_stride) {
  constexpr int columns = 2 * bytes / sizeof(T);
  for (int r = 0; r < kTileRows; r += rows)
    for (int j = 0; j < kTileColumns<T>; j += columns)
      multiply_block<T, rows, bytes, 2, transposed, accumulate>(a + r * (transposed ? 1 : kTileStride), a_stride, b + j,
                                                                inner, count, c + r * c_stride + j, c_stride);
}

// multiply_tile(a, b, inner, count, c, c_stride, accumulate): C (+)= A B over the inner indices listed.
// multiply_transposed_tile(a, a_stride, b, ...): the same with A stored as [inner][a_stride].
// One version per register file: 12 x 2 vectors of 64 bytes in 32 registers, 6 x 2 of 32 or 16 bytes in 16.
#define INPAINT_MULTIPLY_TILE(T, attributes, rows, bytes)                                                         \
  attributes inline void multiply_tile(const T* a, const T* b, const int32_t* inner, int count, T* c,             \
                                       int64_t c_stride, bool accumulate) {                                       \
    if (accumulate)                                                                                               \
      multiply_in_blocks<T, rows, bytes, false, true>(a, 0, b, inner, count, c, c_stride);                        \
    else                                                                                                          \
      multiply_in_blocks<T, rows, bytes, false, false>(a, 0, b, inner, count, c, c_stride);                       \
  }                                                                                                               \
  attributes inline void multiply_transposed_tile(const T* a, int64_t a_stride, const T* b, const int32_t* inner, \
                                                  int count, T* c, int64_t c_stride) {                            \
    multiply_in_blocks<T, rows, bytes, true, false>(a, a_stride, b, inner, count, c, c_stride);                   \
  }

#ifdef INPAINT_X86_VERSIONS
#define INPAINT_MULTIPLY_TILE_VERSIONS(T)                                     \
  INPAINT_MULTIPLY_TILE(T, __attribute__((target("arch=x86-64-v4"))), 12, 64) \
  INPAINT_MULTIPLY_TILE(T, __attribute__((target("arch=x86-64-v3"))), 6, 32)  \
  INPAINT_MULTIPLY_TILE(T, __attribute__((target("default"))), 6, 16)
#else
#define INPAINT_MULTIPLY_TILE_VERSIONS(T) INPAINT_MULTIPLY_TILE(T, , 6, 16)
#endif
INPAINT_MULTIPLY_TILE_VERSIONS(float)
INPAINT_MULTIPLY_TILE_VERSIONS(double)

// The inner indices [0, count) of a tile in which any row is not zero, ascending; returns their number.
template <class T>
INPAINT_INLINE int nonzero_columns_body(const T* a, int count, int32_t* inner) {
  typedef typename VectorOf<LaneInt<T>>::type IntVector;
  int found = 0;
  for (int k = 0; k < count; k += kLanes<T>) {  // reads into the tile's padding at the end
    IntVector any = {};
    for (int r = 0; r < kTileRows; ++r) any |= load<Vector<T>>(a + r * kTileStride + k) != Vector<T>{};
    LaneInt<T> lanes[kLanes<T>];
    store(lanes, any);
    for (int lane = 0; lane < kLanes<T> && k + lane < count; ++lane) {
      inner[found] = k + lane;
      found += lanes[lane] != 0;
    }
  }
  return found;
}

INPAINT_CLONES inline int nonzero_columns(const float* a, int count, int32_t* inner) {
  return nonzero_columns_body(a, count, inner);
}
INPAINT_CLONES inline int nonzero_columns(const double* a, int count, int32_t* inner) {
  return nonzero_columns_body(a, count, inner);
}

}  // namespace inpaint
