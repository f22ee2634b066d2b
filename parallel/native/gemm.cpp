// y[m,n] = sum_k x[m,k] W[n,k] whose bits depend on nothing but row m of x, row n of W and the borders of the leaves.
//
// Every element is one chain of fused multiply-adds over ascending k inside a leaf, starting at zero; a fixed binary
// tree adds the leaves. Rows, panels of 64 columns, blocks of K and threads only decide who computes an element and
// when: a chain that is interrupted goes on from its stored float32 value.
//
//   for each panel of 64 columns and block of rows       (split over the threads)
//     for each run of K (a leaf, or one source's part of it), in pieces that fit the cache
//       for each tile of at most 6 rows: 24 accumulators; at a leaf's end pop and add finished subtrees, push the sum
//     at a root: bias, rounding, activation, store
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <type_traits>

#include "activation.h"
#include "gemm_pack.h"
#include "pool.h"
#include "simd.h"

namespace gemm {
namespace {

using simd::bf16;
using simd::f32x16;

constexpr int kRows = 6;                      // of a register tile
constexpr int kSources = 16;                  // at most
constexpr int64_t kKeptScratch = int64_t(64) << 20;
constexpr int kBlockTiles = 40;               // tiles that share a piece of a panel before the next piece
#ifndef GEMM_PIECE
#define GEMM_PIECE 256
#endif
constexpr int64_t kPiece = GEMM_PIECE;                 // units of K of a piece: 64 KiB of a panel

// One run of K inside one leaf of one source. Mirrored by _RUN in gemm.py.
struct Run {
  int64_t source, units;                      // of K: four bytes each
  int64_t a_direct, a_copied;                 // bytes from a row's beginning, in x as given and in a copy
  const char* panels;                         // W's first panel at this run
  int64_t panel_stride;                       // bytes from panel to panel of this W
  int64_t first;                              // 1: a leaf's beginning
  int64_t pops;                               // after it add so many finished subtrees; -1: the leaf goes on
  int64_t root;                               // after that: 1 + index of the output this completes, or 0
};
struct Plan { int64_t half, n_runs, levels, n_sources, n, copy; };
struct Operand { const char* base; int64_t row_bytes; bool copied; };
struct Call {                                 // mirrored by _CALL in gemm.py
  int64_t rows;
  char* out;
  int64_t out_half, row_stride, root_stride;  // strides in elements
  const char* bias;
  int64_t bias_half, activation;
  struct { const char* base; int64_t row_stride, k_stride; } x[];
};

struct F32 {
  using Wide = f32x16;
  static Wide spread(const char* p) { float f; std::memcpy(&f, p, 4); return simd::set1(f); }
  static Wide read(const char* p) { return simd::load(reinterpret_cast<const float*>(p)); }
#ifdef __AVX512F__
  // Written out, as is the next one: the compiler otherwise folds loads of W into several of its uses.
  static f32x16 add(f32x16 c, Wide a, Wide b) { asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); return c; }
#else
  static f32x16 add(f32x16 c, Wide a, Wide b) { return simd::fma(a, b, c); }
#endif
};
#ifdef __AVX512BF16__
struct Bf16 {
  using Wide = __m512bh;
  static Wide spread(const char* p) { int i; std::memcpy(&i, p, 4); return (Wide)_mm512_set1_epi32(i); }
  static Wide read(const char* p) { return (Wide)_mm512_loadu_si512(p); }
  static f32x16 add(f32x16 c, Wide a, Wide b) { asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); return c; }
};
#else
struct Bf16 {
  using Wide = simd::u32x16;
  static Wide spread(const char* p) { uint32_t i; std::memcpy(&i, p, 4); return Wide{} + i; }
  static Wide read(const char* p) { Wide w; std::memcpy(&w, p, sizeof w); return w; }
  static f32x16 add(f32x16 c, Wide a, Wide b) {
    c = simd::fma(simd::bits_to_float(a << 16), simd::bits_to_float(b << 16), c);
    return simd::fma(simd::bits_to_float(a & 0xffff0000u), simd::bits_to_float(b & 0xffff0000u), c);
  }
};
#endif

struct Tile {
  const char* a;
  int64_t a_stride;
  const char* b;
  int64_t units;
  float* slot;                                // this tile's place on the top level of the stack of subtrees
  int64_t level;                              // floats from level to level
  int64_t first, pops;
  const char* ahead;                          // what to prefetch
};

