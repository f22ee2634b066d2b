// Register tiles of attention: scores of a few query rows against 64 keys, the online softmax step, p times values.
//
// Keys are walked in tiles of 64 absolute positions, each of four runs of 16. A stored run of one head is
//   keys    [head_dim][16] float32; bfloat16 holds pairs of dimensions [head_dim / 2][16][2], an odd last one as [16]
//   values  [16][head_dim]
// Every lane of every accumulator is summed in a fixed order (dimensions ascending for a score of float32, bf16_order.h
// for one of bfloat16, positions ascending for an output), and a masked key adds nothing, so a row's bits do not depend
// on the rows, tiles and threads around it. R rows and C vectors live in registers: the loops over them must unroll.
// Nothing here knows sequences or caches.
#pragma once
#include <algorithm>
#include <limits>

#include "bf16_order.h"
#include "simd.h"

#define ATTN_UNROLL _Pragma("GCC unroll 8")

namespace attn {

using simd::bf16;
using simd::f32x16;
using simd::i32x16;
using simd::u32x16;

constexpr int kRun = simd::kLanes;          // keys in one vector; a cache block holds a whole number of runs
constexpr int kRuns = 4;
constexpr int kTile = kRun * kRuns;         // keys between two rescalings, counted from position 0
constexpr int kRows = 6;                    // query rows that share one pass over a tile: 6 x 4 sums fill the registers
constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr f32x16 kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline int padded(int H) { return (H + kRun - 1) / kRun * kRun; }

// Calls f<R>(row) so that rows 0..rows-1 are covered by groups of at most kRows.
template <class F>
inline void in_groups(int rows, const F& f) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows) f(std::integral_constant<int, kRows>(), r);
  if (r + 4 <= rows) f(std::integral_constant<int, 4>(), r), r += 4;
  if (r + 2 <= rows) f(std::integral_constant<int, 2>(), r), r += 2;
  if (r < rows) f(std::integral_constant<int, 1>(), r);
}

// S, here and below, is 0 where all rows read the same four runs and kRuns where each row brings its own four.
// Rows that share nothing are bound by memory: they fetch `ahead`, the runs needed next.
template <int R, int S>
constexpr bool kFetches = R == 1 || S > 0;
template <int R, int S>
constexpr int kSets = S > 0 ? R : 1;

// scores[r][c] = q[r] . keys of run c
template <int R, int C, int S = 0>
__attribute__((noinline)) void dot(const float* q, int ldq, const float* const* keys, int H, const float* const* ahead,
                                   f32x16 (*scores)[kRuns]) {
  f32x16 sum[R][C] = {};
  for (int i = 0; i < H; ++i) {
    if (kFetches<R, S>)
      ATTN_UNROLL for (int c = 0; c < kRuns * kSets<R, S>; ++c) __builtin_prefetch(ahead[c] + kRun * i);
    f32x16 key[C];
    ATTN_UNROLL for (int r = 0; r < R; ++r) {
      if (r < kSets<R, S>)
        ATTN_UNROLL for (int c = 0; c < C; ++c) key[c] = simd::load(keys[r * S + c] + kRun * i);
      const f32x16 query = simd::set1(q[r * ldq + i]);
      ATTN_UNROLL for (int c = 0; c < C; ++c) sum[r][c] = simd::fma(query, key[c], sum[r][c]);
    }
  }
  ATTN_UNROLL for (int r = 0; r < R; ++r)
    ATTN_UNROLL for (int c = 0; c < C; ++c) scores[r][c] = sum[r][c];
}

// Rows of queries are padded with zeros to whole blocks of the bfloat16 order; a block's units are paired.
inline int padded_row(const float*, int H) { return padded(H); }
inline int padded_row(const bf16*, int H) {
  constexpr int kBlock = bf16_order::kBlock;
  return (H + kBlock - 1) / kBlock * kBlock;
}
inline void pair_row(const float*, int) {}
inline void pair_row(bf16* q, int length) {
  for (int h = 0; h < length; h += bf16_order::kBlock) {
    u32x16 units;
    std::memcpy(&units, q + h, sizeof units);
    units = bf16_order::paired(units);
    std::memcpy(q + h, &units, sizeof units);
  }
}

// Dimensions 2 i and 2 i + 1 of sixteen keys; zero where the head has none.
inline u32x16 key_unit(const bf16* run, int i, int H) {
  if (2 * i + 1 < H) {
    u32x16 unit;
    std::memcpy(&unit, run + 2 * kRun * i, sizeof unit);
    return unit;
  }
  return 2 * i < H ? simd::float_to_bits(simd::load(run + 2 * kRun * i)) >> 16 : u32x16{};
}

