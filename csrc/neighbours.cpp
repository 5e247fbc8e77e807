#include "neighbours.h"

#include <limits>
#include <stdexcept>
#include <utility>

namespace spatialprobe {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kShortListReach = kShortList - 1;  // min_samples for which a float32 list of eight can be certified
constexpr int kWidestList = 32;                  // above this, Boruvka's searches find what the lists lack

using Candidate = std::pair<double, Index>;  // (distance, point), ordered

// What one thread needs to search for one tile's points.
struct Workspace {
  explicit Workspace(const Tiles& tiles) : box_bounds(tiles.padded_count), hits(kBlock * kTile) {}

  std::vector<float> box_bounds;
  std::vector<std::pair<float, int>> order;  // (bound, tile), nearest first
  std::vector<Hit> hits;
  std::vector<std::vector<Candidate>> heaps{kBlock};
  alignas(64) float list_distance[kTile * kShortList] = {};
  alignas(64) std::int32_t list_index[kTile * kShortList] = {};
  alignas(64) float box_limits[kTile] = {};  // per lane: how far (squared) a box may be; -1 for lanes not searching
};

class Search {
 public:
  Search(const Tiles& tiles, const std::vector<char>& crowded, Index min_samples, const Kernels& kernels,
         Neighbours& out)
      : tiles_(tiles),
        crowded_(crowded),
        min_samples_(min_samples),
        kernels_(kernels),
        forms_(tiles.forms(kernels)),
        out_(out) {}

  void run(int tile, Workspace& work) const {
    int lanes[kTile], unsettled = 0;
    const int points = static_cast<int>(tiles_.end(tile) - tiles_.begin(tile));
    if (min_samples_ <= kShortListReach) {
      fill_short_lists(tile, work);
      for (int lane = 0; lane < points; ++lane)
        if (!settle(tiles_.begin(tile) + lane, &work.list_distance[lane * kShortList],
                    &work.list_index[lane * kShortList]))
          lanes[unsettled++] = lane;
    } else {
      for (; unsettled < points; ++unsettled) lanes[unsettled] = unsettled;
    }
    for (int i = 0; i < unsettled; i += kBlock) search_exactly(tile, lanes + i, std::min(kBlock, unsettled - i), work);
  }

 private:
  // Float32 lists of the eight nearest of each of the tile's points.
  void fill_short_lists(int tile, Workspace& work) const {
    std::fill_n(work.list_distance, kTile * kShortList, kFar);
    std::fill_n(work.list_index, kTile * kShortList, -1);
    int lanes[kTile];
    float limits[kBlock];
    const int points = static_cast<int>(tiles_.end(tile) - tiles_.begin(tile));
    for (int lane = 0; lane < points; ++lane) lanes[lane] = lane;
    for (int i = 0; i < points; i += kBlock) {
      const int queries = std::min(kBlock, points - i);
      forms_.first_limits(lanes + i, queries, tiles_.tile(tile), tiles_.dims, limits);
      const int found = forms_.closer(tiles_.tile(tile), lanes + i, limits, queries, tiles_.tile(tile), tiles_.dims,
                                      work.hits.data());
      keep_others(found, lanes + i, tiles_.begin(tile), work);
    }
    std::fill_n(work.box_limits, kTile, -1.0f);
    for (int lane = 0; lane < points; ++lane) work.box_limits[lane] = list_box_limit(lane, work);
    sort_tiles_by_bound(tile, work);
    float widest = 0.0f;
    for (std::size_t i = 0; i < work.order.size(); ++i) {
      if (i % 4 == 0) widest = widest_limit(work.box_limits);
      if (work.order[i].first > widest) break;
      const int other = work.order[i].second;
      if (other == tile) continue;
      const int near = near_lanes(tile, other, work, lanes);
      for (int q = 0; q < near; q += kBlock)
        extend_short_lists(tile, other, lanes + q, std::min(kBlock, near - q), work);
    }
  }

