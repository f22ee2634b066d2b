// Activation functions and their derivatives on sixteen float32 lanes: one inline definition for the elementwise kernels
// and the epilogue of the matrix product, so that fused and separate give the same bits. Transcendental parts are our own
// polynomials, within a few ulp of float64 (measured in tests/parallel/native/test_elementwise.py).
#pragma once
#include "simd.h"

namespace activation {

using simd::f32x16;
using simd::fma;
using simd::set1;

// Mirrored by _IDS in elementwise.py.
enum Id { kNone, kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu, kTanh, kSigmoid, kCount };

inline f32x16 sigmoid(f32x16 x) { return 1.0f / (1.0f + simd::exp(-x)); }

inline f32x16 tanh(f32x16 x) {
  f32x16 size = simd::abs(x), z = x * x, p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  f32x16 near = fma(p * z, x, x);
  f32x16 far = 1.0f - 2.0f / (simd::exp(size + size) + 1.0f);
  return simd::select(size < 0.625f, near, simd::copysign(far, x));      // NaN: far
}

struct Normal { f32x16 density, below; };     // of the standard normal distribution at x
inline Normal normal(f32x16 x) {              // below(-|x|) = exp(-x^2/2) t P(t), t = 1 / (1 + 0.21 |x|)
  f32x16 e = simd::exp(x * x * -0.5f);
  f32x16 t = 1.0f / fma(simd::abs(x), set1(0.21f), set1(1.0f)), p = set1(-0.07129482924938202f);
  p = fma(p, t, set1(0.2818046510219574f));
  p = fma(p, t, set1(-0.32649335265159607f));
  p = fma(p, t, set1(0.3449866771697998f));
  p = fma(p, t, set1(-0.09077254682779312f));
  p = fma(p, t, set1(0.12347204238176346f));
  p = fma(p, t, set1(0.06956978142261505f));
  p = fma(p, t, set1(0.08501243591308594f));
  p = fma(p, t, set1(0.08371514827013016f));
  f32x16 tail = e * (t * p);
  return {e * 0.3989422804014327f, simd::select(x > 0.0f, 1.0f - tail, tail)};
}

constexpr float kGeluScale = 1.5957691216057308f;                        // 2 sqrt(2 / pi)
constexpr float kGeluCube = 0.044715f;

// x * share, zero where the share is (so that -inf gives 0, as the limit does)
inline f32x16 part(f32x16 x, f32x16 share) { return simd::select(share == 0.0f, simd::zero(), x * share); }
inline f32x16 gelu_tanh_share(f32x16 x) { return sigmoid(kGeluScale * x * fma(x * x, set1(kGeluCube), set1(1.0f))); }

template <Id id>
inline f32x16 value(f32x16 x) {
  if constexpr (id == kGelu) return part(x, normal(x).below);
  if constexpr (id == kGeluTanh) return part(x, gelu_tanh_share(x));
  if constexpr (id == kQuickGelu) return part(x, sigmoid(1.702f * x));
  if constexpr (id == kRelu) return simd::max(simd::zero(), x);
  if constexpr (id == kSilu) return part(x, sigmoid(x));
  if constexpr (id == kTanh) return tanh(x);
  if constexpr (id == kSigmoid) return sigmoid(x);
  return x;
}

template <Id id>
inline f32x16 slope(f32x16 x) {
  if constexpr (id == kGelu) { Normal n = normal(x); return part(x, n.density) + n.below; }
  if constexpr (id == kGeluTanh) {
    f32x16 s = gelu_tanh_share(x), inner = kGeluScale * fma(x * x, set1(3 * kGeluCube), set1(1.0f));
    return fma(part(x, s * (1.0f - s)), inner, s);
  }
  if constexpr (id == kQuickGelu) { f32x16 s = sigmoid(1.702f * x); return fma(part(1.702f * x, s), 1.0f - s, s); }
  if constexpr (id == kRelu) return simd::select(x > 0.0f, set1(1.0f), simd::zero());
  if constexpr (id == kSilu) { f32x16 s = sigmoid(x); return fma(part(x, s), 1.0f - s, s); }
  if constexpr (id == kTanh) { f32x16 t = tanh(x); return simd::fnma(t, t, set1(1.0f)); }
  if constexpr (id == kSigmoid) { f32x16 s = sigmoid(x); return s * (1.0f - s); }
  return set1(1.0f);
}

// Call f with the id as a compile-time constant: f.template operator()<id>().
template <class F>
inline auto dispatch(int64_t id, const F& f) {
  switch (id) {
    case kGelu: return f.template operator()<kGelu>();
    case kGeluTanh: return f.template operator()<kGeluTanh>();
    case kQuickGelu: return f.template operator()<kQuickGelu>();
    case kRelu: return f.template operator()<kRelu>();
    case kSilu: return f.template operator()<kSilu>();
    case kTanh: return f.template operator()<kTanh>();
    case kSigmoid: return f.template operator()<kSigmoid>();
    default: return f.template operator()<kNone>();
  }
}

}  // namespace activation
