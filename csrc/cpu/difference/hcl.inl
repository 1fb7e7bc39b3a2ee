// HCL: the squared difference of two maps and of their averages over 4 x 4, 2 x 2 and 1 x 1 parts.

// Scratch memory of one map: its differences, and a row of numbers in which its rows are summed, and which is
// later added to its rows. Where one row does not fill vectors, several count as one.
struct HclMap {
  int64_t height, width, folded;  // `folded` numbers, of one or more rows of a quarter of the map
  float *apart, *columns;

  FASTKD_INLINE HclMap of(const HclArgs& args, void* scratch) {
    const int64_t rows = args.height / 4;
    int64_t fold = 1;
    while (args.width * fold % kLanes<float> != 0 && rows % (2 * fold) == 0 && fold < 4) fold *= 2;
    if (args.width * fold % kLanes<float> != 0) fold = 1;
    float* apart = static_cast<float*>(scratch);
    return {args.height, args.width, args.width * fold, apart, apart + args.height * args.width};
  }
};

// f(i, V) over the numbers [0, count).
template <typename F>
FASTKD_INLINE void over(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) f(i, VecF{});
  for (; i < count; ++i) f(i, float{});
}

// Sums of the differences in the 4 x 4 parts of the map.
static void hcl_cells(const HclMap& map, double* cells) {
  const int64_t quarter = map.height / 4 * map.width, part = map.width / 4;
  for (int64_t band = 0; band < 4; ++band) {
    const float* apart = map.apart + band * quarter;
    over(map.folded, [&](int64_t i, auto zero) {
      for (int64_t row = i; row < quarter; row += map.folded) zero += at(apart + row, decltype(zero){});
      put(map.columns + i, zero);
    });
    for (int64_t i = 0; i < map.folded; i += part) {
      double total = 0;
      for (int64_t j = i; j < i + part; ++j) total += map.columns[j];
      cells[band * 4 + i % map.width / part] += total;
    }
  }
}

// What the coarser grids add to the sum of squares; leaves in the cells what they add to each difference
// there.
static double hcl_grids(const HclMap& map, double* cells) {
  const double numbers = static_cast<double>(map.height * map.width);
  double added[16] = {}, total = 0, factor = 1;
  for (int64_t side = 4; side >= 1; side /= 2) {
    if (side >= map.height) continue;
    factor /= 2;
    const int64_t step = 4 / side;
    for (int64_t part = 0; part < side * side; ++part) {
      const int64_t first = part / side * step * 4 + part % side * step;
      double whole = 0;
      for (int64_t y = 0; y < step; ++y)
        for (int64_t x = 0; x < step; ++x) whole += cells[first + 4 * y + x];
      const double mean = whole * static_cast<double>(side * side) / numbers;
      total += factor * whole * mean;
      for (int64_t y = 0; y < step; ++y)
        for (int64_t x = 0; x < step; ++x) added[first + 4 * y + x] += factor * mean;
    }
  }
  for (int64_t i = 0; i < 16; ++i) cells[i] = added[i];
  return total;
}

template <bool kStudent, bool kTeacher, typename T>
static double hcl_of(const HclMap& map, const Piece<T>& piece, float slope) {
  double cells[16] = {};
  const double squares = sum_over(map.height * map.width, [&](int64_t i, auto zero) {
    const auto apart = at(piece.s + i, zero) - at(piece.t + i, zero);
    put(map.apart + i, apart);
    return apart * apart;
  });
  hcl_cells(map, cells);
  const double total = squares + hcl_grids(map, cells);
  if constexpr (!kStudent && !kTeacher) return total;
  const int64_t quarter = map.height / 4 * map.width, part = map.width / 4;
  for (int64_t band = 0; band < 4; ++band) {
    for (int64_t i = 0; i < map.folded; i += part)
      for (int64_t j = i; j < i + part; ++j)
        map.columns[j] = static_cast<float>(cells[band * 4 + i % map.width / part]);
    for (int64_t row = band * quarter; row < (band + 1) * quarter; row += map.folded)
      over(map.folded, [&](int64_t i, auto zero) {
        const auto grad = slope * (at(map.apart + row + i, zero) + at(map.columns + i, zero));
        put_gradients<kStudent, kTeacher>(piece, row + i, grad);
      });
  }
  return total;
}

