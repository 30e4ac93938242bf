// score.h: scores of a block of query rows against a chunk of keys, masked.
//
//   scores[r, j] = softcap(scale * query[r] . key[j]) + bias[r, j]   where allowed, else -inf
//
// A Rows owns up to MAX_ROWS query rows of one key/value head (they may be of several query
// heads of its group), their keys [lo, hi) and, for each tile of MR rows, the union of those.
// Tiles and chunks outside of every interval are not computed: causal costs half. A dense mask
// narrows the intervals to the first and last key that it allows, and its holes are skipped too.
//
// Buffers hold a row per query row and a column per key, from the first key of the chunk,
// which is a multiple of NR. In a row, [a, b) are the columns that were computed: the union of
// its tile, widened to whole panels before and whole vectors after. Outside of it the buffer is undefined and the weight is 0.
#pragma once
#include <cmath>
#include "pack.h"

namespace attlas {
namespace {

constexpr int64_t MAX_ROWS = 192;             // a multiple of MR
constexpr int64_t MAX_TILES = MAX_ROWS / MR;
constexpr int64_t CHUNK = 512;                // keys scored at a time; fixed, so results are too
constexpr int64_t STEP = 128;                 // keys in one go of P V; V's panel stays in L1
constexpr int64_t HOLE = 64;                  // keys of a tile that are skipped when a dense mask allows none
template <class T> constexpr T INF = T(INFINITY);

struct Span { int64_t a, b; };                // columns [a, b)

inline bool any_of_8(const uint8_t* p) {
  uint64_t word;
  memcpy(&word, p, 8);
  return word != 0;
}

template <class T> struct Rows {
  int64_t n, tiles, b, lo_all, hi_all;
  int64_t h[MAX_ROWS], l[MAX_ROWS], lo[MAX_ROWS], hi[MAX_ROWS];
  int64_t tile_lo[MAX_TILES], tile_hi[MAX_TILES];
  uint8_t holes[MAX_TILES];                   // of the chunk that was looked at, a bit for HOLE keys

  // Rows r0 .. r0+count of the G * L rows of key/value head hkv, seeing keys [key0, key1).
  void set(const attlas_problem& p, int64_t batch, int64_t hkv, int64_t r0, int64_t count, int64_t key0, int64_t key1) {
    const int64_t G = p.Hq / p.Hkv;
    n = count; b = batch; tiles = ceil_div(n, MR); lo_all = key1; hi_all = key0;
    for (int64_t i = 0, g = r0 / p.L, row = r0 % p.L; i < n; i++) {
      h[i] = hkv * G + g;
      l[i] = row;
      if (++row == p.L) { row = 0; g++; }
      lo[i] = key0; hi[i] = key1;
      if (p.start) lo[i] = max2(lo[i], p.start[b * p.start_s[0] + h[i] * p.start_s[1] + l[i] * p.start_s[2]]);
      if (p.stop) hi[i] = min2(hi[i], p.stop[b * p.stop_s[0] + h[i] * p.stop_s[1] + l[i] * p.stop_s[2]]);
      narrow(p, i);
      if (lo[i] >= hi[i]) lo[i] = hi[i] = key0;
    }
    memset(holes, 0, sizeof holes);
    for (int64_t t = 0; t < tiles; t++) {
      int64_t a = key1, z = key0;
      for (int64_t i = t * MR; i < min2(n, t * MR + MR); i++)
        if (lo[i] < hi[i]) { a = min2(a, lo[i]); z = max2(z, hi[i]); }
      tile_lo[t] = a < z ? a : key0;
      tile_hi[t] = a < z ? z : key0;
      if (a < z) { lo_all = min2(lo_all, a); hi_all = max2(hi_all, z); }
    }
    if (lo_all >= hi_all) lo_all = hi_all = key0;
  }
  // Keys at both ends that the mask, or a bias of -inf, leaves out.
  void narrow(const attlas_problem& p, int64_t i) {
    int64_t &a = lo[i], &z = hi[i];
    if (p.mask) {
      const uint8_t* mask = mask_row(p, i);
      const int64_t step = p.mask_s[3];
      if (step == 1) {
        while (a + 8 <= z && !any_of_8(mask + a)) a += 8;
        while (a + 8 <= z && !any_of_8(mask + z - 8)) z -= 8;
      }
      while (a < z && !mask[a * step]) a++;
      while (a < z && !mask[(z - 1) * step]) z--;
    }
    if (p.bias) {
      const T* bias = bias_row(p, i);
      const int64_t step = p.bias_s[3];
      while (a < z && bias[a * step] == -INF<T>) a++;
      while (a < z && bias[(z - 1) * step] == -INF<T>) z--;
    }
  }
  // Looks for holes in the chunk from key c0.
  void look(const attlas_problem& p, int64_t c0) {
    if (!p.mask || p.mask_s[3] != 1) return;
    for (int64_t t = 0; t < tiles; t++) {
      holes[t] = 0;
      const int64_t a = max2(tile_lo[t], c0), z = min2(tile_hi[t], c0 + CHUNK);
      for (int64_t k = (a - c0) / HOLE * HOLE + c0; k < z; k += HOLE) {
        const int64_t from = max2(k, a), to = min2(k + HOLE, z);
        bool seen = false;
        for (int64_t i = t * MR; i < t * MR + tile_rows(t) && !seen; i++) {
          const uint8_t* mask = mask_row(p, i);
          int64_t j = from;
          for (; j + 8 <= to && !seen; j += 8) seen = any_of_8(mask + j);
          for (; j < to && !seen; j++) seen = mask[j];
        }
        if (!seen) holes[t] |= uint8_t(1 << (k - c0) / HOLE);
      }
    }
  }
  // Whether the keys from column `from` of the chunk to the end of its HOLE are one.
  bool hole(int64_t t, int64_t from) const { return holes[t] >> (from / HOLE) & 1; }
  // [x, y), within STEP columns, without the holes at its ends.
  Span without_holes(int64_t t, int64_t x, int64_t y) const {
    while (x < y && hole(t, x)) x = min2(y, x / HOLE * HOLE + HOLE);
    while (x < y && hole(t, y - 1)) y = max2(x, (y - 1) / HOLE * HOLE);
    return {x, y};
  }
  const uint8_t* mask_row(const attlas_problem& p, int64_t i) const {
    return p.mask + b * p.mask_s[0] + h[i] * p.mask_s[1] + l[i] * p.mask_s[2];
  }
  const T* bias_row(const attlas_problem& p, int64_t i) const {
    return (const T*)p.bias + b * p.bias_s[0] + h[i] * p.bias_s[1] + l[i] * p.bias_s[2];
  }
  int64_t tile_rows(int64_t t) const { return min2<int64_t>(MR, n - t * MR); }
  // The columns of chunk [c0, c0 + CHUNK) that tile t computes.
  Span span(int64_t t, int64_t c0) const {
    const int64_t a = max2(tile_lo[t], c0), b_ = min2(tile_hi[t], c0 + CHUNK);
    if (a >= b_) return {0, 0};
    return {(a - c0) / NR<T> * NR<T>, round_up(b_ - c0, VL<T>)};
  }
  template <class S> const S* query(const attlas_problem& p, int64_t i) const {
    return (const S*)p.q + b * p.q_s[0] + h[i] * p.q_s[1] + l[i] * p.q_s[2];
  }
  int64_t flat(const attlas_problem& p, int64_t i) const { return (b * p.Hq + h[i]) * p.L + l[i]; }
};

// May row i attend key j? (The slow question; the answer of -inf biases included.)
template <class T> bool allowed(const attlas_problem& p, const Rows<T>& rows, int64_t i, int64_t j) {
  if (j < rows.lo[i] || j >= rows.hi[i]) return false;
  if (p.mask && !rows.mask_row(p, i)[j * p.mask_s[3]]) return false;
  return !p.bias || rows.bias_row(p, i)[j * p.bias_s[3]] != -INF<T>;
}

// Queries of the block as [n][depth].
template <class U, class S> void load_queries(const attlas_problem& p, const Rows<Sum<U>>& rows, U* Q) {
  for (int64_t i = 0; i < rows.n; i++) load_factors<U>(rows.template query<S>(p, i), p.E, Q + i * depth<U>(p.E));
}

// Products of the block (rows of Q are ldq apart), scaled after the sum as plain PyTorch does (so
// that roundings agree), with the panels of chunk c0 (K points at the panel of key c0).
template <class U, class T = Sum<U>>
void score_chunk(const Rows<T>& rows, int64_t D, const U* Q, int64_t ldq, const U* K, int64_t c0, T* P, int64_t ldp, T scale) {
  const int64_t first = (max2(rows.lo_all, c0) - c0) / NR<T>;
  const int64_t last = ceil_div(min2(rows.hi_all, c0 + CHUNK) - c0, NR<T>);
  for (int64_t j = first; j < last; j++)
    for (int64_t t = 0; t < rows.tiles; t++) {
      const int64_t key = c0 + j * NR<T>;
      if (key >= rows.tile_hi[t] || key + NR<T> <= rows.tile_lo[t] || rows.hole(t, key - c0)) continue;
      const int64_t vectors = min2<int64_t>(NV, ceil_div(min2(rows.tile_hi[t], c0 + CHUNK) - key, VL<T>));
      const int64_t from = t * MR;
      if (vectors == 1 && t + 1 < rows.tiles && rows.tile_lo[t] == rows.tile_lo[t + 1] && rows.tile_hi[t] == rows.tile_hi[t + 1]) t++;
      gemm_tile<U>(int(min2(rows.n, (t + 1) * MR) - from), int(vectors), D, Q + from * ldq, ldq, 1, K + j * D * NR<U>, NR<U>,
                   P + from * ldp + j * NR<T>, ldp, false, scale);
    }
}

// tanh to a few ulp: (1 - e) / (1 + e) with e = exp(-2|x|); near 0, where that quotient
// loses digits, the Taylor series.
template <class T> INLINE Vec<T> vtanh(Vec<T> x) {
  constexpr double c[] = {1.0, -1.0 / 3, 2.0 / 15, -17.0 / 315, 62.0 / 2835, -1382.0 / 155925,
                          21844.0 / 6081075, -929569.0 / 638512875};
  const T near = sizeof(T) == 4 ? T(0.5) : T(0.12);
  const Vec<T> x2 = x * x, ax = x < T(0) ? -x : x, e = vexp<T>(ax * T(-2));
  Vec<T> s = splat<T>(T(c[7]));
#pragma GCC unroll 8
  for (int i = 6; i >= 0; i--) s = s * x2 + T(c[i]);
  const Vec<T> big = (T(1) - e) / (T(1) + e);
  return ax < near ? x * s : (x < T(0) ? -big : big);
}

// Makes scores of the raw products of row i in columns [span.a, span.b) of chunk c0, in place.
// Where `tanh_of` is given, it receives tanh(product / softcap), for the backward.
template <class T>
void finish_scores(const attlas_problem& p, const Rows<T>& rows, int64_t i, int64_t c0, Span span, T* P, T* tanh_of = nullptr) {
  const int64_t n = VL<T>;
  const int64_t lo = max2(span.a, min2(span.b, rows.lo[i] - c0)), hi = max2(lo, min2(span.b, rows.hi[i] - c0));
  if (p.softcap != 0) {
    const T cap = T(p.softcap), inverse = T(1 / p.softcap);
    for (int64_t j = span.a; j < span.b; j += n) {
      const Vec<T> t = vtanh<T>(load(P + j) * inverse);
      if (tanh_of) store(tanh_of + j, t);
      store(P + j, t * cap);
    }
  }
  if (p.bias) {
    const int64_t step = p.bias_s[3];
    const T* bias = rows.bias_row(p, i) + c0 * step;
    if (step == 1) {
      int64_t j = lo;
      for (; j + n <= hi; j += n) {  // -inf is a mask: it wins over a NaN score
        const Vec<T> v = load(bias + j);
        store(P + j, v == -INF<T> ? v : load(P + j) + v);
      }
      for (; j < hi; j++) P[j] = bias[j] == -INF<T> ? -INF<T> : P[j] + bias[j];
    } else {
      for (int64_t j = lo; j < hi; j++) P[j] = bias[j * step] == -INF<T> ? -INF<T> : P[j] + bias[j * step];
    }
  }
  if (p.mask) {
    const int64_t step = p.mask_s[3];
    const uint8_t* mask = rows.mask_row(p, i) + c0 * step;
    int64_t j = lo;
    if (step == 1) {
      typedef uint8_t Bytes __attribute__((vector_size(VL<T>), aligned(1), may_alias));
      for (; j + n <= hi; j += n) {
        const Mask<T> keep = __builtin_convertvector(*(const Bytes*)(mask + j), Mask<T>) != 0;
        store(P + j, keep ? load(P + j) : splat<T>(-INF<T>));
      }
    }
    for (; j < hi; j++) if (!mask[j * step]) P[j] = -INF<T>;
  }
  for (int64_t j = span.a; j < lo; j++) P[j] = -INF<T>;
  for (int64_t j = hi; j < span.b; j++) P[j] = -INF<T>;
}

// One value per row from one vector per row: the maximum, or the sum, over lanes.
template <class T> INLINE Vec<T> max_across(Vec<T>* v) {
  transpose<T>(v);
  for (int64_t w = VL<T> / 2; w > 0; w /= 2)
    for (int64_t i = 0; i < w; i++) v[i] = vmax(v[i], v[i + w]);
  return v[0];
}
template <class T> INLINE Vec<T> sum_across(Vec<T>* v) {
  transpose<T>(v);
  for (int64_t w = VL<T> / 2; w > 0; w /= 2)
    for (int64_t i = 0; i < w; i++) v[i] += v[i + w];
  return v[0];
}

// Lane-wise max over P[a, b); NaN is passed over.
template <class T> INLINE Vec<T> row_max(const T* P, Span s) {
  Vec<T> m[NV];
  for (int v = 0; v < NV; v++) m[v] = splat<T>(-INF<T>);
  int64_t j = s.a;
  for (; j + NR<T> <= s.b; j += NR<T>)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) m[v] = vmax(load(P + j + v * VL<T>), m[v]);
  for (; j < s.b; j += VL<T>) m[0] = vmax(load(P + j), m[0]);
  for (int v = 1; v < NV; v++) m[0] = vmax(m[v], m[0]);
  return m[0];
}

// First column of [a, b) that holds `value`; a when none does (NaN).
template <class T> int64_t find_first(const T* P, Span s, T value) {
  for (int64_t j = s.a; j < s.b; j += VL<T>)
    if (any<T>(load(P + j) == value))
      for (int64_t i = j; i < s.b; i++) if (P[i] == value) return i;
  return s.a;
}

// P[j] = exp(P[j] - shift) over the span; returns lane sums, in an order that depends on the
// position of keys alone. With TILT also *tilt = lane sums of P (score - shift).
template <class T, bool TILT> INLINE Vec<T> exp_row(T* P, Span s, T shift, Vec<T>* tilt) {
  Vec<T> sum[NV] = {}, tilted[NV] = {};
  auto take = [&](int64_t j, int v) __attribute__((always_inline)) {
    const Vec<T> x = load(P + j) - shift, e = vexp<T>(x);
    store(P + j, e);
    sum[v] += e;
    if (TILT) tilted[v] += e * vmax(splat<T>(ExpConst<T>::low), x);
  };
  int64_t j = s.a;
  for (; j + NR<T> <= s.b; j += NR<T>)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) take(j + v * VL<T>, v);
#pragma GCC unroll 8
  for (int v = 0; v < NV; v++)                // the last panel: the same sums as with zeros after it
    if (j + v * VL<T> < s.b) take(j + v * VL<T>, v);
  for (int v = 1; v < NV; v++) { sum[0] += sum[v]; tilted[0] += tilted[v]; }
  if (TILT) *tilt = tilted[0];
  return sum[0];
}

