// Tiles of FSP products: operands are staged in shared memory, multiplied by tensor cores or without them, and their sum is laid out there.
//
// A staged operand is a block of channels x positions, each channel's positions together. Forward the channels are rows (of a, or of b) and
// the positions are summed over; backward the right operand is summed over its channels.
#pragma once

#include "cuda/gram_operand.cuh"
#include "cuda/mma.cuh"

namespace fastkd {

// What a block of threads makes: rows x columns of a sum of products, `depth` terms staged at a time. A warp's part is 16 * MI x 32; where
// the tile has fewer parts than the block has warps, warps share a part, and each takes every k_warps-th 16 terms.
struct Cut {
  int rows, columns, depth;
  int m_warps, n_warps, k_warps;
};

template <int MI>
constexpr int kGramThreads = MI == 4 ? 256 : 128;
template <int MI>
constexpr int kGramTile = MI == 4 ? 128 : 64;

template <int MI>
FASTKD_BOTH Cut cut_of(int rows, int columns) {
  Cut cut;
  cut.rows = MI == 2 && rows <= 32 ? 32 : kGramTile<MI>;
  cut.columns = MI == 2 && columns <= 32 ? 32 : kGramTile<MI>;
  cut.depth = cut.rows == 32 && cut.columns == 32 ? 64 : 32;
  cut.m_warps = cut.rows / (16 * MI) ? cut.rows / (16 * MI) : 1;
  cut.n_warps = cut.columns / 32;
  cut.k_warps = kGramThreads<MI> / kWarp / (cut.m_warps * cut.n_warps);
  return cut;
}

// Where channel c and position s of a staged operand lie. Panels, for operands whose rows are channels: 32 positions of all channels each,
// sixteen bytes changed about so that neither four positions of each of eight rows nor the stores meet in a bank. Else, for operands whose
// rows are positions: an odd number of pairs from channel to channel does as much.
template <bool PANELS>
FASTKD_BOTH int staged(int c, int s, int channels, int positions) {
  if (!PANELS) return c * (positions + 2) + s;
  const int turn = (c & 1) << 2 | (c >> 1 & 3);
  return ((s >> 5) * channels + c) * 32 + (((s >> 2 & 7) ^ turn) << 2) + (s & 3);
}

constexpr int staged_size(bool panels, int channels, int positions) { return channels * (positions + (panels ? 0 : 2)); }

template <typename A, bool PANELS, int P>
FASTKD_DEVICE void store_positions(A* tile, int c, int s, int channels, int positions, const A (&v)[P]) {
  if constexpr (PANELS && P % 4 == 0 && sizeof(A) == 4) {
    FASTKD_UNROLL
    for (int i = 0; i < P; i += 4) {
      Pack pack;
      FASTKD_UNROLL
      for (int j = 0; j < 4; ++j) set<A>(pack, j, v[i + j]);
      store_pack(tile + staged<PANELS>(c, s + i, channels, positions), pack);
    }
  } else {
    FASTKD_UNROLL
    for (int i = 0; i < P; ++i) tile[staged<PANELS>(c, s + i, channels, positions)] = v[i];
  }
}

constexpr int kInFlight = 4;  // loads that a thread starts before it waits for the first

// 16 bytes of positions at a time.
template <typename A, typename T, bool PANELS>
FASTKD_DEVICE void stage_positions(const Operand& x, const T* from, A* tile, int c0, int channels, int s0, int positions, int threads) {
  constexpr int P = kPack<T>;
  const int packs = positions / P, all = channels * packs;
  for (int first = threadIdx.x; first < all; first += kInFlight * threads) {
    Pack pack[kInFlight];
    FASTKD_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int item = first + i * threads, c = item / packs, s = item % packs * P;
      pack[i] = {{0, 0, 0, 0}};
      if (item < all && c0 + c < x.channels && s0 + s < x.positions) pack[i] = load_pack(from + (c0 + c) * x.stride_c + (s0 + s));
    }
    FASTKD_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int item = first + i * threads, c = item / packs, s = item % packs * P;
      if (item >= all) break;
      A v[P];
      FASTKD_UNROLL
      // a pooled feature's rows are padded with anything
      for (int j = 0; j < P; ++j) v[j] = s0 + s + j < x.positions ? static_cast<A>(get<T>(pack[i], j)) : A(0);
      store_positions<A, PANELS, P>(tile, c, s, channels, positions, v);
    }
  }
}

