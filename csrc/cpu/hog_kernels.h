// The inner loops of the CPU's histograms of oriented gradients. This file is compiled with -ffp-contract=off: a fused
// multiply-add would break ties between bins.
#pragma once

#include <vector>

#include "convolution_kernels.h"

namespace inpaint {

// ---- Arithmetic --------------------------------------------------------------------------------------------------
// What differences are computed in, and how close numbers are compared. Row is what the rows of an image are read from.

// Squares and products of differences of 8 bits are exact.
struct EightBit {
  typedef uint8_t Row;
  typedef float T;
  static constexpr bool kExact = true;
};

// 16 bits: the differences are exact, the squares in double.
struct SixteenBit {
  typedef uint16_t Row;
  typedef float T;
  static constexpr bool kExact = false;
  static double length(double down, double right) { return down * down + right * right; }
};

// float images. Lengths are compared as float, correctly rounded, as numpy.hypot does: of two channels whose gradients
// differ by less than that the first counts.
struct Single {
  typedef float Row;
  typedef float T;
  static constexpr bool kExact = false;
  static double length(double down, double right) { return static_cast<float>(std::sqrt(down * down + right * right)); }
};

// Everything else in double.
struct Wide {
  typedef double Row;
  typedef double T;
  static constexpr bool kExact = false;
  static double length(double down, double right) { return std::hypot(down, right); }
};

// Relative distances below which float or double does not decide, and the scalar formula does.
template <class T>
constexpr T kUnsure = sizeof(T) == 4 ? T(4e-7) : T(1e-12);
// Angles nearer to 0 and 90 degrees than this may be rounded there.
constexpr double kTiny = 1e-12;

// ---- Bins --------------------------------------------------------------------------------------------------------

// scikit-image's formula, with its rounding; -1: none (an angle that is rounded up to 180 degrees).
inline int bin_by_angle(double down, double right, int64_t orientations) {
  constexpr double kPi = 3.14159265358979323846;
  double angle = std::fmod(std::atan2(down, right) * (180.0 / kPi), 180.0);
  if (angle < 0) angle += 180.0;
  const double width = 180.0 / static_cast<double>(orientations);
  for (int64_t i = 0; i < orientations; ++i)
    if (angle >= width * static_cast<double>(i) && angle < width * static_cast<double>(i + 1))
      return static_cast<int>(i);
  return angle == angle ? -1 : 0;
}

// The borders between bins that lie below 90 degrees, as slopes. Those above mirror them: a gradient that is turned to
// the left has bin n - 1 - i where its mirror image has i.
template <class A>
struct Borders {
  typedef typename A::T T;
  int64_t orientations;
  bool diagonal, vertical;   // whether 45 and 90 degrees are borders; those are compared exactly
  std::vector<T> low, high;  // the other slopes; between low and high the scalar formula decides

  explicit Borders(int64_t n) : orientations(n), diagonal(n % 4 == 0), vertical(n % 2 == 0) {
    for (int64_t k = 1; 2 * k < n; ++k) {
      if (4 * k == n) continue;
      const double slope = std::tan(3.14159265358979323846 * static_cast<double>(k) / static_cast<double>(n));
      if constexpr (A::kExact) {
        low.push_back(static_cast<T>(between_fractions(slope)));
      } else {
        low.push_back(static_cast<T>(slope * (1 - kUnsure<T>)));
        high.push_back(static_cast<T>(slope * (1 + kUnsure<T>)));
      }
    }
  }

