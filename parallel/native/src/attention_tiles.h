// Register tiles of attention: scores of a few query rows against 64 keys, the online softmax step, p times values.
//
// Keys are walked in tiles of 64 absolute positions, each of four runs of 16. A stored run of one head is
//   keys    [head_dim][16] float32; bfloat16 holds pairs of dimensions [head_dim / 2][16][2], an odd last one as [16]
//   values  [16][head_dim]
// Every lane of every accumulator is one chain in a fixed order (dimensions ascending for a score, positions ascending
// for an output), and a masked key adds nothing, so a row's bits do not depend on the rows, tiles and threads around
// it. R rows and C vectors live in registers: the loops over them must unroll. Nothing here knows sequences or caches.
#pragma once
#include <algorithm>
#include <limits>

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

// How one step of a dot product reads queries and keys: a dimension at a time in float32, a pair in bfloat16.
inline int steps(const float*, int H) { return H; }
inline int steps(const bf16*, int H) { return (H + 1) / 2; }
inline f32x16 key_step(const float* run, int i, int) { return simd::load(run + kRun * i); }
inline u32x16 key_step(const bf16* run, int i, int H) {
  if (2 * i + 1 == H) return simd::float_to_bits(simd::load(run + 2 * kRun * i)) >> 16;
  u32x16 pairs;
  std::memcpy(&pairs, run + 2 * kRun * i, sizeof pairs);
  return pairs;
}
inline f32x16 query_step(const float* q, int i) { return simd::set1(q[i]); }
inline u32x16 query_step(const bf16* q, int i) {       // q is padded with a zero to an even length
  uint32_t x;
  std::memcpy(&x, q + 2 * i, sizeof x);
  return u32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
inline f32x16 add_step(f32x16 query, f32x16 key, f32x16 sum) { return simd::fma(query, key, sum); }
inline f32x16 add_step(u32x16 query, u32x16 key, f32x16 sum) {
#ifdef __AVX512BF16__
  return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)query, (__m512bh)key);
#else
  sum = simd::fma(simd::bits_to_float(query << 16), simd::bits_to_float(key << 16), sum);
  return simd::fma(simd::bits_to_float(query & 0xffff0000u), simd::bits_to_float(key & 0xffff0000u), sum);
#endif
}

// S, here and below, is 0 where all rows read the same four runs and kRuns where each row brings its own four.
// Rows that share nothing are bound by memory: they fetch `ahead`, the runs needed next.
template <int R, int S>
constexpr bool kFetches = R == 1 || S > 0;
template <int R, int S>
constexpr int kSets = S > 0 ? R : 1;

// scores[r][c] = q[r] . keys of run c
template <int R, int C, int S = 0, class T>
__attribute__((noinline)) void dot(const T* q, int ldq, const T* const* keys, int H, const T* const* ahead,
                                   f32x16 (*scores)[kRuns]) {
  f32x16 sum[R][C] = {};
  for (int i = 0; i < steps(q, H); ++i) {
    if (kFetches<R, S>)
      ATTN_UNROLL for (int c = 0; c < kRuns * kSets<R, S>; ++c)
        __builtin_prefetch(reinterpret_cast<const char*>(ahead[c]) + 64 * i);
    decltype(key_step(q, 0, 0)) key[C];
    ATTN_UNROLL for (int r = 0; r < R; ++r) {
      if (r < kSets<R, S>) ATTN_UNROLL for (int c = 0; c < C; ++c) key[c] = key_step(keys[r * S + c], i, H);
      auto query = query_step(q + r * ldq, i);
      ATTN_UNROLL for (int c = 0; c < C; ++c) sum[r][c] = add_step(query, key[c], sum[r][c]);
    }
  }
  ATTN_UNROLL for (int r = 0; r < R; ++r)
    ATTN_UNROLL for (int c = 0; c < C; ++c) scores[r][c] = sum[r][c];
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
