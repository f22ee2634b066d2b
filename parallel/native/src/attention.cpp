// Paged causal attention: writes the new keys and values into the cache, then attends over the cache alone.
//
// Work is cut into items of at most 48 query rows of one kv head (tokens, or the tokens' query heads where they share a
// kv head), or the single row of each of two heads, which hides the latency of either. Threads take items from one
// counter, the longest of a sequence first. What a row computes depends on the positions of its own sequence only
// (attention_tiles.h); slots at and beyond its position are never read into a sum.
#include "attention_step.h"

#include <atomic>
#include <cmath>
#include <vector>

#include "pool.h"

namespace attn {
namespace {

constexpr int kItemRows = 8 * kRows;

template <class T>
struct Call {
  const Step* step;
  T *k_cache, *v_cache;
  View<const T> q, k, v;
  T* o;
  float* lse;
  int N, K, H;
  float scale;
  const float* slopes;
  const dropout::Heads* drop;               // null: no probability is dropped
  Groups groups;
  int heads_of(int kv_head, int kv_heads = 1) const { return groups.first(kv_head + kv_heads) - groups.first(kv_head); }
  // where the run that holds a position begins, in either cache
  int64_t run(const Sequence& s, int position, int64_t head) const {
    const int size = int(step->block_size), within = position % size;
    return ((int64_t(s.table[position / size]) * K + head) * size + within / kRun * kRun) * H;
  }
};

struct Item {
  int32_t sequence, kv_head, kv_heads;      // two kv heads where one token attends alone with each, else one
  int32_t row, rows;                        // of the sequence's new tokens x the query heads of these kv heads
};

struct Scratch {                            // one thread's
  std::vector<float> memory;
  float *q, *o, *p;
  int ld;                                   // of q (in elements of its type) and o
  Row rows[kItemRows];
  const dropout::Heads* drop;
  uint64_t keys[kItemRows];                 // of the rows' dropout masks, whose columns are key positions
  f32x16 scores[kRows][kRuns], shrink[kItemRows];
  template <class T>
  void reserve(const T* of_type, int H) {
    ld = padded_row(of_type, H);
    memory.resize(std::max(memory.size(), size_t(kItemRows) * (2 * ld + kTile) + kRun));
    q = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    o = q + kItemRows * ld;
    p = o + kItemRows * ld;
  }
};

template <class T>
struct Tile {
  int start;
  const T *keys[2 * kRuns], *values[2 * kRuns];
  const T* next[2 * kRuns];                 // the keys that will be asked for after these
};

void put_key(float* run, int lane, const float* k, int H) {
  for (int h = 0; h < H; ++h) run[h * kRun + lane] = k[h];
}
void put_key(bf16* run, int lane, const bf16* k, int H) {
  for (int h = 0; h + 2 <= H; h += 2) std::memcpy(run + h * kRun + 2 * lane, k + h, 2 * sizeof(bf16));
  if (H % 2) run[(H - 1) * kRun + lane] = k[H - 1];
}

// Rows of one head lie thousands of bytes apart in the fused row, where no hardware prefetcher follows.
template <class T>
inline void fetch_row(const T* row, int H) {
  for (int h = 0; h < H; h += 64 / int(sizeof(T))) __builtin_prefetch(row + h);
}

template <class T>
void write(const Call<T>& call, const Sequence& s, int64_t head) {
  for (int t = 0; t < s.queries; ++t) {
    const int64_t run = call.run(s, s.past + t, head), soon = s.first_token + std::min(t + 8, s.queries - 1);
    const int lane = (s.past + t) % kRun;
    fetch_row(call.k.at(soon, head), call.H);
    fetch_row(call.v.at(soon, head), call.H);
    put_key(call.k_cache + run, lane, call.k.at(s.first_token + t, head), call.H);
    std::memcpy(call.v_cache + run + int64_t(lane) * call.H, call.v.at(s.first_token + t, head), sizeof(T) * call.H);
  }
}

// Drops some of the probabilities of R rows over C runs, after they were counted in the rows' sums.
template <int R, int C>
__attribute__((noinline)) void thin(Scratch& w, int row, int start) {
  for (int r = row; r < row + R; ++r)
    for (int c = 0; c < C; ++c) {
      float* p = w.p + r * kTile + kRun * c;
      simd::store(p, simd::load(p) * dropout::factors(w.drop->chance, w.keys[r], uint32_t(start + kRun * c)));
    }
}

template <int R, int C, int S, class T>
void score(Scratch& w, int row, const Tile<T>& t, int H, float scale) {
  const T* const* ahead = C == kRuns ? t.values : t.next;
  dot<R, C, S>(reinterpret_cast<const T*>(w.q) + row * w.ld, w.ld, t.keys, H, ahead, w.scores);
  soften<R, C>(w.rows + row, w.scores, t.start, scale, w.p + row * kTile, w.shrink + row);
  if (w.drop) thin<R, C>(w, row, t.start);
}

template <int R, int S, class T>
void score_rows(Scratch& w, int row, const Tile<T>& t, int H, float scale) {
  const int most = std::min(kTile, w.rows[row + R - 1].bound - t.start);
  switch ((most + kRun - 1) / kRun) {
    case 4: return score<R, 4, S>(w, row, t, H, scale);
    case 3: return score<R, 3, S>(w, row, t, H, scale);
    case 2: return score<R, 2, S>(w, row, t, H, scale);
    default: return score<R, 1, S>(w, row, t, H, scale);
  }
}

template <int R, class T>
void weigh_rows(Scratch& w, int row, const Tile<T>& t, int H) {
  int live[R];
  for (int r = 0; r < R; ++r) live[r] = std::clamp(w.rows[row + r].bound - t.start, 0, kTile);
  const Weighted<T> sum{w.p + row * kTile, kTile, 1, t.values, H, 0, 0, t.next};
  weigh_up_to<R>(sum, live, w.shrink + row, w.o + row * w.ld, w.ld);
}

// All rows over one tile: every score, then every output, so that first the keys and then the values stay in L1.
template <class T>
void advance(Scratch& w, int rows, const Tile<T>& t, int H, float scale) {
  auto sees = [&](int last_row) { return w.rows[last_row].bound > t.start; };
  in_groups(rows, [&](auto R, int row) { if (sees(row + R() - 1)) score_rows<R(), 0>(w, row, t, H, scale); });
  in_groups(rows, [&](auto R, int row) { if (sees(row + R() - 1)) weigh_rows<R()>(w, row, t, H); });
}

// One row of each of two heads.
template <class T>
void advance_pair(Scratch& w, const Tile<T>& t, int H, float scale) {
  score_rows<2, kRuns>(w, 0, t, H, scale);
  const Weighted<T> sum{w.p, kTile, 1, t.values, H, 0, std::min(w.rows[0].bound - t.start, kTile), t.next};
  weigh<2, kRuns>(sum, w.shrink, w.o, w.ld);
}

template <class T>
void begin_rows(const Call<T>& call, const Sequence& s, const Item& item, Scratch& w) {
  const int heads = call.heads_of(item.kv_head, item.kv_heads), first = call.groups.first(item.kv_head);
  w.drop = call.drop;
  for (int r = 0; r < item.rows; ++r) {
    const int token = (item.row + r) / heads, head = first + (item.row + r) % heads;
    if (call.drop) w.keys[r] = call.drop->key(s.first_token + token, head);
    const T* q = call.q.at(s.first_token + token, head);
    fetch_row(call.q.at(s.first_token + token, std::min(head + heads, call.N - 1)), call.H);  // the next item's
    T* row = reinterpret_cast<T*>(w.q) + r * w.ld;
    for (int h = 0; h < w.ld; h += kRun) {
      simd::store(row + h, simd::load(q + h, std::clamp(call.H - h, 0, kRun)));
      simd::store(w.o + r * w.ld + h, simd::zero());
    }
    pair_row(row, w.ld);
    w.rows[r] = {simd::set1(kNever), simd::zero(), s.past + token + 1, call.slopes ? call.slopes[head] : 0.0f};
  }
}

template <class T>
void end_rows(const Call<T>& call, const Sequence& s, const Item& item, const Scratch& w) {
  const int heads = call.heads_of(item.kv_head, item.kv_heads), first = call.groups.first(item.kv_head);
  for (int r = 0; r < item.rows; ++r) {
    const int token = (item.row + r) / heads, head = first + (item.row + r) % heads;
    const int64_t at = (s.first_token + token) * call.N + head;
    const float total = simd::sum_lanes(w.rows[r].sum);
    const f32x16 inverse = simd::set1(1.0f / total);
    for (int h = 0; h < call.H; h += kRun)
      simd::store(call.o + at * call.H + h, simd::load(w.o + r * w.ld + h) * inverse, std::min(kRun, call.H - h));
    if (call.lse) call.lse[at] = w.rows[r].top[0] + std::log(total);
  }
}

// The runs of one tile of one kv head, and of what follows it; runs beyond the end repeat the last one, which is never
// summed there, at most fetched.
template <class T>
void locate(const Call<T>& call, const Sequence& s, int kv_head, int next_head, int end, int set, Tile<T>& t) {
  const bool last = t.start + kTile >= end;
  for (int c = 0; c < kRuns; ++c) {
    const int position = std::min(t.start + c * kRun, end - 1), after = last ? c * kRun : position + kTile;
    const int64_t run = call.run(s, position, kv_head);
    t.keys[set * kRuns + c] = call.k_cache + run;
    t.values[set * kRuns + c] = call.v_cache + run;
    t.next[set * kRuns + c] = call.k_cache + call.run(s, std::min(after, end - 1), last ? next_head : kv_head);
  }
}

template <class T>
__attribute__((noinline, noclone)) void attend(const Call<T>& call, const Item& item, Scratch& w) {
  const Sequence s(*call.step, item.sequence);
  w.reserve(call.o, call.H);
  if (s.queries * call.groups.size <= kItemRows)      // nobody else reads this head of the sequence: write just in time
    for (int i = 0; i < item.kv_heads; ++i) write(call, s, item.kv_head + i);
  begin_rows(call, s, item, w);
  const int end = w.rows[item.rows - 1].bound;
  Tile<T> t;
  for (t.start = 0; t.start < end; t.start += kTile) {
    for (int i = 0; i < item.kv_heads; ++i)
      locate(call, s, item.kv_head + i, std::min(item.kv_head + i + item.kv_heads, call.K - 1), end, i, t);
    item.kv_heads == 2 ? advance_pair(w, t, call.H, call.scale) : advance(w, item.rows, t, call.H, call.scale);
  }
  end_rows(call, s, item, w);
}

template <class T>
void add_items(const Call<T>& call, int32_t sequence, std::vector<Item>& items) {
  const int queries = Sequence(*call.step, sequence).queries;
  if (queries * call.groups.size == 1) {
    for (int head = 0; head < call.K; head += 2) {
      const int heads = std::min(2, call.K - head);
      items.push_back({sequence, head, heads, 0, heads});
    }
    return;
  }
  for (int row = (queries * call.groups.size - 1) / kItemRows * kItemRows; row >= 0; row -= kItemRows)
    for (int head = 0; head < call.K; ++head) {
      const int count = std::min(kItemRows, queries * call.heads_of(head) - row);
      if (count > 0) items.push_back({sequence, head, 1, row, count});
    }
}

template <class T>
void forward(const Call<T>& call) {
  const Step& step = *call.step;
  std::vector<Item> items;
  std::vector<int32_t> apart;               // sequences of several items a head: written before anything reads them
  for (int32_t s = 0; s < step.sequences; ++s) {
    if (Sequence(step, s).queries * call.groups.size > kItemRows) apart.push_back(s);
    add_items(call, s, items);
  }
  pool::parallel_for(int64_t(apart.size()) * call.K,
                     [&](int64_t i) { write(call, Sequence(step, apart[i / call.K]), i % call.K); });
  std::atomic<size_t> next{0};
  pool::parallel_for(std::min<int64_t>(pool::num_threads(), items.size()), [&](int64_t) {
    static thread_local Scratch scratch;
    const bf16_order::Flushing flushing(std::is_same_v<T, bf16>);
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items.size();) attend(call, items[i], scratch);
  });
}

}  // namespace
}  // namespace attn

