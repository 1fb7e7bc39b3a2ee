// What difference.cpp hands to the kernels: two features of one dtype, each in pieces that
// lie dense one after the other.
#pragma once

#include "cpu/kernel.h"

namespace fastkd {

struct DifferenceArgs {
  DType dtype;     // float16, bfloat16 or float32
  int64_t length;  // numbers of a piece
  const void *student, *teacher;
  float *student_grad, *teacher_grad;  // null where none is wanted
  float slope;                         // a gradient by the difference, divided by it
  double* sums;                        // of each piece, without the factor of the loss
};

// A piece is a map of one channel, with its margin; or with `repeated` some positions of all channels, with
// `length` margins for every piece.
struct OfdArgs {
  DifferenceArgs of;
  const float* margins;
  int64_t channels;
  bool repeated;
};

// A piece is a map of one channel, or of all channels of a sample, which then lie beside each other.
struct HclArgs {
  DifferenceArgs of;
  int64_t height, width, channels;
};
// Bytes of scratch memory that a map takes: two of each lane, for as many lanes as a vector of any code path
// has.
static inline size_t hcl_scratch(const HclArgs& args) {
  const int64_t lanes = args.channels > 1 ? 16 : 1;
  return static_cast<size_t>(2 * (args.height + 8) * args.width * lanes) * sizeof(float) + 64;
}

// Each of the teacher's pieces is compared with `copies` of the student's, one after the other. `streaming`:
// the student's gradient is the only one, is written past the caches, and each piece of it begins a line.
struct SquaresArgs {
  DifferenceArgs of;
  int64_t copies;
  bool streaming;
};

struct DifferenceKernels {
  void (*ofd)(const OfdArgs&, int64_t begin, int64_t end);  // of the pieces in there
  void (*hcl)(const HclArgs&, int64_t begin, int64_t end, void* scratch);
  void (*squares)(const SquaresArgs&, int64_t begin, int64_t end);  // of the student's pieces
};

}  // namespace fastkd
