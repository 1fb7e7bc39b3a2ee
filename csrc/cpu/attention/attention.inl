// Attention maps and the attention-transfer loss, one (sample, stage) unit after the other; a unit's student
// and teacher are handled together, while they are in the cache. Needs the files that kernels.cpp
// includes before it. Sums over positions are taken in double, in the order of the positions.

// One side's map before normalization and what normalizes it: nothing, for a map that comes normalized.
template <typename A>
static PowerSums side_map(const AttentionSide& side, bool is_map, const AttentionLossArgs& args, int64_t n,
                          Bump& bump, Norm& norm) {
  const int64_t count = side.pool.out_positions;
  PowerSums e;
  if (is_map) {
    norm = {0, 1, 1, 1, 0, false};
    e.map = e.full = take<double>(bump, count);
    load_planes(side.x, n, 0, 1, e.map);
    pad(e.map, count);
  } else {
    e = make_power_sums<A>(side, args.pool_before, args.options, n, bump);
    norm = norm_of(e.map, count, side, args.options);
  }
  return e;
}

template <typename A>
static double loss_unit(const AttentionLossArgs& args, const AttentionStage& stage, int64_t n, Bump bump) {
  const AttentionOptions& options = args.options;
  const bool before = args.pool_before;
  const int64_t count = stage.student.pool.out_positions;

  // The student comes last: its gradient begins with what was read last, which is still in the cache.
  Norm s_norm, t_norm;
  const PowerSums t = side_map<A>(stage.teacher, args.teacher_is_map, args, n, bump, t_norm);
  const PowerSums s = side_map<A>(stage.student, args.student_is_map, args, n, bump, s_norm);

  // Maps become y in place; the difference stays for the coefficients.
  double* difference = take<double>(bump, count);
  VecD squares = {}, along_s = {}, along_t = {};
  for (int64_t i = 0; i < count; i += kStep) {
    const VecD y_s = normalized<A>(s.map + i, s_norm);
    const VecD y_t = normalized<A>(t.map + i, t_norm);
    const VecD d = y_s - y_t;
    store<double, double>(s.map + i, y_s);
    store<double, double>(t.map + i, y_t);
    store<double, double>(difference + i, d);
    squares += d * d;
    along_s += d * y_s;
    along_t += d * y_t;
  }
  double distance = sum(squares);
  double slope = 2 * stage.factor;
  if (args.l2) {
    distance = sqrt(distance);
    slope = distance == 0 ? 0 : stage.factor / distance;
  }
  if (stage.student.coefficients != nullptr) {
    const double factor = args.student_is_map ? slope : slope * options.p / reduction(stage.student, options);
    write_coefficients<A>(stage.student, before, difference, s.map, sum(along_s), s_norm, factor, s.full, n,
                          bump);
  }
  if (stage.teacher.coefficients != nullptr) {
    const double factor =
        args.teacher_is_map ? -slope : -slope * options.p / reduction(stage.teacher, options);
    write_coefficients<A>(stage.teacher, before, difference, t.map, sum(along_t), t_norm, factor, t.full, n,
                          bump);
  }
  if (stage.gradient.data != nullptr) write_gradient<A>(args, stage, n, bump);
  return distance;
}

template <typename A>
static void loss_units(const AttentionLossArgs& args, int64_t begin, int64_t end, void* scratch) {
  for (int64_t u = begin; u < end; ++u) {
    const int64_t n = u / args.stage_count;
    const int64_t i = u % args.stage_count;
    const AttentionStage& stage = args.stages[i];
    args.partial[i * stage.student.x.batch + n] =
        loss_unit<A>(args, stage, n, Bump{static_cast<char*>(scratch)});
  }
  stream_end();
}

template <typename A>
static void map_units(const AttentionMapArgs& args, int64_t begin, int64_t end, void* scratch) {
  const int64_t count = args.side.x.positions;
  for (int64_t n = begin; n < end; ++n) {
    Bump bump{static_cast<char*>(scratch)};
    const PowerSums e = make_power_sums<A>(args.side, false, args.options, n, bump);
    Norm norm = {0, reduction(args.side, args.options), 1 / reduction(args.side, args.options), 1, 0, false};
    if (args.normalize) {
      norm = norm_of(e.map, count, args.side, args.options);
      static_cast<A*>(args.norm)[n] = static_cast<A>(norm.norm);
    }
    write_normalized(e.map, count, norm, static_cast<A*>(args.map) + n * count);
  }
}

