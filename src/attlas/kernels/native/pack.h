// pack.h: copies of keys, values and queries in the order in which the products read them.
//
//   transposed panels (K for Q K^T): panel p holds rows [p NR, p NR + NR) as [E][NR]
//   row panels (V for P V):          panel p holds columns [p NR, ...) as [rows][width]
//
// Packing converts the storage type (fp32, fp64, bf16, fp16) to the compute type once, pads
// with zeros, and costs O(rows * columns), against O(L * rows * columns) for the product.
// Where one instruction multiplies and adds pairs of bf16, both factors of a score (of Q K^T and
// dO V^T: both exact in bf16, as weights are not) stay pairs: [E / 2][NR] of them.
//
// A row that holds inf or NaN is written as zeros into row panels and noted in `bad`, since
// 0 * NaN would carry it into rows that must not see it; add_bad_rows then adds exactly the
// products whose weight is not zero. Transposed panels keep such values: scores of masked
// pairs are overwritten, not multiplied.
#pragma once
#include "gemm.h"
#include "runtime.h"

namespace attlas {
namespace {

constexpr int64_t PACKED_BYTES = int64_t(1) << 20;   // packed keys and values of a wave of heads

// What scores are multiplied from, of the size of T: `depth` factors for a row of E values, the
// last of them padded.
template <class T, class S> struct FactorOf { typedef T type; };
#if defined(__AVX512BF16__) || defined(ATTLAS_EMULATE_BF16)
template <> struct FactorOf<float, bf16> { typedef bf16x2 type; };
#endif
template <class T, class S> using Factor = typename FactorOf<T, S>::type;
template <class U> constexpr int64_t VALUES = std::is_same<U, bf16x2>::value ? 2 : 1;
template <class U> INLINE int64_t depth(int64_t E) { return ceil_div(E, VALUES<U>); }

// Factor e of a row of E values, and VL of them from there.
template <class U, class S> INLINE U factor(const S* row, int64_t e, int64_t E) {
  if constexpr (VALUES<U> == 2) return {row[2 * e], 2 * e + 1 < E ? row[2 * e + 1] : S{0}};
  else return U(to_float(row[e]));
}
template <class U, class S> INLINE Vec<U> factors(const S* row, int64_t e) {
  if constexpr (VALUES<U> == 2) return load((const U*)row + e);
  else return load_as(row + e);
}
// All of a row.
template <class U, class S> INLINE void load_factors(const S* row, int64_t E, U* to) {
  int64_t e = 0;
  for (; (e + VL<U>) * VALUES<U> <= E; e += VL<U>) store(to + e, factors<U>(row, e));
  for (; e < depth<U>(E); e++) to[e] = factor<U>(row, e, E);
}

// Transposes VL vectors in place: log2(VL) rounds of interleaving v[i] with v[i + VL/2].
template <class T, int... I>
INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T>& lo, Vec<T>& hi, std::integer_sequence<int, I...>) {
  constexpr int n = VL<T>;
#if defined(__clang__)
  lo = __builtin_shufflevector(a, b, (I % 2 ? n + I / 2 : I / 2)...);
  hi = __builtin_shufflevector(a, b, (I % 2 ? n + n / 2 + I / 2 : n / 2 + I / 2)...);
#else                                         // GCC has that from version 12 alone
  lo = __builtin_shuffle(a, b, Mask<T>{(I % 2 ? n + I / 2 : I / 2)...});
  hi = __builtin_shuffle(a, b, Mask<T>{(I % 2 ? n + n / 2 + I / 2 : n / 2 + I / 2)...});
#endif
}
template <class T> INLINE void transpose(Vec<T>* v) {
  constexpr int n = VL<T>;
  Vec<T> w[n];
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++)
      interleave<T>(v[i], v[i + n / 2], w[2 * i], w[2 * i + 1], std::make_integer_sequence<int, n>());
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) v[i] = w[i];
  }
}

// Rows that are read once are fetched from memory into L2 this many bytes before they are needed, in
// the order in which they lie.
constexpr int64_t AHEAD = 16384;
constexpr int64_t LINE = 64;

INLINE void prefetch(uintptr_t p) { __builtin_prefetch((const void*)p, 0, 2); }
// How many rows of that many bytes are that far ahead, times the bytes between rows.
INLINE int64_t ahead(int64_t row, int64_t step) { return max2<int64_t>(1, AHEAD / max2<int64_t>(1, row)) * step; }

