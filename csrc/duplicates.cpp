#include "duplicates.h"

#include <cstring>

namespace spatialprobe {
namespace {

std::uint64_t mix(std::uint64_t hash, double x) {
  const double value = x + 0.0;  // -0 and 0 are equal
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (hash ^ bits ^ (bits >> 29)) * 0xff51afd7ed558ccdu;
}

// Four independent chains of multiplications: one would wait for itself at every coordinate.
std::uint64_t hash_row(const double* x, int dims) {
  std::uint64_t hash[4] = {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu, 0xd6e8feb86659fd93u};
  int d = 0;
  for (; d + 4 <= dims; d += 4)
    for (int k = 0; k < 4; ++k) hash[k] = mix(hash[k], x[d + k]);
  for (; d < dims; ++d) hash[0] = mix(hash[0], x[d]);
  std::uint64_t all = 0;
  for (const std::uint64_t part : hash) all = (all ^ part ^ (part >> 32)) * 0xff51afd7ed558ccdu;
  return all ^ (all >> 32);
}

bool equal_rows(const Embeddings& embeddings, Index a, Index b, std::vector<double>& x, std::vector<double>& y) {
  embeddings.read(a, x.data());
  embeddings.read(b, y.data());
  for (int d = 0; d < embeddings.dims; ++d)
    if (x[d] != y[d]) return false;
  return true;
}

}  // namespace

DistinctRows collapse_duplicates(const Embeddings& embeddings, Index min_samples) {
  const Index n = static_cast<Index>(embeddings.rows);
  std::size_t slots = 16;
  while (slots < 2 * static_cast<std::size_t>(n)) slots *= 2;
  std::vector<Index> table(slots, -1), first(n), copies(n, 0);  // open addressing; copies counts at the first row
  std::vector<std::uint32_t> tags(n);                           // part of each row's hash, to compare few rows
  std::vector<double> x(embeddings.dims), y(embeddings.dims);
  for (Index row = 0; row < n; ++row) {
    embeddings.read(row, x.data());
    const std::uint64_t hash = hash_row(x.data(), embeddings.dims);
    tags[row] = static_cast<std::uint32_t>(hash >> 32);
    std::size_t slot = hash & (slots - 1);
    while (table[slot] >= 0 && (tags[table[slot]] != tags[row] || !equal_rows(embeddings, table[slot], row, x, y)))
      slot = (slot + 1) & (slots - 1);
    if (table[slot] < 0) table[slot] = row;
    first[row] = table[slot];
    ++copies[first[row]];
  }
  DistinctRows distinct;
  distinct.rows.reserve(n);
  for (Index row = 0; row < n; ++row) {
    const bool crowded = copies[first[row]] > min_samples;
    if (crowded && first[row] != row) {
      distinct.collapsed.emplace_back(first[row], row);
    } else {
      distinct.rows.push_back(row);
      distinct.crowded.push_back(crowded);
    }
  }
  return distinct;
}

}  // namespace spatialprobe
