// The input as it came: rows of float32 or float64, read as exact float64 numbers, and what "distance" means on them.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "squared_distance.h"

namespace spatialprobe {

using Index = std::int32_t;  // points; the door refuses more than 2^30, so that tree nodes fit as well

enum class Metric { euclidean, cosine };

struct Embeddings {
  const void* data;  // [rows, dims], C-contiguous
  bool single;       // float32 rather than float64
  std::int64_t rows;
  int dims;
  Metric metric;  // cosine reads rows scaled to unit norm

  void read(std::int64_t row, double* out) const {
    if (single) {
      const float* x = static_cast<const float*>(data) + row * dims;
      for (int d = 0; d < dims; ++d) out[d] = static_cast<double>(x[d]);
    } else {
      const double* x = static_cast<const double*>(data) + row * dims;
      for (int d = 0; d < dims; ++d) out[d] = x[d];
    }
    if (metric == Metric::cosine) normalise(out);
  }

  void prefetch(std::int64_t row) const {
    const std::int64_t bytes = dims * static_cast<std::int64_t>(single ? sizeof(float) : sizeof(double));
    const char* x = static_cast<const char*>(data) + row * bytes;
    for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(x + at);
  }

  double squared_norm(const double* x) const {
    double sum = 0.0;
    for (int d = 0; d < dims; ++d) sum += x[d] * x[d];
    return sum;
  }

 private:
  void normalise(double* x) const {
    const double norm = std::sqrt(squared_norm(x));
    for (int d = 0; d < dims; ++d) x[d] /= norm;
  }
};

// 1 - cos of unit vectors is half their squared distance, which does not cancel for close pairs.
inline double distance_from_squared(Metric metric, double squared) {
  return metric == Metric::cosine ? 0.5 * squared : std::sqrt(squared);
}

// The euclidean distance at which `distance` is reached; for pruning, never for a decision.
inline double radius_of(Metric metric, double distance) {
  return metric == Metric::cosine ? std::sqrt(2.0 * distance) : distance;
}

inline double distance_at_radius(Metric metric, double radius) {
  return metric == Metric::cosine ? 0.5 * radius * radius : radius;
}

}  // namespace spatialprobe
