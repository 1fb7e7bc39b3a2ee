// Self-attention distillation: power sums of both features, their attention, the loss and the gradients of a
// sample, while what was read of it is still in the caches. Matrices are square, in float; the columns that
// fill up their rows are 0.

struct SakdMatrix {
  float* data;
  int64_t side, row;
  FASTKD_INLINE float* at(const SakdMatrix& m, int64_t i) { return m.data + i * m.row; }
};

// f(offset) for the vectors of all rows.
template <typename F>
FASTKD_INLINE void each_vector(const SakdMatrix& m, const F& f) {
  for (int64_t i = 0; i < m.side * m.row; i += kLanes<float>) f(i);
}
FASTKD_INLINE VecF vector_of(const SakdMatrix& m, int64_t i) { return load<float, float>(m.data + i); }
FASTKD_INLINE void put(const SakdMatrix& m, int64_t i, VecF v) { store<float, float>(m.data + i, v); }

static void transposed(const SakdMatrix& from, const SakdMatrix& to) {
  for (int64_t i = 0; i < from.side; ++i)
    for (int64_t j = 0; j < from.row; ++j)
      to.data[i * to.row + j] = j < from.side ? from.data[j * from.row + i] : 0.0f;
}

// Rows [i, i + N) of a b.
template <int64_t N>
FASTKD_INLINE void product_rows(const SakdMatrix& a, const SakdMatrix& b, const SakdMatrix& to, int64_t i) {
  for (int64_t j = 0; j < b.row; j += kLanes<float>) {
    VecF sums[N] = {};
    for (int64_t k = 0; k < a.side; ++k) {
      const VecF right = load<float, float>(b.data + k * b.row + j);
#pragma GCC unroll 8
      for (int64_t r = 0; r < N; ++r) sums[r] += a.data[(i + r) * a.row + k] * right;
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < N; ++r) store<float, float>(to.data + (i + r) * to.row + j, sums[r]);
  }
}

static void product(const SakdMatrix& a, const SakdMatrix& b, const SakdMatrix& to) {
  int64_t i = 0;
  for (; i + 8 <= a.side; i += 8) product_rows<8>(a, b, to, i);
  for (; i < a.side; ++i) product_rows<1>(a, b, to, i);
}

// The softmax of each row, in place. The numbers are products of power sums: none is below the 0 that
// fills rows.
static void softmax(const SakdMatrix& m) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t i = 0; i < m.side; ++i) {
    float* row = m.data + i * m.row;
    VecF largest = {}, total = {};
    for (int64_t j = 0; j < m.row; j += W) {
      const VecF v = load<float, float>(row + j);
      largest = v > largest ? v : largest;
    }
    float most = 0;
    for (int64_t j = 0; j < W; ++j) most = largest[j] > most ? largest[j] : most;
    for (int64_t j = 0; j < m.row; j += W)
      store<float, float>(row + j, exponential(load<float, float>(row + j) - most));
    for (int64_t j = m.side; j < m.row; ++j) row[j] = 0;
    for (int64_t j = 0; j < m.row; j += W) total += load<float, float>(row + j);
    const float share = static_cast<float>(1 / lanes_sum(total));
    for (int64_t j = 0; j < m.row; j += W) store<float, float>(row + j, load<float, float>(row + j) * share);
  }
}

// Adds to q the squares of N channels.
template <int64_t N, typename T>
FASTKD_INLINE void add_squares(const T* x, int64_t positions, bool first, float* q) {
  const auto group = [&](int64_t p, auto zero) {
    auto total = zero;
#pragma GCC unroll 4
    for (int64_t c = 0; c < N; ++c) {
      const auto v = at(x + c * positions + p, zero);
      total += v * v;
    }
    put(q + p, first ? total : at(q + p, zero) + total);
  };
  int64_t p = 0;
  for (; p + kLanes<float> <= positions; p += kLanes<float>) group(p, VecF{});
  for (; p < positions; ++p) group(p, float{});
}

