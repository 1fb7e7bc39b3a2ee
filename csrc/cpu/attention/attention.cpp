// The attention operators for the CPU: checks, allocation and the parallel region. The formulas are in
// attention.inl, the schemas in fastkd/ops/_attention_operators.py.
#include "cpu/attention/sides.h"

#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/few.h"
#include "cpu/memory.h"

namespace fastkd {

namespace {

std::tuple<Tensor, Tensor> attention_map(const Tensor& x, double p, const Text& channel_reduce,
                                         bool is_signed, bool normalize, double eps, const Text& eps_mode) {
  const TensorView view = view_of(x, "x");
  const Feature feature = feature_of(view, "x");
  const PoolTables none = make_pool(feature.size, feature.size, false);
  AttentionMapArgs args;
  args.side = side_of(feature, none.plan);
  args.options = options_of(p, channel_reduce, is_signed, eps, eps_mode);
  args.accumulation = accumulation(view.dtype, view.dtype);
  args.normalize = normalize;

  int64_t sizes[kMaxDims];
  map_sizes(view, sizes);
  Tensor map = empty(sizes, view.dim - 1, args.accumulation);
  const int64_t norm_size = normalize ? feature.batch : 0;
  Tensor norm = empty(&norm_size, 1, args.accumulation);
  args.map = map.mutable_data_ptr();
  args.norm = norm.mutable_data_ptr();
  const auto run = kernels().attention.map;
  parallel_units(feature.batch, feature.channels * feature.positions,
                 scratch_of(args.side, 1, feature.layout != Layout::kGeneric, args.accumulation),
                 [&](int64_t begin, int64_t end, void* scratch) { run(args, begin, end, scratch); });
  return {std::move(map), std::move(norm)};
}

Tensor attention_map_backward(const Tensor& grad, const Tensor& x, const Tensor& map, const Tensor& norm,
                              double p, const Text& channel_reduce, bool is_signed, bool normalize,
                              double eps, const Text& eps_mode) {
  const TensorView view = view_of(x, "x");
  Tensor out = empty_like(x, view);
  const AttentionOptions options = options_of(p, channel_reduce, is_signed, eps, eps_mode);
  const AttentionMapBackwardArgs args = map_backward_args(grad, view, map, norm, options, normalize, out);
  const Feature& feature = args.side.x;
  const bool in_place = feature.layout == args.dx.layout && feature.layout != Layout::kGeneric;
  const auto run = kernels().attention.map_backward;
  parallel_units(feature.batch, feature.channels * feature.positions,
                 scratch_of(args.side, 2, in_place, args.accumulation),
                 [&](int64_t begin, int64_t end, void* scratch) { run(args, begin, end, scratch); });
  return out;
}

// The coefficients of all the student's stages in one tensor, stage by stage: of several, each costs the host
// more than its arithmetic. Only beside prepared gradients, where the backward pass hardly ever reads them.
Tensor join_coefficients(Few<AttentionStage>& stages, size_t count, DType dtype) {
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i)
    total += stages[i].student.x.batch * stages[i].student.pool.out_positions;
  Tensor out = empty(&total, 1, dtype);
  char* next = static_cast<char*>(out.mutable_data_ptr());
  for (size_t i = 0; i < count; ++i) {
    AttentionSide& side = stages[i].student;
    side.coefficients = next;
    next += side.x.batch * side.pool.out_positions * size_of(dtype);
  }
  return out;
}

// A map of coefficients for a side, at x's own size or, if x is pooled before the power, at the pooled size.
Tensor make_coefficients(AttentionSide& side, const TensorView& view, bool is_map, bool pool_before,
                         DType dtype) {
  int64_t sizes[kMaxDims];
  const int32_t dim = is_map ? view.dim : view.dim - 1;
  if (is_map) {
    for (int32_t d = 0; d < dim; ++d) sizes[d] = view.sizes[d];
  } else {
    map_sizes(view, sizes);
  }
  if (side.pool.active && pool_before) {
    for (int32_t d = 1; d < dim; ++d) sizes[d] = side.pool.out[3 - dim + d];
  }
  Tensor out = empty(sizes, dim, dtype);
  side.coefficients = out.mutable_data_ptr();
  return out;
}

std::tuple<Tensor, Tensors, Tensors> attention_transfer_loss(const Tensors& student, const Tensors& teacher,
                                                             int64_t options,
                                                             const std::vector<double>& numbers) {
  const size_t count = student.size();
  STD_TORCH_CHECK(count > 0 && teacher.size() == count,
                  "student and teacher must be lists of the same length, at least 1, got ", count, " and ",
                  teacher.size());
  check_options(options);
  const AttentionNumbers given = attention_numbers(numbers, count);
  const bool student_grad = options & kStudentGrad, teacher_grad = options & kTeacherGrad;
  const bool student_is_map = options & kStudentIsMap;
  const bool teacher_is_map = options & kTeacherIsMap;
  AttentionLossArgs args;
  args.options = options_of(given.p, options & kSigned, options & kMean, given.eps, options & kAddEps);
  args.pool_before = (options & kPoolBefore) != 0;
  args.l2 = (options & kL2) != 0;
  args.teacher_is_map = teacher_is_map;
  args.student_is_map = student_is_map;
  const bool max = options & kPoolMax;
  const double share = options & kStageMean ? given.weight / static_cast<double>(count) : given.weight;

  Few<TensorView> views(2 * count);  // student's, then teacher's
  args.accumulation = DType::kFloat;
  for (size_t i = 0; i < count; ++i) {
    views[i] = view_of(student[i], "student");
    views[count + i] = view_of(teacher[i], "teacher");
    args.accumulation = accumulation(args.accumulation, accumulation(views[i].dtype, views[count + i].dtype));
  }
  Few<AttentionStage> stages(count);
  Few<PoolTables> pools(2 * count);
  Tensors gradients;
  const bool prepare = options & kPrepare && student_grad && !student_is_map;
  bool joined = prepare && !teacher_grad;  // fastkd/ops/_attention_operators.py has the same rule
  if (prepare) gradients.reserve(count);
  args.upstream = given.upstream;
  int64_t elements = 0;
  size_t scratch_bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    const Feature s = student_is_map ? map_of(views[i], "student") : feature_of(views[i], "student");
    const Feature t =
        teacher_is_map ? map_of(views[count + i], "teacher") : feature_of(views[count + i], "teacher");
    STD_TORCH_CHECK(
        views[i].dim + (student_is_map ? 1 : 0) == views[count + i].dim + (teacher_is_map ? 1 : 0),
        "student and teacher differ in the number of spatial dimensions");
    STD_TORCH_CHECK(s.batch == t.batch, "student and teacher differ in batch size, got ", s.batch, " and ",
                    t.batch);
    STD_TORCH_CHECK(i == 0 || s.batch == stages[0].student.x.batch, "stages differ in batch size");
    int64_t out[3];
    for (int d = 0; d < 3; ++d) {
      STD_TORCH_CHECK(!teacher_is_map || t.size[d] <= s.size[d],
                      "a teacher's map must not be larger than the student");
      STD_TORCH_CHECK(!student_is_map || s.size[d] <= t.size[d],
                      "a student's map must not be larger than the teacher");
      out[d] = s.size[d] < t.size[d] ? s.size[d] : t.size[d];
    }
    pools[2 * i] = make_pool(s.size, out, max);
    pools[2 * i + 1] = make_pool(t.size, out, max);
    AttentionStage& stage = stages[i];
    stage.student = side_of(s, pools[2 * i].plan);
    stage.teacher = side_of(t, pools[2 * i + 1].plan);
    const double terms = static_cast<double>(s.batch) *
                         (args.l2 ? 1.0 : static_cast<double>(stage.student.pool.out_positions));
    stage.factor = share * (given.weights ? given.weights[i] : 1.0) / terms;
    elements += s.channels * s.positions + t.channels * t.positions;
    joined = joined && !stage.student.pool.active && s.positions > 1;
    stage.gradient.data = nullptr;
    if (prepare) {
      gradients.push_back(empty_like(student[i], views[i]));
      stage.gradient = feature_of(view_of(gradients[i], "gradient"), "gradient");
      stage.streaming = streams_past_caches(bytes_of(stage.gradient));
    }
    size_t bytes = 3 * scratch_piece(stage.student.pool.out_positions, sizeof(double));
    for (const AttentionSide* side : {&stage.student, &stage.teacher}) {
      const bool in_place = side->x.layout != Layout::kGeneric && !side->pool.active &&
                            (side == &stage.teacher || stage.gradient.data == nullptr ||
                             stage.gradient.layout == side->x.layout);
      bytes += scratch_of(*side, 4, in_place, args.accumulation);
    }
    scratch_bytes = bytes > scratch_bytes ? bytes : scratch_bytes;
  }

