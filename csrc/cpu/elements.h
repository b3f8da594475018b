// Elements of maps in memory - float, double and the two types of 16 bits - as vectors of the type that sums are in.
#pragma once

#include "simd.h"

namespace inpaint {

// Memory types of 16 bits; sums are in float.
struct HalfBits {
  uint16_t bits;
};
struct BFloatBits {
  uint16_t bits;
};

// Elements are converted, and all but the products of the convolutions computed, as vectors of this many.
constexpr int kChunk = 8;

template <class T>
using Chunk = typename VectorOf<T, kChunk * sizeof(T)>::type;
template <class T>
using ChunkMask = typename VectorOf<LaneInt<T>, kChunk * sizeof(T)>::type;

typedef uint16_t ShortChunk __attribute__((vector_size(2 * kChunk)));
typedef uint32_t WordChunk __attribute__((vector_size(4 * kChunk)));

template <class T>
INPAINT_INLINE Chunk<T> load_chunk(const T* from) {
  return load<Chunk<T>>(from);
}

template <class T>
INPAINT_INLINE Chunk<float> load_chunk(const BFloatBits* from) {
  return (Chunk<float>)(__builtin_convertvector(load<ShortChunk>(from), WordChunk) << 16);
}

template <class T>
INPAINT_INLINE Chunk<float> load_chunk(const HalfBits* from) {
  const WordChunk half = __builtin_convertvector(load<ShortChunk>(from), WordChunk);
  const WordChunk magnitude = half & 0x7fffu;
  // The exponent's bias differs by 112; as a product, that is right for subnormal numbers too.
  const WordChunk finite = (WordChunk)((Chunk<float>)(magnitude << 13) * 0x1p112f);
  const WordChunk value = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : finite;
  return (Chunk<float>)(value | ((half & 0x8000u) << 16));
}

template <class T>
INPAINT_INLINE void store_chunk(T* to, Chunk<T> v) {
  store(to, v);
}

template <class T>
INPAINT_INLINE void store_chunk(BFloatBits* to, Chunk<float> v) {
  const WordChunk word = (WordChunk)v;
  const WordChunk rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;  // to nearest, ties to even
  store(to, __builtin_convertvector(v == v ? rounded : WordChunk{} + 0x7fc0u, ShortChunk));
}

template <class T>
INPAINT_INLINE void store_chunk(HalfBits* to, Chunk<float> v) {
  const WordChunk word = (WordChunk)v, sign = (word & 0x80000000u) >> 16, magnitude = word & 0x7fffffffu;
  // Adding a half leaves what a subnormal half can hold in the lowest bits, rounded to nearest even by the addition.
  const WordChunk subnormal = (WordChunk)((Chunk<float>)magnitude + 0.5f) - 0x3f000000u;
  const WordChunk normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  WordChunk half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? WordChunk{} + 0x7c00u : half;  // rounds to infinity
  half = magnitude > 0x7f800000u ? WordChunk{} + 0x7e00u : half;
  store(to, __builtin_convertvector(half | sign, ShortChunk));
}

template <class T, class Element>
INPAINT_INLINE T load_one(const Element* from) {
  if constexpr (std::is_same_v<T, Element>) {
    return *from;
  } else if constexpr (std::is_same_v<Element, BFloatBits>) {
    const uint32_t word = uint32_t{from->bits} << 16;
    return load<T>(&word);
  } else {
    Element lanes[kChunk] = {*from};
    return load_chunk<T>(lanes)[0];
  }
}

template <class T, class Element>
INPAINT_INLINE void store_one(Element* to, T value) {
  if constexpr (std::is_same_v<T, Element>) {
    *to = value;
  } else {
    Element lanes[kChunk];
    store_chunk<T>(lanes, Chunk<T>{} + value);
    *to = lanes[0];
  }
}

// Copies kChunk elements, converted if the types differ.
template <class T, class To, class From>
INPAINT_INLINE void copy_chunk(To* to, const From* from) {
  if constexpr (std::is_same_v<To, From>)
    std::memcpy(to, from, kChunk * sizeof(To));
  else
    store_chunk<T>(to, load_chunk<T>(from));
}

}  // namespace inpaint
