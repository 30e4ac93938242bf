// forward.cpp: output, normaliser, dense weights, entropy, max and received, in one pass over the keys.
//
//   l = sum exp(score - m) + exp(sink - m),   weights = exp(score - m) / l,   output = weights v
//
// plan.h says how the call is cut into tasks, softmax.h how scores become exponentials, block.h
// what a task does for a block of rows, and finish.h what it writes. A task owns blocks of query
// rows, or, with few rows and many keys, a split of the keys, whose parts are joined afterwards.
//
// Numerics: chunks begin at multiples of CHUNK and every sum runs over a row alone in an order
// fixed by key positions, so a row's bits depend neither on threads, nor on the batch, nor on
// the block it falls in, nor on what else is asked.
#include "finish.h"

namespace attlas {

int read(const attlas_problem&, const attlas_readout&);

namespace {

// Tasks own a split of the keys of one key/value head, with all of its rows.
template <class T, class S> int by_splits(const Plan<T, S>& plan) {
  const attlas_problem& p = plan.p;
  const int64_t n = plan.per, splits = plan.splits;
  RowState<T>* states;
  T* outputs;
  Workers<Block<T, S>, Plan<T, S>> workers(plan, plan.workers);
  Workspace space;
  if (!space.get([&](Arena& a) {
        states = a.take<RowState<T>>(plan.heads * splits * n);
        outputs = a.take<T>(plan.out.output ? plan.heads * splits * n * plan.ldo : 0);
        workers.lay(a);
      })) return 1;
  run_tasks(p, plan.heads * splits, workers.count(), [&](int64_t t, int64_t w) {
    const int64_t head = t / splits, k0 = t % splits * SPLIT_KEYS;
    Block<T, S> block = workers[w];
    block.set(head / p.Hkv, head % p.Hkv, 0, n, k0, min2(p.S, k0 + SPLIT_KEYS));
    if (plan.few) block.attend_few();
    else block.attend(nullptr);
    block.store_part(states + t * n, outputs + t * n * plan.ldo);
  });
  run_tasks(p, plan.heads, 1, [&](int64_t head, int64_t w) {
    Block<T, S> block = workers[w];
    block.set(head / p.Hkv, head % p.Hkv, 0, n, 0, p.S);
    block.join_parts(splits, states + head * splits * n, outputs + head * splits * n * plan.ldo);
    block.finish(nullptr);
  });
  return 0;
}

// Tasks own blocks of rows, which read all keys.
template <class T, class S> int by_blocks(const Plan<T, S>& plan) {
  const attlas_problem& p = plan.p;
  const int64_t units = plan.units, groups = plan.groups;
  Factor<T, S>* K;                            // of the heads of a wave
  T *V, *received;                            // received: partial sums, of one group of blocks each
  uint8_t* bad;
  int32_t* any_bad;
  Workers<Block<T, S>, Plan<T, S>> workers(plan, plan.workers);
  Workspace space;
  const int64_t packed = plan.shared ? plan.wave : 0;
  if (!space.get([&](Arena& a) {
        received = a.take<T>(plan.out.received ? p.B * p.Hq * groups * p.S : 0);
        K = a.take<Factor<T, S>>(packed * plan.head_k);
        V = a.take<T>(packed * plan.head_v);
        bad = a.take<uint8_t>(packed * plan.padded_keys);
        any_bad = a.take<int32_t>(packed);
        workers.lay(a);
      })) return 1;
  auto head = [&](int64_t i) {                // of head i of the wave
    return Packed<T, S>{K + i * plan.head_k, V + i * plan.head_v, bad + i * plan.padded_keys, any_bad + i, plan.padded_keys};
  };
  for (int64_t h0 = 0; h0 < plan.heads; h0 += plan.wave) {
    const int64_t count = min2(plan.wave, plan.heads - h0);
    if (plan.shared && p.S > 0) {
      const int64_t pieces = min2<int64_t>(plan.chunks, 8), keys = ceil_div(plan.chunks, pieces) * CHUNK;
      memset(any_bad, 0, size_t(count) * sizeof(*any_bad));
      run_tasks(p, count * pieces, workers.count(), [&](int64_t t, int64_t) {
        const int64_t i = t / pieces, k0 = t % pieces * keys;
        Packed<T, S> to = head(i);
        if (k0 < p.S) pack(plan, MAX_ROWS, (h0 + i) / p.Hkv, (h0 + i) % p.Hkv, k0, min2(p.S, k0 + keys), to);
      });
    }
    run_tasks(p, count * units, workers.count(), [&](int64_t task, int64_t w) {
      const int64_t t = count * units - 1 - task;   // later rows first: with a causal mask they are the longer
      const int64_t b = (h0 + t / units) / p.Hkv, hkv = (h0 + t / units) % p.Hkv;
      const int64_t part = t % units / groups, group = t % groups;
      const Packed<T, S> from = head(t / units);
      Block<T, S> block = workers[w];
      T* sums = nullptr;
      if (plan.out.received) {
        sums = received + ((b * p.Hq + hkv * plan.G + part) * groups + group) * p.S;
        memset(sums, 0, sizeof(T) * size_t(p.S));
      }
      for (int64_t i = group * plan.group_blocks; i < min2(plan.blocks, (group + 1) * plan.group_blocks); i++) {
        block.set(b, hkv, part * p.L + i * plan.block, min2(plan.block, plan.per - i * plan.block), 0, p.S);
        if (plan.few) block.attend_few();
        else block.attend(plan.shared ? &from : nullptr);
        block.finish(sums);
      }
    });
  }
  if (plan.out.received)
    run_tasks(p, p.B * p.Hq, workers.count(), [&](int64_t h, int64_t) {
      sum_partials((T*)plan.out.received + h * p.S, received + h * groups * p.S, groups, p.S);
    });
  return 0;
}

template <class T, class S> int one_pass(const attlas_problem& p, const attlas_forward_out& out) {
  if (p.B * p.Hq * p.L == 0) return 0;
  const Plan<T, S> plan(p, out);
  return plan.splits > 1 ? by_splits(plan) : by_blocks(plan);
}

template <class T, class S> int forward_as(const attlas_problem& p, const attlas_forward_out& out) {
  if (!(out.weights || out.received) || !needs_second_pass(p, sizeof(T))) return one_pass<T, S>(p, out);
  attlas_forward_out first = out;
  first.weights = first.received = nullptr;
  Workspace space;
  if (!out.normaliser && !space.get([&](Arena& a) { first.normaliser = a.take<Normaliser<T>>(p.B * p.Hq * p.L); })) return 1;
  if (one_pass<T, S>(p, first)) return 1;
  attlas_readout r = {};
  r.normaliser = first.normaliser; r.row1 = p.L; r.key1 = p.S;
  r.weights = out.weights; r.received = out.received;
  for (int i = 0; i < 3; i++) r.weights_s[i] = out.weights_s[i];
  return read(p, r);
}

}  // namespace

int forward(const attlas_problem& p, const attlas_forward_out& out) {
  switch (p.dtype) {
    case ATTLAS_F64: return forward_as<double, double>(p, out);
    case ATTLAS_BF16: return forward_as<float, bf16>(p, out);
    case ATTLAS_F16: return forward_as<float, fp16>(p, out);
    default: return forward_as<float, float>(p, out);
  }
}
}  // namespace attlas
