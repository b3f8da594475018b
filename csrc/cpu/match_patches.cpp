// match_patches on the CPU: the sweep of patch_scores.h with a running maximum instead of a strip.
#include "patch_scores.h"

namespace inpaint {
namespace {

// Queries swept at once; their rings (patch + 2 key rows of correlations each) stay near the cache.
constexpr int64_t kQueriesPerSweep = 4096;

// The queries to compute, cut into lists of at most kQueriesPerSweep.
std::vector<PositionList> cut_queries(const bool* selected, int64_t count) {
  std::vector<PositionList> lists;
  std::vector<uint8_t> wanted(count, 0);
  int64_t in_list = 0;
  for (int64_t p = 0; p < count; ++p) {
    if (selected && !selected[p]) continue;
    wanted[p] = 1;
    if (++in_list < kQueriesPerSweep) continue;
    lists.emplace_back(wanted);
    std::fill(wanted.begin(), wanted.end(), 0);
    in_list = 0;
  }
  if (in_list > 0) lists.emplace_back(wanted);
  return lists;
}

// score = correlation * factor + offset; a key that is not valid scores -inf.
template <class T>
struct KeyScores {
  Buffer<T> factor, offset;
  KeyScores(int64_t keys, const bool* valid, const T* scale, const T* bias) : factor(keys), offset(keys) {
    for (int64_t q = 0; q < keys; ++q) {
      const bool eligible = !valid || valid[q];
      factor[q] = !eligible ? T(0) : scale ? scale[q] : T(1);
      offset[q] = !eligible ? -std::numeric_limits<T>::infinity() : bias ? bias[q] : T(0);
    }
  }
};

template <class T>
void match(const MapView<T>& query, const MapView<T>& key, const KeyScores<T>& scores,
           const std::vector<PositionList>& lists, int64_t patch, int64_t* index, T* best) {
  const int64_t width = key.grid.width;
  for (const PositionList& list : lists) {
    const QueryPlan plan(list, query.grid, patch, 0);
    std::vector<T> row_scores(list.size() * width);
    ScoreSweep<T>(plan, query, key, nullptr).run([&](int64_t v, int64_t i, const T* correlations) {
      const int64_t p = list[i];
      T* row = row_scores.data() + i * width;
      const T largest =
          affine_max(row, correlations, scores.factor.get() + v * width, scores.offset.get() + v * width, width);
      if (!(largest > best[p])) return;  // key rows come in order: an equal score further down is a later key
      best[p] = largest;
      index[p] = v * width + (std::find(row, row + width, largest) - row);
    });
  }
}

}  // namespace

std::tuple<Tensor, Tensor> match_patches(const Tensor& query, const Tensor& key, const std::optional<Tensor>& valid,
                                         const std::optional<Tensor>& key_scale, const std::optional<Tensor>& key_bias,
                                         const std::optional<Tensor>& selected, int64_t patch) {
  check_rank(query, "query", 4);
  check_rank(key, "key", 4);
  STD_TORCH_CHECK(patch >= 1 && patch <= kMaxPatch, "patch: expected 1 to ", kMaxPatch, ", got ", patch);
  const GridSize query_grid{query.size(2), query.size(3)}, key_grid{key.size(2), key.size(3)};
  const std::vector<int64_t> shape{query.size(0), query_grid.height, query_grid.width};
  Tensor index = torch::stable::fill_(torch::stable::new_empty(query, shape, ScalarType::Long), -1);
  Tensor score = torch::stable::fill_(torch::stable::new_empty(query, shape), -std::numeric_limits<double>::infinity());
  const bool* wanted = selected ? static_cast<const bool*>(selected->data_ptr()) : nullptr;
  const std::vector<PositionList> lists = cut_queries(wanted, query_grid.count());
  dispatch_float_double(query.scalar_type(), "query", [&](auto zero) {
    using T = decltype(zero);
    for (int64_t b = 0; b < query.size(0); ++b) {
      const KeyScores<T> scores(key_grid.count(), sample_of<bool>(valid, b), sample_of<T>(key_scale, b),
                                sample_of<T>(key_bias, b));
      match(view_of<T>(query, b), view_of<T>(key, b), scores, lists, patch,
            index.mutable_data_ptr<int64_t>() + b * query_grid.count(),
            score.mutable_data_ptr<T>() + b * query_grid.count());
    }
  });
  return {index, score};
}

}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) { m.impl("match_patches", TORCH_BOX(&inpaint::match_patches)); }
