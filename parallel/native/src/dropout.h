// Dropout masks as a pure function of keys: an element is kept or not whatever is computed beside it.
//
// draw(key, column) = two rounds of a 32-bit mixer (multiply and xor-shift; the constants of C. Wellons' "lowbias32")
// over the column and both halves of the row's 64-bit key. An element is dropped where its draw is below p * 2^32. The
// same formula in numpy: parallel/layers/dropout.py.
#pragma once
#include "simd.h"

namespace dropout {

using simd::f32x16;
using simd::u32x16;

template <class U>
inline U mix(U x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

// splitmix64's finaliser (Steele, Lea and Flood 2014): keys from keys
inline uint64_t mix_key(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

struct Chance {                             // mirrored in native/dropout.py
  uint32_t threshold;                       // drop below it
  float scale;                              // of what is kept
};

constexpr u32x16 kColumns = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// What columns first..first+15 of a row are multiplied with: 0 or the scale.
inline f32x16 factors(const Chance& chance, uint64_t key, uint32_t first) {
  const u32x16 draws = mix((kColumns + first) * 0x9e3779b9U + uint32_t(key));
  const u32x16 low = u32x16{} + chance.threshold;
  return simd::select(mix(draws ^ uint32_t(key >> 32)) >= low, simd::set1(chance.scale), simd::zero());
}

struct Heads {                              // of one attention layer: row (token t, local head n) has a key of its own
  Chance chance;
  const uint64_t *tokens, *heads;
  uint64_t key(int64_t t, int64_t n) const { return mix_key(tokens[t] ^ heads[n]); }
};

}  // namespace dropout
