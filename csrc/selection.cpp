#include "selection.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace spatialprobe {
namespace {

// Sum over a cluster's rows of (lambda - birth) * size, in the order of the rows.
std::vector<double> stabilities(const CondensedTree& tree) {
  std::vector<double> stability(tree.clusters.size(), 0.0);
  for (const CondensedTree::Row& row : tree.rows)
    stability[row.parent] += (row.lambda - tree.clusters[row.parent].birth) * static_cast<double>(row.size);
  return stability;
}

void clear_below(const CondensedTree& tree, Index cluster, std::vector<char>& chosen) {
  std::vector<Index> below = tree.clusters[cluster].children;
  for (std::size_t i = 0; i < below.size(); ++i) {
    chosen[below[i]] = 0;
    const std::vector<Index>& children = tree.clusters[below[i]].children;
    below.insert(below.end(), children.begin(), children.end());
  }
}

// A cluster stays unless its descendants are together more stable. hdbscan adds the children's stabilities in float32;
// where two sums are nearly equal the labels depend on that, so it is kept.
std::vector<char> excess_of_mass(const CondensedTree& tree, const Selection& selection) {
  std::vector<double> stability = stabilities(tree);
  std::vector<char> chosen(tree.clusters.size(), 1);
  const Index first = selection.allow_single_cluster ? 0 : 1;
  if (first == 1) chosen[0] = 0;
  for (Index c = static_cast<Index>(tree.clusters.size()) - 1; c >= first; --c) {
    float below = 0.0f;
    for (Index child : tree.clusters[c].children) {
      const double sum = static_cast<double>(below) + stability[child];
      constexpr double kMost = std::numeric_limits<float>::max();  // a larger one has no defined conversion
      below = sum > kMost ? std::numeric_limits<float>::infinity() : static_cast<float>(sum);
    }
    const bool too_large = selection.max_cluster_size > 0 && tree.clusters[c].size > selection.max_cluster_size;
    if (static_cast<double>(below) > stability[c] || too_large) {
      chosen[c] = 0;
      stability[c] = static_cast<double>(below);
    } else {
      clear_below(tree, c, chosen);
    }
  }
  return chosen;
}

std::vector<char> leaves(const CondensedTree& tree) {
  std::vector<char> chosen(tree.clusters.size(), 0);
  if (tree.clusters.size() == 1) return chosen;
  for (std::size_t c = 0; c < tree.clusters.size(); ++c) chosen[c] = tree.clusters[c].children.empty();
  return chosen;
}

// Replaces each chosen cluster born at a distance below epsilon by its first ancestor born above (or, failing that, by
// the last one before the root; by the root itself if that is allowed). Malzer and Baum 2020.
std::vector<char> merge_below_epsilon(const CondensedTree& tree, const Selection& selection,
                                      const std::vector<char>& chosen) {
  std::vector<char> merged(chosen.size(), 0);
  for (Index c = 1; c < static_cast<Index>(chosen.size()); ++c) {
    if (!chosen[c]) continue;
    Index at = c;
    bool climbs = 1.0 / tree.clusters[c].birth < selection.epsilon;
    while (climbs) {
      const Index parent = tree.clusters[at].parent;
      if (parent == 0) {
        if (selection.allow_single_cluster) at = 0;
        break;
      }
      at = parent;
      climbs = !(1.0 / tree.clusters[at].birth > selection.epsilon);
    }
    merged[at] = 1;
  }
  return merged;
}

std::vector<char> choose(const CondensedTree& tree, const Selection& selection) {
  const bool by_mass = selection.method == SelectionMethod::excess_of_mass;
  std::vector<char> chosen = by_mass ? excess_of_mass(tree, selection) : leaves(tree);
  if (selection.epsilon != 0.0 && tree.clusters.size() > 1 && !chosen[0])
    chosen = merge_below_epsilon(tree, selection, chosen);
  return chosen;
}

}  // namespace

Labelling label_points(const CondensedTree& tree, const Selection& selection) {
  const std::vector<char> chosen = choose(tree, selection);
  // The label of each cluster's points: its own, or that of the nearest chosen ancestor.
  std::vector<std::int64_t> label(tree.clusters.size(), -1);
  std::vector<Index> owner(tree.clusters.size(), 0);
  std::int64_t labels = 0;
  for (std::size_t c = 0; c < chosen.size(); ++c) {
    if (chosen[c]) {
      label[c] = labels++;
      owner[c] = static_cast<Index>(c);
    } else if (c > 0) {
      owner[c] = owner[tree.clusters[c].parent];
      label[c] = owner[c] == 0 ? -1 : label[owner[c]];
    }
  }
  // Points of a chosen root are noise unless they stay to the end (or beyond 1/epsilon), and if it is not alone.
  const double stays = selection.epsilon != 0.0 ? 1.0 / selection.epsilon : tree.clusters[0].death;
  Labelling out;
  out.labels.assign(tree.points, -1);
  out.probabilities.assign(tree.points, 0.0);
  for (const CondensedTree::Row& row : tree.rows) {
    if (row.is_cluster) continue;
    const Index cluster = owner[row.parent];
    std::int64_t point_label = label[row.parent];
    if (cluster == 0) point_label = chosen[0] && labels == 1 && row.lambda >= stays ? label[0] : -1;
    if (point_label < 0) continue;
    const double death = tree.clusters[cluster].death;
    out.labels[row.child] = point_label;
    out.probabilities[row.child] =
        death == 0.0 || !std::isfinite(row.lambda) ? 1.0 : std::min(row.lambda, death) / death;
  }
  return out;
}

}  // namespace spatialprobe
