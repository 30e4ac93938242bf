// random.h: which weights are dropped, by Philox4x32-10 at the position of each.
//
//   factor[j] = word(b, h, l, key) < p 2^32 ? 0 : 1 / (1 - p)
//   word(b, h, l, key) = word key % 4 of the counter (key / 4, l, h, b) under the seed
//
// A vector holds one word of several counters, in 64-bit lanes of which the upper half is not
// read: a product of 32-bit words then is one instruction. Equals `attlas.dropout.Dropout.keep`.
#pragma once
#include "score.h"

namespace attlas {
namespace {

typedef VecOf<double>::bits Lanes;
constexpr int64_t LANES = VL<double>;         // counters at a time, of four keys each

// The products of the low halves, 64 bits each.
INLINE Lanes multiply_low(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__) && VBYTES == 16
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The words of keys [key, key + 4 LANES) of one row; key is a multiple of 4.
INLINE void philox_words(const attlas_problem& p, int64_t b, int64_t h, int64_t l, int64_t key, uint32_t* words) {
  const Lanes first = Lanes{} + 0xD2511F53u, second = Lanes{} + 0xCD9E8D57u;
  Lanes w0{}, w1 = Lanes{} + uint64_t(p.first_row + l), w2 = Lanes{} + uint64_t(h), w3 = Lanes{} + uint64_t(b);
  for (int64_t i = 0; i < LANES; i++) w0[i] = uint64_t(i);
  w0 += uint64_t(key / 4);
  uint32_t low = uint32_t(p.seed), high = uint32_t(p.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const Lanes x = multiply_low(w0, first), y = multiply_low(w2, second);
    w0 = (y >> 32) ^ w1 ^ low;
    w1 = y;
    w2 = (x >> 32) ^ w3 ^ high;
    w3 = x;
    low += 0x9E3779B9u; high += 0xBB67AE85u;
  }
  constexpr uint64_t mask = 0xffffffffu;
  Vec<double> even, odd;
  interleave<double>((Vec<double>)((w0 & mask) | w1 << 32), (Vec<double>)((w2 & mask) | w3 << 32), even, odd,
                     std::make_integer_sequence<int, int(LANES)>());
  memcpy(words, &even, VBYTES);
  memcpy(words + VBYTES / 4, &odd, VBYTES);
}

// The factors of row i in columns [s.a, s.b) of chunk c0.
template <class T> void dropout_row(const attlas_problem& p, const Rows<T>& rows, int64_t i, int64_t c0, Span s, T* factor) {
  constexpr int64_t step = 4 * LANES;
  static_assert(CHUNK % step == 0, "a chunk is made of whole steps");
  const double least = p.dropout_p * 4294967296.0;
  const uint32_t threshold = least < 4294967295.0 ? uint32_t(least) : 0xffffffffu;
  const T kept = p.dropout_p < 1 ? T(1 / (1 - p.dropout_p)) : T(0);
  for (int64_t j = s.a / step * step; j < s.b; j += step) {
    uint32_t words[step];
    philox_words(p, rows.b, rows.h[i], rows.l[i], c0 + j, words);
    for (int64_t k = 0; k < step; k++) factor[j + k] = words[k] < threshold ? T(0) : kept;
  }
}

// x *= factor; what is dropped becomes 0, even NaN.
template <class T> INLINE void drop(T* x, const T* factor, Span s) {
  for (int64_t j = s.a; j < s.b; j += VL<T>) {
    const Vec<T> f = load(factor + j);
    store(x + j, f == T(0) ? Vec<T>{} : load(x + j) * f);
  }
}

}  // namespace
}  // namespace attlas
