// The two passes over a feature that attention needs: the energy of each position (the sum over channels of |x|^p), and the gradient (a
// coefficient for each position times h(x) = sign(x)|x|^(p-1)). Each for planes (lanes along positions) and channels-last (lanes along
// channels).

// The power, as a type with energy(v) and slope(v) = h for vectors and energy1, slope1 for numbers. p = 2 is what everyone uses; other
// small multiples of 1/2 take multiplications and a square root; anything else pow.
template <typename A>
struct Square {
  FASTKD_INLINE Vec<A> energy(const Square&, Vec<A> x) { return x * x; }
  FASTKD_INLINE Vec<A> slope(const Square&, Vec<A> x) { return x; }
  FASTKD_INLINE A energy1(const Square&, A x) { return x * x; }
  FASTKD_INLINE A slope1(const Square&, A x) { return x; }
};

FASTKD_INLINE VecF abs_of(VecF x) { return (VecF)((IntF)x & 0x7FFFFFFF); }
FASTKD_INLINE VecD abs_of(VecD x) { return (VecD)((IntD)x & 0x7FFFFFFFFFFFFFFF); }
FASTKD_INLINE VecF with_sign_of(VecF magnitude, VecF x) { return (VecF)((IntF)magnitude | ((IntF)x & (IntF)broadcast<float>(-0.0f))); }
FASTKD_INLINE VecD with_sign_of(VecD magnitude, VecD x) { return (VecD)((IntD)magnitude | ((IntD)x & (IntD)broadcast<double>(-0.0))); }
FASTKD_INLINE float abs_of(float x) { return __builtin_fabsf(x); }
FASTKD_INLINE double abs_of(double x) { return __builtin_fabs(x); }
FASTKD_INLINE float with_sign_of(float magnitude, float x) { return __builtin_copysignf(magnitude, x); }
FASTKD_INLINE double with_sign_of(double magnitude, double x) { return __builtin_copysign(magnitude, x); }
FASTKD_INLINE float root_of(float x) { return sqrtf(x); }
FASTKD_INLINE double root_of(double x) { return sqrt(x); }
#if FASTKD_VECTOR_BYTES == 64
FASTKD_INLINE VecF root_of(VecF x) { return (VecF)_mm512_sqrt_ps((__m512)x); }
FASTKD_INLINE VecD root_of(VecD x) { return (VecD)_mm512_sqrt_pd((__m512d)x); }
#elif FASTKD_VECTOR_BYTES == 32
FASTKD_INLINE VecF root_of(VecF x) { return (VecF)_mm256_sqrt_ps((__m256)x); }
FASTKD_INLINE VecD root_of(VecD x) { return (VecD)_mm256_sqrt_pd((__m256d)x); }
#else
template <typename V>
FASTKD_INLINE V root_of(V x) {
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = root_of(x[i]);
  return x;
}
#endif

// p = whole, or whole + 1/2 if `half` (unsigned only). At x = 0 and p = 1 the unsigned slope is 0, as sign(0) is; so it is for NaN, as in
// PyTorch.
template <typename A>
struct SmallPower {
  int32_t whole, half, is_signed;

