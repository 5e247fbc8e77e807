// Rows that occur more often than min_samples need no search: their core distance is zero and their tree is a star.
#pragma once

#include <utility>
#include <vector>

#include "embeddings.h"

namespace spatialprobe {

struct DistinctRows {
  std::vector<Index> rows;                         // the rows that take part, ascending
  std::vector<char> crowded;                       // whether rows[i] stands for more than min_samples equal rows
  std::vector<std::pair<Index, Index>> collapsed;  // (first, later) of equal rows; the later one takes no part
};

// Collapses only classes of more than min_samples equal rows. The canonical spanning tree joins each of their later
// rows to the first one at weight 0. Smaller classes stay: their rows tie with other points at the class's core
// distance, and the canonical order of those ties depends on every row's index.
DistinctRows collapse_duplicates(const Embeddings& embeddings, Index min_samples);

}  // namespace spatialprobe
