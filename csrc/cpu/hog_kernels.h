// The inner loops of the CPU's histograms of oriented gradients. This file is compiled with -ffp-contract=off: a fused
// multiply-add would break ties between bins.
#pragma once

#include <vector>

#include "elements.h"

namespace inpaint {

// Vectors of 32 bytes: GCC splits longer ones through memory where the registers are no longer (measured with AVX2:
// double images took 15 times as long with 64).
template <class T>
constexpr int kPack = 32 / sizeof(T);
template <class T>
using Pack = typename VectorOf<T, 32>::type;
template <class T>
using PackMask = typename VectorOf<LaneInt<T>, 32>::type;

// ---- Arithmetic --------------------------------------------------------------------------------------------------
// What differences are computed in, and how close numbers are compared. Row is what the rows of an image are read from.

// length() is what channels are compared by, with the rounding of numpy.hypot: of two that are equal the first counts.

// Squares and products of differences of 8 bits are exact. Of lengths only equal ones are rounded to different numbers:
// the C library's hypot is not correctly rounded.
struct EightBit {
  typedef uint8_t Row;
  typedef float T;
  static constexpr bool kExact = true;
  static double length(double down, double right) { return std::hypot(down, right); }
};

// 16 bits: the differences are exact.
struct SixteenBit {
  typedef uint16_t Row;
  typedef float T;
  static constexpr bool kExact = false;
  static double length(double down, double right) { return std::hypot(down, right); }
};

// float images: numpy.hypot is correctly rounded.
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
INPAINT_INLINE Pack<T> absolute(Pack<T> v) {
  return (Pack<T>)((PackMask<T>)v & std::numeric_limits<LaneInt<T>>::max());
}

template <class T>
INPAINT_INLINE bool any(PackMask<T> mask) {
  LaneInt<T> some = 0;
  for (int lane = 0; lane < kPack<T>; ++lane) some |= mask[lane];
  return some != 0;
}

// bins[i] of the gradients (down[i], right[i]) for i in [0, count); arrays are padded to whole packs.
template <class A>
INPAINT_INLINE void find_bins(const Borders<A>& borders, const typename A::T* down, const typename A::T* right,
                              int64_t count, LaneInt<typename A::T>* bins) {
  typedef typename A::T T;
  typedef PackMask<T> Mask;
  constexpr LaneInt<T> kAskScalar = -2;
  const int64_t slopes = static_cast<int64_t>(borders.low.size());
  const T *low = borders.low.data(), *high = borders.high.data();
  const LaneInt<T> last = static_cast<LaneInt<T>>(borders.orientations - 1);
  Mask unsure_seen = {};
  for (int64_t i = 0; i < count; i += kPack<T>) {
    const Pack<T> y = load<Pack<T>>(down + i), x = load<Pack<T>>(right + i);
    const Pack<T> rise = absolute<T>(y), run = absolute<T>(x);
    Mask passed = {}, passed_high = {};  // minus the number of borders
#pragma GCC unroll 4
    for (int64_t k = 0; k < slopes; ++k) {
      passed += rise >= run * low[k];
      if constexpr (!A::kExact) passed_high += rise >= run * high[k];
    }
    Mask unsure = {}, turned = {};
    if constexpr (A::kExact) {
      turned = x * y < T(0);
    } else {
      turned = (((Mask)x ^ (Mask)y) < 0) & (rise > T(0)) & (run > T(0));
      unsure = (passed != passed_high) | ((rise > T(0)) & (rise < run * T(kTiny))) |
               ((run > T(0)) & (run < rise * T(kTiny)));
    }
    Mask left_bin = last + passed;
    if (borders.diagonal) {
      // On it: the upper bin, which is the first one here, but for its mirror image the second.
      left_bin += rise > run;
      passed += rise >= run;
      if constexpr (sizeof(T) == 8) {  // float differences are on it or far from it
        const Pack<T> off = absolute<T>(rise - run);
        unsure |= (off > T(0)) & (off < run * kUnsure<T>);
      }
    }
    if (borders.vertical) passed += run == T(0);
    Mask bin = turned ? left_bin : -passed;
    if constexpr (!A::kExact) {
      bin = unsure ? Mask{} + kAskScalar : bin;
      unsure_seen |= unsure;
    }
    store(bins + i, bin);
  }
  if constexpr (!A::kExact) {
    if (!any<T>(unsure_seen)) return;
    for (int64_t i = 0; i < count; ++i)
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

// Replaces the gradients in `best` by those in `other` where these are longer; arrays are padded to whole packs, and
// `unsure` is scratch.
template <class A>
INPAINT_INLINE void keep_longer(const GradientRow<typename A::T>& best, const GradientRow<typename A::T>& other,
                                int64_t count, LaneInt<typename A::T>* unsure) {
  typedef typename A::T T;
  constexpr T kMargin = 4 * kUnsure<T>;
  PackMask<T> unsure_seen = {};
  for (int64_t i = 0; i < count; i += kPack<T>) {
    const Pack<T> y = load<Pack<T>>(other.down + i), x = load<Pack<T>>(other.right + i), s = y * y + x * x;
    const Pack<T> down = load<Pack<T>>(best.down + i), right = load<Pack<T>>(best.right + i);
    const Pack<T> old = load<Pack<T>>(best.square + i);
    PackMask<T> longer = s > old, ask;
    if constexpr (A::kExact) {
      const Pack<T> rise = absolute<T>(y);
      ask = (s == old) & (rise != absolute<T>(down)) & (rise != absolute<T>(right));
    } else {
      longer = (s > old * (1 + kMargin)) | ((s != s) & (old == old));  // the first NaN counts, as published
      const PackMask<T> same = (absolute<T>(y) == absolute<T>(down)) & (absolute<T>(x) == absolute<T>(right));
      ask = (s >= old * (1 - kMargin)) & ~longer & ~same;
    }
    store(unsure + i, ask);
    unsure_seen |= ask;
    store(best.down + i, longer ? y : down);
    store(best.right + i, longer ? x : right);
    store(best.square + i, longer ? s : old);
  }
  if (!any<T>(unsure_seen)) return;
  for (int64_t first = 0; first < count; first += kPack<T>) {
    if (!any<T>(load<PackMask<T>>(unsure + first))) continue;
    for (int64_t i = first; i < std::min(count, first + kPack<T>); ++i) {
      const T y = other.down[i], x = other.right[i];
      if (!unsure[i] || !(A::length(y, x) > A::length(best.down[i], best.right[i]))) continue;
      best.down[i] = y, best.right[i] = x, best.square[i] = y * y + x * x;
    }
  }
}

// ---- Histograms --------------------------------------------------------------------------------------------------

template <class T>
INPAINT_INLINE T sum_of_pack(Pack<T> v) {
  typedef typename VectorOf<T, 16>::type Half;
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half sum = halves[0] + halves[1];
  if constexpr (sizeof(T) == 4) return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  return sum[0] + sum[1];
}

// Magnitudes and bins of the pixels of a row of cells, [rows][stride].
template <class T>
struct Votes {
  T* magnitude;
  LaneInt<T>* bin;
  int64_t stride;
};

// histogram[k] = `share` of the sum of the magnitudes of a cell with bin k, for `bins` bins from `first` on. Rows are
// added by eights, so that a large cell's sum stays accurate. `whole`: the cell has 8 x 8 pixels.
template <int bins, bool whole, class T>
INPAINT_INLINE void fill_bins(const Votes<T>& votes, int64_t left, int64_t rows, int64_t columns, int64_t first,
                              T share, T* histogram) {
  typedef LaneInt<T> Int;
  constexpr int64_t kTogether = 8;
  Int lanes[kPack<T>];
  for (int i = 0; i < kPack<T>; ++i) lanes[i] = i;
  const PackMask<T> lane = load<PackMask<T>>(lanes);
  Pack<T> sums[bins] = {};
  for (int64_t top = 0; top < (whole ? kTogether : rows); top += kTogether) {
    Pack<T> parts[bins] = {};
    for (int64_t y = top; y < (whole ? kTogether : std::min(rows, top + kTogether)); ++y)
      for (int64_t x = 0; x < (whole ? 8 : columns); x += kPack<T>) {
        const int64_t i = y * votes.stride + left + x;
        PackMask<T> bin = load<PackMask<T>>(votes.bin + i);
        const PackMask<T> magnitude = load<PackMask<T>>(votes.magnitude + i);
        if (!whole) bin = lane < static_cast<Int>(columns - x) ? bin : PackMask<T>{} - 1;
#pragma GCC unroll 16
        for (int k = 0; k < bins; ++k) parts[k] += (Pack<T>)(magnitude & (bin == static_cast<Int>(first + k)));
      }
    for (int k = 0; k < bins; ++k) sums[k] += parts[k];
  }
  for (int k = 0; k < bins; ++k) histogram[first + k] = sum_of_pack<T>(sums[k]) * share;
}

template <bool whole, class T>
INPAINT_INLINE void fill_histogram_body(const Votes<T>& votes, int64_t left, int64_t rows, int64_t columns,
                                        int64_t orientations, T* histogram) {
  const T share = T(1) / static_cast<T>(rows * columns);
  int64_t first = 0;
  // As many sums as fit into 16 registers with their operands.
  for (; orientations % 9 == 0 && first < orientations; first += 9)
    fill_bins<9, whole>(votes, left, rows, columns, first, share, histogram);
  for (; first + 4 <= orientations; first += 4)
    fill_bins<4, whole>(votes, left, rows, columns, first, share, histogram);
  for (; first < orientations; ++first) fill_bins<1, whole>(votes, left, rows, columns, first, share, histogram);
}

// The histogram of a cell whose first pixel is `left`: the mean of the magnitudes in each bin.
template <class T>
INPAINT_INLINE void fill_histogram(const Votes<T>& votes, int64_t left, int64_t rows, int64_t columns,
                                   int64_t orientations, T* histogram) {
  if (rows == 8 && columns == 8)
    fill_histogram_body<true>(votes, left, rows, columns, orientations, histogram);
  else
    fill_histogram_body<false>(votes, left, rows, columns, orientations, histogram);
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
// the cells' energies. Histograms are padded by a pack.
template <class T>
INPAINT_INLINE void normalise_blocks(const BlockShape& shape, const T* histograms, const T* energy, T* to) {
  const T eps = static_cast<T>(kBlockEps);
  const int64_t width = shape.columns * shape.orientations, length = shape.rows * width;
  const bool hys = shape.norm == BlockNorm::l2_hys, square = hys || shape.norm == BlockNorm::l2;
  const T most = hys ? T(0.2) : std::numeric_limits<T>::infinity();
  const T* end = to + shape.blocks_across * length;
  LaneInt<T> lanes[kPack<T>];
  for (int lane = 0; lane < kPack<T>; ++lane) lanes[lane] = lane;
  const int64_t whole = width / kPack<T> * kPack<T>;
  const PackMask<T> inside = load<PackMask<T>>(lanes) < static_cast<LaneInt<T>>(width - whole);
  for (int64_t block = 0; block < shape.blocks_across; ++block, to += length) {
    T norm = 0;
    for (int64_t y = 0; y < shape.rows; ++y)
      for (int64_t x = 0; x < shape.columns; ++x) norm += energy[y * shape.cells_across + block + x];
    const T scale = T(1) / (square ? std::sqrt(norm + eps * eps) : norm + eps);
    Pack<T> squares = {};
    for (int64_t y = 0; y < shape.rows; ++y) {
      const T* from = histograms + (y * shape.cells_across + block) * shape.orientations;
      T* row = to + y * width;
      for (int64_t i = 0; i < whole; i += kPack<T>) {
        Pack<T> v = load<Pack<T>>(from + i) * scale;
        v = v > most ? Pack<T>{} + most : v;
        squares += v * v;
        store(row + i, v);
      }
      if (whole == width) continue;
      Pack<T> v = load<Pack<T>>(from + whole) * scale;
      v = (Pack<T>)((PackMask<T>)(v > most ? Pack<T>{} + most : v) & inside);
      squares += v * v;
      // What is written too much is written again, but at the end of the row.
      if (row + whole + kPack<T> <= end)
        store(row + whole, v);
      else
        for (int64_t i = whole; i < width; ++i) row[i] = v[i - whole];
    }
    if (hys) {
      const T again = T(1) / std::sqrt(sum_of_pack<T>(squares) + eps * eps);
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
  int64_t rows, columns, padded;   // columns, padded to whole packs
  std::vector<int64_t> first;      // of each row's entries, and the end
  std::vector<int64_t> bin;        // of each entry
  std::vector<LaneInt<T>> pixels;  // of each entry: [padded], -1 on the line

  Lines(const bool* masks, int64_t orientations, int64_t rows, int64_t columns)
      : rows(rows), columns(columns), padded(ceil_div(columns, kPack<T>) * kPack<T>) {
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

// Row y of the cells whose histograms are [cells][orientations], drawn into an image row of `width` pixels: cell c with
// lines[min(c, kinds - 1)].
template <class T>
INPAINT_INLINE void draw_row(const Lines<T>* lines, int64_t kinds, int64_t y, const T* histograms, int64_t cells,
                             int64_t orientations, T* to, int64_t width) {
  T* const end = to + width;
  for (int64_t cell = 0; cell < cells; ++cell) {
    const Lines<T>& own = lines[std::min(cell, kinds - 1)];
    const T* histogram = histograms + cell * orientations;
    for (int64_t x = 0; x < own.columns; x += kPack<T>) {
      Pack<T> sum = {};
      for (int64_t entry = own.first[y]; entry < own.first[y + 1]; ++entry) {
        const Pack<T> height = Pack<T>{} + histogram[own.bin[entry]];
        sum += (Pack<T>)((PackMask<T>)height & load<PackMask<T>>(&own.pixels[entry * own.padded + x]));
      }
      // What is written too much is written again by the next cell.
      if (to + x + kPack<T> <= end)
        store(to + x, sum);
      else
        for (int64_t i = 0; to + x + i < end; ++i) to[x + i] = sum[i];
    }
    to += own.columns;
  }
  std::fill(to, end, T(0));
}

}  // namespace inpaint
