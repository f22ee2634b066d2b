// The one state of the pool (pool.h), and its thread count for Python.
#include "pool.h"

namespace pool {
State& state() {
  static State* shared = new State;         // never destroyed: workers may outlive static destructors
  return *shared;
}
}  // namespace pool

extern "C" {
void pool_set_threads(int threads) { pool::state().threads = threads < 1 ? 1 : threads; }
int pool_num_threads() { return pool::num_threads(); }
}
