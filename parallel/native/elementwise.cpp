// Elementwise and row kernels: activations and their gradients, exp, log, row maxima, sums of exponentials per leaf,
// layer norm, rotary embedding. float32 or bfloat16 in memory, float32 inside, rounded once.
//
// A result depends on its own element (or row, or leaf) alone: tails run the code of the middle with fewer live lanes,
// and every reduction is four accumulators of sixteen lanes started at the row's or leaf's first element.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "activation.h"
#include "pool.h"
#include "simd.h"

namespace {

using simd::bf16;
using simd::f32x16;
using simd::kLanes;

constexpr int64_t kGrain = 16384;             // elements that are worth a thread

// Rows of `width` elements in chunks of at least kGrain: f(first, last).
template <class F>
void over_rows(int64_t rows, int64_t width, const F& f) {
  int64_t chunk = std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1));
  pool::parallel_ranges((rows + chunk - 1) / chunk,
                        [&](int64_t begin, int64_t end) { f(begin * chunk, std::min(end * chunk, rows)); });
}

// f(i, live) for i = 0, 16, 32, ... below n, live <= 16 of them.
template <class F>
inline void by_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class E>
inline f32x16 load(const E* p, int live, float fill = 0) { return live == kLanes ? simd::load(p) : simd::load(p, live, fill); }
template <class E>
inline void store(E* p, f32x16 x, int live) { live == kLanes ? simd::store(p, x) : simd::store(p, x, live); }

template <class E, class F>
void map(int64_t n, const E* x, E* out, const F& f) {
  over_rows((n + kLanes - 1) / kLanes, kLanes, [&](int64_t begin, int64_t end) {
    int64_t first = begin * kLanes, last = std::min(end * kLanes, n);
    by_vector(last - first, [&](int64_t i, int live) { store(out + first + i, f(load(x + first + i, live), first + i, live), live); });
  });
}

template <class E>
struct Activate {
  int64_t n; const E* x; E* out;
  template <activation::Id id> void operator()() const {
    map(n, x, out, [](f32x16 v, int64_t, int) { return activation::value<id>(v); });
  }
};
template <class E>
struct ActivateGrad {
  int64_t n; const E *x, *dy; E* dx;
  template <activation::Id id> void operator()() const {
    map(n, x, dx, [this](f32x16 v, int64_t i, int live) { return load(dy + i, live) * activation::slope<id>(v); });
  }
};

struct Sums { f32x16 lane[4] = {}; };         // vector i / 16 of a row goes to accumulator i / 16 % 4
inline float total(const Sums& s) { return simd::sum_lanes((s.lane[0] + s.lane[2]) + (s.lane[1] + s.lane[3])); }

template <class F>                            // f(i, live) -> the values to add, zero in dead lanes
inline float sum_over(int64_t n, const F& f) {
  Sums s;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) s.lane[j] = s.lane[j] + f(i + j * kLanes, kLanes);
  for (int j = 0; i < n; ++j, i += kLanes) s.lane[j] = s.lane[j] + f(i, static_cast<int>(std::min<int64_t>(kLanes, n - i)));
  return total(s);
}

template <class E>
float row_max(const E* x, int64_t n) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  f32x16 top = simd::set1(kLowest);
  simd::i32x16 odd = {};                      // lanes that saw a NaN
  by_vector(n, [&](int64_t i, int live) {
    f32x16 v = load(x + i, live, kLowest);
    odd |= v != v;
    top = simd::max(v, top);
  });
  for (int i = 0; i < kLanes; ++i)
    if (odd[i]) return std::numeric_limits<float>::quiet_NaN();
  return simd::max_lanes(top);
}

template <class E>
void exp_sum(int64_t rows, const E* x, int64_t stride, const float* tops, int64_t n_leaves, const int64_t* borders, float* out) {
  over_rows(rows, borders[n_leaves] - borders[0], [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t leaf = 0; leaf < n_leaves; ++leaf) {
        const E* p = x + r * stride + borders[leaf];
        f32x16 top = simd::set1(tops[r]);
        out[r * n_leaves + leaf] = sum_over(borders[leaf + 1] - borders[leaf], [&](int64_t i, int live) {
          return simd::exp(load(p + i, live, -std::numeric_limits<float>::infinity()) - top);
        });
      }
  });
}

struct Affine {                               // optional weight or bias of a layer norm
  const void* p;
  bool half;
  f32x16 at(int64_t i, int live, float otherwise) const {
    if (!p) return simd::set1(otherwise);
    return half ? load(static_cast<const bf16*>(p) + i, live) : load(static_cast<const float*>(p) + i, live);
  }
};
template <class E>
struct Norm {                                 // y = (h - mean) rstd weight + bias, h = x + residual (rounded) where given
  int64_t width, stride, residual_stride;
  const E *x, *residual;
  E *h, *y;
  Affine weight, bias;
  float eps;
  float *mean, *rstd;

