// The attention-transfer loss for CUDA: checks, allocation and launches. The kernels are in
// loss.cuh and gradient.cuh, the schemas in fastkd/ops/_attention_operators.py.
#include <tuple>

#include "common/attention_arguments.h"
#include "cuda/attention/gradient.cuh"
#include "cuda/attention/loss.cuh"

namespace fastkd {
namespace {

Feature side_of(const TensorView& view, bool is_map, const char* name) {
  return is_map ? map_of(view, name) : feature_of(view, name);
}

// The gradient's items go into launches of at most kMaxItems.
class Gradients {
 public:
  Gradients(const OnDevice& device, DType accumulation, int64_t bytes)
      : device_(device), accumulation_(accumulation), goal_(unit_goal(bytes)) {
    args_.grad = nullptr;
    args_.upstream = 1;
    args_.grad_dtype = DType::kFloat;
    args_.count = 0;
  }
  void upstream(double value) { args_.upstream = value; }
  void upstream(const TensorView& grad) {
    args_.grad = grad.data;
    args_.grad_dtype = grad.dtype;
  }
  void add(const Feature& x, bool is_map, const void* coefficients, const Feature& dx) {
    if (args_.count == kMaxItems) run();
    GradientItem& item = args_.items[args_.count++];
    const Feature* const tensors[] = {&x, &dx};
    item.view = matrix_view_of(tensors, 2, goal_);
    item.view.once = true;
    item.x = place_of(x, item.view);
    if (is_map) item.x.data = nullptr;
    item.dx = place_of(dx, item.view);
    item.k = coefficients;
    item.first = static_cast<int32_t>(blocks_);
    blocks_ += x.batch * item.view.units;
    grid_of("attention_transfer_loss_backward", blocks_);
  }
  void run() {
    if (args_.count == 0) return;
    const auto kernel = accumulation_ == DType::kDouble ? gradient_kernel<double> : gradient_kernel<float>;
    launch("attention_transfer_loss_backward", kernel, blocks_, kThreads, 0, device_, args_);
    args_.count = 0;
    blocks_ = 0;
  }