  template <typename V>
  FASTKD_INLINE V raised(const SmallPower& s, V x, int32_t exponent) {
    V r = x;
    for (int32_t i = 1; i < exponent; ++i) r *= x;
    return s.half ? r * root_of(x) : r;
  }
  FASTKD_INLINE Vec<A> energy(const SmallPower& s, Vec<A> x) { return raised(s, s.is_signed ? x : abs_of(x), s.whole); }
  FASTKD_INLINE A energy1(const SmallPower& s, A x) { return raised(s, s.is_signed ? x : abs_of(x), s.whole); }
  FASTKD_INLINE Vec<A> slope(const SmallPower& s, Vec<A> x) {
    if (s.whole > 1) return s.is_signed ? raised(s, x, s.whole - 1) : with_sign_of(raised(s, abs_of(x), s.whole - 1), x);
    if (s.half) return with_sign_of(root_of(abs_of(x)), x);
    const Vec<A> one = broadcast<A>(1);
    if (s.is_signed) return one;
    return (Vec<A>)((Mask<A>)with_sign_of(one, x) & ((x > 0) | (x < 0)));
  }
  FASTKD_INLINE A slope1(const SmallPower& s, A x) {
    if (s.whole > 1) return s.is_signed ? raised(s, x, s.whole - 1) : with_sign_of(raised(s, abs_of(x), s.whole - 1), x);
    if (s.half) return with_sign_of(root_of(abs_of(x)), x);
    if (s.is_signed) return 1;
    return static_cast<A>((x > 0) - (x < 0));
  }
};

FASTKD_INLINE float pow_of(float x, float y) { return y == 0.5f ? sqrtf(x) : powf(x, y); }
FASTKD_INLINE double pow_of(double x, double y) { return y == 0.5 ? sqrt(x) : pow(x, y); }

template <typename A>
struct RealPower {
  A p;
  int32_t is_signed;

  FASTKD_INLINE A energy1(const RealPower& s, A x) { return pow_of(s.is_signed ? x : abs_of(x), s.p); }
  FASTKD_INLINE A slope1(const RealPower& s, A x) { return s.is_signed ? pow_of(x, s.p - 1) : with_sign_of(pow_of(abs_of(x), s.p - 1), x); }
  FASTKD_INLINE Vec<A> energy(const RealPower& s, Vec<A> x) {
    for (int64_t i = 0; i < kLanes<A>; ++i) x[i] = energy1(s, x[i]);
    return x;
  }
  FASTKD_INLINE Vec<A> slope(const RealPower& s, Vec<A> x) {
    for (int64_t i = 0; i < kLanes<A>; ++i) x[i] = slope1(s, x[i]);
    return x;
  }
};

// f(power object), p >= 1.
template <typename A, typename F>
FASTKD_INLINE void with_power(const AttentionOptions& options, const F& f) {
  const double p = options.p;
  if (p == 2) return f(Square<A>{});
  // Each multiplication adds half a unit of error; pow none that counts, so float64 goes there sooner.
  const int32_t doubled = p <= (sizeof(A) == sizeof(double) ? 4 : 8) ? static_cast<int32_t>(2 * p) : 0;
  if (doubled == 2 * p && !(doubled % 2 == 1 && options.is_signed)) return f(SmallPower<A>{doubled / 2, doubled % 2, options.is_signed});
  return f(RealPower<A>{static_cast<A>(p), options.is_signed});
}

// Eight channels are read side by side: enough streams to keep the memory busy, and their sum is a tree, which keeps rounding errors of
// many channels small.
constexpr int64_t kStreams = 8;
// Positions handled before going on to the next channels, so that their running energies stay in the first-level cache.
constexpr int64_t kBlock = 2048;

template <typename T, typename A, typename P>
FASTKD_INLINE Vec<A> energy_of_streams(const T* x, int64_t stride_c, const P& power) {
  Vec<A> e[kStreams];
  for (int64_t i = 0; i < kStreams; ++i) e[i] = P::energy(power, load<T, A>(x + i * stride_c));
  return ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
}

template <typename A>
FASTKD_INLINE Vec<A> zero_or(const A* q, bool accumulate) {
  return accumulate ? load<A, A>(q) : Vec<A>{};
}

