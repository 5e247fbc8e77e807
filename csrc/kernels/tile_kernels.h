// The kernels, written once over `Lanes` (lanes_*.h) and compiled once per instruction set. Everything has internal
// linkage and nothing from the standard library's templates is used: code compiled for AVX-512 must not be the copy of
// an inline function that the linker keeps for every machine.
#pragma once

#include <cstdint>

#include "../squared_distance.h"
#include "kernels.h"

namespace {

using spatialprobe::Hit;
using spatialprobe::kBlock;
using spatialprobe::kTile;
using Vector = Lanes::Vector;

enum class Form { difference, dot };

constexpr int kWide = kTile / Lanes::width < 4 ? kTile / Lanes::width : 4;  // vectors at once for one or two queries

#define SPATIALPROBE_INLINE inline __attribute__((always_inline))

// Squared distances of Q queries to C vectors of lanes that begin at `tile`.
template <Form form, int Q, int C>
SPATIALPROBE_INLINE void accumulate(const float* const* query, const float* tile, int dims, Vector (&sum)[Q][C]) {
  for (int i = 0; i < Q; ++i) {
    for (int j = 0; j < C; ++j) {
      if (form == Form::dot) {
        const Vector half_norm = Lanes::load(tile + dims * kTile + j * Lanes::width);
        sum[i][j] = Lanes::add(half_norm, Lanes::all(query[i][dims * kTile]));
      } else {
        sum[i][j] = Lanes::zero();
      }
    }
  }
  for (int at = 0; at < dims * kTile; at += kTile) {
    Vector point[C];
    for (int j = 0; j < C; ++j) point[j] = Lanes::load(tile + at + j * Lanes::width);
    for (int i = 0; i < Q; ++i) {
      const Vector coordinate = Lanes::all(query[i][at]);
      for (int j = 0; j < C; ++j) {
        if (form == Form::dot) {
          sum[i][j] = Lanes::subtract_product(coordinate, point[j], sum[i][j]);
        } else {
          const Vector difference = Lanes::subtract(point[j], coordinate);
          sum[i][j] = Lanes::add_product(difference, difference, sum[i][j]);
        }
      }
    }
  }
}

template <int Q>
SPATIALPROBE_INLINE void point_at(const float* query_tile, const int* lanes, const float* (&query)[Q]) {
  for (int i = 0; i < Q; ++i) query[i] = query_tile + lanes[i];
}

// Sums go to memory only where there is a hit: loops over hits index them, which registers cannot be.
template <int Q, int C>
SPATIALPROBE_INLINE void spill(const Vector (&sum)[Q][C], float (&squared)[Q][C * Lanes::width]) {
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < C; ++j) Lanes::store(squared[i] + j * Lanes::width, sum[i][j]);
}

template <int C>
SPATIALPROBE_INLINE std::uint64_t lanes_below(const float* squared, float limit) {
  std::uint64_t set = 0;
  for (int j = 0; j < C; ++j) {
    const Lanes::Mask below = Lanes::less(Lanes::load(squared + j * Lanes::width), Lanes::all(limit));
    set |= Lanes::bits(below) << (j * Lanes::width);
  }
  return set;
}

template <Form form, int Q, int C>
SPATIALPROBE_INLINE int closer_block(const float* query_tile, const int* lanes, const float* limits, int first,
                                     const float* tile, int dims, Hit* hits) {
  int found = 0;
  const float* query[Q];
  point_at(query_tile, lanes + first, query);
  for (int c = 0; c < kTile; c += C * Lanes::width) {
    Vector sum[Q][C];
    accumulate<form, Q, C>(query, tile + c, dims, sum);
    Lanes::Mask any = Lanes::none();
    for (int i = 0; i < Q; ++i) {
      Vector least = sum[i][0];
      for (int j = 1; j < C; ++j) least = Lanes::smaller(least, sum[i][j]);
      any = Lanes::either(any, Lanes::less(least, Lanes::all(limits[first + i])));
    }
    if (__builtin_expect(!Lanes::any(any), 1)) continue;
    alignas(64) float squared[Q][C * Lanes::width];
    spill(sum, squared);
    for (int i = 0; i < Q; ++i) {
      for (std::uint64_t set = lanes_below<C>(squared[i], limits[first + i]); set != 0; set &= set - 1) {
        const int lane = __builtin_ctzll(set);
        hits[found++] = Hit{first + i, c + lane, squared[i][lane]};
      }
    }
  }
  return found;
}

