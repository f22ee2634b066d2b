// A persistent pool of threads shared by all kernels of the library.
//
//   pool::parallel_for(n, [&](int64_t i) { ... });              every i of 0..n-1 once
//   pool::parallel_ranges(n, [&](int64_t begin, int64_t end) { ... });   the same in contiguous runs
//
// Thread t of T starts on the t-th of T equal parts, in a few pieces; who is done takes pieces of others, and nobody
// waits for a thread that has not begun: on a busy machine the caller does the work itself. With one thread, n < 2, a
// nested call, or another Python thread inside the pool at this moment, everything runs in the caller. So kernels must
// not let their results depend on who runs what. An exception in any thread reaches the caller, once all have stopped; what
// was left of the work is then not done. Workers spin for a short while
// and then sleep: a decode step does not pay for waking them and an idle process costs nothing. After a fork the child
// starts its own workers on first use.
#pragma once
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace pool {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

struct Job {
  void (*call)(void* context, int64_t begin, int64_t end);
  void* context;
  int64_t n;
};

class Pool {
 public:
  explicit Pool(int wanted) : wanted_(wanted), parts_(wanted) {
    workers_.reserve(wanted);
    try {
      for (int t = 1; t < wanted; ++t) workers_.emplace_back([this, t] { work(t); });
    } catch (const std::system_error&) {    // the system gives no more threads: go on with those there are
    }
  }
  ~Pool() {
    stop_ = true;
    open_gate();
    for (auto& worker : workers_) worker.join();
  }
  int wanted() const { return wanted_; }

  void run(const Job& job) {
    job_ = job;
    for (int t = 0; t < wanted_; ++t) parts_[t].next.store(0, std::memory_order_relaxed);
    open_gate();
    share(0);
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int spins = 0; gate_.load(std::memory_order_acquire) & kInside; ++spins) {
      if (spins < kSpins) relax(); else std::this_thread::yield();
    }
    if (failed_.exchange(false, std::memory_order_relaxed)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  static constexpr int kSpins = 4000;       // about 50 us: longer than the gap between two products of a decode step
  static constexpr int kPieces = 4;         // of a part
  static constexpr uint64_t kInside = 0xffff, kOpen = 1u << 31;          // the epoch stands in the upper half

  struct alignas(64) Part { std::atomic<int> next{0}; };

  void share(int self) {
    for (int i = 0; i < wanted_; ++i) {
      int t = (self + i) % wanted_;
      int64_t begin = job_.n * t / wanted_, size = job_.n * (t + 1) / wanted_ - begin;
      for (int p; (p = parts_[t].next.fetch_add(1, std::memory_order_relaxed)) < kPieces;) {
        int64_t from = begin + size * p / kPieces, to = begin + size * (p + 1) / kPieces;
        if (from < to && !failed_.load(std::memory_order_relaxed)) attempt(from, to);
      }
    }
  }
  void attempt(int64_t from, int64_t to) noexcept {
    try {
      job_.call(job_.context, from, to);
    } catch (...) {                         // the first one is the caller's, who reads it when all have left
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
    }
  }
  void open_gate() {
    uint64_t epoch = (gate_.load(std::memory_order_relaxed) >> 32) + 1;
    gate_.store(epoch << 32 | kOpen, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  uint64_t wait_beyond(uint64_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      uint64_t gate = gate_.load(std::memory_order_acquire);
      if (gate >> 32 != seen) return gate;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return gate_.load(std::memory_order_seq_cst) >> 32 != seen; });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return gate_.load(std::memory_order_acquire);
  }
  void work(int t) {
    for (uint64_t gate = 0;;) {
      gate = wait_beyond(gate >> 32);
      if (stop_) return;
      while (gate & kOpen)                  // enter, unless the caller is done already
        if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
          share(t);
          gate_.fetch_sub(1, std::memory_order_release);
          break;
        }
    }
  }

  const int wanted_;
  Job job_{};                               // read by a worker only between entering and leaving
  std::vector<Part> parts_;
  std::atomic<bool> stop_{false}, failed_{false};
  std::exception_ptr error_;                // of this job, with failed_
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

struct State {
  std::atomic<int> threads{1};
  std::atomic<bool> busy{false};            // held by the one caller that may use the workers
  Pool* pool = nullptr;                     // guarded by busy
  bool fork_handler = false;
};
__attribute__((visibility("hidden"))) State& state();                    // pool.cpp: one for the library
inline void after_fork() {                  // in the child: the workers are gone, their object is abandoned
  state().pool = nullptr;
  state().busy = false;
}

inline Pool& workers(State& s, int threads) {
  if (!s.fork_handler) s.fork_handler = pthread_atfork(nullptr, nullptr, after_fork) == 0;
  if (s.pool && s.pool->wanted() != threads) { delete s.pool; s.pool = nullptr; }
  if (!s.pool) s.pool = new Pool(threads);
  return *s.pool;
}

inline int num_threads() { return state().threads.load(std::memory_order_relaxed); }

template <class F>
void parallel_ranges(int64_t n, const F& fn) {
  State& s = state();
  int threads = num_threads();
  if (n <= 0) return;
  if (threads < 2 || n < 2 || s.busy.exchange(true, std::memory_order_acquire)) { fn(int64_t(0), n); return; }
  Job job{[](void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); }, const_cast<F*>(&fn), n};
  struct Release {                          // also where an exception passes
    State& s;
    ~Release() { s.busy.store(false, std::memory_order_release); }
  } release{s};
  workers(s, threads).run(job);
}

template <class F>
void parallel_for(int64_t n, const F& fn) {
  parallel_ranges(n, [&](int64_t begin, int64_t end) { for (int64_t i = begin; i < end; ++i) fn(i); });
}

}  // namespace pool
