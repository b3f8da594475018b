// Vector loops of the CPU kernels, compiled for three instruction sets and chosen when the library is loaded.
//
// A function marked INPAINT_CLONES is compiled once per instruction set; what it calls must be INPAINT_INLINE.
// Reductions keep 64-byte accumulators explicitly, so the order of their sums is the same on every machine and for any
// number of threads.
#pragma once

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

// exp(x) for x <= 0, 0 below the smallest normal result, NaN for NaN. x = n ln 2 + r, |r| <= ln(2) / 2, and the Taylor
// polynomial of exp(r): relative error below 1e-7 (float, degree 7) and 4e-16 (double, degree 13).
template <class T>
INPAINT_INLINE Vector<T> exp_nonpositive(Vector<T> x) {
  typedef LaneInt<T> Int;
  typedef typename VectorOf<Int>::type IntVector;
  constexpr bool is_float = sizeof(T) == 4;
  constexpr int degree = is_float ? 7 : 13;
  constexpr int mantissa_bits = is_float ? 23 : 52;
  constexpr T lowest = is_float ? T(-87.33) : T(-708.39);
  constexpr T round_to_int = is_float ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^mantissa_bits
  constexpr T ln2_high = is_float ? T(0.693359375) : T(0.693147180369123816490);
  constexpr T ln2_low = is_float ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  constexpr T inverse_factorial[] = {
      1.0,        1.0,         0.5,          1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  const IntVector underflow = x < lowest;
  x = underflow ? Vector<T>{} + lowest : x;
  const Vector<T> shifted = x * T(1.44269504088896340736) + round_to_int;
  const Vector<T> n = shifted - round_to_int;
  const Vector<T> r = (x - n * ln2_high) - n * ln2_low;
  Vector<T> p = Vector<T>{} + inverse_factorial[degree];
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) p = p * r + inverse_factorial[i];
  const IntVector power = (IntVector)shifted << mantissa_bits;
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

// row[i] = exp(row[i] - max), times keep[i] where keep is given; their sum before `keep`. Rows whose results are all 0
// are left as they are: `any` tells.
template <class T>
INPAINT_INLINE T exp_row_body(T* row, const T* keep, T max, int64_t length, bool* any) {
  // A row of a saturated softmax is mostly zero: look first, most rows are then read once and not written.
  constexpr T lowest = sizeof(T) == 4 ? T(-87.33) : T(-708.39);
  typedef typename VectorOf<LaneInt<T>>::type IntVector;
  IntVector alive = {};
  int64_t i = 0;
  for (; i + kLanes<T> <= length; i += kLanes<T>) alive |= ~(load<Vector<T>>(row + i) - max < lowest);
  LaneInt<T> some = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) some |= alive[lane];
  for (; i < length; ++i) some |= !(row[i] - max < lowest);
  *any = some != 0;
  if (!*any) return 0;
  Vector<T> sum = {};
  for (i = 0; i + kLanes<T> <= length; i += kLanes<T>) {
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
