// Relational knowledge distillation: lengths of the differences of all pairs, and angles of all triples. All
// sums are in double, and each result is of one thread, whose order does not depend on how many there are.

static double squared_distance(const float* a, const float* b, int64_t width) {
  constexpr int64_t W = kLanes<double>;
  VecD sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * W <= width; k += 4 * W)
    for (int i = 0; i < 4; ++i) {
      const VecD apart = load<float, double>(a + k + i * W) - load<float, double>(b + k + i * W);
      sums[i] += apart * apart;
    }
  for (; k + W <= width; k += W) {
    const VecD apart = load<float, double>(a + k) - load<float, double>(b + k);
    sums[0] += apart * apart;
  }
  double rest = 0;
  for (; k < width; ++k) {
    const double apart = static_cast<double>(a[k]) - static_cast<double>(b[k]);
    rest += apart * apart;
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

static void rkd_lengths(const RkdLengthsArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.count, width = args.width;
  for (int64_t i = begin; i < end; ++i) {
    args.lengths[i * n + i] = 0;
    for (int64_t j = i + 1; j < n; ++j) {
      const double length = __builtin_sqrt(squared_distance(args.x + i * width, args.x + j * width, width));
      args.lengths[i * n + j] = args.lengths[j * n + i] = length;
    }
  }
}

// Numbers k ... of a side's triples (j; i, k), as a vector or as one number V.
FASTKD_INLINE VecD at(const double* p, VecD) { return load<double, double>(p); }
FASTKD_INLINE double at(const double* p, double) { return *p; }
FASTKD_INLINE void put(double* p, VecD v) { store<double, double>(p, v); }
FASTKD_INLINE void put(double* p, double v) { *p = v; }
FASTKD_INLINE VecD spread(double x, VecD) { return broadcast<double>(x); }
FASTKD_INLINE double spread(double x, double) { return x; }

// One side at a vertex j and a sample i: rows of its matrices, and sums over k.
template <typename V>
struct RkdTriple {
  V part = {}, turn = {};  // over k, of the weights w and of slope * cosine
};

// The cosine between x_i - x_j and x_k - x_j is (<i,k> - <j,k> - <i,j> + <j,j>) / (|x_i - x_j| |x_k - x_j|).
struct RkdRows {
  const double *products_i, *products_j, *inverses_j;
  double offset, inverse;  // <j,j> - <i,j>, and 1 / |x_i - x_j|
  double* weights;         // row i of the first sum, or null

  FASTKD_INLINE RkdRows of(const RkdSide& side, int64_t n, int64_t i, int64_t j) {
    return {side.products + i * n,    side.products + j * n,
            side.inverses + j * n,    side.products[j * n + j] - side.products[i * n + j],
            side.inverses[i * n + j], side.sums ? side.sums + i * n : nullptr};
  }
};

template <typename V>
FASTKD_INLINE V clamped(V x) {
  const V one = spread(1.0, V{});
  x = x > one ? one : x;
  return x < -one ? -one : x;
}

// Adds to the loss, and where a side wants a gradient to its sums, what the sample k (and those of its
// vector) brings. A smooth-l1 loss of d has the slope g = clamp(d, -1, 1) and the value g (d - g / 2).
template <bool kStudent, bool kTeacher, typename V>
FASTKD_INLINE void angles_at(const RkdRows& s, const RkdRows& t, int64_t k, V& loss, RkdTriple<V>& s_sum,
                             RkdTriple<V>& t_sum) {
  const V s_scale = at(s.inverses_j + k, V{}) * s.inverse, t_scale = at(t.inverses_j + k, V{}) * t.inverse;
  const V s_cosine = (at(s.products_i + k, V{}) - at(s.products_j + k, V{}) + s.offset) * s_scale;
  const V t_cosine = (at(t.products_i + k, V{}) - at(t.products_j + k, V{}) + t.offset) * t_scale;
  const V apart = s_cosine - t_cosine, slope = clamped(apart);
  loss += slope * (apart - 0.5 * slope);
  if constexpr (kStudent) {
    const V weight = slope * s_scale;
    put(s.weights + k, at(s.weights + k, V{}) + weight);
    s_sum.part += weight;
    s_sum.turn += slope * s_cosine;
  }
  if constexpr (kTeacher) {
    const V weight = slope * t_scale;
    put(t.weights + k, at(t.weights + k, V{}) - weight);
    t_sum.part -= weight;
    t_sum.turn -= slope * t_cosine;
  }
}

template <bool kStudent, bool kTeacher>
static void angles_of(const RkdAnglesArgs& args, int64_t i) {
  constexpr int64_t W = kLanes<double>;
  const int64_t n = args.count, square = n * n;
  double total = 0;
  for (int64_t j = 0; j < n; ++j) {
    const RkdRows s = RkdRows::of(args.student, n, i, j), t = RkdRows::of(args.teacher, n, i, j);
    VecD loss = {};
    double last = 0;
    RkdTriple<VecD> s_sum, t_sum;
    RkdTriple<double> s_last, t_last;
    int64_t k = 0;
    for (; k + W <= n; k += W) angles_at<kStudent, kTeacher>(s, t, k, loss, s_sum, t_sum);
    for (; k < n; ++k) angles_at<kStudent, kTeacher>(s, t, k, last, s_last, t_last);
    total += sum(loss) + last;
    if constexpr (kStudent) {
      s.weights[square + j] = sum(s_sum.part) + s_last.part;
      s.weights[2 * square + j] = sum(s_sum.turn) + s_last.turn;
    }
    if constexpr (kTeacher) {
      t.weights[square + j] = sum(t_sum.part) + t_last.part;
      t.weights[2 * square + j] = sum(t_sum.turn) + t_last.turn;
    }
  }
  args.losses[i] = total;
}

static void rkd_angles(const RkdAnglesArgs& args, int64_t begin, int64_t end) {
  const bool student = args.student.sums != nullptr, teacher = args.teacher.sums != nullptr;
  for (int64_t i = begin; i < end; ++i) {
    if (student && teacher) {
      angles_of<true, true>(args, i);
    } else if (student) {
      angles_of<true, false>(args, i);
    } else if (teacher) {
      angles_of<false, true>(args, i);
    } else {
      angles_of<false, false>(args, i);
    }
  }
}

extern const RkdKernels rkd_kernels = {rkd_lengths, rkd_angles};
