// finish.h: the results of a block of rows, from its exponentials and their sums.
//
//   l += exp(sink - m),   entropy = -sum w log w,   max = 1 / l
//   output = O / l,   weights[c] = P[c] exp(chunk_max[c] - m) / l,   received += weights
//
// With a sink above m, all are taken relative to the sink, so that no exponential overflows. An
// empty row has the normaliser (-inf, 1), output, weights and statistics 0, and max key -1.
#pragma once
#include "block.h"

namespace attlas {
namespace {

template <class T, class S> void Block<T, S>::finish(T* received) {
  T inverse[MAX_ROWS];                        // the factor of the exponentials
  for (int64_t i = 0; i < rows->n; i++) {
    const RowState<T> st = softmax->row(i);
    const int64_t at = rows->flat(p, i);
    const bool dead = st.l == T(0);
    T m = st.m, l = st.l, up = T(1);          // up = exp(m - top): 1 unless the sink is higher
    if (p.sinks && !dead) {
      const T sink = ((const T*)p.sinks)[rows->h[i]];
      if (sink > m) { up = vexp<T>(splat<T>(m - sink))[0]; l = l * up + T(1); m = sink; }
      else l += std::exp(sink - m);
    }
    const T log_l = out.entropy ? std::log(l) : T(0);
    inverse[i] = dead ? T(0) : up * (T(1) / l);   // as `weight`
    if (out.normaliser) ((Normaliser<T>*)out.normaliser)[at] = dead ? Normaliser<T>{-INF<T>, T(1)} : Normaliser<T>{m, l};
    if (out.entropy)                          // -sum w log w,  log w = (s - m_row) + (m_row - m) - log l
      ((T*)out.entropy)[at] = inverse[i] == T(0) ? T(0) : inverse[i] * (st.l * (log_l + (m - st.m)) - st.tilt);
    if (out.max_value) ((T*)out.max_value)[at] = inverse[i];
    if (out.max_key) out.max_key[at] = dead ? -1 : st.best;
    if (out.output)
      write_row<T, S>((S*)out.output + rows->b * out.output_s[0] + rows->h[i] * out.output_s[1] + rows->l[i] * out.output_s[2],
                      O + i * ldo, p.Ev, inverse[i], false);
  }
  if (!plan.kept) return;
  if (received) memset(column_sums, 0, sizeof(T) * size_t(p.S));
  for (int64_t t = 0; t < rows->tiles; t++) finish_tile(t, inverse, received ? column_sums : nullptr);
  for (int64_t j = 0; received && j < p.S; j++) received[j] += column_sums[j];
  if (plan.big) stream_fence();
}

// Weights and column sums of one tile of rows, from exponentials still in the cache.
template <class T, class S> void Block<T, S>::finish_tile(int64_t t, const T* inverse, T* received) {
  const int64_t n = rows->tile_rows(t), r0 = t * MR;
  for (int64_t c0 = 0; c0 < p.S; c0 += CHUNK) {
    const Span span = rows->span(t, c0);
    const int64_t width = min2(CHUNK, p.S - c0), a = span.a, b = min2(span.b, width);
    T factor[MR];
    bool finite = true;
    for (int64_t i = 0; i < n && a < b; i++) {
      const RowState<T> st = softmax->row(r0 + i);
      const T m = chunk_max[c0 / CHUNK * MAX_ROWS + r0 + i];
      factor[i] = m == -INF<T> ? (st.l == st.l ? T(0) : st.l) : m == st.m ? inverse[r0 + i] : std::exp(m - st.m) * inverse[r0 + i];
      finite = finite && factor[i] - factor[i] == T(0);
    }
    T* chunk = P + r0 * ldp + c0;
    if (!finite)                              // a NaN row: NaN where allowed, 0 where masked
      for (int64_t i = 0; i < n; i++)
        if (factor[i] - factor[i] != T(0)) {
          for (int64_t j = a; j < b; j++) chunk[i * ldp + j] = allowed(p, *rows, r0 + i, c0 + j) ? T(NAN) : T(0);
          factor[i] = T(1);
        }
    if (received && a < b) add_columns<T>(received + c0, chunk, ldp, n, factor, a, b);
    for (int64_t i = 0; out.weights && i < n; i++) {
      S* w = weights(r0 + i) + c0;
      if (a >= b) { write_zeros(w, width, plan.big); continue; }
      if (a > 0) write_zeros(w, a, plan.big);
      write_row<T, S>(w + a, chunk + i * ldp + a, b - a, factor[i], plan.big);
      if (b < width) write_zeros(w + b, width - b, plan.big);
    }
  }
}

// First touch of fresh pages clears them (2 MiB at a time with huge pages) and so empties the
// cache; better here, before the block is scored, than when it is written.
template <class T, class S> void Block<T, S>::touch_weights() {
  for (int64_t i = 0; i < rows->n; i++) {
    volatile char* w = (volatile char*)weights(i);
    for (int64_t at = 0; at < p.S * int64_t(sizeof(S)); at += 4096) w[at] = 0;
  }
}

// What a part of the keys gave, of all rows.
template <class T, class S> void Block<T, S>::store_part(RowState<T>* states, T* outputs) const {
  for (int64_t i = 0; i < rows->n; i++) states[i] = softmax->row(i);
  if (out.output) memcpy(outputs, O, sizeof(T) * size_t(rows->n * ldo));
}

// As if the block had attended to all parts, in their order.
template <class T, class S> void Block<T, S>::join_parts(int64_t parts, const RowState<T>* states, const T* outputs) {
  const int64_t n = rows->n;
  for (int64_t i = 0; i < n; i++)
    softmax->join(i, parts, n, states + i, outputs + i * ldo, out.output ? O + i * ldo : nullptr, ldo);
}

}  // namespace
}  // namespace attlas
