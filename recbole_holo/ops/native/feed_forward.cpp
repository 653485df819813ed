// A position-wise feed-forward layer and its gradient:
//
//     hidden = x W_1ᵀ + b_1      out = Dropout(act(hidden)) W_2ᵀ + b_2
//
// act is GELU; or, if gated, SiLU(first half of hidden) · second half. Nothing between x and out is kept: it is computed
// again, a few rows at a time, and never leaves the cache of the thread. That costs a fifth more arithmetic.
//
// Arrays are C-contiguous float32; d and inner are multiples of LANES.
#include "dropout.h"
#include "gemm.h"
#include "segment.h"

#define AT_ONCE 96  // rows, a multiple of ROWS

typedef struct {
    int64_t rows, d, inner, gated;
    int64_t half;       // round the factors of the products to bfloat16
    int64_t threshold;  // of dropout, see dropout.h; 0 keeps all
} sizes;

typedef struct {
    const float *w_1, *b_1;  // [hidden, d], [hidden]; hidden is inner, or 2 · inner if gated
    const float *w_2, *b_2;  // [d, inner], [d]
} weights;

// One row: hidden → what W_2 sees. With `gradient` [inner], that of the latter, hidden becomes the gradient of itself.
template <bool gated>
INLINE void activate(int64_t inner, draws drawn, int32_t threshold, float scale, float *hidden, const float *gradient,
                     float *out) {
    for (int64_t i = 0; i < inner; i += LANES) {
        const vec keep = threshold ? (vec)((ivec)all(scale) & kept(&drawn, threshold)) : all(1.0f);
        vec slope, value = load(hidden + i);
        value = gated ? silu_(value, &slope) : gelu_(value, &slope);
        const vec times = gated ? keep * load(hidden + inner + i) : keep;
        store(out + i, value * times);
        if (gradient) {
            const vec g = load(gradient + i);
            if (gated) store(hidden + inner + i, g * keep * value);
            store(hidden + i, g * times * slope);
        }
    }
}

static void activate_rows(const sizes *s, int64_t first, int64_t count, const int64_t *seed, float scale, float *hidden,
                          int64_t hidden_row, const float *gradient, float *out, int64_t row) {
    for (int64_t r = 0; r < count; r++) {
        const draws drawn = draws_of(s->threshold ? *seed : 0, first + r);
        (s->gated ? activate<true> : activate<false>)(s->inner, drawn, s->threshold, scale, hidden + r * hidden_row,
                                                      gradient ? gradient + r * row : 0, out + r * row);
    }
}

extern "C" {

// x [rows, d] → out likewise.
void feed_forward(const sizes *s, const weights *w, int threads, const int64_t *seed, float scale, const float *x,
                  float *out) {
    const int64_t d = s->d, inner = s->inner, hidden = s->gated ? 2 * inner : inner;
    panels up = pack(w->w_1, d, hidden, 1, d, s->half), down = pack(w->w_2, inner, d, 1, inner, s->half);
#pragma omp parallel num_threads(threads)
    {
        tiles mine;
        const int64_t row = spread(inner), hidden_row = spread(hidden);
        float *memory = floats(AT_ONCE * (row + hidden_row) + 2 * 16), *rest = memory;
        float *h = take(&rest, AT_ONCE * hidden_row), *a = take(&rest, AT_ONCE * row);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < s->rows; first += AT_ONCE) {
            const int64_t count = s->rows - first < AT_ONCE ? s->rows - first : AT_ONCE;
            multiply(count, x + first * d, d, &up, w->b_1, h, hidden_row, 0);
            activate_rows(s, first, count, seed, scale, h, hidden_row, 0, a, row);
            multiply(count, a, row, &down, w->b_2, out + first * d, d, 0);
        }
        free(memory);
    }
    free(up.data), free(down.data);
}

// gx [rows, d] is set. sums [threads, n] must be zeros and receives, for each thread, the sums over its rows, in the
// order and shapes of `weights`.
void feed_forward_backward(const sizes *s, const weights *w, int threads, const int64_t *seed, float scale,
                           const float *x, const float *gout, float *gx, float *sums) {
    const int64_t d = s->d, inner = s->inner, hidden = s->gated ? 2 * inner : inner;
    panels up = pack(w->w_1, d, hidden, 1, d, s->half), back_up = pack(w->w_1, hidden, d, d, 1, s->half);
    panels back_down = pack(w->w_2, d, inner, inner, 1, s->half);
#pragma omp parallel num_threads(threads)
    {
        tiles mine;
        float *g_1 = sums + omp_get_thread_num() * ((hidden + inner) * d + hidden + d), *g_b1 = g_1 + hidden * d;
        float *g_2 = g_b1 + hidden, *g_b2 = g_2 + d * inner;
        const int64_t row = spread(inner), hidden_row = spread(hidden);
        float *memory = floats(AT_ONCE * (2 * row + hidden_row) + 3 * 16), *rest = memory;
        float *h = take(&rest, AT_ONCE * hidden_row), *a = take(&rest, AT_ONCE * row), *g = take(&rest, AT_ONCE * row);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < s->rows; first += AT_ONCE) {
            const int64_t count = s->rows - first < AT_ONCE ? s->rows - first : AT_ONCE;
            const float *x_here = x + first * d, *gout_here = gout + first * d;
            multiply(count, x_here, d, &up, w->b_1, h, hidden_row, 0);
            multiply(count, gout_here, d, &back_down, 0, g, row, 0);
            activate_rows(s, first, count, seed, scale, h, hidden_row, g, a, row);
            multiply(count, h, hidden_row, &back_up, 0, gx + first * d, d, 0);
            add_outer(hidden, d, count, h, hidden_row, x_here, d, g_1, d, s->half);
            add_outer(d, inner, count, gout_here, d, a, row, g_2, inner, s->half);
            add_rows(count, hidden, h, hidden_row, g_b1);
            add_rows(count, d, gout_here, d, g_b2);
        }
        free(memory);
    }
    free(up.data), free(back_up.data), free(back_down.data);
}
}
