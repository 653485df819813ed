// One step of Mamba blocks, or of a whole stack of layers: the next event of each of many sequences, whose states it
// moves on in place.
//
// Rows are sequences; a thread takes GROUP of them at a time, so that weights are read once for all. States have no fill:
// [taps - 1, channels] of the convolution, [channels, order] of the scan, each row's as far apart as the caller says.
// Lanes are states in the scan and channels elsewhere. Weights of channels and states are filled up to whole vectors by
// zeros, matrices are panels made by pack_panels. Tails of vectors are computed with whatever follows, and read by nothing.
#include "gemm.h"
#include "segment.h"

#define GROUP 24

INLINE int64_t full(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

INLINE vec load_first(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
    vec v = {};
    memcpy(&v, p, 4 * count);
    return v;
}

INLINE void store_first(float *p, vec v, int64_t count) {
    if (count >= LANES) store(p, v);
    else memcpy(p, &v, 4 * count);
}

// y = SiLU of the convolution at this step; the state drops its oldest input for x.
static void convolve_step(int64_t channels, int64_t taps, const float *weight, const float *bias, const float *x,
                          float *state, float *y) {
    const int64_t wide = full(channels);
    for (int64_t i = 0; i < channels; i += LANES) {
        const int64_t left = channels - i;
        const vec now = load(x + i);
        vec total = load(bias + i) + load(weight + (taps - 1) * wide + i) * now;
        for (int64_t j = 0; j < taps - 1; j++) {
            float *at = state + j * channels + i;
            vec before = load_first(at, left);
            total += load(weight + j * wide + i) * before;
            if (j) store_first(at - channels, before, left);
        }
        store_first(state + (taps - 2) * channels + i, now, left);
        store(y + i, total * sigmoid_(total));
    }
}

// h ← 2^(rate) · h + input · b of one channel; the lanes of the result add up to c · h.
INLINE vec scan_step(int64_t order, const float *rates, float step, float input, const float *b, const float *c,
                     float *h) {
    vec sum = {};
    for (int64_t n = 0; n < order; n += LANES) {
        vec state = exp2_(load(rates + n) * step) * load_first(h + n, order - n) + load(b + n) * input;
        store_first(h + n, state, order - n);
        sum += state * load(c + n);
    }
    return sum;
}

// The same with one decay for all states.
INLINE vec dual_step(int64_t order, float decay, float input, const float *b, const float *c, float *h) {
    vec sum = {};
    for (int64_t n = 0; n < order; n += LANES) {
        vec state = load_first(h + n, order - n) * decay + load(b + n) * input;
        store_first(h + n, state, order - n);
        sum += state * load(c + n);
    }
    return sum;
}

// `order` values, then zeros.
INLINE void fill(float *to, const float *from, int64_t order) {
    memset(to, 0, 4 * full(order));
    memcpy(to, from, 4 * order);
}

static panels as_panels(const float *data, int64_t inner, int64_t width) {
    return panels{inner, full(width), (float *)data, false, inner};
}

typedef struct {
    int64_t model, inner, order, rank, taps;
    const float *in_proj, *in_bias;    // panels of [model, 2·inner]; [2·inner] or 0
    const float *conv, *conv_bias;     // [taps, inner], [inner]
    const float *x_proj;               // panels of [inner, rank + 2·order]
    const float *dt_proj, *dt_bias;    // panels of [rank, inner]; [inner]
    const float *rates, *skip;         // [inner, order], A · log2 e; [inner]
    const float *out_proj, *out_bias;  // panels of [inner, model]; [model] or 0
} mamba_weights;

typedef struct {
    int64_t blocks, model, inner, order, taps, heads, groups;
    float eps;
    const float *in_proj, *in_bias;       // [blocks] of each: panels of [model, projected]; [projected] or 0
    const float *conv, *conv_bias;        // [taps, channels], [channels]: x, B, C
    const float *dt_bias, *rates, *skip;  // [heads]; rates are A · log2 e
    const float *norm;                    // [inner]
    const float *out_proj, *out_bias;     // panels of [inner, model]; [model] or 0
} mamba2_weights;

static void mamba_rows(const mamba_weights *w, int64_t rows, const float *x, int64_t x_row, float *conv, int64_t conv_row,
                       float *ssm, int64_t ssm_row, float *out, int64_t out_row) {
    const int64_t inner = w->inner, order = w->order, states = full(order), model_row = full(w->model);
    const panels in_proj = as_panels(w->in_proj, w->model, 2 * inner), dt_proj = as_panels(w->dt_proj, w->rank, inner);
    const panels x_proj = as_panels(w->x_proj, inner, w->rank + 2 * order);
    const panels out_proj = as_panels(w->out_proj, inner, w->model);
    const int64_t row = spread(full(inner)), xz_row = spread(in_proj.width + LANES), dbc_row = x_proj.width;
    float *rest = scratch(GROUP * (xz_row + 2 * row + dbc_row + model_row) + 2 * states + 8 * 16);
    float *xz = take(&rest, GROUP * xz_row), *u = take(&rest, GROUP * row), *step = take(&rest, GROUP * row);
    float *dbc = take(&rest, GROUP * dbc_row), *wide = take(&rest, GROUP * model_row);
    float *b = take(&rest, states), *c = take(&rest, states);

    multiply(rows, x, x_row, &in_proj, w->in_bias, xz, xz_row, 0);
    for (int64_t r = 0; r < rows; r++)
        convolve_step(inner, w->taps, w->conv, w->conv_bias, xz + r * xz_row, conv + r * conv_row, u + r * row);
    multiply(rows, u, row, &x_proj, 0, dbc, dbc_row, 0);
    multiply(rows, dbc, dbc_row, &dt_proj, w->dt_bias, step, row, 0);
    for (int64_t r = 0; r < rows; r++) {
        fill(b, dbc + r * dbc_row + w->rank, order), fill(c, dbc + r * dbc_row + w->rank + order, order);
        for (int64_t i = 0; i < inner; i += LANES) {
            vec slope, sums[LANES] = {}, x_i = load(u + r * row + i), dt = softplus_(load(step + r * row + i), &slope);
            const vec input = dt * x_i;
            for (int64_t j = 0; j < LANES && i + j < inner; j++)
                sums[j] = scan_step(order, w->rates + (i + j) * states, dt[j], input[j], b, c,
                                    ssm + r * ssm_row + (i + j) * order);
            sum_all(sums);
            const vec z = load(xz + r * xz_row + inner + i);
            store(u + r * row + i, (sums[0] + load(w->skip + i) * x_i) * z * sigmoid_(z));
        }
    }
    multiply(rows, u, row, &out_proj, w->out_bias, wide, model_row, 0);
    for (int64_t r = 0; r < rows; r++) memcpy(out + r * out_row, wide + r * model_row, 4 * w->model);
}

// x and out are a block's of the first row.
static void mamba2_rows(const mamba2_weights *w, int64_t block, int64_t rows, const float *x, int64_t x_row, float *conv,
                        int64_t conv_row, float *ssm, int64_t ssm_row, float *out, int64_t out_row) {
    const int64_t inner = w->inner, order = w->order, states = full(order), shared = w->groups * order;
    const int64_t channels = inner + 2 * shared, projected = inner + channels + w->heads;
    const int64_t headdim = inner / w->heads, heads = w->heads / w->groups, model_row = full(w->model);
    const panels in_proj = as_panels(w->in_proj + block * w->model * full(projected), w->model, projected);
    const panels out_proj = as_panels(w->out_proj + block * inner * model_row, inner, w->model);
    const float *in_bias = w->in_bias ? w->in_bias + block * full(projected) : 0;
    const float *out_bias = w->out_bias ? w->out_bias + block * model_row : 0;
    const float *conv_weight = w->conv + block * w->taps * full(channels), *conv_bias = w->conv_bias + block * full(channels);
    const float *norm = w->norm + block * inner;
    conv += block * (w->taps - 1) * channels, ssm += block * inner * order;
    const int64_t row = spread(in_proj.width + LANES), u_row = spread(full(channels)), y_row = full(inner);
    float *rest = scratch(GROUP * (row + model_row) + u_row + GROUP * y_row + 2 * states + 8 * 16);
    float *zxbcdt = take(&rest, GROUP * row), *wide = take(&rest, GROUP * model_row), *u = take(&rest, u_row);
    float *y = take(&rest, GROUP * y_row), *b = take(&rest, states), *c = take(&rest, states);

    multiply(rows, x, x_row, &in_proj, in_bias, zxbcdt, row, 0);
    for (int64_t r = 0; r < rows; r++) {
        const float *z = zxbcdt + r * row, *dt = z + inner + channels;
        float *y_r = y + r * y_row, *state = ssm + r * ssm_row;
        convolve_step(channels, w->taps, conv_weight, conv_bias, z + inner, conv + r * conv_row, u);
        for (int64_t h = 0; h < w->heads; h++) {
            if (h % heads == 0) {
                fill(b, u + inner + h / heads * order, order), fill(c, u + inner + shared + h / heads * order, order);
            }
            const int64_t at = block * w->heads + h;
            vec slope, step = softplus_(all(dt[h] + w->dt_bias[at]), &slope);
            const float decay = exp2_(step * w->rates[at])[0], skip = w->skip[at];
            for (int64_t i = h * headdim; i < (h + 1) * headdim; i++)
                y_r[i] = sum(dual_step(order, decay, step[0] * u[i], b, c, state + i * order)) + skip * u[i];
        }
        const int64_t width = inner / w->groups;
        for (int64_t g = 0; g < w->groups; g++) {
            float squares = 0;
            for (int64_t i = g * width; i < (g + 1) * width; i += LANES) {
                const int64_t left = (g + 1) * width - i;
                vec z_i = load_first(z + i, left), gated = load_first(y_r + i, left) * z_i * sigmoid_(z_i);
                store_first(y_r + i, gated, left);
                squares += sum(gated * gated);
            }
            const float scale = 1.0f / sqrtf(squares / width + w->eps);
            for (int64_t i = g * width; i < (g + 1) * width; i++) y_r[i] *= scale * norm[i];
        }
    }
    multiply(rows, y, y_row, &out_proj, out_bias, wide, model_row, 0);
    for (int64_t r = 0; r < rows; r++) memcpy(out + r * out_row, wide + r * model_row, 4 * w->model);
}

// A whole step as a list of operations on buffers of rows, one row a sequence.
enum kind { LAYER_NORM, RMS_NORM, LINEAR, ADD, MULTIPLY, SCALE, SILU, GELU, ROTATE, MAMBA, MAMBA2 };

typedef struct {
    int64_t kind, a, b, out;      // buffers: floats before them, of one row
    int64_t a_width, width;       // of a (and b), and of out
    int64_t conv, ssm;            // of a block: where its states are among the numbers
    int64_t heads;                // that are rotated alike
    float number;                 // eps of a norm, or the factor
    const float *weight, *bias;   // of a norm or linear map (panels); frequencies [a_width / heads / 2]
    const void *block;            // mamba_weights or mamba2_weights
} operation;

static void normalise(const operation *o, const float *x, float *y) {
    const int64_t n = o->width;
    float mean = 0, squares = 0;
    if (o->kind == LAYER_NORM) {
        vec total = {};
        for (int64_t i = 0; i < n; i += LANES) total += load_first(x + i, n - i);
        mean = sum(total) / n;
    }
    vec total = {};
    for (int64_t i = 0; i < n; i += LANES) {
        vec away = load_first(x + i, n - i) - mean;
        if (n - i < LANES)
            for (int64_t j = n - i; j < LANES; j++) away[j] = 0;
        total += away * away;
    }
    squares = sum(total);
    const float scale = 1.0f / sqrtf(squares / n + o->number);
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = (load_first(x + i, n - i) - mean) * scale;
        if (o->weight) v *= load_first(o->weight + i, n - i);
        if (o->bias) v += load_first(o->bias + i, n - i);
        store(y + i, v);
    }
}

