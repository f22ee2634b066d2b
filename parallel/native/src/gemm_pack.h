// Layouts of the two operands of gemm.cpp, and the copies that make them.
//
// The K axis is counted in units of four bytes: one float32, or two bfloat16. In bfloat16 a leaf is whole blocks of 16
// units (bf16_order.h), the last one filled with zeros, so that where a leaf lies in K, and hence which rank holds it,
// never shows in the result. A block's units are paired where vdpbf16ps computes and natural elsewhere: one block of
// sixteen columns is then a tile of AMX, its rows kPanelBytes apart.
#pragma once
#include <cstdint>

#include "bf16_order.h"

namespace gemm {

constexpr int kPanel = 64;                    // columns of one panel of W: 4 vectors
constexpr int kPanelBytes = kPanel * 4;       // one unit of a panel
#ifdef __AVX512BF16__
constexpr bool kPaired = true;
#else
constexpr bool kPaired = false;
#endif
constexpr int kUnitOfX = kPaired ? 4 : 8;     // bytes of a bfloat16 unit in a copy of x: natural ones are widened
constexpr int kTileRow = 64;                  // bytes of a row of one block where tiles compute: natural units

struct View {                                 // a matrix [rows, K] of float32 or bfloat16 anywhere in memory
  const char* base;
  int64_t row_stride, k_stride;               // in elements; one of the two is 1
};

// Elements a..b of K become units from `unit` on.
struct Leaf { int64_t begin, end, unit; };

// Units that a leaf takes.
inline int64_t units_of(const Leaf& leaf, bool half) {
  const int64_t n = leaf.end - leaf.begin;
  return half ? (n + bf16_order::kBlock - 1) / bf16_order::kBlock * bf16_order::kUnits : n;
}

// Where copy_rows puts a row's unit: row * row_bytes + unit * unit_bytes. For tiles the rows of a block follow each other
// (row_bytes is kTileRow), so that any sixteen of them are a tile.
struct RowPlace {
  int64_t row_bytes, unit_bytes;
  bool tiles;
};

struct ElementPlace { int64_t unit, byte; };  // its unit in the leaf, its byte in the unit
inline ElementPlace element_place(int64_t k, bool half) {
  if (!half) return {k, 0};
  const int64_t block = k / bf16_order::kBlock * bf16_order::kUnits, within = k % bf16_order::kBlock, nth = within / 2;
  if (!kPaired) return {block + nth, within % 2 * 2};
  return {block + within % 2 * bf16_order::kChain + nth / 2, nth % 2 == 0 ? 2 : 0};
}

// W -> panels [ceil(rows / 64)][units][64]; columns beyond `rows` are zero.
void pack_panels(bool half, View src, int64_t rows, const Leaf* leaves, int64_t n_leaves, int64_t units, char* dst);
// panels -> W, contiguous [rows, k]
void unpack_panels(bool half, const char* src, int64_t rows, int64_t k, const Leaf* leaves, int64_t n_leaves,
                   int64_t units, char* dst);
// x -> rows; a bfloat16 unit takes kUnitOfX bytes, or four for tiles
void copy_rows(bool half, View src, int64_t rows, const Leaf* leaves, int64_t n_leaves, RowPlace place, char* dst);

}  // namespace gemm
