// Layer and RMS norm of rows, the gradients of both, and sums of squares. float32 or bfloat16 in memory, float32 inside, rounded
// once; a row's bits are its own (rows.h), a gain's gradient is a sum over a leaf's rows in their order.
#include <vector>

#include "rows.h"

namespace {

using namespace rows;

struct Affine {                               // gains (or biases) of a norm, `none` where there are none
  const void* p;
  bool half;                                  // bfloat16, else float32
  float none;
  f32x16 at(int64_t i, int live) const {
    if (!p) return simd::set1(none);
    return half ? load(static_cast<const bf16*>(p) + i, live) : load(static_cast<const float*>(p) + i, live);
  }
};

Affine affine(const void* p, int dtype, int64_t width, float none = 1) {
  if (p) present(p, width, operands::element_size(dtype));
  return {p, dtype == operands::kBFloat16, none};
}

template <class E>
struct RmsNorm {                              // y = x rstd weight
  int64_t width, stride;
  const E* x;
  E* y;
  Affine weight;
  float eps;

  void row(int64_t r) const {
    const E* in = x + r * stride;
    float square = sum_over(width, [&](int64_t i, int live) {
      f32x16 v = load(in + i, live);
      return v * v;
    }) / static_cast<float>(width);
    float scale = 1.0f / __builtin_sqrtf(square + eps);
    by_vector(width, [&](int64_t i, int live) {
      const f32x16 unit = load(in + i, live) * scale;
      store(y + r * width + i, simd::fma(unit, weight.at(i, live), simd::set1(0)), live);  // a zero is +0
    });
  }
};

template <class E>
struct LayerNorm {                            // y = (x - mean) rstd weight + bias
  int64_t width, stride;
  const E* x;
  E* y;
  Affine weight, bias;
  float eps;

  void row(int64_t r) const {
    const E* in = x + r * stride;
    const float count = static_cast<float>(width);
    const float mean = sum_over(width, [&](int64_t i, int live) { return load(in + i, live); }) / count;
    const f32x16 centre = simd::set1(mean);
    const float variance = sum_over(width, [&](int64_t i, int live) {
      const f32x16 d = load(in + i, live, mean) - centre;
      return d * d;
    }) / count;
    const f32x16 scale = simd::set1(1.0f / __builtin_sqrtf(variance + eps));
    by_vector(width, [&](int64_t i, int live) {
      const f32x16 unit = (load(in + i, live) - centre) * scale;
      store(y + r * width + i, simd::fma(unit, weight.at(i, live), bias.at(i, live)), live);
    });
  }
};

constexpr int64_t kPiece = 1 << 16;           // elements whose squares are added in float32; the pieces are in float64

float square_sum(const float* x, int64_t n) {
  std::vector<double> pieces((n + kPiece - 1) / kPiece);
  pool::parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t p) {
    const float* from = x + p * kPiece;
    pieces[p] = sum_over(std::min(kPiece, n - p * kPiece), [&](int64_t i, int live) {
      const f32x16 v = load(from + i, live);
      return v * v;
    });
  });
  double sum = 0;
  for (double piece : pieces) sum += piece;
  return static_cast<float>(sum);
}

// Gradients of y = u weight + bias, u = (x - mean) rstd:  w = dy weight,  dx = (w - mean(w) - u mean(w u)) rstd; the gains'
// are sums over the rows of each leaf, [leaf][dy u, dy][width] float32. Of an RMS norm both means are 0 but the last.
template <class E>
struct NormGrad {
  int64_t width, x_stride, dy_stride;
  const E *x, *dy;
  E* dx;
  Affine weight;
  float eps;
  bool centred;

