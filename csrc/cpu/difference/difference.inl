// What the losses of differences have in common, each with its gradients in the same pass over both features.
// Arithmetic is in float; squares are added in float over kBlock numbers, then in double, in an order that
// does not depend on the number of threads.

constexpr int64_t kBlock = 1024;

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

// Where a piece of the two features and of the wanted gradients begins.
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

template <bool kStudent, bool kTeacher, typename T, typename V>
FASTKD_INLINE void put_gradients(const Piece<T>& piece, int64_t i, V grad) {
  if constexpr (kStudent) put(piece.s_grad + i, grad);
  if constexpr (kTeacher) put(piece.t_grad + i, -grad);
}
