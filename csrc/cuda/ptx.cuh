// Instructions that CUDA C++ has no name for. Each has a plain C++ body for the emulation (csrc/common.h, rule 5).
#pragma once

#include "../common.h"

namespace inpaint {
namespace {

// 1 / x, off by one unit in the last place at most; x is a normal number whose reciprocal is one too. The division
// operator also has a way out for all other x: a branch, which a chain of dependent steps waits for.
__device__ __forceinline__ float approximate_reciprocal(float x) {
#ifdef INPAINT_EMULATION
  return 1.0f / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// 2^x, off by two units in the last place at most; 0 where that is below the normal numbers.
__device__ __forceinline__ float approximate_power_of_two(float x) {
#ifdef INPAINT_EMULATION
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// A pointer into global memory that the compiler keeps as it is. Otherwise it adds up what the pointer was made of anew
// for every access, in 64 bits: six instructions instead of one.
template <class T>
__device__ __forceinline__ T* kept(T* pointer) {
#ifndef INPAINT_EMULATION
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

}  // namespace
}  // namespace inpaint
