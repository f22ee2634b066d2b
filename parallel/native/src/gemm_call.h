// What a product is called with: its plan and its operands, as gemm.py writes them.
#pragma once
#include <cstdint>

#include "gemm_watch.h"
#include "operands.h"
#include "quantised.h"

namespace gemm {

constexpr int kSources = 16;                  // at most

// One run of K inside one leaf of one source. Mirrored by _RUN in gemm.py.
struct Run {
  int64_t source, units;                      // of K: four bytes each
  int64_t begin, unit;                        // elements from a row's beginning in x as given, units in a copy
  const char* panels;                         // W's first panel at this run
  int64_t panel_stride;                       // bytes from panel to panel of this W
  int64_t first;                              // 1: a leaf's beginning
  int64_t pops;                               // after it add so many finished subtrees; -1: the leaf goes on
  int64_t root;                               // after that: 1 + index of the output this completes, or 0
  const Quantised* quantised;                 // W's form, or null: float32 or bfloat16
  int64_t unit_bytes() const { return quantised ? quantised->unit_bytes() : kPanelBytes; }
  const char* at(int64_t panel, int64_t done) const { return panels + panel * panel_stride + done * unit_bytes(); }
  bool scaled() const { return quantised && quantised->of_columns(); }
};
enum Quantisation : int64_t { kNone, kColumns, kGroups };                // the most that a run of the plan asks for
struct Plan {                                 // mirrored by _PLAN
  int64_t dtype, n_runs, levels, n_sources, n, quantisation;
  bool half() const { return dtype == operands::kBFloat16; }
};
struct Call {                                 // mirrored by _call_struct
  int64_t rows;
  char* out;
  int64_t out_dtype, row_stride, root_stride; // strides in elements
  const char* bias;
  int64_t bias_dtype, activation;
  bool out_half() const { return out_dtype == operands::kBFloat16; }
  bool bias_half() const { return bias_dtype == operands::kBFloat16; }
  struct { const char* base; int64_t row_stride, k_stride; Watch* watch; } x[];  // watch: of the weight, or null
};

}  // namespace gemm
