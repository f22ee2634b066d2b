// Elementwise and row kernels: activations, gated ones and their gradients, exp, log, row maxima, sums of exponentials per leaf,
// gradients of a softmax, column sums, rotary embedding; layer norm is in norm.cpp. float32 or bfloat16 in memory, float32
// inside, rounded once.
//
// A result depends on its own element (or row, or leaf) alone, see rows.h.
#include "activation.h"
#include "rows.h"

namespace {

using namespace rows;

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

template <class E>
struct Gate {                                 // f(gate) * up
  int64_t n; const E *gate, *up; E* out;
  template <activation::Id id> void operator()() const {
    map(n, gate, out, [this](f32x16 v, int64_t i, int live) { return activation::value<id>(v) * load(up + i, live); });
  }
};
template <class E>
struct GateGrad {                             // what comes back through it to gate and to up
  int64_t n; const E *gate, *up, *dy; E *dgate, *dup;
  template <activation::Id id> void operator()() const {
    map(n, gate, dgate, [this](f32x16 v, int64_t i, int live) {
      const f32x16 grad = load(dy + i, live);
      store(dup + i, grad * activation::value<id>(v), live);
      return grad * load(up + i, live) * activation::slope<id>(v);
    });
  }
};

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

// (softmax - one-hot) * scale of rows of logits, from their maxima and sums of exponentials; target < 0: none here
void softmax_grad(int64_t rows, int64_t columns, const float* x, const float* tops, const float* sums,
                  const int64_t* targets, const float* scales, float* out) {
  over_rows(rows, columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *from = x + r * columns, inverse = 1.0f / sums[r];
      float* to = out + r * columns;
      const f32x16 top = simd::set1(tops[r]);
      by_vector(columns, [&](int64_t i, int live) {
        store(to + i, simd::exp(load(from + i, live) - top) * inverse * scales[r], live);
      });
      if (targets[r] >= 0) to[targets[r]] -= scales[r];
    }
  });
}

// The sum of each column of a matrix, first row to last in one chain.
template <class E>
void column_sums(int64_t rows, int64_t columns, const E* x, int64_t stride, E* out) {
  constexpr int kWide = 8;                    // vectors of a row that are walked down together
  pool::parallel_ranges((columns + kWide * kLanes - 1) / (kWide * kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kWide * kLanes; c < std::min(end * kWide * kLanes, columns); c += kWide * kLanes) {
      const int64_t width = std::min<int64_t>(columns - c, kWide * kLanes);
      f32x16 sums[kWide] = {};
      for (int64_t r = 0; r < rows; ++r)
        by_vector(width, [&](int64_t i, int live) { sums[i / kLanes] = sums[i / kLanes] + load(x + r * stride + c + i, live); });
      by_vector(width, [&](int64_t i, int live) { store(out + c + i, sums[i / kLanes], live); });
    }
  });
}

struct Turn {                                 // mirrored by _ROTARY in elementwise.py
  int64_t dtype, inverse, tokens, heads, width, half;
  int64_t token_stride, head_stride;
  void* x;
  const float *cosines, *sines;
};
template <class E>
struct Rotary {                               // the first 2 * half elements of every head turn, in place
  const Turn& t;

  void head(E* x, const float* c, const float* s, float sign) const {
    by_vector(t.half, [&](int64_t i, int live) {
      f32x16 a = load(x + i, live), b = load(x + t.half + i, live);
      f32x16 cosine = load(c + i, live), sine = load(s + i, live) * sign;
      store(x + i, a * cosine - b * sine, live);
      store(x + t.half + i, b * cosine + a * sine, live);
    });
  }
  void run() const {
    E* x = static_cast<E*>(t.x);
    over_rows(t.tokens, t.heads * t.width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t n = 0; n < t.heads; ++n)
          head(x + i * t.token_stride + n * t.head_stride, t.cosines + i * t.half, t.sines + i * t.half,
               t.inverse ? -1.0f : 1.0f);
    });
  }
};

}  // namespace