extern "C" {

// Once for a step, before any layer: every number is one that the kernel can follow.
int attn_check_step(attn::Step* step) {
  using namespace operands;
  return guarded([&] {
    step->tokens = step->blocks = -1;
    require(step->sequences >= 0 && step->table_stride >= 0, kBadSize);
    require(step->block_size > 0 && step->block_size % attn::kRun == 0, kBadSize);
    present(step->query_starts, step->sequences + 1), present(step->context_lens, step->sequences);
    present(step->tables, count(step->sequences, step->table_width));
    require(step->query_starts[0] == 0, kBadIndex);
    int64_t blocks = 0;
    for (int64_t s = 0; s < step->sequences; ++s) {
      const int64_t queries = int64_t(step->query_starts[s + 1]) - step->query_starts[s], context = step->context_lens[s];
      const int64_t needed = (context + step->block_size - 1) / step->block_size;
      require(1 <= queries && queries <= context && needed <= step->table_width, kBadIndex);
      for (int64_t b = 0; b < needed; ++b) {
        const int64_t block = step->tables[s * step->table_stride + b];
        require(block >= 0, kBadIndex);
        blocks = std::max(blocks, block + 1);
      }
    }
    step->tokens = step->query_starts[step->sequences], step->blocks = blocks;
  });
}

// What attn_forward is given; mirrored by _FORWARD in attention.py.
struct AttentionForward {
  const attn::Step* step;
  int64_t dtype, blocks;                    // blocks: of the caches
  void *k_cache, *v_cache;
  const void *q, *k, *v;
  int64_t strides[6];                       // token and head strides of q, k, v in elements
  void* o;                                  // [tokens][N][H]
  float* lse;                               // [tokens][N], or null
  int64_t N, K, H, group, skip;             // query head h reads kv head (h + skip) / group
  const float* slopes;                      // [N], or null
  const dropout::Heads* drop;               // null where no probability is dropped
  double scale;
};

int attn_forward(const AttentionForward* given) {
  using namespace operands;
  return guarded([&] {
    const AttentionForward& g = *given;
    const attn::Step& step = *g.step;
    attn::check_heads(step.tokens, g.N, g.K, g.H, g.group, g.skip, g.slopes, g.drop);
    require(step.tokens > 0 && step.blocks <= g.blocks, kBadIndex);
    const int64_t n = count(step.tokens, g.N, g.H), cached = count(g.blocks, g.K, step.block_size, g.H);
    optional(g.lse);
    typed(static_cast<int>(g.dtype), [&](auto zero) {
      using T = decltype(zero);
      using View = attn::View<const T>;
      auto view = [&](const void* data, int i) {
        return View{static_cast<const T*>(data), g.strides[i], g.strides[i + 1]};
      };
      const attn::Call<T> call{&step, static_cast<T*>(g.k_cache), static_cast<T*>(g.v_cache), view(g.q, 0), view(g.k, 2),
                               view(g.v, 4), static_cast<T*>(g.o), g.lse, int(g.N), int(g.K), int(g.H), float(g.scale),
                               g.slopes, g.drop, {int(g.group), int(g.skip), int(g.N)}};
      present(call.k_cache, cached), present(call.v_cache, cached), present(call.o, n);
      for (const View& x : {call.q, call.k, call.v}) present(x.data, n);
      attn::forward(call);
    });
  });
}
}
