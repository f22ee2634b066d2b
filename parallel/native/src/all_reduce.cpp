// Sums and maxima over the ranks of one host, in a fixed order: the rest of a reduction tree, or rank after rank.
//
// A plan says how many nodes each rank brings and in which order they are added; every rank evaluates the same plan on the
// same float32 values, so all get the same bits, whatever the chunking. Large tensors are divided: each rank finishes its
// share of the elements and a second round exchanges the results. Additions are never reassociated (no -ffast-math).
#include <new>

#include "comm.h"
#include "operands.h"
#include "simd.h"

namespace {

using namespace comm;
using simd::bf16;
using operands::kBFloat16;
using operands::kFloat32;
constexpr int64_t kBlock = 512;               // elements summed at a time: a handful of partial sums stay in L1
constexpr int kDeepest = 64;                  // values of a plan that wait to be added
constexpr int64_t kGrain = 64;                // shares and chunks are cut at whole cache lines of either type

struct Plan {                                 // a sum: how many nodes each rank brings, and the order of additions
  std::vector<int> first;                     // index of each rank's first node; one more for the end
  std::vector<int> program;
  int most = 0, depth = 0;
  uint32_t hash = 2166136261u;                // of all of it (FNV-1a), compared by the ranks before they add
  void add(int number) {
    for (int shift = 0; shift < 32; shift += 8) hash = (hash ^ (static_cast<uint32_t>(number) >> shift & 255)) * 16777619u;
  }
};

struct Add { static float of(float a, float b) { return a + b; } };
struct Max { static float of(float a, float b) { return a != a || a > b ? a : b; } };     // NaN wins, as in torch

inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint32_t rounded = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  *p = static_cast<bf16>(x == x ? rounded : 0x7fc0u);
}

struct Bias {
  const void* data;                           // null: none
  int64_t width;
  int type;
};

template <class Out, class B>
void add_bias(const float* x, const B* bias, int64_t width, int64_t at, int64_t n, Out* out) {
  for (int64_t i = 0, d = at % width; i < n; d = 0) {
    int64_t run = std::min(n - i, width - d);
    const float* xs = x + i;
    const B* bs = bias + d;
    Out* os = out + i;
    for (int64_t k = 0; k < run; ++k) put(os + k, xs[k] + simd::to_float(bs[k]));
    i += run;
  }
}

template <class Out>
void store(const float* x, const Bias& bias, int64_t at, int64_t n, Out* out) {
  if (!bias.data) for (int64_t k = 0; k < n; ++k) put(out + k, x[k]);
  else if (bias.type == kFloat32) add_bias(x, static_cast<const float*>(bias.data), bias.width, at, n, out);
  else add_bias(x, static_cast<const bf16*>(bias.data), bias.width, at, n, out);
}

inline const float* push(const float* x, int64_t, float*) { return x; }
inline const float* push(const bf16* x, int64_t n, float* room) {
  for (int64_t k = 0; k < n; ++k) room[k] = simd::to_float(x[k]);
  return room;
}

// Evaluates the plan for elements [begin, end) of the nodes; `at` is the index of element 0 in the whole tensor.
template <class Op, class In, class Out>
void evaluate(Comm* c, const Plan& plan, int64_t begin, int64_t end, int64_t at, const Bias& bias, Out* out) {
  c->scratch.resize(plan.depth * kBlock);
  c->node.resize(plan.first.back());
  const float* stack[kDeepest];
  for (int64_t i = begin; i < end; i += kBlock) {
    int64_t n = std::min(kBlock, end - i);
    int top = 0;
    for (int step : plan.program) {
      float* room = c->scratch.data() + (step < 0 ? top - 2 : top) * kBlock;
      if (step >= 0) {
        stack[top++] = push(reinterpret_cast<const In*>(c->node[step]) + i, n, room);
        continue;
      }
      const float *a = stack[top - 2], *b = stack[top - 1];
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) room[k] = Op::of(a[k], b[k]);
      stack[--top - 1] = room;
    }
    store(stack[0], bias, at + i, n, out + i);
  }
}

