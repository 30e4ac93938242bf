// simd.h: one thin portable vector type, Vec<T>, on the vector extensions of GCC and Clang.
//
//   exp(x) = 2^n * p(r),   n = round(x / ln 2),   r = x - n ln 2,   |r| <= ln(2)/2
//
// The width follows the flags of the compiler: 64 bytes with AVX-512, 32 with AVX, else 16
// (SSE2, NEON, or what the compiler lowers to). Nothing here is specific to one instruction
// set but the non-temporal store, max and min, the scaling by 2^n, the half conversion and the
// product of pairs of bf16, each with a portable twin.
//
// Numerics: no -ffast-math. vexp has a relative error below 1.5 ulp from ExpConst::low to where the
// largest number ends (88.72 in fp32, 709.78 in fp64). Below, it returns exactly 0, so no denormal
// is ever made (exp(low) = 1.7e-38); above, it returns inf. NaN of any payload stays NaN.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VBYTES 64
#elif defined(__AVX__)
#define VBYTES 32
#else
#define VBYTES 16
#endif
#define INLINE inline __attribute__((always_inline))

namespace attlas {
namespace {

template <class T> struct VecOf;
template <> struct VecOf<float> {
  typedef float type __attribute__((vector_size(VBYTES)));
  typedef float loose __attribute__((vector_size(VBYTES), aligned(4), may_alias));
  typedef int32_t mask __attribute__((vector_size(VBYTES)));
  typedef uint32_t bits __attribute__((vector_size(VBYTES)));
};
template <> struct VecOf<double> {
  typedef double type __attribute__((vector_size(VBYTES)));
  typedef double loose __attribute__((vector_size(VBYTES), aligned(8), may_alias));
  typedef int64_t mask __attribute__((vector_size(VBYTES)));
  typedef uint64_t bits __attribute__((vector_size(VBYTES)));
};
template <class T> using Vec = typename VecOf<T>::type;
template <class T> using Mask = typename VecOf<T>::mask;
template <class T> constexpr int64_t VL = VBYTES / int64_t(sizeof(T));

template <class T> INLINE Vec<T> load(const T* p) {
  return (Vec<T>)*(const typename VecOf<T>::loose*)p;
}
template <class T> INLINE void store(T* p, Vec<T> v) { *(typename VecOf<T>::loose*)p = v; }
template <class T> INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }

// Writes past the caches where the hardware can; p must be aligned to VBYTES.
template <class T> INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}
INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// max(a, b); where either is NaN: b. (This is what the instruction of x86 does.)
INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX__)
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
// min(a, b); where either is NaN: b.
INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX__)
  return (Vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}
// Sum in a fixed tree, the same for every call.
template <class T> INLINE T hsum(Vec<T> v) {
  T a[VL<T>];
  store(a, v);
  for (int64_t n = VL<T> / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; i++) a[i] += a[i + n];
  return a[0];
}
template <class T> INLINE bool any(Mask<T> m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
  else return _mm512_test_epi64_mask((__m512i)m, (__m512i)m) != 0;
#else
  for (int64_t i = 0; i < VL<T>; i++) if (m[i]) return true;
  return false;
#endif
}

template <class T> struct ExpConst;
template <> struct ExpConst<float> {
  static constexpr float low = -86.98f, high = 89.0f;   // n is -125 to 128
  static constexpr float log2e = 1.44269504088896341f, magic = 12582912.0f;
  static constexpr float hi = 0.693145751953125f, lo = 1.4286068203094172321e-6f;
  static constexpr uint32_t half = 0x3f000000;           // the bits of 0.5
  static constexpr int shift = 23, n = 5;
  static constexpr float c[n] = {0.49999988460154331658f, 0.16666517278739431103f,
      0.041669555483856942833f, 0.008369058190310561466f, 0.0013750892463133393529f};
};
template <> struct ExpConst<double> {
  static constexpr double low = -708.0, high = 710.0;   // n is -1021 to 1024
  static constexpr double log2e = 1.44269504088896340736, magic = 6755399441055744.0;
  static constexpr double hi = 0.6931471803691238, lo = 1.908214929270587816144266e-10;
  static constexpr uint64_t half = 0x3fe0000000000000;
  static constexpr int shift = 52, n = 10;
  static constexpr double c[n] = {0.50000000000000129818, 0.16666666666666478703,
      0.041666666666513917081, 0.0083333333334533465457, 0.0013888888947371642515,
      0.00019841269594147296279, 0.000024801489572125136933, 2.7557508821198398368e-6,
      2.763141980055080177e-7, 2.5024526195758648759e-8};
};
template <class T> INLINE Vec<T> vexp(Vec<T> x) {
  using K = ExpConst<T>;
#if defined(__AVX512F__)
  constexpr T one = 1;
#else
  constexpr T one = 2;           // p is doubled and 2^n halved, since 2^n can be past the largest number
#endif
  const Vec<T> below = vmin(splat<T>(K::high), x);
  Vec<T> t = below * K::log2e + K::magic;  // the low bits of t now hold n
  Vec<T> n = t - K::magic;
  Vec<T> r = below - n * K::hi;
  r = r - n * K::lo;
  Vec<T> p = splat<T>(one * K::c[K::n - 1]);
#pragma GCC unroll 16
  for (int i = K::n - 2; i >= 0; i--) p = p * r + one * K::c[i];
  p = p * r + one;    // 1 + r (1 + r c)
  p = p * r + one;
  // NaN times anything is NaN, whatever its payload left in the low bits of t.
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(K::low), _CMP_NLT_UQ), (__m512)p, (__m512)n);
  else
    return (Vec<T>)_mm512_maskz_scalef_pd(_mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(K::low), _CMP_NLT_UQ), (__m512d)p, (__m512d)n);