// The same for maps of any size and for channels that lie beside each other: a vector V has a lane a channel.
// Windows of the coarser grids are those of adaptive pooling, and overlap where a side cannot be divided.
template <bool kStudent, bool kTeacher, typename T, typename V>
static double hcl_lanes(const HclArgs& args, const Piece<T>& piece, void* scratch) {
  const int64_t height = args.height, width = args.width, step = args.channels;
  V *apart = static_cast<V*>(scratch), *added = apart + height * width;
  double total = 0;
  for (int64_t y = 0; y < height; ++y) {
    V squares = {};
    for (int64_t p = y * width; p < (y + 1) * width; ++p) {
      const V d = at(piece.s + p * step, V{}) - at(piece.t + p * step, V{});
      squares += d * d;
      apart[p] = d;
      added[p] = d;
    }
    total += lanes_sum(squares);
  }
  float factor = 1;
  for (int64_t side = 4; side >= 1; side /= 2) {
    if (side >= height) continue;
    factor /= 2;
    for (int64_t cell = 0; cell < side * side; ++cell) {
      const int64_t i = cell / side, j = cell % side;
      const int64_t top = i * height / side, bottom = ((i + 1) * height + side - 1) / side;
      const int64_t left = j * width / side, right = ((j + 1) * width + side - 1) / side;
      V whole = {};
      for (int64_t y = top; y < bottom; ++y)
        for (int64_t x = left; x < right; ++x) whole += apart[y * width + x];
      const float count = static_cast<float>((bottom - top) * (right - left));
      // how many positions a number of this grid stands for, which are those of its window unless they
      // overlap
      const float positions = static_cast<float>(height * width) / static_cast<float>(side * side);
      const V mean = whole * (1 / count), more = mean * (factor * positions / count);
      total += static_cast<double>(factor * positions) * lanes_sum(mean * mean);
      if constexpr (kStudent || kTeacher)
        for (int64_t y = top; y < bottom; ++y)
          for (int64_t x = left; x < right; ++x) added[y * width + x] += more;
    }
  }
  if constexpr (kStudent || kTeacher)
    for (int64_t p = 0; p < height * width; ++p)
      put_gradients<kStudent, kTeacher>(piece, p * step, args.of.slope * added[p]);
  return total;
}

// A piece's loss and gradients. Lanes are the positions of a map of one channel whose sides can be divided by
// 4, else channels.
template <bool kStudent, bool kTeacher, typename T>
static double hcl_piece(const HclArgs& args, Piece<T> piece, void* scratch) {
  constexpr int64_t W = kLanes<float>;
  if (args.channels == 1) {
    if (args.height % 4 == 0 && args.width % 4 == 0)
      return hcl_of<kStudent, kTeacher>(HclMap::of(args, scratch), piece, args.of.slope);
    return hcl_lanes<kStudent, kTeacher, T, float>(args, piece, scratch);
  }
  double total = 0;
  for (int64_t c = 0; c < args.channels;) {
    const int64_t lanes = c + W <= args.channels ? W : 1;
    total += lanes == W ? hcl_lanes<kStudent, kTeacher, T, VecF>(args, piece, scratch)
                        : hcl_lanes<kStudent, kTeacher, T, float>(args, piece, scratch);
    c += lanes;
    piece.s += lanes;
    piece.t += lanes;
    if constexpr (kStudent) piece.s_grad += lanes;
    if constexpr (kTeacher) piece.t_grad += lanes;
  }
  return total;
}

static void hcl(const HclArgs& args, int64_t begin, int64_t end, void* scratch) {
  with_wanted(args.of, [&](auto type, auto student, auto teacher) {
    for (int64_t index = begin; index < end; ++index)
      args.of.sums[index] = hcl_piece<decltype(student)::value, decltype(teacher)::value>(
          args, Piece<decltype(type)>::of(args.of, index), scratch);
  });
}
