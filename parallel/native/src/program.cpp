// A recorded sequence of calls of this library's own entries, made again in order without the interpreter.
//
// A node is a function, the kinds of its arguments and eight bytes for each; what pointers point to is the recorder's to
// keep (parallel/replay/program.py). Between two nodes the pool's workers spin (pool.h), so a gate per parallel loop is all
// the barrier there is, and nobody is woken within a step. The first status that is not 0 ends the replay.
#include <cstring>
#include <type_traits>
#include <utility>

#include "operands.h"

namespace {

constexpr int kMostArguments = 16;

union Word {
  void* p;
  int64_t l;
  double d;
};
struct Node {                                 // mirrored by program.py
  void* function;
  int64_t kind;                               // of kKinds
  Word arguments[kMostArguments];
};

template <class A>
A as(const Word& word) {
  if constexpr (std::is_pointer_v<A>) return static_cast<A>(word.p);
  else if constexpr (std::is_floating_point_v<A>) return static_cast<A>(word.d);
  else return static_cast<A>(word.l);
}
template <class... A, size_t... I>
int spread(void* function, const Word* words, std::index_sequence<I...>) {
  return reinterpret_cast<int (*)(A...)>(function)(as<A>(words[I])...);
}
template <class... A>
int call(void* function, const Word* words) {
  static_assert(sizeof...(A) <= kMostArguments);
  return spread<A...>(function, words, std::index_sequence_for<A...>{});
}

using P = void*;
using I = int;
using L = int64_t;
using F = float;
struct Kind {
  const char* signature;                      // p pointer, i int, l int64, f float
  int (*call)(void*, const Word*);
};
constexpr Kind kKinds[] = {
    {"p", call<P>},                           // attention, rotary, sums over ranks, step_kernels.cpp
    {"pp", call<P, P>},                       // gemm
    {"lilpp", call<L, I, L, P, P>},           // activations
    {"lilppp", call<L, I, L, P, P, P>},       // gates
    {"illplppif", call<I, L, L, P, L, P, P, I, F>},                      // RMS norm
    {"illplppipif", call<I, L, L, P, L, P, P, I, P, I, F>},              // layer norm
};
constexpr int64_t kNumKinds = sizeof kKinds / sizeof kKinds[0];

}  // namespace

extern "C" {

// The number of a signature, or -1: calls of that kind cannot be recorded.
int64_t program_kind(const char* signature) {
  for (int64_t kind = 0; kind < kNumKinds; ++kind)
    if (std::strcmp(kKinds[kind].signature, signature) == 0) return kind;
  return -1;
}

// 0, or the status of the node that failed; `reached` is its number, or `count`.
int program_replay(const Node* nodes, int64_t count, int64_t* reached) {
  for (*reached = 0; *reached < count; ++*reached) {
    const Node& node = nodes[*reached];
    if (node.kind < 0 || node.kind >= kNumKinds || !node.function) return operands::kBadIndex;
    if (int status = kKinds[node.kind].call(node.function, node.arguments)) return status;
  }
  return operands::kOk;
}
}