  void row(int64_t r) const {
    const E* in = x + r * stride;
    if (residual) {
      E* sum = h + r * width;
      const E* other = residual + r * residual_stride;
      by_vector(width, [&](int64_t i, int live) { store(sum + i, load(in + i, live) + load(other + i, live), live); });
      in = sum;
    }
    float m = sum_over(width, [&](int64_t i, int live) { return load(in + i, live); }) / static_cast<float>(width);
    f32x16 centre = simd::set1(m);
    float variance = sum_over(width, [&](int64_t i, int live) {
      f32x16 d = load(in + i, live, m) - centre;
      return d * d;
    }) / static_cast<float>(width);
    float scale = 1.0f / __builtin_sqrtf(variance + eps);
    by_vector(width, [&](int64_t i, int live) {
      f32x16 v = (load(in + i, live) - centre) * scale;
      store(y + r * width + i, simd::fma(v, weight.at(i, live, 1), bias.at(i, live, 0)), live);
    });
    if (mean) { mean[r] = m; rstd[r] = scale; }
  }
};

struct Turn {                                 // mirrored by _ROTARY in elementwise.py
  int64_t half_type, inverse, tokens, heads, width, half;
  int64_t token_stride, head_stride, out_token_stride, out_head_stride, table_stride;
  const void* x;
  void* out;
  const float *cosines, *sines;
};
template <class E>
struct Rotary {                               // the first 2 * half elements of every head turn, the rest passes
  const Turn& t;

  void head(const E* in, E* to, const float* c, const float* s, float sign) const {
    by_vector(t.half, [&](int64_t i, int live) {
      f32x16 a = load(in + i, live), b = load(in + t.half + i, live);
      f32x16 cosine = load(c + i, live), sine = load(s + i, live) * sign;
      store(to + i, a * cosine - b * sine, live);
      store(to + t.half + i, b * cosine + a * sine, live);
    });
    if (in != to) std::copy(in + 2 * t.half, in + t.width, to + 2 * t.half);
  }
  void run() const {
    const E* x = static_cast<const E*>(t.x);
    E* out = static_cast<E*>(t.out);
    over_rows(t.tokens, t.heads * t.width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t n = 0; n < t.heads; ++n)
          head(x + i * t.token_stride + n * t.head_stride, out + i * t.out_token_stride + n * t.out_head_stride,
               t.cosines + i * t.table_stride, t.sines + i * t.table_stride, t.inverse ? -1.0f : 1.0f);
    });
  }
};

template <class F>
void typed(int half, const F& f) { half ? f(bf16{}) : f(float{}); }

}  // namespace

extern "C" {

void ew_activate(int64_t id, int half, int64_t n, const void* x, void* out) {
  typed(half, [&](auto e) {
    using E = decltype(e);
    activation::dispatch(id, Activate<E>{n, static_cast<const E*>(x), static_cast<E*>(out)});
  });
}

void ew_activate_grad(int64_t id, int half, int64_t n, const void* x, const void* dy, void* dx) {
  typed(half, [&](auto e) {
    using E = decltype(e);
    activation::dispatch(id, ActivateGrad<E>{n, static_cast<const E*>(x), static_cast<const E*>(dy), static_cast<E*>(dx)});
  });
}

void ew_exp(int64_t n, const float* x, float* out) {
  map(n, x, out, [](f32x16 v, int64_t, int) { return simd::exp(v); });
}

void ew_log(int64_t n, const float* x, float* out) {
  map(n, x, out, [](f32x16 v, int64_t, int) { return simd::log(v); });
}

void ew_row_max(int half, int64_t rows, int64_t columns, const void* x, int64_t stride, float* out) {
  typed(half, [&](auto e) {
    auto* p = static_cast<const decltype(e)*>(x);
    over_rows(rows, columns, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) out[r] = row_max(p + r * stride, columns);
    });
  });
}

void ew_exp_sum(int half, int64_t rows, const void* x, int64_t stride, const float* tops, int64_t n_leaves,
                const int64_t* borders, float* out) {
  typed(half, [&](auto e) { exp_sum(rows, static_cast<const decltype(e)*>(x), stride, tops, n_leaves, borders, out); });
}

void ew_layer_norm(int half, int64_t rows, int64_t width, const void* x, int64_t stride, const void* residual,
                   int64_t residual_stride, void* h, void* y, const void* weight, int weight_half, const void* bias,
                   int bias_half, float eps, float* mean, float* rstd) {
  typed(half, [&](auto e) {
    using E = decltype(e);
    Norm<E> norm{width, stride, residual_stride, static_cast<const E*>(x), static_cast<const E*>(residual),
                 static_cast<E*>(h), static_cast<E*>(y), {weight, weight_half != 0}, {bias, bias_half != 0}, eps, mean, rstd};
    over_rows(rows, width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) norm.row(r);
    });
  });
}

void ew_rotary(const Turn* turn) {
  typed(static_cast<int>(turn->half_type), [&](auto e) { Rotary<decltype(e)>{*turn}.run(); });
}
}
