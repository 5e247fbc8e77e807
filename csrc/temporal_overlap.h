// T-mIoU and T-SR: how well clusters follow instances across the views of a scene.
#pragma once

#include <cstdint>

namespace spatialprobe {

enum class LabelType { uint8, uint16, int32, int64 };

// Integer labels [views, height, width], C-contiguous.
struct LabelMaps {
  const void* data;
  LabelType type;
  std::int64_t views, height, width;
};

struct TemporalOverlap {
  double miou;             // T-mIoU; NaN without instances
  double success_rate;     // T-SR; NaN without instances
  std::int64_t instances;  // how many the means are over
};

// Each true instance (any value of `truth` but `ignore`) is matched with the cluster (any value >= 0 of `predicted`) of
// the best IoU between masks OR-ed over the views; several may choose the same, and of equal ones the smallest label
// wins. T-mIoU is the mean over instances of the mean IoU over the views that show the instance; T-SR is the share of
// instances whose IoU is at least `threshold` in all of those. Coarser predictions are read as if upsampled to the
// truth by nearest neighbour (pixel y shows row floor(y * height / truth height)).
TemporalOverlap temporal_overlap(const LabelMaps& predicted, const LabelMaps& truth, std::int64_t ignore,
                                 double threshold);

}  // namespace spatialprobe
