// The selective scan over a stretch of one sequence, forwards and backwards.
//
//     h[t][n] = 2^(step[t] · rate[n]) · h[t-1][n] + input[t] · B[t][n]      y[t] += Σ_n C[t][n] · h[t][n]
//
// Lanes are neighbouring channels. Values of a step and channel lie in rows, `row` floats apart; B and C lie together in
// rows, `bc_row` apart. State, rate and their gradients are [blocks][order] vectors: a block is LANES channels. Rates are
// A · log2 e, so that a decay is a power of two. order is a multiple of STATES.
#pragma once
#include "simd.h"

#define STRETCH 64     // steps from one kept state to the next: what the backward pass computes again at a time
#define STATES 4       // of them walk together in the backward pass: their history of one stretch is as large as an L1 cache
#define LN_2 0.69314718055994531f

typedef struct {
    int64_t blocks, order, row, bc_row;
    const float *step, *input, *b, *c;
} scan_inputs;

INLINE void forward_states(const int count, const scan_inputs *s, int64_t length, int64_t block, int64_t first,
                           const vec *rates, vec *states, float *y) {
    vec h[16];
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) h[n] = states[n];
    for (int64_t t = 0; t < length; t++) {
        const int64_t at = t * s->row + block * LANES;
        const float *b = s->b + t * s->bc_row + first, *c = s->c + t * s->bc_row + first;
        vec step = load(s->step + at), input = load(s->input + at), even = load(y + at), odd = all(0);
#pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            h[n] = exp2_(step * rates[n]) * h[n] + input * b[n];
            if (n % 2) odd += h[n] * c[n];
            else even += h[n] * c[n];
        }
        store(y + at, even + odd);
    }
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) states[n] = h[n];
}

// Walks `length` steps from `states` on; y is added to. Keeps the state before every STRETCH-th step if `kept` is not 0.
static void scan_forward(const scan_inputs *s, int64_t length, const vec *rates, vec *states, float *y, float *kept) {
    const int64_t size = s->blocks * s->order;
    for (int64_t start = 0; start < length; start += STRETCH) {
        const int64_t count = length - start < STRETCH ? length - start : STRETCH;
        scan_inputs part = *s;
        part.step += start * s->row, part.input += start * s->row;
        part.b += start * s->bc_row, part.c += start * s->bc_row;
        if (kept) {
            memcpy(kept, states, size * sizeof(vec));
            kept += size * LANES;
        }
        for (int64_t block = 0; block < s->blocks; block++) {
            const vec *rate = rates + block * s->order;
            vec *state = states + block * s->order;
            int64_t n = 0;
            for (; n + 16 <= s->order; n += 16)
                forward_states(16, &part, count, block, n, rate + n, state + n, y + start * s->row);
            for (; n < s->order; n += STATES)
                forward_states(STATES, &part, count, block, n, rate + n, state + n, y + start * s->row);
        }
    }
}

typedef struct {
    vec *rates, *states;        // gradients of the rates (summed) and of the states (carried backwards), [blocks][order]
    float *step, *input;        // rows as in the inputs; added to
    vec *b, *c;                 // sums over blocks, not yet over lanes: [order / STATES][STRETCH][STATES]
} scan_gradients;

INLINE void backward_states(const int count, const scan_inputs *s, int64_t length, int64_t block, int64_t first,
                            const vec *rates, const float *kept, float *y, const float *gy, scan_gradients *g) {
    vec before[STRETCH + 1][STATES], decay[STRETCH][STATES], h[STATES], gh[STATES], grate[STATES];
    const int64_t order = s->order, at_state = block * order + first;
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) before[0][n] = h[n] = load(kept + (at_state + n) * LANES);
    for (int64_t t = 0; t < length; t++) {
        const int64_t at = t * s->row + block * LANES;
        const float *b = s->b + t * s->bc_row + first, *c = s->c + t * s->bc_row + first;
        vec step = load(s->step + at), input = load(s->input + at), out = load(y + at);
#pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            vec a = exp2_(step * rates[n]);
            h[n] = a * h[n] + input * b[n];
            decay[t][n] = a;
            before[t + 1][n] = h[n];
            out += h[n] * c[n];
        }
        store(y + at, out);
    }
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) gh[n] = g->states[at_state + n], grate[n] = g->rates[at_state + n];
    for (int64_t t = length - 1; t >= 0; t--) {
        const int64_t at = t * s->row + block * LANES;
        const float *b = s->b + t * s->bc_row + first, *c = s->c + t * s->bc_row + first;
        vec step = load(s->step + at), input = load(s->input + at), out = load(gy + at);
        vec gstep = load(g->step + at), ginput = load(g->input + at);
        vec *gb = g->b + first * STRETCH + t * STATES, *gc = g->c + first * STRETCH + t * STATES;
#pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            vec state = gh[n] + out * c[n];
            gc[n] += out * before[t + 1][n];
            gb[n] += state * input;
            ginput += state * b[n];
            gh[n] = state * decay[t][n];
            vec exponent = gh[n] * before[t][n];
            gstep += exponent * rates[n];
            grate[n] += exponent * step;
        }
        store(g->step + at, gstep), store(g->input + at, ginput);
    }
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) g->states[at_state + n] = gh[n], g->rates[at_state + n] = grate[n];
}

// The sums of step t over lanes, for all states.
static void sum_lanes(const vec *sums, int64_t t, int64_t order, float *out) {
    for (int64_t first = 0; first < order; first += LANES) {
        const int64_t count = order - first < LANES ? order - first : LANES;
        vec v[LANES] = {};
        for (int64_t n = 0; n < count; n += STATES)
            memcpy(v + n, sums + (first + n) * STRETCH + t * STATES, STATES * sizeof(vec));
        sum_all(v);
        memcpy(out + first, v, 4 * count);
    }
}

// One stretch: walks it again from the state `kept` before it, adding to y, then backwards from gy. gb[t · bc_row + n]
// and gc are set. The gradient of step is that of step · log2 e; the gradient of rates is that of A.
static void scan_backward(const scan_inputs *s, int64_t length, const vec *rates, const float *kept, float *y,
                          const float *gy, scan_gradients *g, float *gb, float *gc) {
    memset(g->b, 0, STRETCH * s->order * sizeof(vec));
    memset(g->c, 0, STRETCH * s->order * sizeof(vec));
    for (int64_t n = 0; n < s->order; n += STATES)
        for (int64_t block = 0; block < s->blocks; block++)
            backward_states(STATES, s, length, block, n, rates + block * s->order + n, kept, y, gy, g);
    for (int64_t t = 0; t < length; t++) {
        sum_lanes(g->b, t, s->order, gb + t * s->bc_row);
        sum_lanes(g->c, t, s->order, gc + t * s->bc_row);
    }
}
