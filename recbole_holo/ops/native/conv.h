// The causal convolution of width 4 over a stretch of one sequence, each channel for itself:
//
//     y[t] = SiLU(bias + Σ_j weight[j] · x[t - 3 + j])        weight [4, channels]
//
// with the EARLIER rows before the stretch at `before`. The SiLU can be left out.
#pragma once
#include "simd.h"

#define EARLIER 3

// slope, unless it is 0, receives the derivative of the SiLU.
template <bool silu>
static void convolve_from(int64_t length, int64_t channels, const float *before, int64_t before_row, const float *x,
                          int64_t x_row, const float *weight, const float *bias, float *y, float *slope,
                          int64_t y_row) {
    for (int64_t i = 0; i < channels; i += LANES) {
        const vec w0 = load(weight + i), w1 = load(weight + channels + i), w2 = load(weight + 2 * channels + i);
        const vec w3 = load(weight + 3 * channels + i), b = load(bias + i);
        vec x0 = load(before + i), x1 = load(before + before_row + i), x2 = load(before + 2 * before_row + i);
        for (int64_t t = 0; t < length; t++) {
            vec x3 = load(x + t * x_row + i), y_t = b + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3, slope_t;
            if (silu) y_t = silu_(y_t, &slope_t);
            store(y + t * y_row + i, y_t);
            if (silu && slope) store(slope + t * y_row + i, slope_t);
            x0 = x1, x1 = x2, x2 = x3;
        }
    }
}

// x points to the EARLIER rows before the stretch, which follows.
static void convolve(int64_t length, int64_t channels, const float *x, int64_t x_row, const float *weight,
                     const float *bias, float *y, float *slope, int64_t y_row) {
    convolve_from<true>(length, channels, x, x_row, x + EARLIER * x_row, x_row, weight, bias, y, slope, y_row);
}

// `gy`, the gradient before the SiLU, has EARLIER rows more than the stretch: those of the steps that follow it. gx (of
// the stretch) is set, the others are added to.
static void convolve_backward_from(int64_t length, int64_t channels, const float *before, int64_t before_row,
                                   const float *x, int64_t x_row, const float *weight, const float *gy, int64_t gy_row,
                                   float *gx, int64_t gx_row, float *gweight, float *gbias) {
    for (int64_t i = 0; i < channels; i += LANES) {
        const vec w0 = load(weight + i), w1 = load(weight + channels + i), w2 = load(weight + 2 * channels + i);
        const vec w3 = load(weight + 3 * channels + i);
        vec s0 = load(gweight + i), s1 = load(gweight + channels + i), s2 = load(gweight + 2 * channels + i);
        vec s3 = load(gweight + 3 * channels + i), s = load(gbias + i);
        vec x0 = load(before + i), x1 = load(before + before_row + i), x2 = load(before + 2 * before_row + i);
        vec g0 = load(gy + i), g1 = load(gy + gy_row + i), g2 = load(gy + 2 * gy_row + i);
        for (int64_t t = 0; t < length; t++) {
            vec g3 = load(gy + (t + EARLIER) * gy_row + i), x3 = load(x + t * x_row + i);
            store(gx + t * gx_row + i, w3 * g0 + w2 * g1 + w1 * g2 + w0 * g3);
            s0 += g0 * x0, s1 += g0 * x1, s2 += g0 * x2, s3 += g0 * x3, s += g0;
            x0 = x1, x1 = x2, x2 = x3, g0 = g1, g1 = g2, g2 = g3;
        }
        store(gweight + i, s0), store(gweight + channels + i, s1), store(gweight + 2 * channels + i, s2);
        store(gweight + 3 * channels + i, s3), store(gbias + i, s);
    }
}

// As for `convolve`, x points to the EARLIER rows before the stretch.
static void convolve_backward(int64_t length, int64_t channels, const float *x, int64_t x_row, const float *weight,
                              const float *gy, int64_t gy_row, float *gx, int64_t gx_row, float *gweight,
                              float *gbias) {
    convolve_backward_from(length, channels, x, x_row, x + EARLIER * x_row, x_row, weight, gy, gy_row, gx, gx_row,
                           gweight, gbias);
}
