// Products on tensor cores: one instruction of a warp, total (16 x 8) += a (16 x K) b (K x 8)^T in float32.
// With g = lane / 4 and t = lane % 4 a lane holds rows g and g + 8 of a, row g of b, and columns 2 t and 2 t
// + 1 of the total's rows g and g + 8.
//
// A Quad is what a lane holds of one row: four numbers that lie together, positions 4 t to 4 t + 3 of
// sixteen. Which of the instruction's places of K they take makes no difference to a sum, as long as a
// and b agree: tf32 makes two instructions of a quad, bfloat16 one.
#pragma once

#include "cuda/device.cuh"

namespace fastkd {

enum class Mode : int32_t { kIeee, kTf32, kTf32x3, kBf16 };

FASTKD_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FASTKD_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The nearest number of tf32. Tensor cores cut the last 13 bits off, all in one direction. sm_90 and later
// round ties to even, in one instruction. sm_80 can only round them away from zero, in four.
FASTKD_DEVICE uint32_t to_tf32(float x) {
#ifdef FASTKD_EMULATE
  const uint32_t bits = bits_of(x);
  return x == x ? (bits + 0xfffu + (bits >> 13 & 1u)) & 0xffffe000u : bits;
#else
  uint32_t bits;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return bits;
#endif
}

// Two numbers rounded to bfloat16, the first in the lower half.
FASTKD_DEVICE uint32_t to_bf16(float first, float second) {
#ifdef FASTKD_EMULATE
  return static_cast<uint32_t>(BFloat16(second).x) << 16 | BFloat16(first).x;
#else
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#endif
}

// What a rounded number leaves of x; nothing of an infinity, whose difference to itself would be NaN.
FASTKD_DEVICE float rest_of(float x, float rounded) { return fabsf(rounded) < INFINITY ? x - rounded : 0.0f; }

#ifdef FASTKD_EMULATE

// What the instructions read: registers a and b of all lanes, laid out as PTX documents it. WIDE: two numbers
// of 16 bits a register.
template <bool WIDE>
FASTKD_DEVICE void emulate_mma(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    uint32_t a[4], b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Lane* lanes = reinterpret_cast<const Lane*>(emulate::exchange(&mine, sizeof mine));
  const auto number = [](uint32_t bits, int k) -> double {
    if (WIDE) return float_of(k % 2 ? bits & 0xffff0000u : bits << 16);
    return float_of(bits & 0xffffe000u);
  };
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) emulate::count_product();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int first = 0; first < (WIDE ? 16 : 8); first += 8) {
      double products[8];
      for (int k = first; k < first + 8; ++k) {
        const int at = WIDE ? k / 2 : k;
        const uint32_t of_a = lanes[row % 8 * 4 + at % 4].a[row / 8 + 2 * (at / 4)];
        const uint32_t of_b = lanes[column * 4 + at % 4].b[at / 4];
        products[k - first] = number(of_a, k) * number(of_b, k);
      }
      total[i] = emulate::add_cut_off(total[i], products);
    }
  }
}

#endif

FASTKD_DEVICE void mma_tf32(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FASTKD_EMULATE
  emulate_mma<false>(total, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

FASTKD_DEVICE void mma_bf16(float (&total)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FASTKD_EMULATE
  emulate_mma<true>(total, a, b);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four numbers as a mode multiplies them: rounded, and what that leaves of them.
template <Mode MODE>
struct Quad {
  static constexpr int kWords = MODE == Mode::kBf16 ? 2 : 4;
  static constexpr bool kRest = MODE != Mode::kTf32;
  uint32_t high[kWords], low[kRest ? kWords : 1];
};

template <Mode MODE>
FASTKD_DEVICE Quad<MODE> quad_of(const float (&x)[4]) {
  Quad<MODE> q;
  if constexpr (MODE == Mode::kBf16) {
    FASTKD_UNROLL
    for (int i = 0; i < 2; ++i) {
      q.high[i] = to_bf16(x[2 * i], x[2 * i + 1]);
      q.low[i] = to_bf16(rest_of(x[2 * i], float_of(q.high[i] << 16)),
                         rest_of(x[2 * i + 1], float_of(q.high[i] & 0xffff0000u)));
    }
  } else {
    FASTKD_UNROLL
    for (int i = 0; i < 4; ++i) {
      q.high[i] = to_tf32(x[i]);
      if constexpr (MODE == Mode::kTf32x3) q.low[i] = to_tf32(rest_of(x[i], float_of(q.high[i])));
    }
  }
  return q;
}

// sum += a b^T over the 16 positions that the warp's quads hold. exact: rounding leaves nothing of a, or of b
// (kBf16).
template <Mode MODE>
FASTKD_DEVICE void multiply(float (&sum)[4], const Quad<MODE> (&a)[2], const Quad<MODE>& b, bool a_exact,
                            bool b_exact) {
  if constexpr (MODE == Mode::kBf16) {
    // the small terms first; the product of both rests is left out
    if (!a_exact) mma_bf16(sum, {a[0].low[0], a[1].low[0], a[0].low[1], a[1].low[1]}, b.high);
    if (!b_exact) mma_bf16(sum, {a[0].high[0], a[1].high[0], a[0].high[1], a[1].high[1]}, b.low);
    mma_bf16(sum, {a[0].high[0], a[1].high[0], a[0].high[1], a[1].high[1]}, b.high);
  } else {
    FASTKD_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const uint32_t left[4] = {a[0].high[i], a[1].high[i], a[0].high[i + 1], a[1].high[i + 1]};
      const uint32_t right[2] = {b.high[i], b.high[i + 1]};
      if constexpr (MODE == Mode::kTf32x3) {
        mma_tf32(sum, {a[0].low[i], a[1].low[i], a[0].low[i + 1], a[1].low[i + 1]}, right);
        mma_tf32(sum, left, {b.low[i], b.low[i + 1]});
      }
      mma_tf32(sum, left, right);
    }
  }
}

}  // namespace fastkd
