// Which of a kernel's instances runs, and on what it is launched.
#pragma once

#include "cuda/gram_plan.cuh"

namespace fastkd {

// Tiles of 128 x 128 halve what is read of each feature, and want twice two for each of 132 multiprocessors, or they idle.
constexpr int64_t kWideTiles = 264;

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

#ifdef FASTKD_EMULATE
extern int gram_wide;  // for tests: -1 as on a GPU, 0 never, 1 wherever there are tensor cores
#endif

// Whether rows x columns, for all samples, are made in wide tiles.
inline bool is_wide(Mode mode, int64_t samples, int64_t rows, int64_t columns) {
  if (mode == Mode::kIeee) return false;
#ifdef FASTKD_EMULATE
  if (gram_wide >= 0) return gram_wide == 1;
#endif
  return rows > 64 && columns > 64 && samples * tiles_of(rows, 128) * tiles_of(columns, 128) >= kWideTiles;
}

}  // namespace fastkd
