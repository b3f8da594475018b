// Stands in for the CUDA toolkit's header of this name: half precision.
#pragma once

#include "narrow_float.h"

namespace emulation {

struct Half {
  static uint16_t from_float(float value) {
    const uint32_t sign = same_bits<uint32_t>(value) >> 16 & 0x8000;
    const uint32_t magnitude = same_bits<uint32_t>(value) & 0x7fffffff;
    uint32_t bits;
    if (magnitude > 0x7f800000) return 0x7fff;  // NaN
    if (magnitude >= 0x477ff000) {              // 65520, halfway between the largest half and the next, and beyond
      bits = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: the sum's last bit stands for 2^-24, so the addition rounds
      bits = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - same_bits<uint32_t>(0.5f);
    } else {  // another exponent bias, 13 bits less
      bits = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    return static_cast<uint16_t>(sign | bits);
  }
  static float to_float(uint16_t value) {
    const uint32_t sign = (value & 0x8000u) << 16;
    const uint32_t magnitude = value & 0x7fffu;
    if (magnitude >= 0x7c00) return same_bits<float>(sign | 0x7f800000 | magnitude << 13);  // inf and NaN
    if (magnitude >= 0x0400) return same_bits<float>(sign | ((magnitude << 13) + 0x38000000));
    return same_bits<float>(sign | same_bits<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  }
};

}  // namespace emulation

using __half = emulation::NarrowFloat<emulation::Half>;
using __half2 = emulation::NarrowFloatPair<emulation::Half>;
using half = __half;
using half2 = __half2;

inline __half __float2half_rn(float value) { return value; }
inline __half __float2half(float value) { return value; }
inline float __half2float(__half value) { return value; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