// Coordinates i and i + half of every head turn by position · frequency[i].
static void rotate(const operation *o, int64_t position, const float *x, float *y) {
    const int64_t width = o->width / o->heads, half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        const float angle = (float)position * o->weight[i], c = cosf(angle), s = sinf(angle);
        for (int64_t h = i; h < o->width; h += width) {
            const float a = x[h], b = x[h + half];
            y[h] = a * c - b * s, y[h + half] = a * s + b * c;
        }
    }
}

static void operate(const operation *o, int64_t rows, float *buffers, const int64_t *position, float *numbers,
                    int64_t numbers_row) {
    const int64_t a_row = full(o->a_width), row = full(o->width);
    float *a = buffers + GROUP * o->a, *b = buffers + GROUP * o->b, *out = buffers + GROUP * o->out;
    float *conv = numbers + o->conv, *ssm = numbers + o->ssm;
    switch (o->kind) {
        case LAYER_NORM:
        case RMS_NORM:
            for (int64_t r = 0; r < rows; r++) normalise(o, a + r * a_row, out + r * row);
            break;
        case LINEAR: {
            const panels matrix = as_panels(o->weight, o->a_width, o->width);
            multiply(rows, a, a_row, &matrix, o->bias, out, row, 0);
            break;
        }
        case ROTATE:
            for (int64_t r = 0; r < rows; r++) rotate(o, position[r], a + r * a_row, out + r * row);
            break;
        case MAMBA:
            mamba_rows((const mamba_weights *)o->block, rows, a, a_row, conv, numbers_row, ssm, numbers_row, out, row);
            break;
        case MAMBA2: {
            const mamba2_weights *w = (const mamba2_weights *)o->block;
            for (int64_t block = 0; block < w->blocks; block++)
                mamba2_rows(w, block, rows, a + block * w->model, a_row, conv, numbers_row, ssm, numbers_row,
                            out + block * w->model, row);
            break;
        }
        default:
            for (int64_t i = 0; i < rows * row; i += LANES) {
                vec slope, x = load(a + i), y = o->kind == ADD || o->kind == MULTIPLY ? load(b + i) : x;
                store(out + i, o->kind == ADD        ? x + y
                               : o->kind == MULTIPLY ? x * y
                               : o->kind == SCALE    ? x * o->number
                               : o->kind == SILU     ? silu_(x, &slope)
                                                     : gelu_(x, &slope));
            }
    }
}

