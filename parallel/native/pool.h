// A persistent pool of threads shared by all kernels of the library.
//
//   pool::parallel_for(n, [&](int64_t i) { ... });              every i of 0..n-1 once, thread t takes one contiguous run
//   pool::parallel_ranges(n, [&](int64_t begin, int64_t end) { ... });   the same, one call per run
//
// The caller is one of the threads. With one thread, n < 2, a nested call, or another Python thread inside the pool at
// this moment, everything runs in the caller: kernels must not let their results depend on who runs what. Exceptions
// must not leave the function. Workers spin for a short while and then sleep, so that a decode step does not pay for
// waking them and an idle process costs nothing. After a fork the child starts its own workers on first use.
#pragma once
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
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
  explicit Pool(int wanted) : wanted_(wanted) {
    workers_.reserve(wanted);
    try {
      for (int t = 1; t < wanted; ++t) workers_.emplace_back([this, t] { work(t); });
    } catch (const std::system_error&) {    // the system gives no more threads: go on with those there are
    }
    threads_ = 1 + static_cast<int>(workers_.size());
  }
  ~Pool() {
    stop_ = true;
    announce();
    for (auto& worker : workers_) worker.join();
  }
  int wanted() const { return wanted_; }
  void run(const Job& job) {
    job_ = job;
    pending_.store(threads_ - 1, std::memory_order_relaxed);
    announce();
    share(0);
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) relax(); else std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 4000;       // about 50 us: longer than the gap between two products of a decode step

  void share(int t) {
    int64_t begin = job_.n * t / threads_, end = job_.n * (t + 1) / threads_;
    if (begin < end) job_.call(job_.context, begin, end);
  }
  void announce() {
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  void wait_beyond(uint32_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (epoch_.load(std::memory_order_acquire) != seen) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
  void work(int t) {
    for (uint32_t seen = 0;;) {
      wait_beyond(seen);
      ++seen;                               // run() never announces a job before the last one is done by everybody
      if (stop_) return;
      share(t);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int wanted_;
  int threads_ = 1;                         // read by the workers only after the first announce()
  Job job_{};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> pending_{0};
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
inline State& state() {
  static State* shared = new State;         // never destroyed: workers may outlive static destructors
  return *shared;
}
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
  workers(s, threads).run(job);
  s.busy.store(false, std::memory_order_release);
}

template <class F>
void parallel_for(int64_t n, const F& fn) {
  parallel_ranges(n, [&](int64_t begin, int64_t end) { for (int64_t i = begin; i < end; ++i) fn(i); });
}

}  // namespace pool
