// FSP of bfloat16 maps by AMX (amx.inl): how its operands are laid out. Needs gram.inl up to where that includes this file.
//
// Forward: every product of two bfloat16 numbers is exact, so the student's matrix less the teacher's is summed as it stands, student and
// teacher in turns within one tile: equal maps give exactly 0, and no sum grows beyond a tile's. An average of 2 x 2 positions is no
// bfloat16 number, so it is not formed: A's positions are multiplied one by one, each by B at its window. Four times the products are
// cheaper than two or three parts of an average.
//
// Backward: dloss / dG, and an averaged map, are taken as the sum of two bfloat16 numbers, 2^-16 off at most; the product of the two low
// parts is left out. The gradient is rounded to bfloat16 afterwards.
#include "amx.inl"

typedef uint16_t Bits;

// Some elements of a map in the order in which they are multiplied. Two neighbours make a pair, 16 pairs a tile of the reduction.
struct TileRange {
  int64_t begin, count;  // pooled: lines of windows; else positions
  int64_t width;         // pooled: windows a line; else 0
  int64_t tiles;
};
FASTKD_INLINE int64_t pairs_of(const TileRange& k) { return k.width ? k.count * k.width : (k.count + 1) / 2; }

FASTKD_INLINE __mmask32 first_of(int64_t count) { return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << (count < 0 ? 0 : count)) - 1; }

// to[i] = from[i] for i in [0, count), then zeros up to `padded`.
FASTKD_INLINE void copy_bits(const Bits* from, int64_t count, Bits* to, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kTileDepth) {
    _mm512_mask_storeu_epi16(to + i, first_of(padded - i), _mm512_maskz_loadu_epi16(first_of(count - i), from + i));
  }
}

// Where the two elements of each pair of tile t lie: positions, or -1 for none. kUpper, kLower: those of a map twice as high and wide as
// the range's windows, of each window's upper or lower line; kWindow: the window, twice.
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
static void pack_tile_rows(const Block& x, int64_t channels, const TileRange& k, TileLine line, Bits* to, int64_t to_row) {
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
      for (int64_t l = 0; l < k.count; ++l, row += 2 * width, at += width) copy_bits(row, width, to + at, width);
      copy_bits(from, 0, to + at, padded - at);
    }
    return;
  }
  alignas(64) float pairs[kTile * kTile];
  int64_t at[kTileDepth];
  for (int64_t t = 0; t < k.tiles; ++t) {
    positions_of(k, line, t, at);
    for (int64_t c = 0; c < channels; c += kTile) {
      for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(pairs + i * kTile, channel_pairs(x, c, channels, at + 2 * i));
      transpose_square<false>(pairs, kTile, reinterpret_cast<float*>(to + c * to_row + t * kTileDepth), to_row / 2, nullptr, 0);
    }
  }
}

// Channels as columns of B, negated by `sign` (0x80008000).
static void pack_tile_columns(const Block& x, int64_t channels, const TileRange& k, int sign, Bits* to) {
  const __m512i flip = _mm512_set1_epi32(sign);
  if (x.layout == Layout::kPlanes) {
    alignas(64) float pairs[kTile * kTile];
    const int64_t begin = k.width ? k.begin * k.width : k.begin, count = k.width ? k.count * k.width : k.count;
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
        _mm512_store_si512(tile + i * kTileDepth, _mm512_xor_si512(channel_pairs(x, c, channels, at + 2 * i), flip));
      }
    }
  }
}

// A pair's positions are taken a range at a time.
FASTKD_INLINE int64_t tile_width(const GramPair& pair) { return pair.a[0].pool.active ? pair.a[0].pool.out[2] : 0; }
FASTKD_INLINE int64_t tiles_at_most(const GramPair& pair) {
  const int64_t width = tile_width(pair);
  return width ? (pair.depth * width + kTile - 1) / kTile : (pair.depth + kTileDepth - 1) / kTileDepth;
}

struct TileForward {
  Bits *a[kTileSteps], *b[2];
};
static TileForward tile_forward_of(const GramPair& pair, Arena& arena) {
  TileForward s = {};
  const int64_t tiles = tiles_at_most(pair), lines = tile_width(pair) ? 2 : 1;
  for (int32_t i = 0; i < pair.chains; ++i) {
    for (int64_t l = 0; l < lines; ++l) s.a[l * pair.chains + i] = arena.take<Bits>(round_up(pair.rows, kTile) * (tiles + 1) * kTileDepth);
    s.b[i] = arena.take<Bits>(round_up(pair.b[0].x.channels, kTile) * tiles * kTileDepth);
  }
  return s;
}

