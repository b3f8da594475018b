// The CPU convolution of float and double.
#include "convolution.h"

#include "convolution_ways.h"

namespace inpaint {
namespace {

INPAINT_RUN_PIECE_WAYS(float, float)
INPAINT_RUN_PIECE_WAYS(double, double)

}  // namespace

void convolve(const Convolution<float, float>& convolution) { convolve_by_single_products(convolution); }
void convolve(const Convolution<double, double>& convolution) { convolve_by_single_products(convolution); }

}  // namespace inpaint
