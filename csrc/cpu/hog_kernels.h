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
typedef Pack<int16_t> Shorts;

// ---- Arithmetic --------------------------------------------------------------------------------------------------
// Rows of an image are read as Row, their differences kept as Difference, bins as Bin; T is what magnitudes are.

// length() is what channels are compared by, with the rounding of numpy.hypot: of two that are equal the first counts.

// Differences of 8 bits are compared as integers, exactly and 16 at a time (measured with AVX2: the cells of 512 x 512
// pixels take 0.4 ms, and 0.8 ms by way of floats). Of lengths only equal ones are rounded to different numbers: the C
// library's hypot is not correctly rounded.
struct EightBit {
  typedef uint8_t Row;
  typedef int16_t Difference;
  typedef int16_t Bin;
  typedef float T;
  static double length(double down, double right) { return std::hypot(down, right); }
};

// 16 bits: the differences are exact.
struct SixteenBit {
  typedef uint16_t Row;
  typedef float Difference;
  typedef LaneInt<float> Bin;
  typedef float T;
  static double length(double down, double right) { return std::hypot(down, right); }
};

// float images: numpy.hypot is correctly rounded.
struct Single {
  typedef float Row;
  typedef float Difference;
  typedef LaneInt<float> Bin;
  typedef float T;
  static double length(double down, double right) { return static_cast<float>(std::sqrt(down * down + right * right)); }
};

// Everything else in double.
struct Wide {
  typedef double Row;
  typedef double Difference;
  typedef LaneInt<double> Bin;
  typedef double T;
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

// The slope of the border below bin k of n.
inline double border_slope(int64_t k, int64_t n) {
  return std::tan(3.14159265358979323846 * static_cast<double>(k) / static_cast<double>(n));
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
      const double slope = border_slope(k, n);
      low.push_back(static_cast<T>(slope * (1 - kUnsure<T>)));
      high.push_back(static_cast<T>(slope * (1 + kUnsure<T>)));
    }
  }
};

// The same for differences of 8 bits, in units of 2^-16: the rise over the run up to 45 degrees (`flat`), the run over
// the rise above (`steep`; there are as many, or one more).
template <>
struct Borders<EightBit> {
  int64_t orientations;
  bool diagonal, vertical;
  std::vector<uint16_t> flat, steep;

  explicit Borders(int64_t n) : orientations(n), diagonal(n % 4 == 0), vertical(n % 2 == 0) {
    for (int64_t k = 1; 2 * k < n; ++k) {
      if (4 * k < n) flat.push_back(as_integer(border_slope(k, n)));
      if (4 * k > n) steep.push_back(as_integer(1 / border_slope(k, n)));
    }
  }

  // The smallest s for which s * run / 2^16, rounded down, is slope * run, rounded down, for every run up to 255. There
  // is one: fractions with denominators up to 255 are at least 1 / (255 * 254) apart, which is more than 2^-16.
  static uint16_t as_integer(double slope) {
    int64_t smallest = 0;
    for (int64_t run = 1; run < 256; ++run)
      smallest = std::max(smallest, ceil_div(static_cast<int64_t>(slope * static_cast<double>(run)) << 16, run));
    return static_cast<uint16_t>(smallest);
  }
};

template <class T>
INPAINT_INLINE Pack<T> absolute(Pack<T> v) {
  return (Pack<T>)((PackMask<T>)v & std::numeric_limits<LaneInt<T>>::max());
}

INPAINT_INLINE Shorts absolute(Shorts v) { return v < 0 ? -v : v; }
INPAINT_INLINE int16_t absolute(int16_t v) { return static_cast<int16_t>(v < 0 ? -v : v); }

// length * slope / 2^16, rounded down; length >= 0.
INPAINT_INLINE int16_t scaled(int16_t length, uint16_t slope) {
  return static_cast<int16_t>((static_cast<uint32_t>(static_cast<uint16_t>(length)) * slope) >> 16);
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
      passed_high += rise >= run * high[k];
    }
    const Mask turned = (((Mask)x ^ (Mask)y) < 0) & (rise > T(0)) & (run > T(0));
    Mask unsure =
        (passed != passed_high) | ((rise > T(0)) & (rise < run * T(kTiny))) | ((run > T(0)) & (run < rise * T(kTiny)));
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
    store(bins + i, unsure ? Mask{} + kAskScalar : turned ? left_bin : -passed);
    unsure_seen |= unsure;
  }
  if (!any_lane(unsure_seen)) return;
  for (int64_t i = 0; i < count; ++i)
    if (bins[i] == kAskScalar) bins[i] = bin_by_angle(down[i], right[i], borders.orientations);
}

