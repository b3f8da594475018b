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
using SameSizeInt = std::conditional_t<sizeof(T) == 2, int16_t, LaneInt<T>>;
template <class T>
using PackMask = typename VectorOf<SameSizeInt<T>, 32>::type;
typedef Pack<int16_t> Shorts;

// ---- Arithmetic --------------------------------------------------------------------------------------------------
// Images are read as Pixel, which their differences are too; T is what magnitudes are.

// length() is what channels are compared by, with the rounding of numpy.hypot: of two that are equal the first counts.

// Differences of 8 bits are compared as integers, exactly and 16 at a time. Of lengths only equal ones are rounded to
// different numbers: the C library's hypot is not correctly rounded.
struct EightBit {
  typedef int16_t Pixel;
  typedef float T;
  static double length(double down, double right) { return std::hypot(down, right); }
};

// 16 bits: the differences are exact.
struct SixteenBit {
  typedef float Pixel;
  typedef float T;
  static double length(double down, double right) { return std::hypot(down, right); }
};

// float images: numpy.hypot is correctly rounded.
struct Single {
  typedef float Pixel;
  typedef float T;
  static double length(double down, double right) { return static_cast<float>(std::sqrt(down * down + right * right)); }
};

// Everything else in double.
struct Wide {
  typedef double Pixel;
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

// ---- Gradients ---------------------------------------------------------------------------------------------------

// Gradients of a piece of an image row.
template <class A>
struct GradientRow {
  typename A::Pixel *down, *right;
};

// A piece of a row of pixels in one channel, and those above and below. Other channels follow at `step`.
template <class A>
struct Neighbours {
  const typename A::Pixel *row, *above, *below;
  int64_t channels, step;
};

// A gradient, or a pack of them.
template <class V>
struct Gradient {
  V down, right;
};

template <class V, class A>
INPAINT_INLINE Gradient<V> gradient_at(const Neighbours<A>& from, int64_t channel, int64_t i) {
  i += channel * from.step;
  return {load<V>(from.below + i) - load<V>(from.above + i), load<V>(from.row + i + 1) - load<V>(from.row + i - 1)};
}

// Whether the first is longer, and, where that is unsure, whether to ask the scalar formula.
template <class Mask>
struct Comparison {
  Mask longer, ask;
};

template <class T>
INPAINT_INLINE Comparison<PackMask<T>> compare(const Gradient<Pack<T>>& now, const Gradient<Pack<T>>& best) {
  constexpr T kMargin = 4 * kUnsure<T>;
  const Pack<T> s = now.down * now.down + now.right * now.right;
  const Pack<T> old = best.down * best.down + best.right * best.right;
  // The first NaN counts, as published.
  const PackMask<T> longer = (s > old * (1 + kMargin)) | ((s != s) & (old == old));
  const PackMask<T> same =
      (absolute<T>(now.down) == absolute<T>(best.down)) & (absolute<T>(now.right) == absolute<T>(best.right));
  return {longer, (s >= old * (1 - kMargin)) & ~longer & ~same};
}

// Squared lengths of differences of 8 bits have 17. Less 2^15, so that AVX2 compares them.
struct SquaredLengths {
  Shorts low, carry;  // carry: -1: 2^16 more