#else
  using Bits = typename VecOf<T>::bits;
  const Vec<T> e = p * (Vec<T>)(((Bits)t << K::shift) + K::half);
  return (Vec<T>)((Bits)e & ~(Bits)(x < K::low));
#endif
}

// ---- halves: bf16 and fp16 are read and written as uint16_t --------------------------------
struct bf16 { uint16_t u; };
struct fp16 { uint16_t u; };

INLINE float to_float(float x) { return x; }
INLINE double to_float(double x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x.u) << 16; float f; memcpy(&f, &u, 4); return f;
}
INLINE float to_float(fp16 x) {
  const uint32_t h = x.u, s = (h & 0x8000u) << 16, m = (h & 0x7fffu) << 13; float f;
  uint32_t u = m + 0x38000000u;                 // another bias of the exponent
  if ((h & 0x7c00u) == 0x7c00u) u = m | 0x7f800000u;
  if ((h & 0x7c00u) == 0) {                     // subnormal: no step makes one of float, which may be flushed
    f = float(int32_t(h & 0x3ffu)) * 0x1p-24f;
    memcpy(&u, &f, 4);
  }
  u |= s; memcpy(&f, &u, 4); return f;
}
template <class D> INLINE D from_float(float x);
template <> INLINE float from_float<float>(float x) { return x; }
template <> INLINE bf16 from_float<bf16>(float x) {  // round to nearest, ties to even
  uint32_t u; memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <> INLINE fp16 from_float<fp16>(float x) {
  uint32_t u; memcpy(&u, &x, 4);
  uint16_t s = uint16_t((u >> 16) & 0x8000u); u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {uint16_t(s | 0x7e00u)};
  if (u >= 0x477ff000u) return {uint16_t(s | 0x7c00u)};
  if (u < 0x38800000u) {                            // subnormal half: let the adder round
    float f; memcpy(&f, &u, 4); f += 0.5f; memcpy(&u, &f, 4);
    return {uint16_t(s | (u - 0x3f000000u))};
  }
  return {uint16_t(s | ((u + 0xfffu + ((u >> 13) & 1u) - 0x38000000u) >> 13))};
}

typedef uint16_t hvec __attribute__((vector_size(VBYTES / 2), aligned(2), may_alias));
// VL values of storage type S, converted to the compute type.
INLINE Vec<float> load_as(const float* p) { return load(p); }
INLINE Vec<double> load_as(const double* p) { return load(p); }
INLINE Vec<float> load_as(const bf16* p) {
  typedef uint32_t wide __attribute__((vector_size(VBYTES)));
#if defined(__AVX512F__)                      // GCC makes two halves and a shuffle of __builtin_convertvector
  return (Vec<float>)((wide)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return (Vec<float>)((wide)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  return (Vec<float>)(__builtin_convertvector(*(const hvec*)p, wide) << 16);
#endif
}
INLINE Vec<float> load_as(const fp16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> v;
  for (int64_t i = 0; i < VL<float>; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
INLINE void store_as(float* p, Vec<float> v) { store(p, v); }
INLINE void store_as(double* p, Vec<double> v) { store(p, v); }
INLINE void store_as(bf16* p, Vec<float> v) {
  typedef uint32_t wide __attribute__((vector_size(VBYTES)));
  wide u = (wide)v, r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  wide nan = (wide)(v != v);
  r = (r & ~nan) | (((u >> 16) | 0x40u) & nan);
  *(hvec*)p = __builtin_convertvector(r, hvec);
}
INLINE void store_as(fp16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < VL<float>; i++) p[i] = from_float<fp16>(v[i]);
#endif
}
// The same past the caches; p aligned to VBYTES / 2.
template <class S> INLINE void stream_as(S* p, Vec<float> v) {
  S half[VL<float>];
  store_as(half, v);
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, *(const __m256i_u*)half);
#elif defined(__AVX__)
  _mm_stream_si128((__m128i*)p, *(const __m128i_u*)half);
#else
  memcpy(p, half, sizeof(half));
#endif
}
template <> INLINE double from_float<double>(float x) { return x; }
template <class S> INLINE void store_one(S* p, float x) { *p = from_float<S>(x); }
INLINE void store_one(double* p, double x) { *p = x; }

// ---- pairs of bf16: neighbours of a row, multiplied and added by one instruction -----------
struct bf16x2 { bf16 low, high; };
template <> struct VecOf<bf16x2> {
  typedef uint32_t type __attribute__((vector_size(VBYTES)));
  typedef uint32_t loose __attribute__((vector_size(VBYTES), aligned(2), may_alias));
  typedef int32_t mask __attribute__((vector_size(VBYTES)));
};
template <> INLINE Vec<bf16x2> splat<bf16x2>(bf16x2 x) {
  uint32_t u; memcpy(&u, &x, 4); return u - Vec<bf16x2>{};
}
// acc + a.high b.high, then + a.low b.low: fused steps that round to nearest even, in which
// denormals count as 0 and become 0. (So Intel documents VDPBF16PS; a product is exact anyway.)
INLINE Vec<float> dot_bf16(Vec<float> acc, Vec<bf16x2> a, Vec<bf16x2> b) {
#if defined(__AVX512BF16__)
  return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else                                         // for tests on other processors
  typedef Vec<bf16x2> Bits;
  auto flush = [](Bits x) { return (Vec<float>)((x & 0x7f800000u) == 0 ? x & 0x80000000u : x); };
  auto step = [&](Vec<float> sum, Bits x, Bits y) { return flush((Bits)(flush((Bits)sum) + flush(x) * flush(y))); };
  return step(step(acc, a & 0xffff0000u, b & 0xffff0000u), a << 16, b << 16);
#endif
}

}  // namespace
}  // namespace attlas
