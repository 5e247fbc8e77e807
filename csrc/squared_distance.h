#pragma once

namespace spatialprobe {

// The one definition of a squared distance: four interleaved float64 sums, so that every compiler and every vector
// width gives the same bits (the build forbids contraction into fused multiply-adds). Points may be stored as float32,
// which float64 holds exactly. Static: each instruction set keeps its own copy.
template <typename Scalar>
static inline double squared_distance(const Scalar* a, const Scalar* b, int dims) {
  double sum[4] = {0.0, 0.0, 0.0, 0.0};
  int d = 0;
  for (; d + 4 <= dims; d += 4) {
    for (int k = 0; k < 4; ++k) {
      const double difference = static_cast<double>(a[d + k]) - static_cast<double>(b[d + k]);
      sum[k] += difference * difference;
    }
  }
  for (; d < dims; ++d) {
    const double difference = static_cast<double>(a[d]) - static_cast<double>(b[d]);
    sum[0] += difference * difference;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace spatialprobe
