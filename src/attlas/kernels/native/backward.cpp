// backward.cpp: gradients of query, key, value, bias and sinks, recomputing weights from the normaliser.
//
//   P  = exp(scores - m) / l                         dV  = P^T dO
//   dP = dO V^T + dW + row_weight[i] d_received[j] - d_entropy[i] (log P + 1)
//   dS = P (dP - D + d_lse),   D = rowsum(P dP)      dQ  = scale dS' K,   dK = scale dS'^T Q
//   dS' = dS (1 - tanh^2) with a softcap             dbias = dS
//   dsink = -exp(sink - m) / l (D - d_lse)
//
// With dropout, P in dV and dO V^T in dP are dropped and scaled; D stays rowsum(P dP).
//
// For a readout of a given normaliser (minus_rowsum), dS = P dP and dlse = -rowsum(P dP), in one pass.
// D needs no pass over the keys for the output (rowsum(dO O)) and the entropy (d (H - mass));
// for dW and d_received it does, and gets one.
//
// A task owns a run of query rows of one key/value head: it writes their dQ, and sums dK and
// dV in a partial of its own. Runs (at most MAX_RUNS per head, by shape alone) are then added
// in order. Memory is O(L + S); heads go in waves when the partials of all would be large.
//
// Numerics: a pair of weight exactly 0 gives exactly 0, so NaN behind a mask reaches nothing.
#include "random.h"
#include "write.h"

