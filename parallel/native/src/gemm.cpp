// y[m,n] = sum_k x[m,k] W[n,k] whose bits depend on nothing but row m of x, row n of W and the borders of the leaves.
//
// Inside a leaf every float32 element is one chain of fused multiply-adds over ascending k, starting at zero; bfloat16
// is summed in the order of bf16_order.h, each source's part of a leaf beginning a block. A fixed binary tree adds the
// leaves. Rows, panels of 64 columns, pieces of K and threads only decide who computes an element and when: a sum that
// is interrupted goes on from its stored float32 value.
//
//   for each panel of 64 columns and block of rows       (split over the threads)
//     for each group of steps of K that fits the cache   (a step: a leaf, or a part of it)
//       for each tile of at most 6 rows, for each step:  (gemm_tile.h; at a leaf's end add finished subtrees, push;
//                                                         32 rows where AMX computes: gemm_amx.h)
//         at a root: bias, rounding, activation, store
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <numeric>
#include <type_traits>

#include "activation.h"
#include "gemm_amx.h"
#include "gemm_call.h"
#include "gemm_tile.h"
#include "gemm_watch.h"
#include "operands.h"
#include "pool.h"
#include "quantised.h"
#include "scratch.h"

namespace gemm {
namespace {

using simd::bf16;
using simd::f32x16;

constexpr int64_t kBlockTiles = 40;           // tiles that share a group of steps before the next group
constexpr int64_t kNearTiles = 3;             // so few use each weight so seldom that memory is the limit: short groups,
constexpr int64_t kNearUnits = 64;            //   16 KiB of a panel, the next one on its way to the first-level cache
constexpr int64_t kFarUnits = 512;            // else 128 KiB, the next one on its way to the second-level cache
constexpr int64_t kAlone = 8192;              // a lone tile prefetches so far ahead of itself
constexpr int64_t kStaying = 512 << 10;       // bytes of x that stay in the second-level cache from panel to panel
constexpr int64_t kAmxStaying = 1 << 20;      //   and of a block of rows where AMX, whose CPUs have 2 MiB, computes
constexpr int64_t kAmxRows = 5;               // fewer are not worth its tiles
constexpr int64_t kKeptScratch = int64_t(64) << 20;

struct Shape {                                // how a call's rows are cut
  bool amx;
  int64_t tile_rows, tiles, blocks;           // rows of a tile, at most; tiles, and blocks of them, of all rows
  int64_t row_tile;                           // rows of one of AMX's registers
  bool blocks_first;                          // order of the items: all blocks of a panel, or all panels of a block
  bool near, alone;                           // short groups of steps; one tile that reads each weight once
  bool direct;                                // whole numbers of columns are widened in the tile's registers
  bool whole;                                 // no group ends before its leaf
  int64_t group() const { return near ? kNearUnits : kFarUnits; }        // units, at most, where it does
  int64_t most() const { return whole ? INT64_MAX / 2 : group(); }
};
struct Operand {                              // rows of x: as given, or copied
  const char* base;
  int64_t row_bytes, unit_bytes, copied;      // bytes of the copy, or 0
  const char* at(int64_t row, const Run& run, int64_t done) const {
    return base + row * row_bytes + ((copied ? run.unit : run.begin) + done) * unit_bytes;
  }
};
struct Step {                                 // a part of a run
  const Run* run;
  int64_t done, units, depth, pops;           // units of the run before it, its own; subtrees on the stack before it
  const Step* group_end;                      // valid in a group's first step
  bool first;
  int64_t root;
};

// Cut the runs into steps of at most `most` units and gather these into groups of at most `most`.
Step* make_steps(const Plan& plan, const Run* runs, int64_t most, Step* steps) {
  Step* end = steps;
  int64_t depth = 0;
  for (const Run* run = runs; run != runs + plan.n_runs; ++run) {
    int64_t parts = std::max<int64_t>(1, (run->units + most - 1) / most), done = 0;
    int64_t size = ((run->units + parts - 1) / parts + bf16_order::kUnits - 1) / bf16_order::kUnits * bf16_order::kUnits;
    do {
      int64_t units = std::min(size, run->units - done);
      bool last = done + units == run->units;
      *end++ = {run, done, units, depth, last ? std::max<int64_t>(run->pops, 0) : 0, nullptr, run->first && done == 0,
                last ? run->root : 0};
      done += units;
    } while (done < run->units);
    if (run->pops >= 0) depth += (run->root ? 0 : 1) - run->pops;
  }
  for (Step* begin = steps; begin != end;) {
    Step* stop = begin;
    for (int64_t units = 0; stop != end && (stop == begin || units + stop->units <= most); ++stop) units += stop->units;
    begin->group_end = stop;
    begin = stop;
  }
  return end;
}

template <class E>
inline f32x16 load(const E* p, int live) { return live == simd::kLanes ? simd::load(p) : simd::load(p, live); }

template <class E>
struct Finish {                               // bias, rounding, activation, store of a finished tile
  const Call& call;
  int64_t root, row, rows, column;
  int n;
  const float* slot;

