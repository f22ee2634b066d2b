// Weights of 8 and 4 bits (quantised.h): packed, widened for the tiles, and given back as bfloat16.
#include "quantised.h"

#include <algorithm>

#include "operands.h"
#include "pool.h"
#include "rows.h"

namespace gemm {
namespace {

using simd::bf16;
using simd::f32x16;
using simd::u32x16;

constexpr int kLines = bf16_order::kBlock;    // of a block

inline f32x16 half_numbers(const char* p, bool high) {                   // sixteen of 4 bits
  simd::u32x16 v;
#ifdef __AVX512F__
  v = (u32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  for (int i = 0; i < 16; ++i) v[i] = static_cast<uint8_t>(p[i]);
#endif
  v = high ? v >> 4 : v & 15u;
  return __builtin_convertvector((simd::i32x16)v, f32x16);
}
template <int Bits>
inline f32x16 numbers(const char* block, int line, int column) {
  if constexpr (Bits == 8) return whole_numbers(block + line * kPanel + column);
  else return half_numbers(block + line / 2 * kPanel + column, line % 2);
}

struct Group {                                // scales and zeros of one line
  const float* scales;
  const int8_t* zeros;
};
inline Group group_of(const Quantised& w, int64_t panel, int64_t line) {
  const int64_t at = (panel * w.n_groups + w.groups[line]) * kPanel;
  return {w.scales + at, w.zeros + at};
}

// The bfloat16, in the high half of each lane.
template <int Bits, bool Grouped>
inline u32x16 value(const char* block, int line, int column, Group group) {
  f32x16 v = numbers<Bits>(block, line, column);
  if constexpr (!Grouped) return simd::float_to_bits(v);                 // eight bits: exact
  const f32x16 zero = whole_numbers(reinterpret_cast<const char*>(group.zeros) + column);
  v = (v - zero) * simd::load(group.scales + column);
  const u32x16 u = simd::float_to_bits(v);                               // finite: as simd::round_bits, without NaN
  return (u + (0x7fffu + ((u >> 16) & 1u))) & 0xffff0000u;
}

template <int Bits, bool Grouped>
void widen_blocks(const Quantised& w, int64_t panel, const char* from, int64_t line, int64_t units, char* to) {
  constexpr int kFar = 2048;                  // bytes that the reads look ahead
  constexpr int kStep = kPaired ? 1 : bf16_order::kUnits;                // from a unit's one line to its other one
  for (; units > 0; units -= bf16_order::kUnits, line += kLines) {
    for (int unit = 0; unit < bf16_order::kUnits; ++unit) {
      const int high = kPaired ? 2 * unit : unit + kStep, low = kPaired ? high + 1 : unit;
      for (int line = 0; line < Bits / 4; ++line) __builtin_prefetch(from + kFar + (unit * Bits / 4 + line) * 64, 0, 3);
      Group upper{}, lower{};
      if (Grouped) upper = group_of(w, panel, line + high), lower = group_of(w, panel, line + low);
#pragma GCC unroll 4
      for (int column = 0; column < kPanel; column += simd::kLanes) {
        const u32x16 v = value<Bits, Grouped>(from, high, column, upper) | value<Bits, Grouped>(from, low, column, lower) >> 16;
        std::memcpy(to + unit * kPanelBytes + column * 4, &v, sizeof v);
      }
    }
    from += kLines * kPanel * Bits / 8;
    to += bf16_order::kUnits * kPanelBytes;
  }
}

int64_t line_of(int64_t k) {                  // of element k of a leaf
  const int64_t within = k % kLines;
  return k - within + within % 2 * bf16_order::kUnits + within / 2;
}

struct Form {                                 // mirrored by _MATRIX of quantised_weight.py
  Quantised w;
  int64_t n, k, units, n_leaves;
  const Leaf* leaves;
  char* panels;

  char* panel(int64_t p) const { return panels + p * units * w.unit_bytes(); }
  int number(const char* panel, int64_t line, int64_t column) const {
    if (w.bits == 8) return static_cast<int8_t>(panel[line * kPanel + column]);
    return static_cast<uint8_t>(panel[line / 2 * kPanel + column]) >> line % 2 * 4 & 15;
  }
};

// numbers: [N, K], one a byte
void pack(const Form& f, const int8_t* from, int64_t row_stride) {
  pool::parallel_for((f.n + kPanel - 1) / kPanel, [&](int64_t p) {
    char* panel = f.panel(p);
    std::memset(panel, 0, f.units * f.w.unit_bytes());
    const int64_t live = std::min<int64_t>(kPanel, f.n - p * kPanel);
    for (const Leaf* leaf = f.leaves; leaf != f.leaves + f.n_leaves; ++leaf)
      for (int64_t block = leaf->begin; block < leaf->end; block += kLines)
        for (int64_t column = 0; column < live; ++column) {
          const int8_t* row = from + (p * kPanel + column) * row_stride;
          for (int64_t k = block; k < std::min(block + kLines, leaf->end); ++k) {
            const int64_t line = 2 * leaf->unit + line_of(k - leaf->begin);
            if (f.w.bits == 8) panel[line * kPanel + column] = row[k];
            else panel[line / 2 * kPanel + column] |= (row[k] & 15) << line % 2 * 4;
          }
        }
  });
}

// Row `id` as bfloat16, [K]; or its whole numbers.
template <class E>
void row(const Form& f, int64_t id, E* out) {
  const int64_t p = id / kPanel, column = id % kPanel;
  const char* panel = f.panel(p);
  for (const Leaf* leaf = f.leaves; leaf != f.leaves + f.n_leaves; ++leaf)
    for (int64_t k = leaf->begin; k < leaf->end; ++k) {
      const int64_t line = 2 * leaf->unit + line_of(k - leaf->begin);
      const int number = f.number(panel, line, column);
      if constexpr (sizeof(E) == 1) {
        out[k] = static_cast<E>(number);
      } else if (f.w.of_columns()) {
        simd::store(out + k, simd::set1(number * f.w.scales[p * kPanel + column]), 1);
      } else {
        const Group g = group_of(f.w, p, line);
        simd::store(out + k, simd::set1((number - g.zeros[column]) * g.scales[column]), 1);
      }
    }
}

void check(const Form& f) {
  using namespace operands;
  require(f.w.bits == 8 || f.w.bits == 4, kBadType);
  require(f.w.n_groups >= 0 && f.units % bf16_order::kUnits == 0 && (f.w.bits == 8 || !f.w.of_columns()), kBadSize);
  const int64_t panels = (f.n + kPanel - 1) / kPanel;
  present(f.panels, count(panels, f.units, f.w.unit_bytes()), 64), present(f.leaves, f.n_leaves);
  present(f.w.scales, count(panels, std::max<int64_t>(f.w.n_groups, 1), int64_t(kPanel)));
  for (const Leaf* leaf = f.leaves; leaf != f.leaves + f.n_leaves; ++leaf)
    require(0 <= leaf->begin && leaf->begin <= leaf->end && leaf->end <= f.k && 0 <= leaf->unit &&
            leaf->unit + units_of(*leaf, true) <= f.units, kBadIndex);
  if (f.w.of_columns()) return;
  present(f.w.zeros, count(panels, f.w.n_groups, int64_t(kPanel))), present(f.w.groups, count(f.units, int64_t(2)));
  for (int64_t line = 0; line < 2 * f.units; ++line)
    require(0 <= f.w.groups[line] && f.w.groups[line] < f.w.n_groups, kBadIndex);
}

}  // namespace

void widen(const Quantised& w, int64_t panel, const char* from, int64_t unit, int64_t units, char* to) {
  if (w.of_columns()) return widen_blocks<8, false>(w, panel, from, 2 * unit, units, to);
  if (w.bits == 8) return widen_blocks<8, true>(w, panel, from, 2 * unit, units, to);
  widen_blocks<4, true>(w, panel, from, 2 * unit, units, to);
}

void scale_sums(const Quantised& w, int64_t panel, int64_t rows, const float* sums, bool begins, int64_t pops,
                int64_t level, float* slot) {
  const float* scales = w.scales + panel * kPanel;
  for (int64_t i = 0; i < rows * kPanel; i += simd::kLanes) {
    f32x16 c = simd::fma(simd::load(sums + i), simd::load(scales + i % kPanel), begins ? simd::zero() : simd::load(slot + i));
    float* to = slot + i;
    for (int64_t pop = 0; pop < pops; ++pop) to -= level, c = simd::load(to) + c;
    simd::store(to, c);
  }
}

}  // namespace gemm

extern "C" {

// numbers: int8 [N, K], rows `row_stride` apart
int quantised_pack(const gemm::Form* f, const int8_t* numbers, int64_t row_stride) {
  using namespace operands;
  return guarded([&] {
    gemm::check(*f);
    present(numbers, count(f->n, f->k));
    gemm::pack(*f, numbers, row_stride);
  });
}

struct QuantisedLookup {                      // mirrored by _LOOKUP of quantised_weight.py
  const gemm::Form* form;
  const int64_t* ids;                         // null: 0, 1, .., count - 1
  int64_t count, whole;                       // whole: the numbers themselves, int8, else bfloat16
  void* out;                                  // [count, K]
};

int quantised_rows(const QuantisedLookup* g) {
  using namespace operands;
  return guarded([&] {
    gemm::check(*g->form);
    if (!g->ids) require(g->count <= g->form->n, kBadIndex);
    for (int64_t i = 0; g->ids && i < g->count; ++i) require(0 <= g->ids[i] && g->ids[i] < g->form->n, kBadIndex);
    present(static_cast<char*>(g->out), count(g->count, g->form->k, int64_t(2)));
    rows::over_rows(g->count, g->form->k, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t id = g->ids ? g->ids[i] : i;
        if (g->whole) gemm::row(*g->form, id, static_cast<int8_t*>(g->out) + i * g->form->k);
        else gemm::row(*g->form, id, static_cast<simd::bf16*>(g->out) + i * g->form->k);
      }
    });
  });
}
}
