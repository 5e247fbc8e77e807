// The inner loops of the grouping, one table of functions per instruction set. Everything here works in float32 and
// only *filters*: whoever calls decides in float64. No kernel knows what a cluster is.
//
// A tile is 64 points stored by coordinate, `columns[d * 64 + lane]`; in the dot form one more row, d = dims, holds
// half the squared norm. Both forms yield squared distances: the difference form as sum (a_d - b_d)^2, the dot form as
// |a|^2/2 + |b|^2/2 - a.b on points stored sqrt(2) too large, which saves one operation in two per coordinate.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace spatialprobe {

constexpr int kTile = 64;        // points per tile; a set of lanes is a uint64_t
constexpr int kBlock = 8;        // queries per kernel call, so that their limits stay fresh
constexpr int kShortList = 8;    // neighbours in a short list: eight floats are one AVX register
constexpr int kMaxBoxDims = 12;  // bounding boxes live in at most this many principal directions
constexpr float kFar = 1e30f;    // no two stored points are this far apart (squared); padding is farther

struct Hit {
  std::int32_t query;  // which of the block's queries
  std::int32_t lane;   // which point of the tile
  float squared;       // squared distance, stored units
};

struct TileKernels {
  // Pairs whose squared distance is below the query's limit. Room for kBlock * kTile hits is needed.
  int (*closer)(const float* query_tile, const int* query_lanes, const float* limits, int queries, const float* tile,
                int dims, Hit* hits);
  // The same, but only pairs of different components whose point also has `core` (float, rounded down) below the limit.
  int (*crossing)(const float* query_tile, const int* query_lanes, const float* limits, const std::int32_t* components,
                  int queries, const float* tile, const float* tile_cores, const std::int32_t* tile_components,
                  int dims, Hit* hits);
  // For queries of the tile itself: above how much no squared distance can be among a query's first eight.
  void (*first_limits)(const int* query_lanes, int queries, const float* tile, int dims, float* limits);
};

struct Kernels {
  const char* name;
  TileKernels difference, dot;
  // The lanes whose point is no farther (squared) from the box than limits[lane].
  std::uint64_t (*lanes_near_box)(const float* points, int dims, const float* low, const float* high,
                                  const float* limits);
  // Squared distance of one box to each of `boxes` (a multiple of 16) boxes stored by coordinate, low[d * boxes + box].
  void (*box_distances)(const float* low, const float* high, int dims, int boxes, const float* own_low,
                        const float* own_high, float* out);
  // Squared distances of one point to others, float64: the bits of squared_distance(), a kernel only for its speed.
  void (*exact_squared_single)(const float* points, int dims, std::int32_t point, const std::int32_t* others, int count,
                               double* out);
  void (*exact_squared_double)(const double* points, int dims, std::int32_t point, const std::int32_t* others,
                               int count, double* out);
  // Enters hits into the queries' sorted short lists (of kShortList each, by lane); lane 0 of the tile is point
  // `first`.
  void (*keep)(const Hit* hits, int found, const int* query_lanes, std::int32_t first, float* distances,
               std::int32_t* indices);
};

// The sets this machine can run, best first ("avx512", "avx2", "sse2" or "neon").
std::vector<std::string> available_instruction_sets();

// The table called `name`, or the best one for "auto"; throws std::invalid_argument for a set this machine lacks.
const Kernels& select_kernels(const std::string& name);

}  // namespace spatialprobe
