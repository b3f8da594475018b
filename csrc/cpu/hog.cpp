// hog on the CPU: one pass from pixels to the cells' histograms, one from these to normalised blocks and the picture.
//
// Traffic of 2000 x 2000 gray bytes with 9 bins and blocks of 3 x 3 cells: 4 MB read, 20 MB written (every cell stands
// in nine blocks), 2 MB of histograms written and read again. Instructions of 32 bytes, 9 bins, per pixel of bytes: 3
// for its bin and magnitude, 4 for its histogram, 2 to choose between two channels.
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "../common.h"
#include "hog_kernels.h"
#include "memory.h"
#include "tasks.h"

namespace inpaint {
namespace {

// Pixels of a piece of a cell row that are worked on together: their votes (8 bytes each) stay in the L1 cache.
constexpr int64_t kPixelsTogether = 2048;

// The images, and what is asked of them.
struct Job {
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;  // in elements
  int64_t cell_rows, cell_columns, cells_down, cells_across, orientations;
  bool transform_sqrt;
};

// ---- Rows of pixels ----------------------------------------------------------------------------------------------

// An element as arithmetic A reads it.
template <class A, class Element>
INPAINT_INLINE typename A::Pixel pixel_of(Element element, bool transform_sqrt) {
  typedef typename A::Pixel Pixel;
  const Pixel value = static_cast<Pixel>(element);
  if constexpr (std::is_floating_point_v<Pixel>) return transform_sqrt ? std::sqrt(value) : value;
  return value;
}

// Piece of an image row: pixel x of channel c is from[c * channel_stride + x * column_stride], and goes to
// to[c * to_stride + x].
struct Piece {
  int64_t channels, channel_stride, column_stride, to_stride, count;
  bool transform_sqrt;
};

template <class A, class Element>
INPAINT_INLINE void copy_pixels_body(typename A::Pixel* __restrict to, const Element* __restrict from,
                                     const Piece& piece) {
  const int64_t count = piece.count, stride = piece.column_stride;
  const bool root = piece.transform_sqrt;
  if constexpr (!std::is_same_v<Element, HalfBits> && !std::is_same_v<Element, BFloatBits>) {
    if (piece.channels == 3 && piece.channel_stride == 1 && stride == 3) {  // interleaved colours
      typename A::Pixel* __restrict second = to + piece.to_stride, * __restrict third = second + piece.to_stride;
      for (int64_t i = 0; i < count; ++i) {
        to[i] = pixel_of<A>(from[3 * i], root);
        second[i] = pixel_of<A>(from[3 * i + 1], root);
        third[i] = pixel_of<A>(from[3 * i + 2], root);
      }
      return;
    }
  }
  for (int64_t channel = 0; channel < piece.channels; ++channel, to += piece.to_stride, from += piece.channel_stride) {
    if constexpr (std::is_same_v<Element, HalfBits> || std::is_same_v<Element, BFloatBits>) {
      int64_t i = 0;
      for (; stride == 1 && i + kChunk <= count; i += kChunk) store(to + i, load_chunk<float>(from + i));
      for (; i < count; ++i) to[i] = load_one<float>(from + i * stride);
      for (i = 0; root && i < count; ++i) to[i] = std::sqrt(to[i]);
    } else if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = pixel_of<A>(from[i], root);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = pixel_of<A>(from[i * stride], root);
    }
  }
}

#define INPAINT_HOG_COPY(A, Element)                                                       \
  INPAINT_CLONES void copy_pixels(A::Pixel* to, const Element* from, const Piece& piece) { \
    copy_pixels_body<A>(to, from, piece);                                                  \
  }
INPAINT_HOG_COPY(EightBit, uint8_t)
INPAINT_HOG_COPY(EightBit, int8_t)
INPAINT_HOG_COPY(SixteenBit, int16_t)
INPAINT_HOG_COPY(SixteenBit, uint16_t)
INPAINT_HOG_COPY(Single, float)
INPAINT_HOG_COPY(Single, HalfBits)
INPAINT_HOG_COPY(Single, BFloatBits)
INPAINT_HOG_COPY(Wide, uint8_t)
INPAINT_HOG_COPY(Wide, int8_t)
INPAINT_HOG_COPY(Wide, int16_t)
INPAINT_HOG_COPY(Wide, uint16_t)
INPAINT_HOG_COPY(Wide, int32_t)
INPAINT_HOG_COPY(Wide, uint32_t)
INPAINT_HOG_COPY(Wide, int64_t)
INPAINT_HOG_COPY(Wide, uint64_t)
INPAINT_HOG_COPY(Wide, double)

// The image, and how one arithmetic reads it.
template <class A>
struct Source {
  const char* image;
  int64_t element_size;
  void (*copy)(typename A::Pixel* to, const void* from, const Piece& piece);

