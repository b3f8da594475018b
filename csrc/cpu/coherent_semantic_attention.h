// What the forward and the backward of coherent_semantic_attention share on the CPU: positions, and moving vectors of
// channels between maps of any layout and rows.
#pragma once

#include <vector>

#include "convolution_arguments.h"
#include "elements.h"
#include "memory.h"
#include "simd.h"
#include "tasks.h"

namespace inpaint {

// One sample of a map [B, C, H, W] in any layout.
template <class Element>
struct VectorMap {
  Element* data;
  int64_t channels, height, width;
  int64_t channel_stride, row_stride, column_stride;

  int64_t positions() const { return height * width; }
  int64_t offset(int64_t position) const { return position / width * row_stride + position % width * column_stride; }
};

template <class Element>
VectorMap<Element> vectors_of(const Tensor& map, int64_t sample) {
  return {elements<std::remove_const_t<Element>>(map) + sample * map.stride(0),
          map.size(1),
          map.size(2),
          map.size(3),
          map.stride(1),
          map.stride(2),
          map.stride(3)};
}

// The positions of one sample, in raster order.
struct Positions {
  std::vector<int64_t> masked, known;

  Positions(const bool* flags, int64_t count) {
    for (int64_t p = 0; p < count; ++p) (flags[p] ? masked : known).push_back(p);
  }
  int64_t masked_count() const { return static_cast<int64_t>(masked.size()); }
  int64_t known_count() const { return static_cast<int64_t>(known.size()); }
};

template <class Element>
std::vector<int64_t> offsets_of(const VectorMap<Element>& map, const std::vector<int64_t>& positions) {
  std::vector<int64_t> offsets(positions.size());
  for (size_t i = 0; i < positions.size(); ++i) offsets[i] = map.offset(positions[i]);
  return offsets;
}

// Rows of one vector each; a row begins on a line of the cache, and no two of a group of queries share a set of it.
template <class T>
int64_t row_stride(int64_t channels) {
  return round_up(channels, kLanes<T>) + kLanes<T>;
}

constexpr int64_t kRowsPerTask = 64;

// ---- Rows and maps -----------------------------------------------------------------------------------------------

// Whether kChunk positions are neighbours in memory, in their order.
template <class Element>
INPAINT_INLINE bool is_run(const VectorMap<Element>& map, const int64_t* offsets) {
  int64_t gaps = map.column_stride - 1;
  for (int lane = 1; lane < kChunk; ++lane) gaps |= offsets[lane] - offsets[lane - 1] - 1;
  return gaps == 0;
}

// Planes are too far apart for the processor to foresee the next one: so many channels ahead its lines are asked for
// (measured at 64x64: packing and gathering took 30 % of what the search does without, and 20 % with).
constexpr int64_t kPlanesAhead = 6;

// Asks for the elements at some offsets of a plane.
template <class Element>
INPAINT_INLINE void prefetch_plane(const VectorMap<const Element>& map, int64_t channel, const int64_t* offsets,
                                   int64_t count, bool run) {
  const Element* plane = map.data + channel * map.channel_stride;
  for (int64_t i = 0; i < count; i += run ? kChunk : 1) __builtin_prefetch(plane + offsets[i]);
}

// rows[i][c] = map[c] at offsets[i], for `count` of them.
template <class T, class Element>
INPAINT_INLINE void gather_rows_body(const VectorMap<const Element>& map, const int64_t* offsets, int64_t count,
                                     T* rows, int64_t stride) {
  const int64_t channels = map.channels, whole = map.channel_stride == 1 ? channels / kChunk * kChunk : 0;
  for (int64_t i = 0; i < count && whole > 0; ++i)
    for (int64_t c = 0; c < whole; c += kChunk) store(rows + i * stride + c, load_chunk<T>(map.data + offsets[i] + c));
  // A plane is read along its positions: in small maps the planes lie so that they would push each other out of the
  // cache. A line of channels of all rows, which is written meanwhile, stays there.
  for (int64_t first = whole; first < channels; first += kLanes<T>) {
    for (int64_t c = first; c < std::min<int64_t>(channels, first + kLanes<T>); ++c) {
      const Element* from = map.data + c * map.channel_stride;
      for (int64_t i = 0; i < count; i += kChunk) {
        T* to = rows + i * stride + c;
        const int64_t some = std::min<int64_t>(kChunk, count - i);
        const bool run = some == kChunk && is_run(map, offsets + i);
        prefetch_plane(map, c + kPlanesAhead, offsets + i, some, run);
        if (run) {
          const Chunk<T> chunk = load_chunk<T>(from + offsets[i]);
          for (int lane = 0; lane < kChunk; ++lane) to[lane * stride] = chunk[lane];
        } else {
          for (int64_t lane = 0; lane < some; ++lane) to[lane * stride] = load_one<T>(from + offsets[i + lane]);
        }
      }
    }
  }
}

// The other way: map[c] at offsets[i] = rows[i][c].
template <class T, class Element>
INPAINT_INLINE void scatter_rows_body(const T* rows, int64_t stride, const int64_t* offsets, int64_t count,
                                      const VectorMap<Element>& map) {
  const int64_t channels = map.channels, whole = map.channel_stride == 1 ? channels / kChunk * kChunk : 0;
  for (int64_t i = 0; i < count && whole > 0; ++i)
    for (int64_t c = 0; c < whole; c += kChunk)
      store_chunk<T>(map.data + offsets[i] + c, load<Chunk<T>>(rows + i * stride + c));
  for (int64_t first = whole; first < channels; first += kLanes<T>) {
    for (int64_t c = first; c < std::min<int64_t>(channels, first + kLanes<T>); ++c) {
      Element* to = map.data + c * map.channel_stride;
      for (int64_t i = 0; i < count; i += kChunk) {
        const T* from = rows + i * stride + c;
        const int64_t some = std::min<int64_t>(kChunk, count - i);
        if (some == kChunk && is_run(map, offsets + i)) {
          T lanes[kChunk];
          for (int lane = 0; lane < kChunk; ++lane) lanes[lane] = from[lane * stride];
          store_chunk<T>(to + offsets[i], load<Chunk<T>>(lanes));
        } else {
          for (int64_t lane = 0; lane < some; ++lane) store_one<T>(to + offsets[i + lane], from[lane * stride]);
        }
      }
    }
  }
}

// A part of a map: channels and rows of positions, ends exclusive.
struct MapPart {
  int64_t first_channel, last_channel, first_row, last_row;
};

// to = from * factor[position] for a part of the map; no factor: a copy.
template <class T, class Element>
INPAINT_INLINE void copy_vectors_body(const VectorMap<const Element>& from, const VectorMap<Element>& to,
                                      const T* factor, const MapPart& part) {
  const bool vectors = from.channel_stride == 1 && to.channel_stride == 1;
  const bool planes = from.column_stride == 1 && to.column_stride == 1;
  for (int64_t y = part.first_row; y < part.last_row && vectors; ++y) {
    for (int64_t x = 0; x < from.width; ++x) {
      const Element* source = from.data + y * from.row_stride + x * from.column_stride;
      Element* target = to.data + y * to.row_stride + x * to.column_stride;
      const T scale = factor ? factor[y * from.width + x] : T(1);
      int64_t c = part.first_channel;
      for (; c + kChunk <= part.last_channel; c += kChunk)
        store_chunk<T>(target + c, load_chunk<T>(source + c) * scale);
      for (; c < part.last_channel; ++c) store_one<T>(target + c, load_one<T>(source + c) * scale);
    }
  }
  for (int64_t c = part.first_channel; c < part.last_channel && !vectors; ++c) {
    for (int64_t y = part.first_row; y < part.last_row; ++y) {
      const Element* source = from.data + c * from.channel_stride + y * from.row_stride;
      Element* target = to.data + c * to.channel_stride + y * to.row_stride;
      const T* scale = factor ? factor + y * from.width : nullptr;
      int64_t x = 0;
      for (; planes && x + kChunk <= from.width; x += kChunk) {
        const Chunk<T> value = load_chunk<T>(source + x);
        store_chunk<T>(target + x, scale ? value * load<Chunk<T>>(scale + x) : value);
      }
      for (; x < from.width; ++x) {
        const T value = load_one<T>(source + x * from.column_stride);
        store_one<T>(target + x * to.column_stride, scale ? value * scale[x] : value);
      }
    }
  }
}

#define INPAINT_MOVE_VECTORS(T, Element)                                                                             \
  INPAINT_CLONES inline void gather_rows(const VectorMap<const Element>& map, const int64_t* offsets, int64_t count, \
                                         T* rows, int64_t stride) {                                                  \
    gather_rows_body(map, offsets, count, rows, stride);                                                             \
  }                                                                                                                  \
  INPAINT_CLONES inline void scatter_rows(const T* rows, int64_t stride, const int64_t* offsets, int64_t count,      \
                                          const VectorMap<Element>& map) {                                           \
    scatter_rows_body(rows, stride, offsets, count, map);                                                            \
  }                                                                                                                  \
  INPAINT_CLONES inline void copy_vectors(const VectorMap<const Element>& from, const VectorMap<Element>& to,        \
                                          const T* factor, const MapPart& part) {                                    \
    copy_vectors_body(from, to, factor, part);                                                                       \
  }
INPAINT_MOVE_VECTORS(float, float)
INPAINT_MOVE_VECTORS(double, double)
INPAINT_MOVE_VECTORS(float, HalfBits)
INPAINT_MOVE_VECTORS(float, BFloatBits)

// The whole of a map in parts for the threads: planes one after the other, or rows of vectors.
template <class Element>
std::vector<MapPart> parts_of(const VectorMap<Element>& map) {
  std::vector<MapPart> parts;
  if (map.channel_stride == 1)
    for (int64_t y = 0; y < map.height; ++y) parts.push_back({0, map.channels, y, y + 1});
  else
    for (int64_t c = 0; c < map.channels; c += kChunk)
      parts.push_back({c, std::min<int64_t>(map.channels, c + kChunk), 0, map.height});
  return parts;
}

// ---- Samples -----------------------------------------------------------------------------------------------------

// Samples are worked on together, so that small ones keep all threads busy, while their rows fit into this.
constexpr int64_t kRowBytesTogether = int64_t{32} << 20;

// Some consecutive samples of a batch: the pieces [begin, end) of each one's work, numbered through.
class Pieces {
 public:
  void add(int64_t count) { ends_.push_back((ends_.empty() ? 0 : ends_.back()) + count); }
  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }

  // Calls task(worker, sample, piece) for every piece of every sample; `work` as in run_tasks().
  template <class Task>
  void run(int64_t work, const Task& task) const {
    run_tasks(count(), work, [&](int64_t worker, int64_t i) {
      const auto sample = std::upper_bound(ends_.begin(), ends_.end(), i) - ends_.begin();
      task(worker, sample, sample == 0 ? i : i - ends_[sample - 1]);
    });
  }

 private:
  std::vector<int64_t> ends_;
};

}  // namespace inpaint
