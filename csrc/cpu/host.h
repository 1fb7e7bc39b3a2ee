// What the CPU operators share on the host side beyond tensor.h: pooling, threads and their scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/tensor.h"
#include "cpu/kernel.h"

namespace fastkd {

// Owns the tables of a PoolPlan. Movable; the plan's pointers stay valid.
struct PoolTables {
  std::vector<int64_t> bounds;
  PoolPlan plan;
};
PoolTables make_pool(const int64_t* in, const int64_t* out, bool max);

// A gradient this large is written past the caches: it would not stay there until anyone reads it, and a line
// that is written in the cache is first read from memory.
constexpr int64_t kStreamingBytes = 1 << 20;
int64_t bytes_of(const Feature& x);

// Whether a feature lies dense in memory, the positions of a channel one after the other; or the channels of
// a position.
bool lies_by_planes(const Feature& x);
bool lies_by_positions(const Feature& x);

// The numbers of a dense matrix (rows, columns) in float32 or float64, and of a dense vector in float32, one
// for each channel.
const void* matrix_of(const Tensor& tensor, DType dtype, int64_t rows, int64_t columns, const char* name);
const float* vector_of(const Tensor& tensor, int64_t channels, const char* name);

// The value of a 0-dim (or one-element) tensor.
double scalar_of(const Tensor& tensor, const char* name);

// 64-byte aligned memory of the calling thread, kept for the next call unless large. One at a time per
// thread.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  bool owned_;
};

// f(begin, end, scratch) over parts of [0, units). A thread gets at least as many units as hold
// kGrainElements elements, since starting one costs about as much as processing those. What f computes for a
// unit must not depend on how units are divided.
constexpr int64_t kGrainElements = 32768;
template <class F>
void parallel_units(int64_t units, int64_t elements_per_unit, size_t scratch_bytes, const F& f) {
  const int64_t grain = elements_per_unit >= kGrainElements
                            ? 1
                            : kGrainElements / (elements_per_unit > 0 ? elements_per_unit : 1);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes);
    f(begin, end, scratch.data());
  });
}

}  // namespace fastkd
