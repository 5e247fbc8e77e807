#include "boruvka.h"

#include <atomic>
#include <limits>
#include <utility>

#include "disjoint_sets.h"

namespace spatialprobe {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kRefresh = 8;  // tiles searched between looks at what other points have found meanwhile

void lower(std::atomic<double>& bound, double weight) {
  double seen = bound.load(std::memory_order_relaxed);
  while (weight < seen && !bound.compare_exchange_weak(seen, weight, std::memory_order_relaxed)) {
  }
}

struct Workspace {
  explicit Workspace(const Tiles& tiles) : box_bounds(tiles.padded_count), hits(kBlock * kTile) {}

  std::vector<float> box_bounds;
  std::vector<std::pair<float, int>> order;
  std::vector<Hit> hits;
  alignas(64) float box_limits[kTile] = {};
};

// What is known of the edges that leave a point's component there.
struct Frontier {
  Index nearest = -1;          // the far end of the least one, if certain
  Index candidate = -1;        // the far end of the least one seen this round
  double weight = kInfinity;   // of the candidate
  double at_least = 0.0;       // none is lighter, this round or later
  bool listed_inside = false;  // every listed neighbour is in the point's component by now
};

class Boruvka {
 public:
  Boruvka(const Tiles& tiles, const Neighbours& neighbours, double alpha, const Kernels& kernels, ThreadPool& pool)
      : tiles_(tiles),
        neighbours_(neighbours),
        alpha_(alpha),
        kernels_(kernels),
        forms_(tiles.forms(kernels)),
        pool_(pool),
        sets_(tiles.points),
        components_(tiles.points),
        frontier_(tiles.points),
        open_(tiles.points, 0),
        bounds_(tiles.points),
        component_(static_cast<std::size_t>(tiles.count) * kTile, -1),
        tile_component_(tiles.count),
        stored_core_(static_cast<std::size_t>(tiles.count) * kTile, 2.0f * kFar),
        tile_core_(tiles.count, 2.0f * kFar),
        size_(tiles.points),
        least_(tiles.points, -1),
        workspaces_(pool.threads(), Workspace(tiles)) {
    store_cores();
  }

  std::vector<Edge> run() {
    edges_.reserve(tiles_.points);
    join_nearest_listed();
    while (components_ > 1) {
      label_components();
      offer_known_edges();
      search();
      join_least_edges();
    }
    return std::move(edges_);
  }

 private:
  double weight(Index p, Index q, double distance) const {
    return std::max({neighbours_.core[p], neighbours_.core[q], distance / alpha_});
  }

  // Canonical order of the edges (p, q) and (r, s).
  bool lighter(double pq, Index p, Index q, double rs, Index r, Index s) const {
    if (pq != rs) return pq < rs;
    return make_edge(tiles_.row[p], tiles_.row[q], pq) < make_edge(tiles_.row[r], tiles_.row[s], rs);
  }

  void consider(Index p, Index q, double weight) {
    Frontier& f = frontier_[p];
    if (f.candidate < 0 || lighter(weight, p, q, f.weight, p, f.candidate)) {
      f.candidate = q;
      f.weight = weight;
    }
  }

  void join(Index p, Index q, double weight) {
    if (!sets_.join(p, q)) return;
    edges_.push_back(make_edge(tiles_.row[p], tiles_.row[q], weight));
    --components_;
  }

  // Core distances as the kernels compare them: squared, stored units, with alpha, rounded down.
  void store_cores() {
    pool_.for_each(tiles_.count, [&](std::int64_t t, int) {
      for (Index p = tiles_.begin(static_cast<int>(t)); p < tiles_.end(static_cast<int>(t)); ++p) {
        const double reach = radius_of(tiles_.metric, neighbours_.core[p] * alpha_) * tiles_.bounds.scale;
        stored_core_[p] = static_cast<float>(std::min(reach * reach, 1e29) * (1.0 - 1e-6));
        tile_core_[t] = std::min(tile_core_[t], stored_core_[p]);
      }
    });
  }

  // Considers the listed neighbours outside p's component. Every edge to a point that is not listed weighs at least
  // `beyond`; a listed one is certainly the least if it is lighter (if equal, an unlisted one might come first).
  void consider_listed(Index p) {
    Frontier& f = frontier_[p];
    if (f.listed_inside) return;
    const Index* neighbour = neighbours_.indices_of(p);
    const double* distance = neighbours_.distances_of(p);
    for (int k = 0; k < neighbours_.width && neighbour[k] >= 0; ++k) {
      if (distance[k] / alpha_ > f.weight) break;  // as are all that follow
      if (component_[neighbour[k]] != component_[p]) consider(p, neighbour[k], weight(p, neighbour[k], distance[k]));
    }
    f.listed_inside = f.candidate < 0;
    const double core = neighbours_.core[p], beyond = neighbours_.beyond[p] / alpha_;
    f.at_least = std::max({f.at_least, core, std::min(f.weight, beyond)});
    if (f.candidate >= 0 && f.weight < beyond) f.nearest = f.candidate;
  }

