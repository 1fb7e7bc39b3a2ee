// Contrastive distillation: scores of the drawn rows, their exponentials, the loss and its gradient in one
// pass over each row. A tile of the bank stays in the second-level cache while each image reads the rows that
// it drew there. Sums are in double, and their order depends on nothing but the shapes.

constexpr int64_t kLane = kLanes<float>;  // rows that are looked at together

// A vector's lanes: of `a` and `b` the sums of neighbouring runs of `unit` lanes, runs of a and b in turn.
template <int64_t unit>
FASTKD_INLINE VecF paired_sum(VecF a, VecF b) {
  IntF low;
  for (int32_t i = 0; i < kLane; ++i) {
    const int32_t size = static_cast<int32_t>(unit), within = i % (2 * size);
    low[i] = i - within + i % size + (within < size ? 0 : static_cast<int32_t>(kLane));
  }
  return FASTKD_SHUFFLE(a, b, low) + FASTKD_SHUFFLE(a, b, low + static_cast<int32_t>(unit));
}

// Lane i is the sum of the lanes of v[i].
template <int64_t unit>
FASTKD_INLINE VecF sums_of(const VecF* v) {
  if constexpr (unit == 1) {
    return paired_sum<1>(v[0], v[1]);
  } else {
    return paired_sum<unit>(sums_of<unit / 2>(v), sums_of<unit / 2>(v + unit));
  }
}

// Inner products of x with each of the rows, in a vector.
FASTKD_INLINE VecF products_with(const float* x, const float* const* rows, int64_t width) {
  constexpr int64_t kTogether = kLane < 8 ? kLane : 8;
  VecF sums[kLane];
  const int64_t whole = width / kLane * kLane;
  for (int64_t first = 0; first < kLane; first += kTogether) {
    VecF part[kTogether] = {};
    for (int64_t k = 0; k < whole; k += kLane) {
      const VecF number = load<float, float>(x + k);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kTogether; ++r) part[r] += number * load<float, float>(rows[first + r] + k);
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kTogether; ++r) sums[first + r] = part[r];
  }
  VecF result = sums_of<kLane / 2>(sums);
  for (int64_t k = whole; k < width; ++k)
    for (int64_t r = 0; r < kLane; ++r) result[r] += x[k] * rows[r][k];
  return result;
}

// Adds to N vectors of `grad` those of the rows, each by its slope.
template <int64_t N>
FASTKD_INLINE void add_rows(float* grad, const float* const* rows, const float* slopes, int64_t count,
                            int64_t k) {
  VecF sums[N];
#pragma GCC unroll 8
  for (int64_t i = 0; i < N; ++i) sums[i] = load<float, float>(grad + k + i * kLane);
  for (int64_t r = 0; r < count; ++r) {
    const float *row = rows[r] + k, slope = slopes[r];
#pragma GCC unroll 8
    for (int64_t i = 0; i < N; ++i) sums[i] += slope * load<float, float>(row + i * kLane);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < N; ++i) store<float, float>(grad + k + i * kLane, sums[i]);
}

FASTKD_INLINE void add_rows(float* grad, const float* const* rows, const float* slopes, int64_t count,
                            int64_t width, int64_t k) {
  for (; k + 8 * kLane <= width; k += 8 * kLane) add_rows<8>(grad, rows, slopes, count, k);
  for (; k + kLane <= width; k += kLane) add_rows<1>(grad, rows, slopes, count, k);
  for (; k < width; ++k)
    for (int64_t r = 0; r < count; ++r) grad[k] += slopes[r] * rows[r][k];
}

// What `count` drawn rows bring to an image, up to as many as a vector has lanes.
template <CrdMode kMode>
FASTKD_INLINE VecF drawn_rows(const CrdArgs& args, const float* x, const int32_t* order, int64_t count,
                              float* grad) {
  const float* rows[kLane];
  for (int64_t r = 0; r < kLane; ++r)
    rows[r] = args.bank + static_cast<int64_t>(order[r < count ? r : 0]) * args.width;
  const VecF odds = exponential(products_with(x, rows, args.width) * args.coldness);
  VecF result = odds;
  if constexpr (kMode != CrdMode::kOdds) {
    const VecF scaled = odds * args.inverse, shifted = scaled + args.shift;
    result = log_of_one_plus(shifted);
    if constexpr (kMode == CrdMode::kGradient) {
      float slopes[kLane];
      store<float, float>(slopes, scaled / (shifted + 1.0f));
      add_rows(grad, rows, slopes, count, args.width, 0);
    }
  }
  for (int64_t r = count; r < kLane; ++r) result[r] = 0;
  return result;
}

template <CrdMode kMode>
static double crd_tile(const CrdArgs& args, int64_t tile, float* grads) {
  VecD total = {}, low, high;
  for (int64_t image = 0; image < args.count; ++image) {
    const int32_t* order = args.order + image * args.drawn;
    const int32_t* starts = args.starts + image * (args.tiles + 1) + tile;
    const float* x = args.x + image * args.width;
    float* grad = kMode == CrdMode::kGradient ? grads + image * args.width : nullptr;
    const int64_t end = starts[1];
    for (int64_t at = starts[0]; at < end; at += kLane) {
      widen(drawn_rows<kMode>(args, x, order + at, min_of(end - at, kLane), grad), low, high);
      total += low + high;
    }
  }
  return sum(total);
}

template <CrdMode kMode>
static void crd_blocks(const CrdArgs& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float* grads = nullptr;
    if constexpr (kMode == CrdMode::kGradient) {
      const int64_t numbers = args.count * args.width;
      grads = args.grads + block * numbers;
      for (int64_t i = 0; i < numbers; ++i) grads[i] = 0;
    }
    double total = 0;
    for (int64_t tile = block * args.tiles / args.blocks; tile < (block + 1) * args.tiles / args.blocks;
         ++tile)
      total += crd_tile<kMode>(args, tile, grads);
    args.sums[block] = total;
  }
}

static void crd_blocks(const CrdArgs& args, int64_t begin, int64_t end) {
  switch (args.mode) {
    case CrdMode::kOdds:
      return crd_blocks<CrdMode::kOdds>(args, begin, end);
    case CrdMode::kLoss:
      return crd_blocks<CrdMode::kLoss>(args, begin, end);
    case CrdMode::kGradient:
      return crd_blocks<CrdMode::kGradient>(args, begin, end);
  }
}

extern const CrdKernels crd_kernels = {crd_blocks};
