// memory.cpp: the pool, and tensors in memory of the pool.
#include "memory.h"
#include <cstdlib>
#include <new>
#include <pthread.h>
#include "limits.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace attlas {
namespace {

constexpr int64_t HUGE_PAGE = int64_t(2) << 20;
constexpr int64_t WORKSPACE = int64_t(256) << 20, LAZY = int64_t(32) << 20;

bool is_lazy(const Block& b) { return b.bytes >= LAZY; }

// Bytes of lazy blocks that are kept: none where the system cannot take them back.
int64_t most_lazy() {
#if defined(__linux__) && defined(MADV_FREE)
  return memory_limit() / 8;
#else
  return 0;
#endif
}

int64_t most_kept(bool lazy) {
  return lazy ? most_lazy() : WORKSPACE < memory_limit() / 8 ? WORKSPACE : memory_limit() / 8;
}

// What is kept is nobody's, and has no place in a core dump. (Of small blocks it is not worth a call.)
void dump(const Block& b, bool wanted) {
#if defined(__linux__) && defined(MADV_DONTDUMP)
  if (b.bytes >= HUGE_PAGE) madvise(b.p, size_t(b.bytes), wanted ? MADV_DODUMP : MADV_DONTDUMP);
#else
  (void)b; (void)wanted;
#endif
}

// Of a block that was kept.
void free_kept(const Block& b) {
  dump(b, true);                      // malloc may keep the addresses
  free(b.p);
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
  alignas(Pool) static char place[sizeof(Pool)];
  static Pool& one = *new (place) Pool;   // never destroyed: tensors may outlive everything else
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
  Block found;
  {
    std::lock_guard<std::mutex> hold(lock_);
    auto best = blocks_.end();
    for (auto b = blocks_.begin(); b != blocks_.end(); ++b)
      if (b->bytes >= size && b->bytes <= size + size / 4 + LAZY / 2 && (best == blocks_.end() || b->bytes < best->bytes))
        best = b;
    if (best != blocks_.end()) {
      found = *best;
      blocks_.erase(best);
    }
  }
  if (found) {
    dump(found, true);
    return found;
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
  if (counts_addresses()) {           // then nothing is kept
    free(block.p);
    release();
    return;
  }
  const bool lazy = is_lazy(block);
  const int64_t most = most_kept(lazy);
  if (block.bytes > most || (lazy && !make_reclaimable(block))) { free(block.p); return; }
  dump(block, false);
  while (const Block over = keep(block, most)) {
    free_kept(over);                  // outside of the lock, since that of gigabytes takes long
    if (over.p == block.p) break;
  }
#endif
}

Block Pool::keep(Block block, int64_t most) {
  std::lock_guard<std::mutex> hold(lock_);
  const bool lazy = is_lazy(block);
  int64_t kept = block.bytes;
  auto oldest = blocks_.end();
  for (auto b = blocks_.begin(); b != blocks_.end(); ++b) {
    if (is_lazy(*b) != lazy) continue;
    kept += b->bytes;
    if (oldest == blocks_.end()) oldest = b;
  }
  if (kept > most) {
    const Block over = *oldest;
    blocks_.erase(oldest);
    return over;
  }
  try { blocks_.push_back(block); } catch (const std::bad_alloc&) { return block; }
  return {};
}

int64_t Pool::release() {
  std::vector<Block> blocks;
  {
    std::lock_guard<std::mutex> hold(lock_);
    blocks.swap(blocks_);
  }
  int64_t bytes = 0;
  for (const Block& b : blocks) { bytes += b.bytes; free_kept(b); }
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
