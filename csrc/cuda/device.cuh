// What the CUDA kernels of several ops share.
#pragma once

#include <type_traits>

#include "../common.h"
#include "ptx.cuh"

namespace inpaint {
namespace {

constexpr int kWarp = 32;
constexpr int kQuad = 4;

// The type of the scores of maps of type V.
template <class V>
using ScoreType = std::conditional_t<std::is_same_v<V, double>, double, float>;

// Blocks in y or z, for loops that stride by them.
inline unsigned grid_y(int64_t count) {
  constexpr int64_t kMostBlocks = 65535;
  return static_cast<unsigned>(count < kMostBlocks ? count : kMostBlocks);
}

// ---- Four elements -----------------------------------------------------------------------------------------------

template <class T>
struct alignas(kQuad * sizeof(T) < 16 ? kQuad * sizeof(T) : 16) Quad {
  T at[kQuad];
};

template <class T>
__device__ __forceinline__ Quad<T> load_quad(const T* address) {
  return *reinterpret_cast<const Quad<T>*>(address);
}

template <class T>
__device__ __forceinline__ void store_quad(T* address, const Quad<T>& values) {
  *reinterpret_cast<Quad<T>*>(address) = values;
}

// ---- Warps -------------------------------------------------------------------------------------------------------

// The sum of a value over a warp, in every lane.
template <class T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// ---- Exponentials ------------------------------------------------------------------------------------------------

// exp(value - maximum) of a value that is not larger. In float three instructions: the hardware's error grows with the
// exponent, but less than the result shrinks, so it is below 1e-7 of 1. What is below 1e-38 is 0.
__device__ __forceinline__ float exp_of_difference(float value, float maximum) {
  constexpr float kLog2OfE = 1.4426950408889634f;
  return approximate_power_of_two((value - maximum) * kLog2OfE);
}
__device__ __forceinline__ double exp_of_difference(double value, double maximum) { return exp(value - maximum); }

}  // namespace
}  // namespace inpaint
