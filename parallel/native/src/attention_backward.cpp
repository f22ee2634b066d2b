// Gradients of causal attention over packed sequences, from the log-sum-exp the forward kept.
//
// One item is a (sequence, query head), or a (sequence, kv head) where the gradients of a shared kv head are summed.
// The item is brought to float32 scratch, then key tiles are walked in ascending order and, for each, query tiles: p is
// recomputed, dq adds up over keys, dk and dv over queries, all in ascending positions. So the bits of a head depend on
// its own sequence alone.
#include "attention_step.h"

#include <atomic>
#include <vector>

#include "pool.h"

namespace attn {
namespace {

template <class T>
struct Call {
  const int32_t* starts;                    // [sequences + 1]
  View<const T> q, k, v, o, d_o;
  const float* lse;
  View<T> dq, dk, dv;
  int N, K, H;
  float scale;
  const float* slopes;
  const dropout::Heads* drop;               // null: no probability was dropped
  bool per_head;                            // dk and dv of every query head, not their sum over a kv head's group
  Groups groups;
};

struct Head {                               // one head of one sequence, in float32; rows are `ld` wide, padding is zero
  std::vector<float> memory;
  std::vector<uint64_t> keys;               // of the queries' dropout masks; unused without
  dropout::Chance chance;
  bool drops;
  int L, H, ld, tiles;
  float *q, *d_o, *k, *k_runs, *v_runs, *dq, *dk, *dv, *dk_sum, *dv_sum, *lse, *delta, *p, *ds;
  void reserve(int length, int head_dim) {
    L = length, H = head_dim, ld = padded(H), tiles = (L + kTile - 1) / kTile;
    const size_t rows = size_t(tiles) * kTile, matrix = rows * ld;
    memory.assign(10 * matrix + 2 * rows + 2 * kTile * kTile + kRun, 0.0f);
    float* next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    for (float** part : {&q, &d_o, &k, &k_runs, &v_runs, &dq, &dk, &dv, &dk_sum, &dv_sum}) *part = next, next += matrix;
    for (float** part : {&lse, &delta}) *part = next, next += rows;
    p = next, ds = next + kTile * kTile;
  }
  const float* run_of(const float* runs, int64_t tile, int c) const { return runs + (tile * kRuns + c) * kRun * ld; }
};

template <class T>
void widen_row(const T* from, int H, float* to) {
  for (int h = 0; h < H; h += kRun) simd::store(to + h, simd::load(from + h, std::min(kRun, H - h)));
}

template <class T>
void gather(const Call<T>& call, int64_t first, int64_t head, int64_t kv_head, Head& w) {
  std::vector<float> row(w.ld);
  w.drops = call.drop != nullptr;
  if (w.drops) w.chance = call.drop->chance, w.keys.resize(w.L);
  for (int t = 0; t < w.L; ++t) {
    if (w.drops) w.keys[t] = call.drop->key(first + t, head);
    widen_row(call.q.at(first + t, head), w.H, w.q + int64_t(t) * w.ld);
    widen_row(call.d_o.at(first + t, head), w.H, w.d_o + int64_t(t) * w.ld);
    widen_row(call.o.at(first + t, head), w.H, row.data());
    f32x16 delta = simd::zero();
    for (int h = 0; h < w.ld; h += kRun)
      delta = simd::fma(simd::load(w.d_o + int64_t(t) * w.ld + h), simd::load(row.data() + h), delta);
    w.delta[t] = simd::sum_lanes(delta);
    w.lse[t] = call.lse[(first + t) * call.N + head];
    float* k = w.k + int64_t(t) * w.ld;
    widen_row(call.k.at(first + t, kv_head), w.H, k);
    widen_row(call.v.at(first + t, kv_head), w.H, row.data());
    const int64_t run = int64_t(t / kRun) * kRun * w.ld + t % kRun;
    for (int h = 0; h < w.H; ++h) w.k_runs[run + h * kRun] = k[h], w.v_runs[run + h * kRun] = row[h];
  }
  std::fill(w.dq, w.dk_sum, 0.0f);          // dq, dk and dv lie together
}

// p (with dropout, what of it was used) and ds of R queries from `row` on against one tile of keys, into the tile's buffers
template <int R>
void recompute(Head& w, int64_t row, int in_tile, int64_t key_tile, float scale, float slope) {
  const float *keys[kRuns], *values[kRuns];
  for (int c = 0; c < kRuns; ++c) {
    keys[c] = w.run_of(w.k_runs, key_tile, c);
    values[c] = w.run_of(w.v_runs, key_tile, c);
  }
  f32x16 scores[R][kRuns], d_p[R][kRuns];
  dot<R, kRuns>(w.q + row * w.ld, w.ld, keys, w.H, values, scores);
  dot<R, kRuns>(w.d_o + row * w.ld, w.ld, values, w.H, keys, d_p);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kRuns; ++c) {
      const int live = int(row + r + 1 - key_tile * kTile) - kRun * c;
      const f32x16 p = simd::exp(biased(scores[r][c], scale, slope, live) - simd::set1(w.lse[row + r]));
      f32x16 d = d_p[r][c], weight = p;
      if (w.drops) {
        const f32x16 kept = dropout::factors(w.chance, w.keys[row + r], uint32_t(key_tile * kTile + kRun * c));
        d *= kept, weight *= kept;
      }
      f32x16 ds = p * (d - simd::set1(w.delta[row + r])) * simd::set1(scale);
      if (live < kRun) {
        weight = simd::select(before(live), weight, simd::zero());
        ds = simd::select(before(live), ds, simd::zero());
      }
      simd::store(w.p + (in_tile + r) * kTile + kRun * c, weight);
      simd::store(w.ds + (in_tile + r) * kTile + kRun * c, ds);
    }
}

// out[key] += weights[query][key] * rows[query] over one tile of queries, R keys from `key` on
template <int R>
void add_to_keys(const Head& w, const float* weights, const float* rows, int key, int queries, float* out) {
  const float* runs[kRuns];
  f32x16 ones[R];
  for (int c = 0; c < kRuns; ++c) runs[c] = rows + int64_t(c) * kRun * w.ld;
  for (int r = 0; r < R; ++r) ones[r] = simd::set1(1);
  const Weighted<float> sum{weights + key, 1, kTile, runs, w.ld, 0, queries, runs};
  weigh<R>(sum, ones, out + int64_t(key) * w.ld, w.ld);
}

void backward_tile(Head& w, int64_t key_tile, int64_t query_tile, float scale, float slope) {
  const int64_t q0 = query_tile * kTile, k0 = key_tile * kTile;
  const int queries = std::min<int>(kTile, w.L - q0), keys = std::min<int>(kTile, w.L - k0);
  const bool diagonal = key_tile == query_tile;
  const float* k_rows[kRuns];
  for (int c = 0; c < kRuns; ++c) k_rows[c] = w.k + (k0 + c * kRun) * w.ld;
  in_groups(queries, [&](auto R, int row) {
    recompute<R()>(w, q0 + row, row, key_tile, scale, slope);
    int live[R()];
    f32x16 ones[R()];
    for (int r = 0; r < R(); ++r) live[r] = diagonal ? row + r + 1 : kTile, ones[r] = simd::set1(1);
    const Weighted<float> sum{w.ds + row * kTile, kTile, 1, k_rows, w.ld, 0, 0, k_rows};
    weigh_up_to<R()>(sum, live, ones, w.dq + (q0 + row) * w.ld, w.ld);
  });
  in_groups(keys, [&](auto R, int key) {
    add_to_keys<R()>(w, w.p, w.d_o + q0 * w.ld, key, queries, w.dv + k0 * w.ld);
    add_to_keys<R()>(w, w.ds, w.q + q0 * w.ld, key, queries, w.dk + k0 * w.ld);
  });
}

template <class T>
void store_rows(const View<T>& out, int64_t first, int64_t head, const Head& w, const float* from) {
  for (int t = 0; t < w.L; ++t)
    for (int h = 0; h < w.H; h += kRun)
      simd::store(out.at(first + t, head) + h, simd::load(from + int64_t(t) * w.ld + h), std::min(kRun, w.H - h));
}

// All query heads first_head..last_head-1 of one sequence that share kv_head; their dk and dv go to out_head, summed.
template <class T>
void backward_heads(const Call<T>& call, int64_t sequence, int first_head, int last_head, int64_t kv_head,
                    int64_t out_head, Head& w) {
  const int64_t first = call.starts[sequence];
  w.reserve(int(call.starts[sequence + 1] - first), call.H);
  for (int head = first_head; head < last_head; ++head) {
    gather(call, first, head, kv_head, w);
    for (int64_t key_tile = 0; key_tile < w.tiles; ++key_tile)
      for (int64_t query_tile = key_tile; query_tile < w.tiles; ++query_tile)
        backward_tile(w, key_tile, query_tile, call.scale, call.slopes ? call.slopes[head] : 0.0f);
    store_rows(call.dq, first, head, w, w.dq);
    if (last_head - first_head == 1) break;
    for (int64_t i = 0; i < int64_t(w.L) * w.ld; ++i) {
      w.dk_sum[i] = head == first_head ? w.dk[i] : w.dk_sum[i] + w.dk[i];
      w.dv_sum[i] = head == first_head ? w.dv[i] : w.dv_sum[i] + w.dv[i];
    }
  }
  const bool alone = last_head - first_head == 1;
  store_rows(call.dk, first, out_head, w, alone ? w.dk : w.dk_sum);
  store_rows(call.dv, first, out_head, w, alone ? w.dv : w.dv_sum);
}

template <class T>
void backward(const Call<T>& call, int64_t sequences) {
  const int64_t per_sequence = call.per_head ? call.N : call.K, total = sequences * per_sequence;
  std::atomic<int64_t> next{0};
  pool::parallel_for(std::min<int64_t>(pool::num_threads(), total), [&](int64_t) {
    Head scratch;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) {
      const int out = int(i % per_sequence), kv_head = call.per_head ? call.groups.kv_head(out) : out;
      const int first = call.per_head ? out : call.groups.first(out), last = call.per_head ? out + 1 : call.groups.first(out + 1);
      backward_heads(call, i / per_sequence, first, last, kv_head, out, scratch);
    }
  });
}

}  // namespace
}  // namespace attn

