// Losses of the differences of two features on a CPU: checks, allocation and the division among threads. The
// passes are in the .inl files, the schemas in fastkd/ops/.
#include "cpu/difference/difference.h"

#include <numeric>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/host.h"
#include "cpu/memory.h"

namespace fastkd {
namespace {

constexpr int64_t kPieceNumbers = 1024;  // of a piece over all channels, where the batch can be divided so

// What a loss returns: its value, and the gradients of the students' and then the teachers' that are wanted.
struct Result {
  double loss = 0;
  std::vector<Tensor> student, teacher;

  std::tuple<Tensor, std::vector<Tensor>> all() {
    Tensor value = empty(nullptr, 0, DType::kFloat);
    *static_cast<float*>(value.mutable_data_ptr()) = static_cast<float>(loss);
    for (Tensor& grad : teacher) student.push_back(std::move(grad));
    return {std::move(value), std::move(student)};
  }
};

// A float32 tensor that lies in memory as x does.
float* gradient_of(const Tensor& x, TensorView view, std::vector<Tensor>& grads) {
  view.dtype = DType::kFloat;
  grads.push_back(empty_like(x, view));
  return static_cast<float*>(grads.back().mutable_data_ptr());
}

struct Pair {
  DifferenceArgs args;
  Feature shape;
  bool planes;  // positions of a channel follow each other; else the channels of a position do
};

Pair pair_of(const Tensor& student, const Tensor& teacher, double slope, bool need_s, bool need_t,
             Result& result) {
  const TensorView s = view_of(student, "student"), t = view_of(teacher, "teacher");
  check_like(t, s, "teacher");
  Pair pair = {{s.dtype, 0, s.data, t.data, nullptr, nullptr, static_cast<float>(slope), nullptr},
               feature_of(s, "student"),
               true};
  STD_TORCH_CHECK(s.dtype != DType::kDouble, "student must be float16, bfloat16 or float32");
  const Feature other = feature_of(t, "teacher");
  pair.planes = lies_by_planes(pair.shape) && lies_by_planes(other);
  STD_TORCH_CHECK(pair.planes || (lies_by_positions(pair.shape) && lies_by_positions(other)),
                  "student and teacher must be dense, and lie in memory alike");
  if (need_s) pair.args.student_grad = gradient_of(student, s, result.student);
  if (need_t) pair.args.teacher_grad = gradient_of(teacher, t, result.teacher);
  return pair;
}

// The sum of what run(begin, end, scratch) leaves in the `pieces` sums of args.
template <class F>
double sum_of(DifferenceArgs& args, int64_t pieces, size_t scratch, const F& run) {
  std::vector<double> sums(static_cast<size_t>(pieces));
  args.sums = sums.data();
  parallel_units(pieces, args.length, scratch, run);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

double ofd_stage(Pair pair, const Tensor& margin, double factor) {
  const int64_t channels = pair.shape.channels;
  OfdArgs args = {pair.args, vector_of(margin, channels, "margins"), channels, !pair.planes};
  int64_t pieces = pair.shape.batch * (pair.planes ? channels : pair.shape.positions);
  args.of.length = pair.planes ? pair.shape.positions : channels;
  std::vector<float> margins;
  if (args.repeated) {
    for (; pieces % 2 == 0 && args.of.length * 2 <= kPieceNumbers; pieces /= 2) args.of.length *= 2;
    margins.resize(static_cast<size_t>(args.of.length));
    for (size_t i = 0; i < margins.size(); ++i) margins[i] = args.margins[i % static_cast<size_t>(channels)];
    args.margins = margins.data();
  }
  const auto run = kernels().difference.ofd;
  return factor *
         sum_of(args.of, pieces, 0, [&](int64_t begin, int64_t end, void*) { run(args, begin, end); });
}

void check_count(size_t count, size_t wanted, const char* name) {
  STD_TORCH_CHECK(count == wanted, name, " must be as many as there are pairs");
}

std::tuple<Tensor, std::vector<Tensor>> ofd_loss(std::vector<Tensor> students, std::vector<Tensor> teachers,
                                                 std::vector<Tensor> margins, std::vector<double> factors,
                                                 bool need_s, bool need_t) {
  check_count(teachers.size(), students.size(), "teachers");
  check_count(margins.size(), students.size(), "margins");
  check_count(factors.size(), students.size(), "factors");
  Result result;
  for (size_t i = 0; i < students.size(); ++i) {
    const Pair pair = pair_of(students[i], teachers[i], 2 * factors[i], need_s, need_t, result);
    result.loss += ofd_stage(pair, margins[i], factors[i]);
  }
  return result.all();
}

double squares_of(DifferenceArgs args, int64_t pieces, int64_t copies, double factor) {
  const int64_t bytes = args.length * static_cast<int64_t>(sizeof(float));
  const bool in_lines = bytes % 64 == 0 && reinterpret_cast<uintptr_t>(args.student_grad) % 64 == 0;
  const bool alone = args.student_grad && !args.teacher_grad;
  SquaresArgs squares = {args, copies, alone && in_lines && streams_past_caches(pieces * bytes)};
  const auto run = kernels().difference.squares;
  return factor *
         sum_of(squares.of, pieces, 0, [&](int64_t begin, int64_t end, void*) { run(squares, begin, end); });
}

double hcl_level(Pair pair, double factor) {
  const Feature& x = pair.shape;
  if (x.positions == 1) {
    pair.args.length = x.channels;
    return squares_of(pair.args, x.batch, 1, factor);
  }
  STD_TORCH_CHECK(x.size[0] == 1, "student must have two spatial dimensions");
  HclArgs args = {pair.args, x.size[1], x.size[2], pair.planes ? 1 : x.channels};
  args.of.length = x.positions * args.channels;
  const auto run = kernels().difference.hcl;
  return factor * sum_of(args.of, x.batch * x.channels / args.channels, hcl_scratch(args),
                         [&](int64_t begin, int64_t end, void* scratch) { run(args, begin, end, scratch); });
}

std::tuple<Tensor, std::vector<Tensor>> hcl_loss(std::vector<Tensor> students, std::vector<Tensor> teachers,
                                                 std::vector<double> factors, bool need_s, bool need_t) {
  check_count(teachers.size(), students.size(), "teachers");
  check_count(factors.size(), students.size(), "factors");
  Result result;
  for (size_t i = 0; i < students.size(); ++i)
    result.loss +=
        hcl_level(pair_of(students[i], teachers[i], 2 * factors[i], need_s, need_t, result), factors[i]);
  return result.all();
}

// One pair of tensors, in lists as the other losses have them.
std::tuple<Tensor, std::vector<Tensor>> norm_loss(std::vector<Tensor> students, std::vector<Tensor> teachers,
                                                  int64_t copies, bool need_s, bool need_t) {
  check_count(teachers.size(), 1, "teachers");
  check_count(students.size(), 1, "students");
  STD_TORCH_CHECK(!need_t, "the teacher's gradient is not among what this makes");
  const TensorView s = view_of(students[0], "student"), t = view_of(teachers[0], "teacher");
  const Feature u = feature_of(s, "student"), target = feature_of(t, "teacher");
  check_same(u, target, "student and teacher");
  STD_TORCH_CHECK(s.dtype == t.dtype && s.dtype != DType::kDouble,
                  "student and teacher must be float16, bfloat16 or float32, and alike");
  STD_TORCH_CHECK(copies > 0 && u.channels == copies * target.channels,
                  "student must have `copies` times the teacher's channels");
  const bool planes = lies_by_planes(u) && lies_by_planes(target);
  STD_TORCH_CHECK(planes || (lies_by_positions(u) && lies_by_positions(target)),
                  "student and teacher must be dense, and lie in memory alike");
  const int64_t length = planes ? target.channels * target.positions : target.channels;
  const int64_t pieces = u.batch * u.channels * u.positions / length;
  const double factor = static_cast<double>(copies) / static_cast<double>(u.batch * u.channels * u.positions);
  Result result;
  DifferenceArgs args = {s.dtype, length, s.data, t.data, nullptr, nullptr, static_cast<float>(2 * factor),
                         nullptr};
  if (need_s) args.student_grad = gradient_of(students[0], s, result.student);
  result.loss = squares_of(args, pieces, copies, factor);
  return result.all();
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("ofd_loss", FASTKD_BOX(fastkd::ofd_loss));
  m.impl("hcl_loss", FASTKD_BOX(fastkd::hcl_loss));
  m.impl("norm_loss", FASTKD_BOX(fastkd::norm_loss));
}
