// What the processor can do at most: loops of bare instructions on registers, see benchmarks/limits.py.
#include "simd.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define TOGETHER 12     // independent chains: enough to hide the latency of an instruction
#define EXPONENTIALS 4  // that leave registers for the constants


// Runs body(), which does `each` operations, `times` times in each thread; returns how many were done.
template <class Body>
static double repeated(int threads, int64_t times, double each, Body body) {
#pragma omp parallel num_threads(threads)
    body(times);
    return (double)threads * times * each;
}

// Has the compiler believe that v is needed and may have changed.
#define NEEDED(v) __asm__ volatile("" : "+m"(v))

extern "C" {

// Floating point operations of float32, two for a fused multiply-add.
double fma_operations(int threads, int64_t times) {
    return repeated(threads, times, 2.0 * LANES * TOGETHER, [](int64_t times) {
        vec sums[TOGETHER], x = all(0.999f), y = all(1e-3f);
        for (int i = 0; i < TOGETHER; i++) sums[i] = all((float)i);
        NEEDED(x);
        NEEDED(y);
        for (int64_t t = 0; t < times; t++)
#pragma GCC unroll 12
            for (int i = 0; i < TOGETHER; i++) sums[i] = sums[i] * x + y;
        NEEDED(sums);
    });
}

// Exponentials by this package's exp_.
double exponentials(int threads, int64_t times) {
    return repeated(threads, times, (double)LANES * EXPONENTIALS, [](int64_t times) {
        vec x[EXPONENTIALS];
        for (int i = 0; i < EXPONENTIALS; i++) x[i] = all(-0.1f * i);
        for (int64_t t = 0; t < times; t++)
#pragma GCC unroll 4
            for (int i = 0; i < EXPONENTIALS; i++) x[i] = exp_(x[i] - 1.0f);
        NEEDED(x);
    });
}

// Floating point operations by AVX-512's products of pairs of bfloat16; 0 without them.
double pair_operations(int threads, int64_t times) {
#if defined(__AVX512BF16__)
    return repeated(threads, times, 4.0 * LANES * TOGETHER, [](int64_t times) {
        __m512 sums[TOGETHER];
        __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f003f00), y = (__m512bh)_mm512_set1_epi32(0x3a003a00);
        for (int i = 0; i < TOGETHER; i++) sums[i] = _mm512_set1_ps((float)i);
        NEEDED(x);
        NEEDED(y);
        for (int64_t t = 0; t < times; t++)
#pragma GCC unroll 12
            for (int i = 0; i < TOGETHER; i++) sums[i] = _mm512_dpbf16_ps(sums[i], x, y);
        NEEDED(sums);
    });
#else
    (void)threads, (void)times;
    return 0;
#endif
}

// Floating point operations by AMX's products of tiles of bfloat16; 0 without them, or if the system refuses.
double tile_operations(int threads, int64_t times) {
#if defined(__AMX_BF16__) && defined(__linux__)
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* the tiles' data */)) return 0;
    return repeated(threads, times, 4 * 2.0 * 16 * 16 * 32, [](int64_t times) {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
        _tile_loadconfig(&shape);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_zero(4);
        _tile_zero(5);
        _tile_zero(6);
        _tile_zero(7);
        for (int64_t t = 0; t < times; t++) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_release();
    });
#else
    (void)threads, (void)times;
    return 0;
#endif
}
}