extern "C" {

int ew_activate(int64_t id, int dtype, int64_t n, const void* x, void* out) {
  return guarded([&] {
    require(id >= 0 && id < activation::kCount, kBadIndex);
    typed(dtype, [&](auto e) {
      using E = decltype(e);
      const Activate<E> call{n, static_cast<const E*>(x), static_cast<E*>(out)};
      present(call.x, n), present(call.out, n);
      activation::dispatch(id, call);
    });
  });
}

int ew_activate_grad(int64_t id, int dtype, int64_t n, const void* x, const void* dy, void* dx) {
  return guarded([&] {
    require(id >= 0 && id < activation::kCount, kBadIndex);
    typed(dtype, [&](auto e) {
      using E = decltype(e);
      const ActivateGrad<E> call{n, static_cast<const E*>(x), static_cast<const E*>(dy), static_cast<E*>(dx)};
      present(call.x, n), present(call.dy, n), present(call.dx, n);
      activation::dispatch(id, call);
    });
  });
}

int ew_gate(int64_t id, int dtype, int64_t n, const void* gate, const void* up, void* out) {
  return guarded([&] {
    require(id >= 0 && id < activation::kCount, kBadIndex);
    typed(dtype, [&](auto e) {
      using E = decltype(e);
      const Gate<E> call{n, static_cast<const E*>(gate), static_cast<const E*>(up), static_cast<E*>(out)};
      present(call.gate, n), present(call.up, n), present(call.out, n);
      activation::dispatch(id, call);
    });
  });
}

int ew_gate_grad(int64_t id, int dtype, int64_t n, const void* gate, const void* up, const void* dy, void* dgate,
                 void* dup) {
  return guarded([&] {
    require(id >= 0 && id < activation::kCount, kBadIndex);
    typed(dtype, [&](auto e) {
      using E = decltype(e);
      const GateGrad<E> call{n, static_cast<const E*>(gate), static_cast<const E*>(up), static_cast<const E*>(dy),
                             static_cast<E*>(dgate), static_cast<E*>(dup)};
      present(call.gate, n), present(call.up, n), present(call.dy, n), present(call.dgate, n), present(call.dup, n);
      activation::dispatch(id, call);
    });
  });
}

int ew_exp(int64_t n, const float* x, float* out) {
  return guarded([&] {
    present(x, n), present(out, n);
    map(n, x, out, [](f32x16 v, int64_t, int) { return simd::exp(v); });
  });
}

int ew_log(int64_t n, const float* x, float* out) {
  return guarded([&] {
    present(x, n), present(out, n);
    map(n, x, out, [](f32x16 v, int64_t, int) { return simd::log(v); });
  });
}

int ew_row_max(int dtype, int64_t rows, int64_t columns, const void* x, int64_t stride, float* out) {
  return guarded([&] {
    present(out, rows);
    typed(dtype, [&](auto e) {
      auto* p = static_cast<const decltype(e)*>(x);
      present(p, count(rows, columns));
      over_rows(rows, columns, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) out[r] = row_max(p + r * stride, columns);
      });
    });
  });
}

int ew_exp_sum(int dtype, int64_t rows, int64_t columns, const void* x, int64_t stride, const float* tops, int64_t n_leaves,
               const int64_t* borders, float* out) {
  return guarded([&] {
    operands::ascending(borders, n_leaves, columns);
    present(tops, rows), present(out, count(rows, n_leaves));
    typed(dtype, [&](auto e) {
      auto* p = static_cast<const decltype(e)*>(x);
      present(p, count(rows, columns));
      exp_sum(rows, p, stride, tops, n_leaves, borders, out);
    });
  });
}

int ew_softmax_grad(int64_t rows, int64_t columns, const float* x, const float* tops, const float* sums,
                    const int64_t* targets, const float* scales, float* out) {
  return guarded([&] {
    const int64_t n = count(rows, columns);
    present(x, n), present(out, n), present(tops, rows), present(sums, rows), present(targets, rows), present(scales, rows);
    for (int64_t r = 0; r < rows; ++r) require(targets[r] < columns, kBadIndex);
    softmax_grad(rows, columns, x, tops, sums, targets, scales, out);
  });
}

int ew_column_sums(int dtype, int64_t rows, int64_t columns, const void* x, int64_t stride, void* out) {
  return guarded([&] {
    typed(dtype, [&](auto e) {
      using E = decltype(e);
      auto* from = static_cast<const E*>(x);
      auto* to = static_cast<E*>(out);
      present(from, count(rows, columns)), present(to, columns);
      column_sums(rows, columns, from, stride, to);
    });
  });
}

int ew_rotary(const Turn* turn) {
  return guarded([&] {
    const Turn& t = *turn;
    const int64_t n = count(t.tokens, t.heads, t.width), angles = count(t.tokens, t.half);
    require(t.half <= t.width / 2, kBadSize);
    present(t.cosines, angles), present(t.sines, angles);
    typed(static_cast<int>(t.dtype), [&](auto e) {
      using E = decltype(e);
      present(static_cast<const E*>(t.x), n);
      Rotary<E>{t}.run();
    });
  });
}
}
