// The register tile of gemm.cpp: a few rows of x against one panel of 64 columns of W, over one step of K. All of the
// product's arithmetic is here; everything else decides which tile runs when. A tile covers a stripe of the panel, as
// wide as the machine's registers allow: 6 rows (of bfloat16 4) x 64 columns with AVX-512, 3 x 32 with AVX2, 2 x 16 elsewhere.
//
//   float32    one chain of fused multiply-adds per element, kept in `slot` between steps
//   bfloat16   bf16_order.h, block by block, W in the order of its memory: the chain e, then the chain o, then c of `slot`
//              + (e + o); one or two rows have both chains and c in registers
//
// At a step's end the finished subtrees are added while the sums are still in registers.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "bf16_order.h"
#include "gemm_pack.h"
#include "quantised.h"
#include "simd.h"

namespace gemm {

#if defined(__AVX512F__)
constexpr int kWidth = 16;                    // lanes of a register
constexpr int kRows = 6, kHalfRows = 4;       // of a float32 and of a bfloat16 tile
constexpr int kFewRows = 2;                   // with both chains in registers
#elif defined(__FMA__)
constexpr int kWidth = 8, kRows = 3, kHalfRows = 3, kFewRows = 1;
#else
constexpr int kWidth = 4, kRows = 2, kHalfRows = 2, kFewRows = 1;
#endif
constexpr int kVectors = 4;
constexpr int kStripe = kWidth * kVectors;    // columns

using Floats = float __attribute__((vector_size(4 * kWidth), may_alias));
using Words = uint32_t __attribute__((vector_size(4 * kWidth), may_alias));

template <class V>
inline V read(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
inline void write(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline Floats spread(const void* p) { float f; std::memcpy(&f, p, 4); return f - Floats{}; }

// c + a b, rounded once. Written out because the compiler otherwise folds a load of W into several of its uses.
#if defined(__AVX512F__) || defined(__FMA__)
inline Floats fused(Floats c, Floats a, Floats b) { asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); return c; }
inline Floats fused_half(Floats c, Floats a, Floats b) { return fused(c, a, b); }
#else
inline Floats fused(Floats c, Floats a, Floats b) {
  for (int i = 0; i < kWidth; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
inline Floats fused_half(Floats c, Floats a, Floats b) {                 // exact as bf16_order::fma is
  using Wide = double __attribute__((vector_size(8 * kWidth)));
  return __builtin_convertvector(__builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) +
                                 __builtin_convertvector(c, Wide), Floats);
}
#endif

struct F32 {
  static constexpr bool kHalf = false;
  static constexpr int kColumnBytes = 4;      // of a unit of W
};

// One step of a block's chain of even (0) or odd (1) elements: `x` of a row's block, `w` of one vector of columns'.
#ifdef __AVX512BF16__
struct Paired {
  static constexpr bool kHalf = true;
  static constexpr int kSteps = bf16_order::kChain, kFlops = 4, kColumnBytes = 4, kBlockBytes = bf16_order::kUnits * kPanelBytes;
  using Wide = __m512bh;
  static Wide x(const char* p, int parity, int step) {
    int i;
    std::memcpy(&i, p + 4 * (kSteps * parity + step), 4);
    return (Wide)_mm512_set1_epi32(i);
  }
  static Wide w(const char* p, int parity, int step) {
    return (Wide)_mm512_loadu_si512(p + kPanelBytes * (kSteps * parity + step));
  }
  static Floats add(Floats c, Wide a, Wide b) { return (Floats)_mm512_dpbf16_ps((__m512)c, a, b); }
};
#endif
struct Natural {                              // x is widened (copy_rows): sixteen even elements, then the odd ones
  static constexpr bool kHalf = true;
  static constexpr int kSteps = bf16_order::kUnits, kFlops = 2, kColumnBytes = 4, kBlockBytes = bf16_order::kUnits * kPanelBytes;
  using Wide = Floats;
  static Wide x(const char* p, int parity, int step) { return spread(p + 4 * (kSteps * parity + step)); }
  static Wide w(const char* p, int parity, int step) {
    Words units = read<Words>(p + kPanelBytes * step);
    return parity ? (Floats)(units & 0xffff0000u) : (Floats)(units << 16);
  }
  static Floats add(Floats c, Wide a, Wide b) { return fused_half(c, a, b); }
};
struct Int8 {                                 // W in whole numbers (quantised.h), widened as they are read; two steps as one
  static constexpr bool kHalf = true;
  static constexpr int kSteps = bf16_order::kChain, kColumnBytes = 1, kBlockBytes = bf16_order::kBlock * kPanel;
  struct Wide { Floats first, second; };
  static Wide x(const char* p, int parity, int step) {
    if (!kPaired) return {Natural::x(p, parity, 2 * step), Natural::x(p, parity, 2 * step + 1)};
    const Words pair = (Words)spread(p + 4 * (kSteps * parity + step));
    return {(Floats)(pair & 0xffff0000u), (Floats)(pair << 16)};
  }
  static Wide w(const char* p, int parity, int step) {
    p += kPanel * 2 * (kSteps * parity + step);
    return {numbers(p), numbers(p + kPanel)};
  }
  static Floats add(Floats c, Wide a, Wide b) { return fused_half(fused_half(c, a.first, b.first), a.second, b.second); }

 private:
  static Floats numbers(const char* p) {
#ifdef __AVX512F__
    return (Floats)whole_numbers(p);
#else
    using Bytes = int8_t __attribute__((vector_size(kWidth)));
    return __builtin_convertvector(read<Bytes>(p), Floats);
#endif
  }
};
#ifdef __AVX512BF16__
using Half = std::conditional_t<kPaired, Paired, Natural>;
#else
using Half = Natural;
#endif

struct Tile {
  const char* a;                              // x: first row, first unit
  int64_t a_stride;                           // bytes from row to row
  const char* b;                              // W: [units][64], or whole numbers
  int64_t units;
  float* slot;                                // where the sums are kept: [rows][64]
  bool first;                                 // they begin here (at zero) or go on from the slot
  int64_t pops, level;                        // finished subtrees to add, each `level` floats before the last
  bf16_order::Flushing* flushing;             // on for bfloat16's sums, off for the tree, which keeps denormals
  const char* ahead;                          // what to prefetch
  int64_t rows, row_tile, a_block;            // of gemm_amx.h: rows of x, of a register, bytes of x from block to block
};

template <int R, class F>
inline __attribute__((always_inline)) void each(const F& f) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) f(r, j);
}

template <int R>
inline __attribute__((always_inline)) void begin(const Tile& t, Floats (&acc)[R][kVectors]) {
  each<R>([&](int r, int j) { acc[r][j] = t.first ? Floats{} : read<Floats>(t.slot + r * kPanel + j * kWidth); });
}

// At a step's end: the finished subtrees added, then kept.
template <int R>
inline __attribute__((always_inline)) void keep(const Tile& t, Floats (&acc)[R][kVectors]) {
  float* slot = t.slot;
  if (t.pops) {
    each<R>([&](int r, int j) { bf16_order::settle(acc[r][j]); });
    t.flushing->set(false);
    for (int64_t pop = 0; pop < t.pops; ++pop) {
      slot -= t.level;
      each<R>([&](int r, int j) { acc[r][j] = read<Floats>(slot + r * kPanel + j * kWidth) + acc[r][j]; });
    }
  }
  each<R>([&](int r, int j) { write(slot + r * kPanel + j * kWidth, acc[r][j]); });
}

template <int Lines, bool Near>
inline __attribute__((always_inline)) void fetch(const char*& ahead) {
#pragma GCC unroll 16
  for (int p = 0; p < Lines; ++p) __builtin_prefetch(ahead + p * 64, 0, Near ? 3 : 2);
  ahead += Lines * 64;
}

// Lines: cache lines to prefetch per four units; Near: into the first-level cache.
template <int R, int Lines, bool Near>
void stripe(F32, const Tile& t) {
  Floats acc[R][kVectors];
  begin<R>(t, acc);
  const char *a = t.a, *b = t.b, *ahead = t.ahead;
  const int64_t stride = t.a_stride;
  auto step = [&](int u) __attribute__((always_inline)) {
    Floats w[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) w[j] = read<Floats>(b + u * kPanelBytes + j * 4 * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Floats x = spread(a + r * stride + u * 4);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[r][j] = fused(acc[r][j], x, w[j]);
    }
  };
  int64_t units = t.units;
  for (; units >= 4; units -= 4) {
    fetch<Lines, Near>(ahead);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) step(u);
    a += 16;
    b += 4 * kPanelBytes;
  }
  for (; units > 0; --units) { step(0); a += 4; b += kPanelBytes; }
  keep<R>(t, acc);
}