  Tensors coefficients;
  coefficients.reserve((student_grad ? count : 0) + (teacher_grad ? count : 0));
  if (joined) coefficients.push_back(join_coefficients(stages, count, args.accumulation));
  for (size_t i = 0; student_grad && !joined && i < count; ++i) {
    coefficients.push_back(
        make_coefficients(stages[i].student, views[i], student_is_map, args.pool_before, args.accumulation));
  }
  for (size_t i = 0; teacher_grad && i < count; ++i) {
    coefficients.push_back(make_coefficients(stages[i].teacher, views[count + i], teacher_is_map,
                                             args.pool_before, args.accumulation));
  }

  const int64_t batch = stages[0].student.x.batch;
  const int64_t units = batch * static_cast<int64_t>(count);
  std::vector<double> partial(static_cast<size_t>(units));
  args.stages = stages.data();
  args.stage_count = static_cast<int64_t>(count);
  args.partial = partial.data();
  const auto run = kernels().attention.loss;
  parallel_units(units, elements / static_cast<int64_t>(count), scratch_bytes,
                 [&](int64_t begin, int64_t end, void* scratch) { run(args, begin, end, scratch); });

  double total = 0;
  for (size_t i = 0; i < count; ++i) {
    double stage_total = 0;
    for (int64_t n = 0; n < batch; ++n)
      stage_total += partial[i * static_cast<size_t>(batch) + static_cast<size_t>(n)];
    total += stages[i].factor * stage_total;
  }
  Tensor loss = empty(nullptr, 0, args.accumulation);
  if (args.accumulation == DType::kDouble) {
    *static_cast<double*>(loss.mutable_data_ptr()) = total;
  } else {
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total);
  }
  return {std::move(loss), std::move(coefficients), std::move(gradients)};
}

