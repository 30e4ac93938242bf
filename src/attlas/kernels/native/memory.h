// memory.h: large blocks of memory, kept when they are given back.
//
// The system clears a page when it is first touched, which takes about as long as computing the
// weights that go there. So blocks are kept for the next call: small ones up to 256 MB, and those
// of 32 MB and more up to an eighth of the memory, but the system may take these whenever it needs
// them (MADV_FREE). The memory is the machine's, or what a control group leaves of it; small ones
// take no more than an eighth of it, either. Behind huge pages that costs nothing. What is kept is
// left out of core dumps, and never makes a call fail: it goes to the system where memory runs out,
// and nothing is kept where addresses are counted (see limits.h), since there another allocation
// of the process could fail. A process may be forked at any time.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

namespace attlas {

struct Block {
  char* p = nullptr;
  int64_t bytes = 0;
  explicit operator bool() const { return p != nullptr; }
};

class Pool {
 public:
  Pool();
  Block take(int64_t bytes);          // p is nullptr where there is no memory
  void give(Block block);             // from any thread
  int64_t release();                  // everything that is kept goes to the system; bytes
 private:
  Block keep(Block block, int64_t most);   // what is to be freed first, or nothing: it is kept

  std::mutex lock_;
  std::vector<Block> blocks_;         // in the order in which they came
};

Pool& pool();                         // the one of the library
void* new_bytes(int64_t bytes);       // a uint8 tensor in its memory, as a DLManagedTensor, or null

}  // namespace attlas
