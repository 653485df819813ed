// The causal convolution of width 4 over a stretch of one sequence, each channel for itself:
//
//     y[t] = SiLU(bias + Σ_j weight[j] · x[t - 3 + j])        weight [4, channels]
//
// x points to EARLIER rows before the stretch.
#pragma once
#include "simd.h"

#define EARLIER 3

static void convolve(int64_t length, int64_t channels, const float *x, int64_t x_row, const float *weight,
                     const float *bias, float *y, float *slope, int64_t y_row) {
    for (int64_t i = 0; i < channels; i += LANES) {
        const vec w0 = load(weight + i), w1 = load(weight + channels + i), w2 = load(weight + 2 * channels + i);
        const vec w3 = load(weight + 3 * channels + i), b = load(bias + i);
        vec x0 = load(x + i), x1 = load(x + x_row + i), x2 = load(x + 2 * x_row + i);
        for (int64_t t = 0; t < length; t++) {
            vec x3 = load(x + (t + EARLIER) * x_row + i);
            vec slope_t, y_t = silu_(b + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3, &slope_t);
            store(y + t * y_row + i, y_t), store(slope + t * y_row + i, slope_t);
            x0 = x1, x1 = x2, x2 = x3;
        }
    }
}

// `gy`, the gradient before the SiLU, has EARLIER rows more than the stretch: those of the steps that follow it. gx (of the stretch) is set, the
// others are added to.
static void convolve_backward(int64_t length, int64_t channels, const float *x, int64_t x_row, const float *weight,
                              const float *gy, int64_t gy_row, float *gx, int64_t gx_row, float *gweight, float *gbias) {
    for (int64_t i = 0; i < channels; i += LANES) {
        const vec w0 = load(weight + i), w1 = load(weight + channels + i), w2 = load(weight + 2 * channels + i);
        const vec w3 = load(weight + 3 * channels + i);
        vec s0 = load(gweight + i), s1 = load(gweight + channels + i), s2 = load(gweight + 2 * channels + i);
        vec s3 = load(gweight + 3 * channels + i), s = load(gbias + i);
        vec x0 = load(x + i), x1 = load(x + x_row + i), x2 = load(x + 2 * x_row + i);
        vec g0 = load(gy + i), g1 = load(gy + gy_row + i), g2 = load(gy + 2 * gy_row + i);
        for (int64_t t = 0; t < length; t++) {
            vec g3 = load(gy + (t + EARLIER) * gy_row + i), x3 = load(x + (t + EARLIER) * x_row + i);
            store(gx + t * gx_row + i, w3 * g0 + w2 * g1 + w1 * g2 + w0 * g3);
            s0 += g0 * x0, s1 += g0 * x1, s2 += g0 * x2, s3 += g0 * x3, s += g0;
            x0 = x1, x1 = x2, x2 = x3, g0 = g1, g1 = g2, g2 = g3;
        }
        store(gweight + i, s0), store(gweight + channels + i, s1), store(gweight + 2 * channels + i, s2);
        store(gweight + 3 * channels + i, s3), store(gbias + i, s);
    }
}
