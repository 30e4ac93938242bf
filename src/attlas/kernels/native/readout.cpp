// readout.cpp: what is asked of the weights later, from q, k and the normaliser; v is not read.
//
//   W[i, j] = exp(score[i, j] - m[i]) / l[i]    for queries [row0, row1) and keys [key0, key1)
//
// Results by row (read_rows.h), by key (read_keys.h) and over heads (read_heads.h) take a pass each. A task owns what it sums,
// so no result depends on threads.
#include "read_heads.h"
#include "read_keys.h"
#include "read_rows.h"

namespace attlas {
namespace {

// Sets what no pass writes everywhere: cells, and the results of an empty tile.
template <class T> void clear(const attlas_problem& p, const attlas_readout& r) {
  const int64_t heads = p.B * p.Hq, size = int64_t(sizeof(T)), nr = max2<int64_t>(0, r.row1 - r.row0), nk = max2<int64_t>(0, r.key1 - r.key0);
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

template <class T, class S> int read_as(const attlas_problem& p, const attlas_readout& r) {
  if (p.B * p.Hq == 0) return 0;
  clear<T>(p, r);
  if (r.row1 <= r.row0 || r.key1 <= r.key0) return 0;
  const bool ranked = r.max_value || r.max_key || r.topk_value || r.topk_key;
  const bool by_rows = ranked || r.entropy || r.wx || r.pool_max || r.pool_mass || r.weights || r.tile_weights || r.tile_scores;
  if (by_rows && RowPass<T, S>(p, r).run()) return 1;
  if (r.head_mean && HeadPass<T, S>(p, r).run()) return 1;
  return r.received || r.received_max || r.wty ? KeyPass<T, S>(p, r).run() : 0;
}

}  // namespace

int read(const attlas_problem& p, const attlas_readout& r) {
  switch (p.dtype) {
    case ATTLAS_F64: return read_as<double, double>(p, r);
    case ATTLAS_BF16: return read_as<float, bf16>(p, r);
    case ATTLAS_F16: return read_as<float, fp16>(p, r);
    default: return read_as<float, float>(p, r);
  }
}
}  // namespace attlas
