// Gradients of bfloat16 maps by AMX. dloss / dG, and an averaged map, are taken as the sum of two bfloat16
// numbers, 2^-16 off at most; the product of the two low parts is left out. The gradient is rounded to
// bfloat16 afterwards. An infinite dloss / dG makes NaN of an averaged map, whose low part may be 0, where it
// would stay infinite else. Needs fsp/amx.inl.

// `high`: x and y cut off to bfloat16, in pairs, x first. `low`: what that leaves of them, rounded to
// bfloat16; an infinity leaves 0.
FASTKD_INLINE void split_pairs(VecF x, VecF y, BitsF& high, BitsF& low) {
  const BitsF xs = (BitsF)x & 0xFFFF0000u, ys = (BitsF)y & 0xFFFF0000u;
  high = xs >> 16 | ys;
  const VecF none = {};
  const BitsF xr = (BitsF)((VecF)xs == x ? none : x - (VecF)xs),
              yr = (BitsF)((VecF)ys == y ? none : y - (VecF)ys);
  low = (xr + 0x8000u) >> 16 | ((yr + 0x8000u) & 0xFFFF0000u);
}

// The reduction over the other map's channels takes them in the order 0, 16, 1, 17, ... of each 32, where
// their pairs are made from vectors of floats; in their own order, where they are read in place.
struct TileBackward {
  Bits *left[2], *right[2];  // high, low
  float* split;
};
static TileBackward tile_backward_of(const FspStage& stage, Arena& arena) {
  TileBackward s = {};
  int64_t left = 0, right = 0, split = 0;
  for (int32_t t = 0; t < stage.terms; ++t) {
    const FspTerm& term = stage.term[t];
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

// Rows of floats, of a multiple of 32 numbers each, times `scale` as rows of A.
static void split_rows(const float* from, int64_t from_row, int64_t rows, int64_t columns, float scale,
                       Bits* high, Bits* low, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < round_up(columns, kTileDepth); j += kTileDepth) {
      const float* p = from + r * from_row + j;
      BitsF h, l;
      split_pairs(load<float, float>(p) * scale,
                  j + kTile < columns ? load<float, float>(p + kTile) * scale : VecF{}, h, l);
      *reinterpret_cast<BitsFU*>(high + r * to_row + j) = h;
      *reinterpret_cast<BitsFU*>(low + r * to_row + j) = l;
    }
  }
}

// 32 rows of floats, of which there are `rows`, times `scale` as tiles of B, one for every 16 columns. Row l
// + 16 goes beside row l, or rows 2 l and 2 l + 1 beside each other if in_order.
static void split_columns(const float* from, int64_t from_row, int64_t rows, int64_t columns, bool in_order,
                          float scale, Bits* high, Bits* low, int64_t panel) {
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

// Positions [begin, begin + count) of `rows` planes of bfloat16, rows 16 apart side by side, as tiles of B,
// one for every 16 positions.
static void pack_tile_positions(const Block& x, int64_t c, int64_t rows, int64_t begin, int64_t count,
                                Bits* to, int64_t panel) {
  const Bits* from = static_cast<const Bits*>(x.data) + c * x.stride_c + begin;
  for (int64_t i = 0; i < kTile; ++i) {
    const Bits *p = from + i * x.stride_c, *q = p + kTile * x.stride_c;
    Bits* target = to + i * kTileDepth;
    for (int64_t s = 0; s < count; s += kTile, target += panel) {
      const __mmask16 mask = static_cast<__mmask16>(first_of(min_of(kTile, count - s)));
      const __m256i zero = _mm256_setzero_si256();
      const __m256i first = i < rows ? _mm256_maskz_loadu_epi16(mask, p + s) : zero;
      const __m256i second = i + kTile < rows ? _mm256_maskz_loadu_epi16(mask, q + s) : zero;
      _mm512_store_si512(target, _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16)));
    }
  }
}

// As multiply_term(), for a bfloat16 map whose layout, averaged or not, is that of the result.
static void multiply_term_tiles(const FspTerm& term, bool channels_last, int64_t n, int64_t c,
                                int64_t channels, float* plane, float* pooled, const TileBackward& s,
                                float* to, int64_t to_row, const float* sum, int64_t sum_row) {
  const int64_t co = term.other.x.channels, tiles = (co + kTileDepth - 1) / kTileDepth,
                row = (tiles + 1) * kTileDepth;
  const int64_t panel = tiles * kTileSize;
  const float* m = static_cast<const float*>(term.m) + n * term.m_n + c * term.m_c;
  const float scale = static_cast<float>(term.scale);
  const bool pools = term.other.pool.active;
  const Block other = operand_block<float>(term.other, n, 0, co, plane, pooled);
  if (channels_last) {
    const int64_t width = round_up(channels, kPad);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t rows = min_of(kTileDepth, co - t * kTileDepth);
      pack_rows<false, float, float>(m + t * kTileDepth * term.m_o, term.m_o, term.m_c, rows, channels,
                                     s.split, width, nullptr, 0);
      split_columns(s.split, width, rows, channels, !pools, scale, s.right[0] + t * kTileSize,
                    s.right[1] + t * kTileSize, panel);
    }
  } else {
    const int64_t width = tiles * kTileDepth;
    for (int64_t i = 0; i < channels; i += kTile) {
      const int64_t rows = min_of(kTile, channels - i);
      pack_rows<false, float, float>(m + i * term.m_c, term.m_c, term.m_o, rows, co, s.split, width, nullptr,
                                     0);
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
          for (int64_t r = 0; r < count; ++r)
            copy_bits(from + r * other.stride_s, co, s.left[0] + r * row, tiles * kTileDepth);
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
