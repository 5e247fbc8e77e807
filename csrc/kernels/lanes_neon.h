// Four float lanes with fused multiply-add on 64-bit ARM.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

struct Lanes {
  using Vector = float32x4_t;
  static constexpr int width = 4, queries = 4;

  static Vector zero() { return vdupq_n_f32(0.0f); }
  static Vector all(float x) { return vdupq_n_f32(x); }
  static Vector load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vector v) { vst1q_f32(p, v); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector subtract(Vector a, Vector b) { return vsubq_f32(a, b); }
  static Vector add_product(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static Vector subtract_product(Vector a, Vector b, Vector c) { return vfmsq_f32(c, a, b); }
  static Vector smaller(Vector a, Vector b) { return vminq_f32(a, b); }
  static Vector larger(Vector a, Vector b) { return vmaxq_f32(a, b); }

  using Mask = uint32x4_t;
  static Mask none() { return vdupq_n_u32(0); }
  static Mask either(Mask a, Mask b) { return vorrq_u32(a, b); }
  static Mask less(Vector a, Vector b) { return vcltq_f32(a, b); }
  static Mask at_most(Vector a, Vector b) { return vcleq_f32(a, b); }
  static std::uint64_t bits(Mask m) {
    const std::uint32_t weights[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, vld1q_u32(weights)));
  }
  static bool any(Mask m) { return vmaxvq_u32(m) != 0; }
  static std::uint64_t equal_bits(const std::int32_t* p, std::int32_t x) {
    return bits(vceqq_s32(vld1q_s32(p), vdupq_n_s32(x)));
  }
};

}  // namespace