extern "C" {

// strides: token and head strides of q, k, v, o, d_o, dq, dk, dv, in elements; per_head: dk and dv have N heads, else K;
// group, skip, drop: the forward's
int attn_backward(const int32_t* starts, int64_t sequences, int64_t tokens, int dtype, const void* const* inputs,
                  const float* lse, void* const* outputs, const int64_t* strides, int N, int K, int H, float scale,
                  const float* slopes, const dropout::Heads* drop, int per_head, int group, int skip) {
  using namespace operands;
  return guarded([&] {
    attn::check_heads(tokens, N, K, H, group, skip, slopes, drop);
    require(sequences >= 0, kBadSize);
    present(starts, sequences + 1), present(lse, count(tokens, N));
    require(starts[0] == 0 && starts[sequences] == tokens, kBadIndex);
    for (int64_t s = 0; s < sequences; ++s) require(starts[s] <= starts[s + 1], kBadIndex);
    const int64_t n = count(tokens, N, H);
    typed(dtype, [&](auto zero) {
      using T = decltype(zero);
      using In = attn::View<const T>;
      using Out = attn::View<T>;
      for (int i = 0; i < 5; ++i) present(static_cast<const T*>(inputs[i]), n);
      for (int i = 0; i < 3; ++i) present(static_cast<const T*>(outputs[i]), n);
      auto in = [&](int i) { return In{static_cast<const T*>(inputs[i]), strides[2 * i], strides[2 * i + 1]}; };
      auto out = [&](int i) { return Out{static_cast<T*>(outputs[i]), strides[10 + 2 * i], strides[11 + 2 * i]}; };
      attn::backward(attn::Call<T>{starts, in(0), in(1), in(2), in(3), in(4), lse, out(0), out(1), out(2), N, K, H,
                                   scale, slopes, drop, per_head != 0, {group, skip, N}}, sequences);
    });
  });
}
}
