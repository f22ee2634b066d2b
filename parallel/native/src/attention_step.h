// One step of attention as the C interface describes it: which tokens are new, and where each sequence's keys lie.
//
// The caches are [block][kv head][block_size / 16 runs][16 * head_dim], see attention_tiles.h for a run. Nothing here
// computes; the structures are mirrored field by field in attention.py.
#pragma once
#include "attention_tiles.h"
#include "dropout.h"
#include "operands.h"

namespace attn {

struct Step {
  int64_t sequences, block_size, table_stride, table_width;
  const int32_t *query_starts, *context_lens, *tables;  // [sequences + 1]; with the new tokens; [sequences][width]
  int64_t tokens, blocks;                   // found by attn_check_step: new tokens, one more than the highest block
};

struct Sequence {
  int64_t first_token;                      // of its new tokens in the flat row
  int queries, past;                        // how many are new, how many came before
  const int32_t* table;
  Sequence(const Step& step, int64_t s)
      : first_token(step.query_starts[s]),
        queries(step.query_starts[s + 1] - step.query_starts[s]),
        past(step.context_lens[s] - queries),
        table(step.tables + s * step.table_stride) {}
};

template <class T>
struct View {                               // [token][head][dim], the last contiguous; strides in elements
  T* data;
  int64_t token, head;
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

// Which kv head a query head reads: head h reads (h + skip) / size. All kv heads have `size` query heads but the first,
// `skip` of whose lie elsewhere, and the last.
struct Groups {
  int size, skip, N;
  int first(int kv_head) const { return std::clamp(kv_head * size - skip, 0, N); }
  int kv_head(int head) const { return (head + skip) / size; }
};

inline void check_heads(int64_t tokens, int64_t N, int64_t K, int64_t H, int64_t size, int64_t skip, const float* slopes,
                        const dropout::Heads* drop) {
  using namespace operands;
  require(N > 0 && K > 0 && H > 0 && H <= 1 << 24, kBadSize);
  require(size > 0 && 0 <= skip && skip < size && K == (N + skip + size - 1) / size, kBadSize);
  require(count(tokens, N) <= INT32_MAX, kBadSize);     // rows are counted in 32 bits
  if (slopes) present(slopes, N);
  if (drop) present(drop->tokens, tokens), present(drop->heads, N);
}

}  // namespace attn
