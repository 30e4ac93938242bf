// read_keys.h: what a readout gives for each key, in one pass over the query rows.
//
//   received sum_i r_i W[i, j] | max_i W[i, j] | W^T y
//
// A task owns a few panels of keys, so no sum is shared, and goes over all rows of the query heads
// that read them.
#pragma once
#include "readout.h"

namespace attlas {
namespace {

template <class T, class S> class KeyPass : Tile<T, S> {
  using U = Factor<T, S>;
  using Of = Tile<T, S>;
  using Of::p; using Of::r; using Of::n_rows; using Of::n_keys; using Of::base; using Of::key; using Of::normaliser;
  using Of::G; using Of::heads; using Of::threads; using Of::D; using Of::ldp;

 public:
  KeyPass(const attlas_problem& problem, const attlas_readout& readout) : Of(problem, readout) {
    while (width > NR<T> && heads * ceil_div(r.key1 - base, width) < 4 * threads) width /= 2;
    width = max2(width, NR<T>);
  }
  int run();

 private:
  struct Scratch {
    Scratch(Arena& a, const KeyPass& of)
        : rows(a.take<Rows<T>>(1)), Q(a.take<U>(MAX_ROWS * of.D)), K(a.take<U>(CHUNK * of.D)), P(a.take<T>(MAX_ROWS * of.ldp)),
          O(a.take<T>(of.F ? CHUNK * of.ldf : 0)), Y(a.take<T>(panel_floats<T>(of.F, MAX_ROWS))), line(a.take<T>(3 * CHUNK)),
          bad(a.take<uint8_t>(MAX_ROWS)) {}
    Rows<T>* rows;
    U *Q, *K;
    T *P, *O, *Y, *line;
    uint8_t* bad;
  };
  const int64_t F = r.wty ? r.F : 0, ldf = round_up(r.F, VL<T>);
  int64_t width = CHUNK;                      // keys of a task; results do not depend on it
};

template <class T, class S> int KeyPass<T, S>::run() {
  const int64_t units = ceil_div(r.key1 - base, width);
  Workers<Scratch, KeyPass> workers(*this, this->threads_for(heads * units, F));
  Workspace space;
  if (!space.get([&](Arena& a) { workers.lay(a); })) return 1;
  run_tasks(p, heads * units, workers.count(), [&](int64_t task, int64_t w) {
    const int64_t head = task / units, c0 = base + task % units * width, c1 = min2(r.key1, c0 + width), b = head / p.Hkv, hkv = head % p.Hkv;
    Scratch s = workers[w];
    Rows<T>& rows = *s.rows;
    T *total = s.line, *sums = s.line + CHUNK, *tops = s.line + 2 * CHUNK;
    const int64_t from = max2(r.key0, c0) - c0, until = c1 - c0, count = until - from;
    pack_transposed<U, S>(key(b, hkv, c0), p.k_s[2], c1 - c0, p.E, s.K);
    for (int64_t g = 0; g < G; g++) {
      const int64_t h = b * p.Hq + hkv * G + g;
      memset(s.line, 0, sizeof(T) * size_t(3 * CHUNK));
      if (F) memset(s.O, 0, sizeof(T) * size_t(CHUNK * ldf));
      for (int64_t l = 0; l < n_rows; l += MAX_ROWS) {
        rows.set(p, b, hkv, g * p.L + r.row0 + l, min2(MAX_ROWS, n_rows - l), c0 + from, c1);
        if (rows.lo_all >= rows.hi_all) continue;
        load_queries<U, S>(p, rows, s.Q);
        rows.look(p, c0);
        score_chunk<U>(rows, D, s.Q, D, s.K, c0, s.P, ldp, T(p.scale));
        memset(sums, 0, sizeof(T) * size_t(CHUNK));
        bool any_bad = false;
        if (F) any_bad = pack_rows<T, T>((const T*)r.y + (h * n_rows + l) * F, F, rows.n, F, s.Y, MAX_ROWS, 0, s.bad);
        for (int64_t t = 0; t < rows.tiles; t++) {
          const Span span = rows.span(t, c0);
          T factor[MR];
          for (int64_t i = t * MR; i < t * MR + rows.tile_rows(t); i++) {
            T* P = s.P + i * ldp;
            factor[i - t * MR] = r.row_weight ? ((const T*)r.row_weight)[h * n_rows + l + i] : T(1);
            if (span.a < span.b) weights_row(p, rows, i, c0, span, normaliser(rows, i), P);
            if (F) {                          // the product below reads every column
              const int64_t a = span.a < span.b ? span.a : until, z = span.a < span.b ? min2(span.b, until) : until;
              for (int64_t j = from; j < a; j++) P[j] = 0;
              for (int64_t j = z; j < until; j++) P[j] = 0;
            }
          }
          const int64_t a = max2(span.a, from), z = min2(span.b, until);
          if (a >= z) continue;
          if (r.received) add_columns<T>(sums, s.P + t * MR * ldp, ldp, rows.tile_rows(t), factor, a, z);
          if (r.received_max) max_columns<T>(tops, s.P + t * MR * ldp, ldp, rows.tile_rows(t), a, z);
        }
        for (int64_t j = from; j < until; j++) total[j] += sums[j];
        for (int64_t j = from; F && j < until; j += MR)
          for (int64_t e = 0; e < F; e += NR<T>) {
            const int64_t wide = panel_width<T>(F, e / NR<T>);
            gemm_tile<T>(int(min2<int64_t>(MR, until - j)), int(wide / VL<T>), rows.n, s.P + j, 1, ldp, s.Y + e * MAX_ROWS, wide, s.O + j * ldf + e, ldf, true);
          }
        if (any_bad)
          add_bad_rows<T, T>(count, rows.n, s.P + from, 1, ldp, s.bad, (const T*)r.y + (h * n_rows + l) * F, F, F, T(1), s.O + from * ldf, ldf);
      }
      const int64_t to = h * n_keys + c0 + from - r.key0;
      if (r.received) memcpy((T*)r.received + to, total + from, sizeof(T) * size_t(count));
      if (r.received_max) memcpy((T*)r.received_max + to, tops + from, sizeof(T) * size_t(count));
      for (int64_t j = 0; F && j < count; j++) write_row<T, T>((T*)r.wty + (to + j) * F, s.O + (from + j) * ldf, F, T(1), false);
    }
  });
  return 0;
}

}  // namespace
}  // namespace attlas
