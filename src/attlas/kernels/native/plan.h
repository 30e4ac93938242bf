// plan.h: how a forward is cut into tasks.
//
// Rows come in blocks. A block scores one chunk of keys at a time; but where weights or `received`
// are wanted, its buffer holds whole rows, so that they are scaled while they are in L2. Blocks that
// read the same keys and values share a packed copy, made for a wave of heads at a time. A few rows
// that share with no others (decoding) read them where they lie. Few rows and many keys leave no
// blocks to share out: then the keys are split.
//
// Bits must not depend on the plan, but for the splits, which follow from the sizes alone.
#pragma once
#include "few.h"

namespace attlas {
namespace {

constexpr int64_t SPLIT_ROWS = 64;            // at most this many rows: split the keys
constexpr int64_t SPLIT_KEYS = 4096;
constexpr int64_t KEPT_BYTES = int64_t(1) << 20;   // rows kept whole stay in L2, with K and V chunks
constexpr int64_t RECEIVED_GROUPS = 16;       // partial sums of `received` per head

INLINE bool splits_keys(const attlas_problem& p) { return p.Hq / p.Hkv * p.L <= SPLIT_ROWS && p.S > SPLIT_KEYS; }

// Whether weights and `received` are read in a second pass, which leaves the output its bits: when
// whole rows would not fit the cache, are not at hand (splits), or dropout overwrites them.
INLINE bool needs_second_pass(const attlas_problem& p, int64_t size) {
  return p.dropout_p > 0 || splits_keys(p) || p.S * size * 4 * MR > 3 * KEPT_BYTES;
}

template <class T, class S> struct Plan {
  using U = Factor<T, S>;

  const attlas_problem& p;
  const attlas_forward_out& out;
  const int64_t G = p.Hq / p.Hkv, heads = p.B * p.Hkv;   // query heads of a key/value head, and those
  const int64_t chunks = ceil_div(p.S, CHUNK), padded_keys = round_up(p.S, NR<T>);
  const bool kept = out.weights || out.received;         // the buffer holds whole rows
  const bool big = double(p.B) * p.Hq * p.L * p.S * sizeof(S) > (1 << 22);   // weights go past the caches
  const int64_t splits = splits_keys(p) ? ceil_div(p.S, SPLIT_KEYS) : 1;
  const bool flat = splits > 1 || (G > 1 && p.L < 48 && !out.received);      // a block may hold rows of several heads
  const int64_t per = flat ? G * p.L : p.L, parts = flat ? 1 : G;            // rows that are cut into blocks; how often
  const int64_t ldo = round_up(p.Ev, VL<T>), ldp = (kept ? round_up(p.S, CHUNK) : CHUNK) + VL<T>;
  int64_t block, blocks;                      // rows of one, and how many for `per`
  int64_t group_blocks, groups;               // blocks of a task; each has a partial sum of `received`
  int64_t units, workers, rows_max;           // tasks of a key/value head; rows of the largest block
  bool shared;                                // several tasks read the same packed head
  bool few;                                   // nothing is packed: a task reads keys and values where they lie
  int64_t head_k, head_v, wave;               // numbers in a packed head; heads that are packed at a time

  Plan(const attlas_problem& p, const attlas_forward_out& out) : p(p), out(out) {
    const int64_t threads = max2<int64_t>(1, p.num_threads), size = int64_t(sizeof(T));
    // As many rows as keep the buffer in L2, and enough blocks to share out.
    block = kept ? max2<int64_t>(4 * MR, min2(MAX_ROWS, KEPT_BYTES / (size * (padded_keys + 1)) / MR * MR)) : MAX_ROWS;
    if (!kept) while (block > 8 * MR && heads * parts * ceil_div(per, block) < 4 * threads) block -= 4 * MR;
    blocks = max2<int64_t>(1, ceil_div(per, block));
    group_blocks = out.received ? ceil_div(blocks, RECEIVED_GROUPS) : 1;
    groups = ceil_div(blocks, group_blocks);
    rows_max = splits > 1 ? per : min2(per, block);
    units = splits > 1 ? splits : parts * groups;
    shared = units > 1 && splits == 1;
    few = !shared && rows_max <= FEW_ROWS && p.S >= FEW_KEYS;
    const double work = double(p.B) * p.Hq * p.L * p.S * (p.E + p.Ev);
    workers = work < 2e5 ? 1 : min2(threads, heads * units);
    head_k = padded_keys * depth<U>(p.E);
    head_v = out.output ? panel_floats<T>(p.Ev, padded_keys) : 0;
    // Enough heads for all threads, then as few as their packed keys and values are large.
    wave = shared ? min2(heads, max2(4 * threads, PACKED_BYTES / (size * (head_k + head_v) + 1))) : heads;
  }
};

}  // namespace
}  // namespace attlas