// One chain of a block: its even dimensions (odd = 0) or its odd ones. The steps of a padded block's empty units would
// all add the same zero; one addition has their bits.
template <int R, int C, int S, int odd>
__attribute__((always_inline)) inline void chain(const bf16* q, int ldq, const bf16* const* keys, int H, int block,
                                                 const bf16* const* ahead, f32x16 (&sum)[R][C]) {
  using namespace bf16_order;
  const int first = block * kUnits, steps = std::min(kChain, ((H + 1) / 2 - first + 1) / 2);
  for (int j = 0; j < steps; ++j) {
    const int unit = first + 2 * j;
    if (kFetches<R, S> && 2 * (unit + odd) < H)
      ATTN_UNROLL for (int c = 0; c < kRuns * kSets<R, S>; ++c) __builtin_prefetch(ahead[c] + 2 * kRun * (unit + odd));
    u32x16 key[C];
    ATTN_UNROLL for (int r = 0; r < R; ++r) {
      if (r < kSets<R, S>) ATTN_UNROLL for (int c = 0; c < C; ++c) {
        const u32x16 low = key_unit(keys[r * S + c], unit, H), high = key_unit(keys[r * S + c], unit + 1, H);
        key[c] = odd ? odd_pair(low, high) : even_pair(low, high);
      }
      uint32_t pair;
      std::memcpy(&pair, q + r * ldq + block * kBlock + 2 * (odd * kChain + j), sizeof pair);
      const u32x16 query = u32x16{} + pair;
      ATTN_UNROLL for (int c = 0; c < C; ++c) sum[r][c] = bf16_order::dot(sum[r][c], query, key[c]);
    }
  }
  if (steps < kChain)
    ATTN_UNROLL for (int r = 0; r < R; ++r)
      ATTN_UNROLL for (int c = 0; c < C; ++c) sum[r][c] += simd::zero();
}

// The same of bfloat16 in the order of bf16_order.h; the thread is Flushing. q: paired blocks (pair_row).
template <int R, int C, int S = 0>
__attribute__((noinline)) void dot(const bf16* q, int ldq, const bf16* const* keys, int H, const bf16* const* ahead,
                                   f32x16 (*scores)[kRuns]) {
  for (int block = 0; block * bf16_order::kBlock < H; ++block) {
    f32x16 even[R][C] = {};
    chain<R, C, S, 0>(q, ldq, keys, H, block, ahead, even);
    f32x16 parked[R][C];
    std::memcpy(parked, even, sizeof even);
    f32x16 odd[R][C] = {};
    chain<R, C, S, 1>(q, ldq, keys, H, block, ahead, odd);
    ATTN_UNROLL for (int r = 0; r < R; ++r)
      ATTN_UNROLL for (int c = 0; c < C; ++c) {
        const f32x16 sum = parked[r][c] + odd[r][c];
        scores[r][c] = (block == 0 ? simd::zero() : scores[r][c]) + sum;
      }
  }
}

// What `weigh` adds up: for positions first..last-1 of a tile, weight p[r * row + j * position] times values[j].
template <class T>
struct Weighted {
  const float* p;
  int row, position;                        // strides of p
  const T* const* values;                   // four runs, or four per row
  int H, first, last;
  const T* const* ahead;
};

// o[r] = o[r] * shrink[r] + the weighted values, C vectors wide from dimension h on
template <int R, int C, int S, class T>
__attribute__((noinline)) void accumulate(const Weighted<T> w, int h, const f32x16* shrink, float* o, int ldo) {
  const int live = std::min(kRun, w.H - h - kRun * (C - 1));      // lanes of the last vector
  f32x16 sum[R][C];
  ATTN_UNROLL for (int r = 0; r < R; ++r)
    ATTN_UNROLL for (int c = 0; c < C; ++c) sum[r][c] = simd::load(o + r * ldo + h + kRun * c) * shrink[r];
  for (int run = w.first / kRun; run * kRun < w.last; ++run) {
    const int begin = std::max(w.first - run * kRun, 0), end = std::min(w.last - run * kRun, kRun);
    const T *values[R], *ahead[R];
    ATTN_UNROLL for (int r = 0; r < kSets<R, S>; ++r) {
      values[r] = w.values[r * S + run] + int64_t(begin) * w.H + h;
      ahead[r] = w.ahead[r * S + run] + int64_t(begin) * w.H + h;
    }
    const float* p = w.p + (run * kRun + begin) * w.position;
    for (int j = begin; j < end; ++j, p += w.position) {
      f32x16 value[C];
      ATTN_UNROLL for (int r = 0; r < R; ++r) {
        if (r < kSets<R, S>) {
          if (kFetches<R, S>)
            ATTN_UNROLL for (int c = 0; c < C; c += 4 / sizeof(T)) __builtin_prefetch(ahead[r] + c * kRun);
          ATTN_UNROLL for (int c = 0; c + 1 < C; ++c) value[c] = simd::load(values[r] + kRun * c);
          value[C - 1] = simd::load(values[r] + kRun * (C - 1), live);
          values[r] += w.H, ahead[r] += w.H;
        }
        ATTN_UNROLL for (int c = 0; c < C; ++c) sum[r][c] = simd::fma(simd::set1(p[r * w.row]), value[c], sum[r][c]);
      }
    }
  }
  ATTN_UNROLL for (int r = 0; r < R; ++r)
    ATTN_UNROLL for (int c = 0; c < C; ++c) simd::store(o + r * ldo + h + kRun * c, sum[r][c]);
}