  explicit SquaredLengths(const Gradient<Shorts>& of) {
    typedef Pack<uint16_t> Words;
    const Words y = (Words)of.down, x = (Words)of.right, square = (y * y) ^ uint16_t(1 << 15);
    low = (Shorts)(square + x * x);
    carry = low < (Shorts)square;
  }
};

template <>
INPAINT_INLINE Comparison<Shorts> compare<int16_t>(const Gradient<Shorts>& now, const Gradient<Shorts>& best) {
  const SquaredLengths s(now), old(best);
  const Shorts more = old.carry - s.carry;  // in units of 2^16
  // Sums of masks, not masks of masks, which GCC 12 spells out.
  return {more - (s.low > old.low) > 0, ((more | (s.low ^ old.low)) == 0) & ~(now.down == best.down)};
}

// The gradient at pixel i, in the channel where it is longest by the scalar formula.
template <class A>
INPAINT_INLINE void choose_gradient(const Neighbours<A>& from, int64_t i, const GradientRow<A>& to) {
  for (int64_t channel = 0; channel < from.channels; ++channel) {
    const auto now = gradient_at<typename A::Pixel>(from, channel, i);
    if (channel > 0 && !(A::length(now.down, now.right) > A::length(to.down[i], to.right[i]))) continue;
    to.down[i] = now.down, to.right[i] = now.right;
  }
}

// The same at an image's left or right border, where there is no difference to the right.
template <class A>
INPAINT_INLINE void choose_border_gradient(const Neighbours<A>& from, int64_t i, const GradientRow<A>& to) {
  typedef typename A::Pixel Pixel;
  Pixel longest = 0;
  for (int64_t channel = 0; channel < from.channels; ++channel) {
    const int64_t at = i + channel * from.step;
    const Pixel down = from.below[at] - from.above[at];
    // The first NaN counts, as published.
    const bool longer = std::abs(down) > std::abs(longest) || (down != down && longest == longest);
    if (channel == 0 || longer) longest = down;
  }
  to.down[i] = longest, to.right[i] = 0;
}

// The gradients at pixels [0, count) in the channels where they are longest; rows and `to` are padded to whole packs,
// and `unsure` is scratch.
template <class A>
INPAINT_INLINE void find_gradients(const Neighbours<A>& from, int64_t count, SameSizeInt<typename A::Pixel>* unsure,
                                   const GradientRow<A>& to) {
  typedef typename A::Pixel Pixel;
  typedef Pack<Pixel> V;
  if (from.channels == 1) {
    for (int64_t i = 0; i < count; i += kPack<Pixel>) {
      const Gradient<V> only = gradient_at<V>(from, 0, i);
      store(to.down + i, only.down);
      store(to.right + i, only.right);
    }
    return;
  }
  PackMask<Pixel> unsure_seen = {};
  for (int64_t i = 0; i < count; i += kPack<Pixel>) {
    Gradient<V> best = gradient_at<V>(from, 0, i);
    PackMask<Pixel> ask = {};
    for (int64_t channel = 1; channel < from.channels; ++channel) {
      const Gradient<V> now = gradient_at<V>(from, channel, i);
      const auto compared = compare<Pixel>(now, best);
      best.down = compared.longer ? now.down : best.down;
      best.right = compared.longer ? now.right : best.right;
      ask |= compared.ask;
    }
    store(to.down + i, best.down);
    store(to.right + i, best.right);
    store(unsure + i, ask);
    unsure_seen |= ask;
  }
  if (!any_lane(unsure_seen)) return;
  for (int64_t i = 0; i < count; ++i)
    if (unsure[i]) choose_gradient(from, i, to);
}

// ---- Votes -------------------------------------------------------------------------------------------------------

// The square of a gradient's length.
template <class T>
INPAINT_INLINE T squared_length(T down, T right) {
  return down * down + right * right;
}
INPAINT_INLINE float squared_length(int16_t down, int16_t right) {  // each square fits into 16 bits
  return static_cast<float>(static_cast<uint16_t>(down * down) + static_cast<uint16_t>(right * right));
}

// How many of the borders, `flats` flat and `steeps` steep ones, lie not above the gradient. A scalar: only of these
// does GCC 12 make one instruction of the product's upper half.
template <int flats, int steeps>
INPAINT_INLINE int16_t count_passed(int16_t rise, int16_t run, const uint16_t* flat, const uint16_t* steep) {
  int16_t passed = steeps;
#pragma GCC unroll 2
  for (int k = 0; k < flats; ++k) passed += rise > scaled(run, flat[k]);
#pragma GCC unroll 2
  for (int k = 0; k < steeps; ++k) passed -= run > scaled(rise, steep[k]);
  return passed;
}

// Adds them to passed[i] for all gradients.
template <int flats, int steeps>
INPAINT_INLINE void add_passed(const int16_t* __restrict down, const int16_t* __restrict right, int64_t count,
                               const uint16_t* flat, const uint16_t* steep, int16_t* __restrict passed) {
  for (int64_t i = 0; i < count; ++i)
    passed[i] += count_passed<flats, steeps>(absolute(down[i]), absolute(right[i]), flat, steep);
}

// The bins and magnitudes of gradients that passed as many borders; `nine`: bins, whose borders are passed here. One
// loop, so that the roots are computed beside the rest.
template <bool nine>
INPAINT_INLINE void finish_votes(const Borders<EightBit>& borders, const int16_t* __restrict down,
                                 const int16_t* __restrict right, int64_t count, const int16_t* __restrict passed,
                                 int32_t* __restrict bins, float* __restrict magnitude) {
  const uint16_t *flat = borders.flat.data(), *steep = borders.steep.data();
  const int16_t orientations = nine ? 9 : static_cast<int16_t>(borders.orientations);
  const bool diagonal = !nine && borders.diagonal, vertical = !nine && borders.vertical;
  for (int64_t i = 0; i < count; ++i) {
    const int16_t y = down[i], x = right[i], rise = absolute(y), run = absolute(x);
    const bool turned = (static_cast<int16_t>(x ^ y) < 0) & (rise > 0) & (nine || run > 0);
    int16_t below = nine ? count_passed<2, 2>(rise, run, flat, steep) : passed[i];
    // On the diagonal: the upper bin, which is the first one here, but for its mirror image the second.
    below += diagonal & ((rise > run) | (!turned & (rise == run)));
    below += vertical & (run == 0);
    bins[i] = turned ? static_cast<int16_t>(orientations - 1 - below) : below;
    magnitude[i] = std::sqrt(squared_length(y, x));
  }
}

template <class A>
INPAINT_INLINE void find_votes(const Borders<A>& borders, const typename A::T* __restrict down,
                               const typename A::T* __restrict right, int64_t count, SameSizeInt<typename A::Pixel>*,
                               LaneInt<typename A::T>* bins, typename A::T* __restrict magnitude) {
  find_bins(borders, down, right, count, bins);
  for (int64_t i = 0; i < count; ++i) magnitude[i] = std::sqrt(squared_length(down[i], right[i]));
}

INPAINT_INLINE void find_votes(const Borders<EightBit>& borders, const int16_t* down, const int16_t* right,
                               int64_t count, int16_t* passed, int32_t* bins, float* magnitude) {
  const uint16_t *flat = borders.flat.data(), *steep = borders.steep.data();
  const int64_t flats = static_cast<int64_t>(borders.flat.size()), steeps = static_cast<int64_t>(borders.steep.size());
  if (borders.orientations == 9) return finish_votes<true>(borders, down, right, count, nullptr, bins, magnitude);
  std::fill(passed, passed + count, int16_t(0));
  int64_t k = 0;
  for (; k + 2 <= flats; k += 2) add_passed<2, 2>(down, right, count, flat + k, steep + k, passed);
  if (k < flats) add_passed<1, 1>(down, right, count, flat + k, steep + k, passed), ++k;
  if (k < steeps) add_passed<0, 1>(down, right, count, flat + k, steep + k, passed);
  finish_votes<false>(borders, down, right, count, passed, bins, magnitude);
}

// ---- Histograms --------------------------------------------------------------------------------------------------

// Lanes below `count`.
template <class T>
INPAINT_INLINE PackMask<T> first_lanes(int64_t count) {
  LaneInt<T> lanes[kPack<T>];
  for (int lane = 0; lane < kPack<T>; ++lane) lanes[lane] = lane;
  return load<PackMask<T>>(lanes) < static_cast<LaneInt<T>>(count);
}

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
  Pack<float> pairs[4], fours[2];  // of sums a and b: a0 b0 a1 b1 in each half; of four sums: a b c d
  for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shufflevector(sums[2 * i], sums[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
               __builtin_shufflevector(sums[2 * i], sums[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  for (int i = 0; i < 2; ++i)
    fours[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  const Pack<float> all = __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                          __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
  store(to, all * scale);
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
  Pack<T> sums[bins] = {};
  for (int64_t top = 0; top < (whole ? kTogether : rows); top += kTogether) {
    Pack<T> parts[bins] = {};
    const int64_t bottom = whole ? kTogether : std::min(rows, top + kTogether);
    // Unrolled, it would keep some of the sums in memory (measured with AVX2: 3 to 7 % slower).
#pragma GCC unroll 1
    for (int64_t y = top; y < bottom; ++y)
      for (int64_t x = 0; x < (whole ? 8 : columns); x += kPack<T>) {
        const int64_t i = y * votes.stride + left + x;
        PackMask<T> bin = load<PackMask<T>>(votes.bin + i);
        const PackMask<T> magnitude = load<PackMask<T>>(votes.magnitude + i);
        if (!whole) bin = first_lanes<T>(columns - x) ? bin : PackMask<T>{} - 1;
#pragma GCC unroll 16
        for (int k = 0; k < bins; ++k) parts[k] += (Pack<T>)(magnitude & (bin == static_cast<Int>(first + k)));
      }
    for (int k = 0; k < bins; ++k) sums[k] = whole ? parts[k] : sums[k] + parts[k];
  }
  int k = 0;
  if constexpr (sizeof(T) == 4 && bins >= kPack<T>)
    for (; k + kPack<T> <= bins; k += kPack<T>) store_sums(sums + k, share, histogram + first + k);
  for (; k < bins; ++k) histogram[first + k] = sum_of_pack<T>(sums[k]) * share;
}

template <bool whole, class T>
INPAINT_INLINE void fill_histogram_body(const Votes<T>& votes, int64_t left, int64_t rows, int64_t columns,
                                        int64_t orientations, T* histogram) {
  const T share = T(1) / static_cast<T>(rows * columns);
  // Nines and fours: as many sums as fit into 16 registers with their operands. A first bin that is a constant saves
  // setting nine constants for every cell.
  if (orientations == 9) return fill_bins<9, whole>(votes, left, rows, columns, 0, share, histogram);
  int64_t first = 0;
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

template <class T>
INPAINT_INLINE T sum_of_squares(const T* from, int64_t count) {
  Pack<T> squares = {};
  int64_t i = 0;
  for (; i + kPack<T> <= count; i += kPack<T>) {
    const Pack<T> v = load<Pack<T>>(from + i);
    squares += v * v;
  }
  T sum = sum_of_pack<T>(squares);
  for (; i < count; ++i) sum += from[i] * from[i];
  return sum;
}

// What a cell adds to the norm of its blocks.
template <class T>
INPAINT_INLINE T energy_of(const T* histogram, int64_t orientations, BlockNorm norm) {
  if (norm == BlockNorm::l2 || norm == BlockNorm::l2_hys) return sum_of_squares(histogram, orientations);
  T sum = 0;
  for (int64_t k = 0; k < orientations; ++k) sum += histogram[k];
  return sum;
}

template <class T>
INPAINT_INLINE Pack<T> at_most(Pack<T> v, T most) {
  return v > most ? Pack<T>{} + most : v;
}

// Stores `count` lanes, and the others too where they do not reach beyond the end: they are written again.
template <class T>
INPAINT_INLINE void store_before(const T* end, T* to, Pack<T> v, int64_t count) {
  if (to + kPack<T> <= end)
    store(to, v);
  else
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = v[lane];
}

// The block's values, `packs` whole packs and a part of one in each of `rows` rows, stay in registers until their norm
// is known (measured with AVX2, blocks of 3 x 3 cells of 9 bins: 24 ns instead of 31 in a large photo).
template <int rows, int packs, class T>
struct SmallBlock {
  Pack<T> values[rows][packs + 1];

  // Clips `scale` times the histograms; returns the sum of their squares.
  INPAINT_INLINE T clip(const T* from, int64_t step, T scale, T most, PackMask<T> rest) {
    Pack<T> squares[2] = {};  // two: a sum waits for the one before
#pragma GCC unroll 4
    for (int y = 0; y < rows; ++y)
#pragma GCC unroll 4
      for (int i = 0; i <= packs; ++i) {
        const Pack<T> v = values[y][i] = at_most(load<Pack<T>>(from + y * step + i * kPack<T>) * scale, most);
        const Pack<T> own = i < packs ? v : (Pack<T>)((PackMask<T>)v & rest);
        squares[i % 2] += own * own;
      }
    return sum_of_pack<T>(squares[0] + squares[1]);
  }

  INPAINT_INLINE void write(T scale, int64_t width, T* to, const T* end) const {
#pragma GCC unroll 4
    for (int y = 0; y < rows; ++y)
#pragma GCC unroll 4
      for (int i = 0; i <= packs; ++i) {
        T* const at = to + y * width + i * kPack<T>;
        const Pack<T> v = values[y][i] * scale;
        if (y + 1 < rows || i < packs)
          store(at, v);
        else
          store_before(end, at, v, width % kPack<T>);
      }
  }
};

// A block of any size: writes `scale` times its histograms, clipped, and returns the sum of their squares.
template <class T>
INPAINT_INLINE T clip_block(const T* from, int64_t step, int64_t rows, int64_t width, T scale, T most, PackMask<T> rest,
                            T* to, const T* end) {
  Pack<T> squares = {};
  for (int64_t y = 0; y < rows; ++y, from += step, to += width) {
    int64_t i = 0;
    for (; i + kPack<T> <= width; i += kPack<T>) {
      const Pack<T> v = at_most(load<Pack<T>>(from + i) * scale, most);
      squares += v * v;
      store(to + i, v);
    }
    if (i == width) continue;
    const Pack<T> v = at_most(load<Pack<T>>(from + i) * scale, most), own = (Pack<T>)((PackMask<T>)v & rest);
    squares += own * own;
    store_before(end, to + i, v, width - i);
  }
  return sum_of_pack<T>(squares);
}

// One row of blocks [blocks across][rows][columns][orientations], of histograms [rows][cells across][orientations] and
// the cells' energies. Histograms are padded by a pack.
template <class T>
INPAINT_INLINE void normalise_blocks(const BlockShape& shape, const T* histograms, const T* energy, T* to) {
  // Roots and quotients of as many blocks at once: one by one each would wait for the one before.
  constexpr int64_t kTogether = 32;
  const T eps = static_cast<T>(kBlockEps);
  const int64_t step = shape.cells_across * shape.orientations;
  const int64_t width = shape.columns * shape.orientations, length = shape.rows * width;
  const bool hys = shape.norm == BlockNorm::l2_hys, square = hys || shape.norm == BlockNorm::l2;
  const T most = hys ? T(0.2) : std::numeric_limits<T>::infinity();
  const bool small = shape.rows == 3 && width / kPack<T> == 3 && width % kPack<T> != 0;
  const T* const end = to + shape.blocks_across * length;
  const PackMask<T> rest = first_lanes<T>(width % kPack<T>);
  for (int64_t first = 0; first < shape.blocks_across; first += kTogether) {
    const int64_t blocks = std::min(kTogether, shape.blocks_across - first);
    T scale[kTogether], norm[kTogether] = {};
    for (int64_t y = 0; y < shape.rows; ++y)
      for (int64_t x = 0; x < shape.columns; ++x)
        for (int64_t b = 0; b < blocks; ++b) norm[b] += energy[y * shape.cells_across + first + b + x];
    for (int64_t b = 0; b < kTogether; ++b) scale[b] = T(1) / (square ? std::sqrt(norm[b] + eps * eps) : norm[b] + eps);
    const T* from = histograms + first * shape.orientations;
    for (int64_t b = 0; b < blocks; ++b, from += shape.orientations, to += length) {
      if (hys && small) {
        SmallBlock<3, 3, T> block;
        const T clipped = block.clip(from, step, scale[b], most, rest);
        block.write(T(1) / std::sqrt(clipped + eps * eps), width, to, end);
        continue;
      }
      const T clipped = clip_block(from, step, shape.rows, width, scale[b], most, rest, to, end);
      const T again = T(1) / std::sqrt(clipped + eps * eps);
      for (int64_t i = 0; hys && i < length; ++i) to[i] *= again;
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
