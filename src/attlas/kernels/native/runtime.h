// runtime.h: workspace memory and the sharing of tasks over the caller's thread pool.
//
// A task owns what it writes; tasks are handed out by one atomic counter, so which thread runs
// a task is chance, and what the task computes never depends on it. Workspace is one block of
// the pool for each call.
#pragma once
#include <atomic>
#include "attlas.h"
#include "memory.h"
#include "simd.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <vector>
#endif

namespace attlas {
namespace {

// Scratch memory for one call. Offsets are taken first (take), then the block is got (get).
class Workspace {
 public:
  ~Workspace() {
#if defined(__SANITIZE_ADDRESS__)
    if (block_.p) __asan_unpoison_memory_region(block_.p, size_t(block_.bytes));
#endif
    pool().give(block_);
  }
#if defined(__SANITIZE_ADDRESS__)             // a red zone after each array, so that overruns are seen
  std::vector<std::pair<int64_t, int64_t>> zones;
  int64_t take(int64_t bytes) {
    const int64_t at = size_;
    size_ = (at + bytes + 255) & ~int64_t(127);
    zones.push_back({at + bytes, size_});
    return at;
  }
  void guard(const Workspace& mine, int64_t base) {
    for (auto z : mine.zones) __asan_poison_memory_region(block_.p + base + z.first, size_t(z.second - z.first));
  }
#else
  int64_t take(int64_t bytes) {
    const int64_t at = size_;
    size_ += (bytes + 127) & ~int64_t(127);
    return at;
  }
  void guard(const Workspace&, int64_t) {}
#endif
  bool get() {
    block_ = pool().take(size_);
#if defined(__SANITIZE_ADDRESS__)
    if (block_.p) guard(*this, 0);
#endif
    return block_.p != nullptr;
  }
  template <class T> T* at(int64_t offset) const { return (T*)(block_.p + offset); }

 private:
  Block block_;
  int64_t size_ = 128;
};

// Calls body(task, worker) for each task in [0, tasks). Workers are numbered from 0.
template <class Body> void run_tasks(const attlas_problem& p, int64_t tasks, int64_t workers, const Body& body) {
  struct Shared {
    const Body& body;
    int64_t tasks;
    std::atomic<int64_t> next;
    void work(int64_t worker) {
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(t, worker);
    }
  } shared{body, tasks, {0}};
  if (tasks < workers) workers = tasks;
  if (workers > 1 && p.parallel_for)
    p.parallel_for(0, workers, 1, [](int64_t begin, int64_t end, void* ctx) {
      for (int64_t w = begin; w < end; w++) ((Shared*)ctx)->work(w);
    }, &shared);
  shared.work(0);                             // all of them, or what is left where no thread could be had
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class I> INLINE I min2(I a, I b) { return a < b ? a : b; }
template <class I> INLINE I max2(I a, I b) { return a > b ? a : b; }

}  // namespace
}  // namespace attlas
