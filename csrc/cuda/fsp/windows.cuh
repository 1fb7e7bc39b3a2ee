// The windows of adaptive pooling, as PyTorch places them, and the divisions that find and average them.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"

namespace fastkd {

// 1 / count. Spelled out for float64, whose division is a call that costs registers.
template <typename A>
FASTKD_BOTH A inverse_of(int32_t count) {
  if constexpr (sizeof(A) == 4) {
    return 1.0f / static_cast<A>(count);
  } else {
    const A c = count;
    A y = 1.0f / static_cast<float>(count);
    FASTKD_UNROLL
    for (int i = 0; i < 2; ++i) y = y * (2 - c * y);
    return y;
  }
}

// (at * rest + more) / grid. FAR: for products of more than 32 bits too; 64-bit division is a call as well.
template <bool FAR>
FASTKD_BOTH int32_t quotient_of(int32_t at, int32_t rest, int32_t more, int32_t grid) {
  if (!FAR) return (at * rest + more) / grid;
  const int64_t product = static_cast<int64_t>(at) * rest + more;
  int32_t quotient = static_cast<int32_t>(static_cast<double>(product) * inverse_of<double>(grid));
  const int64_t left = product - static_cast<int64_t>(quotient) * grid;
  if (left < 0) --quotient;
  if (left >= grid) ++quotient;
  return quotient;
}

// Whether windows of an axis may be found without FAR.
FASTKD_BOTH bool is_near(int64_t size, int64_t grid) {
  return (grid + 1) * (size % grid) + grid < int64_t{1} << 31;
}

// PyTorch's windows: position `at` of a `grid` is pooled from the numbers [begin, end) of an axis of `size`.
// Of the opposite direction, from a `grid` that is pooled to `size`, they are the positions whose windows
// hold number `at`.
template <bool FAR>
FASTKD_BOTH int32_t window_begin(int32_t at, int32_t size, int32_t grid) {
  const int32_t whole = size / grid;
  return at * whole + quotient_of<FAR>(at, size - whole * grid, 0, grid);
}

template <bool FAR>
FASTKD_BOTH int32_t window_end(int32_t at, int32_t size, int32_t grid) {
  const int32_t whole = size / grid;
  return (at + 1) * whole + quotient_of<FAR>(at + 1, size - whole * grid, grid - 1, grid);
}

// A box of numbers, [begin, end) on each axis.
struct Box {
  int32_t begin[3], end[3];
};

FASTKD_BOTH void place_of(int32_t s, const int32_t* grid, int32_t* at) {
  const int32_t row = s / grid[2], depth = row / grid[1];
  at[0] = depth;
  at[1] = row - depth * grid[1];
  at[2] = s - row * grid[2];
}

template <bool FAR>
FASTKD_BOTH Box box_of(int32_t s, const int32_t* size, const int32_t* grid) {
  Box box;
  int32_t at[3];
  place_of(s, grid, at);
  FASTKD_UNROLL
  for (int d = 0; d < 3; ++d) {
    box.begin[d] = window_begin<FAR>(at[d], size[d], grid[d]);
    box.end[d] = window_end<FAR>(at[d], size[d], grid[d]);
  }
  return box;
}

FASTKD_BOTH int32_t count_of(const Box& box) {
  return (box.end[0] - box.begin[0]) * (box.end[1] - box.begin[1]) * (box.end[2] - box.begin[2]);
}

// Where every window holds as many numbers, `size` on each axis, and they do not overlap: where sizes divide.
struct Whole {
  // Pooled: what each bit of a number's place in its window stands for in memory, the last bit first. A
  // window has so many bits: sizes are powers of two.
  // Spread: for division by `size`: 2^31 / size, rounded up.
  int32_t step[4];
  uint8_t size[3];
  uint8_t count;  // of numbers that are loaded for one: 2, 4, 8 or 16 where pooled, 1 where spread; else 0
};
constexpr int kMostInWindow = 16;

// Where number j of a whole window lies, from its first.
FASTKD_BOTH int32_t offset_in(const Whole& whole, int j) {
  int32_t offset = 0;
  FASTKD_UNROLL
  for (int bit = 0; bit < 4; ++bit) {
    if (j >> bit & 1) offset += whole.step[bit];
  }
  return offset;
}

// Calls f with Whole's count as a constant. LEAST: 1 where windows may be spread, else 2.
//
// Each count is code of its own. With 4 alone the library of sm_90 had 3.99 MB instead of 4.53, and nvcc 13.0
// compiled forward.cu and backward.cu in 60 s of a busy CPU's time instead of 103. Constant shapes would be
// more code for fewer features: steps make one of 2 x 2, 1 x 4 and 4 x 1.
template <int LEAST, typename F>
FASTKD_DEVICE void with_count(int count, const F& f) {
  if (count == 4) return f(std::integral_constant<int, 4>());  // what networks have from stage to stage
  if constexpr (LEAST == 1) {
    if (count == 1) return f(std::integral_constant<int, 1>());
  }
  if (count == 2) return f(std::integral_constant<int, 2>());
  if (count == 8) return f(std::integral_constant<int, 8>());
  f(std::integral_constant<int, kMostInWindow>());
}

// How many numbers the window at (d, h, w) of `size` averages, of those of `grid`.
template <bool FAR>
FASTKD_BOTH int32_t share_of(int32_t d, int32_t h, int32_t w, const int32_t* size, const int32_t* grid) {
  return (window_end<FAR>(d, grid[0], size[0]) - window_begin<FAR>(d, grid[0], size[0])) *
         (window_end<FAR>(h, grid[1], size[1]) - window_begin<FAR>(h, grid[1], size[1])) *
         (window_end<FAR>(w, grid[2], size[2]) - window_begin<FAR>(w, grid[2], size[2]));
}

}  // namespace fastkd