Tensors attention_transfer_loss_backward(const Tensor& grad, const Tensors& features,
                                         const Tensors& coefficients, double p, int64_t options) {
  const size_t count = features.size();
  STD_TORCH_CHECK(coefficients.size() == count, "features and coefficients must be lists of the same length");
  if (count == 0) return {};
  AttentionLossBackwardArgs args;
  check_options(options);
  args.options = options_of(p, options & kSigned, false, 0, false);
  args.grad = scalar_of(grad, "grad");
  const bool max = options & kPoolMax;

  Few<AttentionGradient> items(count);
  Few<PoolTables> pools(count);
  Tensors out;
  out.reserve(count);
  int64_t elements = 0;
  size_t scratch_bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    AttentionGradient& item = items[i];
    const TensorView view = view_of(features[i], "features");
    const TensorView coefficient_view = view_of(coefficients[i], "coefficients");
    if (i == 0) args.accumulation = coefficient_view.dtype;
    STD_TORCH_CHECK(coefficient_view.dtype == args.accumulation &&
                        (args.accumulation == DType::kDouble || view.dtype != DType::kDouble),
                    "coefficients must all be float32, or float64");
    STD_TORCH_CHECK(args.accumulation == DType::kDouble || args.accumulation == DType::kFloat,
                    "coefficients must be float32 or float64");
    item.is_map = view.dim == coefficient_view.dim;
    STD_TORCH_CHECK(item.is_map || view.dim == coefficient_view.dim + 1,
                    "features and coefficients differ in the number of dimensions");
    const Feature x = item.is_map ? map_of(view, "features") : feature_of(view, "features");
    item.coefficients = map_of(coefficient_view, "coefficients");
    STD_TORCH_CHECK(x.batch == item.coefficients.batch && (i == 0 || x.batch == items[0].side.x.batch),
                    "features differ in batch size");
    for (int d = 0; d < 3; ++d) {
      STD_TORCH_CHECK(
          item.is_map ? item.coefficients.size[d] == x.size[d] : item.coefficients.size[d] <= x.size[d],
          "coefficients do not fit the features' spatial size");
    }
    pools[i] = make_pool(x.size, item.coefficients.size, max);
    item.side = side_of(x, pools[i].plan);
    out.push_back(empty_like(features[i], view));
    const TensorView out_view = view_of(out.back(), "gradient");
    item.dx = item.is_map ? map_of(out_view, "gradient") : feature_of(out_view, "gradient");
    const bool in_place =
        !item.side.pool.active && x.layout == item.dx.layout && x.layout != Layout::kGeneric;
    const size_t bytes = scratch_of(item.side, 2, in_place, args.accumulation);
    scratch_bytes = bytes > scratch_bytes ? bytes : scratch_bytes;
    elements += x.channels * x.positions;
    item.streaming = streams_past_caches(bytes_of(item.dx));
  }
  args.items = items.data();
  args.item_count = static_cast<int64_t>(count);
  const auto run = kernels().attention.loss_backward;
  parallel_units(items[0].side.x.batch * args.item_count, elements / args.item_count, scratch_bytes,
                 [&](int64_t begin, int64_t end, void* scratch) { run(args, begin, end, scratch); });
  return out;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("attention_map", FASTKD_BOX(fastkd::attention_map));
  m.impl("attention_map_backward", FASTKD_BOX(fastkd::attention_map_backward));
  m.impl("attention_transfer_loss", FASTKD_BOX(fastkd::attention_transfer_loss));
  m.impl("attention_transfer_loss_backward", FASTKD_BOX(fastkd::attention_transfer_loss_backward));
}
