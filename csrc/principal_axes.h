// Principal components in float64, without a linear algebra library, so that no thread pool but ours ever runs.
#pragma once

#include <vector>

#include "embeddings.h"
#include "thread_pool.h"

namespace spatialprobe {

// Eigenvectors of a symmetric [size, size] matrix by cyclic Jacobi rotations, as rows by falling eigenvalue.
// Rotations stop when the off-diagonal's share of the squared norm is below `tolerance`.
std::vector<double> eigenvectors_by_value(std::vector<double> matrix, int size, double tolerance);

// Scores [rows, components] of the embeddings on their first principal components: centred, largest loading of each
// component positive (scikit-learn's PCA). O(rows * dims^2 + dims^3).
std::vector<double> principal_components(const Embeddings& embeddings, int components, ThreadPool& pool);

}  // namespace spatialprobe
