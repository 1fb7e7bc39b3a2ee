#include "cuda/fsp/plan.cuh"

#include <algorithm>

namespace fastkd {
namespace {

constexpr int64_t kFusedTiles = 2;

int32_t narrow(int64_t size) {
  check_count(size);
  return static_cast<int32_t>(size);
}

// padded: rows may be read beyond the last position.
Reading reading_of(const Operand& x, bool padded) {
  const int64_t pack = 16 / size_of(x.dtype);
  const auto whole = [&](int64_t stride) { return stride % pack == 0; };
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0 || !whole(x.stride_n)) return Reading::kOne;
  bool apart = true;
  for (int d = 0; d < 3; ++d) apart = apart && (x.size[d] == 1 || whole(x.stride[d]));
  if (x.stride_c == 1 && whole(x.channels) && apart) return Reading::kChannels;
  if (x.linear && x.stride[2] == 1 && whole(x.stride_c) && (padded || whole(x.positions)))
    return Reading::kPositions;
  return Reading::kOne;
}

}  // namespace

Operand plain_operand(const Feature& x) {
  Operand o{};
  o.data = x.data;
  o.stride_n = x.stride_n;
  o.stride_c = x.stride_c;
  o.channels = narrow(x.channels);
  o.positions = narrow(x.positions);
  for (int d = 0; d < 3; ++d) {
    o.stride[d] = x.stride[d];
    o.size[d] = o.grid[d] = narrow(x.size[d]);
  }
  o.dtype = x.dtype;
  o.pool = Pool::kNone;
  o.linear = x.layout != Layout::kGeneric;
  if (o.linear) o.stride[2] = x.stride_s;
  o.exact = x.dtype == DType::kBFloat16;
  o.reading = reading_of(o, false);
  return o;
}

Operand FspCall::operand(const Feature& x, const int64_t* grid, int64_t channels_of_other) {
  if (is_size(x, grid)) return plain_operand(x);
  Feature own = x;
  own.layout = Layout::kGeneric;  // windows want each axis' stride
  Operand o = plain_operand(own);
  for (int d = 0; d < 3; ++d) o.grid[d] = narrow(grid[d]);
  o.positions = narrow(count_of(grid));
  o.pool = max ? Pool::kMax : Pool::kAvg;
  o.whole = whole_windows(o, o.size, o.grid, false);
  o.exact = o.exact && max;
  if (channels_of_other <= kFusedTiles * kFspTile && is_near(x, grid)) return o;

  const bool channels_last = x.stride_c == 1 && x.channels > 1;
  const int64_t pack = 16 / size_of(accumulate),
                unit = channels_last ? x.channels : (o.positions + pack - 1) / pack * pack;
  const int64_t sizes[3] = {x.batch, channels_last ? o.positions : x.channels, unit};
  PoolItem item{};
  item.x = o;
  item.out = keep(device.empty(sizes, 3, accumulate));
  item.stride_n = sizes[1] * sizes[2];
  item.stride_c = channels_last ? 1 : unit;
  item.stride_s = channels_last ? unit : 1;
  item.count = x.batch * x.channels * o.positions;
  item.channels_last = channels_last;
  pools_.push_back(item);

  o.data = item.out;
  o.dtype = accumulate;
  o.pool = Pool::kNone;
  o.whole = Whole{};
  o.stride_n = item.stride_n;
  o.stride_c = item.stride_c;
  for (int d = 0; d < 3; ++d) o.size[d] = o.grid[d];
  o.stride[0] = item.stride_s * grid[1] * grid[2];
  o.stride[1] = item.stride_s * grid[2];
  o.stride[2] = item.stride_s;
  o.linear = true;
  o.reading = reading_of(o, true);
  return o;
}