template <int R, int S = 0, class T>
void weigh(const Weighted<T>& w, const f32x16* shrink, float* o, int ldo) {
  int h = 0;
  for (; w.H - h > 3 * kRun; h += 4 * kRun) accumulate<R, 4, S>(w, h, shrink, o, ldo);
  if (w.H - h > 2 * kRun) accumulate<R, 3, S>(w, h, shrink, o, ldo);
  else if (w.H - h > kRun) accumulate<R, 2, S>(w, h, shrink, o, ldo);
  else if (w.H - h > 0) accumulate<R, 1, S>(w, h, shrink, o, ldo);
}

// Row r adds positions 0..last[r]-1, ascending in r: together as far as the first row goes, then each row its rest.
template <int R, class T>
void weigh_up_to(Weighted<T> w, const int* last, const f32x16* shrink, float* o, int ldo) {
  const f32x16 one = simd::set1(1);
  w.first = 0, w.last = last[0];
  weigh<R>(w, shrink, o, ldo);
  for (int r = 1; r < R; ++r) {
    w.p += w.row, w.first = last[0], w.last = last[r];
    if (w.first < w.last) weigh<1>(w, &one, o + r * ldo, ldo);
  }
}

inline f32x16 splat_max(f32x16 x) {         // the largest lane, in every lane
  x = simd::max(x, __builtin_shuffle(x, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  x = simd::max(x, __builtin_shuffle(x, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  x = simd::max(x, __builtin_shuffle(x, i32x16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  return simd::max(x, __builtin_shuffle(x, i32x16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
}

// score * scale + slope * (key - query) of the sixteen keys whose first stands `live` positions before the row's bound
inline f32x16 biased(f32x16 score, float scale, float slope, int live) {
  return simd::fma(score, simd::set1(scale), (kIota + simd::set1(float(1 - live))) * simd::set1(slope));
}
inline i32x16 before(int live) { return kIota < simd::set1(float(live)); }                // the lanes a row may see

// What a row carries from tile to tile.
struct Row {
  f32x16 top, sum;                          // running maximum (the same in every lane); sixteen partial sums
  int bound;                                // it sees positions 0..bound-1, its own is the last of them
  float slope;                              // of its head's ALiBi bias, 0 without
};

// Online softmax of R rows over C runs that begin at `start`: scores become p, outputs must shrink by shrink[r].
template <int R, int C>
__attribute__((noinline)) void soften(Row* rows, f32x16 (*scores)[kRuns], int start, float scale, float* p,
                                      f32x16* shrink) {
  f32x16 top[R];
  ATTN_UNROLL for (int r = 0; r < R; ++r) {
    top[r] = simd::set1(kNever);
    ATTN_UNROLL for (int c = 0; c < C; ++c) {
      const int live = rows[r].bound - start - kRun * c;
      f32x16 x = biased(scores[r][c], scale, rows[r].slope, live);
      if (live < kRun) x = simd::select(before(live), x, simd::set1(kNever));
      scores[r][c] = x;
      top[r] = simd::max(top[r], x);
    }
  }
  ATTN_UNROLL for (int r = 0; r < R; ++r) top[r] = simd::max(rows[r].top, splat_max(top[r]));
  ATTN_UNROLL for (int r = 0; r < R; ++r) {
    const f32x16 base = simd::select(top[r] == simd::set1(kNever), simd::zero(), top[r]);
    f32x16 part[kRuns] = {};
    ATTN_UNROLL for (int c = 0; c < C; ++c) {
      part[c] = simd::exp(scores[r][c] - base);
      simd::store(p + r * kTile + kRun * c, part[c]);
    }
    shrink[r] = simd::exp(rows[r].top - base);
    rows[r].sum = simd::fma(rows[r].sum, shrink[r], (part[0] + part[1]) + (part[2] + part[3]));
    rows[r].top = top[r];
  }
}

}  // namespace attn
