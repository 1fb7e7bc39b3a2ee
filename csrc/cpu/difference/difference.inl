// Losses of differences, each with its gradients in the same pass over both features. Arithmetic is in float;
// squares are added in float over kBlock numbers, then in double, in an order that depends on nothing.

constexpr int64_t kBlock = 1024;

// A vector, or one number V, from a place on.
template <typename T>
FASTKD_INLINE VecF at(const T* p, VecF) {
  return load<T, float>(p);
}
template <typename T>
FASTKD_INLINE float at(const T* p, float) {
  return to_acc<T, float>(*p);
}
FASTKD_INLINE void put(float* p, VecF v) { store<float, float>(p, v); }
FASTKD_INLINE void put(float* p, float v) { *p = v; }
FASTKD_INLINE VecF chosen(IntF where, VecF yes, VecF no) { return where ? yes : no; }
FASTKD_INLINE float chosen(bool where, float yes, float no) { return where ? yes : no; }

// The sum of square(i, V) over the numbers [0, count), vectors V of them where there are enough.
template <typename F>
FASTKD_INLINE double sum_over(int64_t count, const F& square) {
  constexpr int64_t W = kLanes<float>;
  VecD total = {}, low, high;
  double rest = 0;
  int64_t i = 0;
  while (i + W <= count) {
    const int64_t end = min_of(count, i + kBlock);
    VecF part[4] = {};
    for (; i + 4 * W <= end; i += 4 * W)
      for (int64_t j = 0; j < 4; ++j) part[j] += square(i + j * W, VecF{});
    for (; i + W <= end; i += W) part[0] += square(i, VecF{});
    widen((part[0] + part[1]) + (part[2] + part[3]), low, high);
    total += low + high;
  }
  for (; i < count; ++i) rest += square(i, float{});
  return sum(total) + rest;
}

// The two features and the wanted gradients from one piece on.
template <typename T>
struct Piece {
  const T *s, *t;
  float *s_grad, *t_grad;

  FASTKD_INLINE Piece of(const DifferenceArgs& args, int64_t index) {
    const int64_t first = index * args.length;
    return {static_cast<const T*>(args.student) + first, static_cast<const T*>(args.teacher) + first,
            args.student_grad ? args.student_grad + first : nullptr,
            args.teacher_grad ? args.teacher_grad + first : nullptr};
  }
};

// f(T{}, a constant whether the student's gradient is wanted, the same of the teacher's).
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <typename F>
FASTKD_INLINE void with_wanted(const DifferenceArgs& args, const F& f) {
  with_type<float>(args.dtype, [&](auto type) {
    if (args.student_grad && args.teacher_grad) {
      f(type, Flag<true>{}, Flag<true>{});
    } else if (args.student_grad) {
      f(type, Flag<true>{}, Flag<false>{});
    } else if (args.teacher_grad) {
      f(type, Flag<false>{}, Flag<true>{});
    } else {
      f(type, Flag<false>{}, Flag<false>{});
    }
  });
}

// The squared difference to the teacher's number raised to the margin, 0 where that is at most 0 and not
// below the student's. A NaN stays one. Where number and margin are equal, either has half of the gradient,
// as in torch.maximum.
template <bool kStudent, bool kTeacher, typename T, typename V>
FASTKD_INLINE V ofd_at(const Piece<T>& piece, int64_t i, V margin, float slope) {
  const V s = at(piece.s + i, V{}), t = at(piece.t + i, V{}), zero = {};
  const V target = chosen((t > margin) | (t != t), t, margin);
  const V apart = chosen((s <= target) & (target <= zero), zero, s - target);
  const V grad = slope * apart;
  if constexpr (kStudent) put(piece.s_grad + i, grad);
  if constexpr (kTeacher)
    put(piece.t_grad + i, chosen(t < margin, zero, chosen(t == margin, -0.5f * grad, -grad)));
  return apart * apart;
}

static void ofd(const OfdArgs& args, int64_t begin, int64_t end) {
  with_wanted(args.of, [&](auto type, auto student, auto teacher) {
    using T = decltype(type);
    constexpr bool kStudent = decltype(student)::value, kTeacher = decltype(teacher)::value;
    const float slope = args.of.slope;
    for (int64_t index = begin; index < end; ++index) {
      const auto piece = Piece<T>::of(args.of, index);
      if (args.repeated) {
        args.of.sums[index] = sum_over(args.of.length, [&](int64_t i, auto zero) {
          return ofd_at<kStudent, kTeacher>(piece, i, at(args.margins + i, zero), slope);
        });
      } else {
        const float margin = args.margins[index % args.channels];
        args.of.sums[index] = sum_over(args.of.length, [&](int64_t i, auto zero) {
          return ofd_at<kStudent, kTeacher>(piece, i, margin - zero, slope);
        });
      }
    }
  });
}

extern const DifferenceKernels difference_kernels = {ofd};
