// A Mamba-2 block as one function: in_proj, convolution, SiLU, scan, gated RMS norm, out_proj, and its gradient; and
// several narrow blocks side by side, each with weights of its own.
//
// A thread takes one block of one sequence and walks it in segments short enough that all that lies between x and out
// stays in its L2 cache. Only the state before every segment but the first is kept for the backward pass: the rest is
// computed again, segment by segment, from the last to the first.
//
// Arrays are C-contiguous float32. model and order are multiples of LANES. Heads are `vectors` vectors wide; inner =
// heads · vectors · LANES. States and their gradients are packed as [inner / LANES, order, LANES].
#include "conv.h"
#include "gemm.h"
#include "ssd.h"

typedef struct {
    int64_t batch, length, blocks, model, heads, groups, vectors, order;
    int64_t normed;  // channels of a group that the mean square is taken over: those not added to fill vectors
    int64_t half;    // round the factors of in_proj and out_proj to bfloat16
} sizes;

typedef struct {                          // [blocks] of each
    const float *in_proj, *in_bias;       // [projected, model], [projected] or 0: z, x, B, C, step size
    const float *conv, *conv_bias;        // [4, channels], [channels]: x, B, C
    const float *dt_bias, *rates, *skip;  // [heads]; rates are A · log2 e
    const float *norm;                    // [inner]
    const float *out_proj, *out_bias;     // [model, inner], [model] or 0
} weights;

