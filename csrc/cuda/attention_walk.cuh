// How the blocks of a launch go through features: every operator of attention maps reads (and may write) one or several tensors of one
// shape as a table for each sample, cut into units of about equal bytes; a block handles one unit.
//
// By columns (positions in planes, or any other strides): a row is a channel, a column a position. Threads lie along the columns, `width`
// numbers each, and as many rows side by side as the block's threads allow. Where a map's size is no multiple of 16 bytes (7x7), `fold`
// channels are one row: then rows are, and loads stay aligned, while a thread still has the same positions in every row.
// By rows (channels last): a row is a position, a column a channel; `across` lanes of a warp share a row.
#pragma once

#include "attention_options.h"
#include "cuda/host.cuh"

namespace fastkd {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;   // rows of a thread that are on their way at once
constexpr int kTile = 2048;  // most columns of a unit, or rows by rows: what has a number each in shared memory

struct Walk {
  int32_t rows, columns;
  int32_t chunk;    // rows of a unit
  int32_t tiles;    // units side by side: 1 by rows
  int32_t units;    // of a sample
  int32_t fold;     // 1 by rows
  int32_t size[2];  // the last two spatial sizes
  DType dtype;
  int16_t across;  // by columns: packs of a unit; by rows: lanes of a row, a power of two
  int8_t width;    // of a pack: 16 bytes of numbers, or 1
  int8_t by_rows;
};

// Where a tensor lies under a walk.
struct Place {
  void* data;
  int64_t stride_n, stride_row;
  int64_t stride[3];  // of the spatial dimensions: by columns of width 1
};

// What one unit is of its sample's table.
struct Part {
  int32_t first_row, end_row, first_column, columns;
};

FASTKD_BOTH int32_t smaller_of(int32_t a, int32_t b) { return a < b ? a : b; }

FASTKD_BOTH Part part_of(const Walk& w, int32_t unit) {
  const int32_t first_row = unit / w.tiles * w.chunk;
  const int32_t tile = w.across * w.width;
  const int32_t first_column = unit % w.tiles * tile;
  return {first_row, smaller_of(first_row + w.chunk, w.rows), first_column,
          w.by_rows ? w.columns : smaller_of(tile, w.columns - first_column)};
}

FASTKD_BOTH int32_t positions_of(const Walk& w) { return w.by_rows ? w.rows : w.columns / w.fold; }
// Sums that a position has before they are added up: one for each chunk of rows and channel of a folded row. By rows there is but one.
FASTKD_BOTH int32_t parts_of(const Walk& w) { return w.by_rows ? 1 : w.units / w.tiles * w.fold; }

// Where position s lies, from the beginning of its channel; size: the last two spatial sizes.
FASTKD_BOTH int64_t spatial_offset(const int32_t* size, const int64_t* stride, int32_t s) {
  const int32_t row = s / size[1], depth = row / size[0];
  return depth * stride[0] + (row - depth * size[0]) * stride[1] + (s - row * size[1]) * stride[2];
}

// Where a row's numbers begin, for a thread whose first column is `column`.
template <typename T>
FASTKD_DEVICE T* row_of(const Walk& w, const Place& x, int64_t n, int32_t row, int32_t column) {
  const int64_t along = w.by_rows || w.width > 1 ? column : spatial_offset(w.size, x.stride, column);
  return static_cast<T*>(x.data) + n * x.stride_n + row * x.stride_row + along;
}

template <typename T, int W>
FASTKD_DEVICE Pack load_some(const T* pointer) {
  if constexpr (W > 1) return load_pack(pointer);
  Pack one{};
  set<T>(one, 0, *pointer);
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

// f(Format) for the numbers of a walk; a kernel that accumulates in float meets no double.
template <typename A, typename F>
FASTKD_DEVICE void with_format(const Walk& w, const F& f) {
  const auto width = [&](auto number) {
    using T = decltype(number);
    if (w.width > 1) return f(Format<T, kPack<T>>{});
    f(Format<T, 1>{});
  };
  if (w.dtype == DType::kHalf) return width(Half{});
  if (w.dtype == DType::kBFloat16) return width(BFloat16{});
  if constexpr (sizeof(A) == sizeof(double)) {
    if (w.dtype == DType::kDouble) return width(double{});
  }
  width(float{});
}

// The host's side.

// The walk over tensors of one shape and dtype, in units of about `goal` bytes of each.
Walk walk_of(const Feature* const* tensors, int count, int64_t goal);
inline Walk walk_of(const Feature& x, int64_t goal) {
  const Feature* const tensors[] = {&x};
  return walk_of(tensors, 1, goal);
}
// A map (N, *S), read number by number.
Walk map_walk(const Feature& map);
Place place_of(const Feature& x, const Walk& walk);

void check_served(const AttentionOptions& options);
int64_t size_of(DType dtype);
int64_t bytes_of(const Feature& x);
// What a unit should have where a launch reads so many bytes.
int64_t unit_goal(int64_t bytes);

}  // namespace fastkd
