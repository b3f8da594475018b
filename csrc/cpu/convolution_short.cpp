// The CPU convolution of 16-bit elements.
#include "convolution.h"
#include "convolution_ways.h"

namespace inpaint {
namespace {

INPAINT_RUN_PIECE_WAYS(float, HalfBits)
INPAINT_RUN_PIECE_WAYS(float, BFloatBits)

#ifdef INPAINT_X86_VERSIONS
using DirectPairs = Direct<PairProducts, BFloatBits>;
using GatheredPairs = Gathered<PairProducts, BFloatBits>;

__attribute__((target("arch=x86-64-v4"))) void run_piece(const DirectPairs& way, const Piece& piece,
                                                         DirectPairs::Worker& worker) {
  way.run<kPositions, 64>(piece, worker);
}
__attribute__((target("arch=x86-64-v4"))) void run_piece(const GatheredPairs& way, const Piece& piece,
                                                         GatheredPairs::Worker& worker) {
  way.run<kPositions, 64>(piece, worker);
}
#endif

}  // namespace

void convolve(const Convolution<float, HalfBits>& convolution) { convolve_by_single_products(convolution); }

void convolve(const Convolution<float, BFloatBits>& convolution) {
#ifdef INPAINT_X86_VERSIONS
  if (uses_pairs<BFloatBits>() && !uses_winograd(convolution.weight))
    return convolution.weight.few_outputs ? run_pieces<GatheredPairs>(convolution)
                                          : run_pieces<DirectPairs>(convolution);
#endif
  convolve_by_single_products(convolution);
}

}  // namespace inpaint
