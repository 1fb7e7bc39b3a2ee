// What a loss makes of sums of products: their division by the number of positions, the squares or the norms
// of columns of the difference of two matrices, and the gradient of that difference. Needs vec.inl.

// c = c / positions, less other / other_positions if there is one.
template <typename A>
static void divide(A* c, int64_t count, A positions, const A* other, A other_positions) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    Vec<A> x = load<A, A>(c + i) / positions;
    if (other) x -= load<A, A>(other + i) / other_positions;
    store<A, A>(c + i, x);
  }
  for (; i < count; ++i) c[i] = c[i] / positions - (other ? other[i] / other_positions : A(0));
}

// The sum of the squares of c / positions, less other / other_positions if there is one; c becomes slope
// times that.
template <typename A>
static double squares(A* c, int64_t count, A positions, const A* other, A other_positions, A slope) {
  constexpr int64_t W = kLanes<A>, D = kLanes<double>;
  VecD total[W / D] = {};
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    Vec<A> x = load<A, A>(c + i) / positions;
    if (other) x -= load<A, A>(other + i) / other_positions;
    store<A, A>(c + i, x);
#pragma GCC unroll 2
    for (int64_t v = 0; v < W / D; ++v) {
      const VecD d = load<A, double>(c + i + v * D);
      total[v] += d * d;
    }
    store<A, A>(c + i, x * slope);
  }
  double rest = 0;
  for (; i < count; ++i) {
    const A x = c[i] / positions - (other ? other[i] / other_positions : A(0));
    rest += static_cast<double>(x) * static_cast<double>(x);
    c[i] = x * slope;
  }
  for (int64_t v = 0; v < W / D; ++v) rest += sum(total[v]);
  return rest;
}

// The sum of the norms of d's columns; d becomes slope * d / norm of its column, and 0 where the norm is 0.
template <typename A>
static double column_norms(A* d, int64_t rows, int64_t columns, A slope, bool gradient, double* norms) {
  for (int64_t j = 0; j < columns; ++j) norms[j] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j)
      norms[j] += static_cast<double>(d[i * columns + j]) * static_cast<double>(d[i * columns + j]);
  }
  double total = 0;
  for (int64_t j = 0; j < columns; ++j) total += norms[j] = __builtin_sqrt(norms[j]);
  for (int64_t i = 0; gradient && i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      A& x = d[i * columns + j];
      x = norms[j] == 0 ? A(0) : slope * (x / static_cast<A>(norms[j]));
    }
  }
  return total;
}
