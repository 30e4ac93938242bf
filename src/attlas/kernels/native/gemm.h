// gemm.h: the one matrix product, C[m, n] = alpha sum_k A[m, k] B[k, n], or C += that with
// alpha = 1, in register tiles.
//
// A is read one element at a time and broadcast, with any strides (rs between rows, ks between
// steps), so it serves Q (rows of queries), P and its transpose without a copy. B is a panel:
// rows of NV vectors, `ldb` apart. MR x NV accumulators stay in registers. With pairs of bf16 for
// T, k counts pairs, sums are float, and the tile is the same.
//
// Numerics: every element of C is one chain of fused multiply-adds over k in ascending order (of a
// pair the second comes first), whatever the tile it falls in, then added to C: sums over many keys
// are sums of short chains. The result for a row does not depend on its neighbours.
#pragma once
#include "simd.h"

namespace attlas {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 6, NV = 4;   // 24 accumulators of 32 registers
#else
constexpr int MR = 6, NV = 2;   // 12 accumulators of 16 registers
#endif
template <class T> constexpr int64_t NR = NV * VL<T>;

template <class T> struct SumOf { typedef T type; };
template <> struct SumOf<bf16x2> { typedef float type; };
template <class T> using Sum = typename SumOf<T>::type;

template <class T, int M, int N>
INLINE void tile(int64_t K, const T* __restrict A, int64_t rs, int64_t ks, const T* __restrict B,
                 int64_t ldb, Sum<T>* __restrict C, int64_t ldc, bool accumulate, Sum<T> alpha) {
  Vec<Sum<T>> acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++)
      acc[i][j] = Vec<Sum<T>>{};
  for (int64_t k = 0; k < K; k++) {
    Vec<T> b[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) b[j] = load(B + k * ldb + j * VL<T>);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      Vec<T> a = splat<T>(A[i * rs + k * ks]);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++)
        if constexpr (std::is_same<T, bf16x2>::value) acc[i][j] = dot_bf16(acc[i][j], a, b[j]);
        else acc[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      Sum<T>* c = C + i * ldc + j * VL<T>;
      store(c, accumulate ? load(c) + acc[i][j] : acc[i][j] * alpha);
    }
}

#define ATTLAS_ARGS K, A, rs, ks, B, ldb, C, ldc, accumulate, alpha
template <class T, int N>
__attribute__((noinline)) void tile_rows(int m, int64_t K, const T* A, int64_t rs, int64_t ks,
                                         const T* B, int64_t ldb, Sum<T>* C, int64_t ldc, bool accumulate, Sum<T> alpha) {
  if constexpr (N == 1 && NV > 1)              // narrow: more rows, or latency would bound it
    switch (m) {
      case 12: return tile<T, 12, N>(ATTLAS_ARGS);
      case 11: return tile<T, 11, N>(ATTLAS_ARGS);
      case 10: return tile<T, 10, N>(ATTLAS_ARGS);
      case 9: return tile<T, 9, N>(ATTLAS_ARGS);
      case 8: return tile<T, 8, N>(ATTLAS_ARGS);
      case 7: return tile<T, 7, N>(ATTLAS_ARGS);
    }
  switch (m) {
    case 6: return tile<T, 6, N>(ATTLAS_ARGS);
    case 5: return tile<T, 5, N>(ATTLAS_ARGS);
    case 4: return tile<T, 4, N>(ATTLAS_ARGS);
    case 3: return tile<T, 3, N>(ATTLAS_ARGS);
    case 2: return tile<T, 2, N>(ATTLAS_ARGS);
    default: return tile<T, 1, N>(ATTLAS_ARGS);
  }
}
// m <= MR rows (2 MR where nv is 1), nv <= NV vectors.
template <class T>
INLINE void gemm_tile(int m, int nv, int64_t K, const T* A, int64_t rs, int64_t ks, const T* B,
                      int64_t ldb, Sum<T>* C, int64_t ldc, bool accumulate, Sum<T> alpha = 1) {
  switch (nv) {
#if defined(__AVX512F__) || defined(__aarch64__)
    case 4: return tile_rows<T, 4>(m, ATTLAS_ARGS);
    case 3: return tile_rows<T, 3>(m, ATTLAS_ARGS);
#endif
    case 2: return tile_rows<T, 2>(m, ATTLAS_ARGS);
    default: return tile_rows<T, 1>(m, ATTLAS_ARGS);
  }
}
#undef ATTLAS_ARGS

}  // namespace
}  // namespace attlas
