// OFD: the squared difference to the teacher's number raised to the margin of its channel.

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