  void join_nearest_listed() {
    pool_.for_chunks(tiles_.points, [&](Index begin, Index end, int) {
      for (Index p = begin; p < end; ++p) component_[p] = p;
    });
    pool_.for_chunks(tiles_.points, [&](Index begin, Index end, int) {
      for (Index p = begin; p < end; ++p) consider_listed(p);
    });
    for (Index p = 0; p < tiles_.points; ++p)
      if (frontier_[p].nearest >= 0) join(p, frontier_[p].nearest, frontier_[p].weight);
  }

  void label_components() {
    std::fill(size_.begin(), size_.end(), 0);
    for (Index p = 0; p < tiles_.points; ++p) ++size_[component_[p] = sets_.find(p)];
    largest_ = static_cast<Index>(std::max_element(size_.begin(), size_.end()) - size_.begin());
    for (int t = 0; t < tiles_.count; ++t) {
      const Index first = component_[tiles_.begin(t)];
      const bool whole =
          std::all_of(&component_[tiles_.begin(t)], &component_[tiles_.begin(t)] + (tiles_.end(t) - tiles_.begin(t)),
                      [&](Index c) { return c == first; });
      tile_component_[t] = whole ? first : -1;
    }
    for (Index p = 0; p < tiles_.points; ++p)
      if (component_[p] == p) bounds_[p].store(kInfinity, std::memory_order_relaxed);
  }

  // Every point offers the least edge it knows of as a bound to both ends' components. The largest component never
  // searches: the others join something all the same, and it is most of the points in the last rounds.
  void offer_known_edges() {
    pool_.for_chunks(tiles_.points, [&](Index begin, Index end, int) {
      for (Index p = begin; p < end; ++p) {
        if (component_[p] == largest_) continue;
        Frontier& f = frontier_[p];
        if (f.nearest >= 0 && component_[f.nearest] != component_[p]) {
          f.candidate = f.nearest;
        } else {
          f.nearest = f.candidate = -1;
          f.weight = kInfinity;
          consider_listed(p);
        }
        if (f.candidate < 0) continue;
        lower(bounds_[component_[p]], f.weight);
        lower(bounds_[component_[f.candidate]], f.weight);
      }
    });
  }

  // The heaviest edge that p still has to look for.
  double bound_of(Index p) const {
    return std::min(bounds_[component_[p]].load(std::memory_order_relaxed), frontier_[p].weight);
  }

  void search() {
    std::vector<int> tiles;
    for (int t = 0; t < tiles_.count; ++t) {
      bool any = false;
      for (Index p = tiles_.begin(t); p < tiles_.end(t); ++p) {
        const Frontier& f = frontier_[p];
        open_[p] = component_[p] != largest_ && f.nearest < 0 && f.at_least <= bound_of(p);
        any |= open_[p] != 0;
      }
      if (any) tiles.push_back(t);
    }
    pool_.for_each(static_cast<std::int64_t>(tiles.size()),
                   [&](std::int64_t i, int worker) { search_from(tiles[i], workspaces_[worker]); });
  }

  void search_from(int tile, Workspace& work) {
    refresh_box_limits(tile, work);
    sort_tiles_by_bound(tile, work);
    float widest = 0.0f;
    for (std::size_t i = 0; i < work.order.size(); ++i) {
      if (i % kRefresh == 0) {
        refresh_box_limits(tile, work);
        widest = widest_limit(work.box_limits);
      }
      if (work.order[i].first > widest) break;
      const int other = work.order[i].second;
      int lanes[kTile], near = 0;
      for (std::uint64_t set = kernels_.lanes_near_box(tiles_.box_points(tile), tiles_.box_dims, tiles_.box_low(other),
                                                       tiles_.box_high(other), work.box_limits);
           set != 0; set &= set - 1) {
        const int lane = __builtin_ctzll(set);
        if (component_[tiles_.begin(tile) + lane] != tile_component_[other] &&
            tile_core_[other] <= work.box_limits[lane])
          lanes[near++] = lane;
      }
      for (int q = 0; q < near; q += kBlock) search_pair(tile, other, lanes + q, std::min(kBlock, near - q), work);
    }
  }

  // How far a box may be for each lane that still searches; -1 for the others.
  void refresh_box_limits(int tile, Workspace& work) const {
    std::fill_n(work.box_limits, kTile, -1.0f);
    for (Index p = tiles_.begin(tile); p < tiles_.end(tile); ++p) {
      if (!open_[p]) continue;
      const double bound = bound_of(p);
      if (frontier_[p].at_least <= bound)
        work.box_limits[p - tiles_.begin(tile)] = tiles_.bounds.box_limit(radius_of(tiles_.metric, bound * alpha_));
    }
  }

