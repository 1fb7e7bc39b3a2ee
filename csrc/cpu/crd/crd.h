// What crd.cpp hands to the kernels of crd.inl: embeddings, a bank, and the negatives that each image drew of
// it, in the order of the bank's tiles.
#pragma once

#include "cpu/kernel.h"

namespace fastkd {

// What is made of the scores: the sum of their exponentials; or the loss; or the loss and its gradient.
enum class CrdMode : int32_t { kOdds, kLoss, kGradient };

struct CrdArgs {
  CrdMode mode;
  int64_t count, width, drawn;  // images, numbers of an embedding, negatives of an image
  int64_t tiles, blocks;        // tiles of the bank; blocks of tiles, whose sums are kept apart
  int64_t size, tile_rows;      // rows of the bank, and of a tile of it
  bool dense;                   // whether as many rows are drawn as the bank has
  const float* x;               // (count, width), the embeddings
  const float* bank;            // rows of `width` numbers
  const uint16_t* order;        // (count, drawn), rows within a tile, those of a tile beside each other
  const int32_t* starts;        // (count, tiles + 1), where the rows of each tile begin in `order`
  float coldness;               // 1 / temperature
  float inverse, shift;         // 1 / (normalizer * noise), eps / noise
  double* sums;                 // (blocks)
  float* grads;  // (blocks, count, width), without the temperature and the loss's factors; or null
};

struct CrdKernels {
  void (*blocks)(const CrdArgs&, int64_t begin, int64_t end);
};

}  // namespace fastkd
