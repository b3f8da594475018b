// Vector loops of the CPU kernels, compiled for three instruction sets and chosen when the library is loaded.
//
// A function marked INPAINT_CLONES is compiled once per instruction set; what it calls must be INPAINT_INLINE.
// Reductions keep 64-byte accumulators explicitly, so the order of their sums is the same on every machine and for any
// number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define INPAINT_X86_VERSIONS 1
#define INPAINT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define INPAINT_CLONES
#endif
#define INPAINT_INLINE inline __attribute__((always_inline))
#define INPAINT_INLINE_LAMBDA __attribute__((always_inline))

namespace inpaint {

// ---- Vectors -----------------------------------------------------------------------------------------------------

template <class T>
constexpr int kLanes = 64 / sizeof(T);

template <class T, int bytes = 64>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using LaneInt = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class V, class T>
INPAINT_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
INPAINT_INLINE void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// The first `count` lanes of memory, `other` in the rest.
template <class T>
INPAINT_INLINE Vector<T> load_some(const T* from, int count, T other) {
  T lanes[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i < count ? from[i] : other;
  return load<Vector<T>>(lanes);
}

template <class T>
INPAINT_INLINE void store_some(T* to, Vector<T> v, int count) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

template <class V>
INPAINT_INLINE bool any_lane(V mask) {
  uint64_t words[sizeof(V) / 8], any = 0;
  std::memcpy(words, &mask, sizeof words);
  for (const uint64_t word : words) any |= word;
  return any != 0;
}

template <class T>
INPAINT_INLINE T sum_of_lanes(Vector<T> v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

template <class T>
INPAINT_INLINE T max_of_lanes(Vector<T> v) {
  T max = v[0];
  for (int i = 1; i < kLanes<T>; ++i) max = v[i] > max ? v[i] : max;
  return max;
}

// Below this exp is not a normal number and counts as 0.
template <class T>
constexpr T kLowestExponent = sizeof(T) == 4 ? T(-87.33) : T(-708.39);

// What exp is made of: x = n ln 2 + r, |r| <= ln(2) / 2, and the Taylor polynomial of exp(r).
template <class T>
struct ExponentSeries {
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int kDegree = kIsFloat ? 7 : 13;
  static constexpr int kMantissaBits = kIsFloat ? 23 : 52;
  static constexpr T kRoundToInt = kIsFloat ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^kMantissaBits
  static constexpr T kLn2High = kIsFloat ? T(0.693359375) : T(0.693147180369123816490);
  static constexpr T kLn2Low = kIsFloat ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  static constexpr T kInverseFactorial[] = {
      1.0,        1.0,         0.5,          1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

// exp(x) for x <= 0, 0 below the smallest normal result, NaN for NaN: relative error below 1e-7 (float, degree 7) and
// 4e-16 (double, degree 13).
template <class T>
INPAINT_INLINE Vector<T> exp_nonpositive(Vector<T> x) {
  typedef LaneInt<T> Int;
  typedef typename VectorOf<Int>::type IntVector;
  typedef ExponentSeries<T> E;
  constexpr T lowest = kLowestExponent<T>;
  const IntVector underflow = x < lowest;
  x = underflow ? Vector<T>{} + lowest : x;
  const Vector<T> shifted = x * T(1.44269504088896340736) + E::kRoundToInt;
  const Vector<T> n = shifted - E::kRoundToInt;
  const Vector<T> r = (x - n * E::kLn2High) - n * E::kLn2Low;
  Vector<T> p = Vector<T>{} + E::kInverseFactorial[E::kDegree];
#pragma GCC unroll 16
  for (int i = E::kDegree - 1; i >= 0; --i) p = p * r + E::kInverseFactorial[i];
  const IntVector power = (IntVector)shifted << E::kMantissaBits;
  const IntVector scaled = (IntVector)p + power;
  return underflow ? Vector<T>{} : (Vector<T>)scaled;
}

// ---- Rows --------------------------------------------------------------------------------------------------------

// to[i] = sum over the non-null sources of source[i], in their order.
template <class T>
INPAINT_INLINE void sum_rows_body(T* __restrict to, const T* const* sources, int count, int64_t length) {
  const T* rows[3];
  int used = 0;
  int next = 0;
  for (; next < count && used < 3; ++next)
    if (sources[next]) rows[used++] = sources[next];
  if (used == 3) {
    for (int64_t i = 0; i < length; ++i) to[i] = rows[0][i] + rows[1][i] + rows[2][i];
  } else if (used == 2) {
    for (int64_t i = 0; i < length; ++i) to[i] = rows[0][i] + rows[1][i];
  } else if (used == 1) {
    for (int64_t i = 0; i < length; ++i) to[i] = rows[0][i];
  } else {
    for (int64_t i = 0; i < length; ++i) to[i] = 0;
  }
  for (; next < count; ++next)
    if (const T* row = sources[next])
      for (int64_t i = 0; i < length; ++i) to[i] += row[i];
}

INPAINT_CLONES inline void sum_rows(float* to, const float* const* sources, int count, int64_t length) {
  sum_rows_body(to, sources, count, length);
}
INPAINT_CLONES inline void sum_rows(double* to, const double* const* sources, int count, int64_t length) {
  sum_rows_body(to, sources, count, length);
}

// Rows that are read by index: row i of term j starts at from[j] + index[j][i] * stride; a negative index is no row.
template <class T>
struct ListedRows {
  const T* const* from;
  const int32_t* const* index;
  int count;  // of terms
  int64_t stride;
};

// Row i of to = the sum over the terms of their row i, in their order, times `factor` where that is given; for i in
// [begin, end). One call for a block of rows: with 64 keys a row is four vectors, less than a call costs.
template <class T>
INPAINT_INLINE void sum_listed_rows_body(T* to, int64_t to_stride, const ListedRows<T>& terms, int64_t begin,
                                         int64_t end, const T* factor, int64_t length) {
  constexpr int lanes = kLanes<T>;
  const int64_t whole = length / lanes * lanes, stride = terms.stride;
  const int count = terms.count, leading = std::min(count, 3);
  const T* from[3] = {};
  const int32_t* index[3] = {};
  for (int j = 0; j < leading; ++j) from[j] = terms.from[j], index[j] = terms.index[j];
  for (int64_t i = begin; i < end; ++i, to += to_stride) {
    const T* rows[3];
    int used = 0;
    for (int j = 0; j < leading; ++j)
      if (const int32_t row = index[j][i]; row >= 0) rows[used++] = from[j] + row * stride;
    if (used == 3 && count == 3) {
      const T *a = rows[0], *b = rows[1], *c = rows[2];
      for (int64_t u = 0; u < whole; u += lanes) {
        const Vector<T> sum = load<Vector<T>>(a + u) + load<Vector<T>>(b + u) + load<Vector<T>>(c + u);
        store(to + u, factor ? sum * load<Vector<T>>(factor + u) : sum);
      }
      for (int64_t u = whole; u < length; ++u) to[u] = (a[u] + b[u] + c[u]) * (factor ? factor[u] : T(1));
      continue;
    }
    for (int64_t u = 0; u < length; ++u) to[u] = used > 0 ? rows[0][u] : T(0);
    for (int j = 1; j < used; ++j)
      for (int64_t u = 0; u < length; ++u) to[u] += rows[j][u];
    for (int j = 3; j < count; ++j) {
      const int32_t row = terms.index[j][i];
      for (int64_t u = 0; row >= 0 && u < length; ++u) to[u] += terms.from[j][row * stride + u];
    }
    for (int64_t u = 0; factor && u < length; ++u) to[u] *= factor[u];
  }
}

INPAINT_CLONES inline void sum_listed_rows(float* to, int64_t to_stride, const ListedRows<float>& terms, int64_t begin,
                                           int64_t end, const float* factor, int64_t length) {
  sum_listed_rows_body(to, to_stride, terms, begin, end, factor, length);
}
INPAINT_CLONES inline void sum_listed_rows(double* to, int64_t to_stride, const ListedRows<double>& terms,
                                           int64_t begin, int64_t end, const double* factor, int64_t length) {
  sum_listed_rows_body(to, to_stride, terms, begin, end, factor, length);
}

// to[i] *= factor[i].
template <class T>
INPAINT_INLINE void multiply_row_body(T* __restrict to, const T* __restrict factor, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] *= factor[i];
}

INPAINT_CLONES inline void multiply_row(float* to, const float* factor, int64_t length) {
  multiply_row_body(to, factor, length);
}
INPAINT_CLONES inline void multiply_row(double* to, const double* factor, int64_t length) {
  multiply_row_body(to, factor, length);
}

// to[i] = sum over the rows of weights[t] * rows[t][i], in their order.
template <class T>
INPAINT_INLINE void weighted_sum_body(T* __restrict to, const T* const* rows, const T* weights, int count,
                                      int64_t length) {
  int next = std::min(count, 4);
  if (next == 4) {
    for (int64_t i = 0; i < length; ++i)
      to[i] = weights[0] * rows[0][i] + weights[1] * rows[1][i] + weights[2] * rows[2][i] + weights[3] * rows[3][i];
  } else {
    next = std::min(count, 1);
    for (int64_t i = 0; i < length; ++i) to[i] = next > 0 ? weights[0] * rows[0][i] : T(0);
  }
  for (; next < count; ++next)
    for (int64_t i = 0; i < length; ++i) to[i] += weights[next] * rows[next][i];
}

INPAINT_CLONES inline void weighted_sum(float* to, const float* const* rows, const float* weights, int count,
                                        int64_t length) {
  weighted_sum_body(to, rows, weights, count, length);
}
INPAINT_CLONES inline void weighted_sum(double* to, const double* const* rows, const double* weights, int count,
                                        int64_t length) {
  weighted_sum_body(to, rows, weights, count, length);
}

// to[i] += weight * from[i].
template <class T>
INPAINT_INLINE void add_scaled_row_body(T* __restrict to, const T* __restrict from, T weight, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] += weight * from[i];
}

INPAINT_CLONES inline void add_scaled_row(float* to, const float* from, float weight, int64_t length) {
  add_scaled_row_body(to, from, weight, length);
}
INPAINT_CLONES inline void add_scaled_row(double* to, const double* from, double weight, int64_t length) {
  add_scaled_row_body(to, from, weight, length);
}

// Whether exp(row[i] - max) is not 0 for any i; a NaN is not.
template <class T>
INPAINT_INLINE bool exp_is_nonzero(const T* row, T max, int64_t length) {
  typedef typename VectorOf<LaneInt<T>>::type IntVector;
  IntVector alive = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= length; i += kLanes<T>) alive |= ~(load<Vector<T>>(row + i) - max < kLowestExponent<T>);
  LaneInt<T> some = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) some |= alive[lane];
  for (; i < length; ++i) some |= !(row[i] - max < kLowestExponent<T>);
  return some != 0;
}

// to[i] = from[i] * scale[i] + bias[i]; the largest of them (-inf for none). NaN is stored but not the largest.
template <class T>
INPAINT_INLINE T affine_max_body(T* __restrict to, const T* __restrict from, const T* __restrict scale,
                                 const T* __restrict bias, int64_t length) {
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  Vector<T> max = Vector<T>{} + lowest;
  int64_t i = 0;
  for (; i + kLanes<T> <= length; i += kLanes<T>) {
    const Vector<T> y = load<Vector<T>>(from + i) * load<Vector<T>>(scale + i) + load<Vector<T>>(bias + i);
    store(to + i, y);
    max = y > max ? y : max;
  }
  T largest = max_of_lanes<T>(max);
  for (; i < length; ++i) {
    to[i] = from[i] * scale[i] + bias[i];
    largest = to[i] > largest ? to[i] : largest;
  }
  return largest;
}

INPAINT_CLONES inline float affine_max(float* to, const float* from, const float* scale, const float* bias,
                                       int64_t length) {
  return affine_max_body(to, from, scale, bias, length);
}
INPAINT_CLONES inline double affine_max(double* to, const double* from, const double* scale, const double* bias,
                                        int64_t length) {
  return affine_max_body(to, from, scale, bias, length);
}

// The same, and whether any of them counts in a softmax whose largest logit is at least `seen`: in a saturated one most
// rows do not. A NaN counts.
template <class T>
INPAINT_INLINE T affine_alive_body(T* __restrict to, const T* __restrict from, const T* __restrict scale,
                                   const T* __restrict bias, int64_t length, T seen, bool* alive) {
  const T largest = affine_max_body(to, from, scale, bias, length);
  *alive = exp_is_nonzero(to, seen, length);
  return largest;
}

INPAINT_CLONES inline float affine_alive(float* to, const float* from, const float* scale, const float* bias,
                                         int64_t length, float seen, bool* alive) {
  return affine_alive_body(to, from, scale, bias, length, seen, alive);
}
INPAINT_CLONES inline double affine_alive(double* to, const double* from, const double* scale, const double* bias,
                                          int64_t length, double seen, bool* alive) {
  return affine_alive_body(to, from, scale, bias, length, seen, alive);
}

// row[i] = exp(row[i] - max), times keep[i] where keep is given; their sum before `keep`. Rows whose results are all 0
// are left as they are: `any` tells.
template <class T>
INPAINT_INLINE T exp_row_body(T* row, const T* keep, T max, int64_t length, bool* any) {
  *any = exp_is_nonzero(row, max, length);
  if (!*any) return 0;
  Vector<T> sum = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= length; i += kLanes<T>) {
    const Vector<T> e = exp_nonpositive<T>(load<Vector<T>>(row + i) - max);
    sum += e;
    store(row + i, keep ? e * load<Vector<T>>(keep + i) : e);
  }
  if (const int rest = static_cast<int>(length - i)) {
    const Vector<T> e = exp_nonpositive<T>(load_some(row + i, rest, -std::numeric_limits<T>::infinity()) - max);
    sum += e;
    store_some<T>(row + i, keep ? e * load_some(keep + i, rest, T(0)) : e, rest);
  }
  return sum_of_lanes<T>(sum);
}

