// Prefetches memory that is read soon into the second-level cache, a little at a time, between the
// multiply-adds of what is computed before. Otherwise products would wait for memory, and then memory for
// products.

constexpr int64_t kLineBytes = 64;

// Some pieces of memory, in the order in which they will be read. A prefetch of an address that does not
// exist is allowed.
struct Ahead {
  static constexpr int kMost = 32;
  const char* piece[kMost];
  int64_t bytes[kMost];
  int count, current;
  const char *at, *end;  // of the current piece
  int64_t rate;          // bytes to ask for during 2^16 multiply-adds
  int64_t rest;          // what the last step left of a byte, in parts of 2^16

  void add(const void* data, int64_t size) {
    if (count == kMost || size <= 0) return;
    piece[count] = static_cast<const char*>(data), bytes[count++] = size;
    if (count == 1) at = piece[0], end = at + size;
  }
  // The bytes for each of a loop's requests, which are this many multiply-adds apart; no line is left out.
  // Where a step is not a whole number of bytes, some loops take the smaller and some the larger one.
  int64_t step(int64_t products) {
    if (current >= count) return 0;
    rest += products * rate;
    const int64_t bytes = rest >> 16;
    rest &= 0xffff;
    return min_of(kLineBytes, bytes);
  }
  void moved(const char* to) {
    at = to;
    if (at < end || current >= count) return;
    if (++current < count) at = piece[current], end = at + bytes[current];
  }
};
