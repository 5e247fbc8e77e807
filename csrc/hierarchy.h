// From a sorted spanning tree to the condensed tree of clusters (Campello, Moulavi and Sander 2013). Every sum and
// every order is that of the hdbscan package, so that the same edges give the same labels.
#pragma once

#include <vector>

#include "spanning_tree.h"

namespace spatialprobe {

// Nodes 0..points-1 are points; node points+i joins left[i] and right[i] at distance[i].
struct SingleLinkage {
  Index points = 0;
  std::vector<Index> left, right;
  std::vector<double> distance;
  std::vector<Index> size;

  Index size_of(Index node) const { return node < points ? 1 : size[node - points]; }
};

SingleLinkage link(const std::vector<Edge>& sorted_edges, Index points);

// One row per point or cluster that leaves a cluster, breadth first. Cluster 0 is the root; children follow parents.
struct CondensedTree {
  struct Row {
    Index parent;  // cluster
    Index child;   // point or, if is_cluster, cluster
    Index size;
    bool is_cluster;
    double lambda;  // 1 / distance at which the child leaves; infinite at distance 0
  };
  Index points = 0;
  std::vector<Row> rows;

  struct Cluster {
    Index parent = -1;
    Index size = 0;      // of the root: what its child clusters hold
    double birth = 0.0;  // lambda at which it left its parent
    double death = 0.0;  // largest lambda at which anything leaves it
    std::vector<Index> children;
  };
  std::vector<Cluster> clusters;
};

CondensedTree condense(const SingleLinkage& linkage, Index min_cluster_size);

}  // namespace spatialprobe
