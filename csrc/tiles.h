// The points in an order that keeps neighbours together, cut into tiles of 64 with bounding boxes: what every search
// walks over. Knows nothing of core distances or components.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "embeddings.h"
#include "kernels/kernels.h"
#include "thread_pool.h"

namespace spatialprobe {

// What float32 can say about a true distance. Stored points are centred and scaled to norm <= 1 (sqrt(2) in the dot
// form, whose squared distances come out in the same unit), so each bound below is one number.
struct FloatBounds {
  double scale = 1.0;       // stored = input * scale
  double rounding = 0.0;    // of a distance: both points were rounded to float32
  double relative = 0.0;    // of a squared distance: sums of the difference form
  double absolute = 0.0;    // of a squared distance: cancellation in the dot form
  double projection = 0.0;  // of a distance between projections, which the boxes hold

  // Every pair at a true distance <= radius (input units) has a stored squared distance below this.
  float limit(double radius) const {
    const double reach = radius * scale + rounding;
    return as_limit(reach * reach * (1.0 + relative) + absolute);
  }
  // A pair with this stored squared distance or more is at a true distance of at least this.
  double certain(double squared) const {
    const double left = (squared - absolute) * (1.0 - relative) * (1.0 - 1e-6);
    return left > 0.0 ? std::max(0.0, (std::sqrt(left) - rounding) / scale) : 0.0;
  }
  // A box is at most this far (squared) from a point or box if it holds anything within the radius.
  float box_limit(double radius) const {
    const double reach = radius * scale + projection;
    return as_limit(reach * reach);
  }
  // The same for a stored squared distance s instead of a true radius: (sqrt(s) + e)^2 <= (1 + t) s + (1 + 1/t) e^2 for
  // every t > 0, which saves the square root.
  float box_limit_of_stored(float squared) const {
    constexpr double t = 1e-3;
    const double e = rounding + projection;
    const double slope = (1.0 + t) * (1.0 + relative) * (1.0 + 1e-5);
    return static_cast<float>(squared * slope + ((1.0 + t) * absolute + (1.0 + 1.0 / t) * e * e) * (1.0 + 1e-5));
  }

 private:
  static float as_limit(double squared) {  // 1e-5: the arithmetic of boxes, and of this conversion
    return squared < 1e29 ? static_cast<float>(squared * (1.0 + 1e-5) + 1e-36) : kFar;
  }
};

struct Tiles {
  Index points = 0;
  int dims = 0, box_dims = 0;
  Metric metric = Metric::euclidean;
  bool dot_form = false;
  FloatBounds bounds;
  int count = 0;         // tiles
  int padded_count = 0;  // a multiple of 16, for the kernels
  int tile_floats = 0;   // of one tile in `columns`

  std::vector<Index> row;            // [points] which input row
  std::vector<float> exact_single;   // [points, dims] the true coordinates, which alone decide, if they are float32;
  std::vector<double> exact_double;  // otherwise here
  std::vector<float> columns;        // [count, dims (+ half norms), 64]
  std::vector<float> projected;      // [count, box_dims, 64]; empty where the columns serve
  std::vector<float> low, high;      // boxes by tile, [count, box_dims]
  std::vector<float> low_by_dim, high_by_dim;  // the same, [box_dims, padded_count]

  Index begin(int tile) const { return tile * kTile; }
  Index end(int tile) const { return std::min<Index>(points, (tile + 1) * kTile); }
  const float* tile(int t) const { return &columns[static_cast<std::size_t>(t) * tile_floats]; }
  const float* box_points(int t) const {
    return projected.empty() ? tile(t) : &projected[static_cast<std::size_t>(t) * box_dims * kTile];
  }
  const float* box_low(int t) const { return &low[static_cast<std::size_t>(t) * box_dims]; }
  const float* box_high(int t) const { return &high[static_cast<std::size_t>(t) * box_dims]; }
  const TileKernels& forms(const Kernels& kernels) const { return dot_form ? kernels.dot : kernels.difference; }

  double distance(Index p, Index q) const {
    const std::size_t stride = dims;
    const double squared = exact_double.empty()
                               ? squared_distance(&exact_single[p * stride], &exact_single[q * stride], dims)
                               : squared_distance(&exact_double[p * stride], &exact_double[q * stride], dims);
    return distance_from_squared(metric, squared);
  }
  void exact_squared(const Kernels& kernels, Index p, const Index* others, int count, double* out) const {
    if (exact_double.empty()) {
      kernels.exact_squared_single(exact_single.data(), dims, p, others, count, out);
    } else {
      kernels.exact_squared_double(exact_double.data(), dims, p, others, count, out);
    }
  }
};

// The largest of a tile's limits; sixteen running maxima, because compilers keep the order of a single one.
inline float widest_limit(const float* limits) {
  float widest[16];
  std::copy(limits, limits + 16, widest);
  for (int lane = 16; lane < kTile; lane += 16)
    for (int k = 0; k < 16; ++k) widest[k] = limits[lane + k] > widest[k] ? limits[lane + k] : widest[k];
  return *std::max_element(widest, widest + 16);
}

// `rows` are the input rows that take part.
Tiles build_tiles(const Embeddings& embeddings, const std::vector<Index>& rows, ThreadPool& pool);

}  // namespace spatialprobe
