// Exercises every path of the grouping without Python, so that sanitizers see it all: prints what it checked, exits
// with 1 at the first difference. Results are compared with Prim's algorithm on all pairs.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "kernels/kernels.h"
#include "principal_axes.h"

using namespace spatialprobe;

namespace {

using Points = std::vector<float>;  // [rows, dims]

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

Embeddings view(const Points& points, int dims, Metric metric = Metric::euclidean) {
  return {points.data(), true, static_cast<std::int64_t>(points.size()) / dims, dims, metric};
}

Points blobs(int rows, int dims, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> centres(7 * dims);
  for (float& c : centres) c = 3.0f * normal(random);
  Points points;
  for (int i = 0; i < rows; ++i) {
    const int blob = static_cast<int>(random() % 7);
    const float spread = std::pow(10.0f, -0.5f * static_cast<float>(blob));
    for (int d = 0; d < dims; ++d) points.push_back(centres[blob * dims + d] + spread * normal(random));
  }
  return points;
}

Points lattice(int rows, int dims, unsigned seed) {
  std::mt19937 random(seed);
  Points points;
  for (int i = 0; i < rows * dims; ++i) points.push_back(static_cast<float>(random() % 4));
  return points;
}

bool equal(const SpanningTree& one, const SpanningTree& other) {
  bool same = one.core == other.core && one.edges.size() == other.edges.size();
  for (std::size_t i = 0; same && i < one.edges.size(); ++i)
    same = one.edges[i].a == other.edges[i].a && one.edges[i].b == other.edges[i].b &&
           one.edges[i].weight == other.edges[i].weight;
  return same;
}

void check_tree(const Points& points, int dims, Metric metric, std::int64_t min_samples, double alpha,
                const std::string& name) {
  const Embeddings embeddings = view(points, dims, metric);
  check_embeddings(embeddings);
  Parameters parameters;
  parameters.min_samples = min_samples;
  parameters.alpha = alpha;
  parameters.search = Search::prim;
  ThreadPool one(1), four(4);
  const SpanningTree expected = spanning_tree(embeddings, parameters, one);
  parameters.search = Search::boruvka;
  for (const std::string& set : available_instruction_sets()) {
    parameters.instruction_set = set;
    require(equal(spanning_tree(embeddings, parameters, one), expected), name + " on " + set);
    require(equal(spanning_tree(embeddings, parameters, four), expected), name + " on " + set + " with four threads");
  }
  for (const SelectionMethod method : {SelectionMethod::excess_of_mass, SelectionMethod::leaf}) {
    for (const bool single : {false, true}) {
      parameters.selection = {method, 0.3, 100, single};
      const Labelling labelling = labels_of_tree(expected.edges, static_cast<Index>(embeddings.rows), parameters);
      for (double p : labelling.probabilities) require(p >= 0.0 && p <= 1.0, name + ": a probability outside [0, 1]");
    }
  }
  std::printf("%s: %lld points, %zu edges\n", name.c_str(), static_cast<long long>(embeddings.rows),
              expected.edges.size());
}

void check_batch() {
  std::vector<Points> points;
  std::vector<Embeddings> scenes;
  for (int i = 0; i < 9; ++i) points.push_back(blobs(50 + 170 * i, 8, static_cast<unsigned>(i)));
  for (const Points& scene : points) scenes.push_back(view(scene, 8));
  const Parameters parameters;
  const std::vector<Labelling> together = cluster_batch(scenes, parameters, 4);
  ThreadPool pool(2);
  for (std::size_t i = 0; i < scenes.size(); ++i)
    require(cluster(scenes[i], parameters, pool).labels == together[i].labels, "a batch equals scene by scene");
  std::printf("batch: %zu scenes\n", scenes.size());
}

void check_pool_passes_exceptions_on() {
  ThreadPool pool(4);
  bool caught = false;
  try {
    pool.for_each(1000, [](std::int64_t i, int) {
      if (i == 500) throw std::runtime_error("500");
    });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  require(caught, "an exception of a task reaches the caller");
  std::atomic<int> done{0};
  pool.for_each(1000, [&](std::int64_t, int) { ++done; });
  require(done == 1000, "the pool works after an exception");
}

void check_overlap_and_components() {
  std::vector<std::int64_t> predicted(3 * 4 * 5);
  std::vector<std::uint16_t> truth(3 * 8 * 15);
  std::mt19937 random(0);
  for (std::int64_t& label : predicted) label = static_cast<std::int64_t>(random() % 5) - 1;
  for (std::uint16_t& id : truth) id = static_cast<std::uint16_t>(random() % 4);
  const LabelMaps coarse{predicted.data(), LabelType::int64, 3, 4, 5}, fine{truth.data(), LabelType::uint16, 3, 8, 15};
  check_label_maps(coarse, fine, 0.5);
  const TemporalOverlap overlap = temporal_overlap(coarse, fine, 0, 0.5);
  require(overlap.instances == 3 && overlap.miou > 0.0 && overlap.miou < 1.0, "overlap of random labels");
  const Points points = blobs(500, 20, 1);
  ThreadPool one(1), four(4);
  require(principal_components(view(points, 20), 8, one) == principal_components(view(points, 20), 8, four),
          "components do not depend on threads");
}

}  // namespace

int main() {
  for (const int dims : {1, 2, 7, 8, 9, 15, 16, 33}) {
    check_tree(blobs(1000, dims, 1), dims, Metric::euclidean, 5, 1.0, "blobs D=" + std::to_string(dims));
    check_tree(lattice(700, dims, 2), dims, Metric::euclidean, 5, 1.0, "lattice D=" + std::to_string(dims));
  }
  check_tree(blobs(900, 12, 3), 12, Metric::cosine, 5, 1.3, "cosine");
  check_tree(blobs(900, 12, 4), 12, Metric::euclidean, 1, 0.7, "alpha");
  check_tree(blobs(900, 20, 5), 20, Metric::euclidean, 40, 1.0, "min_samples=40");
  check_tree(Points(300, 1.0f), 3, Metric::euclidean, 5, 1.0, "equal rows");
  check_tree(Points(2, 1.0f), 1, Metric::euclidean, 5, 1.0, "two rows");
  check_batch();
  check_pool_passes_exceptions_on();
  check_overlap_and_components();
  std::printf("all equal on");
  for (const std::string& set : available_instruction_sets()) std::printf(" %s", set.c_str());
  std::printf("\n");
}
