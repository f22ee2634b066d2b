// Sixteen float32 lanes: intrinsics on AVX-512, GCC vector extensions elsewhere (the same source compiles on any CPU).
//
// Rules that keep results independent of where an element stands: tails go through the same vector code with a count of
// live lanes (loads fill the rest with zero or `fill`), every fused multiply-add is written as fma() and the compiler
// fuses nothing by itself (-ffp-contract=off), and reductions over lanes are one fixed tree.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace simd {

constexpr int kLanes = 16;
using f32x16 = float __attribute__((vector_size(64), may_alias));
using i32x16 = int32_t __attribute__((vector_size(64), may_alias));
using u32x16 = uint32_t __attribute__((vector_size(64), may_alias));
using u16x16 = uint16_t __attribute__((vector_size(32), may_alias));
using bf16 = uint16_t;                       // bits of a bfloat16

inline f32x16 set1(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline f32x16 zero() { return f32x16{}; }
inline f32x16 bits_to_float(u32x16 x) { return (f32x16)x; }
inline u32x16 float_to_bits(f32x16 x) { return (u32x16)x; }

#ifdef __AVX512F__
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }      // a * b + c
inline f32x16 fnma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fnmadd_ps(a, b, c); }    // c - a * b
inline f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }                     // b where either is NaN
inline f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }                     // b where either is NaN
inline f32x16 round(f32x16 x) { return _mm512_roundscale_ps(x, 8); }                      // to nearest even
inline f32x16 sqrt(f32x16 x) { return _mm512_sqrt_ps(x); }
inline f32x16 ldexp(f32x16 x, f32x16 n) { return _mm512_scalef_ps(x, n); }                // x * 2^n, n whole
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }           // n of 0..16
inline f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
inline f32x16 load(const float* p, int n, float fill = 0) { return _mm512_mask_loadu_ps(set1(fill), first(n), p); }
inline void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, f32x16 x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
inline u32x16 widen(u16x16 x) { return (u32x16)_mm512_cvtepu16_epi32((__m256i)x); }
inline u16x16 narrow(u32x16 x) { return (u16x16)_mm512_cvtepi32_epi16((__m512i)x); }
#else
#define SIMD_EACH(expression) f32x16 r; for (int i = 0; i < kLanes; ++i) r[i] = (expression); return r
#ifdef __FMA__
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  std::memcpy(z, &c, sizeof z);
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
}
#else
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { SIMD_EACH(__builtin_fmaf(a[i], b[i], c[i])); }
#endif
inline f32x16 fnma(f32x16 a, f32x16 b, f32x16 c) { return fma(-a, b, c); }
inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
inline f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
inline f32x16 round(f32x16 x) { SIMD_EACH(__builtin_nearbyintf(x[i])); }
inline f32x16 sqrt(f32x16 x) { SIMD_EACH(__builtin_sqrtf(x[i])); }
inline f32x16 ldexp(f32x16 x, f32x16 n) {
  SIMD_EACH(n[i] == n[i] ? __builtin_ldexpf(x[i], static_cast<int>(n[i])) : n[i]);
}
inline f32x16 load(const float* p) { f32x16 r; std::memcpy(&r, p, sizeof r); return r; }
inline f32x16 load(const float* p, int n, float fill = 0) { SIMD_EACH(i < n ? p[i] : fill); }
inline void store(float* p, f32x16 x) { std::memcpy(p, &x, sizeof x); }
inline void store(float* p, f32x16 x, int n) { for (int i = 0; i < n; ++i) p[i] = x[i]; }
inline u32x16 widen(u16x16 x) { return __builtin_convertvector(x, u32x16); }
inline u16x16 narrow(u32x16 x) { return __builtin_convertvector(x, u16x16); }
#undef SIMD_EACH
#endif

inline f32x16 abs(f32x16 x) { return bits_to_float(float_to_bits(x) & 0x7fffffffu); }
inline f32x16 copysign(f32x16 size, f32x16 sign) {
  return bits_to_float((float_to_bits(size) & 0x7fffffffu) | (float_to_bits(sign) & 0x80000000u));
}
inline f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) { return mask ? yes : no; }      // mask: a > b and the like

