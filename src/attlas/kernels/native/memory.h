// memory.h: large blocks of memory, kept when they are given back.
//
// The system clears a page when it is first touched, which takes about as long as computing the
// weights that go there. So blocks are kept for the next call: small ones up to 256 MB, and those
// of 32 MB and more up to an eighth of the memory, but the system may take these whenever it needs
// them (MADV_FREE). Behind huge pages that costs nothing.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace attlas {

struct Block { char* p = nullptr; int64_t bytes = 0; };

class Pool {
 public:
  Block take(int64_t bytes);          // p is nullptr where there is no memory
  void give(Block block);             // from any thread
  int64_t release();                  // everything that is kept goes to the system; bytes
 private:
  std::mutex lock_;
  std::vector<Block> blocks_;         // in the order in which they came
};

Pool& pool();                         // the one of the library
void* new_bytes(int64_t bytes);       // a uint8 tensor in its memory, as a DLManagedTensor, or null

}  // namespace attlas