namespace attlas {
namespace {

constexpr int64_t BACK_ROWS = 24 * MR < MAX_ROWS ? 24 * MR : MAX_ROWS;
constexpr int64_t MAX_RUNS = 4;
constexpr int64_t WAVE_BYTES = int64_t(256) << 20;

template <class T, class U> struct Head {     // what is packed or summed once per key/value head
  U *Kt, *Vt;                                 // transposed panels of K and V
  T* K;                                       // row panels of K
  uint8_t* bad;
  int32_t* any_bad;
};

template <class T> struct RowTerms {          // per row; D less d_lse
  Normaliser<T> normaliser;
  T sink, D, d_entropy, rowsum;               // sink: the weight of the sink; rowsum: of P dP
};

template <class T, class S> class Backward {
  using U = Factor<T, S>;

 public:
  Backward(const attlas_problem& p, const attlas_backward_args& a) : p(p), a(a) {}
  int run();

 private:
  struct Scratch {
    Scratch(Arena& a, const Backward& of)
        : rows(a.take<Rows<T>>(1)), terms(a.take<RowTerms<T>>(BACK_ROWS)), Q(a.take<U>(BACK_ROWS * of.depth_e)),
          dO(a.take<U>(BACK_ROWS * of.depth_v)), Qp(a.take<T>(panel_floats<T>(of.p.E, BACK_ROWS))),
          dOp(a.take<T>(panel_floats<T>(of.p.Ev, BACK_ROWS))), P(a.take<T>(BACK_ROWS * of.ldp)), G(a.take<T>(BACK_ROWS * of.ldp)),
          dQ(a.take<T>(BACK_ROWS * of.lde)), line(a.take<T>(2 * CHUNK)), bad_q(a.take<uint8_t>(BACK_ROWS)),
          bad_do(a.take<uint8_t>(BACK_ROWS)) {}
    Rows<T>* rows;
    RowTerms<T>* terms;
    U *Q, *dO;
    T *Qp, *dOp, *P, *G, *dQ, *line;          // ..p: row panels
    uint8_t *bad_q, *bad_do;
  };
  const attlas_problem& p;
  const attlas_backward_args& a;
  int64_t depth_e, depth_v, lde, ldv, padded, ldp;
  int64_t k_sum, sums;                        // numbers in a partial: of dK, of both
  bool scan;                                  // D needs its own pass
  bool direct;                                // the normaliser is a variable of its own: dS = P dP

  void load_rows(Scratch& s, bool* bad_q, bool* bad_do);
  void scan_d(Scratch& s, const Head<T, U>& head);
  void dscores_row(Scratch& s, int64_t i, int64_t c0, Span span);
  void rows_task(Scratch& s, const Head<T, U>& head, int64_t hkv, T* dK, T* dV);
  void write_keys(int64_t head, int64_t j0, T* partials, int64_t runs);
  void keys_product(const Rows<T>& rows, int64_t c0, int64_t first, int64_t last, const T* A, const T* B, int64_t cols, T* C, int64_t ldc);
  T received_weight(const Rows<T>& r, int64_t i) const { return a.row_weight ? ((const T*)a.row_weight)[r.flat(p, i)] : T(1); }
  const S* d_output(const Rows<T>& r, int64_t i) const {
    return (const S*)a.d_output + r.b * a.d_output_s[0] + r.h[i] * a.d_output_s[1] + r.l[i] * a.d_output_s[2];
  }
  const S* d_weights(const Rows<T>& r, int64_t i, int64_t c0) const {
    return (const S*)a.d_weights + r.b * a.d_weights_s[0] + r.h[i] * a.d_weights_s[1] + r.l[i] * a.d_weights_s[2] + c0;
  }
};

// Copies the block's Q (and, for dK, a scaled one) and dO, and finds D - d_lse of each row.
template <class T, class S> void Backward<T, S>::load_rows(Scratch& s, bool* bad_q, bool* bad_do) {
  const Rows<T>& rows = *s.rows;
  load_queries<U, S>(p, rows, s.Q);
  *bad_q = *bad_do = false;
  for (int64_t i = 0; i < rows.n; i++) {
    const int64_t at = rows.flat(p, i);
    RowTerms<T>& t = s.terms[i];
    t.normaliser = ((const Normaliser<T>*)a.normaliser)[at];
    t.D = t.rowsum = 0;
    if (pack_rows<T, S>(rows.template query<S>(p, i), 0, 1, p.E, s.Qp, BACK_ROWS, i, s.bad_q, T(p.scale))) *bad_q = true;
    if (a.d_output) {
      const S* dO = d_output(rows, i);
      const S* O = direct ? dO : (const S*)a.output + rows.b * a.output_s[0] + rows.h[i] * a.output_s[1] + rows.l[i] * a.output_s[2];
      Vec<T> sum{};
      T rest = 0;
      int64_t e = 0;
      for (; e + VL<T> <= p.Ev; e += VL<T>) sum += load_as(dO + e) * load_as(O + e);
      for (; e < p.Ev; e++) rest += T(to_float(dO[e])) * T(to_float(O[e]));
      if (!direct) t.D = hsum<T>(sum) + rest;
      load_factors<U>(dO, p.Ev, s.dO + i * depth_v);
      if (pack_rows<T, S>(dO, 0, 1, p.Ev, s.dOp, BACK_ROWS, i, s.bad_do)) *bad_do = true;
    }
    const bool dead = t.normaliser.m == -INF<T> && t.normaliser.l == t.normaliser.l;
    t.sink = p.sinks && !dead ? weight(((const T*)p.sinks)[rows.h[i]], t.normaliser) : T(0);
    t.d_entropy = a.d_entropy ? ((const T*)a.d_entropy)[at] : T(0);
    if (a.d_entropy && !direct) t.D += t.d_entropy * (((const T*)a.entropy)[at] - (T(1) - t.sink));
  }
}

// D += rowsum(P (dW + d_received)), by a pass over the keys.
template <class T, class S> void Backward<T, S>::scan_d(Scratch& s, const Head<T, U>& head) {
  const Rows<T>& rows = *s.rows;
  for (int64_t c0 = rows.lo_all / CHUNK * CHUNK; c0 < rows.hi_all; c0 += CHUNK) {
    s.rows->look(p, c0);
    score_chunk<U>(rows, depth_e, s.Q, depth_e, head.Kt + c0 * depth_e, c0, s.P, ldp, T(p.scale));
    for (int64_t i = 0; i < rows.n; i++) {
      const Span span = rows.span(i / MR, c0);
      if (span.a >= span.b) continue;
      T* P = s.P + i * ldp;
      weights_row(p, rows, i, c0, span, s.terms[i].normaliser, P);
      const int64_t end = min2(span.b, p.S - c0);
      T sum = 0;
      for (int64_t j = span.a; j < end; j++) {
        if (P[j] == T(0)) continue;
        T g = 0;
        if (a.d_weights) g += to_float(d_weights(rows, i, c0)[j]);
        if (a.d_received) g += received_weight(rows, i) * ((const T*)a.d_received)[(rows.b * p.Hq + rows.h[i]) * p.S + c0 + j];
        sum += P[j] * g;
      }
      s.terms[i].D += sum;
    }
  }
}

// From products in s.P and dO V^T in s.G: weights, as they met V, into s.P, dS' into s.G.
template <class T, class S> void Backward<T, S>::dscores_row(Scratch& s, int64_t i, int64_t c0, Span span) {
  const Rows<T>& rows = *s.rows;
  const RowTerms<T>& t = s.terms[i];
  T *P = s.P + i * ldp, *G = s.G + i * ldp, *log_p = s.line, *tanh_of = s.line + CHUNK;
  const bool hooks = a.d_entropy || a.d_received || a.d_weights || p.softcap != 0;
  weights_row(p, rows, i, c0, span, t.normaliser, P, hooks ? log_p : nullptr, p.softcap != 0 ? tanh_of : nullptr);
  T factor[CHUNK];
  if (p.dropout_p > 0) {
    dropout_row(p, rows, i, c0, span, factor);
    if (a.d_output) drop(G, factor, span);
  }
  if (hooks) {
    const int64_t end = min2(span.b, p.S - c0);
    if (!a.d_output) for (int64_t j = span.a; j < span.b; j++) G[j] = 0;
    if (a.d_weights) { const S* w = d_weights(rows, i, c0); for (int64_t j = span.a; j < end; j++) G[j] += T(to_float(w[j])); }
    if (a.d_received) {
      const T* g = (const T*)a.d_received + (rows.b * p.Hq + rows.h[i]) * p.S + c0;
      const T w = received_weight(rows, i);
      for (int64_t j = span.a; j < end; j++) G[j] += w * g[j];
    }
    if (a.d_entropy) for (int64_t j = span.a; j < span.b; j++) G[j] -= t.d_entropy * (log_p[j] + T(1));
  }
  const bool empty = !hooks && !a.d_output;
  Vec<T> sum{};
  for (int64_t j = span.a; j < span.b; j += VL<T>) {
    const Vec<T> w = load(P + j), g = empty ? Vec<T>{} : load(G + j), d = w == T(0) ? Vec<T>{} : w * (g - t.D);
    store(G + j, d);
    sum += d;
  }
  if (direct)
    for (int k = 0; k < VL<T>; k++) s.terms[i].rowsum += sum[k];
  if (a.dbias) {
    T* to = (T*)a.dbias + rows.flat(p, i) * p.S + c0;
    for (int64_t j = span.a; j < min2(span.b, p.S - c0); j++) to[j] = G[j];
  }
  if (p.softcap != 0)
    for (int64_t j = span.a; j < span.b; j += VL<T>) {
      const Vec<T> d = load(G + j), u = load(tanh_of + j);
      store(G + j, d == T(0) ? d : d * (T(1) - u * u));
    }
  if (p.dropout_p > 0) drop(P, factor, span);
}

// C[keys] += A^T B over the block's rows, keys [first, last) of the chunk, A columns by key.
template <class T, class S>
void Backward<T, S>::keys_product(const Rows<T>& rows, int64_t c0, int64_t first, int64_t last, const T* A, const T* B,
                                  int64_t cols, T* C, int64_t ldc) {
  for (int64_t j = first; j < last; j += MR) {
    const int64_t m = min2<int64_t>(MR, last - j);
    int64_t t0 = 0, t1 = rows.tiles;          // the tiles that see any of these keys; between them: zeros
    auto sees = [&](int64_t t) {
      return rows.tile_lo[t] < c0 + j + m && rows.tile_hi[t] > c0 + j && !(rows.hole(t, j) && rows.hole(t, j + m - 1));
    };
    while (t0 < t1 && !sees(t0)) t0++;
    while (t1 > t0 && !sees(t1 - 1)) t1--;
    if (t0 == t1) continue;
    const int64_t r0 = t0 * MR, r1 = min2(rows.n, t1 * MR);
    for (int64_t e = 0; e < cols; e += NR<T>) {
      const int64_t width = panel_width<T>(cols, e / NR<T>);
      gemm_tile<T>(int(m), int(width / VL<T>), r1 - r0, A + r0 * ldp + j, 1, ldp, B + e * BACK_ROWS + r0 * width, width,
                   C + j * ldc + e, ldc, true);
    }
  }
}

// One block of rows against all its keys.
template <class T, class S>
void Backward<T, S>::rows_task(Scratch& s, const Head<T, U>& head, int64_t hkv, T* dK, T* dV) {
  const Rows<T>& rows = *s.rows;
  bool bad_q, bad_do;
  load_rows(s, &bad_q, &bad_do);
  if (scan) scan_d(s, head);
  for (int64_t i = 0; i < rows.n; i++) {
    const int64_t at = rows.flat(p, i);
    RowTerms<T>& t = s.terms[i];
    if (a.d_lse) t.D -= ((const T*)a.d_lse)[at];
    if (a.dsinks)
      ((T*)a.dsinks)[at] = t.sink == T(0) ? T(0) : -t.sink * t.D;
  }
  memset(s.dQ, 0, sizeof(T) * size_t(rows.n * lde));
  for (int64_t c0 = rows.lo_all / CHUNK * CHUNK; c0 < rows.hi_all; c0 += CHUNK) {
    const int64_t first = (max2(rows.lo_all, c0) - c0) / NR<T> * NR<T>, stop = min2(rows.hi_all, c0 + CHUNK) - c0;
    const int64_t last = round_up(stop, NR<T>);
    s.rows->look(p, c0);
    score_chunk<U>(rows, depth_e, s.Q, depth_e, head.Kt + c0 * depth_e, c0, s.P, ldp, T(p.scale));
    if (a.d_output) score_chunk<U>(rows, depth_v, s.dO, depth_v, head.Vt + c0 * depth_v, c0, s.G, ldp, T(1));
    for (int64_t i = 0; i < rows.n; i++) {
      const Span span = rows.span(i / MR, c0);
      T *P = s.P + i * ldp, *G = s.G + i * ldp;
      const int64_t x = span.a < span.b ? span.a : last, y = span.a < span.b ? span.b : last;
      for (int64_t j = first; j < x; j++) P[j] = G[j] = 0;
      for (int64_t j = y; j < last; j++) P[j] = G[j] = 0;
      if (span.a < span.b) dscores_row(s, i, c0, span);
    }
    if (a.dv && a.d_output) {
      keys_product(rows, c0, first, stop, s.P, s.dOp, p.Ev, dV + c0 * ldv, ldv);
      if (bad_do) add_bad_rows<T, S>(stop - first, rows.n, s.P + first, 1, ldp, s.bad_do, d_output(rows, 0), a.d_output_s[2], p.Ev, T(1), dV + (c0 + first) * ldv, ldv);
    }
    if (a.dk) {
      keys_product(rows, c0, first, stop, s.G, s.Qp, p.E, dK + c0 * lde, lde);
      if (bad_q) add_bad_rows<T, S>(stop - first, rows.n, s.G + first, 1, ldp, s.bad_q, rows.template query<S>(p, 0), p.q_s[2], p.E, T(p.scale), dK + (c0 + first) * lde, lde);
    }
    if (!a.dq) continue;
    for (int64_t k0 = first / STEP * STEP; k0 < stop; k0 += STEP)
      for (int64_t e = 0; e < p.E; e += NR<T>)
        for (int64_t t = 0; t < rows.tiles; t++) {
          const Span span = rows.span(t, c0);
          const auto [x, y] = rows.without_holes(t, max2(span.a, k0), min2(min2(span.b, k0 + STEP), p.S - c0));
          if (x >= y) continue;
          const int64_t width = panel_width<T>(p.E, e / NR<T>);
          gemm_tile<T>(int(rows.tile_rows(t)), int(width / VL<T>), y - x, s.G + t * MR * ldp + x, ldp, 1,
                       head.K + e * padded + (c0 + x) * width, width, s.dQ + t * MR * lde + e, lde, true);
        }
    if (*head.any_bad)
      add_bad_rows<T, S>(rows.n, stop - first, s.G + first, ldp, 1, head.bad + c0 + first,
                         (const S*)p.k + rows.b * p.k_s[0] + hkv * p.k_s[1] + (c0 + first) * p.k_s[2], p.k_s[2], p.E, T(1), s.dQ, lde);
  }
  if (direct)
    for (int64_t i = 0; i < rows.n; i++) ((T*)a.minus_rowsum)[rows.flat(p, i)] = -s.terms[i].rowsum;
  if (a.dq)
    for (int64_t i = 0; i < rows.n; i++)
      write_row<T, S>((S*)a.dq + rows.flat(p, i) * p.E, s.dQ + i * lde, p.E, T(p.scale), false);
}

// dK and dV of keys [j0, j0 + CHUNK) of a head: those of its runs, added in order.
template <class T, class S> void Backward<T, S>::write_keys(int64_t head, int64_t j0, T* partials, int64_t runs) {
  auto write = [&](void* to, T* partial, int64_t ld, int64_t cols) {
    for (int64_t j = j0; j < min2(p.S, j0 + CHUNK); j++) {
      T* sum = partial + j * ld;
      for (int64_t r = 1; r < runs; r++)
        for (int64_t e = 0; e < ld; e += VL<T>) store(sum + e, load(sum + e) + load(sum + r * sums + e));
      write_row<T, S>((S*)to + (head * p.S + j) * cols, sum, cols, T(1), false);
    }
  };
  if (a.dk) write(a.dk, partials, lde, p.E);
  if (a.dv) write(a.dv, partials + k_sum, ldv, p.Ev);
}

template <class T, class S> int Backward<T, S>::run() {
  const int64_t G = p.Hq / max2<int64_t>(1, p.Hkv), heads = p.B * p.Hkv, threads = max2<int64_t>(1, p.num_threads);
  depth_e = depth<U>(p.E); depth_v = depth<U>(p.Ev);
  lde = round_up(p.E, VL<T>); ldv = round_up(p.Ev, VL<T>);
  padded = round_up(p.S, NR<T>); ldp = CHUNK + VL<T>;
  direct = a.minus_rowsum != nullptr;
  scan = !direct && (a.d_weights || a.d_received);
  const int64_t size = int64_t(sizeof(T));
  if (a.dbias) memset(a.dbias, 0, size_t(p.B * p.Hq * p.L * p.S * size));
  const int64_t per_head = ceil_div(p.L, BACK_ROWS), blocks = G * per_head;
  const int64_t runs = max2<int64_t>(1, min2(MAX_RUNS, min2(blocks, G * p.L / 1024)));
  k_sum = a.dk ? p.S * lde : 0;
  sums = k_sum + (a.dv ? p.S * ldv : 0);
  const int64_t wave = max2<int64_t>(1, min2(heads, max2(ceil_div(threads, runs), WAVE_BYTES / max2<int64_t>(1, size * runs * sums))));
  const double work = double(p.B) * p.Hq * p.L * p.S * (p.E + p.Ev);
  const int64_t kt = padded * depth_e, vt = a.d_output ? padded * depth_v : 0, kr = a.dq ? panel_floats<T>(p.E, padded) : 0;
  U *Kt, *Vt;
  T *K, *partials;
  uint8_t* bad;
  int32_t* any_bad;
  Workers<Scratch, Backward> workers(*this, work < 1e5 ? 1 : min2(threads, wave * runs));
  Workspace space;
  if (!space.get([&](Arena& arena) {
        Kt = arena.take<U>(wave * kt);
        Vt = arena.take<U>(wave * vt);
        K = arena.take<T>(wave * kr);
        bad = arena.take<uint8_t>(wave * padded);
        any_bad = arena.take<int32_t>(wave);
        partials = arena.take<T>(wave * runs * sums);
        workers.lay(arena);
      })) return 1;
  auto packed = [&](int64_t i) { return Head<T, U>{Kt + i * kt, Vt + i * vt, K + i * kr, bad + i * padded, any_bad + i}; };
  for (int64_t h0 = 0; h0 < heads; h0 += wave) {
    const int64_t count = min2(wave, heads - h0);
    memset(any_bad, 0, size_t(count) * sizeof(*any_bad));
    if (p.S > 0)
      run_tasks(p, count * 3, workers.count(), [&](int64_t t, int64_t) {
        const int64_t i = t / 3, b = (h0 + i) / p.Hkv, h = (h0 + i) % p.Hkv;
        const Head<T, U> to = packed(i);
        const S* k = (const S*)p.k + b * p.k_s[0] + h * p.k_s[1];
        if (t % 3 == 0) pack_transposed<U, S>(k, p.k_s[2], p.S, p.E, to.Kt);
        if (t % 3 == 1 && vt) pack_transposed<U, S>((const S*)p.v + b * p.v_s[0] + h * p.v_s[1], p.v_s[2], p.S, p.Ev, to.Vt);
        if (t % 3 == 2 && kr) *to.any_bad = pack_rows<T, S>(k, p.k_s[2], p.S, p.E, to.K, padded, 0, to.bad);
      });
    run_tasks(p, count * runs, workers.count(), [&](int64_t task, int64_t w) {
      const int64_t t = count * runs - 1 - task, i = t / runs, run = t % runs, hkv = (h0 + i) % p.Hkv;
      Scratch s = workers[w];
      T* sum = partials + t * sums;
      memset(sum, 0, size_t(sums * size));
      const int64_t from = blocks * run / runs, to = blocks * (run + 1) / runs;
      for (int64_t x = from; x < to; x++) {
        const int64_t l0 = x % per_head * BACK_ROWS;
        s.rows->set(p, (h0 + i) / p.Hkv, hkv, x / per_head * p.L + l0, min2(BACK_ROWS, p.L - l0), 0, p.S);
        rows_task(s, packed(i), hkv, sum, sum + k_sum);
      }
    });
    if (sums)
      run_tasks(p, count * ceil_div(p.S, CHUNK), workers.count(), [&](int64_t t, int64_t) {
        const int64_t i = t / ceil_div(p.S, CHUNK), j0 = t % ceil_div(p.S, CHUNK) * CHUNK;
        write_keys(h0 + i, j0, partials + i * runs * sums, runs);
      });
  }
  return 0;
}

}  // namespace

int backward(const attlas_problem& p, const attlas_backward_args& a) {
  switch (p.dtype) {
    case ATTLAS_F64: return Backward<double, double>(p, a).run();
    case ATTLAS_BF16: return Backward<float, bf16>(p, a).run();
    case ATTLAS_F16: return Backward<float, fp16>(p, a).run();
    default: return Backward<float, float>(p, a).run();
  }
}
}  // namespace attlas