template <Form form>
int closer(const float* query_tile, const int* lanes, const float* limits, int queries, const float* tile, int dims,
           Hit* hits) {
  int found = 0, i = 0;
  for (; i + Lanes::queries <= queries; i += Lanes::queries)
    found += closer_block<form, Lanes::queries, 2>(query_tile, lanes, limits, i, tile, dims, hits + found);
  if (Lanes::queries > 4 && i + 4 <= queries) {
    found += closer_block<form, 4, 2>(query_tile, lanes, limits, i, tile, dims, hits + found);
    i += 4;
  }
  if (i + 2 <= queries) {
    found += closer_block<form, 2, kWide>(query_tile, lanes, limits, i, tile, dims, hits + found);
    i += 2;
  }
  if (i < queries) found += closer_block<form, 1, kWide>(query_tile, lanes, limits, i, tile, dims, hits + found);
  return found;
}

template <Form form, int Q, int C>
SPATIALPROBE_INLINE int crossing_block(const float* query_tile, const int* lanes, const float* limits,
                                       const std::int32_t* components, int first, const float* tile, const float* cores,
                                       const std::int32_t* tile_components, int dims, Hit* hits) {
  int found = 0;
  const float* query[Q];
  point_at(query_tile, lanes + first, query);
  for (int c = 0; c < kTile; c += C * Lanes::width) {
    Vector sum[Q][C];
    accumulate<form, Q, C>(query, tile + c, dims, sum);
    Lanes::Mask any = Lanes::none();
    for (int j = 0; j < C; ++j) {
      const Vector core = Lanes::load(cores + c + j * Lanes::width);
      for (int i = 0; i < Q; ++i) sum[i][j] = Lanes::larger(sum[i][j], core);
    }
    for (int i = 0; i < Q; ++i) {
      Vector least = sum[i][0];
      for (int j = 1; j < C; ++j) least = Lanes::smaller(least, sum[i][j]);
      any = Lanes::either(any, Lanes::less(least, Lanes::all(limits[first + i])));
    }
    if (__builtin_expect(!Lanes::any(any), 1)) continue;
    alignas(64) float squared[Q][C * Lanes::width];
    spill(sum, squared);
    for (int i = 0; i < Q; ++i) {
      std::uint64_t set = lanes_below<C>(squared[i], limits[first + i]);
      if (set == 0) continue;
      for (int j = 0; j < C; ++j) {
        const std::int32_t* there = tile_components + c + j * Lanes::width;
        set &= ~(Lanes::equal_bits(there, components[first + i]) << (j * Lanes::width));
      }
      for (; set != 0; set &= set - 1) hits[found++] = Hit{first + i, c + __builtin_ctzll(set), 0.0f};
    }
  }
  return found;
}

template <Form form>
int crossing(const float* query_tile, const int* lanes, const float* limits, const std::int32_t* components,
             int queries, const float* tile, const float* cores, const std::int32_t* tile_components, int dims,
             Hit* hits) {
  int found = 0, i = 0;
  for (; i + Lanes::queries <= queries; i += Lanes::queries)
    found += crossing_block<form, Lanes::queries, 2>(query_tile, lanes, limits, components, i, tile, cores,
                                                     tile_components, dims, hits + found);
  if (Lanes::queries > 4 && i + 4 <= queries) {
    found += crossing_block<form, 4, 2>(query_tile, lanes, limits, components, i, tile, cores, tile_components, dims,
                                        hits + found);
    i += 4;
  }
  if (i + 2 <= queries) {
    found += crossing_block<form, 2, kWide>(query_tile, lanes, limits, components, i, tile, cores, tile_components,
                                            dims, hits + found);
    i += 2;
  }
  if (i < queries)
    found += crossing_block<form, 1, kWide>(query_tile, lanes, limits, components, i, tile, cores, tile_components,
                                            dims, hits + found);
  return found;
}

