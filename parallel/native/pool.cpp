// The one instance of the pool lives in pool.h; this file gives Python its thread count.
#include "pool.h"

extern "C" {
void pool_set_threads(int threads) { pool::state().threads = threads < 1 ? 1 : threads; }
int pool_num_threads() { return pool::num_threads(); }
}
