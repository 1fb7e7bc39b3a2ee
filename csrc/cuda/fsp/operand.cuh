// A feature, or the gradient of an FSP matrix, as the FSP kernels read it: some channels at some positions,
// pooled on the way, into a tile of shared memory.
#pragma once

#include "cuda/host.cuh"
#include "cuda/fsp/mma.cuh"
#include "cuda/fsp/windows.cuh"

namespace fastkd {

// kSpread: the gradient of averaging: each position of a finer grid is the sum of the windows' numbers that
// it counts in, shared out.
enum class Pool : uint8_t { kNone, kAvg, kMax, kSpread };

// kOne: neighbouring threads take neighbouring positions, a number at a time; kChannels: the same with 16
// bytes of channels at a time; kPositions: 16 bytes of positions at a time.
enum class Reading : uint8_t { kOne, kChannels, kPositions };

struct Operand {
  const void* data;
  int64_t stride_n, stride_c, stride[3];
  int32_t channels, positions;
  int32_t size[3];  // the feature's own
  int32_t grid[3];  // the sizes by which positions are counted: those that it is pooled, or spread, to
  Whole whole;
  DType dtype : 8;
  Pool pool;
  Reading reading;
  bool linear : 1;  // not pooled, and position s lies at s * stride[2]
  bool exact : 1;   // its numbers are bfloat16's
};

// The offset of a position that is not pooled.
FASTKD_BOTH int64_t offset_of(const Operand& x, int32_t s) {
  if (x.linear) return s * x.stride[2];
  int32_t at[3];
  place_of(s, x.size, at);
  return at[0] * x.stride[0] + at[1] * x.stride[1] + at[2] * x.stride[2];
}

// How numbers lie in memory: those of 16 bits are told apart where they are widened, which spares a copy of
// the code around.
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
  return static_cast<A>(is_bfloat16 ? float_of(static_cast<uint32_t>(x.bits) << 16)
                                    : static_cast<float>(half));
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

// Whether a number takes the place of the largest so far: the first of equal ones stays, a NaN takes it.
template <typename A>
FASTKD_DEVICE bool is_larger(A number, A largest) {
  return number > largest || number != number;
}

constexpr int kInFlight = 4;  // loads that a thread starts before it waits for the first

// Calls f(loaded, place) for each number of a box in its order, of P channels from `from` on; its place is
// counted through the feature's own positions.
template <typename T, int P, typename F>
FASTKD_DEVICE void for_each_in(const Box& box, const Operand& x, const T* from, const F& f) {
  const int32_t count = count_of(box);
  int32_t d = box.begin[0], h = box.begin[1], w = box.begin[2];
  FASTKD_ROLLED
  for (int32_t first = 0; first < count; first += kInFlight) {
    Loaded<T, P> loaded[kInFlight] = {};
    int32_t place[kInFlight];
    FASTKD_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      place[i] = (d * x.size[1] + h) * x.size[2] + w;
      if (first + i < count) loaded[i].load(from + (d * x.stride[0] + h * x.stride[1] + w * x.stride[2]));
      const bool next_row = ++w == box.end[2];
      if (next_row) w = box.begin[2];
      const bool next_plane = next_row && ++h == box.end[1];
      if (next_plane) h = box.begin[1];
      d += next_plane;
    }
    FASTKD_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i < count) f(loaded[i], place[i]);
    }
  }
}

// P channels from `from` on, at the position that is pooled from this box of numbers.
template <typename A, typename T, int P>
FASTKD_DEVICE void load_pooled(const Operand& x, const T* from, const Box& box, A (&to)[P]) {
  FASTKD_UNROLL
  for (int i = 0; i < P; ++i) to[i] = 0;
  bool first = true;
  for_each_in<T, P>(box, x, from, [&](const Loaded<T, P>& loaded, int32_t) {
    FASTKD_UNROLL
    for (int i = 0; i < P; ++i) {
      const A one = loaded.template number<A>(i, x.dtype == DType::kBFloat16);
      if (x.pool == Pool::kMax) {
        if (first || is_larger(one, to[i])) to[i] = one;
      } else {
        to[i] += one;
      }
    }
    first = false;
  });
  if (x.pool == Pool::kAvg) {
    const A share = inverse_of<A>(count_of(box));
    FASTKD_UNROLL
    for (int i = 0; i < P; ++i) to[i] *= share;
  }
}