extern "C" {

typedef struct {
    int64_t inner, shared, channels, projected, state;  // shared: B of all groups
} widths;

static widths widths_of(const sizes *s) {
    widths w;
    w.inner = s->heads * s->vectors * LANES, w.shared = s->groups * s->order, w.channels = w.inner + 2 * w.shared;
    w.projected = w.inner + w.channels + s->heads, w.state = w.inner * s->order;
    return w;
}

static int64_t full(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

typedef struct {
    panels in_proj, out_proj;
} factors;

// What both passes need of a segment.
typedef struct {
    float *zxbcdt;               // in_proj of x, with EARLIER rows more in front: those of the steps before
    float *xbc, *slope;          // SiLU of the convolution, and its derivative
    float *steps, *step_slopes;  // [heads][SEGMENT]
    float *y, *pairs, *memory;   // of the scan; pairs [groups]
    int64_t row, projected_row, channels_row, pairs_size;
} segment;

static int64_t segment_size(const sizes *s) {
    const widths w = widths_of(s);
    return (SEGMENT + EARLIER) * spread(full(w.projected)) + SEGMENT * (2 * spread(w.channels) + spread(w.inner)) +
           2 * s->heads * SEGMENT + s->groups * SEGMENT / CHUNK * ssd_pairs(s->order) +
           ssd_memory(s->vectors, s->order) + 8 * 16;
}

static segment new_segment(const sizes *s, float **memory) {
    const widths w = widths_of(s);
    segment g;
    g.row = spread(w.inner), g.projected_row = spread(full(w.projected)), g.channels_row = spread(w.channels);
    g.pairs_size = SEGMENT / CHUNK * ssd_pairs(s->order);
    g.zxbcdt = take(memory, (SEGMENT + EARLIER) * g.projected_row);
    g.xbc = take(memory, SEGMENT * g.channels_row), g.slope = take(memory, SEGMENT * g.channels_row);
    g.steps = take(memory, s->heads * SEGMENT), g.step_slopes = take(memory, s->heads * SEGMENT);
    g.y = take(memory, SEGMENT * g.row), g.pairs = take(memory, s->groups * g.pairs_size);
    g.memory = take(memory, ssd_memory(s->vectors, s->order));
    return g;
}

// What the scan reads of a group.
static ssd_inputs group_of(const sizes *s, const weights *w, const segment *g, int64_t group) {
    const widths wide = widths_of(s);
    const int64_t heads = s->heads / s->groups, first = group * heads;
    const float *b = g->xbc + wide.inner + group * s->order;
    return ssd_inputs{heads, s->vectors, s->order, g->channels_row, g->channels_row, g->channels_row,
                      g->xbc + first * s->vectors * LANES, b, b + wide.shared, g->steps + first * SEGMENT,
                      w->rates + first, w->skip + first, g->pairs + group * g->pairs_size};
}

// The rows of zxbcdt before a sequence's first segment.
static void begin(const sizes *s, const float *conv_state, segment *g) {
    const widths wide = widths_of(s);
    for (int64_t j = 0; j < EARLIER; j++) {
        float *row = g->zxbcdt + j * g->projected_row + wide.inner;
        if (conv_state) memcpy(row, conv_state + j * wide.channels, 4 * wide.channels);
        else memset(row, 0, 4 * wide.channels);
    }
}

// From x to y. `x` points to the segment's first row, rows are x_row apart; `known` rows before it are projected too,
// the other rows of zxbcdt in front of it are there. state is that before the segment (zeros if `zero`) and, on return,
// that behind it unless `last`.
static void up_to_scan(const sizes *s, const weights *w, const factors *f, int64_t known, int64_t count, const float *x,
                       int64_t x_row, int zero, int last, vec *state, vec *history, int slopes, segment *g) {
    const widths wide = widths_of(s);
    const int64_t inner = wide.inner, channels = wide.channels, row = g->projected_row;
    const int64_t group_state = wide.state / s->groups;
    multiply(known + count, x - known * x_row, x_row, &f->in_proj, 0, g->zxbcdt + (EARLIER - known) * row, row, 0);
    if (w->in_bias)
        for (int64_t t = EARLIER - known; t < EARLIER + count; t++)
            for (int64_t j = 0; j < wide.projected; j++) g->zxbcdt[t * row + j] += w->in_bias[j];
    convolve(count, channels, g->zxbcdt + inner, row, w->conv, w->conv_bias, g->xbc, slopes ? g->slope : 0,
             g->channels_row);
    ssd_steps(s->heads, count, g->zxbcdt + EARLIER * row + inner + channels, row, w->dt_bias, 1, g->steps,
              g->step_slopes);
    for (int64_t group = 0; group < s->groups; group++) {
        const ssd_inputs inputs = group_of(s, w, g, group);
        ssd_prepare(&inputs, count);
        ssd_forward(&inputs, count, zero, last, (vec *)((float *)state + group * group_state),
                    g->y + group * (inner / s->groups), g->row,
                    history ? (vec *)((float *)history + group * group_state * (SEGMENT / CHUNK)) : 0, g->memory);
    }
}

// 1 / √(mean square of u + eps) of LANES steps and one group, u = y · SiLU(z). y becomes u; open and slope, unless they
// are 0, receive SiLU(z) and y times its derivative.
static vec gate(int64_t count, int64_t width, int64_t normed, float eps, const float *z, int64_t z_row, float *y,
                int64_t row, float *open, float *slope) {
    vec squares[LANES] = {};
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t at = t * row + i;
            vec slope_t, y_t = load(y + at), open_t = silu_(load(z + t * z_row + i), &slope_t), gated = y_t * open_t;
            if (open) store(open + at, open_t), store(slope + at, y_t * slope_t);
            store(y + at, gated);
            squares[t] += gated * gated;
        }
    sum_all(squares);
    vec mean = squares[0] * (1.0f / normed) + eps, root;
    for (int j = 0; j < LANES; j++) root[j] = sqrtf(mean[j]);
    return 1.0f / root;
}

// With what `gate` gave: n = u · scale · norm is set, its gradient gy becomes that of y, gz is set to that of z, and
// gnorm is added to.
static void gate_backward(int64_t count, int64_t width, int64_t normed, vec scale, const float *norm, const float *u,
                          const float *open, const float *slope, float *gy, int64_t row, float *n, float *gnorm,
                          float *gz, int64_t z_row) {
    vec products[LANES] = {};
    for (int64_t i = 0; i < width; i += LANES) {
        vec total = load(gnorm + i);
        for (int64_t t = 0; t < count; t++) {
            vec unit = load(u + t * row + i) * scale[t], gn = load(gy + t * row + i);
            products[t] += gn * load(norm + i) * unit;
            total += gn * unit;
            store(n + t * row + i, unit * load(norm + i));
        }
        store(gnorm + i, total);
    }
    sum_all(products);
    const vec mean = products[0] * (1.0f / normed);
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t at = t * row + i;
            vec unit = load(u + at) * scale[t], gu = (load(gy + at) * load(norm + i) - unit * mean[t]) * scale[t];
            store(gy + at, gu * load(open + at));
            store(gz + t * z_row + i, gu * load(slope + at));
        }
}