// src [rows][E] (row stride ld) -> dst [ceil(rows/NR)][depth][NR]. With FETCH, later rows are fetched
// meanwhile. bf16 stays in pairs until it is stored.
template <class U, class S, bool FETCH = false>
void pack_transposed(const S* src, int64_t ld, int64_t rows, int64_t E, U* dst) {
  using X = std::conditional_t<std::is_same<S, bf16>::value, bf16x2, U>;
  constexpr int64_t n = VL<X>;
  const int64_t D = depth<U>(E), steps = depth<X>(E);
  const int64_t row = E * int64_t(sizeof(S)), later = ahead(row, ld * int64_t(sizeof(S)));
  for (int64_t r = 0; r < rows; r += n) {   // the last panel: whole vectors only
    U* panel = dst + (r / NR<U>) * (D * NR<U>) + r % NR<U>;
    const int64_t have = max2<int64_t>(0, min2(n, rows - r));
    for (int64_t e = 0; e < steps; e += n) {
      const int64_t width = min2(n, steps - e);
      Vec<X> v[n];
      auto put = [&](int64_t i) __attribute__((always_inline)) {
        U* to = panel + (e + i) * VALUES<X> / VALUES<U> * NR<U>;
        if constexpr (std::is_same<X, U>::value) store(to, v[i]);
        else {
          store(to, (Vec<U>)(v[i] << 16));
          if (2 * (e + i) + 1 < E) store(to + NR<U>, (Vec<U>)(v[i] & 0xffff0000u));
        }
      };
      if (have == n && (e + n) * VALUES<X> <= E) {
        if (FETCH)                            // a share of the rows at each step
          for (int64_t i = e * n / steps; i < min2(n, (e + n) * n / steps); i++)
            for (int64_t x = 0; x < row; x += LINE) prefetch(uintptr_t(src + (r + i) * ld) + later + x);
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) v[i] = factors<X>(src + (r + i) * ld, e);
      } else {
        X buffer[n * n] = {};
        for (int64_t i = 0; i < have; i++)
          for (int64_t j = 0; j < width; j++) buffer[i * n + j] = factor<X>(src + (r + i) * ld, e + j, E);
        for (int64_t i = 0; i < n; i++) v[i] = load(buffer + i * n);
      }
      transpose<X>(v);
      if (width == n) {
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) put(i);
      } else {
        for (int64_t i = 0; i < width; i++) put(i);
      }
    }
  }
}

// Row panels for `rows` rows of `cols` columns, `cap` rows long each: panel p begins at
// p * NR * cap, its rows are width(p) apart.
template <class T> INLINE int64_t panel_width(int64_t cols, int64_t p) {
  return min2(NR<T>, round_up(cols - p * NR<T>, VL<T>));
}
template <class T> INLINE int64_t panel_floats(int64_t cols, int64_t cap) {
  return round_up(cols, VL<T>) * cap;
}

// One row of `cols` values times `scale` into panels (row stays finite or becomes zeros).
// Returns whether every value is finite.
template <class T, class S>
INLINE bool pack_row(const S* src, int64_t cols, T* dst, int64_t cap, int64_t row, T scale) {
  Vec<T> zero{}, check{};
  for (int64_t c = 0; c < cols; c += VL<T>) {
    const int64_t p = c / NR<T>;
    T* to = dst + p * NR<T> * cap + row * panel_width<T>(cols, p) + c % NR<T>;
    Vec<T> v;
    if (c + VL<T> <= cols) v = load_as(src + c);
    else {
      T buffer[VL<T>] = {};
      for (int64_t j = 0; c + j < cols; j++) buffer[j] = to_float(src[c + j]);
      v = load(buffer);
    }
    v = v * scale;
    check += v * zero;   // 0 where finite, NaN where not
    store(to, v);
  }
  return !any<T>(check != zero);
}
template <class T> INLINE void zero_row(int64_t cols, T* dst, int64_t cap, int64_t row) {
  for (int64_t c = 0; c < cols; c += VL<T>) {
    const int64_t p = c / NR<T>;
    store(dst + p * NR<T> * cap + row * panel_width<T>(cols, p) + c % NR<T>, Vec<T>{});
  }
}

// src [rows][cols] -> row panels from row `at`. bad[row] = 1 where a row is not finite (written
// as zeros). Returns whether there is any.
template <class T, class S>
bool pack_rows(const S* src, int64_t ld, int64_t rows, int64_t cols, T* dst, int64_t cap, int64_t at,
               uint8_t* bad, T scale = T(1)) {
  bool found = false;
  for (int64_t r = 0; r < rows; r++) {
    const bool fine = pack_row<T, S>(src + r * ld, cols, dst, cap, at + r, scale);
    if (!fine) { zero_row<T>(cols, dst, cap, at + r); found = true; }
    bad[at + r] = !fine;
  }
  return found;
}
// Whether every value is finite; cols is a multiple of VL.
template <class T> bool all_finite(const T* src, int64_t ld, int64_t rows, int64_t cols) {
  Vec<T> zero{}, check[4] = {};               // four chains, to hide the latency of one
  for (int64_t c = 0; c < cols; c += VL<T>)
    for (int64_t r = 0; r < rows; r += 4)
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; i++) check[i] += load(src + min2(r + i, rows - 1) * ld + c) * zero;
  return !any<T>((check[0] + check[1]) + (check[2] + check[3]) != zero);
}

// C[m, :] += sum_k A[m, k] * src[k, :] over the k that are `bad` and have A[m, k] != 0.
// C is row major here (ldc). The slow, exact path; k runs in ascending order.
template <class T, class S>
__attribute__((noinline)) void add_bad_rows(int64_t M, int64_t K, const T* A, int64_t rs, int64_t ks,
                                            const uint8_t* bad, const S* src, int64_t ld, int64_t cols,
                                            T scale, T* C, int64_t ldc) {
  for (int64_t k = 0; k < K; k++) {
    if (!bad[k]) continue;
    for (int64_t m = 0; m < M; m++) {
      const T a = A[m * rs + k * ks];
      if (a == T(0)) continue;
      for (int64_t c = 0; c < cols; c++) C[m * ldc + c] += a * (T(to_float(src[k * ld + c])) * scale);
    }
  }
}

}  // namespace
}  // namespace attlas