// The same at a position that this box of averages counts in (kSpread): where sizes divide, one alone.
template <typename A, typename T, int P>
FASTKD_DEVICE void load_spread(const Operand& x, const T* from, const Box& box, A (&to)[P]) {
  FASTKD_UNROLL
  for (int i = 0; i < P; ++i) to[i] = 0;
  FASTKD_ROLLED
  for (int32_t d = box.begin[0]; d < box.end[0]; ++d) {
    FASTKD_ROLLED
    for (int32_t h = box.begin[1]; h < box.end[1]; ++h) {
      FASTKD_ROLLED
      for (int32_t w = box.begin[2]; w < box.end[2]; ++w) {
        A one[P];
        load_numbers<A, T, P>(from + (d * x.stride[0] + h * x.stride[1] + w * x.stride[2]),
                              x.dtype == DType::kBFloat16, one);
        const A share = inverse_of<A>(share_of<false>(d, h, w, x.size, x.grid));
        FASTKD_UNROLL
        for (int i = 0; i < P; ++i) to[i] += one[i] * share;
      }
    }
  }
}

// Where the whole window of position s begins, or what is spread to it lies, from the beginning of its
// channel.
FASTKD_BOTH int64_t window_offset(const Operand& x, int32_t s) {
  int32_t at[3];
  place_of(s, x.grid, at);
  int64_t offset = 0;
  FASTKD_UNROLL
  for (int d = 0; d < 3; ++d) {
    const int32_t place =
        x.whole.count == 1 ? static_cast<int32_t>(
                                 static_cast<uint64_t>(at[d]) * static_cast<uint32_t>(x.whole.step[d]) >> 31)
                           : at[d] * x.whole.size[d];
    offset += place * x.stride[d];
  }
  return offset;
}

// Starts all loads of a window before the first is waited for.
template <typename T, int P, int N>
FASTKD_DEVICE void load_window(const Whole& whole, const T* from, Loaded<T, P> (&to)[N]) {
  FASTKD_UNROLL
  for (int j = 0; j < N; ++j) to[j].load(from + offset_in(whole, j));
}

// The maximum, or the sum, of two numbers of a window in their order.
template <typename A>
FASTKD_DEVICE A joined(const Operand& x, A first, A second) {
  if (x.pool != Pool::kMax) return first + second;
  return is_larger(second, first) ? second : first;
}

// Number i of what load_window() has loaded: the maximum of a window, or the sum.
template <typename A, typename T, int P, int N>
FASTKD_DEVICE A pooled(const Operand& x, const Loaded<T, P> (&window)[N], int i) {
  const bool is_bfloat16 = x.dtype == DType::kBFloat16;
  A total = window[0].template number<A>(i, is_bfloat16);
  FASTKD_UNROLL
  for (int j = 1; j < N; ++j) total = joined(x, total, window[j].template number<A>(i, is_bfloat16));
  return total;
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

// Where the maximum of a box lies, counted through the feature's own positions. from: where its channel
// begins.
template <typename A>
FASTKD_DEVICE int32_t place_of_maximum(const Operand& x, int64_t from, const Box& box) {
  A most = 0;
  int32_t found = -1;
  with_width<A>(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_in<T, 1>(box, x, static_cast<const T*>(x.data) + from,
                      [&](const Loaded<T, 1>& loaded, int32_t place) {
                        const A one = loaded.template number<A>(0, x.dtype == DType::kBFloat16);
                        if (found >= 0 && !is_larger(one, most)) return;
                        most = one;
                        found = place;
                      });
  });
  return found;
}

// Which number of a whole window is its maximum; `from` is the window's first.
template <typename A>
FASTKD_DEVICE int place_in_window(const Operand& x, const Whole& whole, int64_t from) {
  int most = 0;
  with_width<A>(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_count<2>(whole.count, [&](auto count) {
      constexpr int N = decltype(count)::value;
      Loaded<T, 1> window[N];
      load_window(whole, static_cast<const T*>(x.data) + from, window);
      A largest = window[0].template number<A>(0, x.dtype == DType::kBFloat16);
      FASTKD_UNROLL
      for (int j = 1; j < N; ++j) {
        const A one = window[j].template number<A>(0, x.dtype == DType::kBFloat16);
        if (!is_larger(one, largest)) continue;
        largest = one;
        most = j;
      }
    });
  });
  return most;
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
