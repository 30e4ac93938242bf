// read_heads.h: the mean of the weights over query heads, in one pass over the heads.
//
//   mean[i, j] = (W_0[i, j] + W_1[i, j] + ...) / Hq
//
// A task owns a block of rows of one batch item and goes over all heads for one chunk of keys at a
// time, so that the sums stay in L2.
//
// Numerics: heads are added in their order, whatever the tile: any part of the mean has the bits of
// the whole.
#pragma once
#include "readout.h"

namespace attlas {
namespace {

template <class T, class S> class HeadPass : Tile<T, S> {
  using U = Factor<T, S>;
  using Of = Tile<T, S>;
  using Of::p; using Of::r; using Of::n_rows; using Of::n_keys; using Of::base; using Of::key; using Of::normaliser;
  using Of::threads; using Of::D; using Of::ldp;

 public:
  HeadPass(const attlas_problem& problem, const attlas_readout& readout) : Of(problem, readout) {
    while (block > 4 * MR && p.B * ceil_div(n_rows, block) < 4 * threads) block -= 2 * MR;
  }
  int run();

 private:
  struct Scratch {
    Scratch(Arena& a, const HeadPass& of)
        : rows(a.take<Rows<T>>(1)), Q(a.take<U>(of.block * of.D)), K(a.take<U>(CHUNK * of.D)), P(a.take<T>(of.block * of.ldp)) {}
    Rows<T>* rows;
    U *Q, *K;
    T* P;
  };
  int64_t block = MEAN_ROWS;

  static constexpr int64_t MEAN_ROWS = 96;    // with a chunk of sums and one of weights, within L2
  void add_head(Scratch& s, int64_t b, int64_t h, int64_t first, int64_t count, int64_t c0, int64_t c1);
};

// Adds the weights of one head in keys [c0, c1) to the sums of rows [first, first + count).
template <class T, class S>
void HeadPass<T, S>::add_head(Scratch& s, int64_t b, int64_t h, int64_t first, int64_t count, int64_t c0, int64_t c1) {
  const int64_t G = p.Hq / p.Hkv, from = max2(c0, r.key0);
  Rows<T>& rows = *s.rows;
  rows.set(p, b, h / G, h % G * p.L + r.row0 + first, count, from, c1);
  if (rows.lo_all >= rows.hi_all) return;
  if (h % G == 0) pack_transposed<U, S>(key(b, h / G, c0), p.k_s[2], c1 - c0, p.E, s.K);
  load_queries<U, S>(p, rows, s.Q);
  rows.look(p, c0);
  score_chunk<U>(rows, D, s.Q, D, s.K, c0, s.P, ldp, T(p.scale));
  for (int64_t i = 0; i < count; i++) {
    const Span span = rows.span(i / MR, c0);
    const int64_t a = max2(span.a, from - c0), z = min2(span.b, c1 - c0);
    if (a >= z) continue;
    T *P = s.P + i * ldp, *sum = (T*)r.head_mean + (b * n_rows + first + i) * n_keys + c0 - r.key0;
    weights_row(p, rows, i, c0, span, normaliser(rows, i), P);
    int64_t j = a;
    for (; j + VL<T> <= z; j += VL<T>) store(sum + j, load(sum + j) + load(P + j));
    for (; j < z; j++) sum[j] += P[j];
  }
}

template <class T, class S> int HeadPass<T, S>::run() {
  const int64_t runs = ceil_div(n_rows, block);
  Workers<Scratch, HeadPass> workers(*this, this->threads_for(p.B * runs, 0));
  Workspace space;
  if (!space.get([&](Arena& a) { workers.lay(a); })) return 1;
  run_tasks(p, p.B * runs, workers.count(), [&](int64_t task, int64_t w) {
    const int64_t t = p.B * runs - 1 - task, b = t / runs, first = t % runs * block, count = min2(block, n_rows - first);
    Scratch s = workers[w];
    for (int64_t c0 = base; c0 < r.key1; c0 += CHUNK) {
      const int64_t c1 = min2(r.key1, c0 + CHUNK), from = max2(c0, r.key0);
      auto sums = [&](int64_t i) { return (T*)r.head_mean + (b * n_rows + first + i) * n_keys + from - r.key0; };
      for (int64_t i = 0; i < count; i++) memset(sums(i), 0, sizeof(T) * size_t(c1 - from));
      for (int64_t h = 0; h < p.Hq; h++) add_head(s, b, h, first, count, c0, c1);
      for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < c1 - from; j++) sums(i)[j] /= T(p.Hq);
    }
  });
  return 0;
}

}  // namespace
}  // namespace attlas
