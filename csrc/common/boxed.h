// Tensors on their way from PyTorch into an operator and back, by the C functions of its stable interface.
//
// PyTorch's own class of a tensor behind that interface counts its owners in memory of its own, and TORCH_BOX
// copies what an operator returns three times. A loss of three stages has a dozen tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace fastkd {

// A tensor, or none; a copy shares its memory.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}  // which is its own from here on
  Tensor(const Tensor& other) {
    if (other.handle_ == nullptr) return;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(other.handle_, &handle_));
  }
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  void* mutable_data_ptr() const {
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

using Tensors = std::vector<Tensor>;

// Results, for PyTorch to own.
inline void give(StableIValue* stack, Tensor&& tensor) {
  *stack = torch::stable::detail::from(tensor.release());
}
inline void give(StableIValue* stack, Tensors&& tensors) {
  StableListHandle list = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& tensor : tensors)
    TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, torch::stable::detail::from(tensor.release())));
  *stack = torch::stable::detail::from(list);
}
template <class... R>
void give(StableIValue* stack, std::tuple<R...>&& results) {
  std::apply([stack](R&... result) mutable { (give(stack++, std::move(result)), ...); }, results);
}

template <class R>
constexpr uint64_t kResults = 1;
template <class... R>
constexpr uint64_t kResults<std::tuple<R...>> = sizeof...(R);

// An argument on the stack until it is taken: given up here if the conversion of an earlier one throws.
template <class T>
class Waiting {
 public:
  Waiting(StableIValue value) : value_(value) {}
  Waiting(const Waiting&) = delete;
  ~Waiting() {
    if (taken_) return;
    try {
      torch::stable::detail::to<T>(value_);
    } catch (...) {  // the first error is the one that is told
    }
  }
  T take() {
    taken_ = true;
    return torch::stable::detail::to<T>(value_);
  }

 private:
  StableIValue value_;
  bool taken_ = false;
};

// `call` is `function` as PyTorch calls an operator: its arguments on a stack, which then holds its results.
template <auto function>
struct Boxed;

template <class R, class... P, R (*function)(P...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    STD_TORCH_CHECK(arguments == sizeof...(P), "the schema has ", arguments, " arguments, the function ",
                    sizeof...(P));
    // more than the function gives would be read from whatever the stack holds
    STD_TORCH_CHECK(results == kResults<R>, "the schema has ", results, " results, the function ",
                    kResults<R>);
    give(stack, run(stack, std::index_sequence_for<P...>()));
  }

 private:
  template <size_t... I>
  static R run(StableIValue* stack, std::index_sequence<I...>) {
    std::tuple<Waiting<std::decay_t<P>>...> waiting{stack[I]...};
    std::tuple<std::decay_t<P>...> arguments{std::get<I>(waiting).take()...};
    return std::apply([](auto&... argument) { return function(std::forward<P>(argument)...); }, arguments);
  }
};

}  // namespace fastkd

#define FASTKD_BOX(function) fastkd::Boxed<&function>::call

template <>
struct torch::stable::detail::ToImpl<fastkd::Tensor> {
  static fastkd::Tensor call(StableIValue value, uint64_t, bool) {
    return fastkd::Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  }
};
