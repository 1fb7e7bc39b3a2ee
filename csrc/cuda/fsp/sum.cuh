// The sum of products that a block makes, spread over its threads' registers.
#pragma once

#include "cuda/fsp/tile.cuh"

namespace fastkd {

template <typename A, int N>
FASTKD_DEVICE void subtract(A (&from)[N], const A (&what)[N]) {
  FASTKD_UNROLL
  for (int i = 0; i < N; ++i) from[i] -= what[i];
}

// On tensor cores. They cut off what does not fit into the sum that they add to. A sum over a feature's
// thousands of positions would lose more than the low parts of numbers hold. So modes with low parts begin a
// new sum for every 16 positions, and add it to `v` in float32, which rounds to nearest.
template <typename A, Mode MODE>
struct FspSum {
  // Fragments of b that registers hold at a time: twice the words, where something is left of what is
  // rounded.
  static constexpr int kAtOnce = Quad<MODE>::kRest ? 2 : 4;
  float v[2][4][4];

  FASTKD_MEMBER void times(A factor) {
    FASTKD_UNROLL
    for (int i = 0; i < 32; ++i) v[i / 16][i / 4 % 4][i % 4] *= factor;
  }

  FASTKD_MEMBER void clear() {
    FASTKD_UNROLL
    for (int i = 0; i < 32; ++i) v[i / 16][i / 4 % 4][i % 4] = 0;
  }

  // Adds a b^T of what is staged; DIFFERENCE: (a - less.a) b^T + less.a (b - less.b)^T. Only what lies in the
  // given rows, columns and terms is multiplied, in whole fragments.
  template <bool DIFFERENCE, bool B_PANELS>
  FASTKD_MEMBER void add(const Cut& cut, const Staged<A>& s, const Staged<A>& less, int rows, int columns,
                         int terms) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, m0 = cut.m0, n0 = cut.n0;
    FASTKD_ROLLED
    for (int k = cut.k0; k < terms; k += cut.k_step) {
      FASTKD_UNROLL
      for (int n_first = 0; n_first < 4; n_first += kAtOnce) {
        Quad<MODE> b[kAtOnce], b_change[DIFFERENCE ? kAtOnce : 1];
        FASTKD_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          float x[4], y[4];
          const int row = n0 + 8 * (n_first + i) + g;
          load_terms<float, B_PANELS>(s.b, row, k + 4 * t, cut.columns, cut.depth, x);
          b[i] = quad_of<MODE>(x);
          if constexpr (DIFFERENCE) {
            load_terms<float, B_PANELS>(less.b, row, k + 4 * t, cut.columns, cut.depth, y);
            subtract(x, y);
            b_change[i] = quad_of<MODE>(x);
          }
        }
        FASTKD_UNROLL
        for (int mi = 0; mi < 2; ++mi) {
          if (m0 + 16 * mi >= rows) break;
          Quad<MODE> a[2], a_less[DIFFERENCE ? 2 : 1];
          FASTKD_UNROLL
          for (int half = 0; half < 2; ++half) {
            float x[4], y[4];
            const int row = m0 + 16 * mi + 8 * half + g;
            load_terms<float, true>(s.a, row, k + 4 * t, cut.rows, cut.depth, x);
            if constexpr (DIFFERENCE) {
              load_terms<float, true>(less.a, row, k + 4 * t, cut.rows, cut.depth, y);
              subtract(x, y);
              a_less[half] = quad_of<MODE>(y);
            }
            a[half] = quad_of<MODE>(x);
          }
          FASTKD_UNROLL
          for (int i = 0; i < kAtOnce; ++i) {
            const int ni = n_first + i;
            if (n0 + 8 * ni >= columns) break;
            float own[4] = {0, 0, 0, 0};
            float (&sum)[4] = Quad<MODE>::kRest ? own : v[mi][ni];
            multiply<MODE>(sum, a, b[i], !DIFFERENCE && s.a_exact, s.b_exact);
            if constexpr (DIFFERENCE) multiply<MODE>(sum, a_less, b_change[i], less.a_exact, false);
            if constexpr (Quad<MODE>::kRest) {
              FASTKD_UNROLL
              for (int j = 0; j < 4; ++j) v[mi][ni][j] += own[j];
            }
          }
        }
      }
    }
  }

  // Lays the sum out as k_step / 16 tiles of rows x (columns + 1), which are to be added up.
  FASTKD_MEMBER void lay_out(const Cut& cut, A* to) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    to += cut.k0 / 16 * cut.rows * (cut.columns + 1);
    FASTKD_UNROLL
    for (int i = 0; i < 32; ++i) {
      const int row = cut.m0 + i / 16 * 16 + i / 2 % 2 * 8 + g,
                column = cut.n0 + i / 4 % 4 * 8 + 2 * t + i % 2;
      to[row * (cut.columns + 1) + column] = v[i / 16][i / 4 % 4][i % 4];
    }
  }
};

