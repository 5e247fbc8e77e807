// Exact nearest neighbours and core distances.
#pragma once

#include <vector>

#include "tiles.h"

namespace spatialprobe {

struct Neighbours {
  int width = 0;                 // neighbours kept of each point
  std::vector<Index> index;      // [points, width] by distance; -1 after the last, if there are fewer
  std::vector<double> distance;  // [points, width] float64
  std::vector<double> beyond;    // [points] every point not listed is at least this far away
  std::vector<double> core;      // [points] distance to the min_samples-th nearest other row

  const Index* indices_of(Index p) const { return &index[static_cast<std::size_t>(p) * width]; }
  const double* distances_of(Index p) const { return &distance[static_cast<std::size_t>(p) * width]; }
};

// `crowded[p]` says that point p stands for more than min_samples equal rows: the core distance of p is zero and no
// neighbour of p needs another one.
Neighbours find_neighbours(const Tiles& tiles, const std::vector<char>& crowded, Index min_samples,
                           const Kernels& kernels, ThreadPool& pool);

}  // namespace spatialprobe
