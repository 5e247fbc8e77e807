#include "temporal_overlap.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace spatialprobe {
namespace {

constexpr std::size_t kMostPairs = std::size_t{1} << 27;  // 1 GB of counts

// Labels numbered in order of appearance; -1 for those that take no part.
class Numbering {
 public:
  template <typename TakesPart>
  std::int32_t number(std::int64_t label, const TakesPart& takes_part) {
    if (label == last_label_ && seen_any_) return last_number_;
    const auto [found, added] = numbers_.try_emplace(label, -1);
    if (added && takes_part(label)) {
      found->second = static_cast<std::int32_t>(labels_.size());
      labels_.push_back(label);
    }
    seen_any_ = true;
    last_label_ = label;
    return last_number_ = found->second;
  }
  const std::vector<std::int64_t>& labels() const { return labels_; }
  std::size_t size() const { return labels_.size(); }

 private:
  std::unordered_map<std::int64_t, std::int32_t> numbers_;
  std::vector<std::int64_t> labels_;
  std::int64_t last_label_ = 0;
  std::int32_t last_number_ = -1;
  bool seen_any_ = false;
};

// The scene as runs of pixels along a row over which no view changes.
struct Runs {
  std::vector<std::int64_t> length;
  std::vector<std::int32_t> cluster, instance;  // [runs, views], numbers or -1
  std::vector<std::int64_t> cluster_labels;
  std::size_t clusters = 0, instances = 0;
};

template <typename Predicted, typename Truth>
class RunReader {
 public:
  RunReader(const LabelMaps& predicted, const LabelMaps& truth, std::int64_t ignore)
      : predicted_(predicted),
        truth_(truth),
        ignore_(ignore),
        starts_(predicted.width),
        column_(truth.width),
        clusters_(truth.views),
        instances_(truth.views) {
    for (std::int64_t x = truth.width - 1; x >= 0; --x) {
      column_[x] = x * predicted.width / truth.width;
      starts_[column_[x]] = x;
    }
  }

  Runs read() {
    std::vector<char> changes(truth_.width);
    for (std::int64_t y = 0; y < truth_.height; ++y) {
      changes.assign(truth_.width, 0);
      for (std::int64_t view = 0; view < truth_.views; ++view) mark_changes(view, y, changes);
      std::int64_t start = 0;
      for (std::int64_t x = 1; x <= truth_.width; ++x) {
        if (x < truth_.width && !changes[x]) continue;
        add_run(y, start, x - start);
        start = x;
      }
    }
    runs_.cluster_labels = cluster_numbers_.labels();
    runs_.clusters = cluster_numbers_.size();
    runs_.instances = instance_numbers_.size();
    return std::move(runs_);
  }

 private:
  const Predicted* predicted_row(std::int64_t view, std::int64_t y) const {
    const std::int64_t row = y * predicted_.height / truth_.height;
    return static_cast<const Predicted*>(predicted_.data) + (view * predicted_.height + row) * predicted_.width;
  }
  const Truth* truth_row(std::int64_t view, std::int64_t y) const {
    return static_cast<const Truth*>(truth_.data) + (view * truth_.height + y) * truth_.width;
  }

  void mark_changes(std::int64_t view, std::int64_t y, std::vector<char>& changes) const {
    const Truth* truth = truth_row(view, y);
    const Predicted* predicted = predicted_row(view, y);
    char* change = changes.data();
    for (std::int64_t x = 1; x < truth_.width; ++x) change[x] |= static_cast<char>(truth[x] != truth[x - 1]);
    if (predicted_.width == truth_.width) {
      for (std::int64_t x = 1; x < truth_.width; ++x) change[x] |= static_cast<char>(predicted[x] != predicted[x - 1]);
      return;
    }
    for (std::int64_t c = 1; c < predicted_.width; ++c)
      change[starts_[c]] |= static_cast<char>(predicted[c] != predicted[c - 1]);
  }

  void add_run(std::int64_t y, std::int64_t x, std::int64_t length) {
    runs_.length.push_back(length);
    for (std::int64_t view = 0; view < truth_.views; ++view) {
      const std::int64_t predicted = static_cast<std::int64_t>(predicted_row(view, y)[column_[x]]);
      const std::int64_t truth = static_cast<std::int64_t>(truth_row(view, y)[x]);
      runs_.cluster.push_back(
          remembered(clusters_[view], predicted, cluster_numbers_, [](std::int64_t label) { return label >= 0; }));
      runs_.instance.push_back(remembered(instances_[view], truth, instance_numbers_,
                                          [this](std::int64_t label) { return label != ignore_; }));
    }
  }

  // A view mostly repeats its last label: look that up without hashing.
  struct Memory {
    std::int64_t label = 0;
    std::int32_t number = -2;
  };
  template <typename TakesPart>
  static std::int32_t remembered(Memory& memory, std::int64_t label, Numbering& numbers, const TakesPart& takes_part) {
    if (memory.number == -2 || memory.label != label) memory = {label, numbers.number(label, takes_part)};
    return memory.number;
  }

