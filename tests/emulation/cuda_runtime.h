// Stands in for the CUDA toolkit's header of this name; emulation.h explains. It holds what the kernels of this project
// use, with CUDA's names, overloads and results, and nothing that nvcc would refuse.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "emulation.h"

// What torch gives elsewhere.
#define STD_TORCH_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(::emulation::text(__VA_ARGS__))

// ---- Qualifiers --------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

constexpr int warpSize = 32;

// ---- Runtime -----------------------------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// ---- Arithmetic --------------------------------------------------------------------------------------------------

// Of two numbers of one type; as in CUDA, a NaN loses against a number.
template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

// Not contracted into an FMA; nothing is in this build (-ffp-contract=off).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// ---- Barriers, shuffles and votes --------------------------------------------------------------------------------
// The hidden arguments name the caller's line, at which all of the threads have to meet.

#define EMULATION_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_CALLER) {
  emulation::meet(emulation::State::kAtBlock, {"__syncthreads", file, line, 0});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_CALLER) {
  emulation::warp_values(mask, char{0}, "__syncwarp", file, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulation {

// A warp is cut into segments of `width` lanes; a lane that would read beyond its segment keeps its own value.
template <class T, class Source>
T shuffle(unsigned mask, T value, int width, const char* what, const char* file, int line, const Source& source) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail(text(what, " with width ", width));
  const WarpValues<T> values = warp_values(mask, value, what, file, line);
  const int lane = static_cast<int>(current_lane());
  const int begin = lane & ~(width - 1);
  return values[static_cast<unsigned>(source(lane, begin, begin + width))];
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATION_CALLER) {
  return emulation::shuffle(mask, value, width, "__shfl_sync", file, line,
                            [=](int, int begin, int) { return begin + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATION_CALLER) {
  return emulation::shuffle(mask, value, width, "__shfl_up_sync", file, line, [=](int lane, int begin, int) {
    return lane - static_cast<int>(delta) < begin ? lane : lane - static_cast<int>(delta);
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATION_CALLER) {
  return emulation::shuffle(mask, value, width, "__shfl_down_sync", file, line, [=](int lane, int, int end) {
    return lane + static_cast<int>(delta) >= end ? lane : lane + static_cast<int>(delta);
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, EMULATION_CALLER) {
  return emulation::shuffle(mask, value, width, "__shfl_xor_sync", file, line, [=](int lane, int, int end) {
    return (lane ^ lane_mask) >= end ? lane : lane ^ lane_mask;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_CALLER) {
  const auto values = emulation::warp_values(mask, predicate, "__ballot_sync", file, line);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulation::kWarpSize; ++lane)
    if (values.has(lane) && values[lane] != 0) ballot |= 1u << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_CALLER) {
  const auto values = emulation::warp_values(mask, predicate, "__any_sync", file, line);
  for (unsigned lane = 0; lane < emulation::kWarpSize; ++lane)
    if (values.has(lane) && values[lane] != 0) return 1;
  return 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_CALLER) {
  const auto values = emulation::warp_values(mask, predicate, "__all_sync", file, line);
  for (unsigned lane = 0; lane < emulation::kWarpSize; ++lane)
    if (values.has(lane) && values[lane] == 0) return 0;
  return 1;
}

#undef EMULATION_CALLER

// ---- Atomics -----------------------------------------------------------------------------------------------------
// One CPU thread runs everything, so a plain access is atomic. Overloads are CUDA's: there is none for int64_t.

#define EMULATION_ATOMIC(name, T, result) \
  inline T name(T* address, T value) {    \
    const T old = *address;               \
    *address = static_cast<T>(result);    \
    return old;                           \
  }
EMULATION_ATOMIC(atomicAdd, int, static_cast<unsigned>(old) + static_cast<unsigned>(value))
EMULATION_ATOMIC(atomicAdd, unsigned, old + value)
EMULATION_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATION_ATOMIC(atomicAdd, float, old + value)
EMULATION_ATOMIC(atomicAdd, double, old + value)
EMULATION_ATOMIC(atomicMax, int, max(old, value))
EMULATION_ATOMIC(atomicMax, unsigned, max(old, value))
EMULATION_ATOMIC(atomicMax, long long, max(old, value))
EMULATION_ATOMIC(atomicMax, unsigned long long, max(old, value))
EMULATION_ATOMIC(atomicMin, int, min(old, value))
EMULATION_ATOMIC(atomicMin, unsigned, min(old, value))
EMULATION_ATOMIC(atomicMin, long long, min(old, value))
EMULATION_ATOMIC(atomicMin, unsigned long long, min(old, value))
#undef EMULATION_ATOMIC

#define EMULATION_CAS(T)                                \
  inline T atomicCAS(T* address, T expected, T value) { \
    const T old = *address;                             \
    if (old == expected) *address = value;              \
    return old;                                         \
  }
EMULATION_CAS(int)
EMULATION_CAS(unsigned)
EMULATION_CAS(unsigned long long)
#undef EMULATION_CAS

// A float's bits, as the atomics on them need.
namespace emulation {

template <class To, class From>
To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace emulation

inline int __float_as_int(float value) { return emulation::same_bits<int>(value); }
inline unsigned __float_as_uint(float value) { return emulation::same_bits<unsigned>(value); }
inline float __int_as_float(int value) { return emulation::same_bits<float>(value); }
inline float __uint_as_float(unsigned value) { return emulation::same_bits<float>(value); }
