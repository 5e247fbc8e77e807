// The Python face of the grouping: checks, allocates, releases the GIL, calls. Everything else lives in files that do
// not know Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "checks.h"
#include "hdbscan.h"
#include "kernels/kernels.h"
#include "principal_axes.h"
#include "temporal_overlap.h"

namespace py = pybind11;
using namespace spatialprobe;

namespace {

Metric metric_of(const std::string& name) {
  if (name == "euclidean") return Metric::euclidean;
  if (name == "cosine") return Metric::cosine;
  throw std::invalid_argument("metric: wanted euclidean or cosine, got " + name);
}

// A view of a C-contiguous float32 or float64 matrix; the caller keeps the array alive.
Embeddings embeddings_of(const py::array& array, Metric metric) {
  const bool single = py::isinstance<py::array_t<float>>(array);
  if (!single && !py::isinstance<py::array_t<double>>(array))
    throw std::invalid_argument("embeddings: wanted float32 or float64, got " +
                                py::str(array.dtype()).cast<std::string>());
  if (array.ndim() != 2)
    throw std::invalid_argument("embeddings: wanted 2 dimensions [N, D], got " + std::to_string(array.ndim()));
  if (!(array.flags() & py::array::c_style) || reinterpret_cast<std::uintptr_t>(array.data()) % array.itemsize() != 0)
    throw std::invalid_argument("embeddings: wanted an aligned C-contiguous array, got another layout");
  if (array.shape(1) > 1 << 20)
    throw std::invalid_argument("embeddings: wanted at most 2**20 columns, got " + std::to_string(array.shape(1)));
  return {array.data(), single, array.shape(0), static_cast<int>(array.shape(1)), metric};
}

Parameters parameters_of(std::int64_t min_cluster_size, std::int64_t min_samples, double epsilon,
                         std::int64_t max_cluster_size, double alpha, const std::string& method,
                         bool allow_single_cluster, const std::string& search, const std::string& instruction_set) {
  Parameters parameters;
  parameters.min_cluster_size = min_cluster_size;
  parameters.min_samples = min_samples;
  parameters.alpha = alpha;
  parameters.selection.epsilon = epsilon;
  parameters.selection.max_cluster_size = max_cluster_size;
  parameters.selection.allow_single_cluster = allow_single_cluster;
  if (method != "eom" && method != "leaf")
    throw std::invalid_argument("cluster_selection_method: wanted eom or leaf, got " + method);
  parameters.selection.method = method == "eom" ? SelectionMethod::excess_of_mass : SelectionMethod::leaf;
  if (search != "auto" && search != "prim" && search != "boruvka")
    throw std::invalid_argument("search: wanted auto, prim or boruvka, got " + search);
  parameters.search = search == "auto" ? Search::automatic : search == "prim" ? Search::prim : Search::boruvka;
  parameters.instruction_set = instruction_set;
  select_kernels(instruction_set);  // refuses here what this machine cannot run
  check_parameters(parameters);
  return parameters;
}

int checked_threads(int threads) {
  if (threads < 1 || threads > 4096)
    throw std::invalid_argument("threads: wanted 1 to 4096, got " + std::to_string(threads));
  return threads;
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  py::array_t<T> array(static_cast<py::ssize_t>(values.size()));
  if (!values.empty()) std::memcpy(array.mutable_data(), values.data(), values.size() * sizeof(T));
  return array;
}

py::tuple to_tuple(const Labelling& labelling) {
  return py::make_tuple(to_array(labelling.labels), to_array(labelling.probabilities));
}

py::tuple tree_of(const py::array& array, const std::string& metric, const Parameters& parameters, int threads) {
  const Embeddings embeddings = embeddings_of(array, metric_of(metric));
  SpanningTree tree;
  {
    const py::gil_scoped_release release;
    check_embeddings(embeddings);
    check_min_samples(parameters.min_samples, embeddings.rows);
    ThreadPool pool(threads);
    tree = spanning_tree(embeddings, parameters, pool);
  }
  const py::ssize_t edges = static_cast<py::ssize_t>(tree.edges.size());
  py::array_t<std::int64_t> ends({edges, py::ssize_t{2}});
  py::array_t<double> weights(edges);
  for (py::ssize_t i = 0; i < edges; ++i) {
    ends.mutable_at(i, 0) = tree.edges[i].a;
    ends.mutable_at(i, 1) = tree.edges[i].b;
    weights.mutable_at(i) = tree.edges[i].weight;
  }
  return py::make_tuple(ends, weights, to_array(tree.core));
}

using Ends = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
using Weights = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Sorted edges that span points 0..edges, checked: the tree code trusts them.
std::vector<Edge> edges_of(const Ends& ends, const Weights& weights) {
  if (ends.ndim() != 2 || ends.shape(1) != 2 || weights.ndim() != 1 || weights.shape(0) != ends.shape(0))
    throw std::invalid_argument("edges: wanted ends [M, 2] and weights [M], got other shapes");
  if (ends.shape(0) >= std::int64_t{1} << 30) throw std::invalid_argument("edges: wanted fewer than 2**30, got more");
  const std::int64_t points = ends.shape(0) + 1;
  std::vector<Edge> edges;
  edges.reserve(ends.shape(0));
  for (py::ssize_t i = 0; i < ends.shape(0); ++i) {
    const std::int64_t a = ends.at(i, 0), b = ends.at(i, 1);
    const double weight = weights.at(i);
    if (a < 0 || b < 0 || a >= points || b >= points || !(weight >= 0.0) || (i > 0 && weight < weights.at(i - 1)))
      throw std::invalid_argument("edges: wanted ends in [0, M] and weights >= 0 in ascending order, got others in " +
                                  ("row " + std::to_string(i)));
    edges.push_back({static_cast<Index>(a), static_cast<Index>(b), weight});
  }
  if (!spans(edges, static_cast<Index>(points)))
    throw std::invalid_argument("edges: wanted a spanning tree of M + 1 points, got a cycle");
  return edges;
}

LabelMaps label_maps_of(const py::array& array, const char* name, bool predicted) {
  if (array.ndim() != 3)
    throw std::invalid_argument(std::string(name) + ": wanted 3 dimensions [views, height, width], got " +
                                std::to_string(array.ndim()));
  if (!(array.flags() & py::array::c_style) || reinterpret_cast<std::uintptr_t>(array.data()) % array.itemsize() != 0)
    throw std::invalid_argument(std::string(name) + ": wanted an aligned C-contiguous array, got another layout");
  LabelMaps maps{array.data(), LabelType::int64, array.shape(0), array.shape(1), array.shape(2)};
  if (py::isinstance<py::array_t<std::int64_t>>(array)) return maps;
  maps.type = LabelType::int32;
  if (py::isinstance<py::array_t<std::int32_t>>(array)) return maps;
  maps.type = LabelType::uint16;
  if (!predicted && py::isinstance<py::array_t<std::uint16_t>>(array)) return maps;
  maps.type = LabelType::uint8;
  if (!predicted && py::isinstance<py::array_t<std::uint8_t>>(array)) return maps;
  throw std::invalid_argument(std::string(name) + ": wanted int32 or int64" + (predicted ? "" : ", uint16 or uint8") +
                              ", got " + py::str(array.dtype()).cast<std::string>());
}

}  // namespace

