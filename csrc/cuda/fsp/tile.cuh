// Tiles of FSP products: operands are staged in shared memory, multiplied by tensor cores or without them,
// and their sum is laid out there.
//
// A staged operand is a block of channels x positions, each channel's positions together. Forward the
// channels are rows (of a, or of b) and the positions are summed over; backward the right operand is summed
// over its channels.
#pragma once

#include "cuda/fsp/operand.cuh"

namespace fastkd {

// What a block of threads makes: rows x columns of a sum of products, `depth` terms staged at a time, all
// powers of 2. A warp's part, 32 x 32, begins at (m0, n0); where the tile has fewer parts than the block has
// warps, warps share a part, and each takes 16 terms of every k_step from k0 on.
struct Cut {
  int rows, columns, depth;
  int m0, n0, k0, k_step;
};

constexpr int kFspThreads = 128, kFspTile = 64;

// How many blocks of a multiprocessor the registers are to suffice for: as many as need no spilling. Several
// blocks hide the wait for memory, since each loads and then multiplies.
template <typename A, Mode MODE>
constexpr int kFspBlocks = sizeof(A) == 8                                 ? 2
                           : MODE == Mode::kIeee || MODE == Mode::kTf32x3 ? 3
                                                                          : 4;

// rows and columns: of the whole matrix, so that no tile is larger than it need be.
FASTKD_BOTH Cut cut_of(int rows, int columns, int warp) {
  const bool low = rows <= 32, narrow = columns <= 32;
  const int m_bits = low ? 0 : 1, n_bits = narrow ? 0 : 1;
  Cut cut;
  cut.rows = 32 << m_bits;
  cut.columns = 32 << n_bits;
  cut.depth = low && narrow ? 64 : 32;
  cut.n0 = (warp & n_bits) * 32;
  cut.m0 = (warp >> n_bits & m_bits) * 32;
  cut.k0 = (warp >> (n_bits + m_bits)) * 16;
  cut.k_step = (kFspThreads / kWarp >> (n_bits + m_bits)) * 16;
  return cut;
}

// The logarithm of a number of rows or columns, 32 or 64.
FASTKD_BOTH int bits_of_size(int size) { return size == 32 ? 5 : 6; }

// Where channel c and position s of a staged operand lie. Panels, for operands whose rows are channels: 32
// positions of all channels each, groups of sixteen bytes exchanged so that neither reads of four positions
// in each of eight rows nor the stores meet in a bank. Else, for operands whose rows are positions: an odd
// number of pairs from channel to channel does as much.
template <bool PANELS>
FASTKD_BOTH int staged(int c, int s, int channels, int positions) {
  if (!PANELS) return c * (positions + 2) + s;
  const int turn = (c & 1) << 2 | (c >> 1 & 3);
  return ((s >> 5) * channels + c) * 32 + (((s >> 2 & 7) ^ turn) << 2) + (s & 3);
}

template <typename A, bool PANELS, int P>
FASTKD_DEVICE void store_positions(A* tile, int c, int s, int channels, int positions, const A (&v)[P]) {
  if constexpr (PANELS && P % 4 == 0 && sizeof(A) == 4) {
    FASTKD_UNROLL
    for (int i = 0; i < P; i += 4) {
      Pack pack;
      FASTKD_UNROLL
      for (int j = 0; j < 4; ++j) set<A>(pack, j, v[i + j]);
      store_shared_pack(tile + staged<PANELS>(c, s + i, channels, positions), pack);
    }
  } else {
    FASTKD_UNROLL
    for (int i = 0; i < P; ++i) tile[staged<PANELS>(c, s + i, channels, positions)] = v[i];
  }
}

// 16 bytes of positions at a time.
template <typename A, typename T, bool PANELS>
FASTKD_DEVICE void stage_positions(const Operand& x, const T* from, A* tile, int c0, int channels, int s0,
                                   int positions) {
  constexpr int P = kPack<T>, kPackBits = P == 8 ? 3 : P == 4 ? 2 : 1;
  const int bits = bits_of_size(positions) - kPackBits, all = channels << bits, mask = (1 << bits) - 1;
  const bool is_bfloat16 = x.dtype == DType::kBFloat16;
  from += c0 * x.stride_c + s0;
  FASTKD_ROLLED
  for (int first = threadIdx.x; first < all; first += kInFlight * kFspThreads) {
    Pack pack[kInFlight];
    FASTKD_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int item = first + i * kFspThreads, c = item >> bits, s = (item & mask) * P;
      pack[i] = {{0, 0, 0, 0}};
      if (item < all && c0 + c < x.channels && s0 + s < x.positions)
        pack[i] = load_pack(from + c * x.stride_c + s);
    }
    FASTKD_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int item = first + i * kFspThreads, c = item >> bits, s = (item & mask) * P;
      if (item >= all) break;
      A v[P];
      FASTKD_UNROLL
      // a pooled feature's rows are padded with anything
      for (int j = 0; j < P; ++j)
        v[j] = s0 + s + j < x.positions ? widened<A>(get<T>(pack[i], j), is_bfloat16) : A(0);
      store_positions<A, PANELS, P>(tile, c, s, channels, positions, v);
    }
  }
}

