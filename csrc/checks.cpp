#include "checks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace spatialprobe {
namespace {

constexpr double kLargest = 1e150;
constexpr std::int64_t kMostRows = std::int64_t{1} << 30;

template <typename Wanted, typename Got>
[[noreturn]] void refuse(const char* what, const Wanted& wanted, const Got& got) {
  std::ostringstream message;
  message << what << ": wanted " << wanted << ", got " << got;
  throw std::invalid_argument(message.str());
}

bool is_bad(float x) { return !(std::fabs(x) <= std::numeric_limits<float>::max()); }
bool is_bad(double x) { return !(std::fabs(x) <= kLargest); }

// The first row with a value that is not finite or too large, or -1. Counts whole chunks, which vectorises, before it
// looks for the row.
template <typename Scalar>
std::int64_t first_bad_row(const Scalar* x, std::int64_t rows, int dims) {
  constexpr std::int64_t kChunk = 4096;
  const std::int64_t size = rows * dims;
  for (std::int64_t begin = 0; begin < size; begin += kChunk) {
    const std::int64_t end = std::min(size, begin + kChunk);
    int bad = 0;
    for (std::int64_t i = begin; i < end; ++i) bad += is_bad(x[i]) ? 1 : 0;
    for (std::int64_t i = begin; bad > 0 && i < end; ++i)
      if (is_bad(x[i])) return i / dims;
  }
  return -1;
}

void refuse_row(const Embeddings& embeddings, std::int64_t row) {
  for (int d = 0; d < embeddings.dims; ++d) {
    const std::int64_t at = row * embeddings.dims + d;
    const double value = embeddings.single ? static_cast<double>(static_cast<const float*>(embeddings.data)[at])
                                           : static_cast<const double*>(embeddings.data)[at];
    if (!is_bad(value)) continue;
    std::ostringstream got;
    got << (std::isnan(value)   ? "NaN"
            : std::isinf(value) ? "infinity (inf)"
                                : "a larger value")
        << " first in row " << row << ", column " << d;
    refuse("embeddings", "finite values of at most 1e150", got.str());
  }
}

std::string shape(const LabelMaps& maps) {
  std::ostringstream text;
  text << "[" << maps.views << ", " << maps.height << ", " << maps.width << "]";
  return text.str();
}

}  // namespace

void check_embeddings(const Embeddings& embeddings) {
  if (embeddings.rows < 1) refuse("embeddings", "at least 1 row", "0 rows");
  if (embeddings.dims < 1) {
    std::ostringstream message;  // scikit-learn's estimator checks look for this wording
    message << "embeddings: 0 feature(s) (shape=(" << embeddings.rows << ", 0)) while a minimum of 1 is required.";
    throw std::invalid_argument(message.str());
  }
  if (embeddings.rows > kMostRows) refuse("embeddings", "at most 2**30 rows", embeddings.rows);
  const std::int64_t bad =
      embeddings.single ? first_bad_row(static_cast<const float*>(embeddings.data), embeddings.rows, embeddings.dims)
                        : first_bad_row(static_cast<const double*>(embeddings.data), embeddings.rows, embeddings.dims);
  if (bad >= 0) refuse_row(embeddings, bad);
  if (embeddings.metric != Metric::cosine) return;
  Embeddings raw = embeddings;
  raw.metric = Metric::euclidean;
  std::vector<double> x(raw.dims);
  for (std::int64_t row = 0; row < raw.rows; ++row) {
    raw.read(row, x.data());
    if (!(raw.squared_norm(x.data()) >= 1e-290))
      refuse("embeddings", "rows of norm above 1e-145 for the cosine metric",
             "a smaller norm first in row " + std::to_string(row));
  }
}

void check_parameters(const Parameters& parameters) {
  const Selection& selection = parameters.selection;
  if (parameters.min_cluster_size < 2) refuse("min_cluster_size", "at least 2", parameters.min_cluster_size);
  if (parameters.min_samples < 1) refuse("min_samples", "at least 1", parameters.min_samples);
  if (!(parameters.alpha >= 1e-100 && parameters.alpha <= 1e100))
    refuse("alpha", "a number in [1e-100, 1e100]", parameters.alpha);
  if (!(selection.epsilon >= 0.0 && std::isfinite(selection.epsilon)))
    refuse("cluster_selection_epsilon", "a finite number >= 0", selection.epsilon);
  if (selection.max_cluster_size < 0) refuse("max_cluster_size", "at least 1, or None", selection.max_cluster_size);
}

void check_min_samples(std::int64_t min_samples, std::int64_t rows) {
  if (min_samples > rows)
    refuse("min_samples", "at most the number of rows (" + std::to_string(rows) + ")", min_samples);
}

void check_components(int components, const Embeddings& embeddings) {
  if (components < 1 || components > embeddings.dims || components > embeddings.rows)
    refuse("components",
           "1 to the smaller of rows (" + std::to_string(embeddings.rows) + ") and columns (" +
               std::to_string(embeddings.dims) + ")",
           components);
}

void check_label_maps(const LabelMaps& predicted, const LabelMaps& truth, double threshold) {
  if (truth.views < 1 || truth.height < 1 || truth.width < 1)
    refuse("truth", "[views, height, width] with nothing empty", shape(truth));
  if (predicted.views != truth.views || predicted.height < 1 || predicted.width < 1 ||
      predicted.height > truth.height || predicted.width > truth.width)
    refuse("predicted", "the truth's views and a grid no finer than its own, " + shape(truth), shape(predicted));
  if (!(threshold >= 0.0 && threshold <= 1.0)) refuse("threshold", "a number in [0, 1]", threshold);
}

}  // namespace spatialprobe
