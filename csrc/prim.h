// Prim's algorithm on all pairs, in float64: the fastest way for a few hundred points, and the definition that the
// tiled search is tested against.
#pragma once

#include "duplicates.h"
#include "spanning_tree.h"

namespace spatialprobe {

// The tree of the rows that take part; `core` is filled for those rows. O(rows^2 dims) time, O(rows dims) memory.
SpanningTree spanning_tree_by_prim(const Embeddings& embeddings, const DistinctRows& distinct, Index min_samples,
                                   double alpha);

}  // namespace spatialprobe
