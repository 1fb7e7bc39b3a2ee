// What the FSP operators (fsp/fsp.cpp) hand to their kernels (fsp/fsp.inl): plain data, made once a call.
#pragma once

#include "cpu/kernel.h"

namespace fastkd {

// Products this deep are summed in registers and written once (gemm.inl).
constexpr int64_t kGemmDepth = 256;

// Matrices of positions x positions from which a pair's gradients follow (fsp/low_rank.inl).
constexpr int64_t kLowRankSquares = 4;

// A feature map as one pair sees it: pooled to the pair's common size where it is larger.
struct FspOperand {
  Feature x;
  PoolPlan pool;
};

enum class FspResult : int32_t { kMatrix, kSquares, kColumnNorms };

// One pair of stages, forward: G = a b^T / positions of a student and, for a loss, of a teacher. A unit of
// work is one sample and one block of rows of G.
struct FspPair {
  FspOperand a[2], b[2];  // student, teacher
  int32_t chains;         // 1: G of the student only; 2: the difference of both
  int32_t fused;          // the difference as (A_s - A_t) B_s^T + A_t (B_s - B_t)^T
  int32_t planes;         // multiplied along the positions, which lie together (fsp/dot.inl)
  int32_t tiles;          // multiplied by AMX (fsp/amx.inl)
  int32_t low_rank;       // by products over channels, positions x positions (fsp/low_rank.inl)
  FspResult result;
  int64_t positions[2];
  int64_t rows, row_blocks;  // of G: rows a unit, units a sample
  int64_t depth;             // positions taken at a time; tiles, where maps are averaged: lines of windows;
                             // low_rank: channels
  double slope;              // d loss / d G = slope * difference (or its column, normalized)
  void* out;                 // (N, Ca, Cb) contiguous: G, or d loss / d G; null if not wanted. low_rank: the
                             // squares, (N, kLowRankSquares, positions, positions)
};

struct FspForward {
  const FspPair* pairs;
  int64_t count;             // of pairs
  int64_t units_per_sample;  // over all pairs: units are ordered by sample first, since neighbouring pairs
                             // share a feature map
  int64_t work_ahead;        // multiply-adds a sample, during which the next one's maps are asked for; or 0
  double* partial;           // one a unit: what it adds to its pair's loss, without the factors
};

// One term of a feature's gradient: scale * sum over channels o of m[n, c, o] * other[n, o, position],
// un-pooled to the feature's own size.
struct FspTerm {
  FspOperand other;
  PoolPlan own;
  const void* m;
  DType m_dtype;
  int64_t m_n, m_c, m_o;  // strides
  double scale;
  int64_t positions;
  int64_t depth;
  int32_t tiles;  // multiplied by AMX
  // From products over channels, m (fsp/low_rank.inl): the feature itself in the student and in the teacher;
  // the right factor of its pair or the left one.
  int32_t low_rank;
  FspOperand own_chains[2];
  int32_t right;
};

// One feature whose gradient is wanted. A unit of work is one sample and one block of channels.
struct FspStage {
  Feature x;
  Feature grad;
  int32_t terms;
  FspTerm term[2];
  int32_t channels_last;  // the layout in which the gradient is computed
  int32_t direct;         // computed in place: the gradient has the accumulation dtype and such a layout
  int32_t stream;         // direct, and written past the caches
  int64_t channels, channel_blocks;
};

struct FspBackward {
  const FspStage* stages;
  int64_t count;
  int64_t units_per_sample;
};

// Forward and backward of whole samples: the backward reads what the forward left in `out` of the pairs, and
// both read the same maps, which stay in the cache between the two.
struct FspTraining {
  FspForward forward;
  FspBackward backward;
};

// Units [begin, end), of `training` samples [begin, end). Indexed by accumulation dtype: 0 float, 1 double.
// The scratch sizes are in bytes.
struct FspKernels {
  size_t (*forward_scratch[2])(const FspForward&);
  void (*forward[2])(const FspForward&, int64_t begin, int64_t end, void* scratch);
  size_t (*backward_scratch[2])(const FspBackward&);
  void (*backward[2])(const FspBackward&, int64_t begin, int64_t end, void* scratch);
  size_t (*training_scratch[2])(const FspTraining&);
  void (*training[2])(const FspTraining&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace fastkd