  const LabelMaps& predicted_;
  const LabelMaps& truth_;
  const std::int64_t ignore_;
  std::vector<std::int64_t> starts_;          // [predicted width] first pixel that shows the column
  std::vector<std::int64_t> column_;          // [truth width]
  std::vector<Memory> clusters_, instances_;  // [views]
  Numbering cluster_numbers_, instance_numbers_;
  Runs runs_;
};

// The different numbers >= 0 among a run's views.
int distinct(const std::int32_t* numbers, std::int64_t views, std::vector<std::int32_t>& out) {
  int count = 0;
  for (std::int64_t view = 0; view < views; ++view) {
    if (numbers[view] < 0) continue;
    bool seen = false;
    for (int k = 0; k < count; ++k) seen |= out[k] == numbers[view];
    if (!seen) out[count++] = numbers[view];
  }
  return count;
}

double ratio(std::int64_t shared, std::int64_t one, std::int64_t other) {
  return static_cast<double>(shared) / static_cast<double>(one + other - shared);
}

// For each instance the cluster of best IoU between masks OR-ed over the views; -1 without clusters.
std::vector<std::int32_t> match_instances(const Runs& runs, std::int64_t views) {
  if (runs.clusters * runs.instances > kMostPairs)
    throw std::invalid_argument("labels: wanted at most 2**27 pairs of a cluster and an instance, got " +
                                std::to_string(runs.clusters) + " clusters and " + std::to_string(runs.instances) +
                                " instances");
  std::vector<std::int64_t> shared(runs.clusters * runs.instances, 0);
  std::vector<std::int64_t> cluster_area(runs.clusters, 0), instance_area(runs.instances, 0);
  std::vector<std::int32_t> clusters(views), instances(views);
  for (std::size_t r = 0; r < runs.length.size(); ++r) {
    const int c = distinct(&runs.cluster[r * views], views, clusters);
    const int i = distinct(&runs.instance[r * views], views, instances);
    for (int k = 0; k < c; ++k) cluster_area[clusters[k]] += runs.length[r];
    for (int k = 0; k < i; ++k) {
      instance_area[instances[k]] += runs.length[r];
      std::int64_t* row = &shared[instances[k] * runs.clusters];
      for (int m = 0; m < c; ++m) row[clusters[m]] += runs.length[r];
    }
  }
  std::vector<std::int32_t> best(runs.instances, -1);
  for (std::size_t i = 0; i < runs.instances; ++i) {
    double best_ratio = -1.0;
    for (std::size_t c = 0; c < runs.clusters; ++c) {
      const double iou = ratio(shared[i * runs.clusters + c], instance_area[i], cluster_area[c]);
      const bool first = iou == best_ratio && runs.cluster_labels[c] < runs.cluster_labels[best[i]];
      if (iou > best_ratio || first) {
        best_ratio = iou;
        best[i] = static_cast<std::int32_t>(c);
      }
    }
  }
  return best;
}

TemporalOverlap score(const Runs& runs, const std::vector<std::int32_t>& match, std::int64_t views, double threshold) {
  const std::size_t v = static_cast<std::size_t>(views);
  std::vector<std::int64_t> shared(runs.instances * v, 0), instance_area(runs.instances * v, 0);
  std::vector<std::int64_t> cluster_area(runs.clusters * v, 0);
  for (std::size_t r = 0; r < runs.length.size(); ++r) {
    for (std::size_t view = 0; view < v; ++view) {
      const std::int32_t cluster = runs.cluster[r * v + view], instance = runs.instance[r * v + view];
      if (cluster >= 0) cluster_area[cluster * v + view] += runs.length[r];
      if (instance < 0) continue;
      instance_area[instance * v + view] += runs.length[r];
      if (cluster >= 0 && cluster == match[instance]) shared[instance * v + view] += runs.length[r];
    }
  }
  double miou = 0.0, success = 0.0;
  for (std::size_t i = 0; i < runs.instances; ++i) {
    double sum = 0.0, visible = 0.0;
    bool always = true;
    for (std::size_t view = 0; view < v; ++view) {
      if (instance_area[i * v + view] == 0) continue;
      const std::int64_t area = match[i] < 0 ? 0 : cluster_area[match[i] * v + view];
      const double iou = ratio(shared[i * v + view], instance_area[i * v + view], area);
      sum += iou;
      visible += 1.0;
      always = always && iou >= threshold;
    }
    miou += sum / visible;
    success += always ? 1.0 : 0.0;
  }
  const double instances = static_cast<double>(runs.instances);
  return {miou / instances, success / instances, static_cast<std::int64_t>(runs.instances)};
}

template <typename Predicted>
Runs read_runs(const LabelMaps& predicted, const LabelMaps& truth, std::int64_t ignore) {
  switch (truth.type) {
    case LabelType::uint8:
      return RunReader<Predicted, std::uint8_t>(predicted, truth, ignore).read();
    case LabelType::uint16:
      return RunReader<Predicted, std::uint16_t>(predicted, truth, ignore).read();
    case LabelType::int32:
      return RunReader<Predicted, std::int32_t>(predicted, truth, ignore).read();
    default:
      return RunReader<Predicted, std::int64_t>(predicted, truth, ignore).read();
  }
}

}  // namespace

TemporalOverlap temporal_overlap(const LabelMaps& predicted, const LabelMaps& truth, std::int64_t ignore,
                                 double threshold) {
  const Runs runs = predicted.type == LabelType::int32 ? read_runs<std::int32_t>(predicted, truth, ignore)
                                                       : read_runs<std::int64_t>(predicted, truth, ignore);
  if (runs.instances == 0) {
    const double none = std::numeric_limits<double>::quiet_NaN();
    return {none, none, 0};
  }
  return score(runs, match_instances(runs, truth.views), truth.views, threshold);
}

}  // namespace spatialprobe
