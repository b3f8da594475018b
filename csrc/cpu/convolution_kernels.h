// The inner loops of the CPU convolution. All are inlined into one function per instruction set (convolution.cpp).
#pragma once

#include "convolution.h"
#include "simd.h"

namespace inpaint {

// Positions (pixels, or Winograd's tiles) whose sums are in registers together.
constexpr int kPositions = 8;
// Columns of a panel of weights: up to three vectors of 64 bytes for each of 8 positions, 24 of AVX-512's 32 registers
// (measured with 864 inner indices: 116 GFLOP/s, all that a Zen 4 core has; 12 x 2 and 6 x 4 vectors do the same).
constexpr int kWidestPanel = 48;

// ---- Channels ----------------------------------------------------------------------------------------------------

// The first `count` channels, zeros in the rest.
template <class T, class Element>
INPAINT_INLINE Chunk<T> load_channels(const Element* from, int64_t count) {
  if (count >= kChunk) return load_chunk<T>(from);
  Element lanes[kChunk] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load_chunk<T>(lanes);
}

template <class T, class Element>
INPAINT_INLINE void store_channels(Element* to, Chunk<T> v, int64_t count) {
  if (count >= kChunk) return store_chunk<T>(to, v);
  Element lanes[kChunk];
  store_chunk<T>(lanes, v);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// Rows to columns.
template <class V>
INPAINT_INLINE void transpose(V (&rows)[kChunk]) {
  V pairs[kChunk], quads[kChunk];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = __builtin_shufflevector(rows[2 * i], rows[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    pairs[2 * i + 1] = __builtin_shufflevector(rows[2 * i], rows[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      quads[i + j] = __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      quads[i + j + 2] = __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = __builtin_shufflevector(quads[i], quads[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = __builtin_shufflevector(quads[i], quads[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// ---- Packing -----------------------------------------------------------------------------------------------------

// The pixels `columns` of an input row (-1: a zero), NHWC in memory, to to[i * stride + channel]; what lies between the
// channels and the stride is 0.
template <class T, class Element, class Packed>
INPAINT_INLINE void pack_channels_last(const Element* from, int64_t channels, const int32_t* columns, int64_t count,
                                       Packed* to, int64_t stride) {
  for (int64_t i = 0; i < count;) {
    Packed* packed = to + i * stride;
    if (columns[i] < 0) {
      std::fill_n(packed, stride, Packed{});
      ++i;
      continue;
    }
    // Consecutive pixels without anything between them are one piece.
    int64_t pixels = 1;
    while (stride == channels && i + pixels < count && columns[i + pixels] == columns[i] + pixels) ++pixels;
    const Element* pixel = from + columns[i] * channels;
    const int64_t length = pixels * channels;
    int64_t k = 0;
    for (; k + kChunk <= length; k += kChunk) copy_chunk<T>(packed + k, pixel + k);
    for (; k < length; ++k) store_one<T>(packed + k, load_one<T>(pixel + k));
    for (; k < pixels * stride; ++k) packed[k] = Packed{};
    i += pixels;
  }
}

// The same from NCHW: 8 channels of 8 pixels at a time.
template <class T, class Element, class Packed>
INPAINT_INLINE void pack_planes(const Element* from, int64_t plane, int64_t channels, const int32_t* columns,
                                int64_t count, Packed* to, int64_t stride) {
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t pixels = std::min<int64_t>(kChunk, count - i);
    const bool neighbours = pixels == kChunk && columns[i] >= 0 && columns[i + kChunk - 1] == columns[i] + kChunk - 1 &&
                            columns[i + 1] == columns[i] + 1;
    for (int64_t c = 0; c < stride; c += kChunk) {
      Chunk<T> rows[kChunk] = {};
      for (int64_t j = 0; j < std::min<int64_t>(kChunk, channels - c); ++j) {
        const Element* channel = from + (c + j) * plane;
        if (neighbours) {
          rows[j] = load_chunk<T>(channel + columns[i]);
          continue;
        }
        Element lanes[kChunk] = {};
        for (int64_t p = 0; p < pixels; ++p)
          if (columns[i + p] >= 0) lanes[p] = channel[columns[i + p]];
        rows[j] = load_chunk<T>(lanes);
      }
      transpose(rows);
      for (int64_t p = 0; p < pixels; ++p) store_channels<T>(to + (i + p) * stride + c, rows[p], stride - c);
    }
  }
}

// Multiplies the packed pixels with the masks of their channels.
template <class T, class Element, class Packed>
INPAINT_INLINE void mask_row(const ChannelMasks<Element>& masks, const Element* own, int64_t plane,
                             const int32_t* columns, int64_t count, Packed* packed, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    Packed* pixel = packed + i * stride;
    for (int64_t m = 0; columns[i] >= 0 && m < masks.count; pixel += masks.segments[m++]) {
      const T known = load_one<T>(own + m * plane + columns[i]);
      for (int64_t c = 0; known != T(1) && c < masks.segments[m]; ++c)
        store_one<T>(pixel + c, load_one<T>(pixel + c) * known);
    }
  }
}

// The pixels `columns` of row `row` of sample b (-1: zeros), masked.
template <class T, class Element, class Packed>
INPAINT_INLINE void pack_row(const Convolution<T, Element>& convolution, int64_t b, int64_t row, const int32_t* columns,
                             int64_t count, Packed* to, int64_t stride) {
  const Map<const Element>& input = convolution.input;
  if (row < 0) {
    std::fill_n(to, count * stride, Packed{});
    return;
  }
  if (input.channels_last)
    pack_channels_last<T>(input.sample(b) + row * input.width * input.channels, input.channels, columns, count, to,
                          stride);
  else
    pack_planes<T>(input.sample(b) + row * input.width, input.plane(), input.channels, columns, count, to, stride);
  const ChannelMasks<Element>& masks = convolution.masks;
  if (masks.data != nullptr)
    mask_row<T>(masks, masks.data + b * masks.batch_stride + row * input.width, input.plane(), columns, count, to,
                stride);
}

// ---- Products ----------------------------------------------------------------------------------------------------

#ifdef INPAINT_X86_VERSIONS
#define INPAINT_ADD_PAIRS(sum, value, weights) asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(value), "v"(weights))
#else
#define INPAINT_ADD_PAIRS(sum, value, weights) static_assert(depth == 1, "no such instruction here")
#endif

// How inputs and weights are packed, and multiplied: one at a time in the type of the sums...
template <class T>
struct SingleProducts {
  typedef T Sum;
  typedef T Packed;
  static constexpr int kDepth = 1;
};

// ... or pairs of bfloat16, both summed in float by one instruction (AVX512_BF16: twice the rate).
struct PairProducts {
  typedef float Sum;
  typedef BFloatBits Packed;
  static constexpr int kDepth = 2;
};

// The bits of one float, double or pair of bfloat16 in every lane. (As a float, GCC would build the vector lane by lane
// here, at a fifth of the speed.)
template <class V, class T, class Packed>
INPAINT_INLINE V broadcast(const Packed* from) {
  typedef LaneInt<T> Words __attribute__((vector_size(sizeof(V))));
  const LaneInt<T> bits = load<LaneInt<T>>(from);
  return (V)(bits - Words{});
}

// Consecutive inputs of one output position, and the rows of weights that multiply them: `kDepth` inner indices are one
// row, [column][index].
template <class Packed>
struct Run {
  const Packed* inputs;
  const Packed* weights;
};

// Runs of `length` inputs for positions that are `stride` apart.
template <class Packed>
struct Runs {
  const Run<Packed>* runs;
  int64_t count, length, stride;
};

// Columns of a panel of weights, and how they lie: blocks of so many, `block_size` apart, which are read from one end
// to the other.
struct PanelLayout {
  int64_t columns, block, block_size;

  template <class Products>
  int64_t offset(int64_t column) const {
    return column / block * block_size + column % block * Products::kDepth;
  }
};

// sums[position][panel.columns] = start[panel.columns] + the products of all runs (with `accumulate`, all that is
// added), for `positions` x `vectors` in registers: those `offset` inputs and `weight` weights on.
template <class Products, int positions, int bytes, int vectors, bool accumulate>
INPAINT_INLINE void multiply_registers(const Runs<typename Products::Packed>& runs, int64_t offset, int64_t weight,
                                       const PanelLayout& panel, const typename Products::Sum* start,
                                       typename Products::Sum* sums) {
  typedef typename Products::Sum T;
  typedef typename Products::Packed Packed;
  typedef typename VectorOf<T, bytes>::type V;
  constexpr int lanes = bytes / sizeof(T), depth = Products::kDepth;
  V sum[positions][vectors];
#pragma GCC unroll 8
  for (int p = 0; p < positions; ++p)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[p][j] = load<V>(start + j * lanes);
  const int64_t length = runs.length, stride = runs.stride, step = panel.block * depth;
  for (int64_t r = 0; r < runs.count; ++r) {
    const Packed* inputs = runs.runs[r].inputs + offset;
    const Packed* weights = runs.runs[r].weights + weight;
    for (int64_t k = 0; k < length; k += depth, weights += step) {
      V row[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) row[j] = load<V>(weights + j * lanes * depth);
#pragma GCC unroll 8
      for (int p = 0; p < positions; ++p) {
        const V value = broadcast<V, T>(inputs + p * stride + k);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) {
          if constexpr (depth == 1) {
            sum[p][j] += value * row[j];
          } else {
            // Not the intrinsic: that is inlined only into functions that are themselves compiled for AVX512_BF16. And
            // not behind a reference: the sums would then live in memory.
            V pairs = sum[p][j];
            INPAINT_ADD_PAIRS(pairs, value, row[j]);
            sum[p][j] = pairs;
          }
        }
      }
    }
  }
  for (int p = 0; p < positions; ++p) {
    for (int j = 0; j < vectors; ++j) {
      T* to = sums + p * panel.columns + j * lanes;
      store(to, accumulate ? load<V>(to) + sum[p][j] : sum[p][j]);
    }
  }
}

// The same for `count` positions x a whole panel: the columns that are in registers together are done for all positions
// before the next ones, so that their weights stay in cache.
template <class Products, int positions, int bytes, int vectors>
INPAINT_INLINE void multiply_panel(const Runs<typename Products::Packed>& runs, int64_t count, int64_t weight,
                                   const PanelLayout& panel, const typename Products::Sum* start,
                                   typename Products::Sum* sums, bool accumulate) {
  constexpr int columns = vectors * bytes / static_cast<int>(sizeof(*sums));
  // Two vectors for each of 4 positions, or one, would leave out part of what the latency of an addition allows.
  constexpr int together = positions == kPositions || vectors == 3 ? positions : vectors == 2 ? 6 : kPositions;
  for (int64_t n = 0; n < panel.columns; n += columns) {
    const int64_t weights = weight + panel.template offset<Products>(n);
    const auto multiply_positions = [&](auto some, int64_t p) INPAINT_INLINE_LAMBDA {
      typename Products::Sum* to = sums + p * panel.columns + n;
      if (accumulate)
        multiply_registers<Products, some.value, bytes, vectors, true>(runs, p * runs.stride, weights, panel, start + n,
                                                                       to);
      else
        multiply_registers<Products, some.value, bytes, vectors, false>(runs, p * runs.stride, weights, panel,
                                                                        start + n, to);
    };
    // Of a multiple of 8, sixes leave 0, 4 or 8.
    const int64_t fours = count % together == 2 ? 8 : count % together;
    int64_t p = 0;
    for (; p < count - fours; p += together) multiply_positions(std::integral_constant<int, together>{}, p);
    if constexpr (together == 6)
      for (; p < count; p += 4) multiply_positions(std::integral_constant<int, 4>{}, p);
  }
}

// The same for an instruction set with vectors of `bytes`; a panel has 48, 32, 16 or 8 columns, `count` is a multiple
// of kPositions.
template <class Products, int positions, int bytes>
INPAINT_INLINE void multiply(const Runs<typename Products::Packed>& runs, int64_t count, int64_t weight,
                             const PanelLayout& panel, const typename Products::Sum* start,
                             typename Products::Sum* sums, bool accumulate) {
  constexpr int lanes = bytes / static_cast<int>(sizeof(*sums));
  if (panel.columns % (3 * lanes) == 0)
    multiply_panel<Products, positions, bytes, 3>(runs, count, weight, panel, start, sums, accumulate);
  else if (panel.columns % (2 * lanes) == 0)
    multiply_panel<Products, positions, bytes, 2>(runs, count, weight, panel, start, sums, accumulate);
  else if (panel.columns % lanes == 0)
    multiply_panel<Products, positions, bytes, 1>(runs, count, weight, panel, start, sums, accumulate);
  else
    multiply_panel<Products, positions, bytes / 2, 1>(runs, count, weight, panel, start, sums, accumulate);
}

// ---- Winograd's F(m x m, 3 x 3) ----------------------------------------------------------------------------------
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016: m x m outputs of a 3 x 3 kernel from
// (m + 2) x (m + 2) inputs, with one product for each of these and not nine for each output.
//
// F(2 x 2) has a rounding error like the direct sum's. That of F(4 x 4) is larger, but in float it is far below what
// rounding the result to 16 bits costs.

// The transforms of one line. Rows are transformed, then columns.
template <int outputs>
struct WinogradLine;

template <>
struct WinogradLine<2> {
  template <class V>
  static INPAINT_INLINE void input(const V (&d)[4], V (&to)[4]) {
    to[0] = d[0] - d[2];
    to[1] = d[1] + d[2];
    to[2] = d[2] - d[1];
    to[3] = d[1] - d[3];
  }
  template <class V>
  static INPAINT_INLINE void kernel(const V (&g)[3], V (&to)[4]) {
    to[0] = g[0];
    to[1] = (g[0] + g[1] + g[2]) / 2;
    to[2] = (g[0] - g[1] + g[2]) / 2;
    to[3] = g[2];
  }
  template <class V>
  static INPAINT_INLINE void output(const V (&m)[4], V (&to)[2]) {
    to[0] = m[0] + m[1] + m[2];
    to[1] = m[1] - m[2] - m[3];
  }
};

template <>
struct WinogradLine<4> {
  template <class V>
  static INPAINT_INLINE void input(const V (&d)[6], V (&to)[6]) {
    const V even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1], near = d[4] - d[2], far = 2 * (d[3] - d[1]);
    to[0] = 4 * d[0] - 5 * d[2] + d[4];
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = near + far;
    to[4] = near - far;
    to[5] = 4 * d[1] - 5 * d[3] + d[5];
  }
  template <class V>
  static INPAINT_INLINE void kernel(const V (&g)[3], V (&to)[6]) {
    const V ends = g[0] + g[2], wide = (g[0] + 4 * g[2]) / 24, middle = g[1] / 12;
    to[0] = g[0] / 4;
    to[1] = (ends + g[1]) / -6;
    to[2] = (ends - g[1]) / -6;
    to[3] = wide + middle;
    to[4] = wide - middle;
    to[5] = g[2];
  }
  template <class V>
  static INPAINT_INLINE void output(const V (&m)[6], V (&to)[4]) {
    const V a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    to[0] = m[0] + a + c;
    to[1] = b + 2 * d;
    to[2] = a + 4 * c;
    to[3] = b + 8 * d + m[5];
  }
};

// B^T d B for `tiles` tiles next to each other in outputs + 2 rows of packed pixels: to[product * plane + tile *
// channels + channel]. Neighbours share two columns, which are transformed once.
template <class T, int outputs>
INPAINT_INLINE void transform_input(const T* const* rows, int64_t tiles, int64_t channels, T* to, int64_t plane) {
  constexpr int inputs = outputs + 2;
  for (int64_t c = 0; c < channels; c += kChunk) {
    Chunk<T> down[inputs][inputs];  // [column][row]
    const auto transform_column = [&](int64_t column, int j) INPAINT_INLINE_LAMBDA {
      Chunk<T> pixels[inputs];
#pragma GCC unroll 6
      for (int i = 0; i < inputs; ++i) pixels[i] = load_chunk<T>(rows[i] + column * channels + c);
      WinogradLine<outputs>::input(pixels, down[j]);
    };
    transform_column(0, outputs);
    transform_column(1, outputs + 1);
    for (int64_t tile = 0; tile < tiles; ++tile) {
#pragma GCC unroll 6
      for (int i = 0; i < inputs; ++i) {
        down[0][i] = down[outputs][i];
        down[1][i] = down[outputs + 1][i];
      }
#pragma GCC unroll 4
      for (int j = 2; j < inputs; ++j) transform_column(outputs * tile + j, j);
      T* out = to + tile * channels + c;
#pragma GCC unroll 6
      for (int i = 0; i < inputs; ++i) {
        Chunk<T> line[inputs], across[inputs];
#pragma GCC unroll 6
        for (int j = 0; j < inputs; ++j) line[j] = down[j][i];
        WinogradLine<outputs>::input(line, across);
#pragma GCC unroll 6
        for (int j = 0; j < inputs; ++j, out += plane) store_chunk<T>(out, across[j]);
      }
    }
  }
}

// A^T m A: products[product * plane + column] -> the outputs, rows `row_stride` and columns `panel` apart.
template <class T, int outputs>
INPAINT_INLINE void transform_output(const T* products, int64_t plane, int64_t panel, T* to, int64_t row_stride) {
  constexpr int inputs = outputs + 2;
  for (int64_t n = 0; n < panel; n += kChunk) {
    Chunk<T> down[inputs][outputs];  // [column][row]
#pragma GCC unroll 6
    for (int j = 0; j < inputs; ++j) {
      Chunk<T> column[inputs];
#pragma GCC unroll 6
      for (int i = 0; i < inputs; ++i) column[i] = load_chunk<T>(products + (i * inputs + j) * plane + n);
      WinogradLine<outputs>::output(column, down[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < outputs; ++i) {
      Chunk<T> line[inputs], across[outputs];
#pragma GCC unroll 6
      for (int j = 0; j < inputs; ++j) line[j] = down[j][i];
      WinogradLine<outputs>::output(line, across);
#pragma GCC unroll 4
      for (int j = 0; j < outputs; ++j) store_chunk<T>(to + i * row_stride + j * panel + n, across[j]);
    }
  }
}

// G g G^T of the 3 x 3 kernels of kChunk columns: kernels [9][kChunk] -> to [product][kChunk].
template <class T, int outputs>
INPAINT_INLINE void transform_kernels(const T* kernels, T* to) {
  constexpr int inputs = outputs + 2;
  Chunk<T> down[3][inputs];  // [column][row]
  for (int j = 0; j < 3; ++j) {
    const Chunk<T> column[3] = {load_chunk<T>(kernels + j * kChunk), load_chunk<T>(kernels + (3 + j) * kChunk),
                                load_chunk<T>(kernels + (6 + j) * kChunk)};
    WinogradLine<outputs>::kernel(column, down[j]);
  }
  for (int i = 0; i < inputs; ++i) {
    const Chunk<T> line[3] = {down[0][i], down[1][i], down[2][i]};
    Chunk<T> across[inputs];
    WinogradLine<outputs>::kernel(line, across);
    for (int j = 0; j < inputs; ++j, to += kChunk) store_chunk<T>(to, across[j]);
  }
}

// ---- Epilogue ----------------------------------------------------------------------------------------------------

// 2^n and e^r - 1 of x = n ln 2 + r, |r| <= ln(2) / 2: e^x = power + power * rest. Taken as the smallest normal number
// below it; NaN stays. The rest is r times a Taylor polynomial: relative error below 1e-7 (float) and 4e-16 (double).
template <class T>
struct Exponential {
  Chunk<T> power, rest;
};

template <class T>
INPAINT_INLINE Exponential<T> exponential(Chunk<T> x) {
  typedef ExponentSeries<T> E;
  x = x < kLowestExponent<T> ? Chunk<T>{} + kLowestExponent<T> : x;
  const Chunk<T> shifted = x * T(1.44269504088896340736) + E::kRoundToInt;
  const Chunk<T> n = shifted - E::kRoundToInt;
  const Chunk<T> r = (x - n * E::kLn2High) - n * E::kLn2Low;
  Chunk<T> series = Chunk<T>{} + E::kInverseFactorial[E::kDegree];
#pragma GCC unroll 16
  for (int i = E::kDegree - 1; i >= 1; --i) series = series * r + E::kInverseFactorial[i];
  const ChunkMask<T> one = (ChunkMask<T>)(Chunk<T>{} + T(1));
  return {(Chunk<T>)(((ChunkMask<T>)shifted << E::kMantissaBits) + one), series * r};
}

template <class T>
INPAINT_INLINE Chunk<T> sigmoid(Chunk<T> x) {
  const Exponential<T> e = exponential<T>(x < T(0) ? x : -x);
  const Chunk<T> small = e.power * e.rest + e.power;
  return (x < T(0) ? small : Chunk<T>{} + T(1)) / (T(1) + small);
}

// exp(x) - 1 for x <= 0, whose digits near 0 are those of the rest.
template <class T>
INPAINT_INLINE Chunk<T> expm1_nonpositive(Chunk<T> x) {
  const Exponential<T> e = exponential<T>(x);
  return e.power * e.rest + (e.power - T(1));
}

template <class T, ActivationKind kind>
INPAINT_INLINE Chunk<T> activate(Chunk<T> x, T slope) {
  if constexpr (kind == ActivationKind::relu) return x < T(0) ? Chunk<T>{} : x;
  if constexpr (kind == ActivationKind::elu) return x > T(0) ? x : expm1_nonpositive<T>(x);
  if constexpr (kind == ActivationKind::leaky_relu) return x < T(0) ? x * slope : x;
  return x;
}

// Pixels of one output row whose sums are finished: (y, x + i * x_step) for i < count.
struct Segment {
  int64_t b, y, x, x_step, count;
};

// Pixels that go through the epilogue together: their results stay in L1.
constexpr int kEpiloguePixels = 32;

// Writes channels [first, first + valid) of up to kEpiloguePixels pixels, values[pixel * width + channel - first].
template <class T, class Element>
INPAINT_INLINE void store_pixels(const Map<Element>& map, const Segment& segment, int64_t first, int64_t valid,
                                 const T* values, int64_t width) {
  if (map.channels_last) {
    Element* to = map.sample(segment.b) + (segment.y * map.width + segment.x) * map.channels + first;
    for (int64_t p = 0; p < segment.count; ++p, to += segment.x_step * map.channels)
      for (int64_t c = 0; c < valid; c += kChunk)
        store_channels<T>(to + c, load_chunk<T>(values + p * width + c), valid - c);
    return;
  }
  Element* to = map.sample(segment.b) + first * map.plane() + segment.y * map.width + segment.x;
  for (int64_t c = 0; c < valid; c += kChunk, to += kChunk * map.plane()) {
    for (int64_t p = 0; p < segment.count; p += kChunk) {
      const int64_t pixels = std::min<int64_t>(kChunk, segment.count - p);
      Chunk<T> block[kChunk] = {};
      for (int64_t i = 0; i < pixels; ++i) block[i] = load_chunk<T>(values + (p + i) * width + c);
      transpose(block);
      for (int64_t j = 0; j < std::min<int64_t>(kChunk, valid - c); ++j) {
        Element* row = to + j * map.plane() + p * segment.x_step;
        if (segment.x_step == 1) {
          store_channels<T>(row, block[j], pixels);
          continue;
        }
        Element converted[kChunk];
        store_chunk<T>(converted, block[j]);
        for (int64_t i = 0; i < pixels; ++i) row[i * segment.x_step] = converted[i];
      }
    }
  }
}

// Adds channels [first, first + valid) of a map laid out as `map` to values.
template <class T, class Element>
INPAINT_INLINE void add_pixels(const Map<Element>& map, const Element* data, const Segment& segment, int64_t first,
                               int64_t valid, T* values, int64_t width) {
  const Element* from = data + segment.b * map.channels * map.plane();
  for (int64_t p = 0; p < segment.count; ++p) {
    const int64_t pixel = segment.y * map.width + segment.x + p * segment.x_step;
    for (int64_t c = 0; c < valid; c += kChunk) {
      T* to = values + p * width + c;
      if (map.channels_last) {
        const Element* channels = from + pixel * map.channels + first + c;
        store_chunk<T>(to, load_chunk<T>(to) + load_channels<T>(channels, valid - c));
      } else {
        for (int64_t i = 0; i < std::min<int64_t>(kChunk, valid - c); ++i)
          to[i] += load_one<T>(from + (first + c + i) * map.plane() + pixel);
      }
    }
  }
}

// The columns of a panel that belong to consecutive channels.
struct PanelChannels {
  int64_t first, valid;  // of y (gated: of the features and of the gate)
  int64_t panel, width;  // columns of the panel; of its features alone if gated, else the same
};

// to[pixel * stride + channel] = activation(features) * sigmoid(gate), the first `valid` channels;
// sums[pixel][features, then gate].
template <class T, ActivationKind kind, class Element>
INPAINT_INLINE void gate_pixels(const PanelChannels& channels, int64_t pixels, const T* sums, T slope, Element* to,
                                int64_t stride, int64_t valid) {
  for (int64_t p = 0; p < pixels; ++p, sums += channels.panel, to += stride)
    for (int64_t c = 0; c < valid; c += kChunk)
      store_channels<T>(
          to + c,
          activate<T, kind>(load_chunk<T>(sums + c), slope) * sigmoid<T>(load_chunk<T>(sums + channels.width + c)),
          valid - c);
}

template <class T, ActivationKind kind>
INPAINT_INLINE void activate_pixels(int64_t count, T* sums, T slope) {
  for (int64_t i = 0; i < count; i += kChunk)
    store_chunk<T>(sums + i, activate<T, kind>(load_chunk<T>(sums + i), slope));
}

// Calls `body` with the activation as a constant.
template <class Body>
INPAINT_INLINE void with_activation(ActivationKind kind, const Body& body) {
  switch (kind) {
    case ActivationKind::relu:
      return body(std::integral_constant<ActivationKind, ActivationKind::relu>{});
    case ActivationKind::elu:
      return body(std::integral_constant<ActivationKind, ActivationKind::elu>{});
    case ActivationKind::leaky_relu:
      return body(std::integral_constant<ActivationKind, ActivationKind::leaky_relu>{});
    default:
      return body(std::integral_constant<ActivationKind, ActivationKind::none>{});
  }
}

// sums * scale + bias * shift.
template <class T, class Element>
INPAINT_INLINE void scale_pixels(const Convolution<T, Element>& convolution, const Segment& segment, const T* bias,
                                 int64_t panel, T* sums) {
  const PixelMap<T>&scale = convolution.epilogue.scale, &shift = convolution.epilogue.shift;
  for (int64_t p = 0; p < segment.count; ++p, sums += panel) {
    const int64_t pixel = segment.y * convolution.output.width + segment.x + p * segment.x_step;
    const T factor = scale.data[segment.b * scale.batch_stride + pixel];
    const T share = shift.data[segment.b * shift.batch_stride + pixel];
    for (int64_t c = 0; c < panel; c += kChunk)
      store_chunk<T>(sums + c, load_chunk<T>(sums + c) * factor + load_chunk<T>(bias + c) * share);
  }
}

// From the sums of a panel to the output; sums[pixel][panel] hold the bias unless they are scaled, and are changed.
template <class T, class Element>
INPAINT_INLINE void finish(const Convolution<T, Element>& convolution, const Segment& segment,
                           const PanelChannels& channels, const T* bias, T* sums) {
  const Epilogue<T, Element>& epilogue = convolution.epilogue;
  for (int64_t begin = 0; begin < segment.count; begin += kEpiloguePixels) {
    Segment part = segment;
    part.x += begin * segment.x_step;
    part.count = std::min<int64_t>(kEpiloguePixels, segment.count - begin);
    T* own = sums + begin * channels.panel;
    if (!convolution.weight.gated) {
      if (epilogue.scale.data != nullptr) scale_pixels(convolution, part, bias, channels.panel, own);
      with_activation(epilogue.activation, [&](auto kind) INPAINT_INLINE_LAMBDA {
        activate_pixels<T, kind.value>(part.count * channels.panel, own, epilogue.slope);
      });
      if (epilogue.residual != nullptr)
        add_pixels(convolution.output, epilogue.residual, part, channels.first, channels.valid, own, channels.panel);
      store_pixels(convolution.output, part, channels.first, channels.valid, own, channels.panel);
      continue;
    }
    if (epilogue.gates.data != nullptr)
      store_pixels(epilogue.gates, part, channels.first, channels.valid, own + channels.width, channels.panel);
    with_activation(epilogue.activation, [&](auto kind) INPAINT_INLINE_LAMBDA {
      const Map<Element>& output = convolution.output;
      if (output.channels_last) {
        Element* to = output.sample(part.b) + (part.y * output.width + part.x) * output.channels + channels.first;
        gate_pixels<T, kind.value>(channels, part.count, own, epilogue.slope, to, part.x_step * output.channels,
                                   channels.valid);
      } else {
        T results[kEpiloguePixels * kWidestPanel / 2];
        gate_pixels<T, kind.value>(channels, part.count, own, epilogue.slope, results, channels.width, channels.width);
        store_pixels(output, part, channels.first, channels.valid, results, channels.width);
      }
    });
  }
}

}  // namespace inpaint
