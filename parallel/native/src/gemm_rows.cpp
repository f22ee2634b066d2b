// Rows of W back out of its panels (gemm_pack.h), by their numbers: a table that is stored once, as the matrix of the
// head, still answers lookups.
#include "gemm_pack.h"
#include "operands.h"
#include "rows.h"

namespace gemm {
namespace {

struct Lookup {                               // mirrored by unpack_weight.py
  int64_t dtype, n, k, units, n_leaves, count;
  const char* panels;
  const Leaf* leaves;
  const int64_t* ids;
  char* out;                                  // [count, k]
};

template <class E>
void row(const Lookup& g, int64_t id, E* out) {
  const char* column = g.panels + id / kPanel * g.units * kPanelBytes + id % kPanel * 4;
  for (const Leaf* leaf = g.leaves; leaf != g.leaves + g.n_leaves; ++leaf)
    for (int64_t k = leaf->begin; k < leaf->end; ++k) {
      const ElementPlace at = element_place(k - leaf->begin, sizeof(E) == 2);
      std::memcpy(out + k, column + (leaf->unit + at.unit) * kPanelBytes + at.byte, sizeof(E));
    }
}

}  // namespace
}  // namespace gemm

extern "C" {

int gemm_unpack_rows(const gemm::Lookup* g) {
  using namespace operands;
  return guarded([&] {
    const int64_t panels = (g->n + gemm::kPanel - 1) / gemm::kPanel;
    present(g->panels, count(panels, g->units, gemm::kPanelBytes), 64), present(g->leaves, g->n_leaves);
    present(g->ids, g->count);
    for (const gemm::Leaf* leaf = g->leaves; leaf != g->leaves + g->n_leaves; ++leaf)
      require(0 <= leaf->begin && leaf->begin <= leaf->end && leaf->end <= g->k && 0 <= leaf->unit &&
              leaf->unit + gemm::units_of(*leaf, g->dtype == kBFloat16) <= g->units, kBadIndex);
    for (int64_t i = 0; i < g->count; ++i) require(0 <= g->ids[i] && g->ids[i] < g->n, kBadIndex);
    typed(static_cast<int>(g->dtype), [&](auto e) {
      using E = decltype(e);
      E* out = reinterpret_cast<E*>(g->out);
      present(out, count(g->count, g->k));
      rows::over_rows(g->count, g->k, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) gemm::row(*g, g->ids[i], out + i * g->k);
      });
    });
  });
}
}