// A thread's part of a tile, where it stays with one position: packs of channels from `begin` to `end`. Those
// from `given` on are 0.
struct Share {
  int begin, end, given, position;
};

// Numbers of a window that are loaded before the first is waited for, P channels each: all, where there are
// registers for them. 16 packs spill.
template <typename A, int P>
constexpr int kPartOfWindow = sizeof(A) == 8 ? 4
                              : P == 1       ? kMostInWindow
                                             : 8;

// Channels of an operand with whole windows of N numbers; `from` is where they begin. Small windows of
// several channels are loaded at once.
template <typename A, typename T, bool PANELS, int P, int N>
FASTKD_DEVICE void stage_whole(const Operand& x, const T* from, A* tile, const Share& share, int channels,
                               int positions) {
  constexpr int kPart = N < kPartOfWindow<A, P> ? N : kPartOfWindow<A, P>;
  constexpr int kMost = P == 1 ? 2 * kInFlight : kInFlight, kAtOnce = kMost > N ? kMost / N : 1;
  const int64_t apart = P == 1 ? x.stride_c : P;  // channels that are loaded at once lie together
  const A weight = inverse_of<A>(x.whole.size[0] * x.whole.size[1] * x.whole.size[2]);
  FASTKD_ROLLED
  for (int first = share.begin; first < share.end; first += kAtOnce) {
    A total[kAtOnce][P];
    FASTKD_UNROLL
    for (int part = 0; part < N; part += kPart) {
      Loaded<T, P> v[kAtOnce][kPart] = {};
      FASTKD_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < share.given && first + i < share.end)
          load_window(x.whole, from + ((first + i) * apart + offset_in(x.whole, part)), v[i]);
      }
      FASTKD_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        FASTKD_UNROLL
        for (int j = 0; j < P; ++j) {
          const A one = pooled<A>(x, v[i], j);
          total[i][j] = part ? joined(x, total[i][j], one) : one;
        }
      }
    }
    FASTKD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= share.end) break;
      FASTKD_UNROLL
      for (int j = 0; j < P; ++j)
        tile[staged<PANELS>((first + i) * P + j, share.position, channels, positions)] =
            x.pool == Pool::kMax ? total[i][j] : total[i][j] * weight;
    }
  }
}

