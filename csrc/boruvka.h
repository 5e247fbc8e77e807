// Boruvka's algorithm over tiles: every component finds its least edge, all of them join, until one is left.
#pragma once

#include "neighbours.h"
#include "spanning_tree.h"

namespace spatialprobe {

// The canonical spanning tree of the tiles' points; edges hold input rows, in the order they were found.
std::vector<Edge> spanning_tree_by_boruvka(const Tiles& tiles, const Neighbours& neighbours, double alpha,
                                           const Kernels& kernels, ThreadPool& pool);

}  // namespace spatialprobe
