// The inner loops of the gradient of a convolution's weight: pixels packed into rows of channels, the operands of the
// matrix products made from them, and the products. All are inlined into one function per instruction set
// (convolution_weight_gradient.cpp).
#pragma once

#include "convolution_kernels.h"

namespace inpaint {

// ---- Packing -----------------------------------------------------------------------------------------------------

// Consecutive pixels of one row of a map, and some of its channels.
struct PixelBlock {
  int64_t b, row, first, count;  // row -1: zeros
  int64_t channel, channels;
};

// from[channel][plane] -> to[pixel][stride] of up to 8 channels and 8 pixels.
template <class T>
INPAINT_INLINE void transpose_pixels(const T* from, int64_t plane, int64_t channels, int64_t pixels, T* to,
                                     int64_t stride) {
  Chunk<T> square[kChunk];
  if (pixels == kChunk) {
#pragma GCC unroll 8
    for (int j = 0; j < kChunk; ++j) square[j] = j < channels ? load_chunk<T>(from + j * plane) : Chunk<T>{};
    transpose(square);
#pragma GCC unroll 8
    for (int j = 0; j < kChunk; ++j) store_chunk<T>(to + j * stride, square[j]);
    return;
  }
  for (int j = 0; j < kChunk; ++j) square[j] = j < channels ? load_channels<T>(from + j * plane, pixels) : Chunk<T>{};
  transpose(square);
  for (int64_t j = 0; j < pixels; ++j) store_chunk<T>(to + j * stride, square[j]);
}

// to[pixel][stride], zeros behind the channels; a pixel of zeros follows the last one.
template <class T>
INPAINT_INLINE void pack_pixels(const Map<const T>& map, const PixelBlock& block, T* to, int64_t stride) {
  if (block.row < 0) {
    std::fill_n(to, (block.count + 1) * stride, T{});
    return;
  }
  std::fill_n(to + block.count * stride, stride, T{});
  const int64_t pixel = block.row * map.width + block.first;
  if (map.channels_last) {
    const T* from = map.sample(block.b) + pixel * map.channels + block.channel;
    for (int64_t p = 0; p < block.count; ++p, from += map.channels)
      for (int64_t c = 0; c < stride; c += kChunk)
        store_chunk<T>(to + p * stride + c, load_channels<T>(from + c, block.channels - c));
    return;
  }
  const T* from = map.sample(block.b) + block.channel * map.plane() + pixel;
  for (int64_t c = 0; c < stride; c += kChunk, from += kChunk * map.plane()) {
    const int64_t planes = std::min<int64_t>(kChunk, block.channels - c);
    for (int64_t p = 0; p < block.count; p += kChunk)
      transpose_pixels(from + p, map.plane(), planes, std::min<int64_t>(kChunk, block.count - p), to + p * stride + c,
                       stride);
  }
}

// ---- Winograd's transforms of F(2 x 2, 3 x 3), the other way round -------------------------------------------------
// Of y = A^T [(G g G^T) * (B^T d B)] A the derivative by g is G^T [(A dy A^T) * (B^T d B)] G, one line of which are:

template <class V>
INPAINT_INLINE void transform_gradient_line(const V (&g)[2], V (&to)[4]) {  // A
  to[0] = g[0];
  to[1] = g[0] + g[1];
  to[2] = g[0] - g[1];
  to[3] = -g[1];
}

template <class V>
INPAINT_INLINE void transform_product_line(const V (&m)[4], V (&to)[3]) {  // G^T
  const V even = (m[1] + m[2]) / 2;
  to[0] = m[0] + even;
  to[1] = (m[1] - m[2]) / 2;
  to[2] = even + m[3];
}

// ---- Operands ----------------------------------------------------------------------------------------------------

// Two rows of packed pixels, of which row a + sign * row b is meant.
template <class T>
struct RowPair {
  const T *a, *b;
  T sign;
};

// Rows of an operand: to[product][position][stride].
template <class T>
struct Operand {
  T* data;
  int64_t plane, stride;  // of a product, of a position
};

// For every position, the pixels at[position][taps] side by side, each `channels` wide.
template <class T>
INPAINT_INLINE void gather_pixels(const T* row, int64_t pixel, const int32_t* at, int64_t count, int64_t taps,
                                  int64_t channels, const Operand<T>& to) {
  for (int64_t p = 0; p < count; ++p) {
    T* out = to.data + p * to.stride;
    // What a chunk has beyond the channels is zero, and overwritten by the next pixel.
    for (int64_t j = 0; j < taps; ++j, out += channels) {
      const T* from = row + at[p * taps + j] * pixel;
      for (int64_t c = 0; c < channels; c += kChunk) store_chunk<T>(out + c, load_chunk<T>(from + c));
    }
  }
}

// One row of Winograd's transforms for F(2 x 2, 3 x 3), four products. B^T d B of the inputs at[position][4]...
template <class T>
INPAINT_INLINE void transform_inputs(const RowPair<T>& rows, int64_t pixel, const int32_t* at, int64_t count,
                                     const Operand<T>& to) {
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t c = 0; c < pixel; c += kChunk) {
      Chunk<T> line[4], across[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int64_t from = at[4 * p + j] * pixel + c;
        line[j] = load_chunk<T>(rows.a + from) + rows.sign * load_chunk<T>(rows.b + from);
      }
      WinogradLine<2>::input(line, across);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store_chunk<T>(to.data + j * to.plane + p * to.stride + c, across[j]);
    }
  }
}