// bfloat16: widening is exact, narrowing rounds to nearest even (NaN becomes 0x7fc0), denormals kept, as torch does.
inline float to_float(bf16 x) { uint32_t u = uint32_t(x) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline float to_float(float x) { return x; }
inline u32x16 round_bits(f32x16 x) {                                     // the bfloat16 in the low half of each lane
  u32x16 u = float_to_bits(x);
  u32x16 rounded = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  return x == x ? rounded : (rounded & 0u) | 0x7fc0u;
}
inline f32x16 round_to_bf16(f32x16 x) { return bits_to_float(round_bits(x) << 16); }
inline f32x16 load(const bf16* p) {
  u16x16 r; std::memcpy(&r, p, sizeof r);
  return bits_to_float(widen(r) << 16);
}
inline f32x16 load(const bf16* p, int n, float fill = 0) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  f32x16 r = bits_to_float(widen((u16x16)_mm256_maskz_loadu_epi16(first(n), p)) << 16);
  return fill == 0 ? r : (f32x16)_mm512_mask_mov_ps(set1(fill), first(n), r);
#else
  f32x16 r;
  for (int i = 0; i < kLanes; ++i) r[i] = i < n ? to_float(p[i]) : fill;
  return r;
#endif
}
inline void store(bf16* p, f32x16 x) { u16x16 r = narrow(round_bits(x)); std::memcpy(p, &r, sizeof r); }
inline void store(bf16* p, f32x16 x, int n) {
  u16x16 r = narrow(round_bits(x));
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, first(n), (__m256i)r);
#else
  for (int i = 0; i < n; ++i) p[i] = r[i];
#endif
}
// What a stored value would read back as: keeps "round, then go on" equal to "store, load, go on".
inline f32x16 as_stored(f32x16 x, const float*) { return x; }
inline f32x16 as_stored(f32x16 x, const bf16*) { return round_to_bf16(x); }

// Sum and maximum over the lanes: ((0+8)+(4+12)) and so on, the same tree always.
inline float sum_lanes(f32x16 x) {
  float v[kLanes];
  std::memcpy(v, &x, sizeof v);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
inline float max_lanes(f32x16 x) {                                       // lanes without NaN
  float v[kLanes];
  std::memcpy(v, &x, sizeof v);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

// exp, within 1.5 ulp; exp(-inf) = 0, overflow gives inf, NaN stays NaN. x = n ln2 + r, |r| <= ln2 / 2.
inline f32x16 exp(f32x16 x) {
  x = min(set1(89.0f), max(set1(-104.0f), x));                           // NaN: the second operand comes through
  f32x16 n = round(x * 1.44269504088896341f);
  f32x16 r = fnma(n, set1(-1.90465429995776804525e-9f), fnma(n, set1(0.693147182464599609375f), x));
  f32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return ldexp(p, n);
}

// log, within 1.5 ulp; log(0) = -inf, negative or NaN gives NaN. x = m 2^e, sqrt(1/2) <= m < sqrt(2).
inline f32x16 log(f32x16 x) {
  i32x16 small = x < 1.17549435e-38f;                                    // denormal, zero, negative: scaled by 2^25
  u32x16 bits = float_to_bits(select(small, x * 33554432.0f, x));
  u32x16 shifted = bits - 0x3f3504f3u;                                   // sqrt(1/2)
  i32x16 e = ((i32x16)shifted >> 23) - (small & 25);
  f32x16 f = bits_to_float((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f, n = __builtin_convertvector(e, f32x16);
  f32x16 z = f * f, p = set1(7.0376836292e-2f);
  p = fma(p, f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  f32x16 y = fma(n, set1(-2.12194440e-4f), f * z * p);
  y = f + fma(z, set1(-0.5f), y);
  y = fma(n, set1(0.693359375f), y);
  constexpr float kInf = __builtin_inff(), kNan = __builtin_nanf("");
  y = select(x == kInf, x, y);
  y = select(x == 0.0f, set1(-kInf), y);
  return select(x >= 0.0f, y, set1(kNan));
}

}  // namespace simd