// q[s] (+)= sum over channels of the energy of x[c * stride_c + s], for s < count.
template <typename T, typename A, typename P>
static void energy_planes(const T* x, int64_t channels, int64_t stride_c, int64_t count, A* q, bool accumulate, const P& power) {
  constexpr int64_t W = kLanes<A>;
  const int64_t grouped = channels / kStreams * kStreams;
  if (count < W) {
    for (int64_t s = 0; s < count; ++s) {
      double total = accumulate ? q[s] : 0;  // one long chain of additions
      for (int64_t c = 0; c < channels; ++c) total += P::energy1(power, to_acc<T, A>(x[c * stride_c + s]));
      q[s] = static_cast<A>(total);
    }
    return;
  }
  // The last vector ends at the last position and may overlap the one before it; it is computed first, from q as given, and stored last.
  const T* last = x + count - W;
  Vec<A> tail = {};
  if (count % W != 0) {
    tail = zero_or<A>(q + count - W, accumulate);
    for (int64_t c = 0; c < grouped; c += kStreams) tail += energy_of_streams<T, A>(last + c * stride_c, stride_c, power);
    for (int64_t c = grouped; c < channels; ++c) tail += P::energy(power, load<T, A>(last + c * stride_c));
  }
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t stop = min_of(begin + kBlock, count) - W;
    bool add = accumulate;
    for (int64_t c = 0; c < grouped; c += kStreams, add = true) {
      const T* row = x + c * stride_c;
      for (int64_t s = begin; s <= stop; s += W)
        store<A, A>(q + s, zero_or<A>(q + s, add) + energy_of_streams<T, A>(row + s, stride_c, power));
    }
    for (int64_t c = grouped; c < channels; ++c, add = true) {
      const T* row = x + c * stride_c;
      for (int64_t s = begin; s <= stop; s += W) store<A, A>(q + s, zero_or<A>(q + s, add) + P::energy(power, load<T, A>(row + s)));
    }
  }
  if (count % W != 0) store<A, A>(q + count - W, tail);
}

// dx[c * dx_stride_c + s] = coefficient[s] * h(x[c * stride_c + s]).
template <typename T, typename A, typename P>
static void gradient_planes(const T* x, int64_t channels, int64_t stride_c, int64_t count, const A* coefficient, T* dx, int64_t dx_stride_c,
                            const P& power) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t c = 0; c < channels; ++c, x += stride_c, dx += dx_stride_c) {
    if (count < W) {
      for (int64_t s = 0; s < count; ++s) dx[s] = from_acc<T, A>(P::slope1(power, to_acc<T, A>(x[s])) * coefficient[s]);
      continue;
    }
    int64_t s = 0;
    for (; s + W <= count; s += W) store<T, A>(dx + s, P::slope(power, load<T, A>(x + s)) * load<A, A>(coefficient + s));
    // The last vector overlaps the one before it: the same values again.
    s = count - W;
    if (count % W != 0) store<T, A>(dx + s, P::slope(power, load<T, A>(x + s)) * load<A, A>(coefficient + s));
  }
}

// even/odd lanes of two vectors, one after the other
#if defined(__clang__)
FASTKD_INLINE VecF even_odd_sum(VecF a, VecF b) {
  static_assert(kLanes<float> == 4, "clang builds the portable path only");
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}
FASTKD_INLINE VecD even_odd_sum(VecD a, VecD b) { return __builtin_shufflevector(a, b, 0, 2) + __builtin_shufflevector(a, b, 1, 3); }
#else
template <typename V, typename I>
FASTKD_INLINE V even_odd_sum_of(V a, V b) {
  I even;
  for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) even[i] = 2 * i;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}
FASTKD_INLINE VecF even_odd_sum(VecF a, VecF b) { return even_odd_sum_of<VecF, IntF>(a, b); }
FASTKD_INLINE VecD even_odd_sum(VecD a, VecD b) { return even_odd_sum_of<VecD, IntD>(a, b); }
#endif

// Lane i of the result is the sum of the lanes of v[i], i < kLanes<A>. Overwrites v.
template <typename A>
FASTKD_INLINE Vec<A> transposed_sum(Vec<A>* v) {
  for (int64_t n = kLanes<A>; n > 1; n /= 2) {
    for (int64_t i = 0; i < n / 2; ++i) v[i] = even_odd_sum(v[2 * i], v[2 * i + 1]);
  }
  return v[0];
}