// ... and A g A^T of the gradients at[position][2].
template <class T>
INPAINT_INLINE void transform_gradients(const RowPair<T>& rows, int64_t pixel, const int32_t* at, int64_t count,
                                        const Operand<T>& to) {
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t c = 0; c < pixel; c += kChunk) {
      Chunk<T> line[2], across[4];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int64_t from = at[2 * p + j] * pixel + c;
        line[j] = load_chunk<T>(rows.a + from) + rows.sign * load_chunk<T>(rows.b + from);
      }
      transform_gradient_line(line, across);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store_chunk<T>(to.data + j * to.plane + p * to.stride + c, across[j]);
    }
  }
}

// ---- Products ----------------------------------------------------------------------------------------------------

// sums[row][column] += sum over the positions of a[position][row] * b[position][column], for `rows` x `vectors` in
// registers. The short sum is added to the long one as a whole, which loses less than term by term.
template <class T, int rows, int bytes, int vectors>
INPAINT_INLINE void add_products(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t positions, T* sums,
                                 int64_t stride) {
  typedef typename VectorOf<T, bytes>::type V;
  constexpr int lanes = bytes / sizeof(T);
  V sum[rows][vectors] = {};
  for (int64_t p = 0; p < positions; ++p, a += a_stride, b += b_stride) {
    V columns[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) columns[j] = load<V>(b + j * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const V value = broadcast<V, T>(a + r);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[r][j] += value * columns[j];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      T* to = sums + r * stride + j * lanes;
      store(to, load<V>(to) + sum[r][j]);
    }
  }
}

// The operands of one product, and how many of their rows there are.
template <class T>
struct Product {
  const T *a, *b;
  int64_t a_stride, b_stride, positions;
};

// All rows of some columns: `most` at a time, the last ones fewer.
template <class T, int most, int bytes, int vectors>
INPAINT_INLINE void add_rows(const Product<T>& product, int64_t column, int64_t rows, T* sums, int64_t stride) {
  int64_t r = 0;
  for (; r + most <= rows; r += most)
    add_products<T, most, bytes, vectors>(product.a + r, product.a_stride, product.b + column, product.b_stride,
                                          product.positions, sums + r * stride + column, stride);
  if constexpr (most > 1)
    if (r < rows)
      add_rows<T, most / 2, bytes, vectors>(
          {product.a + r, product.b, product.a_stride, product.b_stride, product.positions}, column, rows - r,
          sums + r * stride, stride);
}

// All of a product; `columns` is a multiple of kChunk. 3 vectors for each of `rows` fill the registers with the fewest
// loads; where 3 do not divide the columns, 2.
template <class T, int rows, int bytes>
INPAINT_INLINE void add_product(const Product<T>& product, int64_t count, int64_t columns, T* sums, int64_t stride) {
  constexpr int64_t lanes = bytes / sizeof(T);
  int64_t column = 0;
  if (columns % (3 * lanes) == 0)
    for (; column < columns; column += 3 * lanes) add_rows<T, rows, bytes, 3>(product, column, count, sums, stride);
  for (; column + 2 * lanes <= columns; column += 2 * lanes)
    add_rows<T, rows * 3 / 2, bytes, 2>(product, column, count, sums, stride);
  for (; column + lanes <= columns; column += lanes)
    add_rows<T, rows * 2, bytes, 1>(product, column, count, sums, stride);
  for (; column < columns; column += lanes / 2)
    add_rows<T, rows * 2, bytes / 2, 1>(product, column, count, sums, stride);
}

// sums[column] += the sum of b over the positions.
template <class T>
INPAINT_INLINE void add_columns(const T* b, int64_t b_stride, int64_t positions, int64_t columns, T* sums) {
  for (int64_t c = 0; c < columns; c += kChunk) {
    Chunk<T> sum = {};
    for (int64_t p = 0; p < positions; ++p) sum += load_chunk<T>(b + p * b_stride + c);
    store_chunk<T>(sums + c, load_chunk<T>(sums + c) + sum);
  }
}

}  // namespace inpaint