// The mean of squares over the channels. Each row of the map begins a row of the matrix.
template <typename T>
static void sakd_power_sums(const SakdSide& side, const T* x, const SakdMatrix& g) {
  constexpr int64_t W = kLanes<float>;
  const int64_t positions = g.side * g.side, channels = side.channels;
  const float share = 1 / static_cast<float>(channels);
  float* q = g.data;  // dense first: rows that are not full are moved apart below, from the last one on
  if (side.planes) {
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) add_squares<4>(x + c * positions, positions, c == 0, q);
    for (; c < channels; ++c) add_squares<1>(x + c * positions, positions, c == 0, q);
  } else {
    for (int64_t p = 0; p < positions; ++p) {
      const T* from = x + p * channels;
      VecF total = {};
      float rest = 0;
      int64_t c = 0;
      for (; c + W <= channels; c += W) {
        const VecF v = load<T, float>(from + c);
        total += v * v;
      }
      for (; c < channels; ++c) {
        const float v = to_acc<T, float>(from[c]);
        rest += v * v;
      }
      q[p] = static_cast<float>(lanes_sum(total)) + rest;
    }
  }
  for (int64_t i = g.side - 1; i >= 0; --i) {
    for (int64_t j = g.row - 1; j >= g.side; --j) q[i * g.row + j] = 0;
    for (int64_t j = g.side - 1; j >= 0; --j) q[i * g.row + j] = q[i * g.side + j] * share;
  }
}

// One side of a sample: its channel power sums g, the softmaxes R of the rows of g g^T and their transpose,
// and the map g + (R + R^T) * g / sqrt(H), divided by its norm.
struct SakdMap {
  SakdMatrix g, rows, columns, map;
  double norm;
};

static void attend(SakdMap& m, const SakdMatrix& spare) {
  transposed(m.g, spare);
  product(m.g, spare, m.rows);
  softmax(m.rows);
  transposed(m.rows, m.columns);
  const float share = 1 / __builtin_sqrtf(static_cast<float>(m.g.side));
  VecD total = {}, low, high;
  each_vector(m.g, [&](int64_t i) {
    const VecF g = vector_of(m.g, i), v = g + (vector_of(m.rows, i) + vector_of(m.columns, i)) * g * share;
    put(m.map, i, v);
    widen(v, low, high);
    total += low * low + high * high;
  });
  m.norm = __builtin_sqrt(sum(total));
  const float inverse = static_cast<float>(1 / (m.norm < 1e-12 ? 1e-12 : m.norm));
  each_vector(m.map, [&](int64_t i) { put(m.map, i, vector_of(m.map, i) * inverse); });
}

// From the gradient of the map y = m / |m|, in `grad`, to that of the power sums, there too.
static void attend_back(const SakdMap& m, const SakdMatrix& grad, const SakdMatrix& one,
                        const SakdMatrix& two) {
  const double norm = m.norm < 1e-12 ? 1e-12 : m.norm;
  const float inverse = static_cast<float>(1 / norm),
              share = 1 / __builtin_sqrtf(static_cast<float>(m.g.side));
  VecD total = {}, low, high, other_low, other_high;
  if (!(m.norm < 1e-12))
    each_vector(grad, [&](int64_t i) {
      widen(vector_of(grad, i), low, high);
      widen(vector_of(m.map, i), other_low, other_high);
      total += low * other_low + high * other_high;
    });
  const float along = static_cast<float>(sum(total));
  each_vector(grad, [&](int64_t i) {
    const VecF d = (vector_of(grad, i) - vector_of(m.map, i) * along) * inverse;
    put(grad, i, d + d * (vector_of(m.rows, i) + vector_of(m.columns, i)) * share);
    put(one, i, d * vector_of(m.g, i) * share);
  });
  transposed(one, two);  // `one` is the gradient of R + R^T; both together are that of R
  for (int64_t i = 0; i < one.side; ++i) {
    float *to = one.data + i * one.row, *mirrored = two.data + i * two.row;
    const float* share_of = m.rows.data + i * one.row;
    VecF part = {};
    for (int64_t j = 0; j < one.row; j += kLanes<float>) {
      const VecF d = load<float, float>(to + j) + load<float, float>(mirrored + j);
      store<float, float>(to + j, d);
      part += d * load<float, float>(share_of + j);
    }
    const float mean = static_cast<float>(lanes_sum(part));
    for (int64_t j = 0; j < one.row; j += kLanes<float>)
      store<float, float>(to + j, (load<float, float>(to + j) - mean) * load<float, float>(share_of + j));
  }
  transposed(one, two);
  each_vector(one, [&](int64_t i) { put(one, i, vector_of(one, i) + vector_of(two, i)); });
  product(one, m.g, two);
  each_vector(grad, [&](int64_t i) { put(grad, i, vector_of(grad, i) + vector_of(two, i)); });
}

