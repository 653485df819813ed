// Vectors of neighbouring channels, by the vector extensions of GCC and Clang: one source for every instruction set.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#ifndef EMULATED
#define EMULATED 0  // see half.h
#endif

#if defined(__AVX512F__)
#define LANES 16
#include <immintrin.h>
#elif EMULATED
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *p) { return (vec) * (const anywhere *)p; }
INLINE void store(float *p, vec v) { *(anywhere *)p = (anywhere)v; }
INLINE vec all(float x) { return x - vec{}; }
#if defined(__AVX512F__)  // of the conditional, GCC makes two instructions
INLINE vec lower(vec a, vec b) { return (vec)_mm512_min_ps((__m512)b, (__m512)a); }
INLINE vec higher(vec a, vec b) { return (vec)_mm512_max_ps((__m512)b, (__m512)a); }
#else
INLINE vec lower(vec a, vec b) { return b < a ? b : a; }
INLINE vec higher(vec a, vec b) { return b > a ? b : a; }
#endif

INLINE float sum(vec v) {
    float s[LANES];
    memcpy(s, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) s[j] += s[j + half];
    return s[0];
}

// Lane j of the result is x[j] + x[j ^ half] where j has no bit `half`, else y[j] + y[j ^ half].
template <int half, int... j>
INLINE vec merge(vec x, vec y, std::integer_sequence<int, j...>) {
    return __builtin_shufflevector(x, y, (j & half ? LANES + (j ^ half) : j)...) +
           __builtin_shufflevector(x, y, (j & half ? LANES + j : (j ^ half))...);
}

// v[0] becomes the vector of the sums of all v[0], …, v[LANES - 1].
template <int half = LANES / 2>
INLINE void sum_all(vec *v) {
#pragma GCC unroll 16
    for (int i = 0; i < half; i++) v[i] = merge<half>(v[i], v[i + half], std::make_integer_sequence<int, LANES>());
    if constexpr (half > 1) sum_all<half / 2>(v);
}

// Exchanges the blocks off the diagonal of x over y, each `half` lanes wide.
template <int half, int... j>
INLINE void exchange(vec *x, vec *y, std::integer_sequence<int, j...>) {
    vec first = __builtin_shufflevector(*x, *y, (j & half ? LANES + (j ^ half) : j)...);
    *y = __builtin_shufflevector(*x, *y, (j & half ? LANES + j : (j ^ half))...);
    *x = first;
}

// v as a matrix of LANES rows becomes its transpose.
template <int half = LANES / 2>
INLINE void transpose(vec *v) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & half)) exchange<half>(v + i, v + i + half, std::make_integer_sequence<int, LANES>());
    if constexpr (half > 1) transpose<half / 2>(v);
}

// Adding 1.5 · 2²³ rounds to an integer and leaves that in the low bits.
#define ROUNDING 12582912.0f

// 2^x for x < 128, error 1.6e-7 and exact at 0, so that slow decays do not drift over long sequences; below 2^-126 it
// stays there. Minimax polynomial over [-1/2, 1/2].
INLINE vec exp2_(vec x) {
    x = higher(x, all(-126.0f));
    vec shifted = x + ROUNDING, r = x - (shifted - ROUNDING);
    vec p = r * 1.326472720e-3f + 9.671512640e-3f;
    p = p * r + 5.550733743e-2f;
    p = p * r + 2.402224209e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

// e^x, error 1e-7 (Cephes expf).
INLINE vec exp_(vec x) {
    x = lower(higher(x, all(-87.3365f)), all(88.3762f));
    vec shifted = x * 1.44269504088896341f + ROUNDING, n = shifted - ROUNDING;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

INLINE vec sigmoid_(vec x) { return 1.0f / (1.0f + exp_(-x)); }

// x · σ(x) and its derivative.
INLINE vec silu_(vec x, vec *slope) {
    vec s = sigmoid_(x);
    *slope = s * (1.0f + x * (1.0f - s));
    return x * s;
}

// x · Φ(x) and its derivative: Φ by Abramowitz and Stegun 7.1.26, error 1e-7.
INLINE vec gelu_(vec x, vec *slope) {
    vec away = x < 0.0f ? -x : x, t = 1.0f / (1.0f + away * 0.23164189f), bell = exp_(x * x * -0.5f);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec beyond = p * t * bell * 0.5f, below = x < 0.0f ? beyond : 1.0f - beyond;
    *slope = below + x * bell * 0.3989422804f;
    return x * below;
}

// log(1 + e^x) and its derivative. With e = e^-|x| that is max(x, 0) + log(1 + e): Cephes logf, with what the rounding of
// 1 + e lost.
INLINE vec softplus_(vec x, vec *slope) {
    vec e = exp_(x < 0.0f ? x : -x), y = 1.0f + e, s = 1.0f / y;
    *slope = x < 0.0f ? e * s : s;
    ivec big = y > 1.41421356f;
    vec f = (big ? y * 0.5f : y) - 1.0f, k = big ? all(1.0f) : all(0.0f), f2 = f * f;
    vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    vec log = f + (f * f2 * p - k * 2.12194440e-4f - 0.5f * f2) + k * 0.693359375f + (e - (y - 1.0f)) * s;
    return higher(x, all(0.0f)) + log;
}

// Memory for `count` floats, at a cache line.
INLINE float *floats(int64_t count) { return (float *)aligned_alloc(64, (4 * count + 63) / 64 * 64); }