// Adds to passed[i] how many of the borders, `flats` flat and `steeps` steep ones, lie not above the gradient. Scalars,
// because only as such GCC 12 makes one instruction of the product's upper half.
template <int flats, int steeps>
INPAINT_INLINE void count_passed(const int16_t* __restrict down, const int16_t* __restrict right, int64_t count,
                                 const uint16_t* flat, const uint16_t* steep, int16_t* __restrict passed) {
  for (int64_t i = 0; i < count; ++i) {
    const int16_t rise = absolute(down[i]), run = absolute(right[i]);
    int16_t sum = passed[i];
#pragma GCC unroll 2
    for (int k = 0; k < flats; ++k) sum += rise > scaled(run, flat[k]);
#pragma GCC unroll 2
    for (int k = 0; k < steeps; ++k) sum += run <= scaled(rise, steep[k]);
    passed[i] = sum;
  }
}

// The same for differences of 8 bits.
INPAINT_INLINE void find_bins(const Borders<EightBit>& borders, const int16_t* down, const int16_t* right,
                              int64_t count, int16_t* bins) {
  const uint16_t *flat = borders.flat.data(), *steep = borders.steep.data();
  const int64_t flats = static_cast<int64_t>(borders.flat.size()), steeps = static_cast<int64_t>(borders.steep.size());
  std::fill(bins, bins + count, int16_t(0));
  int64_t k = 0;
  for (; k + 2 <= flats; k += 2) count_passed<2, 2>(down, right, count, flat + k, steep + k, bins);
  if (k < flats) count_passed<1, 1>(down, right, count, flat + k, steep + k, bins), ++k;
  if (k < steeps) count_passed<0, 1>(down, right, count, flat + k, steep + k, bins);
  const int16_t last = static_cast<int16_t>(borders.orientations - 1);
  for (int64_t i = 0; i < count; i += kPack<int16_t>) {
    const Shorts y = load<Shorts>(down + i), x = load<Shorts>(right + i), passed = load<Shorts>(bins + i);
    const Shorts rise = absolute(y), run = absolute(x), turned = ((x ^ y) < 0) & (rise > 0) & (run > 0);
    Shorts bin = passed, left_bin = last - passed;
    if (borders.diagonal) {
      // On it: the upper bin, which is the first one here, but for its mirror image the second.
      left_bin += rise > run;
      bin -= rise >= run;
    }
    if (borders.vertical) bin -= run == 0;
    store(bins + i, turned ? left_bin : bin);
  }
}

// ---- Gradients ---------------------------------------------------------------------------------------------------