// Neighbouring threads take neighbouring positions, P channels at a time; a thread stays with one position.
template <typename A, typename T, bool PANELS, int P>
FASTKD_DEVICE void stage_channels(const Operand& x, const T* from, A* tile, int c0, int channels, int s0, int positions, int threads) {
  constexpr int kAtOnce = P == 1 ? 2 * kInFlight : kInFlight;
  const int s = threadIdx.x % positions, groups = threads / positions, packs = channels / P;
  const int each = (packs + groups - 1) / groups, begin = threadIdx.x / positions * each;
  const int end = begin + each < packs ? begin + each : packs;
  const bool inside = s0 + s < x.positions;
  if (x.pool != Pool::kNone) {
    const Box box = box_of(inside ? s0 + s : 0, x.size, x.grid);
    for (int i = begin; i < end; ++i) {
      const int c = i * P;
      A v[P] = {};
      if (inside && c0 + c < x.channels) load_pooled<A, T, P>(x, from + (c0 + c) * x.stride_c, box, v);
      FASTKD_UNROLL
      for (int j = 0; j < P; ++j) tile[staged<PANELS>(c + j, s, channels, positions)] = v[j];
    }
    return;
  }
  const T* at = from + (inside ? offset_of(x, s0 + s) : 0);
  for (int first = begin; first < end; first += kAtOnce) {
    A v[kAtOnce][P];
    FASTKD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int c = (first + i) * P;
      FASTKD_UNROLL
      for (int j = 0; j < P; ++j) v[i][j] = 0;
      if (inside && first + i < end && c0 + c < x.channels) load_numbers<A, T, P>(at + (c0 + c) * x.stride_c, v[i]);
    }
    FASTKD_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= end) break;
      FASTKD_UNROLL
      for (int j = 0; j < P; ++j) tile[staged<PANELS>((first + i) * P + j, s, channels, positions)] = v[i][j];
    }
  }
}

// Channels [c0, c0 + channels) at positions [s0, s0 + positions) of sample n; 0 beyond the last. Calls for all threads of the block.
template <typename A, bool PANELS>
FASTKD_DEVICE void stage(const Operand& x, int64_t n, A* tile, int c0, int channels, int s0, int positions, int threads) {
  with_dtype<A>(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.data) + n * x.stride_n;
    if (x.reading == Reading::kPositions) {
      stage_positions<A, T, PANELS>(x, from, tile, c0, channels, s0, positions, threads);
    } else if (x.reading == Reading::kChannels) {
      stage_channels<A, T, PANELS, kPack<T>>(x, from, tile, c0, channels, s0, positions, threads);
    } else {
      stage_channels<A, T, PANELS, 1>(x, from, tile, c0, channels, s0, positions, threads);
    }
  });
}

// Four terms of a row.
template <typename A, bool PANELS>
FASTKD_DEVICE void load_four(const A* tile, int row, int k, int rows, int depth, A (&v)[4]) {
  if constexpr (PANELS) {
    const A* at = tile + staged<true>(row, k, rows, depth);
    if constexpr (sizeof(A) == 4) {
      load_numbers<A, A, 4>(at, v);
    } else {
      FASTKD_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = at[i];
    }
  } else {
    FASTKD_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = tile[staged<false>(k + i, row, depth, rows)];
  }
}

// A staged pair of operands. exact: see Operand.
template <typename A>
struct Staged {
  const A *a, *b;
  bool a_exact, b_exact;
};

}  // namespace fastkd
