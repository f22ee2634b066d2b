// What a model's forward does between its products and its attention, as kernels, so that a recorded step needs nobody
// else: element by element arithmetic, rows of a table, strided copies. float32 or bfloat16 in memory,
// float32 inside, rounded once; an element's (or row's) bits are its own.
#include <cstring>

#include "rows.h"

namespace {

using namespace rows;

enum Op : int64_t { kAdd, kAddScalar, kScale, kClamp, kOps };            // mirrored by step_kernels.py

struct Map {                                  // out[i] = op(a[i], b[i]); b where the operation has two operands
  int64_t op, dtype, n;
  const void *a, *b;
  void* out;
  double low, high;                           // the scalar, or the borders of a clamp
};
struct Gather {                               // out[i] = table[index[i]], whole rows
  int64_t rows, table_rows, row_bytes;
  const char* table;
  const int64_t* index;
  char* out;
};
struct Shard {                                // of a table cut by rows, first..last: where an id's row is, or any if elsewhere
  int64_t n, first, last;
  const int64_t* ids;
  int64_t* out;
};
struct OwnRows {                              // out[i] = rows[i] where ids[i] is within first..last, else zeros
  int64_t n, row_bytes, first, last;
  const int64_t* ids;
  const char* rows;
  char* out;
};
struct Copy {                                 // out, contiguous, of a strided tensor of at most four dimensions
  int64_t from, to, sizes[4], strides[4];
  const void* a;
  void* out;
};
template <class E>
void map_elements(const Map& g) {
  const E *a = static_cast<const E*>(g.a), *b = static_cast<const E*>(g.b);
  E* out = static_cast<E*>(g.out);
  const f32x16 low = simd::set1(static_cast<float>(g.low)), high = simd::set1(static_cast<float>(g.high));
  switch (g.op) {
    case kAdd: return map(g.n, a, out, [&](f32x16 v, int64_t i, int live) { return v + load(b + i, live); });
    case kAddScalar: return map(g.n, a, out, [&](f32x16 v, int64_t, int) { return v + low; });
    case kScale: return map(g.n, a, out, [&](f32x16 v, int64_t, int) { return v * low; });
    default:                                  // a NaN stays one
      return map(g.n, a, out, [&](f32x16 v, int64_t, int) {
        for (int j = 0; j < kLanes; ++j) v[j] = v[j] < low[j] ? low[j] : v[j] > high[j] ? high[j] : v[j];
        return v;
      });
  }
}

float widened(float x) { return x; }
float widened(bf16 x) {
  const uint32_t bits = uint32_t(*reinterpret_cast<const uint16_t*>(&x)) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class From, class To>
void copy(const Copy& g) {
  const From* a = static_cast<const From*>(g.a);
  To* out = static_cast<To*>(g.out);
  for (int64_t i = 0; i < g.sizes[0]; ++i)
    for (int64_t j = 0; j < g.sizes[1]; ++j)
      for (int64_t k = 0; k < g.sizes[2]; ++k) {
        const From* row = a + i * g.strides[0] + j * g.strides[1] + k * g.strides[2];
        by_vector(g.sizes[3], [&](int64_t l, int live) {
          f32x16 v = simd::set1(0);
          if (g.strides[3] == 1) v = load(row + l, live);
          else for (int m = 0; m < live; ++m) v[m] = widened(row[(l + m) * g.strides[3]]);
          store(out + l, v, live);
        });
        out += g.sizes[3];
      }
}

}  // namespace

extern "C" {

int step_map(const Map* g) {
  return guarded([&] {
    require(g->op >= 0 && g->op < kOps, kBadIndex);
    typed(static_cast<int>(g->dtype), [&](auto e) {
      using E = decltype(e);
      present(static_cast<const E*>(g->a), g->n), present(static_cast<E*>(g->out), g->n);
      if (g->op == kAdd) present(static_cast<const E*>(g->b), g->n);
      map_elements<E>(*g);
    });
  });
}

int step_gather(const Gather* g) {
  return guarded([&] {
    present(g->table, count(g->table_rows, g->row_bytes), 1), present(g->out, count(g->rows, g->row_bytes), 1);
    present(g->index, g->rows);
    for (int64_t i = 0; i < g->rows; ++i) require(0 <= g->index[i] && g->index[i] < g->table_rows, kBadIndex);
    for (int64_t i = 0; i < g->rows; ++i)
      std::memcpy(g->out + i * g->row_bytes, g->table + g->index[i] * g->row_bytes, g->row_bytes);
  });
}

int step_shard(const Shard* g) {
  return guarded([&] {
    present(g->ids, g->n), present(g->out, g->n);
    require(g->first < g->last, kBadSize);
    for (int64_t i = 0; i < g->n; ++i) g->out[i] = std::clamp(g->ids[i], g->first, g->last - 1) - g->first;
  });
}

int step_own_rows(const OwnRows* g) {
  return guarded([&] {
    const int64_t bytes = count(g->n, g->row_bytes);
    present(g->ids, g->n), present(g->rows, bytes, 1), present(g->out, bytes, 1);
    for (int64_t i = 0; i < g->n; ++i) {
      char* out = g->out + i * g->row_bytes;
      if (g->first <= g->ids[i] && g->ids[i] < g->last) std::memcpy(out, g->rows + i * g->row_bytes, g->row_bytes);
      else std::memset(out, 0, g->row_bytes);
    }
  });
}

int step_copy(const Copy* g) {
  return guarded([&] {
    const int64_t n = count(g->sizes[0], g->sizes[1], g->sizes[2], g->sizes[3]);
    typed(static_cast<int>(g->from), [&](auto from) {
      typed(static_cast<int>(g->to), [&](auto to) {
        using From = decltype(from);
        using To = decltype(to);
        present(static_cast<const From*>(g->a), n), present(static_cast<To*>(g->out), n);
        copy<From, To>(*g);
      });
    });
  });
}
}
