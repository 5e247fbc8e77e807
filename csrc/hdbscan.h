// HDBSCAN of one scene or of many.
#pragma once

#include <string>
#include <vector>

#include "selection.h"
#include "thread_pool.h"

namespace spatialprobe {

enum class Search { automatic, prim, boruvka };

struct Parameters {
  std::int64_t min_cluster_size = 5;
  std::int64_t min_samples = 5;  // the point itself is not counted; at most rows - 1 are used
  double alpha = 1.0;
  Selection selection;
  Search search = Search::automatic;
  std::string instruction_set = "auto";
};

SpanningTree spanning_tree(const Embeddings& embeddings, const Parameters& parameters, ThreadPool& pool);

// Labels for the points of a sorted spanning tree.
Labelling labels_of_tree(const std::vector<Edge>& sorted_edges, Index points, const Parameters& parameters);

Labelling cluster(const Embeddings& embeddings, const Parameters& parameters, ThreadPool& pool);

// One result per scene; each scene is one thread's work, large ones first.
std::vector<Labelling> cluster_batch(const std::vector<Embeddings>& scenes, const Parameters& parameters, int threads);

}  // namespace spatialprobe
