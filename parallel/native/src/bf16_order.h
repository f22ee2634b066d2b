// The one order in which sums of bfloat16 products are taken, "amx32": that of AMX's tdpbf16ps, on every CPU.
//
//   K is cut into blocks of 32 elements from the sum's beginning; the last one is padded with zeros and computed in full.
//   In a block  e = a chain of fma over its even elements (k = 0, 2, .., 30), from +0
//               o = the same over its odd ones (k = 1, 3, .., 31)
//   then        c = c + (e + o), where c began at +0.
//   Every step rounds to nearest even, reads denormals as zero and writes them as zero (Flushing).
//
// What is added up afterwards (leaves, a bias, softmax pieces) is no part of it and keeps denormals: collectives do too.
// A block is sixteen units of four bytes, as it lies in memory or with neighbours of one parity brought together:
//
//   natural  (k0 low, k1 high) (k2, k3) ..          e: even(), o: odd() of every unit       fma on any CPU, AMX
//   paired   (k2 low, k0 high) (k6, k4) ..          e: dot() over the first eight units,    vdpbf16ps, which adds the
//            then (k3 low, k1 high) (k7, k5) ..     o: over the last eight                  high halves before the low
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace bf16_order {

using simd::f32x16;
using simd::u32x16;

constexpr int kBlock = 32;                    // elements of K
constexpr int kUnits = 16;                    // units of a block
constexpr int kChain = 8;                     // paired units of one parity

// Flush-to-zero and denormals-are-zero while `set(true)`; what the thread had before when set to false or destroyed.
// The clobbers keep loads and stores, and so the arithmetic between them, on their side of a switch.
class Flushing {
 public:
  explicit Flushing(bool on = true) { set(on); }
  ~Flushing() { set(false); }
  Flushing(const Flushing&) = delete;
  Flushing& operator=(const Flushing&) = delete;

  void set(bool on) {
    if (on == on_) return;
    on_ = on;
#ifdef __SSE2__
    if (on) before_ = _mm_getcsr();
    const unsigned word = on ? before_ | 0x8040 : before_;
    asm volatile("ldmxcsr %0" : : "m"(word) : "memory");
#endif
  }

 private:
  bool on_ = false;
  unsigned before_ = 0;
};

// Computed before a switch of Flushing that follows, though it may stay in a register.
template <class V>
inline void settle(V& value) {
#ifdef __SSE2__
  asm volatile("" : "+v"(value));
#endif
}

inline f32x16 even(u32x16 units) { return simd::bits_to_float(units << 16); }
inline f32x16 odd(u32x16 units) { return simd::bits_to_float(units & 0xffff0000u); }

// a * b + c of widened bfloat16 a and b, rounded once. Without the instruction: the product is exact in float64, and the
// sum's rounding there never moves it across a float32's tie (16 and 24 bits that overlap fit 53; others are no tie).
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__) || defined(__FMA__)
  return simd::fma(a, b, c);
#else
  using f64x16 = double __attribute__((vector_size(128)));
  return __builtin_convertvector(__builtin_convertvector(a, f64x16) * __builtin_convertvector(b, f64x16) +
                                 __builtin_convertvector(c, f64x16), f32x16);
#endif
}

// Two units of one column (lane) that follow each other in K, paired.
inline u32x16 even_pair(u32x16 first, u32x16 second) { return first << 16 | (second & 0xffffu); }
inline u32x16 odd_pair(u32x16 first, u32x16 second) { return (first & 0xffff0000u) | second >> 16; }

// The sixteen units of one row's block, paired.
inline u32x16 paired(u32x16 natural) {
  using u16x32 = uint16_t __attribute__((vector_size(64), may_alias));
  constexpr u16x32 kOrder = {2, 0, 6, 4, 10, 8, 14, 12, 18, 16, 22, 20, 26, 24, 30, 28,
                             3, 1, 7, 5, 11, 9, 15, 13, 19, 17, 23, 21, 27, 25, 31, 29};
  return (u32x16)__builtin_shuffle((u16x32)natural, kOrder);
}

// One step of a chain on paired units: the products of the high halves, then of the low ones, added to c.
inline f32x16 dot(f32x16 c, u32x16 a, u32x16 b) {
#ifdef __AVX512BF16__
  return (f32x16)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  return fma(even(a), even(b), fma(odd(a), odd(b), c));
#endif
}

}  // namespace bf16_order