// Without tensor cores: a thread makes every eighth row and every sixteenth column.
template <typename A>
struct FspSum<A, Mode::kIeee> {
  A v[8][4];

  FASTKD_MEMBER void times(A factor) {
    FASTKD_UNROLL
    for (int i = 0; i < 32; ++i) v[i / 4][i % 4] *= factor;
  }

  FASTKD_MEMBER void clear() {
    FASTKD_UNROLL
    for (int i = 0; i < 32; ++i) v[i / 4][i % 4] = 0;
  }

  template <bool DIFFERENCE, bool B_PANELS>
  FASTKD_MEMBER void add(const Cut& cut, const Staged<A>& s, const Staged<A>& less, int rows, int columns,
                         int terms) {
    constexpr int kTerms = kPack<A>;
    const int top = threadIdx.x / 16, left = threadIdx.x % 16;
    FASTKD_ROLLED
    for (int k = 0; k < terms; k += kTerms) {
      A b[4][kTerms], b_change[DIFFERENCE ? 4 : 1][kTerms];
      FASTKD_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (16 * j >= columns) break;
        load_terms<A, B_PANELS>(s.b, left + 16 * j, k, cut.columns, cut.depth, b[j]);
        if constexpr (DIFFERENCE) {
          load_terms<A, B_PANELS>(less.b, left + 16 * j, k, cut.columns, cut.depth, b_change[j]);
          FASTKD_UNROLL
          for (int e = 0; e < kTerms; ++e) b_change[j][e] = b[j][e] - b_change[j][e];
        }
      }
      FASTKD_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (8 * i >= rows) break;
        A a[kTerms], a_less[kTerms];
        load_terms<A, true>(s.a, top + 8 * i, k, cut.rows, cut.depth, a);
        if constexpr (DIFFERENCE) {
          load_terms<A, true>(less.a, top + 8 * i, k, cut.rows, cut.depth, a_less);
          subtract(a, a_less);
        }
        FASTKD_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (16 * j >= columns) break;
          FASTKD_UNROLL
          for (int e = 0; e < kTerms; ++e) {
            v[i][j] += a[e] * b[j][e];
            if constexpr (DIFFERENCE) v[i][j] += a_less[e] * b_change[j][e];
          }
        }
      }
    }
  }

  FASTKD_MEMBER void lay_out(const Cut& cut, A* to) const {
    const int top = threadIdx.x / 16, left = threadIdx.x % 16;
    FASTKD_UNROLL
    for (int i = 0; i < 8; ++i) {
      FASTKD_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (8 * i < cut.rows && 16 * j < cut.columns)
          to[(top + 8 * i) * (cut.columns + 1) + left + 16 * j] = v[i][j];
      }
    }
  }
};

// The tile of what was laid out.
template <typename A>
FASTKD_DEVICE A laid_out(const A* from, const Cut& cut, bool is_ieee, int row, int column) {
  const int at = row * (cut.columns + 1) + column, size = cut.rows * (cut.columns + 1);
  A total = from[at];
  for (int k = 1; !is_ieee && k < cut.k_step / 16; ++k) total += from[at + k * size];
  return total;
}

}  // namespace fastkd
