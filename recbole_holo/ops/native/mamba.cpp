// A Mamba-1 block as one function: in_proj, convolution, SiLU, x_proj, step size, scan, gate, out_proj, and its gradient.
//
// A thread takes one sequence and walks it in segments short enough that all that lies between x and out stays in its L2
// cache. Only the state before every STRETCH-th step is kept for the backward pass: the rest is computed again, segment
// by segment, from the last to the first. That costs a fifth more arithmetic, and saves moving it through the memory.
//
// Arrays are C-contiguous float32. model and inner are multiples of LANES. Rates, states and their gradients are packed
// as [inner / LANES, order, LANES].
#include "conv.h"
#include "gemm.h"
#include "scan.h"
#include "segment.h"

#define SEGMENT 64  // steps, a multiple of STRETCH

typedef struct {
    int64_t batch, length, model, inner, order, rank;
    int64_t half;  // round the factors of all products but dt_proj's to bfloat16
} sizes;

typedef struct {
    const float *in_proj, *in_bias;    // [2·inner, model], [2·inner]; x before z
    const float *conv, *conv_bias;     // [4, inner], [inner]
    const float *x_proj;               // [rank + 2·order, inner]: step size, B, C
    const float *dt_proj, *dt_bias;    // [inner, rank], [inner]
    const float *rates, *skip;         // A · log2 e, packed; [inner]
    const float *out_proj, *out_bias;  // [model, inner], [model]
} weights;

extern "C" {

typedef struct {
    panels in_proj, x_proj, dt_proj, out_proj;
} factors;

static void release(factors *f) {
    free(f->in_proj.data), free(f->x_proj.data), free(f->dt_proj.data), free(f->out_proj.data);
}

// What both passes need of a segment between x and the scan.
typedef struct {
    float *xz;             // in_proj of x, with EARLIER rows more in front: those of the steps before
    float *x, *x_slope;    // SiLU of the convolution, and its derivative
    float *dbc;            // x_proj of that
    float *step, *slope;   // softplus of dt_proj, and its derivative
    float *input, *y;      // step · x; the output of the scan, without gate
    int64_t row, xz_row, dbc_row;
} segment;

static int64_t segment_size(const sizes *s, int64_t dbc_row) {
    return SEGMENT * (6 * spread(s->inner) + dbc_row) + (SEGMENT + EARLIER) * spread(2 * s->inner) + 8 * 16;
}

static segment new_segment(const sizes *s, int64_t dbc_row, float **memory) {
    segment g;
    g.row = spread(s->inner), g.xz_row = spread(2 * s->inner), g.dbc_row = dbc_row;
    const int64_t area = SEGMENT * g.row;
    g.xz = take(memory, (SEGMENT + EARLIER) * g.xz_row), g.dbc = take(memory, SEGMENT * dbc_row);
    g.x = take(memory, area), g.x_slope = take(memory, area), g.step = take(memory, area), g.slope = take(memory, area);
    g.input = take(memory, area), g.y = take(memory, area);
    return g;
}

// From x to what the scan reads; y starts at the skip. `x` points to the segment's first row. The rows of xz before it
// come from x too if it has any, else from `state` [3, inner], else they are zeros.
static scan_inputs before_scan(const sizes *s, const weights *w, const factors *f, int64_t start, int64_t count,
                               const float *x, const float *state, segment *g) {
    const int64_t inner = s->inner, row = g->row, xz_row = g->xz_row, known = start < EARLIER ? start : EARLIER;
    for (int64_t j = 0; j < EARLIER - known; j++) {
        if (state) memcpy(g->xz + j * xz_row, state + (start + j) * inner, 4 * inner);
        else memset(g->xz + j * xz_row, 0, 4 * inner);
    }
    multiply(known + count, x - known * s->model, s->model, &f->in_proj, w->in_bias,
             g->xz + (EARLIER - known) * xz_row, xz_row, 0);
    convolve(count, inner, g->xz, xz_row, w->conv, w->conv_bias, g->x, g->x_slope, row);
    multiply(count, g->x, row, &f->x_proj, 0, g->dbc, g->dbc_row, 0);
    multiply(count, g->dbc, g->dbc_row, &f->dt_proj, w->dt_bias, g->step, row, 0);
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < inner; i += LANES) {
            const int64_t at = t * row + i;
            vec slope, v = load(g->x + at), step = softplus_(load(g->step + at), &slope);
            store(g->step + at, step), store(g->slope + at, slope);
            store(g->input + at, step * v), store(g->y + at, load(w->skip + i) * v);
        }
    const float *b = g->dbc + s->rank;
    return scan_inputs{inner / LANES, s->order, row, g->dbc_row, g->step, g->input, b, b + s->order};
}