// The coefficients of one sample, in scratch memory: dx = coefficient * h(x) is what the map's gradient makes
// of x.
template <typename A>
static const A* map_coefficients(const AttentionMapBackwardArgs& args, int64_t n, Bump& bump) {
  const int64_t count = args.side.x.positions;
  A* g = take<A>(bump, count);
  A* y = take<A>(bump, count);
  load_planes(args.grad, n, 0, 1, g);
  pad(g, count);
  Norm norm = {0, 1, 1, 1, 0, false};
  VecD dot = {};
  if (args.normalize) {
    load_planes(args.map, n, 0, 1, y);
    pad(y, count);
    norm = norm_for(static_cast<const A*>(args.norm.data)[n * args.norm.stride_n], args.side, args.options);
    for (int64_t i = 0; i < count; i += kStep) dot += load<A, double>(g + i) * load<A, double>(y + i);
  }
  normalize_backward(g, y, sum(dot), count, norm, args.options.p / reduction(args.side, args.options), g);
  return g;
}

template <typename A>
static void map_backward_units(const AttentionMapBackwardArgs& args, int64_t begin, int64_t end,
                               void* scratch) {
  for (int64_t n = begin; n < end; ++n) {
    Bump bump{static_cast<char*>(scratch)};
    const A* coefficient = map_coefficients<A>(args, n, bump);
    with_power<A>(args.options, [&](const auto& power) {
      gradient_of<A>(args.side, args.dx, n, coefficient, args.streaming, bump, power);
    });
  }
  stream_end();
}

template <typename A>
static void loss_backward_units(const AttentionLossBackwardArgs& args, int64_t begin, int64_t end,
                                void* scratch) {
  for (int64_t u = begin; u < end; ++u) {
    const int64_t n = u / args.item_count;
    const AttentionGradient& item = args.items[u % args.item_count];
    Bump bump{static_cast<char*>(scratch)};
    const int64_t count = item.coefficients.positions;
    const A* coefficient = static_cast<const A*>(item.coefficients.data) + n * item.coefficients.stride_n;
    if (item.coefficients.layout != Layout::kPlanes) {
      A* gathered = take<A>(bump, count);
      load_planes(item.coefficients, n, 0, 1, gathered);
      coefficient = gathered;
    }
    coefficient = scaled_by(args.grad, coefficient, count, bump);
    if (item.is_map) {
      store_planes(coefficient, item.dx, n, 0, 1);
    } else {
      with_power<A>(args.options, [&](const auto& power) {
        gradient_of<A>(item.side, item.dx, n, coefficient, item.streaming, bump, power);
      });
    }
  }
  stream_end();
}

static void attention_map(const AttentionMapArgs& args, int64_t begin, int64_t end, void* scratch) {
  args.accumulation == DType::kDouble ? map_units<double>(args, begin, end, scratch)
                                      : map_units<float>(args, begin, end, scratch);
}
static void attention_map_backward(const AttentionMapBackwardArgs& args, int64_t begin, int64_t end,
                                   void* scratch) {
  args.accumulation == DType::kDouble ? map_backward_units<double>(args, begin, end, scratch)
                                      : map_backward_units<float>(args, begin, end, scratch);
}
static void attention_loss(const AttentionLossArgs& args, int64_t begin, int64_t end, void* scratch) {
  args.accumulation == DType::kDouble ? loss_units<double>(args, begin, end, scratch)
                                      : loss_units<float>(args, begin, end, scratch);
}
static void attention_loss_backward(const AttentionLossBackwardArgs& args, int64_t begin, int64_t end,
                                    void* scratch) {
  args.accumulation == DType::kDouble ? loss_backward_units<double>(args, begin, end, scratch)
                                      : loss_backward_units<float>(args, begin, end, scratch);
}

extern const AttentionKernels attention_kernels = {attention_map, attention_map_backward, attention_loss,
                                                   attention_loss_backward};