  template <activation::Id id>
  void operator()() const {
    E* out = reinterpret_cast<E*>(call.out) + root * call.root_stride + row * call.row_stride + column;
    for (int64_t r = 0; r < rows; ++r, out += call.row_stride)
      for (int j = 0; j < n; j += simd::kLanes) {
        const int live = std::min(simd::kLanes, n - j);
        f32x16 v = simd::load(slot + r * kPanel + j);
        if (call.bias)
          v = v + (call.bias_half() ? load(reinterpret_cast<const bf16*>(call.bias) + column + j, live)
                                  : load(reinterpret_cast<const float*>(call.bias) + column + j, live));
        if (id != activation::kNone) v = activation::value<id>(simd::as_stored(v, out));
        if (live == simd::kLanes) simd::store(out + j, v);
        else simd::store(out + j, v, live);
      }
  }
};

struct Work {
  const Call& call;
  const Plan& plan;
  const Operand* x;
  const Step *steps, *steps_end;
  Shape shape;
  int64_t panels;

  int64_t row(int64_t tile) const { return call.rows * tile / shape.tiles; }

  // How much of the next group tile i of n prefetches, in cache lines per four units (a panel's unit is four lines).
  int lines(int64_t i, int64_t n) const {
    return n == 1 ? 16 : plan.quantisation != kNone ? 0 : n <= 3 ? (i < 2 ? 8 : 0) : (i < 4 ? 4 : 0);
  }
  // Whole numbers that one tile alone reads are widened in its registers, others once for all tiles of the block.
  bool direct(const Run& run) const { return shape.direct && run.scaled(); }

  void widened(const Step* group, int64_t panel, char* to) const {
    for (const Step* s = group; s != group->group_end; ++s) {
      if (!s->run->quantised || direct(*s->run)) continue;
      widen(*s->run->quantised, panel, s->run->at(panel, s->done), s->run->unit + s->done, s->units, to);
      to += s->units * kPanelBytes;
    }
  }

  template <class Op>
  void block(int64_t panel, int64_t first_tile, int64_t last_tile, float* stack, char* wide, bf16_order::Flushing& flushing) const {
    const bool once = steps->group_end == steps_end;                     // a tile is finished before the next one begins
    const int64_t top = row(first_tile), count = last_tile - first_tile;
    const int64_t level = (once ? shape.tile_rows : row(last_tile) - top) * kPanel;
    for (const Step* group = steps; group != steps_end; group = group->group_end) {
      const Step& last = group->group_end[-1];
      const char* ahead = last.run->at(panel, last.done + last.units);
      flushing.set(false);
      if (plan.quantisation != kNone) widened(group, panel, wide);
      for (int64_t i = 0; i < count; ++i) {
        int64_t begin = row(first_tile + i), rows = row(first_tile + i + 1) - begin;
        float* slot = stack + (once ? 0 : begin - top) * kPanel;
        ahead = tile_steps<Op>(group, panel, begin, rows, slot, level, ahead, wide, lines(i, count), flushing);
      }
    }
  }

  template <class Op>
  const char* tile_steps(const Step* group, int64_t panel, int64_t row, int64_t rows, float* slot, int64_t level,
                         const char* ahead, const char* wide, int lines, bf16_order::Flushing& flushing) const {
    const TileFn run_tile = pick<Op>(rows, lines, shape.near);
    for (const Step* s = group; s != group->group_end; ++s) {
      const Run& run = *s->run;
      const Operand& a = x[run.source];
      const char* b = run.at(panel, s->done);
      const bool ends = s->done + s->units == run.units, scaled = run.scaled();
      float *top = slot + s->depth * level, *sums = scaled && !run.first ? top + level : top;
      if (run.quantised && !direct(run)) b = wide, wide += s->units * kPanelBytes;
      const Tile tile{a.at(row, run, s->done), a.row_bytes, b, s->units, sums, scaled ? s->done == 0 : s->first,
                      scaled ? 0 : s->pops, level, &flushing, shape.alone ? b + kAlone : ahead, rows, shape.row_tile,
                      a.unit_bytes * bf16_order::kUnits};
      direct(run) ? pick<Int8>(rows, 8, true)(tile) : run_tile(tile);
      if (scaled && ends) flushing.set(false), scale_sums(*run.quantised, panel, rows, sums, run.first, s->pops, level, top);
      ahead += s->units / 4 * lines * 64;
      top -= s->pops * level;
      if (s->root) flushing.set(false);                // a bias and an activation keep denormals
      if (s->root && call.out_half()) finish<bf16>(s->root - 1, row, rows, panel, top);
      if (s->root && !call.out_half()) finish<float>(s->root - 1, row, rows, panel, top);
    }
    return ahead;
  }