extern "C" {

// A matrix [inner, width] as the panels that the steps read: inner · full(width) floats.
void pack_panels(const float *matrix, int64_t inner, int64_t width, int64_t row, int64_t column, float *out) {
    panels packed = pack(matrix, inner, width, row, column);
    memcpy(out, packed.data, 4 * inner * packed.width);
    free(packed.data);
}

// x [batch, model] → out likewise.
void mamba_step(const mamba_weights *w, int threads, int64_t batch, const float *x, float *conv, int64_t conv_row,
                float *ssm, int64_t ssm_row, float *out) {
#pragma omp parallel for schedule(static) num_threads(threads) if (batch > GROUP)
    for (int64_t first = 0; first < batch; first += GROUP)
        mamba_rows(w, batch - first < GROUP ? batch - first : GROUP, x + first * w->model, w->model,
                   conv + first * conv_row, conv_row, ssm + first * ssm_row, ssm_row, out + first * w->model, w->model);
}

// x [batch, blocks, model] → out likewise.
void mamba2_step(const mamba2_weights *w, int threads, int64_t batch, const float *x, float *conv, int64_t conv_row,
                 float *ssm, int64_t ssm_row, float *out) {
    const int64_t groups = (batch + GROUP - 1) / GROUP, apart = w->blocks * w->model;
#pragma omp parallel for schedule(static) num_threads(threads) if (groups > 1)
    for (int64_t task = 0; task < groups * w->blocks; task++) {
        const int64_t first = task / w->blocks * GROUP, block = task % w->blocks;
        const int64_t at = first * apart + block * w->model;
        mamba2_rows(w, block, batch - first < GROUP ? batch - first : GROUP, x + at, apart, conv + first * conv_row,
                    conv_row, ssm + first * ssm_row, ssm_row, out + at, apart);
    }
}

// x [batch, width] at positions [batch]; numbers: the states, rows numbers_row apart, changed in place. The buffers of a
// row are `size` floats; the first is x, and out [batch, width] is the one that begins at `result`.
void run_steps(const operation *operations, int64_t count, int64_t size, int64_t width, int64_t result, int threads,
               int64_t batch, const float *x, const int64_t *position, float *numbers, int64_t numbers_row, float *out) {
#pragma omp parallel for schedule(static) num_threads(threads) if (batch > GROUP)
    for (int64_t first = 0; first < batch; first += GROUP) {
        const int64_t rows = batch - first < GROUP ? batch - first : GROUP, row = full(width);
        float *buffers = scratch<1>(GROUP * size);
        for (int64_t r = 0; r < rows; r++) {
            memset(buffers + r * row + row - LANES, 0, 4 * LANES);
            memcpy(buffers + r * row, x + (first + r) * width, 4 * width);
        }
        for (int64_t i = 0; i < count; i++)
            operate(operations + i, rows, buffers, position + first, numbers + first * numbers_row, numbers_row);
        for (int64_t r = 0; r < rows; r++)
            memcpy(out + (first + r) * width, buffers + GROUP * result + r * row, 4 * width);
    }
}
}
