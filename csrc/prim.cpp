#include "prim.h"

#include <algorithm>
#include <limits>

namespace spatialprobe {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct DensePoints {
  std::vector<double> x;  // [points, dims]
  Index points;
  int dims;
  Metric metric;

  double distance(Index p, Index q) const {
    const std::size_t stride = dims;
    return distance_from_squared(metric, squared_distance(&x[p * stride], &x[q * stride], dims));
  }
};

double core_distance(const DensePoints& points, const std::vector<char>& crowded, Index p, Index min_samples,
                     std::vector<double>& distances) {
  if (crowded[p]) return 0.0;
  distances.clear();
  double nearest_crowd = kInfinity;
  for (Index q = 0; q < points.points; ++q) {
    if (q == p) continue;
    distances.push_back(points.distance(p, q));
    if (crowded[q]) nearest_crowd = std::min(nearest_crowd, distances.back());
  }
  if (static_cast<std::size_t>(min_samples) > distances.size()) return nearest_crowd;
  std::nth_element(distances.begin(), distances.begin() + (min_samples - 1), distances.end());
  return std::min(nearest_crowd, distances[min_samples - 1]);
}

}  // namespace

SpanningTree spanning_tree_by_prim(const Embeddings& embeddings, const DistinctRows& distinct, Index min_samples,
                                   double alpha) {
  const Index n = static_cast<Index>(distinct.rows.size());
  DensePoints points{std::vector<double>(static_cast<std::size_t>(n) * embeddings.dims), n, embeddings.dims,
                     embeddings.metric};
  for (Index p = 0; p < n; ++p)
    embeddings.read(distinct.rows[p], &points.x[static_cast<std::size_t>(p) * embeddings.dims]);

  std::vector<double> core(n), scratch;
  for (Index p = 0; p < n; ++p) core[p] = core_distance(points, distinct.crowded, p, min_samples, scratch);

  SpanningTree tree;
  tree.core.assign(embeddings.rows, 0.0);
  for (Index p = 0; p < n; ++p) tree.core[distinct.rows[p]] = core[p];
  std::vector<Index> outside(n - 1);                    // points not in the tree yet
  std::vector<Edge> nearest(n, Edge{n, n, kInfinity});  // each one's least edge into the tree, by points
  for (Index p = 1; p < n; ++p) outside[p - 1] = p;
  Index newest = 0;
  while (!outside.empty()) {
    std::size_t least = 0;
    for (std::size_t i = 0; i < outside.size(); ++i) {
      const Index p = outside[i];
      const double weight = std::max({core[p], core[newest], points.distance(p, newest) / alpha});
      nearest[p] = std::min(nearest[p], make_edge(p, newest, weight));
      if (nearest[p] < nearest[outside[least]]) least = i;
    }
    newest = outside[least];
    const Edge& edge = nearest[newest];
    tree.edges.push_back(Edge{distinct.rows[edge.a], distinct.rows[edge.b], edge.weight});
    outside[least] = outside.back();
    outside.pop_back();
  }
  return tree;
}

}  // namespace spatialprobe
