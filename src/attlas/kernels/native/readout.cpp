// readout.cpp: what is asked of the weights later, from q, k and lse alone; v is not read.
//
//   W[i, j] = exp(score[i, j] - lse[i])    for queries [row0, row1) and keys [key0, key1)
//
//   by rows:  entropy -sum_j W log W | max and its key | top-k | W x | pooled max and mass | W
//   by keys:  received sum_i r_i W[i, j] | max_i W[i, j] | W^T y
//
// A task of the row pass owns a run of query rows and goes over the keys; a task of the key
// pass owns a few panels of keys and goes over the rows. So no sum is ever shared, and no
// result depends on threads. Asking for both kinds costs both passes.
//
// An empty row (lse -inf) gives entropy 0, max 0 with key -1, top-k 0 with keys -1, mass 0.
// Top-k and max order by score, then by the lower key. NaN scores are not ranked.
#include "score.h"
#include "write.h"

namespace attlas {
namespace {

template <class T> struct Best { T score; int64_t key; };

template <class T, class S> class Read {
  using U = Factor<T, S>;

 public:
  Read(const attlas_problem& p, const attlas_readout& r) : p(p), r(r) {}
  int run() {
    if (p.B * p.Hq == 0) return 0;
    clear();
    if (r.row1 <= r.row0 || r.key1 <= r.key0) return 0;
    if (r.entropy || r.max_value || r.max_key || r.topk_value || r.topk_key || r.wx || r.pool_max || r.pool_mass || r.weights)
      if (row_pass()) return 1;
    if (r.received || r.received_max || r.wty) return key_pass();
    return 0;
  }

 private:
  struct Scratch {
    Rows<T>* rows;
    U *Q, *K;
    T *P, *O, *line, *entropy;
    Best<T>* best;
    uint8_t* bad;
  };
  const attlas_problem& p;
  const attlas_readout& r;
  int64_t n_rows() const { return r.row1 - r.row0; }
  int64_t n_keys() const { return r.key1 - r.key0; }
  int64_t base() const { return r.key0 / NR<T> * NR<T>; }   // chunks begin on a panel
  const S* key(int64_t b, int64_t h, int64_t j) const { return (const S*)p.k + b * p.k_s[0] + h * p.k_s[1] + j * p.k_s[2]; }
  T lse(const Rows<T>& rows, int64_t i) const { return ((const T*)r.lse)[rows.flat(p, i)]; }
  // Place of row i in outputs that hold the tile's rows only.
  int64_t at(const Rows<T>& rows, int64_t i) const { return (rows.b * p.Hq + rows.h[i]) * n_rows() + rows.l[i] - r.row0; }

  void clear();
  int row_pass();
  int key_pass();
  void rank(Scratch& s, int64_t i, int64_t c0, Span span, const T* P, int64_t k);
  void read_rows(Scratch& s, int64_t c0, const T* X, const uint8_t* bad, bool any_bad, bool big);
  void pool(Scratch& s, int64_t c0, int64_t t, Span span);
  void finish_rows(Scratch& s);
};

template <class T, class S> void Read<T, S>::clear() {
  const int64_t heads = p.B * p.Hq, size = int64_t(sizeof(T)), nr = max2<int64_t>(0, n_rows()), nk = max2<int64_t>(0, n_keys());
  const bool none = nr == 0 || nk == 0;
  auto zero = [](void* to, int64_t bytes) { if (to) memset(to, 0, size_t(bytes)); };
  if (r.cell_rows > 0 && r.cell_keys > 0) {
    const int64_t cells = ceil_div(nr, r.cell_rows) * ceil_div(nk, r.cell_keys);
    zero(r.pool_max, heads * cells * size);
    zero(r.pool_mass, heads * cells * size);
  }
  if (!none) return;
  zero(r.entropy, heads * nr * size); zero(r.max_value, heads * nr * size); zero(r.topk_value, heads * nr * r.k * size);
  zero(r.received, heads * nk * size); zero(r.received_max, heads * nk * size);
  zero(r.wx, heads * nr * r.F * size); zero(r.wty, heads * nk * r.F * size);
  if (r.max_key) for (int64_t i = 0; i < heads * nr; i++) r.max_key[i] = -1;
  if (r.topk_key) for (int64_t i = 0; i < heads * nr * r.k; i++) r.topk_key[i] = -1;
}

// Keeps the k best scores of row i, sorted, in s.best[i k ...].
template <class T, class S> void Read<T, S>::rank(Scratch& s, int64_t i, int64_t c0, Span span, const T* P, int64_t k) {
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
template <class T, class S> void Read<T, S>::pool(Scratch& s, int64_t c0, int64_t t, Span span) {
  const Rows<T>& rows = *s.rows;
  const int64_t ldp = CHUNK + VL<T>, cells = ceil_div(n_keys(), r.cell_keys), bands = ceil_div(n_rows(), r.cell_rows);
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

// One chunk for the row pass: products in s.P become weights, and every reader takes its part.
template <class T, class S>
void Read<T, S>::read_rows(Scratch& s, int64_t c0, const T* X, const uint8_t* bad, bool any_bad, bool big) {
  const Rows<T>& rows = *s.rows;
  const int64_t ldp = CHUNK + VL<T>, ldo = round_up(r.F, VL<T>);
  const int64_t from = max2(r.key0, c0) - c0, until = min2(r.key1, c0 + CHUNK) - c0;
  const bool ranked = r.topk_value || r.topk_key || r.max_value || r.max_key, top = r.topk_value || r.topk_key;
  for (int64_t i = 0; i < rows.n; i++) {
    const Span span = rows.span(i / MR, c0);
    T* P = s.P + i * ldp;
    if (span.a < span.b) {
      const T shift = lse(rows, i);
      if (ranked) {                           // finished here, so that scores can be ranked
        finish_scores(p, rows, i, c0, span, P);
        rank(s, i, c0, span, P, top ? r.k : 1);
        if (shift != shift) for (int64_t j = span.a; j < span.b; j++) P[j] = s.line[j] = P[j] == -INF<T> ? T(0) : shift;
        else for (int64_t j = span.a; j < span.b; j += VL<T>) {
          const Vec<T> x = load(P + j) - (shift == -INF<T> ? T(0) : shift);
          store(s.line + j, x);
          store(P + j, vexp<T>(x));
        }
      } else weights_row(p, rows, i, c0, span, shift, P, r.entropy ? s.line : nullptr);
      if (r.entropy) {
        Vec<T> sum{};
        for (int64_t j = span.a; j < span.b; j += VL<T>) {
          const Vec<T> w = load(P + j), term = w * load(s.line + j);
          sum -= w == T(0) ? Vec<T>{} : term;
        }
        s.entropy[i] += hsum<T>(sum);
      }
    }
    if (r.weights) {
      S* w = (S*)r.weights + rows.b * r.weights_s[0] + rows.h[i] * r.weights_s[1] + (rows.l[i] - r.row0) * r.weights_s[2] + c0 - r.key0;
      const int64_t a = span.a < span.b ? max2(span.a, from) : until, b = span.a < span.b ? min2(span.b, until) : until;
      write_zeros(w + from, a - from, big);
      write_row<T, S>(w + a, P + a, b - a, T(1), big);
      write_zeros(w + b, until - b, big);
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
      gemm_tile<T>(int(n), int(width / VL<T>), b - a, P, ldp, 1, X + e * n_keys() + x0 * width, width, s.O + t * MR * ldo + e, ldo, true);
    }
    if (any_bad)
      add_bad_rows<T, T>(n, b - a, P, ldp, 1, bad + x0, (const T*)r.x + ((rows.b * p.Hq + rows.h[0]) * n_keys() + x0) * r.F, r.F, r.F, T(1),
                         s.O + t * MR * ldo, ldo);
  }
}

template <class T, class S> void Read<T, S>::finish_rows(Scratch& s) {
  const Rows<T>& rows = *s.rows;
  const bool top = r.topk_value || r.topk_key;
  const int64_t k = top ? r.k : 1, ldo = round_up(r.F, VL<T>);
  for (int64_t i = 0; i < rows.n; i++) {
    const int64_t to = at(rows, i);
    const T l = lse(rows, i);
    const bool dead = l == -INF<T>;
    auto value = [&](const Best<T>& b) { return dead ? T(0) : b.key < 0 ? (l != l ? l : T(0)) : std::exp(b.score - l); };
    if (r.entropy) ((T*)r.entropy)[to] = s.entropy[i] < T(0) ? T(0) : s.entropy[i];   // log 1 may round up
    if (r.max_value) ((T*)r.max_value)[to] = value(s.best[i * k]);
    if (r.max_key) r.max_key[to] = dead ? -1 : s.best[i * k].key;
    for (int64_t x = 0; top && x < k; x++) {
      if (r.topk_value) ((T*)r.topk_value)[to * k + x] = value(s.best[i * k + x]);
      if (r.topk_key) r.topk_key[to * k + x] = dead ? -1 : s.best[i * k + x].key;
    }
    if (r.wx) write_row<T, T>((T*)r.wx + to * r.F, s.O + i * ldo, r.F, T(1), false);
  }
}

template <class T, class S> int Read<T, S>::row_pass() {
  const int64_t G = p.Hq / p.Hkv, heads = p.B * p.Hkv, threads = max2<int64_t>(1, p.num_threads), size = int64_t(sizeof(T));
  const bool pooled = (r.pool_max || r.pool_mass) && r.cell_rows > 0 && r.cell_keys > 0;
  const bool top = r.topk_value || r.topk_key;
  const int64_t D = depth<U>(p.E);
  int64_t block = MAX_ROWS;
  while (block > 4 * MR && p.B * p.Hq * ceil_div(n_rows(), block) < 4 * threads) block -= 2 * MR;
  // A task's rows are whole bands of cells, so that no cell is shared; how many depends on the cell
  // alone, and so does the order of its sum.
  const int64_t run = pooled ? max2<int64_t>(1, 8 * MR / r.cell_rows) * r.cell_rows : block;
  block = min2(block, run);
  const int64_t runs = ceil_div(n_rows(), run), units = G * runs;
  const bool shared = units > 2;
  const int64_t rows_max = min2(block, n_rows()), ldo = round_up(r.F, VL<T>), ldp = CHUNK + VL<T>;
  const int64_t padded = round_up(r.key1 - base(), NR<T>), head_k = padded * D, head_x = r.wx ? panel_floats<T>(r.F, n_keys()) : 0;
  const double work = double(p.B) * p.Hq * n_rows() * n_keys() * (p.E + r.F + 8);
  const int64_t workers = work < 2e5 ? 1 : min2(threads, heads * units);
  const bool big = double(p.B) * p.Hq * n_rows() * n_keys() * sizeof(S) > (1 << 22);

  Workspace ws, mine;
  const int64_t k_at = shared ? ws.take(heads * head_k * size) : 0, x_at = ws.take(p.B * p.Hq * head_x * size);
  const int64_t bad_at = r.wx ? ws.take(p.B * p.Hq * n_keys()) : 0, any_at = ws.take(p.B * p.Hq * 4);
  const int64_t offs[] = {mine.take(sizeof(Rows<T>)), mine.take(size * rows_max * D), mine.take(size * rows_max * ldp), mine.take(size * rows_max * ldo),
      mine.take(shared ? 0 : size * CHUNK * D), mine.take(size * 2 * CHUNK), mine.take(size * rows_max),
      mine.take(int64_t(sizeof(Best<T>)) * rows_max * (top ? r.k : 1))};
  const int64_t worker_bytes = mine.take(0), scratch_at = ws.take(worker_bytes * workers);
  if (!ws.get()) return 1;
  for (int64_t w = 0; w < workers; w++) ws.guard(mine, scratch_at + w * worker_bytes);
  memset(ws.at<int32_t>(any_at), 0, size_t(p.B * p.Hq) * 4);
  if (shared) {
    const int64_t parts = min2<int64_t>(8, ceil_div(padded, CHUNK)), step = round_up(ceil_div(padded, parts), NR<T>);
    run_tasks(p, heads * parts, workers, [&](int64_t t, int64_t) {
      const int64_t head = t / parts, j0 = base() + t % parts * step, j1 = min2(r.key1, j0 + step);
      if (j0 < j1) pack_transposed<U, S>(key(head / p.Hkv, head % p.Hkv, j0), p.k_s[2], j1 - j0, p.E, ws.at<U>(k_at) + head * head_k + (j0 - base()) * D);
    });
  }
  if (r.wx)
    run_tasks(p, p.B * p.Hq, workers, [&](int64_t h, int64_t) {
      ws.at<int32_t>(any_at)[h] = pack_rows<T, T>((const T*)r.x + h * n_keys() * r.F, r.F, n_keys(), r.F, ws.at<T>(x_at) + h * head_x, n_keys(), 0,
                                                  ws.at<uint8_t>(bad_at) + h * n_keys());
    });
  run_tasks(p, heads * units, workers, [&](int64_t task, int64_t w) {
    const int64_t t = heads * units - 1 - task, head = t / units, g = t % units / runs, first = t % runs * run, b = head / p.Hkv, hkv = head % p.Hkv;
    const int64_t o = scratch_at + w * worker_bytes, k = top ? r.k : 1, qh = b * p.Hq + hkv * G + g;
    Scratch s{ws.at<Rows<T>>(o + offs[0]), ws.at<U>(o + offs[1]), ws.at<U>(o + offs[4]), ws.at<T>(o + offs[2]), ws.at<T>(o + offs[3]),
              ws.at<T>(o + offs[5]), ws.at<T>(o + offs[6]), ws.at<Best<T>>(o + offs[7]), nullptr};
    for (int64_t l = first; l < min2(n_rows(), first + run); l += block) {
      Rows<T>& rows = *s.rows;
      rows.set(p, b, hkv, g * p.L + r.row0 + l, min2(block, min2(n_rows(), first + run) - l), r.key0, r.key1);
      load_queries<U, S>(p, rows, s.Q);
      for (int64_t i = 0; i < rows.n * k; i++) s.best[i] = {-INF<T>, -1};
      for (int64_t i = 0; i < rows.n; i++) s.entropy[i] = 0;
      if (r.wx) memset(s.O, 0, size_t(rows.n * ldo * size));
      // Dense weights are written everywhere; anything else needs the allowed keys alone.
      const int64_t from = r.weights ? base() : base() + (rows.lo_all - base()) / CHUNK * CHUNK, until = r.weights ? r.key1 : rows.hi_all;
      for (int64_t c0 = from; c0 < until; c0 += CHUNK) {
        const U* K = shared ? ws.at<U>(k_at) + head * head_k + (c0 - base()) * D : s.K;
        if (!shared) pack_transposed<U, S>(key(b, hkv, c0), p.k_s[2], min2(CHUNK, r.key1 - c0), p.E, s.K);
        rows.look(p, c0);
        score_chunk<U>(rows, D, s.Q, D, K, c0, s.P, ldp, T(p.scale));
        read_rows(s, c0, ws.at<T>(x_at) + qh * head_x, ws.at<uint8_t>(bad_at) + qh * n_keys(), ws.at<int32_t>(any_at)[qh] != 0, big);
      }
      finish_rows(s);
      if (big) stream_fence();
    }
  });
  return 0;
}

template <class T, class S> int Read<T, S>::key_pass() {
  const int64_t G = p.Hq / p.Hkv, heads = p.B * p.Hkv, threads = max2<int64_t>(1, p.num_threads), size = int64_t(sizeof(T));
  int64_t width = CHUNK;                      // keys of a task; results do not depend on it
  const int64_t keys = r.key1 - base();
  while (width > NR<T> && heads * ceil_div(keys, width) < 4 * threads) width /= 2;
  width = max2(width, NR<T>);
  const int64_t units = ceil_div(keys, width), ldp = CHUNK + VL<T>, ldf = round_up(r.F, VL<T>), F = r.wty ? r.F : 0, D = depth<U>(p.E);
  const double work = double(p.B) * p.Hq * n_rows() * n_keys() * (p.E + F + 8);
  const int64_t workers = work < 2e5 ? 1 : min2(threads, heads * units);
  Workspace ws, mine;
  const int64_t offs[] = {mine.take(sizeof(Rows<T>)), mine.take(size * MAX_ROWS * D), mine.take(size * MAX_ROWS * ldp), mine.take(F ? size * CHUNK * ldf : 0),
      mine.take(size * CHUNK * D), mine.take(size * 3 * CHUNK), mine.take(size * panel_floats<T>(F, MAX_ROWS)), mine.take(MAX_ROWS)};
  const int64_t worker_bytes = mine.take(0), scratch_at = ws.take(worker_bytes * workers);
  if (!ws.get()) return 1;
  for (int64_t w = 0; w < workers; w++) ws.guard(mine, scratch_at + w * worker_bytes);
  run_tasks(p, heads * units, workers, [&](int64_t task, int64_t w) {
    const int64_t head = task / units, c0 = base() + task % units * width, c1 = min2(r.key1, c0 + width), b = head / p.Hkv, hkv = head % p.Hkv;
    const int64_t o = scratch_at + w * worker_bytes;
    Scratch s{ws.at<Rows<T>>(o + offs[0]), ws.at<U>(o + offs[1]), ws.at<U>(o + offs[4]), ws.at<T>(o + offs[2]), ws.at<T>(o + offs[3]),
              ws.at<T>(o + offs[5]), nullptr, nullptr, ws.at<uint8_t>(o + offs[7])};
    T *total = s.line, *sums = s.line + CHUNK, *tops = s.line + 2 * CHUNK, *Y = ws.at<T>(o + offs[6]);
    const int64_t from = max2(r.key0, c0) - c0, until = c1 - c0, count = until - from;
    pack_transposed<U, S>(key(b, hkv, c0), p.k_s[2], c1 - c0, p.E, s.K);
    for (int64_t g = 0; g < G; g++) {
      const int64_t h = b * p.Hq + hkv * G + g;
      memset(s.line, 0, size_t(size * 3 * CHUNK));
      if (F) memset(s.O, 0, size_t(size * CHUNK * ldf));
      for (int64_t l = 0; l < n_rows(); l += MAX_ROWS) {
        Rows<T>& rows = *s.rows;
        rows.set(p, b, hkv, g * p.L + r.row0 + l, min2(MAX_ROWS, n_rows() - l), c0 + from, c1);
        if (rows.lo_all >= rows.hi_all) continue;
        load_queries<U, S>(p, rows, s.Q);
        rows.look(p, c0);
        score_chunk<U>(rows, D, s.Q, D, s.K, c0, s.P, ldp, T(p.scale));
        memset(sums, 0, size_t(size * CHUNK));
        bool any_bad = false;
        if (F) any_bad = pack_rows<T, T>((const T*)r.y + (h * n_rows() + l) * F, F, rows.n, F, Y, MAX_ROWS, 0, s.bad);
        for (int64_t t = 0; t < rows.tiles; t++) {
          const Span span = rows.span(t, c0);
          T factor[MR];
          for (int64_t i = t * MR; i < t * MR + rows.tile_rows(t); i++) {
            T* P = s.P + i * ldp;
            factor[i - t * MR] = r.row_weight ? ((const T*)r.row_weight)[h * n_rows() + l + i] : T(1);
            if (span.a < span.b) weights_row(p, rows, i, c0, span, lse(rows, i), P);
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
            gemm_tile<T>(int(min2<int64_t>(MR, until - j)), int(wide / VL<T>), rows.n, s.P + j, 1, ldp, Y + e * MAX_ROWS, wide, s.O + j * ldf + e, ldf, true);
          }
        if (any_bad)
          add_bad_rows<T, T>(count, rows.n, s.P + from, 1, ldp, s.bad, (const T*)r.y + (h * n_rows() + l) * F, F, F, T(1), s.O + from * ldf, ldf);
      }
      const int64_t to = h * n_keys() + c0 + from - r.key0;
      if (r.received) memcpy((T*)r.received + to, total + from, size_t(count * size));
      if (r.received_max) memcpy((T*)r.received_max + to, tops + from, size_t(count * size));
      for (int64_t j = 0; F && j < count; j++) write_row<T, T>((T*)r.wty + (to + j) * F, s.O + (from + j) * ldf, F, T(1), false);
    }
  });
  return 0;
}

}  // namespace

int read(const attlas_problem& p, const attlas_readout& r) {
  switch (p.dtype) {
    case ATTLAS_F64: return Read<double, double>(p, r).run();
    case ATTLAS_BF16: return Read<float, bf16>(p, r).run();
    case ATTLAS_F16: return Read<float, fp16>(p, r).run();
    default: return Read<float, float>(p, r).run();
  }
}
}  // namespace attlas