// x [batch, length, model] → out likewise. kept [batch, ceil(length / STRETCH), state] is for the backward pass, or 0.
// conv_state [batch, 3, inner] and ssm_state [batch, state]: what came before and, on return, what the next step needs;
// or 0 for sequences from their beginning.
void mamba_forward(const sizes *s, const weights *w, int threads, const float *x, float *kept, float *conv_state,
                   float *ssm_state, float *out) {
    const int64_t inner = s->inner, model = s->model, state_size = inner * s->order;
    const int64_t stretches = (s->length + STRETCH - 1) / STRETCH;
    factors f = {pack(w->in_proj, model, 2 * inner, 1, model, s->half),
                 pack(w->x_proj, inner, s->rank + 2 * s->order, 1, inner, s->half),
                 pack(w->dt_proj, s->rank, inner, 1, s->rank), pack(w->out_proj, inner, model, 1, inner, s->half)};
#pragma omp parallel num_threads(threads)
    {
        tiles mine;
        float *memory = floats(segment_size(s, f.x_proj.width) + state_size), *rest = memory;
        segment g = new_segment(s, f.x_proj.width, &rest);
        vec *state = (vec *)rest;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s->batch; b++) {
            float *conv_b = conv_state ? conv_state + b * EARLIER * inner : 0;
            if (ssm_state) memcpy(state, ssm_state + b * state_size, 4 * state_size);
            else memset(state, 0, 4 * state_size);
            for (int64_t start = 0; start < s->length; start += SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                const int64_t at = (b * s->length + start) * model;
                scan_inputs inputs = before_scan(s, w, &f, start, count, x + at, conv_b, &g);
                scan_forward(&inputs, count, (const vec *)w->rates, state, g.y,
                             kept ? kept + (b * stretches + start / STRETCH) * state_size : 0);
                for (int64_t t = 0; t < count; t++)
                    for (int64_t i = 0; i < inner; i += LANES) {
                        vec z = load(g.xz + (EARLIER + t) * g.xz_row + inner + i);
                        store(g.y + t * g.row + i, load(g.y + t * g.row + i) * z * sigmoid_(z));
                    }
                multiply(count, g.y, g.row, &f.out_proj, w->out_bias, out + at, model, 0);
                if (conv_b && start + count == s->length)
                    for (int64_t j = 0; j < EARLIER; j++)
                        memcpy(conv_b + j * inner, g.xz + (count + j) * g.xz_row, 4 * inner);
            }
            if (ssm_state) memcpy(ssm_state + b * state_size, state, 4 * state_size);
        }
        free(memory);
    }
    release(&f);
}

