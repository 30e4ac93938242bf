// few.h: a few query rows against keys and values that are read once, where they lie.
//
//   P[i, j] = Q[i] . K[j]        O[i, :] += sum_j P[i, j] V[j, :]
//
// Decoding reads every key for G rows alone, so it is bound by memory: packing would cost as
// much as the products. Scores keep lanes along the head dimension, FEW x FEW products at a
// time, summed across lanes by a transposition. V is read unchecked; when a sum comes out
// not finite, the chunk is done again pair by pair, without the pairs of weight 0.
//
// Numerics: a score is summed in VL chains and a fixed tree; conversion happens on load.
#pragma once
#include "score.h"

namespace attlas {
namespace {

constexpr int64_t FEW_ROWS = 8;               // above this, packing pays
constexpr int FEW = 4;
constexpr int64_t AHEAD = 16384;               // bytes: the products hide memory's latency no further

INLINE void prefetch(const void* p) { __builtin_prefetch((const void*)((uintptr_t)p + AHEAD), 0, 3); }

// VL values at src + e, zeros beyond `cols`.
template <class T, class S> INLINE Vec<T> load_part(const S* src, int64_t e, int64_t cols) {
  if (e + VL<T> <= cols) return load_as(src + e);
  T buffer[VL<T>] = {};
  for (int64_t j = 0; e + j < cols; j++) buffer[j] = to_float(src[e + j]);
  return load(buffer);
}

// Scores of rows [0, n) (Q [n][lde], zero-padded) with keys [0, keys) into P.
template <class T, class S>
void score_few(int64_t n, int64_t keys, int64_t E, const T* Q, int64_t lde, const S* K, int64_t ld, T* P, int64_t ldp, T scale) {
  constexpr int N = FEW * FEW > VL<T> ? FEW * FEW : int(VL<T>);
  for (int64_t j = 0; j < keys; j += FEW) {
    const S* k[FEW];
    for (int x = 0; x < FEW; x++) k[x] = K + min2(j + x, keys - 1) * ld;
    for (int64_t i = 0; i < n; i += FEW) {
      const T* q[FEW];
      for (int x = 0; x < FEW; x++) q[x] = Q + min2(i + x, n - 1) * lde;
      Vec<T> acc[N] = {};
      int64_t e = 0;
      for (; e + VL<T> <= E; e += VL<T>) {
        Vec<T> b[FEW];
#pragma GCC unroll 4
        for (int x = 0; x < FEW; x++) { if (i == 0) prefetch(k[x] + e); b[x] = load_as(k[x] + e); }
#pragma GCC unroll 4
        for (int y = 0; y < FEW; y++) {
          const Vec<T> a = load(q[y] + e);
#pragma GCC unroll 4
          for (int x = 0; x < FEW; x++) acc[y * FEW + x] += a * b[x];
        }
      }
      if (e < E)
        for (int y = 0; y < FEW; y++)
          for (int x = 0; x < FEW; x++) acc[y * FEW + x] += load(q[y] + e) * load_part<T, S>(k[x], e, E);
      T sums[N];
#pragma GCC unroll 8
      for (int g = 0; g < N; g += int(VL<T>)) {
        transpose<T>(acc + g);
        for (int64_t w = VL<T> / 2; w > 0; w /= 2)
#pragma GCC unroll 8
          for (int64_t x = 0; x < w; x++) acc[g + x] += acc[g + x + w];
        store(sums + g, acc[g]);
      }
      for (int y = 0; y < FEW && i + y < n; y++)
        for (int x = 0; x < FEW && j + x < keys; x++) P[(i + y) * ldp + j + x] = sums[y * FEW + x] * scale;
    }
  }
}

template <class T, class S, int M, int N>
INLINE void few_tile(int64_t keys, const T* P, int64_t ldp, const S* V, int64_t ld, T* O, int64_t ldo, bool first) {
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) acc[i][v] = load(O + i * ldo + v * VL<T>);
  for (int64_t j = 0; j < keys; j++) {
    Vec<T> b[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) { if (first) prefetch(V + j * ld + v * VL<T>); b[v] = load_as(V + j * ld + v * VL<T>); }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) acc[i][v] += P[i * ldp + j] * b[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) store(O + i * ldo + v * VL<T>, acc[i][v]);
}

// sum[i, :] = sum_j P[i, j] V[j, :], exactly nothing where P is 0. sum is [n][ldo].
template <class T, class S>
void multiply_few(int64_t n, int64_t keys, int64_t Ev, const T* P, int64_t ldp, const S* V, int64_t ld, T* sum, int64_t ldo) {
  constexpr int64_t W = NV * VL<T>, BLOCK = 16;       // keys whose values stay in L1 for all rows
  memset(sum, 0, sizeof(T) * size_t(n * ldo));
  for (int64_t j = 0; j < keys; j += BLOCK) {
    const int64_t m = min2(BLOCK, keys - j);
    for (int64_t e = 0; e < Ev;) {
      const int64_t step = e + W <= Ev ? W : e + VL<T> <= Ev ? VL<T> : Ev - e;
      for (int64_t i = 0; i < n;) {
        const T* A = P + i * ldp + j;
        const S* B = V + j * ld + e;
        T* C = sum + i * ldo + e;
        const int64_t rows = n - i >= 4 && step == W ? 4 : 1;
        if (rows == 4) few_tile<T, S, 4, NV>(m, A, ldp, B, ld, C, ldo, i == 0);
        else if (step == W) few_tile<T, S, 1, NV>(m, A, ldp, B, ld, C, ldo, i == 0);
        else if (step == VL<T>) few_tile<T, S, 1, 1>(m, A, ldp, B, ld, C, ldo, i == 0);
        else for (int64_t x = 0; x < step; x++) for (int64_t y = 0; y < m; y++) C[x] += A[y] * T(to_float(B[y * ld + x]));
        i += rows;
      }
      e += step;
    }
  }
  T check = 0;
  for (int64_t i = 0; i < n; i++) for (int64_t e = 0; e < Ev; e++) check += sum[i * ldo + e] * T(0);
  if (__builtin_expect(check == T(0), 1)) return;
  memset(sum, 0, sizeof(T) * size_t(n * ldo));
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < keys; j++)
      if (P[i * ldp + j] != T(0))
        for (int64_t e = 0; e < Ev; e++) sum[i * ldo + e] += P[i * ldp + j] * T(to_float(V[j * ld + e]));
}

}  // namespace
}  // namespace attlas
