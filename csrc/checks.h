// The door: whatever passes here cannot crash or silently mislead what lies behind. Throws std::invalid_argument, which
// Python sees as ValueError, saying what was wanted and what came.
#pragma once

#include "embeddings.h"
#include "hdbscan.h"
#include "temporal_overlap.h"

namespace spatialprobe {

// At least one row and one column, all finite and below 1e150 (whose square is finite), no zero row under cosine.
void check_embeddings(const Embeddings& embeddings);

void check_parameters(const Parameters& parameters);

// An explicit min_samples may not exceed the rows.
void check_min_samples(std::int64_t min_samples, std::int64_t rows);

void check_components(int components, const Embeddings& embeddings);

// Equal views, nothing empty, predictions no finer than the truth.
void check_label_maps(const LabelMaps& predicted, const LabelMaps& truth, double threshold);

}  // namespace spatialprobe
