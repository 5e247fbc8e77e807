// Which clusters of the condensed tree become labels, and how strongly each point belongs to its cluster.
#pragma once

#include <cstdint>
#include <vector>

#include "hierarchy.h"

namespace spatialprobe {

enum class SelectionMethod { excess_of_mass, leaf };

struct Selection {
  SelectionMethod method = SelectionMethod::excess_of_mass;
  double epsilon = 0.0;               // clusters born at a smaller distance give way to an ancestor; 0 = off
  std::int64_t max_cluster_size = 0;  // of excess of mass; 0 = any
  bool allow_single_cluster = false;  // whether the root may be chosen
};

struct Labelling {
  std::vector<std::int64_t> labels;   // [points], -1 is noise
  std::vector<double> probabilities;  // [points], 0 for noise
};

Labelling label_points(const CondensedTree& tree, const Selection& selection);

}  // namespace spatialprobe