 private:
  const OnDevice& device_;
  DType accumulation_;
  int64_t goal_, blocks_ = 0;
  GradientArgs args_;
};

// A map of coefficients: a map's own size, or that of a feature's map.
Tensor make_coefficients(const TensorView& view, bool is_map, DType dtype, const OnDevice& device) {
  if (is_map) return device.empty(view.sizes, view.dim, dtype);
  int64_t sizes[kMaxDims];
  map_sizes(view, sizes);
  return device.empty(sizes, view.dim - 1, dtype);
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
  const AttentionOptions map =
      options_of(given.p, options & kSigned, options & kMean, given.eps, options & kAddEps);
  check_served(map);
  STD_TORCH_CHECK(count <= kMaxStages, "the CUDA kernels serve at most ", kMaxStages, " stages, got ", count);
  LossArgs args;
  args.eps = map.eps;
  args.mean = static_cast<int8_t>(map.mean);
  args.add_eps = static_cast<int8_t>(map.add_eps);
  args.l2 = (options & kL2) != 0;
  args.student_is_map = (options & kStudentIsMap) != 0;
  args.teacher_is_map = (options & kTeacherIsMap) != 0;
  args.count = static_cast<int32_t>(count);

  TensorView views[2 * kMaxStages];  // student's, then teacher's
  Feature features[2 * kMaxStages];
  DType accumulated = DType::kFloat;
  int64_t bytes = 0, student_bytes = 0;
  for (size_t i = 0; i < 2 * count; ++i) {
    const bool is_student = i < count;
    const char* name = is_student ? "student" : "teacher";
    views[i] = view_of(is_student ? student[i] : teacher[i - count], name);
    check_device(views[i], views[0], name);
    const bool is_map = is_student ? args.student_is_map : args.teacher_is_map;
    features[i] = side_of(views[i], is_map, name);
    accumulated = accumulation(accumulated, views[i].dtype);
    bytes += is_map ? 0 : bytes_of(features[i]);
    student_bytes += is_student ? bytes_of(features[i]) : 0;
  }
  const int64_t samples = features[0].batch, goal = unit_goal(bytes);
  const double share = options & kStageMean ? given.weight / static_cast<double>(count) : given.weight;
  const OnDevice device(views[0]);

  int64_t blocks = 0, sums = 0;
  for (size_t i = 0; i < count; ++i) {
    const Feature& s = features[i];
    const Feature& t = features[count + i];
    STD_TORCH_CHECK(
        views[i].dim + (args.student_is_map ? 1 : 0) == views[count + i].dim + (args.teacher_is_map ? 1 : 0),
        "student and teacher differ in the number of spatial dimensions");
    STD_TORCH_CHECK(s.batch == t.batch, "student and teacher differ in batch size, got ", s.batch, " and ",
                    t.batch);
    STD_TORCH_CHECK(s.batch == samples, "stages differ in batch size");
    for (int d = 0; d < 3; ++d) {
      STD_TORCH_CHECK(s.size[d] == t.size[d],
                      "the CUDA kernels do not serve a student and a teacher that differ in spatial size");
    }
    LossStage& stage = args.stages[i];
    for (const bool is_student : {true, false}) {
      LossSide& side = is_student ? stage.student : stage.teacher;
      const bool is_map = is_student ? args.student_is_map : args.teacher_is_map;
      const Feature& x = is_student ? s : t;
      side.view = is_map ? matrix_view_of_map(x) : matrix_view_of(x, goal);
      // the backward pass reads again what a gradient is wanted of
      side.view.once = !(is_student ? student_grad : teacher_grad);
      side.x = place_of(x, side.view);
      side.sums_at = sums;
      side.coefficients = nullptr;
      sums += samples * side.view.parts * x.positions;
    }
    stage.positions = static_cast<int32_t>(s.positions);
    const double terms = static_cast<double>(samples) * (args.l2 ? 1.0 : static_cast<double>(s.positions));
    stage.factor = share * (given.weights ? given.weights[i] : 1.0) / terms;
    stage.first = static_cast<int32_t>(blocks);
    blocks += samples * units_of(stage, args.student_is_map, args.teacher_is_map);
    grid_of("attention_transfer_loss", blocks);
  }

  Tensors coefficients;
  coefficients.reserve((student_grad ? count : 0) + (teacher_grad ? count : 0));
  for (const bool is_student : {true, false}) {
    if (!(is_student ? student_grad : teacher_grad)) continue;
    for (size_t i = 0; i < count; ++i) {
      const size_t at = is_student ? i : count + i;
      coefficients.push_back(make_coefficients(
          views[at], is_student ? args.student_is_map : args.teacher_is_map, accumulated, device));
      (is_student ? args.stages[i].student : args.stages[i].teacher).coefficients =
          coefficients.back().mutable_data_ptr();
    }
  }
  Tensor loss = device.empty(nullptr, 0, accumulated);
  // terms, then sums
  const int64_t stages = static_cast<int64_t>(count), size = size_of(accumulated);
  const int64_t doubles = stages * samples + (sums * size + 7) / 8;
  Tensor scratch = device.empty(&doubles, 1, DType::kDouble);
  const Tickets tickets = device.tickets(1 + stages * samples);
  args.terms = static_cast<double*>(scratch.mutable_data_ptr());
  args.sums = args.terms + stages * samples;
  args.loss = loss.mutable_data_ptr();
  args.tickets = tickets.first;
  args.samples = static_cast<int32_t>(samples);
  const bool in_double = accumulated == DType::kDouble;
  launch("attention_transfer_loss", in_double ? loss_kernel<double> : loss_kernel<float>, blocks, kThreads,
         in_double ? kSharedBytes<double> : kSharedBytes<float>, device, args);

  Tensors gradients;
  if (options & kPrepare && student_grad && !args.student_is_map) {
    gradients.reserve(count);
    Gradients run(device, accumulated, student_bytes);
    run.upstream(given.upstream);
    for (size_t i = 0; i < count; ++i) {
      gradients.push_back(empty_like(student[i], views[i]));
      const Feature dx = feature_of(view_of(gradients[i], "gradient"), "gradient");
      run.add(features[i], false, args.stages[i].student.coefficients, dx);
    }
    run.run();
  }
  return {std::move(loss), std::move(coefficients), std::move(gradients)};
}

Tensors attention_transfer_loss_backward(const Tensor& grad, const Tensors& features,
                                         const Tensors& coefficients, double p, int64_t options) {
  const size_t count = features.size();
  STD_TORCH_CHECK(coefficients.size() == count, "features and coefficients must be lists of the same length");
  if (count == 0) return {};
  check_options(options);
  check_served(options_of(p, options & kSigned, false, 0, false));
  const TensorView upstream = view_of(grad, "grad");
  for (int32_t d = 0; d < upstream.dim; ++d)
    STD_TORCH_CHECK(upstream.sizes[d] == 1, "grad must hold one number");

  struct Item {
    TensorView view;
    Feature x, dx, k;
    bool is_map;
  };
  std::vector<Item> items(count);
  DType accumulated = DType::kFloat;
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    Item& item = items[i];
    item.view = view_of(features[i], "features");
    const TensorView k = view_of(coefficients[i], "coefficients");
    check_device(item.view, upstream, "features");
    check_device(k, upstream, "coefficients");
    if (i == 0) accumulated = k.dtype;
    STD_TORCH_CHECK(
        k.dtype == accumulated && (accumulated == DType::kDouble || item.view.dtype != DType::kDouble),
        "coefficients must all be float32, or float64");
    STD_TORCH_CHECK(accumulated == DType::kDouble || accumulated == DType::kFloat,
                    "coefficients must be float32 or float64");
    item.is_map = item.view.dim == k.dim;
    STD_TORCH_CHECK(item.is_map || item.view.dim == k.dim + 1,
                    "features and coefficients differ in the number of dimensions");
    item.x = side_of(item.view, item.is_map, "features");
    item.k = map_of(k, "coefficients");
    STD_TORCH_CHECK(item.x.batch == item.k.batch, "features differ in batch size");
    check_same(item.k, item.x, "coefficients and features");
    STD_TORCH_CHECK(
        item.k.layout == Layout::kPlanes && (item.k.batch == 1 || item.k.stride_n == item.k.positions),
        "coefficients must be contiguous");
    bytes += bytes_of(item.x);
  }
  const OnDevice device(upstream);
  Gradients run(device, accumulated, bytes);
  run.upstream(upstream);
  Tensors out;
  out.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    out.push_back(empty_like(features[i], items[i].view));
    run.add(items[i].x, items[i].is_map, items[i].k.data,
            side_of(view_of(out[i], "gradient"), items[i].is_map, "gradient"));
  }
  run.run();
  return out;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd_cuda, FASTKD_DISPATCH_KEY, m) {
  m.impl("attention_transfer_loss", FASTKD_BOX(fastkd::attention_transfer_loss));
  m.impl("attention_transfer_loss_backward", FASTKD_BOX(fastkd::attention_transfer_loss_backward));
}