// What turns the scores of a row into weights: the largest, and the sum of exp(score - m).
template <class T> struct Normaliser { T m, l; };

// exp(score - m) / l for one score: the same bits as weights_row gives.
template <class T> INLINE T weight(T score, Normaliser<T> of) { return vexp<T>(splat<T>(score - of.m))[0] * (T(1) / of.l); }

// P = exp(score - m) / l over the span, from finished scores; log_p (or null) gets log P.
// Where l is NaN, NaN where a key is allowed and 0 where it is not.
template <class T> void normalise_row(Span span, Normaliser<T> of, T* P, T* log_p = nullptr) {
  if (of.l != of.l) {
    for (int64_t j = span.a; j < span.b; j++) {
      P[j] = P[j] == -INF<T> ? T(0) : of.l;
      if (log_p) log_p[j] = P[j];
    }
    return;
  }
  const T shift = of.m == -INF<T> ? T(0) : of.m, inverse = T(1) / of.l, log_l = log_p ? std::log(of.l) : T(0);
  if (log_p)
    for (int64_t j = span.a; j < span.b; j += VL<T>) store(log_p + j, load(P + j) - shift - log_l);
#pragma GCC unroll 4
  for (int64_t j = span.a; j < span.b; j += VL<T>) store(P + j, vexp<T>(load(P + j) - shift) * inverse);
}

// The same from raw products.
template <class T>
void weights_row(const attlas_problem& p, const Rows<T>& rows, int64_t i, int64_t c0, Span span, Normaliser<T> of, T* P,
                 T* log_p = nullptr, T* tanh_of = nullptr) {
  finish_scores(p, rows, i, c0, span, P, tanh_of);
  normalise_row(span, of, P, log_p);
}

}  // namespace
}  // namespace attlas
