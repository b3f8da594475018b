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

}  // namespace
}  // namespace inpaint
