#include "hierarchy.h"

#include <algorithm>
#include <limits>

#include "disjoint_sets.h"

namespace spatialprobe {
namespace {

class Condenser {
 public:
  Condenser(const SingleLinkage& linkage, Index min_cluster_size)
      : linkage_(linkage),
        points_(linkage.points),
        min_cluster_size_(min_cluster_size),
        cluster_of_(2 * static_cast<std::size_t>(linkage.points) - 1, -1) {
    tree_.points = points_;
    tree_.clusters.emplace_back();
    tree_.rows.reserve(points_ + points_ / 8);
  }

  CondensedTree run() {
    const Index root = 2 * points_ - 2;
    cluster_of_[root] = 0;
    std::vector<Index> queue = {root};  // nodes whose size makes them (part of) a cluster
    for (std::size_t i = 0; i < queue.size(); ++i) {
      const Index node = queue[i];
      if (node >= points_) divide(node, queue);
    }
    return std::move(tree_);
  }

 private:
  void divide(Index node, std::vector<Index>& queue) {
    const Index left = linkage_.left[node - points_], right = linkage_.right[node - points_];
    const double distance = linkage_.distance[node - points_];
    const double lambda = distance > 0.0 ? 1.0 / distance : std::numeric_limits<double>::infinity();
    const Index cluster = cluster_of_[node];
    tree_.clusters[cluster].death = std::max(tree_.clusters[cluster].death, lambda);
    const bool left_lives = linkage_.size_of(left) >= min_cluster_size_;
    const bool right_lives = linkage_.size_of(right) >= min_cluster_size_;
    if (left_lives && right_lives) {
      found_cluster(left, cluster, lambda);
      found_cluster(right, cluster, lambda);
    }
    for (const Index child : {left, right}) {
      const bool lives = child == left ? left_lives : right_lives;
      if (!lives) {
        scatter(child, cluster, lambda);
        continue;
      }
      if (cluster_of_[child] < 0) cluster_of_[child] = cluster;
      queue.push_back(child);
    }
  }

  void found_cluster(Index node, Index parent, double lambda) {
    const Index cluster = static_cast<Index>(tree_.clusters.size());
    CondensedTree::Cluster born;
    born.parent = parent;
    born.size = linkage_.size_of(node);
    born.birth = lambda;
    tree_.clusters.push_back(born);
    tree_.clusters[parent].children.push_back(cluster);
    if (parent == 0) tree_.clusters[0].size += born.size;
    tree_.rows.push_back({parent, cluster, born.size, true, lambda});
    cluster_of_[node] = cluster;
  }

  // All points below a node too small to be a cluster leave at once.
  void scatter(Index node, Index cluster, double lambda) {
    below_.assign(1, node);
    for (std::size_t i = 0; i < below_.size(); ++i) {
      const Index at = below_[i];
      if (at < points_) {
        tree_.rows.push_back({cluster, at, 1, false, lambda});
      } else {
        below_.push_back(linkage_.left[at - points_]);
        below_.push_back(linkage_.right[at - points_]);
      }
    }
  }

  const SingleLinkage& linkage_;
  const Index points_, min_cluster_size_;
  std::vector<Index> cluster_of_;  // [nodes]
  std::vector<Index> below_;
  CondensedTree tree_;
};

}  // namespace

SingleLinkage link(const std::vector<Edge>& sorted_edges, Index points) {
  SingleLinkage linkage;
  linkage.points = points;
  linkage.left.resize(sorted_edges.size());
  linkage.right.resize(sorted_edges.size());
  linkage.distance.resize(sorted_edges.size());
  linkage.size.resize(sorted_edges.size());
  DisjointSets sets(points);
  std::vector<Index> node(points);  // the node that a set's root stands for
  std::iota(node.begin(), node.end(), 0);
  for (std::size_t i = 0; i < sorted_edges.size(); ++i) {
    const Edge& edge = sorted_edges[i];
    linkage.left[i] = node[sets.find(edge.a)];
    linkage.right[i] = node[sets.find(edge.b)];
    linkage.distance[i] = edge.weight;
    linkage.size[i] = linkage.size_of(linkage.left[i]) + linkage.size_of(linkage.right[i]);
    sets.join(edge.a, edge.b);
    node[sets.find(edge.a)] = points + static_cast<Index>(i);
  }
  return linkage;
}

CondensedTree condense(const SingleLinkage& linkage, Index min_cluster_size) {
  return Condenser(linkage, min_cluster_size).run();
}

}  // namespace spatialprobe