  void row(int64_t r, float* u, float* gain, float* shift) const {
    const E *in = x + r * x_stride, *grad = dy + r * dy_stride;
    const float count = static_cast<float>(width);
    float m = 0;
    if (centred) m = sum_over(width, [&](int64_t i, int live) { return load(in + i, live); }) / count;
    const f32x16 centre = simd::set1(m);
    const float variance = sum_over(width, [&](int64_t i, int live) {
      f32x16 d = load(in + i, live, m) - centre;
      return d * d;
    }) / count;
    const f32x16 scale = simd::set1(1.0f / __builtin_sqrtf(variance + eps));
    by_vector(width, [&](int64_t i, int live) {
      const f32x16 unit = (load(in + i, live) - centre) * scale, g = load(grad + i, live);
      store(u + i, unit, live);
      store(gain + i, simd::fma(g, unit, load(gain + i, live)), live);
      store(shift + i, load(shift + i, live) + g, live);
    });
    const auto weighted = [&](int64_t i, int live) { return load(grad + i, live) * weight.at(i, live); };
    const f32x16 mean = simd::set1(centred ? sum_over(width, weighted) / count : 0.0f);
    const f32x16 slope = simd::set1(
        sum_over(width, [&](int64_t i, int live) { return weighted(i, live) * load(u + i, live); }) / count);
    by_vector(width, [&](int64_t i, int live) {
      store(dx + r * width + i, (weighted(i, live) - mean - load(u + i, live) * slope) * scale, live);
    });
  }

  void leaf(int64_t begin, int64_t end, float* sums) const {
    std::vector<float> u(width);
    std::fill(sums, sums + 2 * width, 0.0f);
    for (int64_t r = begin; r < end; ++r) row(r, u.data(), sums, sums + width);
  }
};

}  // namespace

extern "C" {

int ew_layer_norm(int dtype, int64_t rows, int64_t width, const void* x, int64_t stride, void* y, const void* weight,
                  int weight_dtype, const void* bias, int bias_dtype, float eps) {
  return guarded([&] {
    const int64_t n = count(rows, width);
    const Affine gain = affine(weight, weight_dtype, width), shift = affine(bias, bias_dtype, width, 0);
    typed(dtype, [&](auto e) {
      using E = decltype(e);
      const LayerNorm<E> norm{width, stride, static_cast<const E*>(x), static_cast<E*>(y), gain, shift, eps};
      present(norm.x, n), present(norm.y, n);
      over_rows(rows, width, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) norm.row(r);
      });
    });
  });
}

int ew_square_sum(int64_t n, const float* x, float* out) {
  return guarded([&] {
    present(x, n), present(out, 1);
    *out = square_sum(x, n);
  });
}

int ew_rms_norm(int dtype, int64_t rows, int64_t width, const void* x, int64_t stride, void* y, const void* weight,
                int weight_dtype, float eps) {
  return guarded([&] {
    const int64_t n = count(rows, width);
    const Affine gain = affine(weight, weight_dtype, width);
    typed(dtype, [&](auto e) {
      using E = decltype(e);
      const RmsNorm<E> norm{width, stride, static_cast<const E*>(x), static_cast<E*>(y), gain, eps};
      present(norm.x, n), present(norm.y, n);
      over_rows(rows, width, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) norm.row(r);
      });
    });
  });
}

// borders: n_leaves + 1 ascending rows, the first 0; sums [leaf][2][width]
int ew_layer_norm_grad(int dtype, int64_t rows, int64_t width, const void* x, int64_t x_stride, const void* dy,
                       int64_t dy_stride, const void* weight, int weight_dtype, float eps, int64_t n_leaves,
                       const int64_t* borders, void* dx, float* sums, int centred) {
  return guarded([&] {
    const int64_t n = count(rows, width);
    operands::ascending(borders, n_leaves, rows);
    present(sums, count(n_leaves, 2, width));
    const Affine gain = affine(weight, weight_dtype, width);
    typed(dtype, [&](auto e) {
      using E = decltype(e);
      const NormGrad<E> norm{width, x_stride, dy_stride, static_cast<const E*>(x), static_cast<const E*>(dy),
                             static_cast<E*>(dx), gain, eps, centred != 0};
      present(norm.x, n), present(norm.dy, n), present(norm.dx, n);
      pool::parallel_for(n_leaves, [&](int64_t i) { norm.leaf(borders[i], borders[i + 1], sums + i * 2 * width); });
    });
  });
}
}