// The energies of one position's channels, to be summed over lanes. `mask` keeps the lanes of the last vector that no other vector held.
template <typename T, typename A, typename P>
FASTKD_INLINE Vec<A> energy_of_row(const T* x, int64_t channels, Mask<A> mask, const P& power) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> a = {}, b = {};
  int64_t c = 0;
  for (; c + 2 * W <= channels; c += 2 * W) {
    a += P::energy(power, load<T, A>(x + c));
    b += P::energy(power, load<T, A>(x + c + W));
  }
  if (c + W <= channels) {
    a += P::energy(power, load<T, A>(x + c));
    c += W;
  }
  if (c < channels) b += (Vec<A>)((Mask<A>)P::energy(power, load<T, A>(c >= W ? x + channels - W : x)) & mask);
  return a + b;
}

// q[s] = sum over channels of the energy of x[s * stride_s + c]. Nothing is read outside of [x, the last element of the last position].
template <typename T, typename A, typename P>
static void energy_channels_last(const T* x, int64_t channels, int64_t stride_s, int64_t count, A* q, const P& power) {
  constexpr int64_t W = kLanes<A>;
  Mask<A> mask;
  for (int64_t i = 0; i < W; ++i) mask[i] = (channels >= W ? i >= W - channels % W : i < channels) ? -1 : 0;
  int64_t s = 0;
  // With fewer channels than lanes a vector reaches into the positions behind; stop while there are such.
  for (; s + W <= count && (channels >= W || (stride_s > 0 && (s + W - 1) * stride_s + W <= (count - 1) * stride_s + channels)); s += W) {
    Vec<A> rows[W];
    for (int64_t i = 0; i < W; ++i) rows[i] = energy_of_row<T, A>(x + (s + i) * stride_s, channels, mask, power);
    store<A, A>(q + s, transposed_sum<A>(rows));
  }
  for (; s < count; ++s) {
    const T* row = x + s * stride_s;
    if (channels >= W) {
      Vec<A> rows[W] = {energy_of_row<T, A>(row, channels, mask, power)};
      q[s] = transposed_sum<A>(rows)[0];
    } else {
      A total = 0;
      for (int64_t c = 0; c < channels; ++c) total += P::energy1(power, to_acc<T, A>(row[c]));
      q[s] = total;
    }
  }
}

// dx[s * dx_stride_s + c] = coefficient[s] * h(x[s * stride_s + c]).
template <typename T, typename A, typename P>
static void gradient_channels_last(const T* x, int64_t channels, int64_t stride_s, int64_t count, const A* coefficient, T* dx,
                                   int64_t dx_stride_s, const P& power) {
  constexpr int64_t W = kLanes<A>;
  const int64_t whole = channels / W * W;
  // With fewer channels than lanes, a vector writes on into positions that come later and are then written properly. Only where positions
  // are adjacent: what lies in a gap may belong to another sample.
  const bool spill = channels < W && stride_s == channels && dx_stride_s == channels;
  for (int64_t s = 0; s < count; ++s, x += stride_s, dx += dx_stride_s) {
    const Vec<A> k = broadcast<A>(coefficient[s]);
    for (int64_t c = 0; c < whole; c += W) store<T, A>(dx + c, P::slope(power, load<T, A>(x + c)) * k);
    if (whole == channels) continue;
    if (whole > 0) {
      const int64_t c = channels - W;
      store<T, A>(dx + c, P::slope(power, load<T, A>(x + c)) * k);
    } else if (spill && (count - s) * channels >= W) {
      store<T, A>(dx, P::slope(power, load<T, A>(x)) * k);
    } else {
      for (int64_t c = 0; c < channels; ++c) dx[c] = from_acc<T, A>(P::slope1(power, to_acc<T, A>(x[c])) * coefficient[s]);
    }
  }
}