  // Enters the hits of a tile's points in their own tile, but for a point with itself.
  void keep_others(int found, const int* lanes, Index first, Workspace& work) const {
    int kept = 0;
    for (int h = 0; h < found; ++h)
      if (work.hits[h].lane != lanes[work.hits[h].query]) work.hits[kept++] = work.hits[h];
    kernels_.keep(work.hits.data(), kept, lanes, first, work.list_distance, work.list_index);
  }

  void extend_short_lists(int tile, int other, const int* lanes, int queries, Workspace& work) const {
    float limits[kBlock];
    for (int q = 0; q < queries; ++q) limits[q] = work.list_distance[lanes[q] * kShortList + kShortList - 1];
    const int found =
        forms_.closer(tiles_.tile(tile), lanes, limits, queries, tiles_.tile(other), tiles_.dims, work.hits.data());
    if (found == 0) return;
    kernels_.keep(work.hits.data(), found, lanes, tiles_.begin(other), work.list_distance, work.list_index);
    for (int q = 0; q < queries; ++q) work.box_limits[lanes[q]] = list_box_limit(lanes[q], work);
  }

  // How far a box may be that could still hold one of the lane's eight nearest.
  float list_box_limit(int lane, const Workspace& work) const {
    const float last = work.list_distance[lane * kShortList + kShortList - 1];
    return last < kFar ? tiles_.bounds.box_limit_of_stored(last) : kFar;
  }

  void sort_tiles_by_bound(int tile, Workspace& work) const {
    kernels_.box_distances(tiles_.low_by_dim.data(), tiles_.high_by_dim.data(), tiles_.box_dims, tiles_.padded_count,
                           tiles_.box_low(tile), tiles_.box_high(tile), work.box_bounds.data());
    const float widest = widest_limit(work.box_limits);
    work.order.clear();
    for (int t = 0; t < tiles_.count; ++t)
      if (work.box_bounds[t] <= widest) work.order.emplace_back(work.box_bounds[t], t);
    std::sort(work.order.begin(), work.order.end());
  }

  int near_lanes(int tile, int other, const Workspace& work, int* lanes) const {
    int near = 0;
    for (std::uint64_t set = kernels_.lanes_near_box(tiles_.box_points(tile), tiles_.box_dims, tiles_.box_low(other),
                                                     tiles_.box_high(other), work.box_limits);
         set != 0; set &= set - 1)
      lanes[near++] = __builtin_ctzll(set);
    return near;
  }

  // Turns a float32 list into the exact result if it certainly holds it.
  bool settle(Index p, const float* squared, const std::int32_t* indices) const {
    int listed = 0;
    while (listed < kShortList && indices[listed] >= 0) ++listed;
    double exact[kShortList];
    tiles_.exact_squared(kernels_, p, indices, listed, exact);
    Candidate list[kShortList];
    for (int i = 0; i < listed; ++i) {  // float32 has them almost in order
      const Candidate candidate{distance_from_squared(tiles_.metric, exact[i]), indices[i]};
      int at = i;
      for (; at > 0 && candidate < list[at - 1]; --at) list[at] = list[at - 1];
      list[at] = candidate;
    }
    const double beyond = listed == kShortList
                              ? distance_at_radius(tiles_.metric, tiles_.bounds.certain(squared[kShortList - 1]))
                              : kInfinity;
    return settle(p, list, listed, beyond);
  }

  // Writes the neighbours and core distance of p, unless a point not listed might change the core distance.
  bool settle(Index p, const Candidate* list, int listed, double beyond) const {
    double core = crowded_[p] ? 0.0 : kInfinity;
    for (int i = 0; i < listed && core == kInfinity; ++i)
      if (i + 1 == min_samples_ || crowded_[list[i].second]) core = list[i].first;
    if (core > beyond || core == kInfinity) return false;
    out_.core[p] = core;
    out_.beyond[p] = beyond;
    const std::size_t at = static_cast<std::size_t>(p) * out_.width;
    for (int i = 0; i < std::min(listed, out_.width); ++i) {
      out_.index[at + i] = list[i].second;
      out_.distance[at + i] = list[i].first;
    }
    return true;
  }