// One block's chain of `Parity`; where a chain has eight steps each of the two prefetches, else the first.
template <class Op, int R, int Parity, int Lines, bool Near>
inline __attribute__((always_inline)) void chain(const char* a, int64_t stride, const char* b, const char*& ahead,
                                                 Floats (&acc)[R][kVectors]) {
  each<R>([&](int r, int j) { acc[r][j] = Floats{}; });
#pragma GCC unroll 2
  for (int step = 0; step < Op::kSteps; ++step) {
    if (Op::kSteps == bf16_order::kChain || Parity == 0) fetch<Lines / 4, Near>(ahead);
    typename Op::Wide w[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) w[j] = Op::w(b + j * Op::kColumnBytes * kWidth, Parity, step);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      typename Op::Wide x = Op::x(a + r * stride, Parity, step);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[r][j] = Op::add(acc[r][j], x, w[j]);
    }
  }
}

// c stays in the slot from block to block. `t.slot` is read anew on purpose: of a pointer that cannot change the compiler
// carries c to the next block in registers that there are not, and spills.
template <class Op, int R, int Lines, bool Near>
void many(const Tile& t) {
  Floats acc[R][kVectors];
  begin<R>(t, acc);
  if (t.first && t.units > 0) each<R>([&](int r, int j) { write(t.slot + r * kPanel + j * kWidth, acc[r][j]); });
  const char *a = t.a, *b = t.b, *ahead = t.ahead;
  for (int64_t units = t.units; units > 0; units -= bf16_order::kUnits) {
    float e[R * kStripe];
    chain<Op, R, 0, Lines, Near>(a, t.a_stride, b, ahead, acc);
    each<R>([&](int r, int j) { write(e + r * kStripe + j * kWidth, acc[r][j]); });
    chain<Op, R, 1, Lines, Near>(a, t.a_stride, b, ahead, acc);
    each<R>([&](int r, int j) {
      acc[r][j] = read<Floats>(t.slot + r * kPanel + j * kWidth) + (read<Floats>(e + r * kStripe + j * kWidth) + acc[r][j]);
    });
    if (units <= bf16_order::kUnits) break;
    each<R>([&](int r, int j) { write(t.slot + r * kPanel + j * kWidth, acc[r][j]); });
    a += bf16_order::kUnits * kUnitOfX;
    b += Op::kBlockBytes;
  }
  keep<R>(t, acc);
}

