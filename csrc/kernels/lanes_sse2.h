// Four float lanes on any x86-64.
#pragma once

#include <emmintrin.h>

#include <cstdint>

namespace {

struct Lanes {
  using Vector = __m128;
  static constexpr int width = 4, queries = 4;

  static Vector zero() { return _mm_setzero_ps(); }
  static Vector all(float x) { return _mm_set1_ps(x); }
  static Vector load(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm_storeu_ps(p, v); }
  static Vector add(Vector a, Vector b) { return _mm_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm_sub_ps(a, b); }
  static Vector add_product(Vector a, Vector b, Vector c) { return _mm_add_ps(c, _mm_mul_ps(a, b)); }
  static Vector subtract_product(Vector a, Vector b, Vector c) { return _mm_sub_ps(c, _mm_mul_ps(a, b)); }
  static Vector smaller(Vector a, Vector b) { return _mm_min_ps(a, b); }
  static Vector larger(Vector a, Vector b) { return _mm_max_ps(a, b); }

  using Mask = __m128;
  static Mask none() { return _mm_setzero_ps(); }
  static Mask either(Mask a, Mask b) { return _mm_or_ps(a, b); }
  static Mask less(Vector a, Vector b) { return _mm_cmplt_ps(a, b); }
  static Mask at_most(Vector a, Vector b) { return _mm_cmple_ps(a, b); }
  static std::uint64_t bits(Mask m) { return static_cast<std::uint64_t>(_mm_movemask_ps(m)); }
  static bool any(Mask m) { return _mm_movemask_ps(m) != 0; }
  static std::uint64_t equal_bits(const std::int32_t* p, std::int32_t x) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return bits(_mm_castsi128_ps(_mm_cmpeq_epi32(values, _mm_set1_epi32(x))));
  }
};

}  // namespace
