// One AdamW update of a run of float32 masters, in one pass over memory: gradient scaled, moments, decay, the new value, and
// its rounded copy where the model computes in bfloat16. The order of operations is that of torch's fused kernel.
//
// An element's result depends on itself alone: tails run the code of the middle with fewer live lanes.
#include "rows.h"

namespace {

struct Update {                               // mirrored by _UPDATE in adamw.py
  float* master;
  const float* grad;
  float *first, *second;                      // the moments
  simd::bf16* copy;                           // of the new master; null: none is wanted
  int64_t n;
  float scale, rate, beta1, beta2, epsilon, decay, step_size, root;  // root: sqrt(1 - beta2^t); step_size: rate / (1 - beta1^t)

  void at(int64_t i, int live) const {
    using namespace rows;
    const f32x16 g = load(grad + i, live) * scale;
    f32x16 m = load(first + i, live), v = load(second + i, live), p = load(master + i, live);
    p = simd::fnma(p, simd::set1(rate * decay), p);
    m = simd::fma(g - m, simd::set1(1.0f - beta1), m);
    v = simd::fma(g * g, simd::set1(1.0f - beta2), v * beta2);
    p = p - (m * step_size) / (simd::sqrt(v) / root + epsilon);
    store(first + i, m, live);
    store(second + i, v, live);
    store(master + i, p, live);
    if (copy) store(copy + i, p, live);
  }
};

}  // namespace

extern "C" int adamw_update(const Update* update) {
  return operands::guarded([&] {
    for (const float* p : {const_cast<const float*>(update->master), update->grad,
                           const_cast<const float*>(update->first), const_cast<const float*>(update->second)})
      operands::present(p, update->n);
    operands::optional(update->copy);
    rows::over_rows((update->n + simd::kLanes - 1) / simd::kLanes, simd::kLanes, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * simd::kLanes, last = std::min(end * simd::kLanes, update->n);
      rows::by_vector(last - first, [&](int64_t i, int live) { update->at(first + i, live); });
    });
  });
}
