// block.h: a block of query rows against keys and values, with what one worker needs for it.
//
//   O[i, :] = sum_j exp(s_ij - m_i) v_j,   then   output = O / l,   weights = exp(s_ij - m_i) / l
//
// Keys come in chunks: the block is scored into a buffer in L2, its rows become exponentials
// (softmax.h), and these are multiplied with V from the same buffer. Where the buffer holds whole
// rows, exponentials of a chunk are relative to the maximum at that time, `chunk_max`, and a last
// pass scales them. With dropout, exponentials are dropped after they were summed and before they
// meet V.
#pragma once
#include "few.h"
#include "plan.h"
#include "random.h"
#include "softmax.h"
#include "write.h"

namespace attlas {
namespace {

constexpr int64_t LYING_ROWS = 64;            // at most this many rows: values are read where they lie

// Packed keys and values of one head, or of one chunk of it.
template <class T, class S> struct Packed {
  Factor<T, S>* K;
  T* V;
  uint8_t* bad;                               // rows of V that are not finite, if *any_bad
  int32_t* any_bad;
  int64_t cap, base = 0;                      // rows of a panel of V; the first key
  const T* lying = nullptr;                   // where given: value `base` unpacked, rows ld apart
  int64_t ld = 0;
};

template <class T, class S> class Block {
  using U = Factor<T, S>;

 public:
  Block(Arena& a, const Plan<T, S>& plan)
      : plan(plan), p(plan.p), out(plan.out), ldp(plan.ldp), ldo(plan.ldo), rows(a.take<Rows<T>>(1)),
        softmax(a.take<Softmax<T>>(1)), Q(a.take<T>(plan.rows_max * round_up(p.E, VL<T>))),
        P(a.take<T>(plan.rows_max * ldp + VL<T>)), O(a.take<T>(plan.rows_max * ldo)),
        chunk_max(a.take<T>(plan.kept ? plan.chunks * MAX_ROWS : 0)), column_sums(a.take<T>(plan.out.received ? p.S : 0)) {
    const int64_t keys = plan.shared ? 0 : CHUNK;
    own = {a.take<U>(keys * depth<U>(p.E)), a.take<T>(panel_floats<T>(p.Ev, keys)), a.take<uint8_t>(keys), nullptr, CHUNK};
  }
  // Rows [r0, r0 + count) of the G * L rows of a key/value head, for keys [key0, key1).
  void set(int64_t b, int64_t head, int64_t r0, int64_t count, int64_t key0, int64_t key1) {
    hkv = head; first_key = key0; end_key = key1;
    rows->set(p, b, head, r0, count, key0, key1);
  }
  void attend(const Packed<T, S>* head);      // without a packed head, each chunk is packed here
  void attend_few();                          // for a few rows, from keys and values where they lie
  void store_part(RowState<T>* states, T* outputs) const;
  void join_parts(int64_t parts, const RowState<T>* states, const T* outputs);
  void finish(T* received);                   // writes every result of the rows; adds to `received`

 private:
  const Plan<T, S>& plan;
  const attlas_problem& p;
  const attlas_forward_out& out;
  const int64_t ldp, ldo;
  Rows<T>* const rows;
  Softmax<T>* const softmax;
  T *const Q, *const P, *const O, *const chunk_max, *const column_sums;   // the sums are of one block
  Packed<T, S> own;                           // for one chunk
  int64_t hkv, first_key, end_key;

  int64_t first_chunk() const { return first_key + (rows->lo_all - first_key) / CHUNK * CHUNK; }
  void drop_rows(int64_t c0, const Span* span, T* chunk);
  void multiply(const Packed<T, S>& from, int64_t c0, const T* chunk);
  void add_few(int64_t c0, int64_t a, int64_t b, const T* chunk);
  void finish_tile(int64_t t, const T* inverse, T* received);
  void touch_weights();
  S* weights(int64_t i) const {
    return (S*)out.weights + rows->b * out.weights_s[0] + rows->h[i] * out.weights_s[1] + rows->l[i] * out.weights_s[2];
  }
};

// Packs keys [k0, k1) for blocks of that many rows.
template <class T, class S>
void pack(const Plan<T, S>& plan, int64_t rows, int64_t b, int64_t h, int64_t k0, int64_t k1, Packed<T, S>& to) {
  using U = Factor<T, S>;
  const attlas_problem& p = plan.p;
  const S* k = (const S*)p.k + b * p.k_s[0] + h * p.k_s[1];
  pack_transposed<U, S>(k + k0 * p.k_s[2], p.k_s[2], k1 - k0, p.E, to.K + (k0 - to.base) * depth<U>(p.E));
  if (!plan.out.output) return;
  const S* v = (const S*)p.v + b * p.v_s[0] + h * p.v_s[1] + k0 * p.v_s[2];
  if constexpr (std::is_same<T, S>::value)
    if (rows <= LYING_ROWS && p.Ev % VL<T> == 0 && all_finite<T>(v, p.v_s[2], k1 - k0, p.Ev)) {
      to.lying = v; to.ld = p.v_s[2];
      return;
    }
  if (pack_rows<T, S>(v, p.v_s[2], k1 - k0, p.Ev, to.V, to.cap, k0 - to.base, to.bad))
    __atomic_store_n(to.any_bad, 1, __ATOMIC_RELAXED);
}

template <class T, class S> void Block<T, S>::attend(const Packed<T, S>* head) {
  if (out.weights && plan.big) touch_weights();
  const U* queries = (U*)Q;
  const int64_t D = depth<U>(p.E);
  int64_t ldq = D;
  if constexpr (std::is_same<T, S>::value)    // where they lie, if they are rows of one head
    if (!plan.flat) { queries = rows->template query<S>(p, 0); ldq = p.q_s[2]; }
  if (queries == (U*)Q) load_queries<U, S>(p, *rows, (U*)Q);
  softmax->clear(rows->n);
  if (out.output) memset(O, 0, sizeof(T) * size_t(rows->n * ldo));
  for (int64_t c0 = first_chunk(); c0 < rows->hi_all; c0 += CHUNK) {
    int32_t any_bad = 0;
    Packed<T, S> packed;
    if (head) packed = *head;
    else {
      packed = own; packed.base = c0; packed.any_bad = &any_bad;
      pack(plan, rows->n, rows->b, hkv, c0, min2(c0 + CHUNK, end_key), packed);
    }
    T* chunk = plan.kept ? P + c0 : P;
    rows->look(p, c0);
    score_chunk<U>(*rows, D, queries, ldq, packed.K + (c0 - packed.base) * D, c0, chunk, ldp, T(p.scale));
    for (int64_t i = 0; i < rows->n; i += VL<T>) {
      const int64_t count = min2(VL<T>, rows->n - i);
      Span spans[VL<T>];
      for (int64_t x = 0; x < count; x++) spans[x] = rows->span((i + x) / MR, c0);
      softmax->take(p, out, *rows, i, count, c0, spans, chunk + i * ldp, ldp, O + i * ldo, ldo);
    }
    if (plan.kept) memcpy(chunk_max + c0 / CHUNK * MAX_ROWS, softmax->m, sizeof(T) * size_t(rows->n));
    if (!out.output) continue;
    if (p.dropout_p > 0) drop_rows(c0, nullptr, chunk);
    multiply(packed, c0, chunk);
  }
}

template <class T, class S> void Block<T, S>::attend_few() {
  const int64_t n = rows->n;
  U* queries = (U*)Q;
  load_queries<U, S>(p, *rows, queries);
  softmax->clear(n);
  if (out.output) memset(O, 0, sizeof(T) * size_t(n * ldo));
  const S* k = (const S*)p.k + rows->b * p.k_s[0] + hkv * p.k_s[1];
  for (int64_t c0 = first_chunk(); c0 < rows->hi_all; c0 += CHUNK) {
    const int64_t a = max2(rows->lo_all, c0) - c0, b = min2(rows->hi_all, c0 + CHUNK) - c0;
    T* chunk = plan.kept ? P + c0 : P;
    score_few<U, S>(n, b - a, p.E, queries, k + (c0 + a) * p.k_s[2], p.k_s[2], own.K, chunk + a, ldp, T(p.scale));
    Span spans[VL<T>];
    for (int64_t x = 0; x < VL<T>; x++) spans[x] = {a / NR<T> * NR<T>, round_up(b, VL<T>)};
    for (int64_t i = 0; i < n; i += VL<T>)
      softmax->take(p, out, *rows, i, min2(VL<T>, n - i), c0, spans, chunk + i * ldp, ldp, O + i * ldo, ldo);
    if (plan.kept) memcpy(chunk_max + c0 / CHUNK * MAX_ROWS, softmax->m, sizeof(T) * size_t(n));
    if (!out.output) continue;
    if (p.dropout_p > 0) drop_rows(c0, spans, chunk);
    add_few(c0, a, b, chunk);
  }
}

// O += P V for columns [a, b) of the chunk, from values where they lie.
template <class T, class S> void Block<T, S>::add_few(int64_t c0, int64_t a, int64_t b, const T* chunk) {
  const int64_t size = rows->n * ldo, ld = p.v_s[2];
  const S* v = (const S*)p.v + rows->b * p.v_s[0] + hkv * p.v_s[1] + c0 * ld;
  const int64_t first = a / STEP, steps = ceil_div(b, STEP) - first;
  T* sums = own.V;                            // no packed values yet: room for the sum of each step
  for (int64_t x = 0; x < steps; x++) {
    const int64_t j = max2(a, (first + x) * STEP), end = min2(b, (first + x + 1) * STEP);
    multiply_few<T, S>(rows->n, end - j, p.Ev, chunk + j, ldp, v + j * ld, ld, sums + x * size, ldo);
  }
  if (__builtin_expect(finite(sums, steps * size), 1)) {
    for (int64_t x = 0; x < steps; x++)
      for (int64_t e = 0; e < size; e += VL<T>) store(O + e, load(O + e) + load(sums + x * size + e));
    return;
  }
  Packed<T, S> packed = own;
  int32_t any_bad = pack_rows<T, S>(v, ld, min2(CHUNK, end_key - c0), p.Ev, own.V, own.cap, 0, own.bad);
  packed.base = c0; packed.any_bad = &any_bad;
  multiply(packed, c0, chunk);
}

// Dropout of the exponentials of the chunk, in columns `span`, or those of each row's tile.
template <class T, class S> void Block<T, S>::drop_rows(int64_t c0, const Span* span, T* chunk) {
  T factor[CHUNK];
  for (int64_t i = 0; i < rows->n; i++) {
    const Span s = span ? *span : rows->span(i / MR, c0);
    dropout_row(p, *rows, i, c0, s, factor);
    drop(chunk + i * ldp, factor, s);
  }
}

// O += P V for the chunk.
template <class T, class S> void Block<T, S>::multiply(const Packed<T, S>& from, int64_t c0, const T* chunk) {
  const int64_t first = max2(rows->lo_all, c0), last = min2(rows->hi_all, c0 + CHUNK);
  for (int64_t k0 = c0 + (first - c0) / STEP * STEP; k0 < last; k0 += STEP)
    for (int64_t e = 0; e < p.Ev; e += NR<T>) {
      const int64_t width = panel_width<T>(p.Ev, e / NR<T>);
      const int64_t ld = from.lying ? from.ld : width;
      const T* V = (from.lying ? from.lying + e : from.V + e * from.cap) + (k0 - from.base) * ld;
      for (int64_t t = 0; t < rows->tiles; t++) {
        const Span span = rows->span(t, c0);
        const Span seen = rows->without_holes(t, max2(span.a, k0 - c0), min2(min2(span.b, k0 + STEP - c0), p.S - c0));
        const int64_t a = seen.a + c0, b = seen.b + c0;
        if (a >= b) continue;
        gemm_tile<T>(int(rows->tile_rows(t)), int(width / VL<T>), b - a, chunk + t * MR * ldp + (a - c0), ldp, 1,
                     V + (a - k0) * ld, ld, O + t * MR * ldo + e, ldo, true);
      }
    }
  if (__builtin_expect(*from.any_bad, 0)) {
    const S* v = (const S*)p.v + rows->b * p.v_s[0] + hkv * p.v_s[1];
    for (int64_t t = 0; t < rows->tiles; t++) {
      const Span span = rows->span(t, c0);
      const int64_t a = span.a + c0, b = min2(span.b + c0, p.S);
      if (a < b) add_bad_rows<T, S>(rows->tile_rows(t), b - a, chunk + t * MR * ldp + span.a, ldp, 1, from.bad + (a - from.base),
                                    v + a * p.v_s[2], p.v_s[2], p.Ev, T(1), O + t * MR * ldo, ldo);
    }
  }
}

}  // namespace
}  // namespace attlas
