// Whether a packed weight still holds what its source does, looked at in a few places per product.
//
// PyTorch counts writes to a tensor and the owner of a packed weight goes by that count (parallel/matmul/products.py). Writes
// past it (`.data` of a plain tensor, numpy, C) show here: each call compares a few elements, other ones every time, spread
// evenly over the matrix. A write to all of it is seen by the next product, one to a part of it after a few.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "gemm_pack.h"

namespace gemm {

struct Watch {                                // mirrored by _WATCH in gemm.py
  const char* source;
  int64_t row_stride, k_stride, rows, k, element;  // strides in elements; bytes of an element
  const char* panels;
  int64_t units;
  const Leaf* leaves;
  int64_t n_leaves;
  uint64_t turn;
};

constexpr int kLooks = 4;

inline bool differs(const Watch& w, int64_t row, int64_t k) {
  const Leaf* leaf = std::upper_bound(w.leaves, w.leaves + w.n_leaves, k, [](int64_t at, const Leaf& l) { return at < l.end; });
  if (leaf == w.leaves + w.n_leaves || k < leaf->begin) return false;
  const ElementPlace at = element_place(k - leaf->begin, w.element == 2);
  const char* packed = w.panels + ((row / kPanel * w.units + leaf->unit + at.unit) * kPanel + row % kPanel) * 4 + at.byte;
  return std::memcmp(w.source + (row * w.row_stride + k * w.k_stride) * w.element, packed, w.element) != 0;
}

inline bool stale(Watch& w) {
  const uint64_t first = __atomic_fetch_add(&w.turn, kLooks, __ATOMIC_RELAXED);
  for (int i = 0; i < kLooks; ++i) {          // the golden ratio's multiples fall evenly over [0, 1)
    const uint64_t share = (first + i) * 0x9e3779b97f4a7c15ULL;
    const int64_t at = static_cast<int64_t>(static_cast<unsigned __int128>(share) * (w.rows * w.k) >> 64);
    if (differs(w, at / w.k, at % w.k)) return true;
  }
  return false;
}

}  // namespace gemm
