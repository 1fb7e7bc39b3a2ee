// One number, or a vector of them, between the storage types and the accumulation type. vec.inl includes it.

// Bit patterns of one number as another type.
template <typename To, typename From>
FASTKD_INLINE To bit_copy(From value) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

// 16-bit formats, for one number (F = float, U = uint32_t) and for vectors (VecF, BitsF) alike. Choices are
// written with masks, since vectors and numbers differ in ?:.
FASTKD_INLINE uint32_t mask_of(bool condition) { return condition ? ~0u : 0u; }
FASTKD_INLINE BitsF mask_of(IntF condition) { return (BitsF)condition; }

template <typename F, typename U>
FASTKD_INLINE F float_of_half_bits(U h) {
  // The exponent is rebased by a multiplication, which handles infinity and NaN too; subnormals are made by
  // subtracting the implied one.
  const U w = h << 16;
  const U twice = w + w;
  const F normal = bit_copy<F>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const F subnormal = bit_copy<F>((twice >> 17) | (126u << 23)) - 0.5f;
  const U is_subnormal = mask_of(twice < (1u << 27));
  const U magnitude = (bit_copy<U>(subnormal) & is_subnormal) | (bit_copy<U>(normal) & ~is_subnormal);
  return bit_copy<F>((w & 0x80000000u) | magnitude);
}

template <typename F, typename U>
FASTKD_INLINE U half_bits_of_float(F f) {
  // Adding a power of two chosen from the exponent rounds the mantissa at the wanted bit; scaling up and down
  // first turns too large values into infinity.
  const U w = bit_copy<U>(f);
  const U twice = w + w;
  F base = (bit_copy<F>(w & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;
  const U exponent = twice & 0xFF000000u;
  const U is_small = mask_of(exponent < 0x71000000u);
  const U bias = (is_small & 0x71000000u) | (~is_small & exponent);
  base = bit_copy<F>((bias >> 1) + 0x07800000u) + base;
  const U bits = bit_copy<U>(base);
  const U number = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  const U is_nan = mask_of(twice > 0xFF000000u);
  return (w >> 16 & 0x8000u) | (is_nan & 0x7E00u) | (~is_nan & number);
}

template <typename F, typename U>
FASTKD_INLINE U bfloat16_bits_of_float(F f) {
  const U w = bit_copy<U>(f);
  const U is_nan = mask_of((w & 0x7FFFFFFFu) > 0x7F800000u);
  return (is_nan & ((w >> 16) | 0x40u)) | (~is_nan & ((w + 0x7FFFu + ((w >> 16) & 1u)) >> 16));
}

template <typename T, typename A>
struct Number;
template <typename A>
struct Number<float, A> {
  FASTKD_INLINE A get(float x) { return x; }
  FASTKD_INLINE float put(A x) { return static_cast<float>(x); }
};
template <typename A>
struct Number<double, A> {
  FASTKD_INLINE A get(double x) { return static_cast<A>(x); }
  FASTKD_INLINE double put(A x) { return x; }
};
template <typename A>
struct Number<Half, A> {
#ifdef FASTKD_NEON
  FASTKD_INLINE A get(Half x) { return static_cast<A>(bit_copy<__fp16>(x.bits)); }
  FASTKD_INLINE Half put(A x) { return {bit_copy<uint16_t>(static_cast<__fp16>(static_cast<float>(x)))}; }
#else
  FASTKD_INLINE A get(Half x) { return float_of_half_bits<float, uint32_t>(x.bits); }
  FASTKD_INLINE Half put(A x) {
    return {static_cast<uint16_t>(half_bits_of_float<float, uint32_t>(static_cast<float>(x)))};
  }
#endif
};
template <typename A>
struct Number<BFloat16, A> {
  FASTKD_INLINE A get(BFloat16 x) { return bit_copy<float>(static_cast<uint32_t>(x.bits) << 16); }
  FASTKD_INLINE BFloat16 put(A x) {
    return {static_cast<uint16_t>(bfloat16_bits_of_float<float, uint32_t>(static_cast<float>(x)))};
  }
};

template <typename T, typename A>
FASTKD_INLINE A to_acc(T x) {
  return Number<T, A>::get(x);
}
template <typename T, typename A>
FASTKD_INLINE T from_acc(A x) {
  return Number<T, A>::put(x);
}
