#include "cuda/attention/matrix_view.cuh"

namespace fastkd {
namespace {

// By calculation, for an H200: 132 multiprocessors take three or four such blocks each at once, so six for
// each make up to two waves, of which the second hides the end of the first. More blocks would be smaller,
// and each takes about 2 us in which it loads nothing: to begin, to add up and for its ticket. A block should
// read at least 16 KiB, all that its threads have on their way at once, and at most 128 KiB, so that many
// waves leave a short tail.
constexpr int64_t kGoalBlocks = 132 * 6;
constexpr int64_t kLeast = 16 << 10, kMost = 128 << 10;

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

// Whether packs begin at multiples of 16 bytes: `between` is the stride from row to row.
bool is_aligned(const Feature& x, int64_t pack, int64_t rows, int64_t between) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.batch == 1 || x.stride_n % pack == 0) &&
         (rows == 1 || between % pack == 0);
}

// One sum for each chunk of rows, and channel of a folded row. By rows there is but one.
int32_t parts_of(const MatrixView& w) {
  return w.by_rows ? 1 : w.units / w.tiles * (columns_of_sums(w) / positions_of(w));
}

void cut_by_rows(MatrixView& w, int64_t row_bytes, int64_t goal) {
  w.by_rows = 1;
  w.across = 1;
  while (w.across < kWarp && w.across * w.width < w.columns) w.across = static_cast<int16_t>(2 * w.across);
  w.groups = static_cast<int16_t>(kThreads / w.across);
  const int64_t pass = stride_of(w, kUnroll).rows;
  int64_t rows = quotient_up(goal / row_bytes, pass) * pass;
  rows = rows < pass ? pass : rows < kTile ? rows : kTile;
  const int64_t chunks = quotient_up(w.rows, rows);
  w.chunk = static_cast<int32_t>(quotient_up(w.rows, chunks));
  w.tiles = 1;
  w.units = static_cast<int32_t>(chunks);
}

void cut_by_columns(MatrixView& w, int64_t pack_bytes, int64_t goal) {
  const int64_t packs = w.columns / w.width;
  // A map of up to 64 packs is not cut: its rows then follow each other without a gap. Else at least half a
  // KiB in a row, even numbers of packs (32 bytes are what memory gives), and tiles of about equal size.
  int64_t across = packs;
  if (packs > 64) {
    int64_t wanted = 32;
    while (wanted < kThreads && 2 * wanted * pack_bytes * w.rows <= goal) wanted *= 2;
    across = quotient_up(quotient_up(packs, quotient_up(packs, wanted)), 2) * 2;
  }
  const int64_t tiles = quotient_up(packs, across);
  const int64_t pass = kUnroll * (kThreads / across);
  int64_t rows = quotient_up(goal / (across * pack_bytes), pass) * pass;
  rows = rows < pass ? pass : rows;
  const int64_t chunks = quotient_up(w.rows, rows);
  w.by_rows = 0;
  w.across = static_cast<int16_t>(across);
  w.groups = static_cast<int16_t>(kThreads / across);
  w.chunk = static_cast<int32_t>(quotient_up(w.rows, chunks));
  w.tiles = static_cast<int32_t>(tiles);
  w.units = static_cast<int32_t>(tiles * chunks);
}

}  // namespace

void check_served(const AttentionOptions& options) {
  STD_TORCH_CHECK(options.p == 2, "the CUDA kernels serve p = 2, got ", options.p);
}

int64_t bytes_of(const Feature& x) { return x.batch * x.channels * x.positions * size_of(x.dtype); }

int64_t unit_goal(int64_t bytes) {
  const int64_t goal = bytes / kGoalBlocks;
  return goal < kLeast ? kLeast : goal < kMost ? goal : kMost;
}

MatrixView matrix_view_of(const Feature* const* tensors, int count, int64_t goal) {
  const Feature& x = *tensors[0];
  const int64_t size = size_of(x.dtype), pack = 16 / size;
  const int64_t fold = pack / common_divisor(x.positions, pack);
  bool last = true, last_packed = x.channels % pack == 0, packed = true;
  for (int i = 0; i < count; ++i) {
    const Feature& t = *tensors[i];
    last = last && t.layout == Layout::kChannelsLast;
    last_packed = last_packed && last && is_aligned(t, pack, t.positions, t.stride_s);
    packed = packed && t.layout == Layout::kPlanes &&
             (fold == 1 ? is_aligned(t, pack, t.channels, t.stride_c)
                        : t.stride_c == t.positions && is_aligned(t, pack, 1, 0));
  }
  check_count(x.channels);
  check_count(x.positions);
  check_count(fold * x.positions);
  MatrixView w{};
  w.dtype = x.dtype;
  w.size[0] = static_cast<int32_t>(x.size[1]);
  w.size[1] = static_cast<int32_t>(x.size[2]);
  if (last) {
    w.width = static_cast<int8_t>(last_packed ? pack : 1);
    w.rows = static_cast<int32_t>(x.positions);
    w.columns = static_cast<int32_t>(x.channels);
    cut_by_rows(w, x.channels * size, goal);
    w.parts = parts_of(w);
    return w;
  }
  // the shape alone decides on the order of sums
  const bool packs = x.channels % fold == 0;
  while (packs && 1 << w.fold_bits < fold) ++w.fold_bits;
  w.width = static_cast<int8_t>(packs ? pack : 1);
  w.rows = static_cast<int32_t>(x.channels >> w.fold_bits);
  w.columns = static_cast<int32_t>(x.positions << w.fold_bits);
  cut_by_columns(w, w.width * size, goal);
  if (packs && !packed) {
    w.across = static_cast<int16_t>(w.across * pack);
    w.width = 1;
  }
  w.parts = parts_of(w);
  return w;
}

MatrixView matrix_view_of_map(const Feature& map) {
  Feature numbers = map;
  numbers.layout = Layout::kGeneric;
  return matrix_view_of(numbers, kLeast);
}

Place place_of(const Feature& x, const MatrixView& w) {
  return {x.data, x.stride_n, w.by_rows ? x.stride_s : x.stride_c, {x.stride[0], x.stride[1], x.stride[2]}};
}

}  // namespace fastkd
