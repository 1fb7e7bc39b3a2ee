// Contrastive distillation: scores of the drawn rows, their exponentials, the loss and its gradient in one
// pass over the bank. A tile of the bank stays in a cache while each image reads the rows that it drew there:
// once for its scores, once for its gradient. The scores of several images in turn fill a buffer, so that
// vectors of exponentials and logarithms are full. Sums are in double, and their order depends on nothing but
// the shapes and the drawn rows.

constexpr int64_t kLane = kLanes<float>;              // rows whose scores are one vector
constexpr int64_t kTogether = kLane < 8 ? kLane : 8;  // rows that are read side by side
constexpr int64_t kScores = 512;                      // that a buffer holds
constexpr int64_t kRuns = 64;                         // likewise

// Drawn rows of an image whose scores follow each other in the buffer.
struct CrdRun {
  int64_t image, count;
  const float* rows;  // the tile
  const uint16_t* order;
};

// Adds neighbouring runs of `unit` lanes. The result holds a sum of a's runs and one of b's in turn.
template <int64_t unit>
FASTKD_INLINE VecF paired_sum(VecF a, VecF b) {
  IntF mine, other;
  for (int32_t i = 0; i < kLane; ++i) {
    const int32_t size = static_cast<int32_t>(unit);
    const bool first = i % (2 * size) < size;
    mine[i] = first ? -1 : 0;
    other[i] = first ? i + size : i - size + static_cast<int32_t>(kLane);
  }
  return (mine ? a : b) + FASTKD_SHUFFLE(a, b, other);
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

// Inner products of x with `count` drawn rows, at most kTogether, in the first lanes.
FASTKD_INLINE VecF products_with(const float* x, const float* tile, const uint16_t* order, int64_t count,
                                 int64_t width) {
  const int64_t whole = width / kLane * kLane, last = count - 1;
  const float* rows[kTogether];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kTogether; ++r)
    rows[r] = tile + static_cast<int64_t>(order[r < last ? r : last]) * width;
  VecF part[kTogether] = {};
  for (int64_t k = 0; k < whole; k += kLane) {
    const VecF number = load<float, float>(x + k);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kTogether; ++r) part[r] += number * load<float, float>(rows[r] + k);
  }
  VecF result = sums_of<kTogether / 2>(part);
  if constexpr (kTogether < kLane) result = paired_sum<kTogether>(result, result);
  for (int64_t k = whole; k < width; ++k)
    for (int64_t r = 0; r < kTogether; ++r) result[r] += x[k] * rows[r][k];
  return result;
}

// Adds to N vectors of `grad` those of a run's rows, each by its slope.
template <int64_t N>
FASTKD_INLINE void add_rows(const CrdRun& run, const float* slopes, float* grad, int64_t width, int64_t k) {
  VecF sums[N];
#pragma GCC unroll 8
  for (int64_t i = 0; i < N; ++i) sums[i] = load<float, float>(grad + k + i * kLane);
  for (int64_t r = 0; r < run.count; ++r) {
    const float *row = run.rows + static_cast<int64_t>(run.order[r]) * width + k, slope = slopes[r];
#pragma GCC unroll 8
    for (int64_t i = 0; i < N; ++i) sums[i] += slope * load<float, float>(row + i * kLane);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < N; ++i) store<float, float>(grad + k + i * kLane, sums[i]);
}

static void add_run(const CrdRun& run, const float* slopes, float* grad, int64_t width) {
  int64_t k = 0;
  for (; k + 8 * kLane <= width; k += 8 * kLane) add_rows<8>(run, slopes, grad, width, k);
  for (; k + kLane <= width; k += kLane) add_rows<1>(run, slopes, grad, width, k);
  for (; k < width; ++k)
    for (int64_t r = 0; r < run.count; ++r)
      grad[k] += slopes[r] * run.rows[static_cast<int64_t>(run.order[r]) * width + k];
}

// The first `count` lanes; 0 in the others.
FASTKD_INLINE VecF first_lanes(VecF v, int64_t count) {
  for (int64_t r = count; r < kLane; ++r) v[r] = 0;
  return v;
}

// Scores of several runs, and what is made of them when there are enough.
template <CrdMode kMode>
struct CrdBuffer {
  const CrdArgs& args;
  float* grads;
  VecD total;
  int64_t runs, filled;
  CrdRun run[kRuns];
  float scores[kScores + kLane];

  void add(int64_t image, const float* tile, const uint16_t* order, int64_t count) {
    while (count > 0) {
      if (filled == kScores || runs == kRuns) flush();
      const int64_t fits = min_of(count, kScores - filled);
      const float* x = args.x + image * args.width;
      for (int64_t r = 0; r < fits; r += kTogether)
        store<float, float>(scores + filled + r,
                            products_with(x, tile, order + r, min_of(fits - r, kTogether), args.width));
      run[runs++] = {image, fits, tile, order};
      filled += fits;
      order += fits;
      count -= fits;
    }
  }

  void flush() {
    VecD low, high;
    for (int64_t i = 0; i < filled; i += kLane) {
      const VecF odds = exponential(load<float, float>(scores + i) * args.coldness);
      VecF result = odds;
      if constexpr (kMode != CrdMode::kOdds) {
        const VecF scaled = odds * args.inverse, shifted = scaled + args.shift,
                   inverse = 1.0f / (shifted + 1.0f);
        result = log_of_one_plus(shifted, inverse);
        if constexpr (kMode == CrdMode::kGradient) store<float, float>(scores + i, scaled * inverse);
      }
      if (filled - i < kLane) result = first_lanes(result, filled - i);
      widen(result, low, high);
      total += low + high;
    }
    if constexpr (kMode == CrdMode::kGradient) {
      const float* slopes = scores;
      for (int64_t i = 0; i < runs; slopes += run[i++].count)
        add_run(run[i], slopes, grads + run[i].image * args.width, args.width);
    }
    runs = filled = 0;
  }
};

// Asks for a share of a tile that will be read next.
FASTKD_INLINE void fetch_tile(const CrdArgs& args, int64_t tile, int64_t image) {
  const int64_t bytes = args.tile_rows * args.width * 4, first = tile * bytes;
  const int64_t most = args.size * args.width * 4 - first, end = bytes < most ? bytes : most;
  const int64_t share = ((end + 63) / 64 + args.count - 1) / args.count * 64;
  const char* from = reinterpret_cast<const char*>(args.bank) + first;
  for (int64_t i = image * share; i < min_of(end, (image + 1) * share); i += 64)
    __builtin_prefetch(from + i, 0, 2);
}

template <CrdMode kMode>
static double crd_tiles(const CrdArgs& args, int64_t begin, int64_t end, float* grads) {
  CrdBuffer<kMode> buffer = {args, grads, {}, 0, 0, {}, {}};
  for (int64_t index = begin; index < end; ++index) {
    const float* tile = args.bank + index * args.tile_rows * args.width;
    for (int64_t image = 0; image < args.count; ++image) {
      if (args.dense && index + 1 < end) fetch_tile(args, index + 1, image);
      const int32_t* starts = args.starts + image * (args.tiles + 1) + index;
      const uint16_t* order = args.order + image * args.drawn + starts[0];
      buffer.add(image, tile, order, starts[1] - starts[0]);
    }
    buffer.flush();
  }
  return sum(buffer.total);
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
    args.sums[block] = crd_tiles<kMode>(args, block * args.tiles / args.blocks,
                                        (block + 1) * args.tiles / args.blocks, grads);
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
