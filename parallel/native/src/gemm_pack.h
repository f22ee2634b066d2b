// Layouts of the two operands of gemm.cpp, and the copies that make them.
//
// The K axis is counted in units of four bytes: one float32, or a pair of bfloat16. A leaf starts on a unit of its own
// and its odd last element is paired with zero, so that where a leaf lies in K, and hence which rank holds it, never
// shows in the result.
#pragma once
#include <cstdint>

namespace gemm {

constexpr int kPanel = 64;                    // columns of one panel of W: 4 vectors
constexpr int kPanelBytes = kPanel * 4;       // one unit of a panel

struct View {                                 // a matrix [rows, K] of float32 or bfloat16 anywhere in memory
  const char* base;
  int64_t row_stride, k_stride;               // in elements; one of the two is 1
};

// Elements a..b of K become units from `unit` on.
struct Leaf { int64_t begin, end, unit; };

// W -> panels [ceil(rows / 64)][units][64]; columns beyond `rows` are zero.
void pack_panels(bool half, View src, int64_t rows, const Leaf* leaves, int64_t n_leaves, int64_t units, char* dst);
// x -> rows [rows][units]
void copy_rows(bool half, View src, int64_t rows, const Leaf* leaves, int64_t n_leaves, int64_t units, char* dst);

}  // namespace gemm