// The eight interleaved groups of lanes have eight different nearest points, so the largest of the group minima is at
// least the eighth smallest distance. (A query is not its own neighbour.)
template <Form form>
void first_limits(const int* lanes, int queries, const float* tile, int dims, float* limits) {
  for (int q = 0; q < queries; ++q) {
    const float* query[1] = {tile + lanes[q]};
    float squared[kTile];
    for (int c = 0; c < kTile; c += kWide * Lanes::width) {
      Vector sum[1][kWide];
      accumulate<form, 1, kWide>(query, tile + c, dims, sum);
      for (int j = 0; j < kWide; ++j) Lanes::store(squared + c + j * Lanes::width, sum[0][j]);
    }
    squared[lanes[q]] = spatialprobe::kFar;
    float least[8], limit = 0.0f;
    for (int g = 0; g < 8; ++g) least[g] = squared[g];
    for (int c = 8; c < kTile; c += 8)
      for (int g = 0; g < 8; ++g) least[g] = squared[c + g] < least[g] ? squared[c + g] : least[g];
    for (int g = 0; g < 8; ++g) limit = least[g] > limit ? least[g] : limit;
    limits[q] = limit < spatialprobe::kFar ? limit * 1.000001f + 1e-37f : spatialprobe::kFar;
  }
}

template <typename Scalar>
void exact_squared(const Scalar* points, int dims, std::int32_t point, const std::int32_t* others, int count,
                   double* out) {
  const std::int64_t stride = dims;
  for (int i = 0; i < count; ++i) {  // the others lie anywhere: fetch them all before the first is needed
    const char* other = reinterpret_cast<const char*>(points + others[i] * stride);
    for (std::int64_t at = 0; at < stride * static_cast<std::int64_t>(sizeof(Scalar)); at += 64)
      __builtin_prefetch(other + at);
  }
  for (int i = 0; i < count; ++i)
    out[i] = spatialprobe::squared_distance(points + point * stride, points + others[i] * stride, dims);
}

void keep(const Hit* hits, int found, const int* lanes, std::int32_t first, float* distances, std::int32_t* indices) {
  for (const Hit* hit = hits; hit != hits + found; ++hit) {
    const int list = lanes[hit->query] * spatialprobe::kShortList;
    if (hit->squared < distances[list + spatialprobe::kShortList - 1])
      insert(distances + list, indices + list, hit->squared, first + hit->lane);
  }
}

// How far x lies outside [low, high], per lane.
SPATIALPROBE_INLINE Vector outside(Vector x_low, Vector x_high, Vector low, Vector high) {
  return Lanes::larger(Lanes::larger(Lanes::subtract(low, x_high), Lanes::subtract(x_low, high)), Lanes::zero());
}

std::uint64_t lanes_near_box(const float* points, int dims, const float* low, const float* high, const float* limits) {
  std::uint64_t near = 0;
  for (int c = 0; c < kTile; c += Lanes::width) {
    Vector sum = Lanes::zero();
    for (int d = 0; d < dims; ++d) {
      const Vector x = Lanes::load(points + d * kTile + c);
      const Vector gap = outside(x, x, Lanes::all(low[d]), Lanes::all(high[d]));
      sum = Lanes::add_product(gap, gap, sum);
    }
    near |= Lanes::bits(Lanes::at_most(sum, Lanes::load(limits + c))) << c;
  }
  return near;
}

void box_distances(const float* low, const float* high, int dims, int boxes, const float* own_low,
                   const float* own_high, float* out) {
  for (int c = 0; c < boxes; c += Lanes::width) {
    Vector sum = Lanes::zero();
    for (int d = 0; d < dims; ++d) {
      const std::int64_t at = static_cast<std::int64_t>(d) * boxes + c;
      const Vector gap =
          outside(Lanes::all(own_low[d]), Lanes::all(own_high[d]), Lanes::load(low + at), Lanes::load(high + at));
      sum = Lanes::add_product(gap, gap, sum);
    }
    Lanes::store(out + c, sum);
  }
}

constexpr spatialprobe::Kernels make_kernels(const char* name) {
  return {name,
          {closer<Form::difference>, crossing<Form::difference>, first_limits<Form::difference>},
          {closer<Form::dot>, crossing<Form::dot>, first_limits<Form::dot>},
          lanes_near_box,
          box_distances,
          exact_squared<float>,
          exact_squared<double>,
          keep};
}

#undef SPATIALPROBE_INLINE

}  // namespace
