#include "tiles.h"

#include <limits>
#include <numeric>
#include <utility>

#include "principal_axes.h"

namespace spatialprobe {
namespace {

constexpr double kUnit = 5.97e-8;    // 2^-24, rounded up: the relative error of one float32 operation
constexpr int kDotFormDims = 16;     // from here half the operations outweigh the cancellation
constexpr Index kSample = 1024;      // rows that the axes are estimated from; any orthonormal axes are correct
constexpr int kAxisCandidates = 64;  // coordinates of largest variance among which axes are sought, if there are more
constexpr float kPadding = 3e18f;    // its square is beyond kFar and finite

// Centre and radius of the rows that take part.
struct Extent {
  std::vector<double> mean;
  double radius;
};

Extent measure(const Embeddings& embeddings, const std::vector<Index>& rows) {
  const int dims = embeddings.dims;
  Extent extent{std::vector<double>(dims, 0.0), 0.0};
  std::vector<double> x(dims);
  const std::size_t step = std::max<std::size_t>(1, rows.size() / kSample);
  std::size_t taken = 0;
  for (std::size_t i = 0; i < rows.size(); i += step, ++taken) {
    embeddings.read(rows[i], x.data());
    for (int d = 0; d < dims; ++d) extent.mean[d] += x[d];
  }
  for (double& value : extent.mean) value /= static_cast<double>(taken);
  double largest = 0.0;
  for (Index row : rows) {
    embeddings.read(row, x.data());
    double squared = 0.0;
    for (int d = 0; d < dims; ++d) squared += (x[d] - extent.mean[d]) * (x[d] - extent.mean[d]);
    largest = std::max(largest, squared);
  }
  extent.radius = std::sqrt(largest);
  return extent;
}

FloatBounds float_bounds(double radius, int dims, int box_dims, bool dot_form) {
  FloatBounds bounds;
  bounds.scale = radius > 0.0 ? 1.0 / radius : 1.0;
  bounds.rounding = 3.0 * kUnit;
  if (dot_form) {
    bounds.absolute = 4.5 * (dims + 6) * kUnit;  // every partial sum of |a|^2/2 + |b|^2/2 - a.b is below 4
  } else {
    bounds.relative = 2.0 * (dims + 4) * kUnit;
  }
  bounds.projection = box_dims == dims ? bounds.rounding : 6.0 * (dims + 8) * kUnit;
  return bounds;
}

// Orthonormal axes [dims, kMaxBoxDims] along which the points spread most, from a sample.
std::vector<float> box_axes(const Embeddings& embeddings, const std::vector<Index>& rows, const Extent& extent) {
  const int dims = embeddings.dims;
  const std::size_t step = std::max<std::size_t>(1, rows.size() / kSample);
  std::vector<double> x(dims), variance(dims, 0.0);
  std::vector<float> sample;
  std::size_t taken = 0;
  for (std::size_t i = 0; i < rows.size(); i += step, ++taken) {
    embeddings.read(rows[i], x.data());
    for (int d = 0; d < dims; ++d) {
      const double centred = (x[d] - extent.mean[d]) / std::max(extent.radius, 1e-300);
      variance[d] += centred * centred;
      sample.push_back(static_cast<float>(centred));
    }
  }
  std::vector<int> candidates(dims);
  std::iota(candidates.begin(), candidates.end(), 0);
  std::stable_sort(candidates.begin(), candidates.end(), [&](int a, int b) { return variance[a] > variance[b]; });
  candidates.resize(std::min(dims, kAxisCandidates));
  const int size = static_cast<int>(candidates.size());

  std::vector<float> covariance(static_cast<std::size_t>(size) * size, 0.0f), y(size);
  for (std::size_t i = 0; i < taken; ++i) {
    for (int a = 0; a < size; ++a) y[a] = sample[i * dims + candidates[a]];
    for (int a = 0; a < size; ++a)
      for (int b = 0; b < size; ++b) covariance[a * size + b] += y[a] * y[b];
  }
  const std::vector<double> vectors =
      eigenvectors_by_value(std::vector<double>(covariance.begin(), covariance.end()), size, 1e-4);
  std::vector<float> axes(static_cast<std::size_t>(dims) * kMaxBoxDims, 0.0f);
  for (int k = 0; k < kMaxBoxDims; ++k)
    for (int a = 0; a < size; ++a) axes[candidates[a] * kMaxBoxDims + k] = static_cast<float>(vectors[k * size + a]);
  return axes;
}

// Where each row that takes part lies in the box dimensions, [rows, box_dims], stored units.
std::vector<float> project(const Embeddings& embeddings, const std::vector<Index>& rows, const Extent& extent,
                           int box_dims, double scale, ThreadPool& pool) {
  const int dims = embeddings.dims;
  std::vector<float> projected(rows.size() * box_dims);
  const bool as_is = box_dims == dims;
  const std::vector<float> axes = as_is ? std::vector<float>() : box_axes(embeddings, rows, extent);
  pool.for_chunks(static_cast<std::int64_t>(rows.size()), [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<double> x(dims);
    for (std::int64_t i = begin; i < end; ++i) {
      embeddings.read(rows[i], x.data());
      float* out = &projected[i * box_dims];
      if (as_is) {
        for (int d = 0; d < dims; ++d) out[d] = static_cast<float>((x[d] - extent.mean[d]) * scale);
        continue;
      }
      float sum[kMaxBoxDims] = {};
      for (int d = 0; d < dims; ++d) {
        const float centred = static_cast<float>((x[d] - extent.mean[d]) * scale);
        for (int k = 0; k < kMaxBoxDims; ++k) sum[k] += centred * axes[d * kMaxBoxDims + k];
      }
      std::copy(sum, sum + kMaxBoxDims, out);
    }
  });
  return projected;
}

// The box dimension in which a run of points spreads most (of at most about 1,000 of them).
int widest_dim(const Index* order, Index count, const std::vector<float>& projected, int box_dims) {
  float sum[kMaxBoxDims] = {}, squares[kMaxBoxDims] = {};
  const Index step = count > 4096 ? count / 1024 : 1;
  Index taken = 0;
  for (Index i = 0; i < count; i += step, ++taken) {
    const float* x = &projected[static_cast<std::size_t>(order[i]) * box_dims];
    for (int d = 0; d < box_dims; ++d) {
      sum[d] += x[d];
      squares[d] += x[d] * x[d];
    }
  }
  int widest = 0;
  float most = -1.0f;
  for (int d = 0; d < box_dims; ++d) {
    const float spread = squares[d] - sum[d] * sum[d] / static_cast<float>(taken);
    if (spread > most) {
      most = spread;
      widest = d;
    }
  }
  return widest;
}

// Halves a run of points at a multiple of the tile along its widest dimension; returns where.
Index halve(Index* order, Index count, const std::vector<float>& projected, int box_dims) {
  const int dim = widest_dim(order, count, projected, box_dims);
  const Index tiles = (count + kTile - 1) / kTile;
  const Index left = tiles / 2 * kTile;
  std::vector<std::pair<float, Index>> keyed(count);
  for (Index i = 0; i < count; ++i)
    keyed[i] = {projected[static_cast<std::size_t>(order[i]) * box_dims + dim], order[i]};
  std::nth_element(keyed.begin(), keyed.begin() + left, keyed.end());
  for (Index i = 0; i < count; ++i) order[i] = keyed[i].second;
  return left;
}

void split_to_tiles(Index* order, Index count, const std::vector<float>& projected, int box_dims) {
  while (count > kTile) {
    const Index left = halve(order, count, projected, box_dims);
    split_to_tiles(order + left, count - left, projected, box_dims);
    count = left;
  }
}

// The same order for any number of threads: threads take whole subtrees below the first three levels.
void order_by_halving(std::vector<Index>& order, const std::vector<float>& projected, int box_dims, ThreadPool& pool) {
  std::vector<std::pair<Index, Index>> runs = {{0, static_cast<Index>(order.size())}};  // begin, count
  for (int level = 0; level < 3 && pool.threads() > 1; ++level) {
    std::vector<Index> lefts(runs.size(), 0);
    pool.for_each(static_cast<std::int64_t>(runs.size()), [&](std::int64_t i, int) {
      if (runs[i].second > kTile) lefts[i] = halve(&order[runs[i].first], runs[i].second, projected, box_dims);
    });
    std::vector<std::pair<Index, Index>> next;
    for (std::size_t i = 0; i < runs.size(); ++i) {
      if (lefts[i] > 0) next.emplace_back(runs[i].first, lefts[i]);
      next.emplace_back(runs[i].first + lefts[i], runs[i].second - lefts[i]);
    }
    runs = std::move(next);
  }
  pool.for_each(static_cast<std::int64_t>(runs.size()), [&](std::int64_t i, int) {
    split_to_tiles(&order[runs[i].first], runs[i].second, projected, box_dims);
  });
}

double squared_norm(const float* x, int dims) {
  double sum[4] = {0.0, 0.0, 0.0, 0.0};
  int d = 0;
  for (; d + 4 <= dims; d += 4)
    for (int k = 0; k < 4; ++k) sum[k] += static_cast<double>(x[d + k]) * x[d + k];
  for (; d < dims; ++d) sum[0] += static_cast<double>(x[d]) * x[d];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

void fill_columns(Tiles& tiles, int t, const Embeddings& embeddings, const Extent& extent) {
  const int dims = tiles.dims;
  const double scale = tiles.bounds.scale * (tiles.dot_form ? std::sqrt(2.0) : 1.0);
  float* columns = &tiles.columns[static_cast<std::size_t>(t) * tiles.tile_floats];
  std::fill(columns, columns + tiles.tile_floats, tiles.dot_form ? 0.0f : kPadding);
  if (tiles.dot_form) std::fill(columns + dims * kTile, columns + (dims + 1) * kTile, 2.0f * kFar);
  std::vector<float> stored(dims);
  std::vector<double> x(dims);
  for (Index p = tiles.begin(t); p < tiles.end(t); ++p) {
    const int lane = static_cast<int>(p - tiles.begin(t));
    embeddings.prefetch(tiles.row[std::min(p + 4, tiles.points - 1)]);  // rows lie anywhere
    embeddings.read(tiles.row[p], x.data());
    if (tiles.exact_double.empty()) {
      std::transform(x.begin(), x.end(), &tiles.exact_single[static_cast<std::size_t>(p) * dims],
                     [](double value) { return static_cast<float>(value); });
    } else {
      std::copy(x.begin(), x.end(), &tiles.exact_double[static_cast<std::size_t>(p) * dims]);
    }
    for (int d = 0; d < dims; ++d) stored[d] = static_cast<float>((x[d] - extent.mean[d]) * scale);
    for (int d = 0; d < dims; ++d) columns[d * kTile + lane] = stored[d];
    if (tiles.dot_form) columns[dims * kTile + lane] = static_cast<float>(0.5 * squared_norm(stored.data(), dims));
  }
}

void fill_box(Tiles& tiles, int t, const std::vector<float>& projected, const std::vector<Index>& order) {
  const int box_dims = tiles.box_dims;
  float* low = &tiles.low[static_cast<std::size_t>(t) * box_dims];
  float* high = &tiles.high[static_cast<std::size_t>(t) * box_dims];
  std::fill(low, low + box_dims, std::numeric_limits<float>::max());
  std::fill(high, high + box_dims, std::numeric_limits<float>::lowest());
  for (Index p = tiles.begin(t); p < tiles.end(t); ++p) {
    const float* x = &projected[static_cast<std::size_t>(order[p]) * box_dims];
    for (int d = 0; d < box_dims; ++d) {
      low[d] = std::min(low[d], x[d]);
      high[d] = std::max(high[d], x[d]);
      if (!tiles.projected.empty())
        tiles.projected[(static_cast<std::size_t>(t) * box_dims + d) * kTile + (p - tiles.begin(t))] = x[d];
    }
  }
  for (int d = 0; d < box_dims; ++d) {
    tiles.low_by_dim[static_cast<std::size_t>(d) * tiles.padded_count + t] = low[d];
    tiles.high_by_dim[static_cast<std::size_t>(d) * tiles.padded_count + t] = high[d];
  }
}

}  // namespace

Tiles build_tiles(const Embeddings& embeddings, const std::vector<Index>& rows, ThreadPool& pool) {
  Tiles tiles;
  tiles.points = static_cast<Index>(rows.size());
  tiles.dims = embeddings.dims;
  tiles.box_dims = std::min(embeddings.dims, kMaxBoxDims);
  tiles.metric = embeddings.metric;
  tiles.dot_form = embeddings.dims >= kDotFormDims;
  const Extent extent = measure(embeddings, rows);
  tiles.bounds = float_bounds(extent.radius, tiles.dims, tiles.box_dims, tiles.dot_form);
  tiles.count = (tiles.points + kTile - 1) / kTile;
  tiles.padded_count = (tiles.count + 15) / 16 * 16;
  tiles.tile_floats = (tiles.dims + (tiles.dot_form ? 1 : 0)) * kTile;

  const std::vector<float> projected = project(embeddings, rows, extent, tiles.box_dims, tiles.bounds.scale, pool);
  std::vector<Index> order(rows.size());  // positions in `rows`
  std::iota(order.begin(), order.end(), 0);
  order_by_halving(order, projected, tiles.box_dims, pool);
  tiles.row.resize(rows.size());
  for (std::size_t p = 0; p < rows.size(); ++p) tiles.row[p] = rows[order[p]];

  const std::size_t box_floats = static_cast<std::size_t>(tiles.count) * tiles.box_dims;
  const std::size_t padded_floats = static_cast<std::size_t>(tiles.padded_count) * tiles.box_dims;
  if (embeddings.single && embeddings.metric == Metric::euclidean) {
    tiles.exact_single.resize(rows.size() * tiles.dims);
  } else {  // rows scaled to unit norm are no float32 numbers
    tiles.exact_double.resize(rows.size() * tiles.dims);
  }
  tiles.columns.resize(static_cast<std::size_t>(tiles.count) * tiles.tile_floats);
  if (tiles.box_dims != tiles.dims) tiles.projected.assign(box_floats * kTile, 0.0f);
  tiles.low.resize(box_floats);
  tiles.high.resize(box_floats);
  tiles.low_by_dim.assign(padded_floats, 1e18f);  // boxes that pad are far from everything
  tiles.high_by_dim.assign(padded_floats, 1e18f);
  pool.for_each(tiles.count, [&](std::int64_t t, int) {
    fill_columns(tiles, static_cast<int>(t), embeddings, extent);
    fill_box(tiles, static_cast<int>(t), projected, order);
  });
  return tiles;
}

}  // namespace spatialprobe