// P: cache lines to prefetch per four units.
template <class Op, int R, int P>
void tile(const Tile& t) {
  f32x16 acc[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[r][j] = t.first ? simd::zero() : simd::load(t.slot + r * kPanel + j * 16);
  const char *a = t.a, *b = t.b, *ahead = t.ahead;
  const int64_t stride = t.a_stride;
  auto step = [&](int u) __attribute__((always_inline)) {
    typename Op::Wide w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = Op::read(b + u * kPanelBytes + j * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      typename Op::Wide x = Op::spread(a + r * stride + u * 4);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[r][j] = Op::add(acc[r][j], x, w[j]);
    }
  };
  int64_t units = t.units;
  for (; units >= 4; units -= 4) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) __builtin_prefetch(ahead + p * 64, 0, 2);
    ahead += P * 64;
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) step(u);
    a += 16;
    b += 4 * kPanelBytes;
  }
  for (; units > 0; --units) { step(0); a += 4; b += kPanelBytes; }
  float* slot = t.slot;
  for (int64_t pop = 0; pop < t.pops; ++pop) {
    slot -= t.level;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[r][j] = simd::load(slot + r * kPanel + j * 16) + acc[r][j];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) simd::store(slot + r * kPanel + j * 16, acc[r][j]);
}

using TileFn = void (*)(const Tile&);
template <class Op, int P>
constexpr TileFn kTile[kRows] = {tile<Op, 1, P>, tile<Op, 2, P>, tile<Op, 3, P>, tile<Op, 4, P>, tile<Op, 5, P>, tile<Op, 6, P>};
template <class Op>
TileFn pick(int64_t rows, int lines) {
  switch (lines) {
    case 0: return kTile<Op, 0>[rows - 1];
    case 4: return kTile<Op, 4>[rows - 1];
    case 8: return kTile<Op, 8>[rows - 1];
    default: return kTile<Op, 16>[rows - 1];
  }
}

class Scratch {                               // aligned memory that grows; one per thread and purpose
 public:
  ~Scratch() { std::free(p_); }
  char* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(p_);
      p_ = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
      size_ = p_ ? bytes : 0;
    }
    return p_;
  }
  void trim(int64_t keep) {
    if (size_ > keep) { std::free(p_); p_ = nullptr; size_ = 0; }
  }

 private:
  char* p_ = nullptr;
  int64_t size_ = 0;
};

template <class E>
void finish_rows(const Call& call, int64_t root, int64_t row, int64_t rows, int64_t column, int n, const float* slot) {
  E* out = reinterpret_cast<E*>(call.out) + root * call.root_stride + row * call.row_stride + column;
  for (int64_t r = 0; r < rows; ++r, out += call.row_stride, slot += kPanel)
    for (int j = 0; j < n; j += 16) {
      int live = std::min(16, n - j);
      f32x16 v = simd::load(slot + j);
      if (call.bias)
        v = v + (call.bias_half ? simd::load(reinterpret_cast<const bf16*>(call.bias) + column + j, live)
                                : simd::load(reinterpret_cast<const float*>(call.bias) + column + j, live));
      if (call.activation) v = activation::apply(call.activation, simd::as_stored(v, out));
      simd::store(out + j, v, live);
    }
}

struct Work {
  const Call& call;
  const Plan& plan;
  const Run* runs;
  const Operand* x;
  int64_t tiles, blocks;

  int64_t row(int64_t tile) const { return call.rows * tile / tiles; }

  // The share of the next piece of a panel that tile i of n prefetches.
  static int lines(int64_t i, int64_t n) { return n == 1 ? 16 : n <= 3 ? (i < 2 ? 8 : 0) : (i < 4 ? 4 : 0); }

  template <class Op>
  void block(int64_t panel, int64_t first_tile, int64_t last_tile, float* stack) const {
    const int64_t top_row = row(first_tile), level = (row(last_tile) - top_row) * kPanel;
    float* top = stack;
    for (const Run* run = runs; run != runs + plan.n_runs; ++run) {
      const char* b = run->panels + panel * run->panel_stride;
      const char* a = x[run->source].base + (x[run->source].copied ? run->a_copied : run->a_direct);
      const int64_t piece = last_tile - first_tile == 1 ? std::max<int64_t>(run->units, 1) : kPiece;
      int64_t done = 0;
      do {
        int64_t units = std::min(piece, run->units - done);
        bool last = done + units == run->units;
        Tile t{nullptr, x[run->source].row_bytes, b + done * kPanelBytes, units, nullptr, level, run->first && done == 0,
               last ? std::max<int64_t>(run->pops, 0) : 0, b + (done + units) * kPanelBytes};
        const int64_t count = last_tile - first_tile;
        if (count == 1) t.ahead = t.b + 4096;
        for (int64_t i = 0; i < count; ++i) {
          int64_t begin = row(first_tile + i), rows = row(first_tile + i + 1) - begin;
          t.a = a + begin * t.a_stride + done * 4;
          t.slot = top + (begin - top_row) * kPanel;
          int l = lines(i, count);
          pick<Op>(rows, l)(t);
          t.ahead += units / 4 * l * 64;
        }
        done += units;
      } while (done < run->units);
      if (run->pops < 0) continue;
      top -= run->pops * level;
      if (run->root) finish(run->root - 1, panel, top_row, row(last_tile) - top_row, top);
      else top += level;
    }
  }

