// How large features are read and large gradients are written. Which way is fastest depends on the
// processor's caches and prefetchers, so a short measurement chooses, once a process, before the first large
// feature. All ways give the same bits.
#pragma once

#include <cstdint>

namespace fastkd {

// Channels that attention reads side by side where each is a plane and planes share sets of the cache
// (attention/planes.inl): 1, 2 or 8. Kernels read it by
// __atomic_load_n.
extern int32_t planes_side_by_side;

// Measures, unless that was done or the feature has so few bytes that it is not worth waiting for.
void plan_memory(int64_t bytes);

// Whether a gradient of so many bytes is written past the caches. A large one would not stay there until
// anyone reads it, and a line that is written in the cache is first read from memory; yet some processors are
// faster at that.
bool streams_past_caches(int64_t bytes);

}  // namespace fastkd
