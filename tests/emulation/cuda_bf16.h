// Stands in for the CUDA toolkit's header of this name: bfloat16.
#pragma once

#include "narrow_float.h"

namespace emulation {

struct Bfloat16 {
  static uint16_t from_float(float value) {
    const uint32_t bits = same_bits<uint32_t>(value);
    if (value != value) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static float to_float(uint16_t value) { return same_bits<float>(uint32_t{value} << 16); }
};

}  // namespace emulation

using __nv_bfloat16 = emulation::NarrowFloat<emulation::Bfloat16>;
using __nv_bfloat162 = emulation::NarrowFloatPair<emulation::Bfloat16>;

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }
