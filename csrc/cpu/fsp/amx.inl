// FSP matrices of bfloat16 maps by AMX (simd/amx.inl): how its operands are laid out; fsp/amx_backward.inl
// has the gradients. Needs fsp/fsp.inl up to where that includes this file.
//
// Every product of two bfloat16 numbers is exact, so the student's matrix less the teacher's is summed as it
// stands, student and teacher in turns within one tile: equal maps give exactly 0, and no sum grows beyond a
// tile's. An average of 2 x 2 positions is no bfloat16 number, so it is not formed: A's positions are
// multiplied one by one, each by B at its window. Four times the products are cheaper than two or three parts
// of an average.
#include "cpu/simd/amx.inl"

typedef uint16_t Bits;

// Some elements of a map in the order in which they are multiplied. Two neighbours make a pair, 16 pairs a
// tile of the reduction.
struct TileRange {
  int64_t begin, count;  // pooled: lines of windows; else positions
  int64_t width;         // pooled: windows a line; else 0
  int64_t tiles;
};
FASTKD_INLINE int64_t pairs_of(const TileRange& k) { return k.width ? k.count * k.width : (k.count + 1) / 2; }

FASTKD_INLINE __mmask32 first_of(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << (count < 0 ? 0 : count)) - 1;
}

// to[i] = from[i] for i in [0, count), then zeros up to `padded`.
FASTKD_INLINE void copy_bits(const Bits* from, int64_t count, Bits* to, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kTileDepth) {
    _mm512_mask_storeu_epi16(to + i, first_of(padded - i),
                             _mm512_maskz_loadu_epi16(first_of(count - i), from + i));
  }
}

// Where the two elements of each pair of tile t lie: positions, or -1 for none. kUpper, kLower: those of a
// map twice as high and wide as the range's windows, of each window's upper or lower line; kWindow: the
// window, twice.
enum class TileLine { kPlain, kUpper, kLower, kWindow };
static void positions_of(const TileRange& k, TileLine line, int64_t t, int64_t* at) {
  int64_t pair = t * kTile, row = 0, column = 0;
  if (line == TileLine::kUpper || line == TileLine::kLower) {
    row = 2 * (k.begin + pair / k.width) + (line == TileLine::kLower ? 1 : 0);
    column = pair % k.width;
  }
  for (int64_t i = 0; i < kTileDepth; i += 2, ++pair) {
    if (line == TileLine::kPlain) {
      at[i] = 2 * pair < k.count ? k.begin + 2 * pair : -1;
      at[i + 1] = 2 * pair + 1 < k.count ? k.begin + 2 * pair + 1 : -1;
    } else if (pair >= k.count * k.width) {
      at[i] = at[i + 1] = -1;
    } else if (line == TileLine::kWindow) {
      at[i] = at[i + 1] = k.begin * k.width + pair;
    } else {
      at[i] = 2 * (row * k.width + column);
      at[i + 1] = at[i] + 1;
      if (++column == k.width) column = 0, row += 2;
    }
  }
}

// Channels [c, c + 16) of a channels-last map at two positions, as pairs.
FASTKD_INLINE __m512i channel_pairs(const Block& x, int64_t c, int64_t channels, const int64_t* at) {
  const Bits* from = static_cast<const Bits*>(x.data) + c;
  const __mmask16 mask = static_cast<__mmask16>(first_of(channels - c < kTile ? channels - c : kTile));
  const __m256i zero = _mm256_setzero_si256();
  const __m256i first = at[0] < 0 ? zero : _mm256_maskz_loadu_epi16(mask, from + at[0] * x.stride_s);
  const __m256i second = at[1] < 0 ? zero : _mm256_maskz_loadu_epi16(mask, from + at[1] * x.stride_s);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// Channels as rows of A: to[c * to_row + element].
static void pack_tile_rows(const Block& x, int64_t channels, const TileRange& k, TileLine line, Bits* to,
                           int64_t to_row) {
  const Bits* from = static_cast<const Bits*>(x.data);
  if (x.layout == Layout::kPlanes) {
    const int64_t width = 2 * k.width, padded = k.tiles * kTileDepth;
    for (int64_t c = 0; c < channels; ++c, from += x.stride_c, to += to_row) {
      if (line == TileLine::kPlain) {
        copy_bits(from + k.begin, k.count, to, padded);
        continue;
      }
      const Bits* row = from + (2 * k.begin + (line == TileLine::kLower ? 1 : 0)) * width;
      int64_t at = 0;
      for (int64_t l = 0; l < k.count; ++l, row += 2 * width, at += width)
        copy_bits(row, width, to + at, width);
      copy_bits(from, 0, to + at, padded - at);
    }
    return;
  }
  alignas(64) float pairs[kTile * kTile];
  int64_t at[kTileDepth];
  for (int64_t t = 0; t < k.tiles; ++t) {
    positions_of(k, line, t, at);
    for (int64_t c = 0; c < channels; c += kTile) {
      for (int64_t i = 0; i < kTile; ++i)
        _mm512_store_si512(pairs + i * kTile, channel_pairs(x, c, channels, at + 2 * i));
      transpose_square<false>(pairs, kTile, reinterpret_cast<float*>(to + c * to_row + t * kTileDepth),
                              to_row / 2, nullptr, 0);
    }
  }
}

// Channels as columns of B, negated by `sign` (0x80008000).
static void pack_tile_columns(const Block& x, int64_t channels, const TileRange& k, int sign, Bits* to) {
  const __m512i flip = _mm512_set1_epi32(sign);
  if (x.layout == Layout::kPlanes) {
    alignas(64) float pairs[kTile * kTile];
    const int64_t begin = k.width ? k.begin * k.width : k.begin,
                  count = k.width ? k.count * k.width : k.count;
    const int64_t step = k.width ? kTile : kTileDepth;
    for (int64_t c = 0; c < channels; c += kTile) {
      const Bits* from = static_cast<const Bits*>(x.data) + c * x.stride_c + begin;
      const int64_t rows = min_of(kTile, channels - c);
      for (int64_t t = 0; t < k.tiles; ++t, to += kTileSize) {
        const __mmask32 mask = first_of(min_of(step, count - t * step));
        for (int64_t r = 0; r < rows; ++r) {
          const Bits* p = from + r * x.stride_c + t * step;
          __builtin_prefetch(reinterpret_cast<const char*>(p) + 512, 0, 2);
          __m512i pair;
          if (k.width) {
            pair = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
            pair = _mm512_or_si512(pair, _mm512_slli_epi32(pair, 16));
          } else {
            pair = _mm512_maskz_loadu_epi16(mask, p);
          }
          _mm512_store_si512(pairs + r * kTile, _mm512_xor_si512(pair, flip));
        }
        transpose_square<false>(pairs, kTile, reinterpret_cast<float*>(to), kTile, nullptr, 0);
      }
    }
    return;
  }
  int64_t at[kTileDepth];
  for (int64_t t = 0; t < k.tiles; ++t) {
    positions_of(k, k.width ? TileLine::kWindow : TileLine::kPlain, t, at);
    for (int64_t c = 0; c < channels; c += kTile) {
      Bits* tile = to + (c / kTile * k.tiles + t) * kTileSize;
      for (int64_t i = 0; i < kTile; ++i) {
        _mm512_store_si512(tile + i * kTileDepth,
                           _mm512_xor_si512(channel_pairs(x, c, channels, at + 2 * i), flip));
      }
    }
  }
}

// A pair's positions are taken a range at a time.
FASTKD_INLINE int64_t tile_width(const FspPair& pair) {
  return pair.a[0].pool.active ? pair.a[0].pool.out[2] : 0;
}
FASTKD_INLINE int64_t tiles_at_most(const FspPair& pair) {
  const int64_t width = tile_width(pair);
  return width ? (pair.depth * width + kTile - 1) / kTile : (pair.depth + kTileDepth - 1) / kTileDepth;
}

struct TileForward {
  Bits *a[kTileSteps], *b[2];
};
static TileForward tile_forward_of(const FspPair& pair, Arena& arena) {
  TileForward s = {};
  const int64_t tiles = tiles_at_most(pair), lines = tile_width(pair) ? 2 : 1;
  for (int32_t i = 0; i < pair.chains; ++i) {
    for (int64_t l = 0; l < lines; ++l)
      s.a[l * pair.chains + i] = arena.take<Bits>(round_up(pair.rows, kTile) * (tiles + 1) * kTileDepth);
    s.b[i] = arena.take<Bits>(round_up(pair.b[0].x.channels, kTile) * tiles * kTileDepth);
  }
  return s;
}

// c = a b^T over all positions of the student, less that of the teacher if there is one, from row i on; where
// `a` is averaged, four times that.
static void multiply_forward_tiles(const FspPair& pair, int64_t n, int64_t i, int64_t rows,
                                   const TileForward& s, float* c) {
  const int64_t cb = pair.b[0].x.channels, width = tile_width(pair), lines = width ? 2 : 1;
  const int64_t total = width ? pair.positions[0] / width : pair.positions[0];
  begin_tiles();
  for (int64_t k = 0; k < total; k += pair.depth) {
    TileRange range = {k, min_of(pair.depth, total - k), width, 0};
    range.tiles = (pairs_of(range) + kTile - 1) / kTile;
    TileProduct p = {};
    p.m = rows, p.n = cb, p.depth = range.tiles;
    p.c = c, p.c_row = cb;
    p.d = k > 0 ? c : nullptr, p.d_row = cb;
    for (int32_t t = 0; t < pair.chains; ++t) {
      const Block a = sample_block(pair.a[t].x, n, i), b = sample_block(pair.b[t].x, n, 0);
      pack_tile_columns(b, cb, range, t == 0 ? 0 : static_cast<int>(0x80008000u), s.b[t]);
      for (int64_t l = 0; l < lines; ++l) {
        const int64_t step = l * pair.chains + t;
        p.a[step] = s.a[step], p.a_row[step] = (range.tiles + 1) * kTileDepth;
        p.b[step] = s.b[t];
        pack_tile_rows(a, rows, range,
                       width == 0 ? TileLine::kPlain
                       : l == 0   ? TileLine::kUpper
                                  : TileLine::kLower,
                       s.a[step], p.a_row[step]);
      }
    }
    p.steps = static_cast<int>(lines * pair.chains);
    multiply_tiles(p);
  }
  end_tiles();
}