PYBIND11_MODULE(_grouping, m) {
  m.doc() = "Exact HDBSCAN, principal components and temporal overlap in C++; use spatialprobe.probes.grouping.";

  py::class_<Parameters>(m, "Parameters")
      .def(py::init(&parameters_of), py::kw_only(), py::arg("min_cluster_size"), py::arg("min_samples"),
           py::arg("cluster_selection_epsilon") = 0.0, py::arg("max_cluster_size") = 0, py::arg("alpha") = 1.0,
           py::arg("cluster_selection_method") = "eom", py::arg("allow_single_cluster") = false,
           py::arg("search") = "auto", py::arg("instruction_set") = "auto");

  m.def("instruction_sets", &available_instruction_sets, "The instruction sets this machine can run, best first.");

  m.def(
      "cluster",
      [](const py::array& array, const std::string& metric, const Parameters& parameters, int threads,
         bool check_samples) {
        const Embeddings embeddings = embeddings_of(array, metric_of(metric));
        checked_threads(threads);
        Labelling labelling;
        {
          const py::gil_scoped_release release;
          check_embeddings(embeddings);
          if (check_samples) check_min_samples(parameters.min_samples, embeddings.rows);
          ThreadPool pool(threads);
          labelling = cluster(embeddings, parameters, pool);
        }
        return to_tuple(labelling);
      },
      py::arg("embeddings"), py::arg("metric"), py::arg("parameters"), py::arg("threads"), py::arg("check_samples"),
      "Labels int64 [N] and probabilities float64 [N].");

  m.def(
      "cluster_batch",
      [](const std::vector<py::array>& arrays, const std::string& metric, const Parameters& parameters, int threads,
         bool check_samples) {
        std::vector<Embeddings> scenes;
        for (const py::array& array : arrays) scenes.push_back(embeddings_of(array, metric_of(metric)));
        checked_threads(threads);
        std::vector<Labelling> labellings;
        {
          const py::gil_scoped_release release;
          for (std::size_t i = 0; i < scenes.size(); ++i) {
            try {
              check_embeddings(scenes[i]);
              if (check_samples) check_min_samples(parameters.min_samples, scenes[i].rows);
            } catch (const std::invalid_argument& error) {
              throw std::invalid_argument("scene " + std::to_string(i) + ": " + error.what());
            }
          }
          labellings = cluster_batch(scenes, parameters, threads);
        }
        py::list results;
        for (const Labelling& labelling : labellings) results.append(to_tuple(labelling));
        return results;
      },
      py::arg("scenes"), py::arg("metric"), py::arg("parameters"), py::arg("threads"), py::arg("check_samples"),
      "One (labels, probabilities) per scene.");

  m.def(
      "spanning_tree",
      [](const py::array& array, const std::string& metric, const Parameters& parameters, int threads) {
        return tree_of(array, metric, parameters, checked_threads(threads));
      },
      py::arg("embeddings"), py::arg("metric"), py::arg("parameters"), py::arg("threads") = 1,
      "Ends int64 [N-1, 2] and weights float64 [N-1] of the canonical spanning tree, core distances float64 [N].");

  m.def(
      "labels_of_tree",
      [](const Ends& ends, const Weights& weights, const Parameters& parameters) {
        const std::vector<Edge> edges = edges_of(ends, weights);
        return to_tuple(labels_of_tree(edges, static_cast<Index>(edges.size() + 1), parameters));
      },
      py::arg("ends"), py::arg("weights"), py::arg("parameters"), "Labels and probabilities for sorted edges.");

  m.def(
      "principal_components",
      [](const py::array& array, int components, int threads) {
        const Embeddings embeddings = embeddings_of(array, Metric::euclidean);
        checked_threads(threads);
        std::vector<double> scores;
        {
          const py::gil_scoped_release release;
          check_embeddings(embeddings);
          check_components(components, embeddings);
          ThreadPool pool(threads);
          scores = principal_components(embeddings, components, pool);
        }
        return to_array(scores).reshape({embeddings.rows, static_cast<std::int64_t>(components)});
      },
      py::arg("embeddings"), py::arg("components"), py::arg("threads") = 1, "Scores float64 [N, components].");

  m.def(
      "temporal_overlap",
      [](const py::array& predicted_array, const py::array& truth_array, std::int64_t ignore, double threshold) {
        const LabelMaps predicted = label_maps_of(predicted_array, "predicted", true);
        const LabelMaps truth = label_maps_of(truth_array, "truth", false);
        TemporalOverlap overlap;
        {
          const py::gil_scoped_release release;
          check_label_maps(predicted, truth, threshold);
          overlap = temporal_overlap(predicted, truth, ignore, threshold);
        }
        return py::make_tuple(overlap.miou, overlap.success_rate, overlap.instances);
      },
      py::arg("predicted"), py::arg("truth"), py::arg("ignore"), py::arg("threshold"),
      "(T-mIoU, T-SR, number of instances).");
}