// c = a b^T over all positions of the student, less that of the teacher if there is one, from row i on; where `a` is averaged, four times
// that.
static void multiply_forward_tiles(const GramPair& pair, int64_t n, int64_t i, int64_t rows, const TileForward& s, float* c) {
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

// x and y as pairs of bfloat16 numbers, x first, and as pairs of what these leave: cut off above, rounded below. Infinity leaves nothing.
FASTKD_INLINE void split_pairs(VecF x, VecF y, BitsF& high, BitsF& low) {
  const BitsF xs = (BitsF)x & 0xFFFF0000u, ys = (BitsF)y & 0xFFFF0000u;
  high = xs >> 16 | ys;
  const VecF none = {};
  const BitsF xr = (BitsF)((VecF)xs == x ? none : x - (VecF)xs), yr = (BitsF)((VecF)ys == y ? none : y - (VecF)ys);
  low = (xr + 0x8000u) >> 16 | ((yr + 0x8000u) & 0xFFFF0000u);
}

// The reduction over the other map's channels takes them in the order 0, 16, 1, 17, ... of each 32, where their pairs are made from vectors
// of floats; in their own order, where they are read in place.
struct TileBackward {
  Bits *left[2], *right[2];  // high, low
  float* split;
};
static TileBackward tile_backward_of(const GramStage& stage, Arena& arena) {
  TileBackward s = {};
  int64_t left = 0, right = 0, split = 0;
  for (int32_t t = 0; t < stage.terms; ++t) {
    const GramTerm& term = stage.term[t];
    if (!term.tiles) continue;
    const int64_t co = round_up(term.other.x.channels, kTileDepth), row = co + kTileDepth;
    const int64_t channels = round_up(stage.channels, kTile), depth = round_up(term.depth, kTile);
    left = max_of(left, (stage.channels_last ? depth : channels) * row);
    right = max_of(right, (stage.channels_last ? channels : depth) * co);
    split = max_of(split, max_of(kTile * co, kTileDepth * channels));
  }
  for (int i = 0; i < 2; ++i) s.left[i] = arena.take<Bits>(left), s.right[i] = arena.take<Bits>(right);
  s.split = arena.take<float>(split);
  return s;
}

// Rows of floats (some multiple of 32, after each other) times `scale` as rows of A.
static void split_rows(const float* from, int64_t from_row, int64_t rows, int64_t columns, float scale, Bits* high, Bits* low,
                       int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < round_up(columns, kTileDepth); j += kTileDepth) {
      const float* p = from + r * from_row + j;
      BitsF h, l;
      split_pairs(load<float, float>(p) * scale, j + kTile < columns ? load<float, float>(p + kTile) * scale : VecF{}, h, l);
      *reinterpret_cast<BitsFU*>(high + r * to_row + j) = h;
      *reinterpret_cast<BitsFU*>(low + r * to_row + j) = l;
    }
  }
}

// Row l + 16 of floats beside row l, times `scale`, as one tile of B a 16 columns; `rows` of the 32 are there.
static void split_columns(const float* from, int64_t from_row, int64_t rows, int64_t columns, bool in_order, float scale, Bits* high,
                          Bits* low, int64_t panel) {
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t x = in_order ? 2 * i : i, y = in_order ? 2 * i + 1 : i + kTile;
    for (int64_t j = 0; j < columns; j += kTile) {
      const VecF none = {};
      BitsF h, l;
      split_pairs(x < rows ? load<float, float>(from + x * from_row + j) * scale : none,
                  y < rows ? load<float, float>(from + y * from_row + j) * scale : none, h, l);
      const int64_t at = j / kTile * panel + i * kTileDepth;
      *reinterpret_cast<BitsFU*>(high + at) = h;
      *reinterpret_cast<BitsFU*>(low + at) = l;
    }
  }
}

// Positions [begin, begin + count) of `rows` planes of bfloat16, rows 16 apart side by side, as one tile of B a 16 positions.
static void pack_tile_positions(const Block& x, int64_t c, int64_t rows, int64_t begin, int64_t count, Bits* to, int64_t panel) {
  const Bits* from = static_cast<const Bits*>(x.data) + c * x.stride_c + begin;
  for (int64_t i = 0; i < kTile; ++i) {
    const Bits *p = from + i * x.stride_c, *q = p + kTile * x.stride_c;
    Bits* target = to + i * kTileDepth;
    for (int64_t s = 0; s < count; s += kTile, target += panel) {
      const __mmask16 mask = static_cast<__mmask16>(first_of(min_of(kTile, count - s)));
      const __m256i zero = _mm256_setzero_si256();
      const __m256i first = i < rows ? _mm256_maskz_loadu_epi16(mask, p + s) : zero;
      const __m256i second = i + kTile < rows ? _mm256_maskz_loadu_epi16(mask, q + s) : zero;
      _mm512_store_si512(target, _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16)));
    }
  }
}

