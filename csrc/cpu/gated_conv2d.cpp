// gated_conv2d on the CPU: forward, and the gradient of its gate.
#include "convolution_arguments.h"
#include "gate_backward.h"
#include "tasks.h"

namespace inpaint {
namespace {

constexpr int64_t kGateElements = 4096;  // of a task of the gate's gradient

// x [B, Cin, H, W], weight [2 C, Cin, kh, kw] and packed, bias [2 C] -> y [B, C, Ho, Wo] and, if given, the gates
// before the sigmoid, of its shape; all but the weight and the bias of one layout, NCHW or channels_last.
void gated_conv2d(const Tensor& x, const Tensor& weight, const Tensor& packed, const std::optional<Tensor>& bias,
                  int64_t stride_y, int64_t stride_x, int64_t pad_top, int64_t pad_left, int64_t dilation_y,
                  int64_t dilation_x, bool few_outputs, int64_t upsample, bool reflect, const std::string& activation,
                  double slope, bool gate_first, Tensor y, const std::optional<Tensor>& gates) {
  const ConvolutionArguments geometry{stride_y, stride_x, pad_top, pad_left, dilation_y, dilation_x, upsample, reflect};
  STD_TORCH_CHECK(weight.size(0) == 2 * y.size(1), "weight: expected two output channels for each of y");
  dispatch_element(x.scalar_type(), "x", [&](auto sum, auto element) {
    using T = decltype(sum);
    using Element = decltype(element);
    auto convolution = convolution_of<T, Element>(x, weight, packed, bias, geometry,
                                                  {true, gate_first, geometry.unit_stride(), few_outputs}, y);
    convolution.epilogue.activation = activation_kind(activation);
    convolution.epilogue.slope = static_cast<T>(slope);
    if (gates) convolution.epilogue.gates = map_of<Element>(*gates, "gates");
    convolve(convolution);
  });
}

// grad, y and gates [B, C, H, W] -> gradient of the sums [B, 2 C, H, W], all of one layout.
void gated_conv2d_gate_backward(const Tensor& grad, const Tensor& y, const Tensor& gates, const std::string& activation,
                                double slope, bool gate_first, Tensor grad_sums) {
  dispatch_element(grad.scalar_type(), "grad", [&](auto sum, auto element) {
    using T = decltype(sum);
    using Element = decltype(element);
    // With a single channel, the others alone would not tell their layout.
    const auto map = map_of<Element>(grad_sums, "grad_sums");
    map_of<const Element>(grad, "grad");
    map_of<const Element>(y, "y");
    map_of<const Element>(gates, "gates");
    STD_TORCH_CHECK(y.numel() == grad.numel() && gates.numel() == grad.numel(), "y, gates: expected the shape of grad");
    STD_TORCH_CHECK(map.channels == 2 * grad.size(1) && grad_sums.numel() == 2 * grad.numel(),
                    "grad_sums: expected twice the channels of grad");
    // Rows of neighbours in memory: the channels of a pixel, or those of a sample with their planes.
    const int64_t length = map.channels_last ? grad.size(1) : grad.size(1) * map.plane();
    const int64_t rows = length == 0 ? 0 : grad.numel() / length;
    const GateBackward<T, Element> job{elements<Element>(grad),
                                       elements<Element>(y),
                                       elements<Element>(gates),
                                       elements<Element>(grad_sums),
                                       length,
                                       activation_kind(activation),
                                       static_cast<T>(slope),
                                       gate_first};
    if (rows == 0) return;
    const int64_t rows_together = std::clamp<int64_t>(kGateElements / std::max<int64_t>(length, 1), 1, rows);
    const int64_t pieces = ceil_div(length, kGateElements);  // of a row
    run_tasks(ceil_div(rows, rows_together) * pieces, kGateElements * 16, [&](int64_t, int64_t i) {
      const int64_t first = i / pieces * rows_together, begin = i % pieces * kGateElements;
      for (int64_t row = first; row < std::min(rows, first + rows_together); ++row)
        gate_backward(job, row, begin, std::min(length, begin + kGateElements));
    });
  });
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) {
  m.impl("gated_conv2d", TORCH_BOX(&inpaint::gated_conv2d));
  m.impl("gated_conv2d_gate_backward", TORCH_BOX(&inpaint::gated_conv2d_gate_backward));
}
