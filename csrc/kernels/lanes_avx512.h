// Sixteen float lanes with mask registers. Include only where the compiler may emit AVX-512 F, VL, DQ and BW.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Lanes {
  using Vector = __m512;
  static constexpr int width = 16, queries = 8;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector all(float x) { return _mm512_set1_ps(x); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector add_product(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector subtract_product(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }
  // The zero-masked forms: g++ 12 warns about its own header's uninitialised operand in the plain ones.
  static Vector smaller(Vector a, Vector b) { return _mm512_maskz_min_ps(0xffff, a, b); }
  static Vector larger(Vector a, Vector b) { return _mm512_maskz_max_ps(0xffff, a, b); }

  using Mask = __mmask16;
  static Mask none() { return 0; }
  static Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static Mask less(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask at_most(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static std::uint64_t bits(Mask m) { return m; }
  static bool any(Mask m) { return m != 0; }
  static std::uint64_t equal_bits(const std::int32_t* p, std::int32_t x) {
    return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(x));
  }
};

}  // namespace
