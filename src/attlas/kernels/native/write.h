// write.h: rows of results on their way out: scaled, converted, summed, streamed past the caches.
//
//   dst[j] = factor * src[j]        sums[j] += sum_i factor[i] * src[i, j]
//
// `big` asks for non-temporal stores: for results too large to be read from a cache soon.
#pragma once
#include "pack.h"

namespace attlas {
namespace {

template <class T, class S> INLINE void write_row(S* dst, const T* src, int64_t n, T factor, bool big) {
  int64_t j = 0;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (big) {
      for (; j < n && ((uintptr_t)(dst + j) & (VBYTES - 1)); j++) store_one(dst + j, src[j] * factor);
      for (; j + VL<T> <= n; j += VL<T>) stream<T>((T*)dst + j, load(src + j) * factor);
    }
  } else if (big) {
    for (; j < n && ((uintptr_t)(dst + j) & (VBYTES / 2 - 1)); j++) store_one(dst + j, src[j] * factor);
    for (; j + VL<T> <= n; j += VL<T>) stream_as(dst + j, load(src + j) * factor);
  }
  for (; j + VL<T> <= n; j += VL<T>) store_as(dst + j, load(src + j) * factor);
  for (; j < n; j++) store_one(dst + j, src[j] * factor);
}

template <class S> INLINE void write_zeros(S* dst, int64_t n, bool big) {
  int64_t j = 0;
  if (big && sizeof(S) >= 4) {
    constexpr int64_t v = VBYTES / int64_t(sizeof(S));
    for (; j < n && ((uintptr_t)(dst + j) & (VBYTES - 1)); j++) memset(dst + j, 0, sizeof(S));
    for (; j + v <= n; j += v) stream<float>((float*)(dst + j), Vec<float>{});
  }
  if (j < n) memset((void*)(dst + j), 0, sizeof(S) * size_t(n - j));
}

// sums[j] += sum_i factor[i] P[i, j] for j in [a, b), rows summed first. By vectors to the end, whose
// rows P has room for, so that a sum is rounded alike wherever [a, b) begins.
template <class T>
INLINE void add_columns(T* sums, const T* P, int64_t ldp, int64_t n, const T* factor, int64_t a, int64_t b) {
  for (int64_t j = a; j < b; j += VL<T>) {
    Vec<T> s{};
    for (int64_t i = 0; i < n; i++) s += load(P + i * ldp + j) * factor[i];
    if (j + VL<T> <= b) store(sums + j, load(sums + j) + s);
    else for (int64_t x = 0; j + x < b; x++) sums[j + x] += s[x];
  }
}

// tops[j] = max(tops[j], P[i, j]); NaN wins.
template <class T> INLINE void max_columns(T* tops, const T* P, int64_t ldp, int64_t n, int64_t a, int64_t b) {
  for (int64_t i = 0; i < n; i++) {
    int64_t j = a;
    for (; j + VL<T> <= b; j += VL<T>) {
      const Vec<T> x = load(P + i * ldp + j), t = load(tops + j);
      store(tops + j, t != t ? t : vmax(t, x));
    }
    for (; j < b; j++) {
      const T x = P[i * ldp + j];
      if (x > tops[j] || x != x) tops[j] = x;
    }
  }
}

// dst[j] = sum_g partial[g, j], in the order of g.
template <class T> void sum_partials(T* dst, const T* partial, int64_t groups, int64_t n) {
  for (int64_t j = 0; j < n; j++) {
    T s = 0;
    for (int64_t g = 0; g < groups; g++) s += partial[g * n + j];
    dst[j] = s;
  }
}

}  // namespace
}  // namespace attlas
