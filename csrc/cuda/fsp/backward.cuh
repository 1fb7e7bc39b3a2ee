// The backward kernel of FSP: tiles of a feature's gradient, channels x positions. Each is the sum of at most
// two products of a matrix's gradient with the other feature's channels, and of what the windows of coarser
// grids send, whose gradients a launch before has made.
#pragma once

#include "cuda/fsp/sum.cuh"

namespace fastkd {

// A gradient of what the feature was pooled to.
struct Gather {
  const void* from;
  int64_t stride_n, stride_c, stride_s;
  int32_t grid[3];
  Whole whole;
};

struct GradientArguments {
  Operand m[2], other[2];  // m: own channels x others' channels, as positions
  Operand out;
  Operand own;  // the feature, where maxima are looked up
  Gather gather[2];
  double scale[2];  // of the terms: 1 / positions
  int32_t terms, gathers;
  int32_t row_tiles, column_tiles, first_block;
  bool max;            // what is gathered goes to the maxima of windows
  bool channels_last;  // the gradient's layout, for the order of writing
};

struct BackwardArguments {
  static constexpr int kMost = 5;
  GradientArguments item[kMost];
  Operand upstream;  // one number; no data: 1
  double factor;     // of all
  int32_t items;
};
static_assert(sizeof(BackwardArguments) <= 4096, "a kernel takes 4096 bytes of arguments at most");

template <typename A>
FASTKD_BOTH constexpr size_t backward_shared() {
  const int operands = kFspTile * 32 + 32 * (kFspTile + 2) + 64, sums = kFspTile * (kFspTile + 1) + 64;
  return (operands > sums ? operands : sums) * sizeof(A);
}

// The windows over a position of a feature. If they are whole: where in the only one it lies, and its share.
struct Over {
  Box windows;
  int32_t place;
  float share;
};

FASTKD_DEVICE Over over(const Gather& gather, const Operand& own, int32_t s) {
  Over found = {box_of<true>(s, gather.grid, own.size), 0, 1.0f / gather.whole.count};
  int32_t at[3];
  place_of(s, own.size, at);
  FASTKD_UNROLL
  for (int d = 0; d < 3; ++d) {
    const int32_t size = gather.whole.size[d];
    found.place = found.place * size + at[d] - found.windows.begin[d] * size;
  }
  return found;
}

// What the windows over position s send, in their order.
template <typename A>
FASTKD_DEVICE A gathered(const Gather& gather, const GradientArguments& item, const Over& over, int64_t n,
                         int64_t c, int32_t s) {
  const Box& windows = over.windows;
  const A* from = static_cast<const A*>(gather.from) + n * gather.stride_n + c * gather.stride_c;
  A total = 0;
  FASTKD_ROLLED
  for (int32_t d = windows.begin[0]; d < windows.end[0]; ++d) {
    FASTKD_ROLLED
    for (int32_t h = windows.begin[1]; h < windows.end[1]; ++h) {
      FASTKD_ROLLED
      for (int32_t w = windows.begin[2]; w < windows.end[2]; ++w) {
        const int32_t at = (d * gather.grid[1] + h) * gather.grid[2] + w;
        const A number = from[at * gather.stride_s];
        const Whole& whole = gather.whole;
        if (!item.max) {
          total +=
              number * (whole.count ? static_cast<A>(over.share)
                                    : inverse_of<A>(share_of<true>(d, h, w, gather.grid, item.own.size)));
          continue;
        }
        const Operand& own = item.own;
        const int64_t channel = n * own.stride_n + c * own.stride_c;
        bool is_maximum;
        if (whole.count) {
          const int64_t begin = d * whole.size[0] * own.stride[0] + h * whole.size[1] * own.stride[1] +
                                w * whole.size[2] * own.stride[2];
          is_maximum = place_in_window<A>(own, whole, channel + begin) == over.place;
        } else {
          is_maximum = place_of_maximum<A>(own, channel, box_of<true>(at, own.size, gather.grid)) == s;
        }
        if (is_maximum) total += number;
      }
    }
  }
  return total;
}

template <typename A, Mode MODE>
FASTKD_DEVICE void add_term(FspSum<A, MODE>& sum, const Cut& cut, const Operand& m, const Operand& other,
                            int64_t n, int row, int column, A* tiles) {
  A* right = tiles + cut.rows * cut.depth;
  FASTKD_ROLLED
  for (int o = 0; o < m.positions; o += cut.depth) {
    stage_as<A, A, true, false>(m, n, tiles, row, cut.rows, o, cut.depth);
    stage<A, false>(other, n, right, o, cut.depth, column, cut.columns);
    sync_block();
    const Staged<A> both = {tiles, right, m.exact, other.exact};
    sum.template add<false, false>(cut, both, both, m.channels - row, other.positions - column,
                                   m.positions - o < cut.depth ? m.positions - o : cut.depth);
    sync_block();
  }
}

template <typename A, Mode MODE>
FASTKD_KERNEL_OF(kFspThreads, (kFspBlocks<A, MODE>))
fsp_backward(FASTKD_ARGUMENTS(BackwardArguments) call) {
  int p = 0;
  while (p + 1 < call.items && static_cast<int>(blockIdx.x) >= call.item[p + 1].first_block) ++p;
  const GradientArguments& item = call.item[p];
  const int local = static_cast<int>(blockIdx.x) - item.first_block,
            tile = local % (item.row_tiles * item.column_tiles);
  const int64_t n = local / (item.row_tiles * item.column_tiles);
  const int row0 = tile % item.row_tiles * kFspTile, column0 = tile / item.row_tiles * kFspTile;
  const Cut cut = cut_of(item.out.channels, item.out.positions, threadIdx.x / kWarp);
  A* tiles = reinterpret_cast<A*>(shared_memory());

  FspSum<A, MODE> sum;
  sum.clear();
  FASTKD_ROLLED
  for (int i = 0; i < item.terms; ++i) {
    if (i == 1) sum.times(static_cast<A>(item.scale[0] / item.scale[1]));
    add_term(sum, cut, item.m[i], item.other[i], n, row0, column0, tiles);
  }
  sum.lay_out(cut, tiles);
  sync_block();

  A factor = static_cast<A>(call.factor);
  if (call.upstream.data != nullptr) factor *= static_cast<A>(number_of<double>(call.upstream, 0));
  const A scale = item.terms ? static_cast<A>(item.scale[item.terms - 1]) : A(0);
  const int rows = item.out.channels - row0 < cut.rows ? item.out.channels - row0 : cut.rows;
  const int columns = item.out.positions - column0 < cut.columns ? item.out.positions - column0 : cut.columns;
  // neighbouring threads write neighbouring numbers
  const int across = item.channels_last ? cut.rows : cut.columns, bits = bits_of_size(across),
            other = kFspThreads >> bits;
  const int first = threadIdx.x & (across - 1), second = threadIdx.x >> bits;
  const int row_begin = item.channels_last ? first : second, row_step = item.channels_last ? cut.rows : other;
  const int column_begin = item.channels_last ? second : first,
            column_step = item.channels_last ? other : cut.columns;
  const auto each = [&](const auto& begin, const auto& f) {
    FASTKD_ROLLED
    for (int column = column_begin; column < columns; column += column_step) {
      const auto of_column = begin(column0 + column);
      FASTKD_ROLLED
      for (int row = row_begin; row < rows; row += row_step)
        f(of_column, row, column0 + column, tiles[row * (cut.columns + 1) + column]);
    }
  };
  FASTKD_ROLLED
  for (int i = 0; i < item.gathers; ++i) {
    each([&](int s) { return over(item.gather[i], item.own, s); },
         [&](const Over& over, int row, int s, A& value) {
           if (i == 0) value = laid_out(tiles, cut, MODE == Mode::kIeee, row, s - column0) * scale;
           value += gathered<A>(item.gather[i], item, over, n, row0 + row, s);
         });
  }
  each([&](int s) { return n * item.out.stride_n + row0 * item.out.stride_c + offset_of(item.out, s); },
       [&](int64_t at, int row, int s, A& value) {
         const A made =
             item.gathers ? value : laid_out(tiles, cut, MODE == Mode::kIeee, row, s - column0) * scale;
         store_number(item.out, at + row * item.out.stride_c, made * factor);
       });
}

// Pools features, each number a thread's.
struct PoolItem {
  Operand x;
  void* out;
  int64_t stride_n, stride_c, stride_s, count;
  int32_t first_block;
  bool channels_last;
};

struct PoolArguments {
  static constexpr int kMost = 16;
  static constexpr int kThreads = 256;
  PoolItem item[kMost];
  int32_t items;
};
static_assert(sizeof(PoolArguments) <= 4096, "a kernel takes 4096 bytes of arguments at most");

template <typename A>
FASTKD_KERNEL(PoolArguments::kThreads)
fsp_pool(FASTKD_ARGUMENTS(PoolArguments) call) {
  int p = 0;
  while (p + 1 < call.items && static_cast<int>(blockIdx.x) >= call.item[p + 1].first_block) ++p;
  const PoolItem& item = call.item[p];
  const int64_t i =
      (static_cast<int64_t>(blockIdx.x) - item.first_block) * PoolArguments::kThreads + threadIdx.x;
  if (i >= item.count) return;
  const int64_t inner = item.channels_last ? item.x.channels : item.x.positions;
  const int64_t outer = item.channels_last ? item.x.positions : item.x.channels;
  const int64_t n = i / (inner * outer), rest = i - n * (inner * outer), of_outer = rest / inner,
                of_inner = rest - of_outer * inner;
  const int64_t c = item.channels_last ? of_inner : of_outer, s = item.channels_last ? of_outer : of_inner;
  with_width<A>(item.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    A v[1];
    const T* from = static_cast<const T*>(item.x.data) + n * item.x.stride_n + c * item.x.stride_c;
    if (item.x.whole.count) {
      with_count<2>(item.x.whole.count, [&](auto count) {
        constexpr int N = decltype(count)::value;
        Loaded<T, 1> window[N];
        load_window(item.x.whole, from + window_offset(item.x, static_cast<int32_t>(s)), window);
        v[0] = pooled<A>(item.x, window, 0);
        if (item.x.pool == Pool::kAvg) v[0] *= A(1) / N;
      });
    } else {
      load_pooled<A, T, 1>(item.x, from, box_of<true>(static_cast<int32_t>(s), item.x.size, item.x.grid), v);
    }
    static_cast<A*>(item.out)[n * item.stride_n + c * item.stride_c + s * item.stride_s] = v[0];
  });
}

}  // namespace fastkd
