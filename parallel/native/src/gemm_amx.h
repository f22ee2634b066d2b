// The tile of gemm.cpp where AMX computes bfloat16: at most 32 rows of x against one panel of 64 columns of W. Two row
// tiles by two column tiles at a time, or up to 16 rows by all four column tiles: four sums, and each tile of W that is
// loaded meets all rows. The second row tile ends with the last row and may begin inside the first one: what both hold
// they compute alike.
#pragma once
#include "gemm_tile.h"
#include "tiles.h"

namespace gemm {

constexpr int64_t kAmxTile = 2 * tiles::kRows;

// Rows of a row tile where a tile has at most `most` rows.
inline int64_t row_tile_of(int64_t most) { return most > tiles::kRows ? (most + 1) / 2 : most; }

#if TPD_TILES
struct Amx { static constexpr bool kHalf = true; };

inline void add_subtrees(const Tile& t) {
  if (t.pops == 0) return;
  for (int64_t r = 0; r < t.rows; ++r)
    for (int j = 0; j < kPanel; j += kWidth) {
      float* slot = t.slot + r * kPanel + j;
      Floats sum = read<Floats>(slot);
      for (int64_t pop = 0; pop < t.pops; ++pop) sum = read<Floats>(slot -= t.level) + sum;
      write(slot, sum);
    }
}

template <int Lines>
inline __attribute__((always_inline)) void fetch_ahead(const char*& ahead) {
#pragma GCC unroll 64
  for (int p = 0; p < Lines; ++p) __builtin_prefetch(ahead + p * 64, 0, 3);
  ahead += Lines * 64;
}

// Tiles 0-3 hold the sums, 4 and 5 rows of x, 6 and 7 columns of W.
template <int Lines>
void two_by_two(const Tile& t) {
  using namespace tiles;
  const int64_t below = t.rows - t.row_tile, row_bytes = kPanelBytes;
  const char* ahead = t.ahead;
  for (int column = 0; column < kPanel; column += 32) {
    float *top = t.slot + column, *bottom = top + below * kPanel;
    if (t.first) {
      zero<0>(), zero<1>(), zero<2>(), zero<3>();
    } else {
      load<0>(top, row_bytes), load<1>(top + 16, row_bytes), load<2>(bottom, row_bytes), load<3>(bottom + 16, row_bytes);
    }
    const char *a = t.a, *b = t.b + column * 4;
    for (int64_t units = t.units; units > 0; units -= bf16_order::kUnits) {
      fetch_ahead<2 * Lines>(ahead);
      load<6>(b, kPanelBytes);
      load<4>(a, kTileRow);
      dot<0, 4, 6>();
      load<5>(a + below * kTileRow, kTileRow);
      dot<2, 5, 6>();
      load<7>(b + 64, kPanelBytes);
      dot<1, 4, 7>();
      dot<3, 5, 7>();
      a += t.a_block;
      b += bf16_order::kUnits * kPanelBytes;
    }
    store<0>(top, row_bytes), store<1>(top + 16, row_bytes), store<2>(bottom, row_bytes), store<3>(bottom + 16, row_bytes);
  }
}

template <int Lines>
void one_by_four(const Tile& t) {
  using namespace tiles;
  const char *a = t.a, *b = t.b, *ahead = t.ahead;
  float* c = t.slot;
  if (t.first) {
    zero<0>(), zero<1>(), zero<2>(), zero<3>();
  } else {
    load<0>(c, kPanelBytes), load<1>(c + 16, kPanelBytes), load<2>(c + 32, kPanelBytes), load<3>(c + 48, kPanelBytes);
  }
  for (int64_t units = t.units; units > 0; units -= bf16_order::kUnits) {
    fetch_ahead<4 * Lines>(ahead);
    load<4>(a, kTileRow);
    load<6>(b, kPanelBytes);
    dot<0, 4, 6>();
    load<7>(b + 64, kPanelBytes);
    dot<1, 4, 7>();
    load<6>(b + 128, kPanelBytes);
    dot<2, 4, 6>();
    load<7>(b + 192, kPanelBytes);
    dot<3, 4, 7>();
    a += t.a_block;
    b += bf16_order::kUnits * kPanelBytes;
  }
  store<0>(c, kPanelBytes), store<1>(c + 16, kPanelBytes), store<2>(c + 32, kPanelBytes), store<3>(c + 48, kPanelBytes);
}

template <int Lines>
void amx_tile(const Tile& t) {
  t.flushing->set(false);                     // the tree's; tiles do not look at it
  t.rows > t.row_tile ? two_by_two<Lines>(t) : one_by_four<Lines>(t);
  add_subtrees(t);
}

// Where many rows share each weight the CPU's own prefetching is enough, and ours takes slots that tile loads need.
template <>
inline TileFn pick<Amx>(int64_t, int lines, bool near) {
  if (lines == 0 || !near) return amx_tile<0>;
  return lines == 8 ? amx_tile<8> : amx_tile<16>;
}

#endif
}  // namespace gemm