  // The slope in the middle between the nearest two that a pair of 8-bit differences can have. No such pair is nearer
  // to it than 1 / 510 in its rise, so float products compare right, whichever the border (measured: for 31 bins the
  // nearest pair lies 3e-6 degrees from a border, too near for the border itself).
  static double between_fractions(double slope) {
    double below = 0, above = 256;
    for (int run = 1; run < 256; ++run) {
      const double rise = std::floor(slope * run);
      if (rise > 255) break;
      below = std::max(below, rise / run);
      if (rise < 255) above = std::min(above, (rise + 1) / run);
    }
    return (below + above) / 2;
  }
};

template <class T>
INPAINT_INLINE Chunk<T> absolute(Chunk<T> v) {
  return v < T(0) ? -v : v;
}

// bins[i] of the gradients (down[i], right[i]) for i in [0, count); arrays are padded to whole chunks.
template <class A>
INPAINT_INLINE void find_bins(const Borders<A>& borders, const typename A::T* down, const typename A::T* right,
                              int64_t count, LaneInt<typename A::T>* bins) {
  typedef typename A::T T;
  typedef ChunkMask<T> Mask;
  constexpr LaneInt<T> kAskScalar = -2;
  const int64_t slopes = static_cast<int64_t>(borders.low.size());
  const T *low = borders.low.data(), *high = borders.high.data();
  const LaneInt<T> last = static_cast<LaneInt<T>>(borders.orientations - 1);
  const Mask diagonal = Mask{} - borders.diagonal, vertical = Mask{} - borders.vertical;
  Mask unsure_seen = {};
  for (int64_t i = 0; i < count; i += kChunk) {
    const Chunk<T> y = load<Chunk<T>>(down + i), x = load<Chunk<T>>(right + i);
    const Chunk<T> rise = absolute<T>(y), run = absolute<T>(x);
    Mask passed = {}, passed_high = {};  // minus the number of borders
    for (int64_t k = 0; k < slopes; ++k) {
      passed += rise >= run * low[k];
      if constexpr (!A::kExact) passed_high += rise >= run * high[k];
    }
    Mask unsure = {};
    if constexpr (!A::kExact) {
      unsure = (passed != passed_high) | ((rise > T(0)) & (rise < run * T(kTiny))) |
               ((run > T(0)) & (run < rise * T(kTiny)));
    }
    if constexpr (sizeof(T) == 8) {  // float differences are on the diagonal or far from it
      const Chunk<T> off = absolute<T>(rise - run);
      unsure |= diagonal & (off > T(0)) & (off < run * kUnsure<T>);
    }
    // On the diagonal: the upper bin, which is the first one here, but for its mirror image the second.
    const Mask right_bin = -(passed + (diagonal & (rise >= run)) + (vertical & (run == T(0))));
    const Mask left_bin = last + passed + (diagonal & (rise > run));
    const Mask turned = ((x < T(0)) ^ (y < T(0))) & (rise > T(0)) & (run > T(0));
    Mask bin = turned ? left_bin : right_bin;
    if constexpr (!A::kExact) {
      bin = unsure ? Mask{} + kAskScalar : bin;
      unsure_seen |= unsure;
    }
    store(bins + i, bin);
  }
  if constexpr (!A::kExact) {
    LaneInt<T> any = 0;
    for (int lane = 0; lane < kChunk; ++lane) any |= unsure_seen[lane];
    for (int64_t i = 0; any && i < count; ++i)
      if (bins[i] == kAskScalar) bins[i] = bin_by_angle(down[i], right[i], borders.orientations);
  }
}

// ---- Gradients ---------------------------------------------------------------------------------------------------

// to[i] = plus[i] - minus[i].
template <class T, class Row>
INPAINT_INLINE void subtract(T* __restrict to, const Row* plus, const Row* minus, int64_t count) {
  if constexpr (std::is_integral_v<Row>) {
    for (int64_t i = 0; i < count; ++i)
      to[i] = static_cast<T>(static_cast<int32_t>(plus[i]) - static_cast<int32_t>(minus[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = plus[i] - minus[i];
  }
}

// Gradients of a piece of an image row, in one channel or in the one where they are longest.
template <class T>
struct GradientRow {
  T *down, *right, *square;
};

// Replaces the gradients in `best` by those in `other` where these are longer. `verdict` is scratch.
template <class A>
INPAINT_INLINE void keep_longer(const GradientRow<typename A::T>& best, const GradientRow<typename A::T>& other,
                                int64_t count, LaneInt<typename A::T>* __restrict verdict) {
  typedef typename A::T T;
  typedef LaneInt<T> Int;
  T* __restrict down = best.down, * __restrict right = best.right, * __restrict square = best.square;
  const T* __restrict y = other.down, * __restrict x = other.right;
  if constexpr (A::kExact) {
    for (int64_t i = 0; i < count; ++i) verdict[i] = y[i] * y[i] + x[i] * x[i] > square[i];
  } else {
    constexpr T kMargin = 4 * kUnsure<T>;
    Int unsure_seen = 0;
    for (int64_t i = 0; i < count; ++i) {
      const T s = y[i] * y[i] + x[i] * x[i], old = square[i];
      const Int same = (std::fabs(y[i]) == std::fabs(down[i])) & (std::fabs(x[i]) == std::fabs(right[i]));
      const Int longer = (s > old * (1 + kMargin)) | ((s != s) & (old == old));  // the first NaN counts, as published
      const Int unsure = (s >= old * (1 - kMargin)) & (longer == 0) & (same == 0);
      verdict[i] = longer | (unsure << 1);
      unsure_seen |= unsure;
    }
    for (int64_t i = 0; unsure_seen && i < count; ++i)
      if (verdict[i] == 2) verdict[i] = A::length(y[i], x[i]) > A::length(down[i], right[i]);
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool take = verdict[i] != 0;
    const T s = y[i] * y[i] + x[i] * x[i];
    down[i] = take ? y[i] : down[i];
    right[i] = take ? x[i] : right[i];
    square[i] = take ? s : square[i];
  }
}

// ---- Histograms --------------------------------------------------------------------------------------------------

template <class T>
INPAINT_INLINE T sum_of_chunk(Chunk<T> v) {
  typedef typename VectorOf<T, kChunk / 2 * sizeof(T)>::type Half;
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half sum = halves[0] + halves[1];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Magnitudes and bins of the pixels of a row of cells, [rows][stride].
template <class T>
struct Votes {
  T* magnitude;
  LaneInt<T>* bin;
  int64_t stride;
};

// histogram[k] = the mean over a cell of the magnitudes with bin k. Rows are added by eights, so that a large cell's
// sum stays accurate.
template <class T>
INPAINT_INLINE void fill_histogram(const Votes<T>& votes, int64_t left, int64_t rows, int64_t columns,
                                   int64_t orientations, T* histogram) {
  constexpr int64_t kTogether = 8;
  const T area = static_cast<T>(rows * columns);
  if (rows == kTogether && columns == kChunk) {
    for (int64_t k = 0; k < orientations; ++k) {
      Chunk<T> sum = {};
      for (int64_t y = 0; y < kTogether; ++y) {
        const int64_t i = y * votes.stride + left;
        const ChunkMask<T> here = load<ChunkMask<T>>(votes.bin + i) == static_cast<LaneInt<T>>(k);
        sum += (Chunk<T>)(here & load<ChunkMask<T>>(votes.magnitude + i));
      }
      histogram[k] = sum_of_chunk<T>(sum) / area;
    }
    return;
  }
  LaneInt<T> lanes[kChunk];
  for (int lane = 0; lane < kChunk; ++lane) lanes[lane] = lane;
  const ChunkMask<T> lane = load<ChunkMask<T>>(lanes);
  for (int64_t k = 0; k < orientations; ++k) {
    Chunk<T> sum = {};
    for (int64_t top = 0; top < rows; top += kTogether) {
      Chunk<T> part = {};
      for (int64_t y = top; y < std::min(rows, top + kTogether); ++y)
        for (int64_t x = 0; x < columns; x += kChunk) {
          const int64_t i = y * votes.stride + left + x;
          const ChunkMask<T> here = (load<ChunkMask<T>>(votes.bin + i) == static_cast<LaneInt<T>>(k)) &
                                    (lane < static_cast<LaneInt<T>>(columns - x));
          part += (Chunk<T>)(here & load<ChunkMask<T>>(votes.magnitude + i));
        }
      sum += part;
    }
    histogram[k] = sum_of_chunk<T>(sum) / area;
  }
}

// ---- Blocks ------------------------------------------------------------------------------------------------------

enum class BlockNorm { l1, l1_sqrt, l2, l2_hys };

constexpr double kBlockEps = 1e-5;

// What the blocks of a row of blocks are made of.
struct BlockShape {
  int64_t cells_across, blocks_across, rows, columns, orientations;
  BlockNorm norm;
};

// What a cell adds to the norm of its blocks.
template <class T>
INPAINT_INLINE T energy_of(const T* histogram, int64_t orientations, BlockNorm norm) {
  const bool square = norm == BlockNorm::l2 || norm == BlockNorm::l2_hys;
  T sum = 0;
  for (int64_t k = 0; k < orientations; ++k) sum += square ? histogram[k] * histogram[k] : histogram[k];
  return sum;
}

// One row of blocks [blocks across][rows][columns][orientations], of histograms [rows][cells across][orientations] and
// the cells' energies. Histograms are padded by a chunk.
template <class T>
INPAINT_INLINE void normalise_blocks(const BlockShape& shape, const T* histograms, const T* energy, T* to) {
  const T eps = static_cast<T>(kBlockEps);
  const int64_t width = shape.columns * shape.orientations, length = shape.rows * width;
  const bool hys = shape.norm == BlockNorm::l2_hys, square = hys || shape.norm == BlockNorm::l2;
  const T most = hys ? T(0.2) : std::numeric_limits<T>::infinity();
  const T* end = to + shape.blocks_across * length;
  LaneInt<T> lanes[kChunk];
  for (int lane = 0; lane < kChunk; ++lane) lanes[lane] = lane;
  const int64_t whole = width / kChunk * kChunk;
  const ChunkMask<T> inside = load<ChunkMask<T>>(lanes) < static_cast<LaneInt<T>>(width - whole);
  for (int64_t block = 0; block < shape.blocks_across; ++block, to += length) {
    T norm = 0;
    for (int64_t y = 0; y < shape.rows; ++y)
      for (int64_t x = 0; x < shape.columns; ++x) norm += energy[y * shape.cells_across + block + x];
    const T scale = T(1) / (square ? std::sqrt(norm + eps * eps) : norm + eps);
    Chunk<T> squares = {};
    for (int64_t y = 0; y < shape.rows; ++y) {
      const T* from = histograms + (y * shape.cells_across + block) * shape.orientations;
      T* row = to + y * width;
      for (int64_t i = 0; i < whole; i += kChunk) {
        Chunk<T> v = load<Chunk<T>>(from + i) * scale;
        v = v > most ? Chunk<T>{} + most : v;
        squares += v * v;
        store(row + i, v);
      }
      if (whole == width) continue;
      Chunk<T> v = load<Chunk<T>>(from + whole) * scale;
      v = (Chunk<T>)((ChunkMask<T>)(v > most ? Chunk<T>{} + most : v) & inside);
      squares += v * v;
      // What is written too much is written again, but at the end of the row.
      if (row + whole + kChunk <= end)
        store(row + whole, v);
      else
        for (int64_t i = whole; i < width; ++i) row[i] = v[i - whole];
    }
    if (hys) {
      const T again = T(1) / std::sqrt(sum_of_chunk<T>(squares) + eps * eps);
      for (int64_t i = 0; i < length; ++i) to[i] *= again;
    } else if (shape.norm == BlockNorm::l1_sqrt) {
      for (int64_t i = 0; i < length; ++i) to[i] = std::sqrt(to[i]);
    }
  }
}

// ---- The picture -------------------------------------------------------------------------------------------------

// For each row of a cell, the bins whose lines go through it, with their pixels.
template <class T>
struct Lines {
  int64_t rows, columns, padded;   // columns, padded to whole chunks
  std::vector<int64_t> first;      // of each row's entries, and the end
  std::vector<int64_t> bin;        // of each entry
  std::vector<LaneInt<T>> pixels;  // of each entry: [padded], -1 on the line

  Lines(const bool* masks, int64_t orientations, int64_t rows, int64_t columns)
      : rows(rows), columns(columns), padded(ceil_div(columns, kChunk) * kChunk) {
    for (int64_t y = 0; y < rows; ++y) {
      first.push_back(static_cast<int64_t>(bin.size()));
      for (int64_t k = 0; k < orientations; ++k) {
        const bool* line = masks + (k * rows + y) * columns;
        if (std::find(line, line + columns, true) == line + columns) continue;
        bin.push_back(k);
        for (int64_t x = 0; x < padded; ++x) pixels.push_back(x < columns && line[x] ? -1 : 0);
      }
    }
    first.push_back(static_cast<int64_t>(bin.size()));
  }
};

// Row y of the cells whose histograms are [cells][orientations], drawn into an image row of `width` pixels.
template <class T>
INPAINT_INLINE void draw_row(const Lines<T>& lines, int64_t y, const T* histograms, int64_t cells, int64_t orientations,
                             T* to, int64_t width) {
  T* const end = to + width;
  for (int64_t cell = 0; cell < cells; ++cell, to += lines.columns) {
    const T* histogram = histograms + cell * orientations;
    for (int64_t x = 0; x < lines.columns; x += kChunk) {
      Chunk<T> sum = {};
      for (int64_t entry = lines.first[y]; entry < lines.first[y + 1]; ++entry) {
        const Chunk<T> height = Chunk<T>{} + histogram[lines.bin[entry]];
        sum += (Chunk<T>)((ChunkMask<T>)height & load<ChunkMask<T>>(&lines.pixels[entry * lines.padded + x]));
      }
      // What is written too much is written again by the next cell.
      if (to + x + kChunk <= end)
        store(to + x, sum);
      else
        for (int64_t i = 0; to + x + i < end; ++i) to[x + i] = sum[i];
    }
  }
  std::fill(to, end, T(0));
}

}  // namespace inpaint