static weights weights_of(const sizes *s, const weights *w, int64_t block) {
    const widths wide = widths_of(s);
    weights own = *w;
    own.in_proj += block * wide.projected * s->model, own.out_proj += block * s->model * wide.inner;
    if (own.in_bias) own.in_bias += block * wide.projected;
    if (own.out_bias) own.out_bias += block * s->model;
    own.conv += block * 4 * wide.channels, own.conv_bias += block * wide.channels;
    own.dt_bias += block * s->heads, own.rates += block * s->heads, own.skip += block * s->heads;
    own.norm += block * wide.inner;
    return own;
}

static factors *new_factors(const sizes *s, const weights *w, int transposed) {
    const widths wide = widths_of(s);
    factors *f = (factors *)malloc(s->blocks * sizeof(factors));
    for (int64_t block = 0; block < s->blocks; block++) {
        const weights own = weights_of(s, w, block);
        f[block].in_proj = transposed ? pack(own.in_proj, wide.projected, s->model, s->model, 1, s->half)
                                      : pack(own.in_proj, s->model, wide.projected, 1, s->model, s->half);
        f[block].out_proj = transposed ? pack(own.out_proj, s->model, wide.inner, wide.inner, 1, s->half)
                                       : pack(own.out_proj, wide.inner, s->model, 1, wide.inner, s->half);
    }
    return f;
}

static void release(const sizes *s, factors *f) {
    for (int64_t block = 0; block < s->blocks; block++) free(f[block].in_proj.data), free(f[block].out_proj.data);
    free(f);
}

// x [batch, length, blocks, model] → out likewise. kept [batch, blocks, segments - 1, state] is for the backward pass,
// or 0. conv_state [batch, blocks, 3, channels] and ssm_state [batch, blocks, state]: what came before and, on return,
// what the next step needs; or both 0 for whole sequences.
void mamba2_forward(const sizes *s, const weights *shared, float eps, int threads, const float *x, float *kept,
                    float *conv_state, float *ssm_state, float *out) {
    const widths wide = widths_of(s);
    const int64_t inner = wide.inner, width = inner / s->groups, x_row = s->blocks * s->model;
    const int64_t segments = (s->length + SEGMENT - 1) / SEGMENT;
    factors *f = new_factors(s, shared, 0);
#pragma omp parallel num_threads(threads)
    {
        tiles mine;
        float *memory = floats(segment_size(s) + wide.state), *rest = memory;
        segment g = new_segment(s, &rest);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->blocks; task++) {
            const int64_t block = task % s->blocks, first = task / s->blocks * s->length;
            const weights w = weights_of(s, shared, block);
            float *state = ssm_state ? ssm_state + task * wide.state : rest;
            float *conv_own = conv_state ? conv_state + task * EARLIER * wide.channels : 0;
            begin(s, conv_own, &g);
            for (int64_t start = 0; start < s->length; start += SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                const int64_t at = (first + start) * x_row + block * s->model;
                if (kept && start)
                    memcpy(kept + (task * (segments - 1) + start / SEGMENT - 1) * wide.state, state, 4 * wide.state);
                up_to_scan(s, &w, f + block, 0, count, x + at, x_row, !ssm_state && !start,
                           !ssm_state && start + count == s->length, (vec *)state, 0, 0, &g);
                for (int64_t group = 0; group < s->groups; group++)
                    for (int64_t t = 0; t < count; t += LANES) {
                        const int64_t steps = count - t < LANES ? count - t : LANES;
                        float *y = g.y + t * g.row + group * width;
                        const vec scale = gate(steps, width, s->normed, eps,
                                               g.zxbcdt + (EARLIER + t) * g.projected_row + group * width,
                                               g.projected_row, y, g.row, 0, 0);
                        for (int64_t j = 0; j < steps; j++)
                            for (int64_t i = 0; i < width; i += LANES) {
                                const vec norm = load(w.norm + group * width + i);
                                store(y + j * g.row + i, load(y + j * g.row + i) * norm * scale[j]);
                            }
                    }
                multiply(count, g.y, g.row, &f[block].out_proj, w.out_bias, out + at, x_row, 0);
                for (int64_t j = 0; j < EARLIER; j++) {
                    float *row = g.zxbcdt + j * g.projected_row + inner;
                    memmove(row, row + count * g.projected_row, 4 * wide.channels);
                    if (conv_own) memcpy(conv_own + j * wide.channels, row, 4 * wide.channels);
                }
            }
        }
        free(memory);
    }
    release(s, f);
}

