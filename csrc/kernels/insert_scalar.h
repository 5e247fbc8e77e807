// Insertion into a sorted list of eight, one step at a time.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace {

void insert(float* distances, std::int32_t* indices, float squared, std::int32_t index) {
  int at = spatialprobe::kShortList - 1;
  for (; at > 0 && distances[at - 1] > squared; --at) {
    distances[at] = distances[at - 1];
    indices[at] = indices[at - 1];
  }
  distances[at] = squared;
  indices[at] = index;
}

}  // namespace