// dx = 2 / C x dg, for each channel.
template <bool kStreaming, typename T>
static void sakd_gradient(const SakdSide& side, const T* x, const SakdMatrix& grad, float* to) {
  constexpr int64_t W = kLanes<float>;
  const int64_t positions = grad.side * grad.side, channels = side.channels;
  const float factor = 2 / static_cast<float>(channels);
  float* d = grad.data;
  for (int64_t i = 0; i < grad.side; ++i)
    for (int64_t j = 0; j < grad.side; ++j) d[i * grad.side + j] = d[i * grad.row + j] * factor;
  const auto put_vector = [](float* p, VecF v) { kStreaming ? stream<float, float>(p, v) : put(p, v); };
  if (side.planes) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t first = c * positions;
      int64_t p = 0;
      for (; p + W <= positions; p += W)
        put_vector(to + first + p, at(x + first + p, VecF{}) * at(d + p, VecF{}));
      for (; p < positions; ++p) put(to + first + p, at(x + first + p, float{}) * d[p]);
    }
  } else {
    for (int64_t p = 0; p < positions; ++p) {
      const int64_t first = p * channels;
      int64_t c = 0;
      for (; c + W <= channels; c += W) put_vector(to + first + c, at(x + first + c, VecF{}) * d[p]);
      for (; c < channels; ++c) put(to + first + c, at(x + first + c, float{}) * d[p]);
    }
  }
}

// f(the type of a side's numbers, where those of a sample begin).
template <typename F>
FASTKD_INLINE void with_sample(const SakdSide& side, int64_t numbers, int64_t sample, const F& f) {
  with_type<float>(side.dtype, [&](auto type) {
    f(static_cast<const decltype(type)*>(side.data) + sample * side.channels * numbers);
  });
}

static void sakd_samples(const SakdArgs& args, int64_t begin, int64_t end, void* scratch) {
  const int64_t row = sakd_row(args.side), numbers = args.side * row, positions = args.side * args.side;
  float* next = static_cast<float*>(scratch);
  const auto matrix = [&] {
    const SakdMatrix m = {next, args.side, row};
    next += numbers;
    return m;
  };
  const SakdSide* sides[2] = {&args.student, &args.teacher};
  SakdMap maps[2];
  for (SakdMap& m : maps) m = {matrix(), matrix(), matrix(), matrix(), 0};
  const SakdMatrix grad = matrix(), one = matrix(), two = matrix(), apart = matrix();
  for (int64_t n = begin; n < end; ++n) {
    for (int i = 0; i < 2; ++i) {
      with_sample(*sides[i], positions, n, [&](auto* x) { sakd_power_sums(*sides[i], x, maps[i].g); });
      attend(maps[i], one);
    }
    VecD total = {}, low, high;
    each_vector(apart, [&](int64_t i) {
      const VecF d = vector_of(maps[0].map, i) - vector_of(maps[1].map, i);
      put(apart, i, d);
      widen(d, low, high);
      total += low * low + high * high;
    });
    args.sums[n] = sum(total);
    for (int i = 0; i < 2; ++i) {
      const SakdSide& side = *sides[i];
      if (!side.grad) continue;
      const float slope = i ? -args.slope : args.slope;
      each_vector(grad, [&](int64_t j) { put(grad, j, vector_of(apart, j) * slope); });
      attend_back(maps[i], grad, one, two);
      with_sample(side, positions, n, [&](auto* x) {
        float* to = side.grad + n * side.channels * positions;
        side.streaming ? sakd_gradient<true>(side, x, grad, to) : sakd_gradient<false>(side, x, grad, to);
      });
    }
  }
  if (args.student.streaming || args.teacher.streaming) stream_end();
}

extern const SakdKernels sakd_kernels = {sakd_samples};
