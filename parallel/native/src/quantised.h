// A weight W [N, K] in whole numbers of 8 or 4 bits, and its way into the panels that the tiles of gemm_tile.h read.
//
// It lies in panels of 64 columns and in the leaves of gemm_pack.h. An element of K is a line: 64 numbers, one a column.
// A block's lines stand in the order of its sum: its even elements, then its odd ones. Two lines of 4 bits share bytes, the
// first in their low halves.
//
//   of a column    int8: the sum of a leaf's part is taken over the whole numbers, which bfloat16 holds exactly, and then
//                  multiplied by the column's scale: c = fma(sum, scale, c) in float32, where c began at +0
//   of groups      the weight is bf16(float32(number - zero) * scale) of the element's group: what the tiles read
//
// Either way no element's result depends on anything but its row of x, its row of W and the leaves' borders.
#pragma once
#include <cstdint>

#include "gemm_pack.h"
#include "simd.h"

namespace gemm {

struct Quantised {                            // mirrored by _FORM of quantised_weight.py
  int64_t bits;                               // 8: -128..127; 4: 0..15
  int64_t n_groups;                           // 0: one scale per column, applied to sums
  const float* scales;                        // [panels][max(n_groups, 1)][64]
  const int8_t* zeros;                        // [panels][n_groups][64]
  const int32_t* groups;                      // of each line
  int64_t unit_bytes() const { return kPanel * 2 * bits / 8; }           // two elements of K
  bool of_columns() const { return n_groups == 0; }
};

inline simd::f32x16 whole_numbers(const char* p) {                       // sixteen of 8 bits
#ifdef __AVX512F__
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  using i8x16 = int8_t __attribute__((vector_size(16)));
  i8x16 v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, simd::f32x16);
#endif
}

// Units [unit, unit + units) of a panel, whole blocks from `from` on, as bfloat16 in the order of gemm_pack.h.
void widen(const Quantised& w, int64_t panel, const char* from, int64_t unit, int64_t units, char* to);

// A leaf's part is summed: the column's scale, then what the leaf held before (null: nothing), then finished subtrees.
void scale_sums(const Quantised& w, int64_t panel, int64_t rows, const float* sums, bool begins, int64_t pops,
                int64_t level, float* slot);

}  // namespace gemm
