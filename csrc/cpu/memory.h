// How the kernels use the caches, where no choice changes a bit.
#pragma once

#include <cstdint>

namespace fastkd {

// Whether a gradient of so many bytes is written past the caches. A large one would not stay there until
// anyone reads it, and a line that is written in the cache is first read from memory; yet some processors are
// faster at that. So a short measurement chooses, once a process, before the first of them.
bool streams_past_caches(int64_t bytes);

// Whether the maps of the next sample, of so many bytes, are prefetched while those of this one are
// multiplied: where both fit into the cache. Its size decides, as a measurement would need maps of every
// size.
bool asks_ahead(int64_t bytes);

}  // namespace fastkd