// gx [batch, length, blocks, model] is set. sums [threads, n] must be zeros and receives, for each thread, the sums
// over its sequences, in the order and shapes of `weights` (but in_bias is as wide as whole vectors), with the gradient
// of A for rates. conv_state and ssm_state are those that the forward pass began with, or 0 for zeros; no gradient goes
// back through them.
void mamba2_backward(const sizes *s, const weights *shared, float eps, int threads, const float *x, const float *kept,
                     const float *conv_state, const float *ssm_state, const float *gout, float *gx, float *sums) {
    const widths wide = widths_of(s);
    const int64_t inner = wide.inner, channels = wide.channels, projected = wide.projected, model = s->model;
    const int64_t width = inner / s->groups, heads = s->heads / s->groups, x_row = s->blocks * model;
    const int64_t group_state = wide.state / s->groups, segments = (s->length + SEGMENT - 1) / SEGMENT;
    const int64_t sizes_sum = (projected + inner + 1) * model + full(projected) + 5 * channels + 3 * s->heads + inner;
    factors *f = new_factors(s, shared, 0), *transposed = new_factors(s, shared, 1);
#pragma omp parallel num_threads(threads)
    {
        tiles mine;
        const int64_t row = spread(inner), projected_row = spread(full(projected)), channels_row = spread(channels);
        const int64_t area = SEGMENT * row;
        float *memory = floats(segment_size(s) + 4 * area + (SEGMENT + EARLIER) * channels_row +
                               SEGMENT * (projected_row + s->heads) + (SEGMENT / CHUNK + 2) * wide.state + 16 * 16);
        float *rest = memory;
        segment g = new_segment(s, &rest);
        float *gy = take(&rest, area), *n = take(&rest, area), *open = take(&rest, area), *slope = take(&rest, area);
        float *gxbc = take(&rest, (SEGMENT + EARLIER) * channels_row), *gzxbcdt = take(&rest, SEGMENT * projected_row);
        float *gsteps = take(&rest, s->heads * SEGMENT);
        float *history = take(&rest, SEGMENT / CHUNK * wide.state);
        float *state = take(&rest, wide.state), *gstate = take(&rest, wide.state);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->blocks; task++) {
            const int64_t block = task % s->blocks, first = task / s->blocks * s->length;
            const int64_t last = (s->length - 1) / SEGMENT * SEGMENT;
            const weights w = weights_of(s, shared, block);
            float *of_thread = sums + omp_get_thread_num() * s->blocks * sizes_sum;
            auto own = [&](int64_t count) {
                of_thread += s->blocks * count;
                return of_thread - (s->blocks - block) * count;
            };
            float *g_in = own(projected * model), *g_in_bias = own(full(projected)), *g_conv = own(4 * channels);
            float *g_conv_bias = own(channels), *g_dt_bias = own(s->heads), *g_rates = own(s->heads);
            float *g_skip = own(s->heads), *g_norm = own(inner), *g_out = own(model * inner), *g_out_bias = own(model);
            memset(gxbc + (s->length - last) * channels_row, 0, 4 * EARLIER * channels_row);
            for (int64_t start = last; start >= 0; start -= SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                const int64_t at = (first + start) * x_row + block * model;
                const float *before = start      ? kept + (task * (segments - 1) + start / SEGMENT - 1) * wide.state
                                      : ssm_state ? ssm_state + task * wide.state
                                                  : 0;
                if (before) memcpy(state, before, 4 * wide.state);
                if (!start) begin(s, conv_state ? conv_state + task * EARLIER * channels : 0, &g);
                up_to_scan(s, &w, f + block, start ? EARLIER : 0, count, x + at, x_row, !before, 1, (vec *)state,
                           (vec *)history, 1, &g);

                multiply(count, gout + at, x_row, &transposed[block].out_proj, 0, gy, row, 0);
                for (int64_t group = 0; group < s->groups; group++)
                    for (int64_t from = 0; from < count; from += LANES) {
                        const int64_t steps = count - from < LANES ? count - from : LANES;
                        const int64_t here = from * row + group * width, there = from * projected_row + group * width;
                        const vec scale = gate(steps, width, s->normed, eps, g.zxbcdt + EARLIER * projected_row + there,
                                               projected_row, g.y + here, row, open + here, slope + here);
                        gate_backward(steps, width, s->normed, scale, w.norm + group * width, g.y + here, open + here,
                                      slope + here, gy + here, row, n + here, g_norm + group * width, gzxbcdt + there,
                                      projected_row);
                    }
                add_outer(model, inner, count, gout + at, x_row, n, row, g_out, inner, s->half);
                if (w.out_bias) add_rows(count, model, gout + at, x_row, g_out_bias);

                for (int64_t group = 0; group < s->groups; group++) {
                    const ssd_inputs inputs = group_of(s, &w, &g, group);
                    const int64_t head = group * heads, state_at = group * group_state;
                    float *gb = gxbc + inner + group * s->order;
                    ssd_gradients into;
                    into.state = (vec *)(gstate + state_at), into.steps = gsteps + head * SEGMENT;
                    into.x = gxbc + group * width, into.b = gb, into.c = gb + wide.shared;
                    into.x_row = into.b_row = into.c_row = channels_row;
                    into.rates = g_rates + head, into.skip = g_skip + head;
                    ssd_backward(&inputs, count, !before, start == last, !start,
                                 (vec *)(history + state_at * (SEGMENT / CHUNK)), gy + group * width, row, &into,
                                 g.memory);
                }
                for (int64_t head = 0; head < s->heads; head++)
                    for (int64_t t = 0; t < count; t++) {
                        const float gdt = gsteps[head * SEGMENT + t] * g.step_slopes[head * SEGMENT + t];
                        gzxbcdt[t * projected_row + inner + channels + head] = gdt;
                        g_dt_bias[head] += gdt;
                    }
                for (int64_t i = 0; i < count * channels_row; i += LANES)
                    store(gxbc + i, load(gxbc + i) * load(g.slope + i));
                convolve_backward(count, channels, g.zxbcdt + inner, projected_row, w.conv, gxbc, channels_row,
                                  gzxbcdt + inner, projected_row, g_conv, g_conv_bias);
                memmove(gxbc + SEGMENT * channels_row, gxbc, 4 * EARLIER * channels_row);  // behind the next segment

                multiply(count, gzxbcdt, projected_row, &transposed[block].in_proj, 0, gx + at, x_row, 0);
                add_outer(projected, model, count, gzxbcdt, projected_row, x + at, x_row, g_in, model, s->half);
                if (w.in_bias) add_rows(count, full(projected), gzxbcdt, projected_row, g_in_bias);
            }
        }
        free(memory);
    }
    release(s, f), release(s, transposed);
}
}
