// The gradient of y = activation(features) * sigmoid(gate): the sigmoid is computed again, nothing of it was stored.
#pragma once

#include "convolution_kernels.h"

namespace inpaint {

// Rows of `length` neighbours: grad[row][length], pre and result[row][2][length], features before the gate or after it.
template <class T, class Element>
struct GateBackward {
  const Element* grad;
  const Element* pre;
  Element* result;
  int64_t length;
  ActivationKind activation;
  T slope;
  bool gate_first;
};

// The derivative of the activation at x.
template <class T, ActivationKind kind>
INPAINT_INLINE Chunk<T> activation_slope(Chunk<T> x, T slope) {
  const Chunk<T> one = Chunk<T>{} + T(1);
  if constexpr (kind == ActivationKind::relu) return x > T(0) ? one : Chunk<T>{};
  if constexpr (kind == ActivationKind::elu) return x > T(0) ? one : expm1_nonpositive<T>(x) + one;
  if constexpr (kind == ActivationKind::leaky_relu) return x > T(0) ? one : Chunk<T>{} + slope;
  return one;
}

template <class T, class Element>
INPAINT_INLINE void gate_backward_body(const GateBackward<T, Element>& job, int64_t row, int64_t begin, int64_t end) {
  const int64_t features = (2 * row + job.gate_first) * job.length, gate = (2 * row + !job.gate_first) * job.length;
  with_activation(job.activation, [&](auto kind) INPAINT_INLINE_LAMBDA {
    for (int64_t i = begin; i < end; i += kChunk) {
      const Chunk<T> grad = load_channels<T>(job.grad + row * job.length + i, end - i);
      const Chunk<T> x = load_channels<T>(job.pre + features + i, end - i);
      const Chunk<T> open = sigmoid<T>(load_channels<T>(job.pre + gate + i, end - i));
      const Chunk<T> of_features = grad * open * activation_slope<T, kind.value>(x, job.slope);
      const Chunk<T> of_gate = grad * activate<T, kind.value>(x, job.slope) * open * (T(1) - open);
      store_channels<T>(job.result + features + i, of_features, end - i);
      store_channels<T>(job.result + gate + i, of_gate, end - i);
    }
  });
}

#define INPAINT_GATE_BACKWARD(T, Element)                                                                   \
  INPAINT_CLONES inline void gate_backward(const GateBackward<T, Element>& job, int64_t row, int64_t begin, \
                                           int64_t end) {                                                   \
    gate_backward_body(job, row, begin, end);                                                               \
  }
INPAINT_GATE_BACKWARD(float, float)
INPAINT_GATE_BACKWARD(double, double)
INPAINT_GATE_BACKWARD(float, HalfBits)
INPAINT_GATE_BACKWARD(float, BFloatBits)

}  // namespace inpaint
