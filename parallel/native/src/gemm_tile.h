// The register tile of gemm.cpp: up to 6 rows of x against one panel of 64 columns of W, 24 accumulators, over one step
// of K (one row where there are no 32 wide registers). All of the product's arithmetic is here; everything else decides
// which tile runs when.
#pragma once
#include <cstdint>
#include <cstring>

#include "gemm_pack.h"
#include "simd.h"

namespace gemm {

using simd::f32x16;

#ifdef __AVX512F__
constexpr int kRows = 6;
#else
constexpr int kRows = 1;
#endif

// An operation on units: `spread` broadcasts one unit of x, `read` takes 16 units of W, `add` is c + a b. The two
// instructions are written out because the compiler otherwise folds a load of W into several of its uses.
struct F32 {
  using Wide = f32x16;
  static Wide spread(const char* p) { float f; std::memcpy(&f, p, 4); return simd::set1(f); }
  static Wide read(const char* p) { return simd::load(reinterpret_cast<const float*>(p)); }
#ifdef __AVX512F__
  static f32x16 add(f32x16 c, Wide a, Wide b) { asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); return c; }
#else
  static f32x16 add(f32x16 c, Wide a, Wide b) { return simd::fma(a, b, c); }
#endif
};

#ifdef __AVX512BF16__
struct Bf16 {
  using Wide = __m512bh;
  static Wide spread(const char* p) { int i; std::memcpy(&i, p, 4); return (Wide)_mm512_set1_epi32(i); }
  static Wide read(const char* p) { return (Wide)_mm512_loadu_si512(p); }
  static f32x16 add(f32x16 c, Wide a, Wide b) { asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); return c; }
};
#else
struct Bf16 {
  using Wide = simd::u32x16;
  static Wide spread(const char* p) { uint32_t i; std::memcpy(&i, p, 4); return Wide{} + i; }
  static Wide read(const char* p) { Wide w; std::memcpy(&w, p, sizeof w); return w; }
  static f32x16 add(f32x16 c, Wide a, Wide b) {
    c = simd::fma(simd::bits_to_float(a << 16), simd::bits_to_float(b << 16), c);
    return simd::fma(simd::bits_to_float(a & 0xffff0000u), simd::bits_to_float(b & 0xffff0000u), c);
  }
};
#endif

struct Tile {
  const char* a;                              // x: first row, first unit
  int64_t a_stride;                           // bytes from row to row
  const char* b;                              // W: [units][64]
  int64_t units;
  float* slot;                                // where the chain is kept: [rows][64]
  bool first;                                 // the chain begins here (at zero) or goes on from the slot
  int64_t pops, level;                        // finished subtrees to add, each `level` floats before the last
  const char* ahead;                          // what to prefetch
};

template <int R, class F>
inline __attribute__((always_inline)) void each(const F& f) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) f(r, j);
}

// Lines: cache lines to prefetch per four units; Near: into the first-level cache.
template <class Op, int R, int Lines, bool Near>
void tile(const Tile& t) {
  f32x16 acc[R][4];
  each<R>([&](int r, int j) { acc[r][j] = t.first ? simd::zero() : simd::load(t.slot + r * kPanel + j * 16); });
  const char *a = t.a, *b = t.b, *ahead = t.ahead;
  const int64_t stride = t.a_stride;
  auto step = [&](int u) __attribute__((always_inline)) {
    typename Op::Wide w[4], x;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = Op::read(b + u * kPanelBytes + j * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      x = Op::spread(a + r * stride + u * 4);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[r][j] = Op::add(acc[r][j], x, w[j]);
    }
  };
  int64_t units = t.units;
  for (; units >= 4; units -= 4) {
#pragma GCC unroll 16
    for (int p = 0; p < Lines; ++p) __builtin_prefetch(ahead + p * 64, 0, Near ? 3 : 2);
    ahead += Lines * 64;
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) step(u);
    a += 16;
    b += 4 * kPanelBytes;
  }
  for (; units > 0; --units) { step(0); a += 4; b += kPanelBytes; }
  float* slot = t.slot;
  for (int64_t pop = 0; pop < t.pops; ++pop) {
    slot -= t.level;
    each<R>([&](int r, int j) { acc[r][j] = simd::load(slot + r * kPanel + j * 16) + acc[r][j]; });
  }
  each<R>([&](int r, int j) { simd::store(slot + r * kPanel + j * 16, acc[r][j]); });
}

using TileFn = void (*)(const Tile&);

#ifdef __AVX512F__
template <class Op, int Lines, bool Near>
TileFn of_rows(int64_t rows) {
  static constexpr TileFn kTile[kRows] = {tile<Op, 1, Lines, Near>, tile<Op, 2, Lines, Near>, tile<Op, 3, Lines, Near>,
                                          tile<Op, 4, Lines, Near>, tile<Op, 5, Lines, Near>, tile<Op, 6, Lines, Near>};
  return kTile[rows - 1];
}

template <class Op>
TileFn pick(int64_t rows, int lines, bool near) {
  if (lines == 0) return of_rows<Op, 0, false>(rows);
  if (!near) return of_rows<Op, 4, false>(rows);
  return lines == 8 ? of_rows<Op, 8, true>(rows) : of_rows<Op, 16, true>(rows);
}
#else
template <class Op>
TileFn pick(int64_t, int, bool) { return tile<Op, 1, 0, false>; }
#endif

}  // namespace gemm