// gx [batch, length, model] is set. sums [threads, n] must be zeros and receives, for each thread, the sums over its
// sequences, in the order and shapes of `weights`, but dt_proj as [rank, inner] and rates as the gradient of A, packed.
// conv_state and the states kept are those that the forward pass began with; no gradient goes back through them.
void mamba_backward(const sizes *s, const weights *w, int threads, const float *x, const float *kept,
                    const float *conv_state, const float *gout, float *gx, float *sums) {
    const int64_t inner = s->inner, model = s->model, order = s->order, rank = s->rank, projected = rank + 2 * order;
    const int64_t state_size = inner * order, stretches = (s->length + STRETCH - 1) / STRETCH;
    const bool half = s->half;
    factors f = {pack(w->in_proj, model, 2 * inner, 1, model, half), pack(w->x_proj, inner, projected, 1, inner, half),
                 pack(w->dt_proj, rank, inner, 1, rank), {}};
    factors transposed = {pack(w->in_proj, 2 * inner, model, model, 1, half),
                          pack(w->x_proj, projected, inner, inner, 1, half),
                          pack(w->dt_proj, inner, rank, rank, 1), pack(w->out_proj, model, inner, inner, 1, half)};
    const int64_t own = 3 * inner * model + (projected + rank + 9) * inner + state_size + model;
#pragma omp parallel num_threads(threads)
    {
        tiles mine;
        float *g_in = sums + own * omp_get_thread_num(), *g_in_bias = g_in + 2 * inner * model;
        float *g_conv = g_in_bias + 2 * inner, *g_conv_bias = g_conv + 4 * inner, *g_x = g_conv_bias + inner;
        float *g_dt = g_x + projected * inner, *g_dt_bias = g_dt + rank * inner, *g_rates = g_dt_bias + inner;
        float *g_skip = g_rates + state_size, *g_out = g_skip + inner, *g_out_bias = g_out + model * inner;

        const int64_t row = spread(inner), xz_row = spread(2 * inner), area = SEGMENT * row, dbc_row = f.x_proj.width, partial = STRETCH * order * LANES;
        const int64_t gdt_row = transposed.dt_proj.width;
        float *memory = floats((segment_size(s, dbc_row) + 5 * area + EARLIER * row + SEGMENT * xz_row + 2 * state_size + 2 * partial +
                               SEGMENT * (dbc_row + gdt_row) + 10 * 16));
        float *rest = memory;
        segment g = new_segment(s, dbc_row, &rest);
        float *gy = take(&rest, area), *gate = take(&rest, area), *gstep = take(&rest, area);
        float *ginput = take(&rest, area), *gconv = take(&rest, area + EARLIER * row), *gxz = take(&rest, SEGMENT * xz_row);
        float *gdbc = take(&rest, SEGMENT * dbc_row), *gdt = take(&rest, SEGMENT * gdt_row);
        vec *gstate = (vec *)take(&rest, state_size), *grates = (vec *)take(&rest, state_size);
        vec *gb = (vec *)take(&rest, partial), *gc = (vec *)take(&rest, partial);
        memset(grates, 0, 4 * state_size);
        memset(gdbc, 0, 4 * SEGMENT * dbc_row);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < s->batch; b++) {
            const int64_t last = (s->length - 1) / SEGMENT * SEGMENT;
            memset(gstate, 0, 4 * state_size);
            memset(gconv + (s->length - last) * row, 0, 4 * EARLIER * row);
            for (int64_t start = last; start >= 0; start -= SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                const int64_t here = (b * s->length + start) * model;
                scan_inputs inputs = before_scan(s, w, &f, start, count, x + here,
                                                 conv_state ? conv_state + b * EARLIER * inner : 0, &g);

                // out = (y · SiLU(z)) out_projᵀ. `gate` becomes SiLU(z), the half of gxz for z its gradient but for y.
                multiply(count, gout + here, model, &transposed.out_proj, 0, gate, row, 0);
                for (int64_t t = 0; t < count; t++)
                    for (int64_t i = 0; i < inner; i += LANES) {
                        const int64_t at = t * row + i, at_z = t * xz_row + inner + i;
                        vec slope, gated = load(gate + at), open = silu_(load(g.xz + EARLIER * xz_row + at_z), &slope);
                        store(gy + at, gated * open), store(gate + at, open);
                        store(gxz + at_z, gated * slope);
                    }

                memset(gstep, 0, 4 * count * row), memset(ginput, 0, 4 * count * row);
                for (int64_t from = (count - 1) / STRETCH * STRETCH; from >= 0; from -= STRETCH) {
                    const int64_t steps = count - from < STRETCH ? count - from : STRETCH, at = from * row;
                    scan_inputs part = inputs;
                    part.step += at, part.input += at, part.b += from * dbc_row, part.c += from * dbc_row;
                    scan_gradients into = {grates, gstate, gstep + at, ginput + at, gb, gc};
                    float *gb_here = gdbc + from * dbc_row + rank;
                    scan_backward(&part, steps, (const vec *)w->rates,
                                  kept + (b * stretches + (start + from) / STRETCH) * state_size, g.y + at, gy + at,
                                  &into, gb_here, gb_here + order);
                }

                // From here on y is gated, as out_proj saw it, and ginput is the gradient of x.
                for (int64_t i = 0; i < inner; i += LANES) {
                    vec skip = load(w->skip + i), gskip = load(g_skip + i), gbias = load(g_dt_bias + i);
                    for (int64_t t = 0; t < count; t++) {
                        const int64_t at = t * row + i, at_z = t * xz_row + inner + i;
                        vec y = load(g.y + at), x_t = load(g.x + at), gy_t = load(gy + at), gin = load(ginput + at);
                        store(gxz + at_z, load(gxz + at_z) * y);
                        store(g.y + at, y * load(gate + at));
                        vec gstep_t = (load(gstep + at) * LN_2 + gin * x_t) * load(g.slope + at);
                        store(gstep + at, gstep_t);
                        store(ginput + at, gin * load(g.step + at) + skip * gy_t);
                        gskip += gy_t * x_t, gbias += gstep_t;
                    }
                    store(g_skip + i, gskip), store(g_dt_bias + i, gbias);
                }
                add_outer(model, inner, count, gout + here, model, g.y, row, g_out, inner, half);
                add_rows(count, model, gout + here, model, g_out_bias);

                multiply(count, gstep, row, &transposed.dt_proj, 0, gdt, gdt_row, 0);
                for (int64_t t = 0; t < count; t++) memcpy(gdbc + t * dbc_row, gdt + t * gdt_row, 4 * rank);
                add_outer(rank, inner, count, g.dbc, dbc_row, gstep, row, g_dt, inner);
                multiply(count, gdbc, dbc_row, &transposed.x_proj, 0, ginput, row, 1);
                add_outer(projected, inner, count, gdbc, dbc_row, g.x, row, g_x, inner, half);

                for (int64_t i = 0; i < count * row; i += LANES)
                    store(gconv + i, load(ginput + i) * load(g.x_slope + i));
                convolve_backward(count, inner, g.xz, xz_row, w->conv, gconv, row, gxz, xz_row, g_conv, g_conv_bias);
                memmove(gconv + area, gconv, 4 * EARLIER * row);  // they follow the segment before this one

                multiply(count, gxz, xz_row, &transposed.in_proj, 0, gx + here, model, 0);
                add_outer(2 * inner, model, count, gxz, xz_row, x + here, model, g_in, model, half);
                add_rows(count, 2 * inner, gxz, xz_row, g_in_bias);
            }
        }
        memcpy(g_rates, grates, 4 * state_size);
        free(memory);
    }
    release(&f), release(&transposed);
}
}
