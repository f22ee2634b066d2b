// What row kernels share: rows dealt to threads, walks by vectors, sums in a fixed order. Tails run the code of the middle
// with fewer live lanes, and every sum is four accumulators of sixteen lanes started at the row's or leaf's first element.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "operands.h"
#include "pool.h"
#include "simd.h"

namespace rows {

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

using operands::count;
using operands::guarded;
using operands::kBadIndex;
using operands::kBadSize;
using operands::present;
using operands::require;
using operands::typed;

}  // namespace rows