struct Reduce {                               // one call, as the templates see it
  const Plan* plan;
  const char* nodes;                          // null: they are in the slot
  int64_t numel;
  Bias bias;
  char* out;
  Head head;
  bool split;
  int64_t chunk;                              // elements per round
};

inline int64_t share(int64_t n, int r, int size) { return r == size ? n : n * r / size / kGrain * kGrain; }

// Finishes elements [0, m) of this round: all of them, or this rank's share followed by an exchange of results.
template <class Op, class In, class Out>
Status finish_chunk(Comm* c, const Reduce& call, int64_t at, int64_t m) {
  Out* out = reinterpret_cast<Out*>(call.out) + at;
  if (!call.split) {
    evaluate<Op, In>(c, *call.plan, 0, m, at, call.bias, out);
    return kOk;
  }
  auto begin = [&](int r) { return share(m, r, c->size); };
  auto bytes = [&](int r) { return (begin(r + 1) - begin(r)) * sizeof(Out); };
  Out* result = reinterpret_cast<Out*>(c->slot(c->round + 1, c->rank));
  evaluate<Op, In>(c, *call.plan, begin(c->rank), begin(c->rank + 1), at, call.bias, result - begin(c->rank));
  if (Status s = meet(c, call.head, c->limit_ns, [&](int) { return call.head.nbytes; })) return s;
  for (int r = 0; r < c->size; ++r) std::memcpy(out + begin(r), c->slot(c->round, r), bytes(r));
  return kOk;
}

template <class Op, class In, class Out>
Status reduce(Comm* c, const Reduce& call) {
  const Plan& plan = *call.plan;
  int first = plan.first[c->rank], count = plan.first[c->rank + 1] - first;
  c->node.resize(plan.first.back());
  for (int64_t at = 0; at < call.numel || at == 0; at += call.chunk) {
    int64_t m = std::min(call.chunk, call.numel - at), bytes = m * sizeof(In);
    uint64_t round = c->round + 1;
    for (int j = 0; j < count && call.nodes; ++j)
      std::memcpy(c->slot(round, c->rank) + j * bytes, call.nodes + (j * call.numel + at) * sizeof(In), bytes);
    if (Status s = meet(c, call.head, c->limit_ns, [&](int) { return call.head.nbytes; })) return s;
    for (int r = 0; r < c->size; ++r)
      for (int k = plan.first[r]; k < plan.first[r + 1]; ++k)
        c->node[k] = c->slot(round, r) + (k - plan.first[r]) * bytes;
    for (int j = 0; j < count && call.nodes; ++j) c->node[first + j] = call.nodes + (j * call.numel + at) * sizeof(In);
    if (Status s = finish_chunk<Op, In, Out>(c, call, at, m)) return s;
  }
  return kOk;
}

template <class Op>
Status reduce_types(Comm* c, const Reduce& call, int in, int out) {
  if (in == kFloat32 && out == kFloat32) return reduce<Op, float, float>(c, call);
  if (in == kFloat32) return reduce<Op, float, bf16>(c, call);
  if (out == kFloat32) return reduce<Op, bf16, float>(c, call);
  return reduce<Op, bf16, bf16>(c, call);
}

// Fills in what follows from counts and program; false where the program does not use every node once and leave one value.
bool complete(Plan& p) {
  for (int count : p.first) p.add(count);
  std::vector<bool> used(p.first.back());
  int top = 0;
  for (int step : p.program) {
    p.add(step);
    if (step < 0 ? top < 2 : step >= p.first.back() || used[step]) return false;
    if (step >= 0) used[step] = true;
    p.depth = std::max(p.depth, top += step < 0 ? -1 : 1);
  }
  return top == 1 && p.depth <= kDeepest && std::find(used.begin(), used.end(), false) == used.end();
}

constexpr uint64_t kBegun = 4096;

