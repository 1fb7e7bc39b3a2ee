// The squared difference of two features, one of which may be a target for several copies of the other.

FASTKD_INLINE void put_streamed(float* p, VecF v) { stream<float, float>(p, v); }
FASTKD_INLINE void put_streamed(float* p, float v) { *p = v; }

template <typename T>
static void streamed_squares(const SquaresArgs& args, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const auto piece = Piece<T>::of(args.of, index);
    const T* t = static_cast<const T*>(args.of.teacher) + index / args.copies * args.of.length;
    args.of.sums[index] = sum_over(args.of.length, [&](int64_t i, auto zero) {
      const auto apart = at(piece.s + i, zero) - at(t + i, zero);
      put_streamed(piece.s_grad + i, args.of.slope * apart);
      return apart * apart;
    });
  }
  stream_end();
}

static void squares(const SquaresArgs& args, int64_t begin, int64_t end) {
  if (args.streaming)
    return with_type<float>(args.of.dtype,
                            [&](auto type) { streamed_squares<decltype(type)>(args, begin, end); });
  with_wanted(args.of, [&](auto type, auto student, auto teacher) {
    using T = decltype(type);
    for (int64_t index = begin; index < end; ++index) {
      auto piece = Piece<T>::of(args.of, index);
      piece.t = static_cast<const T*>(args.of.teacher) + index / args.copies * args.of.length;
      args.of.sums[index] = sum_over(args.of.length, [&](int64_t i, auto zero) {
        const auto apart = at(piece.s + i, zero) - at(piece.t + i, zero);
        put_gradients<decltype(student)::value, decltype(teacher)::value>(piece, i, args.of.slope * apart);
        return apart * apart;
      });
    }
  });
}