// Neighbouring threads take neighbouring positions, P channels at a time; a thread stays with one position.
template <typename A, typename T, bool PANELS, int P, bool POOLED>
FASTKD_DEVICE void stage_channels(const Operand& x, const T* from, A* tile, int c0, int channels, int s0,
                                  int positions) {
  constexpr int kAtOnce = P == 1 ? 2 * kInFlight : kInFlight;
  const int bits = bits_of_size(positions), s = threadIdx.x & (positions - 1), packs = channels / P;
  const int each = (packs + (kFspThreads >> bits) - 1) / (kFspThreads >> bits),
            begin = (threadIdx.x >> bits) * each;
  const int end = begin + each < packs ? begin + each : packs;
  const bool inside = s0 + s < x.positions;
  const Share share = {begin, end,
                       !inside                      ? 0
                       : x.channels - c0 < channels ? (x.channels - c0) / P
                                                    : packs,
                       s};
  from += c0 * x.stride_c;
  const int at = inside ? s0 + s : 0;
  if (POOLED && x.whole.count) {  // where PANELS are wanted, forward, nothing is spread
    from += window_offset(x, at);
    with_count<PANELS ? 2 : 1>(x.whole.count, [&](auto count) {
      stage_whole<A, T, PANELS, P, decltype(count)::value>(x, from, tile, share, channels, positions);
    });
    return;
  }
  if (POOLED && x.pool != Pool::kNone) {
    const Box box = box_of<false>(at, x.size, x.grid);
    FASTKD_ROLLED
    for (int i = begin; i < end; ++i) {
      A v[P] = {};
      const T* channel = from + i * P * x.stride_c;
      if (PANELS || x.pool != Pool::kSpread) {
        if (i < share.given) load_pooled<A, T, P>(x, channel, box, v);
      } else {
        if (i < share.given) load_spread<A, T, P>(x, channel, box, v);
      }
      FASTKD_UNROLL
      for (int j = 0; j < P; ++j) tile[staged<PANELS>(i * P + j, s, channels, positions)] = v[j];
    }
    return;
  }
  from += offset_of(x, at);
  const int64_t apart = P == 1 ? x.stride_c : P;
  FASTKD_ROLLED
  for (int first = begin; first < end; first += kAtOnce) {
    Loaded<T, P> v[kAtOnce] = {};
    FASTKD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < share.given && first + i < end) v[i].load(from + (first + i) * apart);
    }
    FASTKD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= end) break;
      FASTKD_UNROLL
      for (int j = 0; j < P; ++j) {
        tile[staged<PANELS>((first + i) * P + j, s, channels, positions)] =
            v[i].template number<A>(j, x.dtype == DType::kBFloat16);
      }
    }
  }
}

template <typename A, typename T, bool PANELS, bool POOLED>
FASTKD_DEVICE void stage_as(const Operand& x, int64_t n, A* tile, int c0, int channels, int s0,
                            int positions) {
  const T* from = static_cast<const T*>(x.data) + n * x.stride_n;
  if (x.reading == Reading::kPositions) {
    stage_positions<A, T, PANELS>(x, from, tile, c0, channels, s0, positions);
  } else if (x.reading == Reading::kChannels) {
    stage_channels<A, T, PANELS, kPack<T>, POOLED>(x, from, tile, c0, channels, s0, positions);
  } else {
    stage_channels<A, T, PANELS, 1, POOLED>(x, from, tile, c0, channels, s0, positions);
  }
}

// Channels [c0, c0 + channels) at positions [s0, s0 + positions) of a feature's sample n; 0 beyond the last.
// All threads of the block call.
template <typename A, bool PANELS>
FASTKD_DEVICE void stage(const Operand& x, int64_t n, A* tile, int c0, int channels, int s0, int positions) {
  with_width<A>(x.dtype, [&](auto zero) {
    stage_as<A, decltype(zero), PANELS, true>(x, n, tile, c0, channels, s0, positions);
  });
}

// Terms k and following of a row.
template <typename A, bool PANELS, int TERMS>
FASTKD_DEVICE void load_terms(const A* tile, int row, int k, int rows, int depth, A (&v)[TERMS]) {
  if constexpr (PANELS) {
    static_assert(TERMS * sizeof(A) == sizeof(Pack), "16 bytes");
    load_numbers<A, A, TERMS>(tile + staged<true>(row, k, rows, depth), false, v);
  } else {
    FASTKD_UNROLL
    for (int i = 0; i < TERMS; ++i) v[i] = tile[staged<false>(k + i, row, depth, rows)];
  }
}

// A staged pair of operands. exact: see Operand.
template <typename A>
struct Staged {
  const A *a, *b;
  bool a_exact, b_exact;
};

}  // namespace fastkd