struct Begun { int64_t at, kind, call, nbytes; };
struct Ledger {                               // of what recorded steps did; mirrored by native/comm.py
  uint64_t calls;                             // collectives this rank has begun, of any kind
  uint64_t begun;                             // of these, in recorded steps
  int64_t spent[16];                          // nanoseconds by kind
  Begun last[kBegun];                         // number n in place n % kBegun
};
struct Step {                                 // one sum of a recorded step; mirrored by native/comm.py
  Comm* comm;
  const Plan* plan;
  int64_t kind;
  const char* nodes;
  int64_t numel, in;
  const void* bias;
  int64_t bias_width, bias_type;
  char* out;
  int64_t out_type;
  uint64_t chunk_bytes, split_bytes;
  int64_t maximum, nbytes;                    // given by this rank, for the ledger
  Ledger* ledger;
};

}  // namespace

extern "C" {

// null where the counts or the program are none, or memory is short
Plan* comm_plan(int size, const int* counts, const int* program, int length) {
  Plan* p = new (std::nothrow) Plan;
  try {
    if (!p) return nullptr;
    p->first.assign(1, 0);
    for (int r = 0; r < size; ++r) {
      p->first.push_back(p->first.back() + std::max(counts[r], 0));
      p->most = std::max(p->most, counts[r]);
    }
    p->program.assign(program, program + length);
    if (complete(*p)) return p;
  } catch (const std::bad_alloc&) {
  }
  delete p;
  return nullptr;
}

void comm_plan_free(Plan* p) { delete p; }

// nodes: this rank's, packed [count, numel]; null when they were written at comm_slot. Above split_bytes per node the
// ranks divide the elements; every rank must give the same kind, call, plan, numel, types and thresholds.
int comm_reduce(Comm* c, const Plan* plan, uint32_t kind, uint64_t call, const char* nodes, int64_t numel, int in, const void* bias,
                int64_t bias_width, int bias_type, char* out, int out_type, uint64_t chunk_bytes, uint64_t split_bytes, int maximum) {
  return with_memory(c, [&] {
    int64_t width = in == kFloat32 ? 4 : 2, room = std::min(chunk_bytes, c->cap) / width / std::max(1, plan->most);
    Reduce r{plan, nodes, numel, {bias, bias_width, bias_type}, out, {}, false, std::max(kGrain, room / kGrain * kGrain)};
    r.split = plan->first.back() > 2 && static_cast<uint64_t>(numel * width) >= split_bytes;
    const uint32_t shape = r.split | (out_type == kBFloat16) << 1 | (in == kBFloat16) << 2 | (bias != nullptr) << 3;
    r.head = {kind, plan->hash ^ shape << 24, static_cast<uint64_t>(numel * width), call};
    int count = plan->first[c->rank + 1] - plan->first[c->rank];
    if (!nodes && numel > r.chunk) {
      char* slot = c->slot(c->round + 1, c->rank);
      c->saved.assign(slot, slot + count * numel * width);
      r.nodes = c->saved.data();
    }
    return done(c, maximum ? reduce_types<Max>(c, r, in, out_type) : reduce_types<Add>(c, r, in, out_type));
  });
}

// As comm_reduce: the next collective of this rank, which is entered in its ledger.
int comm_step(const Step* s) {
  Ledger& ledger = *s->ledger;
  const int64_t began = now();
  ledger.last[ledger.begun % kBegun] = {began, s->kind, static_cast<int64_t>(++ledger.calls), s->nbytes};
  ++ledger.begun;
  const int status = comm_reduce(s->comm, s->plan, static_cast<uint32_t>(s->kind), ledger.calls, s->nodes, s->numel,
                                 static_cast<int>(s->in), s->bias, s->bias_width, static_cast<int>(s->bias_type), s->out,
                                 static_cast<int>(s->out_type), s->chunk_bytes, s->split_bytes, static_cast<int>(s->maximum));
  ledger.spent[s->kind & 15] += now() - began;
  return status;
}

}  // extern "C"
