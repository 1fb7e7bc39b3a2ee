// How large gradients are written. Which way is faster depends on the processor's caches, so a short
// measurement chooses, once a process, before the first of them. Both ways give the same bits.
#pragma once

#include <cstdint>

namespace fastkd {

// Whether a gradient of so many bytes is written past the caches. A large one would not stay there until
// anyone reads it, and a line that is written in the cache is first read from memory; yet some processors are
// faster at that.
bool streams_past_caches(int64_t bytes);

}  // namespace fastkd
