// Vectors of the accumulation type A (float or double), FASTKD_VECTOR_BYTES wide, by the compilers' vector
// extensions: arithmetic, comparisons and v[i] work as on numbers. load<T, A>(p) and store<T, A>(p, v)
// convert from and to the storage type T (Half, BFloat16, float, double; for A = float not double) at any
// alignment, kLanes<A> elements at a time; to_acc<T, A> and from_acc<T, A> do so for one number. sum(v) adds
// the lanes in double. The stores round to nearest even and keep NaN.

#define FASTKD_INLINE static inline __attribute__((always_inline))

typedef float VecF __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef int32_t IntF __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef int64_t IntD __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef uint32_t BitsF __attribute__((vector_size(FASTKD_VECTOR_BYTES)));
typedef uint16_t BitsH
    __attribute__((vector_size(FASTKD_VECTOR_BYTES / 2)));  // 16-bit values for the lanes of a VecF
typedef float HalfF __attribute__((vector_size(FASTKD_VECTOR_BYTES / 2)));  // floats for the lanes of a VecD
// The same in memory, at the alignment of an element.
typedef VecF VecFU __attribute__((aligned(4), may_alias));
typedef VecD VecDU __attribute__((aligned(8), may_alias));
typedef BitsH BitsHU __attribute__((aligned(2), may_alias));
typedef HalfF HalfFU __attribute__((aligned(4), may_alias));
typedef BitsF BitsFU __attribute__((aligned(2), may_alias));

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef VecF type;
  typedef IntF mask;
};
template <>
struct VecOf<double> {
  typedef VecD type;
  typedef IntD mask;
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
using Mask = typename VecOf<A>::mask;
template <typename A>
static constexpr int64_t kLanes = FASTKD_VECTOR_BYTES / static_cast<int64_t>(sizeof(A));

// Whether there are 32 vector registers, or 16.
#if FASTKD_VECTOR_BYTES == 64 || defined(FASTKD_NEON)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

#include "cpu/simd/formats.inl"

// Half a vector to a whole one. GCC 12 makes one number after the other of this for vectors of 16 bytes.
#ifdef FASTKD_NEON
FASTKD_INLINE VecD widened(HalfF v) { return (VecD)vcvt_f64_f32((float32x2_t)v); }
FASTKD_INLINE BitsF widened(BitsH v) { return (BitsF)vmovl_u16((uint16x4_t)v); }
#else
FASTKD_INLINE VecD widened(HalfF v) { return __builtin_convertvector(v, VecD); }
FASTKD_INLINE BitsF widened(BitsH v) { return __builtin_convertvector(v, BitsF); }
#endif

// The general case goes lane by lane: 16-bit storage with double accumulation, which only mixed calls with
// float64 use. Too rare for its conversions to be compiled into every loop.
template <typename T, typename A>
struct Memory {
  static __attribute__((noinline)) Vec<A> load(const T* p) {
    Vec<A> v = {};
    for (int64_t i = 0; i < kLanes<A>; ++i) v[i] = to_acc<T, A>(p[i]);
    return v;
  }
  static __attribute__((noinline)) void store(T* p, Vec<A> v) {
    for (int64_t i = 0; i < kLanes<A>; ++i) p[i] = from_acc<T, A>(v[i]);
  }
};
template <>
struct Memory<float, float> {
  FASTKD_INLINE VecF load(const float* p) { return *reinterpret_cast<const VecFU*>(p); }
  FASTKD_INLINE void store(float* p, VecF v) { *reinterpret_cast<VecFU*>(p) = v; }
};
template <>
struct Memory<double, double> {
  FASTKD_INLINE VecD load(const double* p) { return *reinterpret_cast<const VecDU*>(p); }
  FASTKD_INLINE void store(double* p, VecD v) { *reinterpret_cast<VecDU*>(p) = v; }
};
template <>
struct Memory<float, double> {
  FASTKD_INLINE VecD load(const float* p) { return widened(*reinterpret_cast<const HalfFU*>(p)); }
  FASTKD_INLINE void store(float* p, VecD v) {
    *reinterpret_cast<HalfFU*>(p) = __builtin_convertvector(v, HalfF);
  }
};
template <>
struct Memory<BFloat16, float> {
  FASTKD_INLINE VecF load(const BFloat16* p) {
    return (VecF)(widened(*reinterpret_cast<const BitsHU*>(p)) << 16);
  }
  FASTKD_INLINE void store(BFloat16* p, VecF v) {
    *reinterpret_cast<BitsHU*>(p) = __builtin_convertvector(bfloat16_bits_of_float<VecF, BitsF>(v), BitsH);
  }
};
template <>
struct Memory<Half, float> {
#if FASTKD_VECTOR_BYTES == 64
  FASTKD_INLINE VecF load(const Half* p) {
    return (VecF)_mm512_cvtph_ps((__m256i) * reinterpret_cast<const BitsHU*>(p));
  }
  FASTKD_INLINE void store(Half* p, VecF v) {
    *reinterpret_cast<BitsHU*>(p) = (BitsH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  }
#elif FASTKD_VECTOR_BYTES == 32
  FASTKD_INLINE VecF load(const Half* p) {
    return (VecF)_mm256_cvtph_ps((__m128i) * reinterpret_cast<const BitsHU*>(p));
  }
  FASTKD_INLINE void store(Half* p, VecF v) {
    *reinterpret_cast<BitsHU*>(p) = (BitsH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  }
#elif defined(FASTKD_NEON)  // GCC 12 converts a vector of __fp16 number by number
  FASTKD_INLINE VecF load(const Half* p) {
    return (VecF)vcvt_f32_f16((float16x4_t) * reinterpret_cast<const BitsHU*>(p));
  }
  FASTKD_INLINE void store(Half* p, VecF v) {
    *reinterpret_cast<BitsHU*>(p) = (BitsH)vcvt_f16_f32((float32x4_t)v);
  }
#else
  FASTKD_INLINE VecF load(const Half* p) {
    return float_of_half_bits<VecF, BitsF>(widened(*reinterpret_cast<const BitsHU*>(p)));
  }
  FASTKD_INLINE void store(Half* p, VecF v) {
    *reinterpret_cast<BitsHU*>(p) = __builtin_convertvector(half_bits_of_float<VecF, BitsF>(v), BitsH);
  }
#endif
};

template <typename T, typename A>
FASTKD_INLINE Vec<A> load(const T* p) {
  return Memory<T, A>::load(p);
}
template <typename T, typename A>
FASTKD_INLINE void store(T* p, Vec<A> v) {
  Memory<T, A>::store(p, v);
}

// Stores past the caches, for results larger than they are; `p` is aligned to a vector. Where there is no
// such thing (16-bit types, which do not fill a vector, and other processors), a plain store.
template <typename T, typename A>
FASTKD_INLINE void stream(T* p, Vec<A> v) {
#if FASTKD_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == sizeof(A)) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif FASTKD_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == sizeof(A)) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
  store<T, A>(p, v);
}
// Makes streamed stores visible to other threads, in order with what follows.
FASTKD_INLINE void stream_end() {
#if FASTKD_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}
template <typename T>
FASTKD_INLINE bool is_line(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// Two vectors at a time from bfloat16: `even` are the numbers at even places, `odd` those at odd ones. Half
// the instructions of two loads.
template <typename T, typename A>
struct InPairs {
  static constexpr bool value = false;
};
template <>
struct InPairs<BFloat16, float> {
  static constexpr bool value = true;
};
template <typename T, typename A>
static constexpr bool kInPairs = InPairs<T, A>::value;

FASTKD_INLINE void load_pair(const BFloat16* p, VecF& even, VecF& odd) {
  const BitsF bits = *reinterpret_cast<const BitsFU*>(p);
  even = (VecF)(bits << 16);
  odd = (VecF)(bits & 0xFFFF0000u);
}
FASTKD_INLINE BitsF rounded_to_bfloat16(VecF f) {
  const BitsF w = (BitsF)f;
  return f == f ? w + 0x7FFFu + ((w >> 16) & 1u) : w | 0x00400000u;
}
FASTKD_INLINE void store_pair(BFloat16* p, VecF even, VecF odd, bool streaming) {
  const BitsF bits = (rounded_to_bfloat16(even) >> 16) | (rounded_to_bfloat16(odd) & 0xFFFF0000u);
  if (streaming) {
    stream<float, float>(reinterpret_cast<float*>(p), (VecF)bits);
  } else {
    *reinterpret_cast<BitsFU*>(p) = bits;
  }
}
// FASTKD_SHUFFLE(a, b, order): the lanes of a and, counted on, of b in the order given; FASTKD_SHUFFLE(a,
// order) those of a. clang has no such function for an order of variables, but makes one instruction of these
// loops where the order is known.
#ifdef __clang__
template <typename V, typename I>
FASTKD_INLINE V shuffled(V a, V b, I order) {
  constexpr int W = sizeof(V) / sizeof(a[0]);
  V result = {};
#pragma clang loop unroll(full)
  for (int i = 0; i < W; ++i) result[i] = order[i] < W ? a[order[i]] : b[order[i] - W];
  return result;
}
template <typename V, typename I>
FASTKD_INLINE V shuffled(V a, I order) {
  return shuffled(a, a, order);
}
#define FASTKD_SHUFFLE shuffled
#else
#define FASTKD_SHUFFLE __builtin_shuffle
#endif

// Numbers in the order of load_pair to the order in memory, and back.
FASTKD_INLINE void interleave(VecF& even, VecF& odd) {
  constexpr int32_t W = kLanes<float>;
  IntF first;
  for (int32_t i = 0; i < W; ++i) first[i] = i / 2 + i % 2 * W;
  const VecF low = FASTKD_SHUFFLE(even, odd, first);
  odd = FASTKD_SHUFFLE(even, odd, first + W / 2);
  even = low;
}
FASTKD_INLINE void deinterleave(VecF& low, VecF& high) {
  IntF every_other;
  for (int32_t i = 0; i < kLanes<float>; ++i) every_other[i] = 2 * i;
  const VecF even = FASTKD_SHUFFLE(low, high, every_other);
  high = FASTKD_SHUFFLE(low, high, every_other + 1);
  low = even;
}

template <typename A>
FASTKD_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};  // x - 0 is x for every x, -0 and NaN included
}

// A vector's lanes in double: `low` the first half of them, `high` the second.
FASTKD_INLINE void widen(VecF v, VecD& low, VecD& high) {
#if FASTKD_VECTOR_BYTES == 64
  low = (VecD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
  high = (VecD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif FASTKD_VECTOR_BYTES == 32
  low = (VecD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
  high = (VecD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#elif defined(FASTKD_NEON)
  low = (VecD)vcvt_f64_f32(vget_low_f32((float32x4_t)v));
  high = (VecD)vcvt_high_f64_f32((float32x4_t)v);
#elif defined(FASTKD_X86)
  low = (VecD)_mm_cvtps_pd((__m128)v);
  high = (VecD)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
#else
  low = VecD{v[0], v[1]}, high = VecD{v[2], v[3]};
#endif
}

FASTKD_INLINE double sum(VecD v) {
  double total = 0;
  for (int64_t i = 0; i < kLanes<double>; ++i) total += v[i];
  return total;
}

FASTKD_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTKD_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Calls f(T{}) with the storage type T of dtype. Accumulation in float never meets float64 storage.
template <typename A, typename F>
FASTKD_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kHalf:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat:
      return f(float{});
    case DType::kDouble:
      if constexpr (sizeof(A) == sizeof(double)) f(double{});
  }
}

// dst[i] = src[i] as T, and back.
template <typename T, typename A>
static void convert_in(const T* src, int64_t count, A* dst) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store<A, A>(dst + i, load<T, A>(src + i));
  for (; i < count; ++i) dst[i] = to_acc<T, A>(src[i]);
}
template <typename T, typename A>
static void convert_out(const A* src, int64_t count, T* dst) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store<T, A>(dst + i, load<A, A>(src + i));
  for (; i < count; ++i) dst[i] = from_acc<T, A>(src[i]);
}