// to[i] = plus[i] - minus[i].
template <class Difference, class Row>
INPAINT_INLINE void subtract(Difference* __restrict to, const Row* plus, const Row* minus, int64_t count) {
  if constexpr (std::is_integral_v<Row>) {
    for (int64_t i = 0; i < count; ++i)
      to[i] = static_cast<Difference>(static_cast<int32_t>(plus[i]) - static_cast<int32_t>(minus[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = plus[i] - minus[i];
  }
}

// The square of a gradient's length.
template <class T>
INPAINT_INLINE T squared_length(T down, T right) {
  return down * down + right * right;
}
INPAINT_INLINE float squared_length(int16_t down, int16_t right) {  // each square fits into 16 bits
  return static_cast<float>(static_cast<uint16_t>(down * down) + static_cast<uint16_t>(right * right));
}

// Gradients of a piece of an image row, in one channel or in the one where they are longest.
template <class A>
struct GradientRow {
  typename A::Difference *down, *right;
};

// Replaces the marked gradients in `best` by those in `other` that are longer by the scalar formula.
template <class A>
INPAINT_INLINE void keep_longer_where(const typename A::Bin* marked, const GradientRow<A>& best,
                                      const GradientRow<A>& other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const typename A::Difference y = other.down[i], x = other.right[i];
    if (!marked[i] || !(A::length(y, x) > A::length(best.down[i], best.right[i]))) continue;
    best.down[i] = y, best.right[i] = x;
  }
}

// Replaces the gradients in `best` by those in `other` where these are longer; arrays are padded to whole packs, and
// `unsure` is scratch.
template <class A>
INPAINT_INLINE void keep_longer(const GradientRow<A>& best, const GradientRow<A>& other, int64_t count,
                                typename A::Bin* unsure) {
  typedef typename A::T T;
  constexpr T kMargin = 4 * kUnsure<T>;
  PackMask<T> unsure_seen = {};
  for (int64_t i = 0; i < count; i += kPack<T>) {
    const Pack<T> y = load<Pack<T>>(other.down + i), x = load<Pack<T>>(other.right + i), s = y * y + x * x;
    const Pack<T> down = load<Pack<T>>(best.down + i), right = load<Pack<T>>(best.right + i);
    const Pack<T> old = down * down + right * right;
    // The first NaN counts, as published.
    const PackMask<T> longer = (s > old * (1 + kMargin)) | ((s != s) & (old == old));
    const PackMask<T> same = (absolute<T>(y) == absolute<T>(down)) & (absolute<T>(x) == absolute<T>(right));
    const PackMask<T> ask = (s >= old * (1 - kMargin)) & ~longer & ~same;
    store(unsure + i, ask);
    unsure_seen |= ask;
    store(best.down + i, longer ? y : down);
    store(best.right + i, longer ? x : right);
  }
  if (any_lane(unsure_seen)) keep_longer_where(unsure, best, other, count);
}

// Squared lengths of differences of 8 bits have 17.
struct SquaredLengths {
  Pack<uint16_t> low;
  Shorts carry;  // -1: 2^16 more

  SquaredLengths(Shorts down, Shorts right) {
    const Pack<uint16_t> square = (Pack<uint16_t>)(down * down);
    low = square + (Pack<uint16_t>)(right * right);
    carry = (Shorts)(low < square);
  }
};

INPAINT_INLINE void keep_longer(const GradientRow<EightBit>& best, const GradientRow<EightBit>& other, int64_t count,
                                int16_t* unsure) {
  Shorts unsure_seen = {};
  for (int64_t i = 0; i < count; i += kPack<int16_t>) {
    const Shorts y = load<Shorts>(other.down + i), x = load<Shorts>(other.right + i);
    const Shorts down = load<Shorts>(best.down + i), right = load<Shorts>(best.right + i);
    const SquaredLengths now(y, x), old(down, right);
    const Shorts alike = now.carry == old.carry;
    const Shorts longer = (now.carry < old.carry) | (alike & (Shorts)(now.low > old.low));
    const Shorts rise = absolute(y), equal = alike & (Shorts)(now.low == old.low);
    const Shorts ask = equal & (rise != absolute(down)) & (rise != absolute(right));
    store(unsure + i, ask);
    unsure_seen |= ask;
    store(best.down + i, longer ? y : down);
    store(best.right + i, longer ? x : right);
  }
  if (any_lane(unsure_seen)) keep_longer_where(unsure, best, other, count);
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

// to[k] = scale * the sum of the lanes of sums[k], for as many sums as a pack has lanes.
INPAINT_INLINE void store_sums(const Pack<float>* sums, float scale, float* to) {
  Pack<float> pairs[4], fours[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shufflevector(sums[2 * i], sums[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(sums[2 * i], sums[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; ++i)
    fours[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  const Pack<float> all = __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                          __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
  store(to, all * scale);
}

// Magnitudes and bins of the pixels of a row of cells, [rows][stride].
template <class A>
struct Votes {
  typename A::T* magnitude;
  typename A::Bin* bin;
  int64_t stride;
};

template <class T, class Bin>
INPAINT_INLINE PackMask<T> load_bins(const Bin* from) {
  if constexpr (sizeof(Bin) == sizeof(T))
    return load<PackMask<T>>(from);
  else
    return __builtin_convertvector(load<typename VectorOf<Bin, kPack<T> * sizeof(Bin)>::type>(from), PackMask<T>);
}

// histogram[k] = `share` of the sum of the magnitudes of a cell with bin k, for `bins` bins from `first` on. Rows are
// added by eights, so that a large cell's sum stays accurate. `whole`: the cell has 8 x 8 pixels.
template <int bins, bool whole, class A>
INPAINT_INLINE void fill_bins(const Votes<A>& votes, int64_t left, int64_t rows, int64_t columns, int64_t first,
                              typename A::T share, typename A::T* histogram) {
  typedef typename A::T T;
  typedef LaneInt<T> Int;
  constexpr int64_t kTogether = 8;
  Int lanes[kPack<T>];
  for (int i = 0; i < kPack<T>; ++i) lanes[i] = i;
  const PackMask<T> lane = load<PackMask<T>>(lanes);
  Pack<T> sums[bins] = {};
  for (int64_t top = 0; top < (whole ? kTogether : rows); top += kTogether) {
    Pack<T> parts[bins] = {};
    const int64_t bottom = whole ? kTogether : std::min(rows, top + kTogether);
    // Unrolled, it would keep some of the sums in memory (measured with AVX2: 3 to 7 % slower).
#pragma GCC unroll 1
    for (int64_t y = top; y < bottom; ++y)
      for (int64_t x = 0; x < (whole ? 8 : columns); x += kPack<T>) {
        const int64_t i = y * votes.stride + left + x;
        PackMask<T> bin = load_bins<T>(votes.bin + i);
        const PackMask<T> magnitude = load<PackMask<T>>(votes.magnitude + i);
        if (!whole) bin = lane < static_cast<Int>(columns - x) ? bin : PackMask<T>{} - 1;
#pragma GCC unroll 16
        for (int k = 0; k < bins; ++k) parts[k] += (Pack<T>)(magnitude & (bin == static_cast<Int>(first + k)));
      }
    for (int k = 0; k < bins; ++k) sums[k] += parts[k];
  }
  int k = 0;
  if constexpr (sizeof(T) == 4 && bins >= kPack<T>)
    for (; k + kPack<T> <= bins; k += kPack<T>) store_sums(sums + k, share, histogram + first + k);
  for (; k < bins; ++k) histogram[first + k] = sum_of_pack<T>(sums[k]) * share;
}

template <bool whole, class A>
INPAINT_INLINE void fill_histogram_body(const Votes<A>& votes, int64_t left, int64_t rows, int64_t columns,
                                        int64_t orientations, typename A::T* histogram) {
  typedef typename A::T T;
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
template <class A>
INPAINT_INLINE void fill_histogram(const Votes<A>& votes, int64_t left, int64_t rows, int64_t columns,
                                   int64_t orientations, typename A::T* histogram) {
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

// Calls body(pack, place in the block, whether all lanes are its own) for the histograms of one block, whose first is
// `from`; packs at the end of a row of cells reach into what follows.
template <class T, class Body>
INPAINT_INLINE void for_each_pack(const BlockShape& shape, const T* from, const Body& body) {
  const int64_t width = shape.columns * shape.orientations, whole = width / kPack<T> * kPack<T>;
  for (int64_t y = 0; y < shape.rows; ++y, from += shape.cells_across * shape.orientations) {
    for (int64_t i = 0; i < whole; i += kPack<T>) body(load<Pack<T>>(from + i), y * width + i, true);
    if (whole < width) body(load<Pack<T>>(from + whole), y * width + whole, false);
  }
}

template <class T>
INPAINT_INLINE Pack<T> at_most(Pack<T> v, T most) {
  return v > most ? Pack<T>{} + most : v;
}

// One row of blocks [blocks across][rows][columns][orientations], of histograms [rows][cells across][orientations] and
// the cells' energies. Histograms are padded by a pack.
template <class T>
INPAINT_INLINE void normalise_blocks(const BlockShape& shape, const T* histograms, const T* energy, T* to) {
  // Roots and quotients of as many blocks at once: one by one each would wait for the one before.
  constexpr int64_t kTogether = 32;
  constexpr T kMost = T(0.2);
  const T eps = static_cast<T>(kBlockEps);
  const int64_t width = shape.columns * shape.orientations, length = shape.rows * width;
  const bool hys = shape.norm == BlockNorm::l2_hys, square = hys || shape.norm == BlockNorm::l2;
  const T* const end = to + shape.blocks_across * length;
  LaneInt<T> lanes[kPack<T>];
  for (int lane = 0; lane < kPack<T>; ++lane) lanes[lane] = lane;
  const PackMask<T> inside = load<PackMask<T>>(lanes) < static_cast<LaneInt<T>>(width % kPack<T>);
  for (int64_t first = 0; first < shape.blocks_across; first += kTogether) {
    const int64_t blocks = std::min(kTogether, shape.blocks_across - first);
    T scale[kTogether], again[kTogether], norm[kTogether] = {};
    for (int64_t y = 0; y < shape.rows; ++y)
      for (int64_t x = 0; x < shape.columns; ++x)
        for (int64_t b = 0; b < blocks; ++b) norm[b] += energy[y * shape.cells_across + first + b + x];
    for (int64_t b = 0; b < kTogether; ++b) scale[b] = T(1) / (square ? std::sqrt(norm[b] + eps * eps) : norm[b] + eps);
    const T* const from = histograms + first * shape.orientations;
    if (hys) {
      for (int64_t b = 0; b < blocks; ++b) {
        Pack<T> squares = {};
        for_each_pack(shape, from + b * shape.orientations, [&](Pack<T> v, int64_t, bool own) INPAINT_INLINE_LAMBDA {
          v = at_most(v * scale[b], kMost);
          if (!own) v = (Pack<T>)((PackMask<T>)v & inside);
          squares += v * v;
        });
        norm[b] = sum_of_pack<T>(squares);
      }
      for (int64_t b = 0; b < kTogether; ++b) again[b] = T(1) / std::sqrt(norm[b] + eps * eps);
    }
    for (int64_t b = 0; b < blocks; ++b, to += length) {
      for_each_pack(shape, from + b * shape.orientations, [&](Pack<T> v, int64_t i, bool own) INPAINT_INLINE_LAMBDA {
        v *= scale[b];
        if (hys) v = at_most(v, kMost) * again[b];
        // What is written too much is written again, but at the end of the row.
        if (own || to + i + kPack<T> <= end)
          store(to + i, v);
        else
          for (int64_t lane = 0; lane < width % kPack<T>; ++lane) to[i + lane] = v[lane];
      });
      for (int64_t i = 0; shape.norm == BlockNorm::l1_sqrt && i < length; ++i) to[i] = std::sqrt(to[i]);
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
