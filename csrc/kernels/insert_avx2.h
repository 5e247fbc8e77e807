// Insertion into a sorted list of eight held in one register: every element becomes itself, its left neighbour or the
// new value, without a branch.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

void insert(float* distances, std::int32_t* indices, float squared, std::int32_t index) {
  const __m256i to_the_right = _mm256_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6);
  const __m256 value = _mm256_set1_ps(squared);
  const __m256 old = _mm256_loadu_ps(distances);
  const __m256 old_ids = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices)));
  __m256 left = _mm256_permutevar8x32_ps(old, to_the_right);
  left = _mm256_blend_ps(left, _mm256_set1_ps(-1.0f), 1);  // nothing is smaller than the first one's left neighbour
  const __m256 left_ids = _mm256_permutevar8x32_ps(old_ids, to_the_right);
  const __m256 moves = _mm256_cmp_ps(old, value, _CMP_GT_OQ);
  const __m256 left_moves = _mm256_cmp_ps(left, value, _CMP_GT_OQ);
  _mm256_storeu_ps(distances, _mm256_min_ps(old, _mm256_max_ps(left, value)));
  const __m256 incoming = _mm256_blendv_ps(_mm256_castsi256_ps(_mm256_set1_epi32(index)), left_ids, left_moves);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices),
                      _mm256_castps_si256(_mm256_blendv_ps(old_ids, incoming, moves)));
}

}  // namespace