  template <class Element>
  static Source of(const Element* image) {
    const auto copy = [](typename A::Pixel* to, const void* from, const Piece& piece) {
      copy_pixels(to, static_cast<const Element*>(from), piece);
    };
    return {reinterpret_cast<const char*>(image), sizeof(Element), copy};
  }
  const char* at(int64_t offset) const { return image + offset * element_size; }
};

// ---- A row of cells ----------------------------------------------------------------------------------------------

// One worker's memory.
template <class A>
struct Scratch {
  typedef typename A::T T;
  typedef typename A::Pixel Pixel;

  int64_t cells_together, stride;  // stride: padded pixels of a row
  int64_t row_stride;              // of copied rows, which have a pack before (so that they are aligned) and after them
  Buffer<T> magnitude;
  Buffer<LaneInt<T>> bins;
  Buffer<SameSizeInt<Pixel>> verdict;
  Buffer<Pixel> down, right, nothing, rows;  // `nothing`: zeros

  explicit Scratch(const Job& job)
      : cells_together(std::clamp<int64_t>(kPixelsTogether / (job.cell_rows * job.cell_columns), 1, job.cells_across)),
        stride(round_up(cells_together * job.cell_columns, kPack<Pixel>) + kPack<Pixel>),
        row_stride(round_up(stride + 2 * kPack<Pixel>, kAlignment)),
        magnitude(job.cell_rows * stride),
        bins(job.cell_rows * stride),
        verdict(stride),
        down(stride),
        right(stride),
        nothing(job.channels * row_stride, true),
        rows((job.cell_rows + 2) * job.channels * row_stride, true) {}
};

// Pixels [left, left + count) of rows [top, bottom), and those around them that the image has.
struct Region {
  int64_t top, bottom, left, count;
};

// Copies the region's rows: pixel x of row y in channel c goes to
// start[((y - top) * channels + c) * row_stride + x - left].
template <class A>
INPAINT_INLINE void copy_rows(const Job& job, const Scratch<A>& scratch, const Source<A>& source, const Region& region,
                              typename A::Pixel* start) {
  const int64_t begin = std::max<int64_t>(region.left - 1, 0);
  const int64_t end = std::min(region.left + region.count + 1, job.width);
  const Piece piece{job.channels,       job.channel_stride, job.column_stride,
                    scratch.row_stride, end - begin,        job.transform_sqrt};
  // The row's next piece is fetched early: too few lines for the processor to foresee them (measured with 2000 x 2000
  // pixels: 5 % if gray, 10 % if coloured).
  const int64_t bytes = piece.count * job.column_stride * source.element_size;
  const int64_t fetched = std::min(bytes, (job.width - end) * job.column_stride * source.element_size);
  const int64_t last = std::min(region.bottom + 1, job.height);
  for (int64_t y = std::max<int64_t>(region.top - 1, 0); y < last; ++y) {
    const char* const from = source.at(y * job.row_stride + begin * job.column_stride);
    source.copy(start + (y - region.top) * job.channels * scratch.row_stride + begin - region.left, from, piece);
    for (int64_t channel = 0; channel < (job.column_stride == 1 ? job.channels : 1); ++channel)
      for (int64_t x = 0; x < fetched; x += kAlignment)
        __builtin_prefetch(from + channel * job.channel_stride * source.element_size + bytes + x);
  }
}

// Writes the votes of a piece of the image row `y`, which is copied to `row`.
template <class A>
INPAINT_INLINE void vote(const Job& job, const Borders<A>& borders, const Scratch<A>& scratch,
                         const typename A::Pixel* row, int64_t y, const Region& region, typename A::T* magnitude,
                         LaneInt<typename A::T>* bins) {
  typedef typename A::Pixel Pixel;
  const int64_t row_step = job.channels * scratch.row_stride, count = region.count;
  const bool inside = y > 0 && y + 1 < job.height;  // at the image's border there is no difference
  const Pixel* const nothing = scratch.nothing.get();
  const Neighbours<A> from{row, inside ? row - row_step : nothing, inside ? row + row_step : nothing, job.channels,
                           scratch.row_stride};
  const GradientRow<A> gradients{scratch.down.get(), scratch.right.get()};
  find_gradients(from, count, scratch.verdict.get(), gradients);
  if (region.left == 0) choose_border_gradient(from, 0, gradients);
  if (region.left + count == job.width) choose_border_gradient(from, count - 1, gradients);
  find_votes(borders, gradients.down, gradients.right, count, scratch.verdict.get(), bins, magnitude);
}

// Histograms and energies of row `row` of cells of one image.
template <class A>
INPAINT_INLINE void fill_cells_body(const Job& job, const Borders<A>& borders, const Scratch<A>& scratch,
                                    const Source<A>& source, int64_t row, BlockNorm norm, typename A::T* histograms,
                                    typename A::T* energy) {
  typedef typename A::T T;
  const int64_t row_step = job.channels * scratch.row_stride;
  const Votes<T> votes{scratch.magnitude.get(), scratch.bins.get(), scratch.stride};
  typename A::Pixel* const start = scratch.rows.get() + row_step + kPack<typename A::Pixel>;
  for (int64_t first = 0; first < job.cells_across; first += scratch.cells_together) {
    const int64_t cells = std::min(scratch.cells_together, job.cells_across - first);
    const Region region{row * job.cell_rows, (row + 1) * job.cell_rows, first * job.cell_columns,
                        cells * job.cell_columns};
    copy_rows(job, scratch, source, region, start);
    for (int64_t y = 0; y < job.cell_rows; ++y)
      vote<A>(job, borders, scratch, start + y * row_step, region.top + y, region, votes.magnitude + y * votes.stride,
              votes.bin + y * votes.stride);
    for (int64_t cell = 0; cell < cells; ++cell)
      fill_histogram(votes, cell * job.cell_columns, job.cell_rows, job.cell_columns, job.orientations,
                     histograms + (first + cell) * job.orientations);
    for (int64_t cell = first; energy && cell < first + cells; ++cell)
      energy[cell] = energy_of(histograms + cell * job.orientations, job.orientations, norm);
  }
}

#define INPAINT_HOG_CELLS(A)                                                                             \
  INPAINT_CLONES void fill_cells(const Job& job, const Borders<A>& borders, Scratch<A>& scratch,         \
                                 const Source<A>& source, int64_t row, BlockNorm norm, A::T* histograms, \
                                 A::T* energy) {                                                         \
    fill_cells_body<A>(job, borders, scratch, source, row, norm, histograms, energy);                    \
  }
INPAINT_HOG_CELLS(EightBit)
INPAINT_HOG_CELLS(SixteenBit)
INPAINT_HOG_CELLS(Single)
INPAINT_HOG_CELLS(Wide)

INPAINT_CLONES void fill_blocks(const BlockShape& shape, const float* histograms, const float* energy, float* to) {
  normalise_blocks(shape, histograms, energy, to);
}
INPAINT_CLONES void fill_blocks(const BlockShape& shape, const double* histograms, const double* energy, double* to) {
  normalise_blocks(shape, histograms, energy, to);
}

INPAINT_CLONES void draw(const Lines<float>* lines, int64_t kinds, int64_t y, const float* histograms, int64_t cells,
                         int64_t orientations, float* to, int64_t width) {
  draw_row(lines, kinds, y, histograms, cells, orientations, to, width);
}
INPAINT_CLONES void draw(const Lines<double>* lines, int64_t kinds, int64_t y, const double* histograms, int64_t cells,
                         int64_t orientations, double* to, int64_t width) {
  draw_row(lines, kinds, y, histograms, cells, orientations, to, width);
}

// ---- The call ----------------------------------------------------------------------------------------------------

// The borders of the last number of bins that was asked for: finding them takes as long as a small image.
template <class A>
std::shared_ptr<const Borders<A>> borders_for(int64_t orientations) {
  static std::mutex mutex;
  static std::shared_ptr<const Borders<A>> kept;
  // Whoever finds them in use goes on without. That also keeps a forked child safe, for which nobody unlocks.
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (lock.owns_lock() && kept && kept->orientations == orientations) return kept;
  auto borders = std::make_shared<const Borders<A>>(orientations);
  if (lock.owns_lock()) kept = borders;
  return borders;
}

// Large outputs come from torch untouched: the system may then give them huge pages, if they come fresh from it, as
// after a larger tensor was freed (measured: filling the 20 MB of a photo of 2000 x 2000 takes 7.5 ms instead of 16).
void ask_for_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const int64_t begin = round_up(reinterpret_cast<intptr_t>(memory), LargeBlocks::kHugePage);
  const int64_t end = (reinterpret_cast<intptr_t>(memory) + bytes) / LargeBlocks::kHugePage * LargeBlocks::kHugePage;
  if (bytes >= LargeBlocks::kSmallest && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Lines of the picture, [down][across][orientations][cell rows][cell columns]: cell (r, c) has those of
// (min(r, down - 1), min(c, across - 1)).
struct LineMasks {
  const bool* pixels;
  int64_t down, across;
};

// Out is the type of the features: float, or double for double images.
template <class A, class Element, class Out>
void run(const Job& job, const Element* images, BlockShape shape, const LineMasks& masks, Out* cells, Out* blocks,
         Out* picture) {
  typedef typename A::T T;
  const std::shared_ptr<const Borders<A>> borders = borders_for<A>(job.orientations);
  std::vector<Scratch<A>> scratch;
  for (int64_t worker = 0; worker < worker_count(); ++worker) scratch.emplace_back(job);
  const int64_t rows = job.batch * job.cells_down, row_length = job.cells_across * job.orientations;
  // Histograms are the features, or, padded, between the phases; of another type than these, of one row only.
  Buffer<Out> kept(cells ? 0 : rows * row_length + kPack<Out>);
  Buffer<Out> energy(blocks ? rows * job.cells_across : 0);
  Out* const histograms = cells ? cells : kept.get();
  Buffer<T> narrowed(std::is_same_v<T, Out> ? 0 : worker_count() * row_length);
  std::vector<Lines<Out>> lines;
  const int64_t mask_size = job.orientations * job.cell_rows * job.cell_columns;
  for (int64_t kind = 0; picture && kind < masks.down * masks.across; ++kind)
    lines.emplace_back(masks.pixels + kind * mask_size, job.orientations, job.cell_rows, job.cell_columns);
  const int64_t blocks_down = job.cells_down - shape.rows + 1;
  const int64_t block_row = shape.blocks_across * shape.rows * shape.columns * job.orientations;
  const int64_t work = job.cell_rows * job.width * (job.channels + 8);
  run_phases(blocks || picture ? 2 : 1, rows, work, [&](int64_t worker, int64_t phase, int64_t i) {
    const int64_t sample = i / job.cells_down, row = i % job.cells_down;
    const Out* own = histograms + i * row_length;
    if (phase == 0) {
      const auto source = Source<A>::of(images + sample * job.batch_stride);
      Out* to = histograms + i * row_length;
      Out* energies = blocks ? energy.get() + i * job.cells_across : nullptr;
      if constexpr (std::is_same_v<T, Out>) {
        fill_cells(job, *borders, scratch[worker], source, row, shape.norm, to, energies);
      } else {
        T* wide = narrowed.get() + worker * row_length;
        fill_cells(job, *borders, scratch[worker], source, row, shape.norm, wide, static_cast<T*>(nullptr));
        for (int64_t k = 0; k < row_length; ++k) to[k] = static_cast<Out>(wide[k]);
        for (int64_t cell = 0; energies && cell < job.cells_across; ++cell)
          energies[cell] = energy_of(to + cell * job.orientations, job.orientations, shape.norm);
      }
      return;
    }
    if (blocks && row < blocks_down)
      fill_blocks(shape, own, energy.get() + i * job.cells_across, blocks + (sample * blocks_down + row) * block_row);
    if (!picture) return;
    Out* to = picture + (sample * job.height + row * job.cell_rows) * job.width;
    for (int64_t y = 0; y < job.cell_rows; ++y, to += job.width)
      draw(lines.data() + std::min(row, masks.down - 1) * masks.across, masks.across, y, own, job.cells_across,
           job.orientations, to, job.width);
    if (row + 1 == job.cells_down) std::fill(to, picture + (sample + 1) * job.height * job.width, Out(0));
  });
}

// Calls `body` with (arithmetic, zero of the memory type, zero of the features' type).
template <class Body>
void dispatch_image(ScalarType type, bool transform_sqrt, const Body& body) {
  const auto integer = [&](auto arithmetic, auto element) {
    if (transform_sqrt) return body(Wide{}, element, float{});
    return body(arithmetic, element, float{});
  };
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      return integer(EightBit{}, uint8_t{});
    case ScalarType::Char:
      return integer(EightBit{}, int8_t{});
    case ScalarType::Short:
      return integer(SixteenBit{}, int16_t{});
    case ScalarType::UInt16:
      return integer(SixteenBit{}, uint16_t{});
    case ScalarType::Int:
      return body(Wide{}, int32_t{}, float{});
    case ScalarType::UInt32:
      return body(Wide{}, uint32_t{}, float{});
    case ScalarType::Long:
      return body(Wide{}, int64_t{}, float{});
    case ScalarType::UInt64:
      return body(Wide{}, uint64_t{}, float{});
    case ScalarType::Half:
      return body(Single{}, HalfBits{}, float{});
    case ScalarType::BFloat16:
      return body(Single{}, BFloatBits{}, float{});
    case ScalarType::Float:
      return body(Single{}, float{}, float{});
    case ScalarType::Double:
      return body(Wide{}, double{}, double{});
    default:
      STD_TORCH_CHECK(false, "images: expected a real dtype, got ", torch::headeronly::toString(type));
  }
}

BlockNorm block_norm_of(const std::string& name) {
  if (name == "L1") return BlockNorm::l1;
  if (name == "L1-sqrt") return BlockNorm::l1_sqrt;
  if (name == "L2") return BlockNorm::l2;
  STD_TORCH_CHECK(name == "L2-Hys", "block_norm: expected 'L1', 'L1-sqrt', 'L2' or 'L2-Hys', got '", name, "'");
  return BlockNorm::l2_hys;
}

// images [B, C, H, W] -> cells [B, cells y, cells x, n] or blocks [B, blocks y, blocks x, block rows, block columns,
// n], and with lines [ky, kx, n, cell rows, cell columns] bool the picture [B, H, W].
std::tuple<Tensor, Tensor> hog(const Tensor& images, const std::optional<Tensor>& lines, int64_t orientations,
                               int64_t cell_rows, int64_t cell_columns, int64_t block_rows, int64_t block_columns,
                               const std::string& block_norm, bool transform_sqrt, bool cells) {
  check_rank(images, "images", 4);
  STD_TORCH_CHECK(orientations >= 1 && cell_rows >= 1 && cell_columns >= 1 && block_rows >= 1 && block_columns >= 1,
                  "hog: expected positive sizes");
  const int64_t batch = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t down = height / cell_rows, across = width / cell_columns;
  const int64_t blocks_down = down - block_rows + 1, blocks_across = across - block_columns + 1;
  STD_TORCH_CHECK(channels >= 1 && down >= 1 && across >= 1 && (cells || (blocks_down >= 1 && blocks_across >= 1)),
                  "images: expected at least one channel and one block");
  if (lines) {
    check_dense(*lines, "lines", 5);
    STD_TORCH_CHECK(lines->scalar_type() == ScalarType::Bool && lines->size(0) >= 1 && lines->size(1) >= 1 &&
                        lines->size(2) == orientations && lines->size(3) == cell_rows && lines->size(4) == cell_columns,
                    "lines: expected [ky, kx, orientations, cell rows, cell columns] bool");
  }
  const Job job{
      batch,     channels,     height, width,  images.stride(0), images.stride(1), images.stride(2), images.stride(3),
      cell_rows, cell_columns, down,   across, orientations,     transform_sqrt};
  const BlockShape shape{across, blocks_across, block_rows, block_columns, orientations, block_norm_of(block_norm)};
  const ScalarType type = images.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor features =
      cells ? torch::stable::new_empty(images, {batch, down, across, orientations}, type)
            : torch::stable::new_empty(
                  images, {batch, blocks_down, blocks_across, block_rows, block_columns, orientations}, type);
  Tensor picture = lines ? torch::stable::new_empty(images, {batch, height, width}, type)
                         : torch::stable::new_empty(images, {0}, type);
  LineMasks masks{};
  if (lines) masks = {static_cast<const bool*>(lines->const_data_ptr()), lines->size(0), lines->size(1)};
  if (batch == 0) return {features, picture};
  dispatch_image(images.scalar_type(), transform_sqrt, [&](auto arithmetic, auto element, auto out) {
    using A = decltype(arithmetic);
    using Element = decltype(element);
    using Out = decltype(out);
    Out* to = static_cast<Out*>(features.mutable_data_ptr());
    Out* drawn = lines ? static_cast<Out*>(picture.mutable_data_ptr()) : nullptr;
    ask_for_huge_pages(to, features.numel() * static_cast<int64_t>(sizeof(Out)));
    if (lines) ask_for_huge_pages(drawn, picture.numel() * static_cast<int64_t>(sizeof(Out)));
    run<A, Element, Out>(job, static_cast<const Element*>(images.const_data_ptr()), shape, masks, cells ? to : nullptr,
                         cells ? nullptr : to, drawn);
  });
  return {features, picture};
}

}  // namespace
}  // namespace inpaint

STABLE_TORCH_LIBRARY_IMPL(inpaint_native, CPU, m) { m.impl("hog", TORCH_BOX(&inpaint::hog)); }
