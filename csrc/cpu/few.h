// Small arrays on the host side of the CPU operators. Not for kernels, see common/feature.h.
#pragma once

#include <cstddef>
#include <vector>

namespace fastkd {

// An array of `count` objects. Up to kFew of them, as in a usual call, lie on the stack: a block of a
// kilobyte from the heap makes glibc merge all small blocks that were freed before, and the next small ones
// take longer.
template <class T>
class Few {
 public:
  explicit Few(size_t count)
      : many_(count > kFew ? count : 0), data_(count > kFew ? many_.data() : few_), size_(count) {}
  Few(const Few&) = delete;
  Few& operator=(const Few&) = delete;
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }

 private:
  static constexpr size_t kFew = 8;
  T few_[kFew];
  std::vector<T> many_;
  T* data_;
  size_t size_;
};

}  // namespace fastkd
