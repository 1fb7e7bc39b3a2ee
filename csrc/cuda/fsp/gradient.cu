#include "cuda/fsp/gradient.cuh"

namespace fastkd {
namespace {

// A term of an averaged feature may be multiplied at the feature's own positions, several of which have the
// same factor. That spares a launch, about 3 us, and the reading and writing of the coarser gradient; so many
// multiply-adds cost an H200 about as much, by calculation: some 60 T a second on tensor cores, 25 without.
constexpr int64_t kSpreadProducts = 1 << 28, kSpreadIeee = 1 << 27;

}  // namespace

void check_matrix_grad(const FspCall& call, const TensorView& m, const Feature& a, const Feature& b,
                       const char* name) {
  call.check_device_of(m, name);
  STD_TORCH_CHECK(m.dtype == call.accumulate, name, " must be ",
                  call.accumulate == DType::kDouble ? "float64" : "float32");
  STD_TORCH_CHECK(m.dim == 3 && m.sizes[0] == a.batch && m.sizes[1] == a.channels && m.sizes[2] == b.channels,
                  name, " must have shape (", a.batch, ", ", a.channels, ", ", b.channels, ")");
}

Gather FspGradients::coarse(const Feature& feature, const FspTerm& term, const int64_t* grid,
                            const Operand& own) {
  const bool channels_last = feature.layout == Layout::kChannelsLast;
  const int64_t positions = count_of(grid);
  const int64_t sizes[3] = {feature.batch, channels_last ? positions : feature.channels,
                            channels_last ? feature.channels : positions};
  Feature made{};
  made.data = call_.keep(call_.device.empty(sizes, 3, call_.accumulate));
  made.dtype = call_.accumulate;
  made.layout = channels_last ? Layout::kChannelsLast : Layout::kPlanes;
  made.batch = feature.batch;
  made.channels = feature.channels;
  made.positions = made.size[2] = positions;
  made.size[0] = made.size[1] = 1;
  made.stride_n = sizes[1] * sizes[2];
  made.stride_c = channels_last ? 1 : positions;
  made.stride_s = made.stride[2] = channels_last ? feature.channels : 1;

  GradientArguments item{};
  item.out = plain_operand(made);
  item.channels_last = channels_last;
  item.terms = 1;
  item.m[0] = call_.matrix(term.m, term.own_dim);
  item.other[0] = call_.operand(term.other, grid, feature.channels);
  item.scale[0] = 1.0 / static_cast<double>(positions);
  before_.push_back(item);

  Gather gather{};
  gather.from = made.data;
  gather.stride_n = made.stride_n;
  gather.stride_c = made.stride_c;
  gather.stride_s = made.stride_s;
  for (int d = 0; d < 3; ++d) gather.grid[d] = static_cast<int32_t>(grid[d]);
  gather.whole = whole_windows(own, own.size, gather.grid, false);
  return gather;
}

void FspGradients::add(const Tensor& x, const TensorView& view, const Feature& feature,
                       const std::vector<FspTerm>& terms) {
  samples_ = feature.batch;
  Tensor grad = empty_like(x, view);
  const Feature made = feature_of(view_of(grad, "gradient"), "gradient");
  GradientArguments item{};
  item.out = plain_operand(made);
  item.channels_last = made.layout == Layout::kChannelsLast;
  Feature own = feature;
  own.layout = Layout::kGeneric;  // windows want each axis' stride
  item.own = plain_operand(own);
  item.max = call_.max;
  for (const FspTerm& term : terms) {
    int64_t grid[3];
    common_size(feature, term.other, grid);
    const int64_t products = feature.batch * feature.channels * term.other.channels * feature.positions;
    const bool few = products <= (call_.mode == Mode::kIeee ? kSpreadIeee : kSpreadProducts);
    const bool spread = !call_.max && few && is_size(term.other, grid) && is_near(term.other, feature.size);
    if (!is_size(feature, grid) && !spread) {
      item.gather[item.gathers++] = coarse(feature, term, grid, item.own);
      continue;
    }
    item.m[item.terms] = call_.matrix(term.m, term.own_dim);
    item.other[item.terms] = is_size(feature, grid) ? call_.operand(term.other, grid, feature.channels)
                                                    : call_.spread(term.other, feature.size);
    item.scale[item.terms++] = 1.0 / static_cast<double>(count_of(grid));
  }
  items_.push_back(item);
  out_.push_back(grad);
}

std::vector<Tensor> FspGradients::run(double factor, const TensorView* upstream) {
  call_.pool();
  run_backward(call_, before_, samples_, 1.0, nullptr);
  run_backward(call_, items_, samples_, factor, upstream);
  return out_;
}

}  // namespace fastkd
