// A feature, or the gradient of an FSP matrix, as the FSP kernels read it: some channels at some positions, pooled on the way, into a tile
// of shared memory.
#pragma once

#include <type_traits>

#include "cuda/host.cuh"
#include "cuda/fsp/mma.cuh"

namespace fastkd {

// kSpread: the gradient of averaging: each position of a finer grid is the sum of the windows' numbers that it counts in, shared out.
enum class Pool : uint8_t { kNone, kAvg, kMax, kSpread };

// kOne: neighbouring threads take neighbouring positions, a number at a time; kChannels: so, 16 bytes of channels at a time;
// kPositions: 16 bytes of positions at a time.
enum class Reading : uint8_t { kOne, kChannels, kPositions };

struct Operand {
  const void* data;
  int64_t stride_n, stride_c, stride[3];
  int32_t channels, positions;
  int32_t size[3];  // the feature's own
  int32_t grid[3];  // what the positions walk: the size of what it is pooled, or spread, to
  DType dtype;
  Pool pool;
  Reading reading;
  bool linear : 1;  // not pooled, and position s lies at s * stride[2]
  bool exact : 1;   // its numbers are bfloat16's
  bool halved : 1;  // the finer of size and grid is twice the other in the last two dimensions, and equal in the first
};

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
FASTKD_BOTH bool is_near(int64_t size, int64_t grid) { return (grid + 1) * (size % grid) + grid < int64_t{1} << 31; }

// The numbers of an axis of `size` that position `at` of a `grid` is pooled from, [begin, end): PyTorch's windows. And the positions of a
// `size` whose windows hold the number `at` of the `grid` that they are taken from.
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

// How many numbers the window at (d, h, w) of `size` averages, of those of `grid`.
template <bool FAR>
FASTKD_BOTH int32_t share_of(int32_t d, int32_t h, int32_t w, const int32_t* size, const int32_t* grid) {
  return (window_end<FAR>(d, grid[0], size[0]) - window_begin<FAR>(d, grid[0], size[0])) *
         (window_end<FAR>(h, grid[1], size[1]) - window_begin<FAR>(h, grid[1], size[1])) *
         (window_end<FAR>(w, grid[2], size[2]) - window_begin<FAR>(w, grid[2], size[2]));
}

// The offset of a position that is not pooled.
FASTKD_BOTH int64_t offset_of(const Operand& x, int32_t s) {
  if (x.linear) return s * x.stride[2];
  int32_t at[3];
  place_of(s, x.size, at);
  return at[0] * x.stride[0] + at[1] * x.stride[1] + at[2] * x.stride[2];
}

// How numbers lie in memory: those of 16 bits are told apart where they are widened, which spares a copy of the code around.
struct Sixteen {
  uint16_t bits;
};

template <typename A, typename T>
FASTKD_DEVICE A widened(T x, bool) {
  return static_cast<A>(x);
}

template <typename A>
FASTKD_DEVICE A widened(Sixteen x, bool is_bfloat16) {
  Half half;
  half.x = x.bits;
  return static_cast<A>(is_bfloat16 ? float_of(static_cast<uint32_t>(x.bits) << 16) : static_cast<float>(half));
}

// Calls f(T()) with the type that holds numbers of a dtype. Float kernels meet no float64.
template <typename A, typename F>
FASTKD_DEVICE void with_width(DType dtype, const F& f) {
  if (dtype == DType::kHalf || dtype == DType::kBFloat16) {
    f(Sixteen());
  } else if constexpr (sizeof(A) == 8) {
    dtype == DType::kDouble ? f(double()) : f(float());
  } else {
    f(float());
  }
}

// What one load brings: 16 bytes of numbers, or one.
template <typename T, int P>
struct Loaded {
  std::conditional_t<P == 1, T, Pack> raw;