  void sort_tiles_by_bound(int tile, Workspace& work) const {
    // Often few of the tile's points still search: their own box is much smaller than the tile's.
    float low[kMaxBoxDims], high[kMaxBoxDims];
    for (int d = 0; d < tiles_.box_dims; ++d) {
      low[d] = kFar;
      high[d] = -kFar;
      const float* x = tiles_.box_points(tile) + d * kTile;
      for (int lane = 0; lane < kTile; ++lane) {
        if (work.box_limits[lane] < 0.0f) continue;
        low[d] = std::min(low[d], x[lane]);
        high[d] = std::max(high[d], x[lane]);
      }
    }
    kernels_.box_distances(tiles_.low_by_dim.data(), tiles_.high_by_dim.data(), tiles_.box_dims, tiles_.padded_count,
                           low, high, work.box_bounds.data());
    const float widest = widest_limit(work.box_limits);
    const Index own = tile_component_[tile];
    work.order.clear();
    for (int t = 0; t < tiles_.count; ++t) {
      const float bound = std::max(work.box_bounds[t], tile_core_[t]);
      if (bound <= widest && (own < 0 || tile_component_[t] != own)) work.order.emplace_back(bound, t);
    }
    std::sort(work.order.begin(), work.order.end());
  }

  void search_pair(int tile, int other, const int* lanes, int queries, Workspace& work) {
    float limits[kBlock];
    Index components[kBlock];
    for (int q = 0; q < queries; ++q) {
      const Index p = tiles_.begin(tile) + lanes[q];
      limits[q] = tiles_.bounds.limit(radius_of(tiles_.metric, bound_of(p) * alpha_));
      components[q] = component_[p];
    }
    const Index first = tiles_.begin(other);
    const int found = forms_.crossing(tiles_.tile(tile), lanes, limits, components, queries, tiles_.tile(other),
                                      &stored_core_[first], &component_[first], tiles_.dims, work.hits.data());
    for (int h = 0; h < found; ++h) {
      const Index p = tiles_.begin(tile) + lanes[work.hits[h].query], q = first + work.hits[h].lane;
      const double found_weight = weight(p, q, tiles_.distance(p, q));
      consider(p, q, found_weight);
      lower(bounds_[component_[p]], found_weight);
      lower(bounds_[component_[q]], found_weight);
    }
  }

  // Each component but the largest joins along its least edge.
  void join_least_edges() {
    std::vector<Index> found;
    for (Index p = 0; p < tiles_.points; ++p) {
      const Index component = component_[p];
      if (component == largest_) continue;
      Frontier& f = frontier_[p];
      const double bound = bounds_[component].load(std::memory_order_relaxed);
      if (open_[p]) {  // everything up to the bound was looked at
        if (f.candidate >= 0 && f.weight <= bound) f.nearest = f.candidate;
        f.at_least = std::max(f.at_least, std::min(bound, f.weight));
      }
      if (f.candidate < 0 || f.weight != bound) continue;
      Index& least = least_[component];
      if (least < 0) found.push_back(component);
      if (least < 0 || lighter(f.weight, p, f.candidate, frontier_[least].weight, least, frontier_[least].candidate))
        least = p;
    }
    for (Index component : found) {
      const Index p = std::exchange(least_[component], -1);
      join(p, frontier_[p].candidate, frontier_[p].weight);
    }
  }

  const Tiles& tiles_;
  const Neighbours& neighbours_;
  const double alpha_;
  const Kernels& kernels_;
  const TileKernels& forms_;
  ThreadPool& pool_;

  DisjointSets sets_;
  Index components_;  // how many are left
  Index largest_ = -1;
  std::vector<Edge> edges_;
  std::vector<Frontier> frontier_;           // [points]
  std::vector<char> open_;                   // [points] whether the point searches this round
  std::vector<std::atomic<double>> bounds_;  // [points], at a component's root: no heavier edge is its least one
  std::vector<Index> component_;             // [tiles, 64]; -1 pads
  std::vector<Index> tile_component_;        // [tiles] the component a tile lies in, or -1
  std::vector<float> stored_core_;           // [tiles, 64]
  std::vector<float> tile_core_;             // [tiles] the least of the tile
  std::vector<Index> size_, least_;          // [points], at a component's root
  std::vector<Workspace> workspaces_;
};

}  // namespace

std::vector<Edge> spanning_tree_by_boruvka(const Tiles& tiles, const Neighbours& neighbours, double alpha,
                                           const Kernels& kernels, ThreadPool& pool) {
  return Boruvka(tiles, neighbours, alpha, kernels, pool).run();
}

}  // namespace spatialprobe
