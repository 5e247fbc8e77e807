#pragma once

#include <numeric>
#include <vector>

#include "embeddings.h"

namespace spatialprobe {

class DisjointSets {
 public:
  explicit DisjointSets(Index size) : parent_(size) { std::iota(parent_.begin(), parent_.end(), 0); }

  Index find(Index x) {
    while (parent_[x] != x) x = parent_[x] = parent_[parent_[x]];
    return x;
  }

  // Joins two sets; false if they are one already.
  bool join(Index x, Index y) {
    x = find(x);
    y = find(y);
    parent_[x] = y;
    return x != y;
  }

 private:
  std::vector<Index> parent_;
};

}  // namespace spatialprobe
