// memory.cpp: the pool, and tensors in memory of the pool.
#include "memory.h"
#include <cstdlib>
#include <new>
#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace attlas {
namespace {

constexpr int64_t HUGE_PAGE = int64_t(2) << 20;
constexpr int64_t WORKSPACE = int64_t(256) << 20, LAZY = int64_t(32) << 20;

bool is_lazy(const Block& b) { return b.bytes >= LAZY; }

// Bytes of lazy blocks that are kept: none where the system cannot take them back.
int64_t most_lazy() {
#if defined(__linux__) && defined(MADV_FREE)
  static const int64_t most = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 8;
  return most;
#else
  return 0;
#endif
}

// A block whose pages the system may take; false where it does not know how.
bool make_reclaimable(const Block& b) {
#if defined(__linux__) && defined(MADV_FREE)
  return madvise(b.p, size_t(b.bytes), MADV_FREE) == 0;
#else
  (void)b;
  return false;
#endif
}

void advise_huge(const Block& b) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (b.bytes >= 2 * HUGE_PAGE && b.bytes <= most_lazy()) madvise(b.p, size_t(b.bytes), MADV_HUGEPAGE);
#else
  (void)b;
#endif
}

}  // namespace

Pool& pool() {
  static Pool& one = *new Pool;       // never destroyed: tensors may outlive everything else
  return one;
}

// Nobody else holds the lock when the process is forked, or the child would wait for it forever.
Pool::Pool() {
  const auto unlock = [] { pool().lock_.unlock(); };
  pthread_atfork([] { pool().lock_.lock(); }, unlock, unlock);
}

Block Pool::take(int64_t bytes) {
  const int64_t align = bytes >= HUGE_PAGE ? HUGE_PAGE : 4096;
  const int64_t size = (bytes + align - 1) / align * align;
#if !defined(__SANITIZE_ADDRESS__)    // which is to see the end of each block
  {
    std::lock_guard<std::mutex> hold(lock_);
    auto best = blocks_.end();
    for (auto b = blocks_.begin(); b != blocks_.end(); ++b)
      if (b->bytes >= size && b->bytes <= size + size / 4 + LAZY / 2 && (best == blocks_.end() || b->bytes < best->bytes))
        best = b;
    if (best != blocks_.end()) {
      const Block found = *best;
      blocks_.erase(best);
      return found;
    }
  }
#endif
  Block fresh{(char*)aligned_alloc(size_t(align), size_t(size)), size};
  if (!fresh.p && release() > 0) fresh.p = (char*)aligned_alloc(size_t(align), size_t(size));
  if (fresh.p) advise_huge(fresh);
  return fresh;
}

void Pool::give(Block block) {
  if (!block.p) return;
#if defined(__SANITIZE_ADDRESS__)
  free(block.p);
#else
  const bool lazy = is_lazy(block);
  const int64_t most = lazy ? most_lazy() : WORKSPACE;
  if (block.bytes > most || (lazy && !make_reclaimable(block))) { free(block.p); return; }
  std::lock_guard<std::mutex> hold(lock_);
  int64_t kept = block.bytes;
  for (const Block& b : blocks_) kept += is_lazy(b) == lazy ? b.bytes : 0;
  for (auto b = blocks_.begin(); kept > most;) {        // the oldest of the kind goes first
    if (is_lazy(*b) != lazy) { ++b; continue; }
    kept -= b->bytes;
    free(b->p);
    b = blocks_.erase(b);
  }
  try { blocks_.push_back(block); } catch (const std::bad_alloc&) { free(block.p); }
#endif
}

int64_t Pool::release() {
  std::lock_guard<std::mutex> hold(lock_);
  int64_t bytes = 0;
  for (const Block& b : blocks_) { bytes += b.bytes; free(b.p); }
  blocks_.clear();
  return bytes;
}

// --- a tensor of bytes, in the layout of DLPack (version 0, which every release reads) ---

namespace {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;     // 1: CPU
  int32_t ndim;
  uint8_t code, bits;                 // 1, 8: uint8
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct Bytes : DLManagedTensor {
  Block block;
  int64_t size, stride;
};

}  // namespace

void* new_bytes(int64_t bytes) {
  const Block block = pool().take(bytes);
  if (!block.p) return nullptr;
  Bytes* b = new (std::nothrow) Bytes{};
  if (!b) { pool().give(block); return nullptr; }
  b->block = block;
  b->size = bytes;
  b->stride = 1;
  b->tensor = {block.p, 1, 0, 1, 1, 8, 1, &b->size, &b->stride, 0};
  b->deleter = [](DLManagedTensor* self) {
    Bytes* mine = static_cast<Bytes*>(self);
    pool().give(mine->block);
    delete mine;
  };
  return static_cast<DLManagedTensor*>(b);
}

}  // namespace attlas
