// forward.cpp: output, lse, dense weights, entropy, max and received, in one pass over the keys.
//
//   m = max score,  l = sum exp(score - m),  lse = m + log l  (with a sink: + exp(sink - m))
//   output = (sum exp(score - m) v) exp(m - lse),   weights = exp(score - m) exp(m - lse)
//
// With dropout, exponentials are dropped after they were summed and before they meet v; weights and
// `received` then are of a second pass.
//
// A task owns a block of query rows (or, with few rows and many keys, a split of the keys).
// Keys come in chunks of CHUNK: the block is scored into a buffer in L2, its rows turned into
// exponentials against the running maximum, and multiplied with V from the same buffer; a new
// maximum rescales what was summed (online softmax). When weights or `received` are wanted,
// the buffer holds whole rows and a last pass scales them with exp(m_chunk - lse).
//
// Numerics: chunks begin at multiples of CHUNK and every sum runs over a row alone in an order
// fixed by key positions, so a row's bits depend neither on threads, nor on the batch, nor on
// the block it falls in, nor on what else is asked.
#include "few.h"
#include "random.h"
#include "write.h"

namespace attlas {
namespace {

constexpr int64_t SPLIT_ROWS = 64;            // at most this many rows: split the keys
constexpr int64_t SPLIT_KEYS = 4096;
constexpr int64_t KEPT_BYTES = int64_t(1) << 20;   // rows kept whole stay in L2, with K and V chunks
constexpr int64_t LYING_ROWS = 64;            // at most this many rows: values are read where they lie
constexpr int64_t RECEIVED_GROUPS = 16;       // partial sums of `received` per head
constexpr int64_t PACKED_BYTES = int64_t(1) << 20;   // packed keys and values of a wave of heads

// Packed keys and values of one head, or of one chunk of it: key `base` is the first.
template <class T> struct Source {
  void* K;                                    // of Factor<T, S>
  T* V;
  uint8_t* bad;
  int64_t cap, base;
  int32_t* any_bad;
  const T* lying;                             // where given: value `base` unpacked, rows ld apart
  int64_t ld;
};

// Of one row: running maximum, sum of exponentials, sum of exponential * (score - m), key of m.
template <class T> struct State { T m, l, tilt; int64_t best; };
// Of a block of rows, an array each, so that VL rows are updated at once.
template <class T> struct States {
  T m[MAX_ROWS], l[MAX_ROWS], tilt[MAX_ROWS];
  int64_t best[MAX_ROWS];
  void clear(int64_t n) {
    for (int64_t i = 0; i < round_up(n, VL<T>); i++) { m[i] = -INF<T>; l[i] = tilt[i] = T(0); best[i] = -1; }
  }
  State<T> row(int64_t i) const { return {m[i], l[i], tilt[i], best[i]}; }
};

template <class T> struct Scratch {
  Rows<T>* rows;
  States<T>* state;
  T *Q, *P, *O, *chunk_max;
  Source<T> own;                              // for packing in the task itself
  int32_t own_bad;
};

template <class T, class S> class Forward {
  using U = Factor<T, S>;

 public:
  Forward(const attlas_problem& p, const attlas_forward_out& out) : p(p), out(out) {}
  int run();

 private:
  const attlas_problem& p;
  const attlas_forward_out& out;
  int64_t G, padded_keys, ldo, ldp, chunks, block, per_head, blocks, group_blocks, groups, splits;
  bool kept, flat, shared, big;
  Workspace ws;

  void pack(Source<T>& to, int64_t rows, int64_t b, int64_t h, int64_t k0, int64_t k1);
  void attend(Scratch<T>& s, const Source<T>* from, int64_t hkv, int64_t key0, int64_t key1);
  void attend_few(Scratch<T>& s, int64_t hkv, int64_t key0);
  void soften(Scratch<T>& s, int64_t i0, int64_t count, int64_t c0, const Span* spans, T* P);
  void drop_rows(const Rows<T>& rows, int64_t c0, const Span* span, T* P);
  void multiply(Scratch<T>& s, const Source<T>& from, int64_t hkv, int64_t c0, const T* P);
  void finish(Scratch<T>& s, T* received);
  void finish_tile(Scratch<T>& s, int64_t t, const T* inverse, T* received);
  void touch_weights(const Rows<T>& rows);
  void merge(Scratch<T>& s, const State<T>* states, const T* outputs);
};

template <class T, class S>
void Forward<T, S>::pack(Source<T>& to, int64_t rows, int64_t b, int64_t h, int64_t k0, int64_t k1) {
  const S* k = (const S*)p.k + b * p.k_s[0] + h * p.k_s[1];
  pack_transposed<U, S>(k + k0 * p.k_s[2], p.k_s[2], k1 - k0, p.E, (U*)to.K + (k0 - to.base) * depth<U>(p.E));
  if (!out.output) return;
  const S* v = (const S*)p.v + b * p.v_s[0] + h * p.v_s[1];
  if constexpr (std::is_same<T, S>::value)
    if (rows <= LYING_ROWS && p.Ev % VL<T> == 0 && all_finite<T>(v + k0 * p.v_s[2], p.v_s[2], k1 - k0, p.Ev)) {
      to.lying = v + k0 * p.v_s[2]; to.ld = p.v_s[2];
      return;
    }
  if (pack_rows<T, S>(v + k0 * p.v_s[2], p.v_s[2], k1 - k0, p.Ev, to.V, to.cap, k0 - to.base, to.bad))
    __atomic_store_n(to.any_bad, 1, __ATOMIC_RELAXED);
}

// Scores of rows [i0, i0 + count), count <= VL, become exponentials against their running
// maxima, which take them in together with the sums.
template <class T, class S>
void Forward<T, S>::soften(Scratch<T>& s, int64_t i0, int64_t count, int64_t c0, const Span* spans, T* P) {
  constexpr int64_t n = VL<T>;
  States<T>& st = *s.state;
  Vec<T> tops[n], sums[n] = {}, tilts[n] = {};
  for (int64_t x = 0; x < n; x++) tops[x] = splat<T>(-INF<T>);
  for (int64_t x = 0; x < count; x++) {
    if (spans[x].a >= spans[x].b) continue;
    finish_scores(p, *s.rows, i0 + x, c0, spans[x], P + x * ldp);
    tops[x] = row_max(P + x * ldp, spans[x]);
  }
  const Vec<T> top = max_across<T>(tops), old = load(st.m + i0), m = vmax(top, old), l = load(st.l + i0);
  const Mask<T> first = old == -INF<T>;       // nothing was summed yet
  const Vec<T> factor = first ? splat<T>(T(1)) : vexp<T>(old - m), shift = m == -INF<T> ? Vec<T>{} : m;
  T shifts[n], factors[n];
  store(shifts, shift);
  store(factors, factor);
  for (int64_t x = 0; x < count; x++) {
    if (spans[x].a >= spans[x].b) continue;
    if (out.max_key && top[x] > old[x]) st.best[i0 + x] = c0 + find_first(P + x * ldp, spans[x], T(top[x]));
    if (out.output && factors[x] != T(1)) {
      T* O = s.O + (i0 + x) * ldo;
      for (int64_t e = 0; e < ldo; e += n) store(O + e, load(O + e) * factors[x]);
    }
    sums[x] = out.entropy ? exp_row<T, true>(P + x * ldp, spans[x], shifts[x], tilts + x)
                          : exp_row<T, false>(P + x * ldp, spans[x], shifts[x], nullptr);
  }
  if (out.entropy) {
    const Vec<T> moved = load(st.tilt + i0) + l * (old - m);
    store(st.tilt + i0, (first | (factor == T(0)) ? Vec<T>{} : factor * moved) + sum_across<T>(tilts));
  }
  store(st.l + i0, l * factor + sum_across<T>(sums));
  store(st.m + i0, m);
}

// Dropout of the exponentials of the chunk, in columns `span`, or those of each row's tile.
template <class T, class S>
void Forward<T, S>::drop_rows(const Rows<T>& rows, int64_t c0, const Span* span, T* P) {
  T factor[CHUNK];
  for (int64_t i = 0; i < rows.n; i++) {
    const Span s = span ? *span : rows.span(i / MR, c0);
    dropout_row(p, rows, i, c0, s, factor);
    drop(P + i * ldp, factor, s);
  }
}

// O += P V for the chunk.
template <class T, class S>
void Forward<T, S>::multiply(Scratch<T>& s, const Source<T>& from, int64_t hkv, int64_t c0, const T* P) {
  const Rows<T>& rows = *s.rows;
  const int64_t first = max2(rows.lo_all, c0), last = min2(rows.hi_all, c0 + CHUNK);
  for (int64_t k0 = c0 + (first - c0) / STEP * STEP; k0 < last; k0 += STEP)
    for (int64_t e = 0; e < p.Ev; e += NR<T>) {
      const int64_t width = panel_width<T>(p.Ev, e / NR<T>);
      const int64_t ld = from.lying ? from.ld : width;
      const T* V = (from.lying ? from.lying + e : from.V + e * from.cap) + (k0 - from.base) * ld;
      for (int64_t t = 0; t < rows.tiles; t++) {
        const Span span = rows.span(t, c0);
        const Span seen = rows.without_holes(t, max2(span.a, k0 - c0), min2(min2(span.b, k0 + STEP - c0), p.S - c0));
        const int64_t a = seen.a + c0, b = seen.b + c0;
        if (a >= b) continue;
        gemm_tile<T>(int(rows.tile_rows(t)), int(width / VL<T>), b - a, P + t * MR * ldp + (a - c0), ldp, 1,
                     V + (a - k0) * ld, ld, s.O + t * MR * ldo + e, ldo, true);
      }
    }
  if (__builtin_expect(*from.any_bad, 0)) {
    const S* v = (const S*)p.v + rows.b * p.v_s[0] + hkv * p.v_s[1];
    for (int64_t t = 0; t < rows.tiles; t++) {
      const Span span = rows.span(t, c0);
      const int64_t a = span.a + c0, b = min2(span.b + c0, p.S);
      if (a < b) add_bad_rows<T, S>(rows.tile_rows(t), b - a, P + t * MR * ldp + span.a, ldp, 1, from.bad + (a - from.base),
                                    v + a * p.v_s[2], p.v_s[2], p.Ev, T(1), s.O + t * MR * ldo, ldo);
    }
  }
}

// First touch of fresh pages clears them (2 MiB at a time with huge pages) and so empties the
// cache; better here, before the block is scored, than when it is written.
template <class T, class S> void Forward<T, S>::touch_weights(const Rows<T>& rows) {
  for (int64_t i = 0; i < rows.n; i++) {
    volatile char* w = (volatile char*)((S*)out.weights + rows.b * out.weights_s[0] + rows.h[i] * out.weights_s[1] + rows.l[i] * out.weights_s[2]);
    for (int64_t at = 0; at < p.S * int64_t(sizeof(S)); at += 4096) w[at] = 0;
  }
}

// Runs the rows of s over keys [key0, key1). Without `from`, each chunk is packed here.
template <class T, class S>
void Forward<T, S>::attend(Scratch<T>& s, const Source<T>* from, int64_t hkv, int64_t key0, int64_t key1) {
  const Rows<T>& rows = *s.rows;
  if (out.weights && big) touch_weights(rows);
  U* const own = (U*)s.Q;
  const U* Q = own;
  const int64_t D = depth<U>(p.E);
  int64_t ldq = D;
  if constexpr (std::is_same<T, S>::value)    // where they lie, if they are rows of one head
    if (!flat) { Q = rows.template query<S>(p, 0); ldq = p.q_s[2]; }
  if (Q == own) load_queries<U, S>(p, rows, own);
  s.state->clear(rows.n);
  if (out.output) memset(s.O, 0, sizeof(T) * size_t(rows.n * ldo));
  for (int64_t c0 = key0 + (rows.lo_all - key0) / CHUNK * CHUNK; c0 < rows.hi_all; c0 += CHUNK) {
    Source<T> source;
    if (from) source = *from;
    else {
      source = s.own; source.base = c0; source.any_bad = &s.own_bad; s.own_bad = 0;
      pack(source, rows.n, rows.b, hkv, c0, min2(c0 + CHUNK, key1));
    }
    T* P = kept ? s.P + c0 : s.P;
    s.rows->look(p, c0);
    score_chunk<U>(rows, D, Q, ldq, (const U*)source.K + (c0 - source.base) * D, c0, P, ldp, T(p.scale));
    for (int64_t i = 0; i < rows.n; i += VL<T>) {
      const int64_t count = min2(VL<T>, rows.n - i);
      Span spans[VL<T>];
      for (int64_t x = 0; x < count; x++) spans[x] = rows.span((i + x) / MR, c0);
      soften(s, i, count, c0, spans, P + i * ldp);
    }
    if (kept) memcpy(s.chunk_max + c0 / CHUNK * MAX_ROWS, s.state->m, sizeof(T) * size_t(rows.n));
    if (!out.output) continue;
    if (p.dropout_p > 0) drop_rows(rows, c0, nullptr, P);
    multiply(s, source, hkv, c0, P);
  }
}

// The same for a few rows, from keys and values where they lie.
template <class T, class S>
void Forward<T, S>::attend_few(Scratch<T>& s, int64_t hkv, int64_t key0) {
  const Rows<T>& rows = *s.rows;
  const int64_t lde = round_up(p.E, VL<T>), n = rows.n;
  load_queries<T, S>(p, rows, s.Q);
  for (int64_t i = n - 1; i >= 0; i--) {      // spread the rows to lde, zero-padded
    memmove(s.Q + i * lde, s.Q + i * p.E, sizeof(T) * size_t(p.E));
    for (int64_t e = p.E; e < lde; e++) s.Q[i * lde + e] = 0;
  }
  s.state->clear(rows.n);
  if (out.output) memset(s.O, 0, sizeof(T) * size_t(n * ldo));
  const S* k = (const S*)p.k + rows.b * p.k_s[0] + hkv * p.k_s[1];
  const S* v = (const S*)p.v + rows.b * p.v_s[0] + hkv * p.v_s[1];
  for (int64_t c0 = key0 + (rows.lo_all - key0) / CHUNK * CHUNK; c0 < rows.hi_all; c0 += CHUNK) {
    const int64_t a = max2(rows.lo_all, c0) - c0, b = min2(rows.hi_all, c0 + CHUNK) - c0;
    score_few<T, S>(n, b - a, p.E, s.Q, lde, k + (c0 + a) * p.k_s[2], p.k_s[2], s.P + a, ldp, T(p.scale));
    Span spans[VL<T>];
    for (int64_t x = 0; x < VL<T>; x++) spans[x] = {a / NR<T> * NR<T>, round_up(b, NR<T>)};
    for (int64_t i = 0; i < n; i += VL<T>) soften(s, i, min2(VL<T>, n - i), c0, spans, s.P + i * ldp);
    if (!out.output) continue;
    if (p.dropout_p > 0) drop_rows(rows, c0, spans, s.P);
    T* sum = s.own.V;                         // no packed values here: room for one chunk's sum
    multiply_few<T, S>(n, b - a, p.Ev, s.P + a, ldp, v + (c0 + a) * p.v_s[2], p.v_s[2], sum, ldo);
    for (int64_t e = 0; e < n * ldo; e += VL<T>) store(s.O + e, load(s.O + e) + load(sum + e));
  }
}

// Writes everything that the block owns.
template <class T, class S> void Forward<T, S>::finish(Scratch<T>& s, T* received) {
  const Rows<T>& rows = *s.rows;
  T inverse[MAX_ROWS];                        // exp(m - lse), the factor of the exponentials
  for (int64_t i = 0; i < rows.n; i++) {
    const State<T> st = s.state->row(i);
    const int64_t at = rows.flat(p, i);
    const bool dead = st.l == T(0);
    T m = st.m, l = st.l, up = T(1);          // up = exp(m - top): 1 unless the sink is higher
    if (p.sinks && !dead) {
      const T sink = ((const T*)p.sinks)[rows.h[i]];
      if (sink > m) { up = std::exp(m - sink); l = l * up + T(1); m = sink; }
      else l += std::exp(sink - m);
    }
    const T log_l = out.lse || out.entropy ? std::log(l) : T(0);
    inverse[i] = dead ? T(0) : up / l;
    if (out.lse) ((T*)out.lse)[at] = dead ? -INF<T> : m + log_l;
    if (out.entropy)                          // -sum w log w,  log w = (s - m_row) + (m_row - m) - log l
      ((T*)out.entropy)[at] = inverse[i] == T(0) ? T(0) : inverse[i] * (st.l * (log_l + (m - st.m)) - st.tilt);
    if (out.max_value) ((T*)out.max_value)[at] = inverse[i];
    if (out.max_key) out.max_key[at] = dead ? -1 : st.best;
    if (out.output)
      write_row<T, S>((S*)out.output + rows.b * out.output_s[0] + rows.h[i] * out.output_s[1] + rows.l[i] * out.output_s[2],
                      s.O + i * ldo, p.Ev, inverse[i], false);
  }
  if (!kept) return;
  for (int64_t t = 0; t < rows.tiles; t++) finish_tile(s, t, inverse, received);
  if (big) stream_fence();
}

// Weights and column sums of one tile of rows, from exponentials still in the cache.
template <class T, class S>
void Forward<T, S>::finish_tile(Scratch<T>& s, int64_t t, const T* inverse, T* received) {
  const Rows<T>& rows = *s.rows;
  const int64_t n = rows.tile_rows(t), r0 = t * MR;
  for (int64_t c0 = 0; c0 < p.S; c0 += CHUNK) {
    const Span span = rows.span(t, c0);
    const int64_t width = min2(CHUNK, p.S - c0), a = span.a, b = min2(span.b, width);
    T factor[MR];
    bool finite = true;
    for (int64_t i = 0; i < n && a < b; i++) {
      const State<T> st = s.state->row(r0 + i);
      const T m = s.chunk_max[c0 / CHUNK * MAX_ROWS + r0 + i];
      factor[i] = m == -INF<T> ? (st.l == st.l ? T(0) : st.l) : m == st.m ? inverse[r0 + i] : std::exp(m - st.m) * inverse[r0 + i];
      finite = finite && factor[i] - factor[i] == T(0);
    }
    T* P = s.P + r0 * ldp + c0;
    if (!finite)                              // a NaN row: NaN where allowed, 0 where masked
      for (int64_t i = 0; i < n; i++)
        if (factor[i] - factor[i] != T(0)) {
          for (int64_t j = a; j < b; j++) P[i * ldp + j] = allowed(p, rows, r0 + i, c0 + j) ? T(NAN) : T(0);
          factor[i] = T(1);
        }
    if (received && a < b) add_columns<T>(received + c0, P, ldp, n, factor, a, b);
    if (out.weights)
      for (int64_t i = 0; i < n; i++) {
        S* w = (S*)out.weights + rows.b * out.weights_s[0] + rows.h[r0 + i] * out.weights_s[1] + rows.l[r0 + i] * out.weights_s[2] + c0;
        if (a >= b) { write_zeros(w, width, big); continue; }
        if (a > 0) write_zeros(w, a, big);
        write_row<T, S>(w + a, P + i * ldp + a, b - a, factor[i], big);
        if (b < width) write_zeros(w + b, width - b, big);
      }
  }
}

// Joins the states of the splits, in their order, into split 0's place.
template <class T, class S>
void Forward<T, S>::merge(Scratch<T>& s, const State<T>* states, const T* outputs) {
  const int64_t n = s.rows->n;
  for (int64_t i = 0; i < n; i++) {
    T m = -INF<T>;
    State<T> total = {-INF<T>, T(0), T(0), -1};
    for (int64_t x = 0; x < splits; x++) if (states[x * n + i].m > m) { m = states[x * n + i].m; total.best = states[x * n + i].best; }
    T* O = s.O + i * ldo;
    memset(O, 0, sizeof(T) * size_t(ldo));
    for (int64_t x = 0; x < splits; x++) {
      const State<T>& st = states[x * n + i];
      if (st.l == T(0)) continue;             // nothing allowed in this split
      const T f = st.m == -INF<T> ? T(1) : std::exp(st.m - m);   // T(1): NaN goes on
      if (f != T(0)) total.tilt += f * (st.m == -INF<T> ? st.tilt : st.tilt + st.l * (st.m - m));
      total.l += f * st.l;
      if (out.output) for (int64_t e = 0; e < ldo; e += VL<T>) store(O + e, load(O + e) + load(outputs + (x * n + i) * ldo + e) * f);
    }
    s.state->m[i] = m; s.state->l[i] = total.l; s.state->tilt[i] = total.tilt; s.state->best[i] = total.best;
  }
}

// True when whole rows would not fit the cache, there are too few rows to share out, or dropout
// overwrites them: then
// weights and `received` are read in a second pass, and the output keeps its bits.
bool needs_second_pass(const attlas_problem& p, int64_t size) {
  return p.dropout_p > 0 || (p.Hq / p.Hkv * p.L <= SPLIT_ROWS && p.S > SPLIT_KEYS) || p.S * size * 4 * MR > 3 * KEPT_BYTES;
}

template <class T, class S> int Forward<T, S>::run() {
  if (p.B * p.Hq * p.L == 0) return 0;
  G = p.Hq / p.Hkv;
  padded_keys = round_up(p.S, NR<T>);
  ldo = round_up(p.Ev, VL<T>);
  chunks = ceil_div(p.S, CHUNK);
  kept = out.weights || out.received;
  const int64_t heads = p.B * p.Hkv, threads = max2<int64_t>(1, p.num_threads);
  splits = G * p.L <= SPLIT_ROWS && p.S > SPLIT_KEYS ? ceil_div(p.S, SPLIT_KEYS) : 1;
  flat = splits > 1 || (G > 1 && p.L < 48 && !out.received);
  big = double(p.B) * p.Hq * p.L * p.S * sizeof(S) > (1 << 22);
  // Rows in a block: as many as keep the buffer in L2, and enough blocks to share out.
  const int64_t per = flat ? G * p.L : p.L;
  block = kept ? max2<int64_t>(4 * MR, min2(MAX_ROWS, KEPT_BYTES / (int64_t(sizeof(T)) * (padded_keys + 1)) / MR * MR)) : MAX_ROWS;
  if (!kept) while (block > 8 * MR && heads * (flat ? 1 : G) * ceil_div(per, block) < 4 * threads) block -= 4 * MR;
  per_head = max2<int64_t>(1, ceil_div(per, block));
  blocks = flat ? per_head : G * per_head;
  group_blocks = out.received ? ceil_div(per_head, RECEIVED_GROUPS) : 1;
  groups = ceil_div(per_head, group_blocks);
  ldp = (kept ? round_up(p.S, CHUNK) : CHUNK) + VL<T>;
  const int64_t rows_max = splits > 1 ? per : min2(per, block);
  const int64_t units = splits > 1 ? splits : blocks / per_head * groups;   // tasks per key/value head
  shared = units > 1 && splits == 1;          // several tasks read the same packed head
  const double work = double(p.B) * p.Hq * p.L * p.S * (p.E + p.Ev);
  const int64_t workers = work < 2e5 ? 1 : min2(threads, heads * units);

  const int64_t states_at = splits > 1 ? ws.take(heads * splits * G * p.L * int64_t(sizeof(State<T>))) : 0;
  const int64_t outputs_at = splits > 1 ? ws.take(heads * splits * G * p.L * ldo * int64_t(sizeof(T))) : 0;
  const int64_t partial_at = out.received ? ws.take(p.B * p.Hq * groups * p.S * int64_t(sizeof(T))) : 0;
  const int64_t own = shared ? 0 : CHUNK, head_k = padded_keys * depth<U>(p.E), head_v = out.output ? panel_floats<T>(p.Ev, padded_keys) : 0;
  // Heads at a time: enough for all threads, then as few as their packed keys and values are large.
  const int64_t least = max2(4 * threads, PACKED_BYTES / (int64_t(sizeof(T)) * (head_k + head_v) + 1));
  const int64_t wave = shared ? min2(heads, least) : heads;
  const int64_t k_at = shared ? ws.take(wave * head_k * int64_t(sizeof(T))) : 0;
  const int64_t v_at = shared ? ws.take(wave * head_v * int64_t(sizeof(T))) : 0;
  const int64_t bad_at = shared ? ws.take(wave * padded_keys) : 0, any_at = shared ? ws.take(wave * 4) : 0;
  Workspace per_worker;
  const int64_t at[] = {per_worker.take(sizeof(Rows<T>)), per_worker.take(sizeof(States<T>)),
      per_worker.take(int64_t(sizeof(T)) * rows_max * round_up(p.E, VL<T>)), per_worker.take(int64_t(sizeof(T)) * (rows_max * ldp + VL<T>)),
      per_worker.take(int64_t(sizeof(T)) * rows_max * ldo), per_worker.take(kept ? int64_t(sizeof(T)) * chunks * MAX_ROWS : 0),
      per_worker.take(int64_t(sizeof(T)) * own * depth<U>(p.E)), per_worker.take(int64_t(sizeof(T)) * panel_floats<T>(p.Ev, own)),
      per_worker.take(own)};
  const int64_t worker_bytes = per_worker.take(0), scratch_at = ws.take(worker_bytes * workers);
  if (!ws.get()) return 1;
  for (int64_t w = 0; w < workers; w++) ws.guard(per_worker, scratch_at + w * worker_bytes);

  auto scratch = [&](int64_t w) {
    const int64_t base = scratch_at + w * worker_bytes;
    Scratch<T> s;
    s.rows = ws.at<Rows<T>>(base + at[0]); s.state = ws.at<States<T>>(base + at[1]);
    s.Q = ws.at<T>(base + at[2]); s.P = ws.at<T>(base + at[3]); s.O = ws.at<T>(base + at[4]);
    s.chunk_max = ws.at<T>(base + at[5]);
    s.own = {ws.at<U>(base + at[6]), ws.at<T>(base + at[7]), ws.at<uint8_t>(base + at[8]), CHUNK, 0, nullptr, nullptr, 0};
    return s;
  };
  auto source = [&](int64_t i) {              // of head i of the wave
    return Source<T>{ws.at<U>(k_at) + i * head_k, ws.at<T>(v_at) + i * head_v, ws.at<uint8_t>(bad_at) + i * padded_keys,
                     padded_keys, 0, ws.at<int32_t>(any_at) + i, nullptr, 0};
  };
  if (splits > 1) {
    const int64_t n = G * p.L;
    run_tasks(p, heads * splits, workers, [&](int64_t t, int64_t w) {
      const int64_t head = t / splits, k0 = t % splits * SPLIT_KEYS, k1 = min2(p.S, k0 + SPLIT_KEYS);
      Scratch<T> s = scratch(w);
      s.rows->set(p, head / p.Hkv, head % p.Hkv, 0, n, k0, k1);
      if (n <= FEW_ROWS) attend_few(s, head % p.Hkv, k0);
      else attend(s, nullptr, head % p.Hkv, k0, k1);
      for (int64_t i = 0; i < n; i++) ws.at<State<T>>(states_at)[t * n + i] = s.state->row(i);
      if (out.output) memcpy(ws.at<T>(outputs_at) + t * n * ldo, s.O, sizeof(T) * size_t(n * ldo));
    });
    run_tasks(p, heads, 1, [&](int64_t head, int64_t w) {
      Scratch<T> s = scratch(w);
      s.rows->set(p, head / p.Hkv, head % p.Hkv, 0, n, 0, p.S);
      merge(s, ws.at<State<T>>(states_at) + head * splits * n, ws.at<T>(outputs_at) + head * splits * n * ldo);
      finish(s, nullptr);
    });
    return 0;
  }
  for (int64_t h0 = 0; h0 < heads; h0 += wave) {
    const int64_t count = min2(wave, heads - h0);
    if (shared && p.S > 0) {
      const int64_t per_pack = min2<int64_t>(chunks, 8), span = ceil_div(chunks, per_pack) * CHUNK;
      memset(ws.at<int32_t>(any_at), 0, size_t(count) * 4);
      run_tasks(p, count * per_pack, workers, [&](int64_t t, int64_t) {
        const int64_t i = t / per_pack, k0 = t % per_pack * span;
        Source<T> to = source(i);
        if (k0 < p.S) pack(to, MAX_ROWS, (h0 + i) / p.Hkv, (h0 + i) % p.Hkv, k0, min2(p.S, k0 + span));
      });
    }
    run_tasks(p, count * units, workers, [&](int64_t task, int64_t w) {
      const int64_t t = count * units - 1 - task;   // later rows first: with a causal mask they are the longer
      const int64_t b = (h0 + t / units) / p.Hkv, hkv = (h0 + t / units) % p.Hkv, unit = t % units;
      const int64_t g = unit / groups, group = unit % groups;
      Scratch<T> s = scratch(w);
      const Source<T> from = source(t / units);
      T* received = nullptr;
      if (out.received) {
        received = ws.at<T>(partial_at) + ((b * p.Hq + hkv * G + g) * groups + group) * p.S;
        memset(received, 0, sizeof(T) * size_t(p.S));
      }
      for (int64_t i = group * group_blocks; i < min2(per_head, (group + 1) * group_blocks); i++) {
        s.rows->set(p, b, hkv, g * p.L + i * block, min2(block, per - i * block), 0, p.S);
        attend(s, shared ? &from : nullptr, hkv, 0, p.S);
        finish(s, received);
      }
    });
  }
  if (out.received)
    run_tasks(p, p.B * p.Hq, workers, [&](int64_t head, int64_t) {
      sum_partials((T*)out.received + head * p.S, ws.at<T>(partial_at) + head * groups * p.S, groups, p.S);
    });
  return 0;
}

}  // namespace

int read(const attlas_problem&, const attlas_readout&);

template <class T, class S> static int forward_as(const attlas_problem& p, const attlas_forward_out& out) {
  if (!(out.weights || out.received) || !needs_second_pass(p, sizeof(T))) return Forward<T, S>(p, out).run();
  attlas_forward_out first = out;
  first.weights = first.received = nullptr;
  void* own = nullptr;
  if (!out.lse) first.lse = own = malloc(sizeof(T) * size_t(p.B * p.Hq * p.L + 1));
  if (!first.lse || Forward<T, S>(p, first).run()) { free(own); return 1; }
  attlas_readout r = {};
  r.lse = first.lse; r.row1 = p.L; r.key1 = p.S;
  r.weights = out.weights; r.received = out.received;
  for (int i = 0; i < 3; i++) r.weights_s[i] = out.weights_s[i];
  const int failed = read(p, r);
  free(own);
  return failed;
}

int forward(const attlas_problem& p, const attlas_forward_out& out) {
  switch (p.dtype) {
    case ATTLAS_F64: return forward_as<double, double>(p, out);
    case ATTLAS_BF16: return forward_as<float, bf16>(p, out);
    case ATTLAS_F16: return forward_as<float, fp16>(p, out);
    default: return forward_as<float, float>(p, out);
  }
}
}  // namespace attlas