  template <class E>
  void finish(int64_t root, int64_t row, int64_t rows, int64_t panel, const float* slot) const {
    int n = static_cast<int>(std::min<int64_t>(kPanel, plan.n - panel * kPanel));
    activation::dispatch(call.activation, Finish<E>{call, root, row, rows, panel * kPanel, n, slot});
  }

  bool run(int64_t begin, int64_t end) const {
    if (!plan.half()) return items<F32>(begin, end);
#if TPD_TILES
    if (shape.amx) {
      const tiles::Configured configured(static_cast<int>(shape.row_tile));
      return items<Amx>(begin, end);
    }
#endif
    return items<Half>(begin, end);
  }

  template <class Op>
  bool items(int64_t begin, int64_t end) const {
    static thread_local Scratch scratch, numbers;
    const int64_t stack_rows = (shape.tiles + shape.blocks - 1) / shape.blocks * shape.tile_rows;
    float* stack = reinterpret_cast<float*>(scratch.get(plan.levels * stack_rows * kPanelBytes));
    char* wide = numbers.get(plan.quantisation == kNone ? 64 : shape.group() * kPanelBytes);
    if (!stack || !wide) return false;
    bf16_order::Flushing flushing(false);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = shape.blocks_first ? item / shape.blocks : item % panels;
      const int64_t b = shape.blocks_first ? item % shape.blocks : item / panels;
      block<Op>(panel, shape.tiles * b / shape.blocks, shape.tiles * (b + 1) / shape.blocks, stack, wide, flushing);
    }
    return true;
  }
};

Shape cut(const Plan& plan, bool amx, int64_t rows, int64_t row_bytes, int64_t panels) {
  const int64_t tile_rows = amx ? kAmxTile : plan.half() ? kHalfRows : kRows, tiles = (rows + tile_rows - 1) / tile_rows;
  const int64_t together = amx ? std::max<int64_t>(2, kAmxStaying / (row_bytes * tile_rows)) : kBlockTiles;
  const int64_t wanted = (4 * pool::num_threads() + panels - 1) / panels;                    // items for every thread
  const int64_t blocks = std::max((tiles + together - 1) / together, std::min(wanted, tiles / (amx ? 2 : 8)));
  const int64_t a_block = row_bytes * std::min(rows, together * tile_rows), row_tile = row_tile_of((rows + tiles - 1) / tiles);
  const bool alone = tiles == 1 && (!amx || rows == row_tile), direct = tiles == 1 && !amx;
  const bool whole = alone && (plan.quantisation == kNone || (plan.quantisation == kColumns && direct));
  return {amx, tile_rows, tiles, blocks, row_tile, a_block > (amx ? kAmxStaying : kStaying),
          (tiles + blocks - 1) / blocks <= kNearTiles, alone, direct, whole};
}

// Rows a multiple of the cache's way size apart evict one another: with more than 8 in a few sets, copy.
bool crowded(int64_t rows, int64_t row_bytes) {
  if (rows <= 8 || rows > kNearTiles * kRows || row_bytes % 64) return false;
  return rows * std::gcd<int64_t>(row_bytes / 64, 64) / 64 > 8;
}

// From block to block of a copy for tiles, in rows: those of one tile lie in other sets of the first-level cache than
// those of the next block, and any sixteen rows are there to be read.
int64_t block_rows(int64_t rows) {
  const int64_t whole = (rows + tiles::kRows - 1) / tiles::kRows * tiles::kRows;
  return whole <= 32 ? whole : (whole + 31) / 64 * 64 + 32;
}

// Where each source's rows are: x itself, or a copy in bfloat16, whose blocks are filled up and in the kernel's order, or
// where rows are not contiguous or crowded.
bool place(const Call& call, const Plan& plan, bool amx, const int64_t* sources, Scratch& scratch, Operand* x) {
  const int64_t element = plan.half() ? 2 : 4, unit_bytes = amx ? block_rows(call.rows) * 4 : plan.half() ? kUnitOfX : 4;
  const int64_t* at = sources;
  int64_t bytes = 0;
  for (int64_t s = 0; s < plan.n_sources; at += 2 + 3 * at[1], ++s) {
    const int64_t row_bytes = call.x[s].row_stride * element, apart = ((at[0] * unit_bytes + 63) / 64 | 1) * 64;
    const bool copied = plan.half() || call.x[s].k_stride != 1 || crowded(call.rows, row_bytes);
    x[s] = {call.x[s].base, !copied ? row_bytes : amx ? kTileRow : apart, copied ? unit_bytes : element, 0};
    if (copied) bytes += x[s].copied = amx ? at[0] * unit_bytes : call.rows * apart;
  }
  if (bytes == 0) return true;
  char* copy = scratch.get(bytes);
  if (!copy) return false;
  at = sources;
  for (int64_t s = 0; s < plan.n_sources; at += 2 + 3 * at[1], ++s) {
    if (!x[s].copied) continue;
    copy_rows(plan.half(), {x[s].base, call.x[s].row_stride, call.x[s].k_stride}, call.rows,
              reinterpret_cast<const Leaf*>(at + 2), at[1], {x[s].row_bytes, x[s].unit_bytes, amx}, copy);
    x[s].base = copy;
    copy += x[s].copied;
  }
  return true;
}

template <class Wide, class Add>
double peak(double flops, const Add& add) {   // of one lane in one addition
  constexpr int64_t kSteps = 200000;
  Floats acc[kRows * kVectors] = {};
  const Wide w{};
  auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 24
    for (int j = 0; j < kRows * kVectors; ++j) acc[j] = add(acc[j], w, w);
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  volatile float sink = 0;
  for (Floats v : acc) sink = sink + v[0];
  return kSteps * kRows * kVectors * kWidth * flops / seconds.count() / 1e9;
}

void check(const Call& call, const Plan& plan) {
  using namespace operands;
  const int64_t element = element_size(static_cast<int>(plan.dtype));
  const int64_t n = plan.n_runs == 0 ? 0 : count(call.rows, plan.n);
  require(plan.n_sources >= 1 && plan.n_sources <= kSources && plan.n_runs >= 0 && plan.levels >= 1, kBadSize);
  require(plan.quantisation == kNone || plan.half(), kBadType);
  require(call.activation >= 0 && call.activation < activation::kCount, kBadIndex);
  present(call.out, n, element_size(static_cast<int>(call.out_dtype)));
  if (call.bias) present(call.bias, plan.n, element_size(static_cast<int>(call.bias_dtype)));
  for (int64_t s = 0; s < plan.n_sources; ++s) {
    present(call.x[s].base, 0, element);
    require(call.x[s].k_stride == 1 || call.x[s].row_stride == 1 || call.rows == 1, kBadSize);
    require(n == 0 || !call.x[s].watch || !stale(*call.x[s].watch), kStale);
  }
}

void run(const Call* call, const char* bytes) {
  const Plan& plan = *reinterpret_cast<const Plan*>(bytes);
  const Run* runs = reinterpret_cast<const Run*>(bytes + sizeof(Plan));
  if (call->rows == 0 || plan.n == 0 || plan.n_runs == 0) return;
  static thread_local Scratch copies, cuts;
  const bool amx = plan.half() && call->rows >= kAmxRows && tiles::enabled();
  Operand x[kSources];
  if (!place(*call, plan, amx, reinterpret_cast<const int64_t*>(runs + plan.n_runs), copies, x)) throw std::bad_alloc();
  int64_t row_bytes = 0;
  for (int64_t s = 0; s < plan.n_sources; ++s) row_bytes += x[s].copied ? x[s].copied / call->rows : x[s].row_bytes;
  const int64_t panels = (plan.n + kPanel - 1) / kPanel;
  const Shape shape = cut(plan, amx, call->rows, row_bytes, panels);
  int64_t n_steps = plan.n_runs;
  for (const Run* run = runs; run != runs + plan.n_runs; ++run) n_steps += run->units / shape.most();
  Step* steps = reinterpret_cast<Step*>(cuts.get(n_steps * sizeof(Step)));
  if (!steps) throw std::bad_alloc();
  const Work work{*call, plan, x, steps, make_steps(plan, runs, shape.most(), steps), shape, panels};
  std::atomic<bool> short_of_memory{false};
  pool::parallel_ranges(panels * shape.blocks, [&](int64_t begin, int64_t end) {
    if (!work.run(begin, end)) short_of_memory = true;
  });
  copies.trim(kKeptScratch);
  if (short_of_memory) throw std::bad_alloc();
}

}  // namespace
}  // namespace gemm

extern "C" {

// plan: Plan, then n_runs Run, then for each source its units in a row, n_leaves and the leaves, for copies of x.
int gemm_run(const gemm::Call* call, const char* plan) {
  return operands::guarded([&] {
    gemm::check(*call, *reinterpret_cast<const gemm::Plan*>(plan));
    gemm::run(call, plan);
  });
}

// GFLOP/s of one thread on registers alone, for benchmarks: the tile's arithmetic without its loads.
double gemm_peak_gflops(int dtype) {
  using namespace gemm;
  return dtype == operands::kBFloat16 ? peak<Half::Wide>(Half::kFlops, Half::add) : peak<Floats>(2, fused);
}
}
