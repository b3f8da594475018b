// The gradient of y = activation(features) * sigmoid(gate) from y and the gates: the sigmoid is computed again, and
// activation(features) is y over it. So half of the convolution's sums need not be kept beside y.
#pragma once

#include "convolution_kernels.h"

namespace inpaint {

// Rows of `length` neighbours: grad, y and gates [row][length], result[row][2][length], features before the gates or
// after them.
template <class T, class Element>
struct GateBackward {
  const Element *grad, *y, *gates;
  Element* result;
  int64_t length;
  ActivationKind activation;
  T slope;
  bool gate_first;
};

// The derivative of the activation where it gave y / open. 0 < open <= 1: the sign is that of y, and the sigmoid here
// never underflows to 0. Rounding of y may take an elu below -1, its limit.
template <class T, ActivationKind kind>
INPAINT_INLINE Chunk<T> activation_slope(Chunk<T> y, Chunk<T> open, T slope) {
  const Chunk<T> one = Chunk<T>{} + T(1);
  if constexpr (kind == ActivationKind::relu) return y > T(0) ? one : Chunk<T>{};
  if constexpr (kind == ActivationKind::leaky_relu) return y > T(0) ? one : Chunk<T>{} + slope;
  if constexpr (kind == ActivationKind::elu) {
    const Chunk<T> below = y / open + one;
    return y > T(0) ? one : (below < T(0) ? Chunk<T>{} : below);
  }
  return one;
}

template <class T, class Element>
INPAINT_INLINE void gate_backward_body(const GateBackward<T, Element>& job, int64_t row, int64_t begin, int64_t end) {
  const int64_t from = row * job.length;
  Element* features = job.result + (2 * row + job.gate_first) * job.length;
  Element* gates = job.result + (2 * row + !job.gate_first) * job.length;
  with_activation(job.activation, [&](auto kind) INPAINT_INLINE_LAMBDA {
    for (int64_t i = begin; i < end; i += kChunk) {
      const Chunk<T> grad = load_channels<T>(job.grad + from + i, end - i);
      const Chunk<T> y = load_channels<T>(job.y + from + i, end - i);
      const Chunk<T> open = sigmoid<T>(load_channels<T>(job.gates + from + i, end - i));
      store_channels<T>(features + i, grad * open * activation_slope<T, kind.value>(y, open, job.slope), end - i);
      store_channels<T>(gates + i, grad * y * (T(1) - open), end - i);
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
