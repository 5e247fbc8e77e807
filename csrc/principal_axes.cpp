#include "principal_axes.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace spatialprobe {
namespace {

struct Rotation {
  double cosine, sine;
};

// The rotation that makes element (p, q) of the symmetric matrix zero (Golub and Van Loan, section 8.5).
Rotation annihilate(double pp, double pq, double qq) {
  const double theta = (qq - pp) / (2.0 * pq);
  const double tangent = (theta >= 0.0 ? 1.0 : -1.0) / (std::fabs(theta) + std::sqrt(theta * theta + 1.0));
  const double cosine = 1.0 / std::sqrt(tangent * tangent + 1.0);
  return {cosine, tangent * cosine};
}

void rotate_rows(double* p, double* q, int size, Rotation r) {
  for (int k = 0; k < size; ++k) {
    const double a = p[k], b = q[k];
    p[k] = r.cosine * a - r.sine * b;
    q[k] = r.sine * a + r.cosine * b;
  }
}

void rotate_columns(double* matrix, int size, int p, int q, Rotation r) {
  for (int k = 0; k < size; ++k) {
    const double a = matrix[k * size + p], b = matrix[k * size + q];
    matrix[k * size + p] = r.cosine * a - r.sine * b;
    matrix[k * size + q] = r.sine * a + r.cosine * b;
  }
}

double off_diagonal_share(const std::vector<double>& matrix, int size) {
  double off = 0.0, all = 0.0;
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      const double square = matrix[i * size + j] * matrix[i * size + j];
      all += square;
      if (i != j) off += square;
    }
  }
  return all > 0.0 ? off / all : 0.0;
}

}  // namespace

std::vector<double> eigenvectors_by_value(std::vector<double> matrix, int size, double tolerance) {
  std::vector<double> vectors(static_cast<std::size_t>(size) * size, 0.0);
  for (int i = 0; i < size; ++i) vectors[i * size + i] = 1.0;
  for (int sweep = 0; sweep < 40 && off_diagonal_share(matrix, size) > tolerance; ++sweep) {
    for (int p = 0; p < size; ++p) {
      for (int q = p + 1; q < size; ++q) {
        const double pq = matrix[p * size + q];
        if (std::fabs(pq) < 1e-300) continue;
        const Rotation r = annihilate(matrix[p * size + p], pq, matrix[q * size + q]);
        rotate_columns(matrix.data(), size, p, q, r);
        rotate_rows(&matrix[p * size], &matrix[q * size], size, r);
        rotate_rows(&vectors[p * size], &vectors[q * size], size, r);
      }
    }
  }
  std::vector<int> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return matrix[a * size + a] > matrix[b * size + b]; });
  std::vector<double> sorted;
  sorted.reserve(vectors.size());
  for (int i : order) sorted.insert(sorted.end(), &vectors[i * size], &vectors[i * size] + size);
  return sorted;
}

std::vector<double> principal_components(const Embeddings& embeddings, int components, ThreadPool& pool) {
  const int dims = embeddings.dims;
  const std::int64_t rows = embeddings.rows;
  std::vector<double> mean(dims, 0.0), row(dims);
  for (std::int64_t i = 0; i < rows; ++i) {
    embeddings.read(i, row.data());
    for (int d = 0; d < dims; ++d) mean[d] += row[d];
  }
  for (double& value : mean) value /= static_cast<double>(rows);

  // One upper triangle per fixed chunk of rows, added in order: the same bits for every number of threads.
  constexpr std::int64_t kChunks = 16;
  std::vector<std::vector<double>> parts(kChunks, std::vector<double>(static_cast<std::size_t>(dims) * dims, 0.0));
  pool.for_each(kChunks, [&](std::int64_t chunk, int) {
    std::vector<double> x(dims);
    for (std::int64_t i = rows * chunk / kChunks; i < rows * (chunk + 1) / kChunks; ++i) {
      embeddings.read(i, x.data());
      for (int d = 0; d < dims; ++d) x[d] -= mean[d];
      for (int a = 0; a < dims; ++a)
        for (int b = a; b < dims; ++b) parts[chunk][a * dims + b] += x[a] * x[b];
    }
  });
  std::vector<double> covariance(static_cast<std::size_t>(dims) * dims, 0.0);
  for (const std::vector<double>& part : parts)
    for (std::size_t i = 0; i < covariance.size(); ++i) covariance[i] += part[i];
  for (int a = 0; a < dims; ++a)
    for (int b = 0; b < a; ++b) covariance[a * dims + b] = covariance[b * dims + a];

  std::vector<double> axes = eigenvectors_by_value(std::move(covariance), dims, 1e-30);
  for (int c = 0; c < components; ++c) {
    double* axis = &axes[static_cast<std::size_t>(c) * dims];
    const double largest =
        *std::max_element(axis, axis + dims, [](double a, double b) { return std::fabs(a) < std::fabs(b); });
    if (largest < 0.0) std::transform(axis, axis + dims, axis, std::negate<double>());
  }
  std::vector<double> scores(static_cast<std::size_t>(rows) * components);
  pool.for_chunks(rows, [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<double> x(dims);
    for (std::int64_t i = begin; i < end; ++i) {
      embeddings.read(i, x.data());
      for (int c = 0; c < components; ++c) {
        double score = 0.0;
        for (int d = 0; d < dims; ++d) score += (x[d] - mean[d]) * axes[static_cast<std::size_t>(c) * dims + d];
        scores[i * components + c] = score;
      }
    }
  });
  return scores;
}

}  // namespace spatialprobe
