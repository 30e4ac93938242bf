// few.h: a few query rows against keys and values that are read once, where they lie.
//
//   P[i, j] = Q[i] . K[j]        O[i, :] += sum_j P[i, j] V[j, :]
//
// Decoding reads every key for G rows alone, so it is bound by memory. Keys are transposed a panel
// at a time, which stays in L1, while the next ones are fetched. Values are multiplied where they
// lie and unchecked: a sum that comes out not finite has to be done again, from packed values.
//
// Numerics: scores and sums are those of gemm.h over the same steps, bit for bit, so it makes no
// difference to a row whether it is one of few or of many.
#pragma once
#include "score.h"

namespace attlas {
namespace {

constexpr int64_t FEW_ROWS = 8;               // above this, packing pays
constexpr int64_t FEW_KEYS = 64;              // below this, a packed chunk is as fast

// Products of rows [0, n) of Q [n][depth] with keys [0, keys) into P, in whole vectors. `panel` has
// room for NR keys.
template <class U, class S, class T = Sum<U>>
void score_few(int64_t n, int64_t keys, int64_t E, const U* Q, const S* K, int64_t ld, U* panel, T* P, int64_t ldp, T scale) {
  const int64_t D = depth<U>(E);
  for (int64_t j = 0; j < keys; j += NR<T>) {
    const int64_t count = min2(NR<T>, keys - j);
    pack_transposed<U, S, true>(K + j * ld, ld, count, E, panel);
    for (int64_t i = 0; i < n; i += MR)
      gemm_tile<U>(int(min2<int64_t>(MR, n - i)), int(ceil_div(count, VL<T>)), D, Q + i * D, D, 1, panel, NR<U>,
                   P + i * ldp + j, ldp, false, scale);
  }
}

// O += P V for M rows and N vectors of columns. Values `later` bytes after are fetched, unless it is 0.
template <class T, class S, int M, int N>
INLINE void few_tile(int64_t keys, const T* P, int64_t ldp, const S* V, int64_t ld, T* O, int64_t ldo, int64_t later) {
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) acc[i][v] = load(O + i * ldo + v * VL<T>);
  for (int64_t j = 0; j < keys; j++) {
    Vec<T> b[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) {
      const S* at = V + j * ld + v * VL<T>;
      if (v * VL<T> * int64_t(sizeof(S)) % LINE == 0 && later) prefetch(uintptr_t(at) + later);
      b[v] = load_as(at);
    }
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

// As few_tile, for one row and fewer columns than a vector has.
template <class T, class S>
void few_columns(int64_t keys, const T* P, const S* V, int64_t ld, int64_t cols, T* O) {
  Vec<T> acc = load(O);
  for (int64_t j = 0; j < keys; j++) {
    T b[VL<T>] = {};
    for (int64_t e = 0; e < cols; e++) b[e] = to_float(V[j * ld + e]);
    acc += P[j] * load(b);
  }
  store(O, acc);
}

// sum[i, :] = sum_j P[i, j] V[j, :] of at most STEP keys, whether V is finite or not. sum is [n][ldo].
template <class T, class S>
void multiply_few(int64_t n, int64_t keys, int64_t Ev, const T* P, int64_t ldp, const S* V, int64_t ld, T* sum, int64_t ldo) {
  constexpr int64_t W = NV * VL<T>, BLOCK = 16;       // keys whose values stay in L1 for all rows
  const int64_t later = ahead(Ev * int64_t(sizeof(S)), ld * int64_t(sizeof(S)));
  memset(sum, 0, sizeof(T) * size_t(n * ldo));
  for (int64_t j = 0; j < keys; j += BLOCK) {
    const int64_t m = min2(BLOCK, keys - j);
    for (int64_t e = 0; e < Ev;) {
      const int64_t step = e + W <= Ev ? W : VL<T>;
      for (int64_t i = 0; i < n;) {
        const T* A = P + i * ldp + j;
        const S* B = V + j * ld + e;
        T* C = sum + i * ldo + e;
        const int64_t rows = n - i >= 4 && step == W ? 4 : 1;
        if (rows == 4) few_tile<T, S, 4, NV>(m, A, ldp, B, ld, C, ldo, i == 0 ? later : 0);
        else if (step == W) few_tile<T, S, 1, NV>(m, A, ldp, B, ld, C, ldo, i == 0 ? later : 0);
        else if (e + VL<T> <= Ev) few_tile<T, S, 1, 1>(m, A, ldp, B, ld, C, ldo, i == 0 ? later : 0);
        else few_columns<T, S>(m, A, B, ld, Ev - e, C);
        i += rows;
      }
      e += step;
    }
  }
}

// Whether every one of `count` values is finite; count is a multiple of VL.
template <class T> bool finite(const T* p, int64_t count) {
  Vec<T> zero{}, check{};
  for (int64_t e = 0; e < count; e += VL<T>) check += load(p + e) * zero;
  return !any<T>(check != zero);
}

}  // namespace
}  // namespace attlas
