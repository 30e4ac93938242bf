// api.cpp: the exported functions of attlas.h.
#include "attlas.h"
#include "memory.h"

namespace attlas {
int forward(const attlas_problem&, const attlas_forward_out&);
int read(const attlas_problem&, const attlas_readout&);
int backward(const attlas_problem&, const attlas_backward_args&);
}  // namespace attlas

namespace {
// An exception must not reach a caller in C. (The only ones are of memory, and of locks.)
template <class R, class F> R guarded(R failed, const F& f) {
  try { return f(); } catch (...) { return failed; }
}
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int attlas_forward(const attlas_problem* p, const attlas_forward_out* o) {
  return guarded(1, [&] { return attlas::forward(*p, *o); });
}
EXPORT int attlas_read(const attlas_problem* p, const attlas_readout* r) {
  return guarded(1, [&] { return attlas::read(*p, *r); });
}
EXPORT int attlas_backward(const attlas_problem* p, const attlas_backward_args* a) {
  return guarded(1, [&] { return attlas::backward(*p, *a); });
}
EXPORT int64_t attlas_release(void) {
  return guarded(int64_t(0), [] { return attlas::pool().release(); });
}
EXPORT void* attlas_bytes(int64_t bytes) {
  return guarded((void*)nullptr, [&] { return attlas::new_bytes(bytes); });
}
EXPORT void attlas_abi(int64_t* to) {
  to[0] = ATTLAS_ABI;
  to[1] = sizeof(attlas_problem);
  to[2] = sizeof(attlas_forward_out);
  to[3] = sizeof(attlas_readout);
  to[4] = sizeof(attlas_backward_args);
}
#if !defined(__AVX512BF16__) && defined(ATTLAS_EMULATE_BF16)
#define BF16 " and bf16 emulated"
#else
#define BF16
#endif
EXPORT const char* attlas_isa(void) {
#if defined(__AVX512BF16__)
  return "avx512bf16";
#elif defined(__AVX512F__)
  return "avx512" BF16;
#elif defined(__AVX2__)
  return "avx2" BF16;
#else
  return "generic" BF16;
#endif
}
