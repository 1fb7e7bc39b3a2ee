// The power |x|^p of attention maps, as a type with power_of(v) = |x|^p and
// slope(v) = h = sign(x)|x|^(p-1) for vectors and power_of1, slope1 for numbers. p = 2 is what everyone uses;
// other small multiples of 1/2 take multiplications and a square root; anything else pow. Needs vec.inl.

template <typename A>
struct Square {
  static constexpr bool kFrequent = true;  // worth compiling for some widths
  FASTKD_INLINE Vec<A> power_of(const Square&, Vec<A> x) { return x * x; }
  FASTKD_INLINE Vec<A> slope(const Square&, Vec<A> x) { return x; }
  FASTKD_INLINE A power_of1(const Square&, A x) { return x * x; }
  FASTKD_INLINE A slope1(const Square&, A x) { return x; }
};

FASTKD_INLINE VecF abs_of(VecF x) { return (VecF)((IntF)x & 0x7FFFFFFF); }
FASTKD_INLINE VecD abs_of(VecD x) { return (VecD)((IntD)x & 0x7FFFFFFFFFFFFFFF); }
FASTKD_INLINE VecF with_sign_of(VecF magnitude, VecF x) {
  return (VecF)((IntF)magnitude | ((IntF)x & (IntF)broadcast<float>(-0.0f)));
}
FASTKD_INLINE VecD with_sign_of(VecD magnitude, VecD x) {
  return (VecD)((IntD)magnitude | ((IntD)x & (IntD)broadcast<double>(-0.0)));
}
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
#elif defined(FASTKD_NEON)
FASTKD_INLINE VecF root_of(VecF x) { return (VecF)vsqrtq_f32((float32x4_t)x); }
FASTKD_INLINE VecD root_of(VecD x) { return (VecD)vsqrtq_f64((float64x2_t)x); }
#elif defined(FASTKD_X86)
FASTKD_INLINE VecF root_of(VecF x) { return (VecF)_mm_sqrt_ps((__m128)x); }
FASTKD_INLINE VecD root_of(VecD x) { return (VecD)_mm_sqrt_pd((__m128d)x); }
#else
template <typename V>
FASTKD_INLINE V root_of(V x) {
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = root_of(x[i]);
  return x;
}
#endif

// p = whole, or whole + 1/2 if `half` (unsigned only). At x = 0 and p = 1 the unsigned slope is 0, as sign(0)
// is; so it is for NaN, as in PyTorch.
template <typename A>
struct SmallPower {
  static constexpr bool kFrequent = false;
  int32_t whole, half, is_signed;

  template <typename V>
  FASTKD_INLINE V raised(const SmallPower& s, V x, int32_t exponent) {
    V r = x;
    for (int32_t i = 1; i < exponent; ++i) r *= x;
    return s.half ? r * root_of(x) : r;
  }
  FASTKD_INLINE Vec<A> power_of(const SmallPower& s, Vec<A> x) {
    return raised(s, s.is_signed ? x : abs_of(x), s.whole);
  }
  FASTKD_INLINE A power_of1(const SmallPower& s, A x) {
    return raised(s, s.is_signed ? x : abs_of(x), s.whole);
  }
  FASTKD_INLINE Vec<A> slope(const SmallPower& s, Vec<A> x) {
    if (s.whole > 1)
      return s.is_signed ? raised(s, x, s.whole - 1) : with_sign_of(raised(s, abs_of(x), s.whole - 1), x);
    if (s.half) return with_sign_of(root_of(abs_of(x)), x);
    const Vec<A> one = broadcast<A>(1);
    if (s.is_signed) return one;
    return (Vec<A>)((Mask<A>)with_sign_of(one, x) & ((x > 0) | (x < 0)));
  }
  FASTKD_INLINE A slope1(const SmallPower& s, A x) {
    if (s.whole > 1)
      return s.is_signed ? raised(s, x, s.whole - 1) : with_sign_of(raised(s, abs_of(x), s.whole - 1), x);
    if (s.half) return with_sign_of(root_of(abs_of(x)), x);
    if (s.is_signed) return 1;
    return static_cast<A>((x > 0) - (x < 0));
  }
};

FASTKD_INLINE float pow_of(float x, float y) { return y == 0.5f ? sqrtf(x) : powf(x, y); }
FASTKD_INLINE double pow_of(double x, double y) { return y == 0.5 ? sqrt(x) : pow(x, y); }

// Not inlined: pow takes so long that a call costs nothing beside it, and 16 of them in every loop were a
// third of the time to compile.
template <typename A>
static __attribute__((noinline)) Vec<A> powers_of(Vec<A> x, A p) {
  for (int64_t i = 0; i < kLanes<A>; ++i) x[i] = pow_of(x[i], p);
  return x;
}

template <typename A>
struct RealPower {
  static constexpr bool kFrequent = false;
  A p;
  int32_t is_signed;

  FASTKD_INLINE A power_of1(const RealPower& s, A x) { return pow_of(s.is_signed ? x : abs_of(x), s.p); }
  FASTKD_INLINE A slope1(const RealPower& s, A x) {
    return s.is_signed ? pow_of(x, s.p - 1) : with_sign_of(pow_of(abs_of(x), s.p - 1), x);
  }
  FASTKD_INLINE Vec<A> power_of(const RealPower& s, Vec<A> x) {
    return powers_of<A>(s.is_signed ? x : abs_of(x), s.p);
  }
  FASTKD_INLINE Vec<A> slope(const RealPower& s, Vec<A> x) {
    return s.is_signed ? powers_of<A>(x, s.p - 1) : with_sign_of(powers_of<A>(abs_of(x), s.p - 1), x);
  }
};

// f(power object), p >= 1.
template <typename A, typename F>
FASTKD_INLINE void with_power(const AttentionOptions& options, const F& f) {
  const double p = options.p;
  if (p == 2) return f(Square<A>{});
  // Each multiplication adds half a unit of error; pow none that counts, so float64 goes there sooner.
  const int32_t doubled = p <= (sizeof(A) == sizeof(double) ? 4 : 8) ? static_cast<int32_t>(2 * p) : 0;
  if (doubled == 2 * p && !(doubled % 2 == 1 && options.is_signed))
    return f(SmallPower<A>{doubled / 2, doubled % 2, options.is_signed});
  return f(RealPower<A>{static_cast<A>(p), options.is_signed});
}
