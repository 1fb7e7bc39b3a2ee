// How the blocks of a launch go through features: every operator of attention maps reads (and may write) one
// or several tensors of one shape as a table for each sample, cut into units of about equal bytes; a block
// handles one unit.
//
// By columns (positions in planes, or any other strides): a row is a channel, a column a position. Threads
// lie along the columns, `width` numbers each, and `groups` rows side by side. Where a map's size is no
// multiple of 16 bytes (7x7), `fold` channels are one row: then rows are, and loads stay aligned, while a
// thread still has the same positions in every row. What does not lie in such packs is read number by number,
// and added in the same order. By rows (channels last): a row is a position, a column a channel; `across`
// lanes of a warp share a row, and rows side by side or, of wide rows, columns further on keep the memory
// busy.
#pragma once

#include "common/attention_options.h"
#include "cuda/host.cuh"

namespace fastkd {

constexpr int kThreads = 256;
// Packs of a tensor that a thread has on their way at once, and of each of two tensors.
constexpr int kUnroll = 4, kUnrollTwo = 2;
// How many blocks of a multiprocessor the registers are to suffice for: as many as need no spilling. kTwo: a
// kernel that may load two tensors at once.
// By calculation, for an H200, which has to have 4.8 TB/s * 0.8 us / 132 = 29 KiB on their way to each
// multiprocessor at any time: three blocks have 48 KiB while all of them load, and four have 64. A block
// that begins or ends loads nothing. With three, which was measured, losses reached 87 % of a copy's rate.
template <typename A, bool kTwo = false>
constexpr int kBlocks = sizeof(A) == sizeof(double) ? 2
                        : kTwo                      ? 3
                                                    : 4;
// The most columns of a unit, or, by rows, the most rows: each has a number in shared memory.
constexpr int kTile = 2048;

struct MatrixView {
  int32_t rows, columns;
  int32_t chunk;    // rows of a unit
  int32_t tiles;    // units side by side: 1 by rows
  int32_t units;    // of a sample
  int32_t parts;    // sums of a position, which are then added up; see parts_of()
  int32_t size[2];  // the last two spatial sizes
  DType dtype;
  int16_t across;  // by columns: packs of a unit's row; by rows: lanes of a row, a power of two
  int16_t groups;  // by columns: of rows, each of which is summed apart; by rows: rows side by side
  int8_t width;    // of a pack: 16 bytes of numbers, or 1
  int8_t by_rows;
  int8_t once;       // 1: what is read will not be read again, and need not stay in the cache
  int8_t fold_bits;  // `fold` is a power of two: 2 to this; 0 by rows
};

// Where a tensor lies that is seen as such a matrix.
struct Place {
  void* data;
  int64_t stride_n, stride_row;  // by columns: of channels
  int64_t stride[3];             // of the spatial dimensions; used by columns of width 1
};

// What one unit is of its sample's table.
struct Part {
  int32_t chunk;  // its number
  int32_t first_row, end_row, first_column, columns;
};

FASTKD_BOTH int32_t smaller_of(int32_t a, int32_t b) { return a < b ? a : b; }

// a / b of numbers that are not negative. A GPU divides in two dozen instructions, and each warp of a block
// goes through them before its first load: so the host divides where it can, and signs are left out.
FASTKD_BOTH int32_t quotient_down(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

FASTKD_BOTH Part part_of(const MatrixView& w, int32_t unit) {
  const int32_t chunk = w.tiles == 1 ? unit : quotient_down(unit, w.tiles);
  const int32_t first_row = chunk * w.chunk;
  const int32_t tile = w.across * w.width;
  const int32_t first_column = (unit - chunk * w.tiles) * tile;
  return {chunk, first_row, smaller_of(first_row + w.chunk, w.rows), first_column,
          w.by_rows ? w.columns : smaller_of(tile, w.columns - first_column)};
}

FASTKD_BOTH int32_t positions_of(const MatrixView& w) {
  return w.by_rows ? w.rows : w.columns >> w.fold_bits;
}
// A unit that is not cut along columns adds the channels of a folded row up itself.
FASTKD_BOTH int32_t columns_of_sums(const MatrixView& w) {
  return w.tiles == 1 ? w.columns >> w.fold_bits : w.columns;
}

// Which packs a thread has at once: kUnroll of them or fewer, each `rows` and `columns` beyond the one
// before.
struct Step {
  int32_t rows, columns;
};

// Whether rows have so many columns that a thread's packs follow each other within one.
FASTKD_BOTH bool is_wide(const MatrixView& w) {
  return w.by_rows && w.columns >= kUnroll * w.across * w.width;
}
// From one of the packs to the next, and from all of them to the next.
FASTKD_BOTH Step step_of(const MatrixView& w) {
  return is_wide(w) ? Step{0, w.across * w.width} : Step{w.groups, 0};
}
FASTKD_BOTH Step stride_of(const MatrixView& w, int unroll) {
  const int32_t columns = w.across * w.width;
  return is_wide(w) ? Step{w.groups, unroll * columns} : Step{unroll * w.groups, columns};
}
// By rows: which of the rows side by side this thread has a part of, and which part.
FASTKD_DEVICE int32_t row_of_thread(const MatrixView& w) {
  return static_cast<int32_t>(threadIdx.x * static_cast<uint32_t>(w.groups) / kThreads);
}
FASTKD_DEVICE int32_t lane_of_thread(const MatrixView& w) {
  return static_cast<int32_t>(threadIdx.x) & (w.across - 1);
}

// Whether the pack `u` steps from (row, column) is there: columns go as far as the part's, or by rows the
// table's.
FASTKD_BOTH bool is_within(const Part& part, const Step& step, int32_t row, int32_t column, int u) {
  return row + u * step.rows < part.end_row && column + u * step.columns < part.first_column + part.columns;
}

// Where position s lies, from the beginning of its channel; size: the last two spatial sizes.
FASTKD_BOTH int64_t spatial_offset(const int32_t* size, const int64_t* stride, int32_t s) {
  const int32_t row = s / size[1], depth = row / size[0];
  return depth * stride[0] + (row - depth * size[0]) * stride[1] + (s - row * size[1]) * stride[2];
}

// Where a thread's numbers of a row begin.
template <typename T, int W>
FASTKD_DEVICE T* row_of(const MatrixView& w, const Place& x, int64_t n, int32_t row, int32_t column) {
  int64_t along = column;
  if (W == 1 && !w.by_rows) {
    const int32_t positions = positions_of(w), channel = column / positions;
    along = channel * x.stride_row + spatial_offset(w.size, x.stride, column - channel * positions);
  }
  return static_cast<T*>(x.data) + n * x.stride_n +
         static_cast<int64_t>(row) * (x.stride_row << w.fold_bits) + along;
}

template <typename T, int W>
FASTKD_DEVICE Pack load_some(const T* pointer, bool wanted, bool once) {
  if constexpr (W > 1) return load_pack_if(pointer, wanted, once);
  Pack one{};
  if (wanted) set<T>(one, 0, *pointer);
  return one;
}

template <typename T, int W>
FASTKD_DEVICE void store_some(T* pointer, const Pack& pack) {
  if constexpr (W > 1) {
    store_pack(pointer, pack);
  } else {
    *pointer = get<T>(pack, 0);
  }
}

// How far a thread's packs lie from each other.
FASTKD_DEVICE int64_t distance_of(const MatrixView& w, const Place& x, const Step& step) {
  return (step.rows << w.fold_bits) * x.stride_row + step.columns;
}

// Reads a thread's next packs; those beyond the part's end are zeros.
template <typename T, int W, int U>
FASTKD_DEVICE void load_packs(const MatrixView& w, const Place& x, const Part& part, const Step& step,
                              int64_t n, int32_t row, int32_t column, Pack (&v)[U]) {
  const T* at = row_of<const T, W>(w, x, n, row, column);
  const int64_t distance = distance_of(w, x, step);
  FASTKD_UNROLL
  for (int u = 0; u < U; ++u)
    v[u] = load_some<T, W>(at + u * distance, is_within(part, step, row, column, u), w.once);
}

// A number in the type of accumulation, and back; a double goes to 16 bits through float.
template <typename A, typename T>
FASTKD_DEVICE A wide(T v) {
  if constexpr (sizeof(T) == 2) return static_cast<float>(v);
  return v;
}
template <typename T, typename A>
FASTKD_DEVICE T narrow(A v) {
  if constexpr (sizeof(T) == 2) return static_cast<T>(static_cast<float>(v));
  return static_cast<T>(v);
}

template <typename A>
FASTKD_DEVICE A load_number(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kHalf:
      return wide<A>(static_cast<const Half*>(data)[at]);
    case DType::kBFloat16:
      return wide<A>(static_cast<const BFloat16*>(data)[at]);
    case DType::kFloat:
      return static_cast<A>(static_cast<const float*>(data)[at]);
    default:
      return static_cast<A>(static_cast<const double*>(data)[at]);
  }
}

// A type, and the numbers that are read of it at a time, as an argument.
template <typename T, int W>
struct Format {
  using Number = T;
  static constexpr int kWidth = W;
};

// f(Format) for the numbers of a matrix. A kernel that accumulates in float meets no double, and one in
// double nothing else unless dtypes are mixed.
template <bool kMixed, typename A, typename F>
FASTKD_DEVICE void with_format(const MatrixView& w, const F& f) {
  const auto width = [&](auto number) {
    using T = decltype(number);
    if (w.width > 1) return f(Format<T, kPack<T>>{});
    f(Format<T, 1>{});
  };
  constexpr bool kDouble = sizeof(A) == sizeof(double);
  if constexpr (kDouble) {
    if (!kMixed || w.dtype == DType::kDouble) return width(double{});
  }
  if constexpr (!kDouble || kMixed) {
    if (w.dtype == DType::kHalf) return width(Half{});
    if (w.dtype == DType::kBFloat16) return width(BFloat16{});
    width(float{});
  }
}

// The host's side.

// The common view of tensors of one shape and dtype, in units of about `goal` bytes of each.
MatrixView matrix_view_of(const Feature* const* tensors, int count, int64_t goal);
inline MatrixView matrix_view_of(const Feature& x, int64_t goal) {
  const Feature* const tensors[] = {&x};
  return matrix_view_of(tensors, 1, goal);
}
// A map (N, *S), read number by number.
MatrixView matrix_view_of_map(const Feature& map);
Place place_of(const Feature& x, const MatrixView& view);

void check_served(const AttentionOptions& options);
int64_t bytes_of(const Feature& x);
// How many bytes of each of its tensors a unit should have, where those of a launch's features are so many.
int64_t unit_goal(int64_t bytes);

}  // namespace fastkd
