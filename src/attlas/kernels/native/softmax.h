// softmax.h: the softmax of a block of rows whose scores come a chunk of keys at a time.
//
//   m' = max(m, max_j s_j),   f = exp(m - m'),   e_j = exp(s_j - m')
//   l' = f l + sum_j e_j,     tilt' = f (tilt + l (m - m')) + sum_j e_j (s_j - m')
//   O' = f O, to which the caller adds sum_j e_j v_j
//
// Of a row, m is its maximum so far, l the sum of its exponentials, and tilt what its entropy is
// made of: log l - tilt / l. An empty row has m -inf and l 0.
//
// Numerics: a sum runs over the lanes of one vector, then over chunks in order, for each row alone.
// NaN is no maximum, but makes l NaN. Where f is 0, what it multiplies is gone, even infinity.
#pragma once
#include "score.h"

namespace attlas {
namespace {

template <class T> struct RowState { T m, l, tilt; int64_t best; };   // best: the first key of m

// An array each, so that VL rows are updated at once.
template <class T> struct Softmax {
  T m[MAX_ROWS], l[MAX_ROWS], tilt[MAX_ROWS];
  int64_t best[MAX_ROWS];

  void clear(int64_t n) {
    for (int64_t i = 0; i < round_up(n, VL<T>); i++) { m[i] = -INF<T>; l[i] = tilt[i] = T(0); best[i] = -1; }
  }
  RowState<T> row(int64_t i) const { return {m[i], l[i], tilt[i], best[i]}; }

  // Takes in the products of rows [i0, i0 + count), count <= VL, with chunk c0: in the columns
  // spans[.] of P they become exponentials. P and O are those of row i0.
  void take(const attlas_problem& p, const attlas_forward_out& out, const Rows<T>& rows, int64_t i0, int64_t count, int64_t c0,
            const Span* spans, T* P, int64_t ldp, T* O, int64_t ldo) {
    constexpr int64_t n = VL<T>;
    Vec<T> tops[n], sums[n] = {}, tilts[n] = {};
    for (int64_t x = 0; x < n; x++) tops[x] = splat<T>(-INF<T>);
    for (int64_t x = 0; x < count; x++) {
      if (spans[x].a >= spans[x].b) continue;
      finish_scores(p, rows, i0 + x, c0, spans[x], P + x * ldp);
      tops[x] = row_max(P + x * ldp, spans[x]);
    }
    const Vec<T> top = max_across<T>(tops), before = load(m + i0), after = vmax(top, before), sum = load(l + i0);
    const Mask<T> first = before == -INF<T>;  // nothing was summed yet
    const Vec<T> factor = first ? splat<T>(T(1)) : vexp<T>(before - after), shift = after == -INF<T> ? Vec<T>{} : after;
    T shifts[n], factors[n];
    store(shifts, shift);
    store(factors, factor);
    for (int64_t x = 0; x < count; x++) {
      if (spans[x].a >= spans[x].b) continue;
      if (out.max_key && top[x] > before[x]) best[i0 + x] = c0 + find_first(P + x * ldp, spans[x], T(top[x]));
      if (out.output && factors[x] != T(1))
        for (int64_t e = 0; e < ldo; e += n) store(O + x * ldo + e, load(O + x * ldo + e) * factors[x]);
      sums[x] = out.entropy ? exp_row<T, true>(P + x * ldp, spans[x], shifts[x], tilts + x)
                            : exp_row<T, false>(P + x * ldp, spans[x], shifts[x], nullptr);
    }
    if (out.entropy) {
      const Vec<T> moved = load(tilt + i0) + sum * (before - after);   // -inf from the lowest score to another
      store(tilt + i0, ((first | (factor == T(0))) ? Vec<T>{} : factor * moved) + sum_across<T>(tilts));
    }
    store(l + i0, sum * factor + sum_across<T>(sums));
    store(m + i0, after);
  }

  // Joins the parts of row i, of which part x is states[x * step], with its O at outputs + x * step * ldo.
  void join(int64_t i, int64_t parts, int64_t step, const RowState<T>* states, const T* outputs, T* O, int64_t ldo) {
    RowState<T> all = {-INF<T>, T(0), T(0), -1};
    for (int64_t x = 0; x < parts; x++)
      if (states[x * step].m > all.m) { all.m = states[x * step].m; all.best = states[x * step].best; }
    if (O) memset(O, 0, sizeof(T) * size_t(ldo));
    for (int64_t x = 0; x < parts; x++) {
      const RowState<T>& part = states[x * step];
      if (part.l == T(0)) continue;           // nothing is allowed there
      const T f = part.m == -INF<T> ? T(1) : std::exp(part.m - all.m);   // T(1): NaN goes on
      if (f != T(0)) all.tilt += f * (part.m == -INF<T> ? part.tilt : part.tilt + part.l * (part.m - all.m));
      all.l += f * part.l;
      for (int64_t e = 0; O && e < ldo; e += VL<T>) store(O + e, load(O + e) + load(outputs + x * step * ldo + e) * f);
    }
    m[i] = all.m; l[i] = all.l; tilt[i] = all.tilt; best[i] = all.best;
  }
};

}  // namespace
}  // namespace attlas
