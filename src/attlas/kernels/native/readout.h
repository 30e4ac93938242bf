// readout.h: the tile of the weights that a readout reads, from q, k and the normaliser; v is not read.
//
//   W[i, j] = exp(score[i, j] - m[i]) / l[i]    for queries [row0, row1) and keys [key0, key1)
//
// Results hold the tile's rows and keys only; the normaliser is that of all rows.
#pragma once
#include "score.h"
#include "write.h"

namespace attlas {
namespace {

template <class T, class S> struct Tile {
  const attlas_problem& p;
  const attlas_readout& r;
  const int64_t n_rows = r.row1 - r.row0, n_keys = r.key1 - r.key0;
  const int64_t base = r.key0 / NR<T> * NR<T>;            // chunks begin on a panel
  const int64_t G = p.Hq / max2<int64_t>(1, p.Hkv), heads = p.B * p.Hkv, threads = max2<int64_t>(1, p.num_threads);
  const int64_t D = depth<Factor<T, S>>(p.E), ldp = CHUNK + VL<T>;

  Tile(const attlas_problem& p, const attlas_readout& r) : p(p), r(r) {}
  const S* key(int64_t b, int64_t h, int64_t j) const { return (const S*)p.k + b * p.k_s[0] + h * p.k_s[1] + j * p.k_s[2]; }
  Normaliser<T> normaliser(const Rows<T>& rows, int64_t i) const { return ((const Normaliser<T>*)r.normaliser)[rows.flat(p, i)]; }
  // Of a pass in which a pair takes that many steps beside its score.
  int64_t threads_for(int64_t tasks, int64_t steps) const {
    return double(p.B) * p.Hq * n_rows * n_keys * (p.E + steps + 8) < 2e5 ? 1 : min2(threads, tasks);
  }
};

}  // namespace
}  // namespace attlas
