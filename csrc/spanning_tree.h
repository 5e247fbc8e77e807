// Edges of the minimum spanning tree of mutual reachability, and the order that makes it unique.
#pragma once

#include <vector>

#include "disjoint_sets.h"
#include "embeddings.h"

namespace spatialprobe {

struct Edge {
  Index a, b;     // input rows, a < b
  double weight;  // max(core of a, core of b, distance / alpha)
};

// Mutual reachability ties by construction, so the order of equal edges is part of the definition: with it the spanning
// tree is unique.
inline bool operator<(const Edge& x, const Edge& y) {
  if (x.weight != y.weight) return x.weight < y.weight;
  return x.a != y.a ? x.a < y.a : x.b < y.b;
}

inline Edge make_edge(Index p, Index q, double weight) { return p < q ? Edge{p, q, weight} : Edge{q, p, weight}; }

// Whether points - 1 edges between points 0..points-1 have no cycle.
inline bool spans(const std::vector<Edge>& edges, Index points) {
  DisjointSets sets(points);
  for (const Edge& edge : edges)
    if (!sets.join(edge.a, edge.b)) return false;
  return static_cast<Index>(edges.size()) + 1 == points;
}

struct SpanningTree {
  std::vector<Edge> edges;   // sorted
  std::vector<double> core;  // [rows] core distances
};

}  // namespace spatialprobe
