// runtime.h: workspace memory and the sharing of tasks over the caller's thread pool.
//
// A task owns what it writes; tasks are handed out by one atomic counter, so which thread runs
// a task is chance, and what the task computes never depends on it. Workspace is one aligned,
// huge-page-advised block per call, kept for the next call (at most CACHE_BYTES in all).
#pragma once
#include <atomic>
#include <cstdlib>
#include <mutex>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include "attlas.h"
#include "simd.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <vector>
#endif

namespace attlas {

struct Block { char* p = nullptr; int64_t bytes = 0; };
std::mutex& cache_lock();   // defined once, in api.cpp
Block* cache();

namespace {

constexpr int64_t CACHE_BYTES = int64_t(256) << 20, CACHE_SLOTS = 4;

inline void advise_huge(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, a = ((uintptr_t)p + page - 1) & ~(page - 1);
  const uintptr_t b = ((uintptr_t)p + (uintptr_t)bytes) & ~(page - 1);
  if (bytes >= (int64_t(4) << 20) && b > a) madvise((void*)a, b - a, MADV_HUGEPAGE);
#else
  (void)p; (void)bytes;
#endif
}

// Scratch memory for one call. Offsets are taken first (take), then the block is got (get).
class Workspace {
 public:
  ~Workspace() {
    if (!block_.p) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block_.p, size_t(block_.bytes));
    free(block_.p);
    return;
#endif
    {
      std::lock_guard<std::mutex> hold(cache_lock());
      int64_t held = block_.bytes;
      for (int64_t i = 0; i < CACHE_SLOTS; i++) held += cache()[i].bytes;
      for (int64_t i = 0; i < CACHE_SLOTS && held <= CACHE_BYTES; i++)
        if (!cache()[i].p) { cache()[i] = block_; return; }
    }
    free(block_.p);
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
#if defined(__SANITIZE_ADDRESS__)
    block_.bytes = (size_ + 4095) & ~int64_t(4095);
    block_.p = (char*)aligned_alloc(4096, size_t(block_.bytes));
    if (block_.p) guard(*this, 0);
    return block_.p != nullptr;
#endif
    {
      std::lock_guard<std::mutex> hold(cache_lock());
      Block* best = nullptr;
      for (int64_t i = 0; i < CACHE_SLOTS; i++) {
        Block& b = cache()[i];
        if (b.p && b.bytes >= size_ && b.bytes <= 4 * size_ + (1 << 20) && (!best || b.bytes < best->bytes)) best = &b;
      }
      if (best) { block_ = *best; *best = Block(); return true; }
    }
    const int64_t align = size_ >= (int64_t(4) << 20) ? int64_t(2) << 20 : 4096;
    block_.bytes = (size_ + align) & ~(align - 1);
    block_.p = (char*)aligned_alloc((size_t)align, (size_t)block_.bytes);
    if (block_.p) advise_huge(block_.p, block_.bytes);
    return block_.p != nullptr;
  }
  template <class T> T* at(int64_t offset) const { return (T*)(block_.p + offset); }

 private:
  Block block_;
  int64_t size_ = 128;
};

inline void release_cache() {
  std::lock_guard<std::mutex> hold(cache_lock());
  for (int64_t i = 0; i < CACHE_SLOTS; i++) { free(cache()[i].p); cache()[i] = Block(); }
}

// Calls body(task, worker) for each task in [0, tasks). Workers are numbered from 0.
template <class Body> void run_tasks(const attlas_problem& p, int64_t tasks, int64_t workers, const Body& body) {
  if (tasks < workers) workers = tasks;
  if (workers <= 1 || !p.parallel_for) {
    for (int64_t t = 0; t < tasks; t++) body(t, int64_t(0));
    return;
  }
  struct Shared { const Body* body; int64_t tasks; std::atomic<int64_t> next; } shared{&body, tasks, {0}};
  p.parallel_for(0, workers, 1, [](int64_t begin, int64_t end, void* ctx) {
    Shared& s = *(Shared*)ctx;
    for (int64_t w = begin; w < end; w++)
      for (int64_t t; (t = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) (*s.body)(t, w);
  }, &shared);
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class I> INLINE I min2(I a, I b) { return a < b ? a : b; }
template <class I> INLINE I max2(I a, I b) { return a > b ? a : b; }

}  // namespace
}  // namespace attlas
