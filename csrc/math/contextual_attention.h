// Scalar math of contextual_attention that its CPU and CUDA kernels share.
#pragma once

#include <cmath>
#include <string>

#include "../common.h"

namespace inpaint {

// How a key patch's squared norm N becomes the divisor of its scores.
enum class NormRule {
  kNone,  // 1
  kAdd,   // sqrt(N) + eps
  kMax,   // max(sqrt(N), eps)
  kSum,   // sqrt(N + eps * elements of a patch)
};

inline NormRule parse_norm_rule(const std::string& rule) {
  if (rule == "none") return NormRule::kNone;
  if (rule == "add") return NormRule::kAdd;
  if (rule == "max") return NormRule::kMax;
  if (rule == "sum") return NormRule::kSum;
  STD_TORCH_CHECK(false, "rule: expected 'none', 'add', 'max' or 'sum', got '", rule, "'");
}

template <class T>
INPAINT_HOST_DEVICE inline T patch_norm(NormRule rule, T squared_norm, T eps, T patch_elements) {
  switch (rule) {
    case NormRule::kAdd:
      return std::sqrt(squared_norm) + eps;
    case NormRule::kMax: {
      const T norm = std::sqrt(squared_norm);
      return norm < eps ? eps : norm;  // in this order a NaN stays a NaN
    }
    case NormRule::kSum:
      return std::sqrt(squared_norm + eps * patch_elements);
    case NormRule::kNone:
      break;
  }
  return T(1);
}

// The fuse's neighbours of position p of a row-major grid: `step` further in row-major (R_d) or column-major order
// (C_e). Both run on past the end of a line into the next one; -1 past the two ends of the grid.
INPAINT_HOST_DEVICE constexpr int64_t row_neighbour(int64_t p, int64_t step, int64_t count) {
  const int64_t i = p + step;
  return i >= 0 && i < count ? i : -1;
}
INPAINT_HOST_DEVICE constexpr int64_t column_neighbour(int64_t p, int64_t step, int64_t height, int64_t width) {
  const int64_t c = p % width * height + p / width + step;
  return c >= 0 && c < height * width ? c % height * width + c / height : -1;
}

// First offset of a k-wide window around its centre: an even window reaches one further to the right and below.
INPAINT_HOST_DEVICE constexpr int64_t window_start(int64_t patch) { return -((patch - 1) / 2); }

}  // namespace inpaint
