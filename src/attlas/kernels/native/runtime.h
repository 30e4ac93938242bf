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
#define POISON(p, bytes) __asan_poison_memory_region(p, size_t(bytes))
#define UNPOISON(p, bytes) __asan_unpoison_memory_region(p, size_t(bytes))
#else
#define POISON(p, bytes)
#define UNPOISON(p, bytes)
#endif

namespace attlas {
namespace {

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class I> INLINE I min2(I a, I b) { return a < b ? a : b; }
template <class I> INLINE I max2(I a, I b) { return a > b ? a : b; }

// Lays arrays one after the other into a block of memory; without one, it counts their bytes.
class Arena {
 public:
  explicit Arena(char* block = nullptr) : block_(block) {}
  template <class X> X* take(int64_t count) {
    const int64_t begin = bytes_, end = begin + count * int64_t(sizeof(X));
    bytes_ = round_up(end + RED_ZONE, 128);
    if (!block_) return nullptr;
    POISON(block_ + end, bytes_ - end);
    return (X*)(block_ + begin);
  }
  int64_t bytes() const { return bytes_; }

 private:
#if defined(__SANITIZE_ADDRESS__)             // after each array, so that overruns are seen
  static constexpr int64_t RED_ZONE = 128;
#else
  static constexpr int64_t RED_ZONE = 0;
#endif
  char* block_;
  int64_t bytes_ = 0;
};

// The memory of one call.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (!block_.p) return;
    UNPOISON(block_.p, block_.bytes);
    pool().give(block_);
  }
  // Has lay(arena) take its arrays twice: to count them, and to have them. False without memory.
  template <class Lay> bool get(const Lay& lay) {
    Arena counted;
    lay(counted);
    block_ = pool().take(max2<int64_t>(1, counted.bytes()));
    if (!block_.p) return false;
    Arena arena(block_.p);
    lay(arena);
    return true;
  }

 private:
  Block block_;
};

// The arrays of each worker, Scratch(arena, of), for as many as there are.
template <class Scratch, class Of> class Workers {
 public:
  Workers(const Of& of, int64_t count) : of_(of), count_(count) {
    Arena one;
    Scratch(one, of);
    bytes_ = one.bytes();
  }
  void lay(Arena& arena) { first_ = arena.take<char>(bytes_ * count_); }
  Scratch operator[](int64_t worker) const {
    Arena mine(first_ + worker * bytes_);
    return Scratch(mine, of_);
  }
  int64_t count() const { return count_; }

 private:
  const Of& of_;
  int64_t count_, bytes_;
  char* first_ = nullptr;
};

// Calls body(task, worker) for each task in [0, tasks). Workers are numbered from 0. What parallel_for
// returns, an error, can be left aside: no body throws, and what no thread took is done at the end.
template <class Body> void run_tasks(const attlas_problem& p, int64_t tasks, int64_t workers, const Body& body) {
  struct Shared {
    const Body& body;
    int64_t tasks;
    std::atomic<int64_t> next;
    void work(int64_t worker) {
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(t, worker);
    }
  } shared{body, tasks, {0}};
  workers = min2(workers, tasks);
  if (workers > 1 && p.parallel_for)
    p.parallel_for(0, workers, 1, [](int64_t begin, int64_t end, void* ctx) {
      for (int64_t w = begin; w < end; w++) ((Shared*)ctx)->work(w);
    }, &shared);
  shared.work(0);                             // all of them, or what is left where no thread could be had
}

}  // namespace
}  // namespace attlas
