// How the tensors of a call become the arguments of contextual_attention's CUDA launchers.
#pragma once

#include "arguments.cuh"
#include "contextual_attention_tiles.cuh"

namespace inpaint {
namespace {

inline AttentionTile tile_of(const Tensor& fields) {
  const auto tile = struct_of<AttentionTile>(fields, "tile");
  STD_TORCH_CHECK(tile.key_cell_width % kQuad == 0 && tile.key_columns % kQuad == 0 &&
                      tile.key_cell_width >= tile.key_width && tile.key_columns >= tile.keys(),
                  "tile: expected lines of keys that are padded to a multiple of ", kQuad);
  return tile;
}

inline void check_logits(const AttentionTile& tile, const Tensor& logits) {
  check_elements(logits, "logits", tile.samples * tile.queries() * tile.logit_columns());
}

inline void check_keep(const AttentionTile& tile, const std::optional<Tensor>& keep) {
  if (keep) check_elements(*keep, "keep", tile.samples * tile.logit_columns());
}

}  // namespace
}  // namespace inpaint
