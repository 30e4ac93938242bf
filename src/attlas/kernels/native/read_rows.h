// read_rows.h: what a readout gives for each query row, in one pass over the keys.
//
//   entropy -sum_j W log W | max and its key | top-k | W x | pooled max and mass | W | scores
//
// A task owns a run of rows of one head, so no sum is shared. An empty row gives entropy
// 0, max 0 with key -1, top-k 0 with keys -1, mass 0.
//
// Numerics: top-k and max order by score, then by the lower key; NaN scores are not ranked. No term of
// an entropy is below 0, and chunks are summed in double.
#pragma once
#include "readout.h"

namespace attlas {
namespace {

template <class T> struct Best { T score; int64_t key; };

template <class T, class S> class RowPass : Tile<T, S> {
  using U = Factor<T, S>;
  using Of = Tile<T, S>;
  using Of::p; using Of::r; using Of::n_rows; using Of::n_keys; using Of::base; using Of::key; using Of::normaliser;
  using Of::G; using Of::heads; using Of::threads; using Of::D; using Of::ldp;

 public:
  RowPass(const attlas_problem& problem, const attlas_readout& readout) : Of(problem, readout) {
    const bool pooled = (r.pool_max || r.pool_mass) && r.cell_rows > 0 && r.cell_keys > 0;
    block = MAX_ROWS;
    // Not where cells are summed: a cell goes over blocks and chunks, in an order that depends on it alone.
    while (!pooled && block > 4 * MR && p.B * p.Hq * ceil_div(n_rows, block) < 4 * threads) block -= 2 * MR;
    // Whole bands of cells, so that no cell is shared.
    rows_of_run = pooled ? max2<int64_t>(1, 8 * MR / r.cell_rows) * r.cell_rows : block;
    block = min2(block, rows_of_run);
    runs = ceil_div(n_rows, rows_of_run);
    shared = G * runs > 2;
  }
  int run();

 private:
  struct Scratch {
    Scratch(Arena& a, const RowPass& of) : Scratch(a, of, min2(of.block, of.n_rows)) {}
    Scratch(Arena& a, const RowPass& of, int64_t n)
        : rows(a.take<Rows<T>>(1)), Q(a.take<U>(n * of.D)), K(a.take<U>(of.shared ? 0 : CHUNK * of.D)), P(a.take<T>(n * of.ldp)),
          O(a.take<T>(n * of.ldo)), line(a.take<T>(2 * CHUNK)), entropy(a.take<double>(n)), best(a.take<Best<T>>(n * of.k)) {}
    Rows<T>* rows;
    U *Q, *K;                                 // K: a chunk, where it is not shared
    T *P, *O, *line;
    double* entropy;
    Best<T>* best;
  };
  const bool top = r.topk_value || r.topk_key;
  const bool big = double(p.B) * p.Hq * n_rows * n_keys * sizeof(S) > (1 << 22);
  const int64_t k = top ? r.k : 1, ldo = round_up(r.F, VL<T>), padded = round_up(r.key1 - base, NR<T>);
  int64_t block, rows_of_run, runs;           // rows scored at once, and of a task; tasks of a query head
  bool shared;                                // several tasks read the same packed keys

  void rank(Scratch& s, int64_t i, int64_t c0, Span span, const T* P);
  void read_rows(Scratch& s, int64_t c0, const T* X, const uint8_t* bad, bool any_bad);
  void pool(Scratch& s, int64_t c0, int64_t t, Span span);
  // Key 0 of row i in a result of the tile.
  T* tile(void* of, const Rows<T>& rows, int64_t i) const {
    return (T*)of + ((rows.b * p.Hq + rows.h[i]) * n_rows + rows.l[i] - r.row0) * n_keys - r.key0;
  }
  // The weights of a row's chunk, in columns [from, until), to `w` of its first column.
  template <class D> void write_weights(D* w, Span span, int64_t from, int64_t until, const T* P) const {
    const int64_t a = span.a < span.b ? max2(span.a, from) : until, b = span.a < span.b ? min2(span.b, until) : until;
    write_zeros(w + from, a - from, big);
    write_row<T, D>(w + a, P + a, b - a, T(1), big);
    write_zeros(w + b, until - b, big);
  }
  void write_scores(const Rows<T>& rows, int64_t i, int64_t c0, Span span, const T* P);
  void finish_rows(Scratch& s);
};

// Keeps the k best scores of row i, sorted, in s.best[i k ...].
template <class T, class S> void RowPass<T, S>::rank(Scratch& s, int64_t i, int64_t c0, Span span, const T* P) {
  Best<T>* best = s.best + i * k;
  T least = best[k - 1].score;
  for (int64_t j = span.a; j < span.b; j += VL<T>) {
    if (!any<T>(load(P + j) > least)) continue;
    for (int64_t x = j; x < j + VL<T>; x++) {
      if (!(P[x] > least)) continue;
      int64_t at = k - 1;
      for (; at > 0 && P[x] > best[at - 1].score; at--) best[at] = best[at - 1];
      best[at] = {P[x], c0 + x};
      least = best[k - 1].score;
    }
  }
}

// Max and mass of cells, for one tile of rows.
template <class T, class S> void RowPass<T, S>::pool(Scratch& s, int64_t c0, int64_t t, Span span) {
  const Rows<T>& rows = *s.rows;
  const int64_t cells = ceil_div(n_keys, r.cell_keys), bands = ceil_div(n_rows, r.cell_rows);
  const int64_t a = max2(span.a, r.key0 - c0), b = min2(span.b, r.key1 - c0), end = t * MR + rows.tile_rows(t);
  T one[MR], *sums = s.line, *tops = s.line + CHUNK;
  for (int i = 0; i < MR; i++) one[i] = T(1);
  for (int64_t i = t * MR, next; i < end; i = next) {    // rows of one band
    const int64_t band = (rows.l[i] - r.row0) / r.cell_rows;
    for (next = i + 1; next < end && (rows.l[next] - r.row0) / r.cell_rows == band; next++) {}
    for (int64_t j = a; j < b; j++) sums[j] = tops[j] = 0;
    if (r.pool_mass) add_columns<T>(sums, s.P + i * ldp, ldp, next - i, one, a, b);
    if (r.pool_max) max_columns<T>(tops, s.P + i * ldp, ldp, next - i, a, b);
    const int64_t to = ((rows.b * p.Hq + rows.h[i]) * bands + band) * cells;
    for (int64_t j = a; j < b;) {
      const int64_t cell = (c0 + j - r.key0) / r.cell_keys, stop = min2(b, (cell + 1) * r.cell_keys + r.key0 - c0);
      T sum = 0, top = 0;
      for (; j < stop; j++) { sum += sums[j]; if (tops[j] > top || tops[j] != tops[j]) top = tops[j]; }
      if (r.pool_mass) ((T*)r.pool_mass)[to + cell] += sum;
      if (r.pool_max) { T& old = ((T*)r.pool_max)[to + cell]; if (top > old || top != top) old = top; }
    }
  }
}

// score - m of row i in one chunk; -inf outside of the span, where no key is allowed.
template <class T, class S>
void RowPass<T, S>::write_scores(const Rows<T>& rows, int64_t i, int64_t c0, Span span, const T* P) {
  const int64_t from = max2(r.key0, c0) - c0, until = min2(r.key1, c0 + CHUNK) - c0;
  const int64_t a = span.a < span.b ? max2(span.a, from) : until, b = span.a < span.b ? min2(span.b, until) : until;
  const Normaliser<T> of = normaliser(rows, i);
  const T shift = of.m == -INF<T> ? T(0) : of.m;
  T* to = tile(r.tile_scores, rows, i) + c0;
  for (int64_t j = from; j < a; j++) to[j] = -INF<T>;
  if (of.l != of.l) for (int64_t j = a; j < b; j++) to[j] = P[j] == -INF<T> ? P[j] : of.l;
  else for (int64_t j = a; j < b; j++) to[j] = P[j] - shift;
  for (int64_t j = b; j < until; j++) to[j] = -INF<T>;
}

// One chunk: products in s.P become weights, and every reader takes its part.
template <class T, class S>
void RowPass<T, S>::read_rows(Scratch& s, int64_t c0, const T* X, const uint8_t* bad, bool any_bad) {
  const Rows<T>& rows = *s.rows;
  const int64_t from = max2(r.key0, c0) - c0, until = min2(r.key1, c0 + CHUNK) - c0;
  const bool ranked = top || r.max_value || r.max_key;
  const bool weighed = r.entropy || r.wx || r.pool_max || r.pool_mass || r.weights || r.tile_weights;
  for (int64_t i = 0; i < rows.n; i++) {
    const Span span = rows.span(i / MR, c0);
    T* P = s.P + i * ldp;
    if (span.a < span.b) {
      finish_scores(p, rows, i, c0, span, P);
      if (ranked) rank(s, i, c0, span, P);
      if (r.tile_scores) write_scores(rows, i, c0, span, P);
      if (weighed) normalise_row(span, normaliser(rows, i), P, r.entropy ? s.line : nullptr);
      if (r.entropy) {
        Vec<T> sum{};
        for (int64_t j = span.a; j < span.b; j += VL<T>) {
          const Vec<T> w = load(P + j), term = w * load(s.line + j);
          sum -= w == T(0) ? Vec<T>{} : term;
        }
        s.entropy[i] += hsum<T>(sum);
      }
    } else if (r.tile_scores) write_scores(rows, i, c0, span, P);
    if (r.tile_weights) {
      write_weights(tile(r.tile_weights, rows, i) + c0, span, from, until, P);
    }
    if (r.weights) {
      S* w = (S*)r.weights + rows.b * r.weights_s[0] + rows.h[i] * r.weights_s[1] + (rows.l[i] - r.row0) * r.weights_s[2] + c0 - r.key0;
      write_weights(w, span, from, until, P);
    }
  }
  for (int64_t t = 0; t < rows.tiles; t++) {
    const Span span = rows.span(t, c0);
    const int64_t a = max2(span.a, from), b = min2(span.b, until), n = rows.tile_rows(t);
    if (a >= b) continue;
    if (r.pool_max || r.pool_mass) pool(s, c0, t, span);
    if (!r.wx) continue;
    const T* P = s.P + t * MR * ldp + a;
    const int64_t x0 = c0 + a - r.key0;       // x holds the tile's keys only
    for (int64_t e = 0; e < r.F; e += NR<T>) {
      const int64_t width = panel_width<T>(r.F, e / NR<T>);
      gemm_tile<T>(int(n), int(width / VL<T>), b - a, P, ldp, 1, X + e * n_keys + x0 * width, width, s.O + t * MR * ldo + e, ldo, true);
    }
    if (any_bad)
      add_bad_rows<T, T>(n, b - a, P, ldp, 1, bad + x0, (const T*)r.x + ((rows.b * p.Hq + rows.h[0]) * n_keys + x0) * r.F, r.F, r.F, T(1),
                         s.O + t * MR * ldo, ldo);
  }
}

template <class T, class S> void RowPass<T, S>::finish_rows(Scratch& s) {
  const Rows<T>& rows = *s.rows;
  for (int64_t i = 0; i < rows.n; i++) {
    const int64_t to = (rows.b * p.Hq + rows.h[i]) * n_rows + rows.l[i] - r.row0;
    const Normaliser<T> of = normaliser(rows, i);
    const bool dead = of.m == -INF<T> && of.l == of.l;
    auto value = [&](const Best<T>& b) { return dead ? T(0) : of.l != of.l ? of.l : b.key < 0 ? T(0) : weight(b.score, of); };
    if (r.entropy) ((T*)r.entropy)[to] = T(s.entropy[i]);
    if (r.max_value) ((T*)r.max_value)[to] = value(s.best[i * k]);
    if (r.max_key) r.max_key[to] = dead ? -1 : s.best[i * k].key;
    for (int64_t x = 0; top && x < k; x++) {
      if (r.topk_value) ((T*)r.topk_value)[to * k + x] = value(s.best[i * k + x]);
      if (r.topk_key) r.topk_key[to * k + x] = dead ? -1 : s.best[i * k + x].key;
    }
    if (r.wx) write_row<T, T>((T*)r.wx + to * r.F, s.O + i * ldo, r.F, T(1), false);
  }
}

template <class T, class S> int RowPass<T, S>::run() {
  const int64_t units = G * runs, head_k = shared ? padded * D : 0, head_x = r.wx ? panel_floats<T>(r.F, n_keys) : 0;
  const int64_t head_bytes = int64_t(sizeof(T)) * (head_k + G * head_x), size = r.wx ? n_keys : 0;
  // Heads are packed in waves: enough for all threads, then as few as what is packed is large.
  const int64_t enough = min2(4 * threads, ceil_div(32 * threads, max2<int64_t>(1, units)));
  const int64_t wave = head_bytes > 0 ? min2(heads, max2(enough, PACKED_BYTES / head_bytes)) : heads;
  U* K;
  T* X;
  uint8_t* bad;
  int32_t* any_bad;
  Workers<Scratch, RowPass> workers(*this, this->threads_for(wave * units, r.F));
  Workspace space;
  if (!space.get([&](Arena& a) {
        K = a.take<U>(wave * head_k);
        X = a.take<T>(wave * G * head_x);
        bad = a.take<uint8_t>(wave * G * size);
        any_bad = a.take<int32_t>(wave * G);
        workers.lay(a);
      })) return 1;
  memset(any_bad, 0, size_t(wave * G) * sizeof(*any_bad));
  for (int64_t h0 = 0; h0 < heads; h0 += wave) {
    const int64_t count = min2(wave, heads - h0);
    if (shared) {
      const int64_t pieces = min2<int64_t>(8, ceil_div(padded, CHUNK)), step = round_up(ceil_div(padded, pieces), NR<T>);
      run_tasks(p, count * pieces, workers.count(), [&](int64_t t, int64_t) {
        const int64_t slot = t / pieces, head = h0 + slot, j0 = base + t % pieces * step, j1 = min2(r.key1, j0 + step);
        if (j0 < j1) pack_transposed<U, S>(key(head / p.Hkv, head % p.Hkv, j0), p.k_s[2], j1 - j0, p.E, K + slot * head_k + (j0 - base) * D);
      });
    }
    if (r.wx)
      run_tasks(p, count * G, workers.count(), [&](int64_t i, int64_t) {
        const T* x = (const T*)r.x + (h0 * G + i) * n_keys * r.F;
        any_bad[i] = pack_rows<T, T>(x, r.F, n_keys, r.F, X + i * head_x, n_keys, 0, bad + i * n_keys);
      });
    run_tasks(p, count * units, workers.count(), [&](int64_t task, int64_t w) {
      const int64_t t = count * units - 1 - task, slot = t / units, g = t % units / runs, first = t % runs * rows_of_run;
      const int64_t b = (h0 + slot) / p.Hkv, hkv = (h0 + slot) % p.Hkv, h = slot * G + g, end = min2(n_rows, first + rows_of_run);
      Scratch s = workers[w];
      Rows<T>& rows = *s.rows;
      for (int64_t l = first; l < end; l += block) {
        rows.set(p, b, hkv, g * p.L + r.row0 + l, min2(block, end - l), r.key0, r.key1);
        load_queries<U, S>(p, rows, s.Q);
        for (int64_t i = 0; i < rows.n * k; i++) s.best[i] = {-INF<T>, -1};
        for (int64_t i = 0; i < rows.n; i++) s.entropy[i] = 0;
        if (r.wx) memset(s.O, 0, sizeof(T) * size_t(rows.n * ldo));
        // A dense result is written everywhere; anything else needs the allowed keys alone.
        const bool dense = r.weights || r.tile_weights || r.tile_scores;
        const int64_t from = dense ? base : base + (rows.lo_all - base) / CHUNK * CHUNK, until = dense ? r.key1 : rows.hi_all;
        for (int64_t c0 = from; c0 < until; c0 += CHUNK) {
          const U* packed = shared ? K + slot * head_k + (c0 - base) * D : s.K;
          if (!shared) pack_transposed<U, S>(key(b, hkv, c0), p.k_s[2], min2(CHUNK, r.key1 - c0), p.E, s.K);
          rows.look(p, c0);
          score_chunk<U>(rows, D, s.Q, D, packed, c0, s.P, ldp, T(p.scale));
          read_rows(s, c0, X + h * head_x, bad + h * size, any_bad[h] != 0);
        }
        finish_rows(s);
        if (big) stream_fence();
      }
    });
  }
  return 0;
}

}  // namespace
}  // namespace attlas
