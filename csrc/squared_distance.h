#pragma once

namespace spatialprobe {

// The one definition of a squared distance: four interleaved float64 sums, so that every compiler and every vector width
// gives the same bits (the build forbids contraction into fused multiply-adds). Static: each instruction set keeps its own
// copy.
static inline double squared_distance(const double* a, const double* b, int dims) {
  double sum[4] = {0.0, 0.0, 0.0, 0.0};
  int d = 0;
  for (; d + 4 <= dims; d += 4) {
    for (int k = 0; k < 4; ++k) {
      const double difference = a[d + k] - b[d + k];
      sum[k] += difference * difference;
    }
  }
  for (; d < dims; ++d) {
    const double difference = a[d] - b[d];
    sum[0] += difference * difference;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace spatialprobe
