// 16-bit floating types: what cuda_fp16.h and cuda_bf16.h share.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda_runtime.h"

namespace emulation {

// A double as a float that rounds on to any 16-bit type as the double itself would: inexact results get an odd last
// bit.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const uint32_t bits = same_bits<uint32_t>(nearest);
  if (nearest == value || value != value || (bits & 1)) return nearest;
  return same_bits<float>(std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? bits - 1 : bits + 1);
}

// A number of 16 bits that converts as `Format` says: to and from float, round to nearest even. Its operators round
// every result, as CUDA's do.
template <class Format>
struct NarrowFloat {
  uint16_t bits;

  NarrowFloat() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  NarrowFloat(T value) {
    if constexpr (std::is_same_v<T, float>)
      bits = Format::from_float(value);
    else
      bits = Format::from_float(round_to_odd(static_cast<double>(value)));
  }
  operator float() const { return Format::to_float(bits); }

  friend NarrowFloat operator+(NarrowFloat a, NarrowFloat b) { return float{a} + float{b}; }
  friend NarrowFloat operator-(NarrowFloat a, NarrowFloat b) { return float{a} - float{b}; }
  friend NarrowFloat operator*(NarrowFloat a, NarrowFloat b) { return float{a} * float{b}; }
  friend NarrowFloat operator/(NarrowFloat a, NarrowFloat b) { return float{a} / float{b}; }
};

template <class Format>
struct alignas(4) NarrowFloatPair {
  NarrowFloat<Format> x, y;
};

}  // namespace emulation
