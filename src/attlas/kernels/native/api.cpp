// api.cpp: the exported functions of attlas.h.
#include "attlas.h"
#include "memory.h"

namespace attlas {
int forward(const attlas_problem&, const attlas_forward_out&);
int read(const attlas_problem&, const attlas_readout&);
int backward(const attlas_problem&, const attlas_backward_args&);
}  // namespace attlas

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int attlas_forward(const attlas_problem* p, const attlas_forward_out* o) { return attlas::forward(*p, *o); }
EXPORT int attlas_read(const attlas_problem* p, const attlas_readout* r) { return attlas::read(*p, *r); }
EXPORT int attlas_backward(const attlas_problem* p, const attlas_backward_args* a) { return attlas::backward(*p, *a); }
EXPORT int64_t attlas_release(void) { return attlas::pool().release(); }
EXPORT void* attlas_bytes(int64_t bytes) { return attlas::new_bytes(bytes); }
EXPORT const char* attlas_isa(void) {
#if defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "generic";
#endif
}
