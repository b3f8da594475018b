// The convolution behind gated_conv2d, dilated_conv2d and partial_conv2d on the CPU: one sweep over the output, with
// what follows the sums done while they are in cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "elements.h"

namespace inpaint {

// One axis of the geometry.
struct Axis {
  int64_t size;  // of the input
  int64_t outputs, kernel, stride, pad, dilation, upsample;
  bool reflect;

  // First position, in the upsampled and padded input, that an output reads; its taps are `dilation` apart.
  int64_t position(int64_t output) const { return output * stride - pad; }

  // The input pixel at a position; -1: a zero.
  int64_t source(int64_t position) const {
    const int64_t size_up = size * upsample;
    if (reflect) {
      if (position < 0) position = -position;
      if (position >= size_up) position = 2 * (size_up - 1) - position;
    }
    return position >= 0 && position < size_up ? position / upsample : -1;
  }
};

// A map [batch, channels, height, width], dense in NCHW or in channels_last.
template <class Element>
struct Map {
  Element* data;
  int64_t channels, height, width;
  bool channels_last;

  int64_t plane() const { return height * width; }
  Element* sample(int64_t b) const { return data + b * channels * plane(); }
};

// What is one thing over all channels of a pixel; `batch_stride` is 0 where the samples share it.
template <class Element>
struct PixelMap {
  const Element* data;
  int64_t batch_stride;
};

enum class ActivationKind { none, relu, elu, leaky_relu };

// What happens to the sums of an output pixel.
template <class T, class Element>
struct Epilogue {
  ActivationKind activation;
  T slope;
  Map<Element> gates;        // where the sums of a gate go, if data is not null
  const Element* residual;   // added last, laid out as y; null: none
  PixelMap<T> scale, shift;  // sums * scale + bias * shift; data null: sums + bias
};

// The masks of partial convolutions: mask m covers the next segments[m] channels. Null: none.
template <class Element>
struct ChannelMasks {
  const Element* data;
  int64_t batch_stride, count;
  const int64_t* segments;
};

// A weight, and what has to be known of its convolutions to pack it: with the same shape and the same flags, the packed
// weight is the same.
template <class Element>
struct Weight {
  const Element* data;  // [rows, channels, kernel_y, kernel_x]; null where only the packed weight is needed
  const void* packed;
  int64_t rows, channels, kernel_y, kernel_x;
  bool gated;        // activation(features) * sigmoid(gate), two sums per channel of y
  bool gate_first;   // the features are the second half of the sums
  bool unit_stride;  // strides of 1
  bool few_outputs;  // so few in all that reading the weight once is worth more than saving products

  int64_t taps() const { return kernel_y * kernel_x; }
};

template <class T, class Element>
struct Convolution {
  int64_t batch;
  Axis y, x;
  Map<const Element> input;
  ChannelMasks<Element> masks;
  Weight<Element> weight;  // packed
  const Element* bias;     // [rows] or null
  Map<Element> output;
  Epilogue<T, Element> epilogue;
};

void convolve(const Convolution<float, float>& convolution);
void convolve(const Convolution<double, double>& convolution);
void convolve(const Convolution<float, HalfBits>& convolution);
void convolve(const Convolution<float, BFloatBits>& convolution);

}  // namespace inpaint