// As multiply_term(), for a bfloat16 map whose layout, averaged or not, is that of the result.
static void multiply_term_tiles(const GramTerm& term, bool channels_last, int64_t n, int64_t c, int64_t channels, float* plane,
                                float* pooled, const TileBackward& s, float* to, int64_t to_row, const float* sum, int64_t sum_row) {
  const int64_t co = term.other.x.channels, tiles = (co + kTileDepth - 1) / kTileDepth, row = (tiles + 1) * kTileDepth;
  const int64_t panel = tiles * kTileSize;
  const float* m = static_cast<const float*>(term.m) + n * term.m_n + c * term.m_c;
  const float scale = static_cast<float>(term.scale);
  const bool pools = term.other.pool.active;
  const Block other = operand_block<float>(term.other, n, 0, co, plane, pooled);
  if (channels_last) {
    const int64_t width = round_up(channels, kPad);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t rows = min_of(kTileDepth, co - t * kTileDepth);
      pack_rows<false, float, float>(m + t * kTileDepth * term.m_o, term.m_o, term.m_c, rows, channels, s.split, width, nullptr, 0);
      split_columns(s.split, width, rows, channels, !pools, scale, s.right[0] + t * kTileSize, s.right[1] + t * kTileSize, panel);
    }
  } else {
    const int64_t width = tiles * kTileDepth;
    for (int64_t i = 0; i < channels; i += kTile) {
      const int64_t rows = min_of(kTile, channels - i);
      pack_rows<false, float, float>(m + i * term.m_c, term.m_c, term.m_o, rows, co, s.split, width, nullptr, 0);
      split_rows(s.split, width, rows, co, scale, s.left[0] + i * row, s.left[1] + i * row, row);
    }
  }
  begin_tiles();
  for (int64_t k = 0; k < term.positions; k += term.depth) {
    const int64_t count = min_of(term.depth, term.positions - k);
    TileProduct p = {};
    p.depth = tiles;
    p.c_row = to_row, p.d_row = sum_row;
    // The small products first.
    p.steps = pools ? 3 : 2;
    const int low = pools ? 1 : 0;
    for (int i = 0; i < p.steps; ++i) p.a[i] = s.left[0], p.b[i] = s.right[0], p.a_row[i] = row;
    if (pools) p.a[0] = s.left[1], p.b[1] = s.right[1];
    if (channels_last) {
      p.m = count, p.n = channels;
      p.c = to + k * to_row;
      p.d = sum ? sum + k * sum_row : nullptr;
      if (pools) {
        const float* from = static_cast<const float*>(other.data) + k * other.stride_s;
        split_rows(from, other.stride_s, count, co, 1.0f, s.left[0], s.left[1], row);
      } else {
        const Bits* from = static_cast<const Bits*>(other.data) + k * other.stride_s;
        p.b[0] = s.right[1];
        if (co % kTileDepth == 0 && count % kTile == 0) {
          for (int i = 0; i < 2; ++i) p.a[i] = from, p.a_row[i] = other.stride_s;
        } else {
          for (int64_t r = 0; r < count; ++r) copy_bits(from + r * other.stride_s, co, s.left[0] + r * row, tiles * kTileDepth);
        }
      }
    } else {
      p.m = channels, p.n = count;
      p.c = to + k;
      p.d = sum ? sum + k : nullptr;
      if (!pools) p.a[0] = s.left[1];
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t rows = min_of(kTileDepth, co - t * kTileDepth);
        Bits *high = s.right[0] + t * kTileSize, *rest = s.right[low] + t * kTileSize;
        if (pools) {
          const float* from = static_cast<const float*>(other.data) + t * kTileDepth * other.stride_c + k;
          split_columns(from, other.stride_c, rows, count, false, 1.0f, high, rest, panel);
        } else {
          pack_tile_positions(other, t * kTileDepth, rows, k, count, high, panel);
        }
      }
    }
    multiply_tiles(p);
  }
  end_tiles();
}