  void finish(int64_t root, int64_t panel, int64_t row, int64_t rows, const float* slot) const {
    int n = static_cast<int>(std::min<int64_t>(kPanel, plan.n - panel * kPanel));
    (call.out_half ? finish_rows<bf16> : finish_rows<float>)(call, root, row, rows, panel * kPanel, n, slot);
  }

  template <class Op>
  bool items(int64_t begin, int64_t end) const {
    static thread_local Scratch scratch;
    const int64_t most = (tiles + blocks - 1) / blocks * kRows;
    float* stack = reinterpret_cast<float*>(scratch.get(plan.levels * most * kPanelBytes));
    if (!stack) return false;
    for (int64_t item = begin; item < end; ++item) {
      int64_t panel = item / blocks, b = item % blocks;
      block<Op>(panel, tiles * b / blocks, tiles * (b + 1) / blocks, stack);
    }
    return true;
  }
};

// Where each source's rows are: x itself, or a copy where its rows are not contiguous or a leaf is odd.
bool operands(const Call& call, const Plan& plan, const int64_t* sources, Scratch& scratch, Operand* x) {
  const int64_t element = plan.half ? 2 : 4;
  const int64_t* at = sources;
  int64_t bytes = 0;
  for (int64_t s = 0; s < plan.n_sources; at += 2 + 3 * at[1], ++s) {
    bool copied = plan.copy || call.x[s].k_stride != 1;
    x[s] = {call.x[s].base, copied ? at[0] * 4 : call.x[s].row_stride * element, copied};
    if (copied) bytes += call.rows * at[0] * 4;
  }
  if (bytes == 0) return true;
  char* copy = scratch.get(bytes);
  if (!copy) return false;
  at = sources;
  for (int64_t s = 0; s < plan.n_sources; at += 2 + 3 * at[1], ++s) {
    if (!x[s].copied) continue;
    copy_rows(plan.half, {x[s].base, call.x[s].row_stride, call.x[s].k_stride}, call.rows,
              reinterpret_cast<const Leaf*>(at + 2), at[1], at[0], copy);
    x[s].base = copy;
    copy += call.rows * at[0] * 4;
  }
  return true;
}

template <class Op>
double peak() {
  constexpr int64_t kSteps = 200000;
  alignas(64) const char ones[64] = {};
  f32x16 acc[kRows * 4] = {};
  typename Op::Wide w = Op::read(ones);
  auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 24
    for (int j = 0; j < kRows * 4; ++j) acc[j] = Op::add(acc[j], w, w);
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  volatile float sink = 0;
  for (f32x16 v : acc) sink = sink + v[0];
  return kSteps * kRows * 4 * 2.0 * kPanelBytes / 4 / 4 * (std::is_same_v<Op, Bf16> ? 2 : 1) / seconds.count() / 1e9;
}

}  // namespace
}  // namespace gemm

extern "C" {

// plan: Plan, then n_runs Run, then for each source its units in a row, n_leaves and the leaves, for copies of x.
// Returns 0, or -1 where memory is short.
int gemm_run(const gemm::Call* call, const char* bytes) {
  using namespace gemm;
  const Plan& plan = *reinterpret_cast<const Plan*>(bytes);
  const Run* runs = reinterpret_cast<const Run*>(bytes + sizeof(Plan));
  if (call->rows == 0 || plan.n == 0) return 0;
  static thread_local Scratch scratch;
  Operand x[kSources];
  if (!operands(*call, plan, reinterpret_cast<const int64_t*>(runs + plan.n_runs), scratch, x)) return -1;
  int64_t tiles = (call->rows + kRows - 1) / kRows, blocks = (tiles + kBlockTiles - 1) / kBlockTiles;
  Work work{*call, plan, runs, x, tiles, blocks};
  std::atomic<bool> short_of_memory{false};
  pool::parallel_ranges((plan.n + kPanel - 1) / kPanel * blocks, [&](int64_t begin, int64_t end) {
    if (!(plan.half ? work.items<Bf16>(begin, end) : work.items<F32>(begin, end))) short_of_memory = true;
  });
  scratch.trim(kKeptScratch);
  return short_of_memory ? -1 : 0;
}

// GFLOP/s of one thread on registers alone, for benchmarks: the tile's arithmetic without its loads.
double gemm_peak_gflops(int half) {
  return half ? gemm::peak<gemm::Bf16>() : gemm::peak<gemm::F32>();
}
}