Whole whole_windows(const Operand& x, const int32_t* fine, const int32_t* coarse, bool spread) {
  Whole whole{};
  int bits = 0;
  int64_t extent = 0;
  for (int d = 2; d >= 0; --d) {
    const int32_t times = coarse[d] ? fine[d] / coarse[d] : 0;
    if (times < 1 || times * coarse[d] != fine[d] || times > UINT8_MAX) return Whole{};
    whole.size[d] = static_cast<uint8_t>(times);
    if (spread) {
      if (static_cast<int64_t>(fine[d]) * times >= int64_t{1} << 31) return Whole{};
      whole.step[d] = static_cast<int32_t>(((int64_t{1} << 31) + times - 1) / times);
      continue;
    }
    for (int32_t part = 1; part < times; part *= 2) {
      const int64_t step = x.stride[d] * part;
      if (times % (2 * part) != 0 || 2 << bits > kMostInWindow || step > INT32_MAX - extent) return Whole{};
      whole.step[bits++] = static_cast<int32_t>(step);
      extent += step;
    }
  }
  if (!spread && bits == 0) return Whole{};  // of equal sizes nothing is pooled
  whole.count = static_cast<uint8_t>(1 << bits);
  return whole;
}

bool is_near(const Feature& x, const int64_t* grid) {
  return is_near(x.size[0], grid[0]) && is_near(x.size[1], grid[1]) && is_near(x.size[2], grid[2]);
}

Operand FspCall::spread(const Feature& x, const int64_t* grid) const {
  Feature own = x;
  own.layout = Layout::kGeneric;
  Operand o = plain_operand(own);
  for (int d = 0; d < 3; ++d) o.grid[d] = narrow(grid[d]);
  o.positions = narrow(count_of(grid));
  o.pool = Pool::kSpread;
  o.whole = whole_windows(o, o.grid, o.size, true);
  o.exact = false;
  return o;
}

Operand FspCall::matrix(const TensorView& m, int own_dim) const {
  Feature x{};
  x.data = m.data;
  x.dtype = m.dtype;
  x.layout = Layout::kPlanes;
  x.batch = m.sizes[0];
  x.channels = m.sizes[own_dim];
  x.positions = m.sizes[3 - own_dim];
  x.stride_n = m.strides[0];
  x.stride_c = m.strides[own_dim];
  x.size[0] = x.size[1] = 1;
  x.size[2] = x.positions;
  x.stride[2] = x.stride_s = m.strides[3 - own_dim];
  return plain_operand(x);
}

void FspCall::pool() {
  for (size_t begin = 0; begin < pools_.size(); begin += PoolArguments::kMost) {
    PoolArguments arguments{};
    int64_t blocks = 0;
    for (size_t i = begin; i < pools_.size() && arguments.items < PoolArguments::kMost; ++i) {
      PoolItem& item = arguments.item[arguments.items++];
      item = pools_[i];
      item.first_block = static_cast<int32_t>(blocks);
      blocks += (item.count + PoolArguments::kThreads - 1) / PoolArguments::kThreads;
      grid_of("fsp_pool", blocks);
    }
    launch("fsp_pool", accumulate == DType::kDouble ? fsp_pool<double> : fsp_pool<float>, blocks,
           PoolArguments::kThreads, 0, device, arguments);
  }
}

void FspCall::check_feature(const TensorView& view, const char* name) const {
  check_device(view, first_, name);
  STD_TORCH_CHECK(view.dim == first_.dim, name, ": all maps must have the same number of dimensions, got ",
                  view.dim, " and ", first_.dim);
  STD_TORCH_CHECK(view.sizes[0] == first_.sizes[0], name, ": all maps must have the same batch size, got ",
                  view.sizes[0], " and ", first_.sizes[0]);
}

Mode mode_of(const std::vector<TensorView>& features, DType accumulate, FspPrecision precision) {
  if (accumulate == DType::kDouble) return Mode::kIeee;
  bool all_bfloat16 = true, any_float = false;
  for (const TensorView& x : features) {
    all_bfloat16 = all_bfloat16 && x.dtype == DType::kBFloat16;
    any_float = any_float || x.dtype == DType::kFloat;
  }
  if (all_bfloat16) return Mode::kBf16;
  if (precision == FspPrecision::kTf32) return Mode::kTf32;
  // tf32 holds float16 and bfloat16 exactly: for them alone three products are as exact as float32's
  return precision == FspPrecision::kTf32x3 || !any_float ? Mode::kTf32x3 : Mode::kIeee;
}

void common_size(const Feature& a, const Feature& b, int64_t* size) {
  for (int d = 0; d < 3; ++d) size[d] = std::min(a.size[d], b.size[d]);
}

}  // namespace fastkd