  // For points that a short list cannot settle (ties at its end, distances below float32's grain) and for long lists:
  // every candidate is measured in float64 and a heap keeps the nearest.
  void search_exactly(int tile, const int* lanes, int queries, Workspace& work) const {
    const std::size_t wanted = std::max<std::size_t>(min_samples_, out_.width) + 1;
    std::fill_n(work.box_limits, kTile, -1.0f);
    for (int q = 0; q < queries; ++q) {
      work.heaps[q].clear();
      work.box_limits[lanes[q]] = kFar;
    }
    sort_tiles_by_bound(tile, work);
    float widest = kFar;
    for (std::size_t i = 0; i < work.order.size() && work.order[i].first <= widest; ++i) {
      const int other = work.order[i].second;
      int near[kTile];
      const int found = near_lanes(tile, other, work, near);
      if (found == 0) continue;
      extend_heaps(tile, other, lanes, queries, wanted, work);
      for (int q = 0; q < queries; ++q)
        if (work.heaps[q].size() == wanted)
          work.box_limits[lanes[q]] = tiles_.bounds.box_limit(radius_of(tiles_.metric, work.heaps[q].front().first));
      widest = widest_limit(work.box_limits);
    }
    for (int q = 0; q < queries; ++q) {
      std::vector<Candidate>& heap = work.heaps[q];
      std::sort_heap(heap.begin(), heap.end());
      // The heap holds one more than is kept: whatever it dropped is no nearer than that one.
      const double beyond = heap.size() == wanted ? heap.back().first : kInfinity;
      const int listed = static_cast<int>(std::min(heap.size(), wanted - 1));
      const Index p = tiles_.begin(tile) + lanes[q];
      if (!settle(p, heap.data(), listed, beyond)) throw std::logic_error("a complete search left a point unsettled");
      if (listed > out_.width) out_.beyond[p] = heap[out_.width].first;
    }
  }

  void extend_heaps(int tile, int other, const int* lanes, int queries, std::size_t wanted, Workspace& work) const {
    float limits[kBlock];
    for (int q = 0; q < queries; ++q)
      limits[q] = work.heaps[q].size() < wanted
                      ? kFar
                      : tiles_.bounds.limit(radius_of(tiles_.metric, work.heaps[q].front().first));
    const int found =
        forms_.closer(tiles_.tile(tile), lanes, limits, queries, tiles_.tile(other), tiles_.dims, work.hits.data());
    for (int h = 0; h < found; ++h) {
      const Index p = tiles_.begin(tile) + lanes[work.hits[h].query];
      const Index neighbour = tiles_.begin(other) + work.hits[h].lane;
      if (neighbour == p) continue;
      std::vector<Candidate>& heap = work.heaps[work.hits[h].query];
      const Candidate candidate{tiles_.distance(p, neighbour), neighbour};
      if (heap.size() == wanted) {
        if (!(candidate < heap.front())) continue;
        std::pop_heap(heap.begin(), heap.end());
        heap.pop_back();
      }
      heap.push_back(candidate);
      std::push_heap(heap.begin(), heap.end());
    }
  }

  const Tiles& tiles_;
  const std::vector<char>& crowded_;
  const Index min_samples_;
  const Kernels& kernels_;
  const TileKernels& forms_;
  Neighbours& out_;
};

}  // namespace

Neighbours find_neighbours(const Tiles& tiles, const std::vector<char>& crowded, Index min_samples,
                           const Kernels& kernels, ThreadPool& pool) {
  Neighbours out;
  out.width = min_samples <= kShortListReach ? kShortList : std::min((min_samples + 10) / 8 * 8, kWidestList);
  const std::size_t entries = static_cast<std::size_t>(tiles.points) * out.width;
  out.index.assign(entries, -1);
  out.distance.resize(entries);
  out.beyond.resize(tiles.points);
  out.core.resize(tiles.points);
  std::vector<Workspace> workspaces(pool.threads(), Workspace(tiles));
  const Search search(tiles, crowded, min_samples, kernels, out);
  pool.for_each(tiles.count,
                [&](std::int64_t tile, int worker) { search.run(static_cast<int>(tile), workspaces[worker]); });
  return out;
}

}  // namespace spatialprobe