  FASTKD_MEMBER void load(const T* from) {
    if constexpr (P == 1) {
      raw = *from;
    } else {
      raw = load_pack(from);
    }
  }
  template <typename A>
  FASTKD_MEMBER A number(int i, bool is_bfloat16) const {
    if constexpr (P == 1) {
      return widened<A>(raw, is_bfloat16);
    } else {
      return widened<A>(get<T>(raw, i), is_bfloat16);
    }
  }
};

template <typename A, typename T, int P>
FASTKD_DEVICE void load_numbers(const T* from, bool is_bfloat16, A (&to)[P]) {
  Loaded<T, P> loaded;
  loaded.load(from);
  FASTKD_UNROLL
  for (int i = 0; i < P; ++i) to[i] = loaded.template number<A>(i, is_bfloat16);
}

// Whether a number takes the place of the largest so far: of equal ones the first stays; a NaN is larger than anything.
template <typename A>
FASTKD_DEVICE bool is_larger(A number, A largest) {
  return number > largest || number != number;
}

// P channels from `from` on, at the position whose box of numbers this is.
template <typename A, typename T, int P>
FASTKD_DEVICE void load_pooled(const Operand& x, const T* from, const Box& box, A (&to)[P]) {
  FASTKD_UNROLL
  for (int i = 0; i < P; ++i) to[i] = 0;
  bool first = true;
  const bool is_bfloat16 = x.dtype == DType::kBFloat16;
  FASTKD_ROLLED
  for (int32_t d = box.begin[0]; d < box.end[0]; ++d) {
    FASTKD_ROLLED
    for (int32_t h = box.begin[1]; h < box.end[1]; ++h) {
      FASTKD_ROLLED
      for (int32_t w = box.begin[2]; w < box.end[2]; ++w) {
        A one[P];
        load_numbers<A, T, P>(from + (d * x.stride[0] + h * x.stride[1] + w * x.stride[2]), is_bfloat16, one);
        const A share = x.pool == Pool::kSpread ? inverse_of<A>(share_of<false>(d, h, w, x.size, x.grid)) : A(1);
        FASTKD_UNROLL
        for (int i = 0; i < P; ++i) {
          if (x.pool == Pool::kMax) {
            if (first || is_larger(one[i], to[i])) to[i] = one[i];
          } else {
            to[i] += one[i] * share;
          }
        }
        first = false;
      }
    }
  }
  if (x.pool == Pool::kAvg) {
    const A share = inverse_of<A>(count_of(box));
    FASTKD_UNROLL
    for (int i = 0; i < P; ++i) to[i] *= share;
  }
}

// The windows of an operand that is halved: all that a thread loads is on its way before it waits for the first of it.
template <bool SPREAD>
constexpr int kWindow = SPREAD ? 1 : 4;

// Where the window of position s begins, from the beginning of its channel.
template <bool SPREAD>
FASTKD_BOTH int64_t window_offset(const Operand& x, int32_t s) {
  int32_t at[3];
  place_of(s, x.grid, at);
  const int32_t h = SPREAD ? at[1] / 2 : at[1] * 2, w = SPREAD ? at[2] / 2 : at[2] * 2;
  return at[0] * x.stride[0] + h * x.stride[1] + w * x.stride[2];
}

template <typename T, int P, int N>
FASTKD_DEVICE void load_window(const Operand& x, const T* from, Loaded<T, P> (&to)[N]) {
  FASTKD_UNROLL
  for (int j = 0; j < N; ++j) to[j].load(from + (j / 2 * x.stride[1] + j % 2 * x.stride[2]));
}

// Number i of what load_window() has loaded, pooled or spread.
template <typename A, typename T, int P, int N>
FASTKD_DEVICE A pooled(const Operand& x, const Loaded<T, P> (&window)[N], int i) {
  const bool is_bfloat16 = x.dtype == DType::kBFloat16;
  A total = window[0].template number<A>(i, is_bfloat16);
  FASTKD_UNROLL
  for (int j = 1; j < N; ++j) {
    const A one = window[j].template number<A>(i, is_bfloat16);
    if (x.pool == Pool::kMax) {
      if (is_larger(one, total)) total = one;
    } else {
      total += one;
    }
  }
  return x.pool == Pool::kMax ? total : total * A(0.25);
}

// One number of a feature, whatever it is.
template <typename A>
FASTKD_DEVICE A number_of(const Operand& x, int64_t at) {
  A value[1];
  with_width<A>(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    load_numbers<A, T, 1>(static_cast<const T*>(x.data) + at, x.dtype == DType::kBFloat16, value);
  });
  return value[0];
}

// Where the maximum of a box lies, counted through the feature's own positions. from: where its channel begins.
template <typename A>
FASTKD_DEVICE int32_t place_of_maximum(const Operand& x, int64_t from, const Box& box) {
  A most = 0;
  int32_t place = -1;
  FASTKD_ROLLED
  for (int32_t d = box.begin[0]; d < box.end[0]; ++d) {
    FASTKD_ROLLED
    for (int32_t h = box.begin[1]; h < box.end[1]; ++h) {
      FASTKD_ROLLED
      for (int32_t w = box.begin[2]; w < box.end[2]; ++w) {
        const A one = number_of<A>(x, from + d * x.stride[0] + h * x.stride[1] + w * x.stride[2]);
        if (place < 0 || is_larger(one, most)) {
          most = one;
          place = (d * x.size[1] + h) * x.size[2] + w;
        }
      }
    }
  }
  return place;
}

// As place_of_maximum(), of 2 x 2 numbers from (d, h, w) on, all of which are loaded before they are compared.
template <typename A>
FASTKD_DEVICE int32_t place_of_maximum_of_four(const Operand& x, int64_t from, int32_t d, int32_t h, int32_t w) {
  int32_t most = 0;
  with_width<A>(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    Loaded<T, 1> window[4];
    load_window(x, static_cast<const T*>(x.data) + (from + d * x.stride[0] + h * x.stride[1] + w * x.stride[2]), window);
    A largest = window[0].template number<A>(0, x.dtype == DType::kBFloat16);
    FASTKD_UNROLL
    for (int j = 1; j < 4; ++j) {
      const A one = window[j].template number<A>(0, x.dtype == DType::kBFloat16);
      if (!is_larger(one, largest)) continue;
      largest = one;
      most = j;
    }
  });
  return (d * x.size[1] + h + most / 2) * x.size[2] + w + most % 2;
}

// Writes one number of a gradient.
template <typename A>
FASTKD_DEVICE void store_number(const Operand& x, int64_t at, A value) {
  void* to = const_cast<void*>(x.data);
  if (x.dtype == DType::kFloat) {
    static_cast<float*>(to)[at] = static_cast<float>(value);
  } else if (x.dtype == DType::kBFloat16) {
    static_cast<BFloat16*>(to)[at] = static_cast<BFloat16>(static_cast<float>(value));
  } else if (x.dtype == DType::kHalf) {
    static_cast<Half*>(to)[at] = static_cast<Half>(static_cast<float>(value));
  } else {
    static_cast<double*>(to)[at] = static_cast<double>(value);
  }
}

}  // namespace fastkd