template <class Op, int R, int Lines, bool Near>
void few(const Tile& t) {
  Floats c[R][kVectors];
  begin<R>(t, c);
  const char *a = t.a, *b = t.b, *ahead = t.ahead;
  for (int64_t units = t.units; units > 0; units -= bf16_order::kUnits) {
    Floats e[R][kVectors], o[R][kVectors];
    chain<Op, R, 0, Lines, Near>(a, t.a_stride, b, ahead, e);
    chain<Op, R, 1, Lines, Near>(a, t.a_stride, b, ahead, o);
    each<R>([&](int r, int j) { c[r][j] = c[r][j] + (e[r][j] + o[r][j]); });
    a += bf16_order::kUnits * kUnitOfX;
    b += Op::kBlockBytes;
  }
  keep<R>(t, c);
}

template <int R, int Lines, bool Near, class Op>
void stripe(Op, const Tile& t) {
  if constexpr (R <= kFewRows) few<Op, R, Lines, Near>(t);
  else many<Op, R, Lines, Near>(t);
}

template <class Op, int R, int Lines, bool Near>
void tile(const Tile& t) {
  t.flushing->set(Op::kHalf);
  if constexpr (kStripe == kPanel) return stripe<R, Lines, Near>(Op{}, t);
  Tile part = t;
  for (int column = 0; column < kPanel; column += kStripe, part.b += Op::kColumnBytes * kStripe, part.slot += kStripe) {
    t.flushing->set(Op::kHalf);               // the stripe before may have ended in the tree
    stripe<R, Lines, Near>(Op{}, part);
  }
}

using TileFn = void (*)(const Tile&);

template <class Op, int Lines, bool Near, int... R>
TileFn of_rows(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr TileFn kTile[] = {tile<Op, R + 1, Lines, Near>...};
  return kTile[rows - 1];
}

// Only a panel's one stripe prefetches: several would do so several times.
template <class Op>
TileFn pick(int64_t rows, int lines, bool near) {
  constexpr auto kAll = std::make_integer_sequence<int, Op::kHalf ? kHalfRows : kRows>();
  if (lines == 0 || kStripe < kPanel) return of_rows<Op, 0, false>(rows, kAll);
  if (!near) return of_rows<Op, 4, false>(rows, kAll);
  return lines == 8 ? of_rows<Op, 8, true>(rows, kAll) : of_rows<Op, 16, true>(rows, kAll);
}

}  // namespace gemm