INPAINT_CLONES inline float exp_row(float* row, const float* keep, float max, int64_t length, bool* any) {
  return exp_row_body(row, keep, max, length, any);
}
INPAINT_CLONES inline double exp_row(double* row, const double* keep, double max, int64_t length, bool* any) {
  return exp_row_body(row, keep, max, length, any);
}

// sum of a[i] * b[i], in a fixed order.
template <class T>
INPAINT_INLINE T dot_row_body(const T* a, const T* b, int64_t length) {
  Vector<T> sum = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= length; i += kLanes<T>) sum += load<Vector<T>>(a + i) * load<Vector<T>>(b + i);
  T total = sum_of_lanes<T>(sum);
  for (; i < length; ++i) total += a[i] * b[i];
  return total;
}

INPAINT_CLONES inline float dot_row(const float* a, const float* b, int64_t length) {
  return dot_row_body(a, b, length);
}
INPAINT_CLONES inline double dot_row(const double* a, const double* b, int64_t length) {
  return dot_row_body(a, b, length);
}

// row[i] = row[i] * scale * (gradient[i] - mean) * factor[i].
template <class T>
INPAINT_INLINE void softmax_gradient_row_body(T* __restrict row, const T* __restrict gradient,
                                              const T* __restrict factor, T scale, T mean, int64_t length) {
  for (int64_t i = 0; i < length; ++i) row[i] *= scale * (gradient[i] - mean) * factor[i];
}

INPAINT_CLONES inline void softmax_gradient_row(float* row, const float* gradient, const float* factor, float scale,
                                                float mean, int64_t length) {
  softmax_gradient_row_body(row, gradient, factor, scale, mean, length);
}
INPAINT_CLONES inline void softmax_gradient_row(double* row, const double* gradient, const double* factor, double scale,
                                                double mean, int64_t length) {
  softmax_gradient_row_body(row, gradient, factor, scale, mean, length);
}

}  // namespace inpaint
