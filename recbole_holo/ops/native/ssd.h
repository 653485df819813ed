// The scan of Mamba-2 over one group of heads and a segment of one sequence, forwards and backwards.
//
//     h[t] = a[t] · h[t-1] + step[t] · B[t] x[t]ᵀ      y[t] = C[t] h[t] + skip · x[t]      a[t] = 2^(step[t] · rate)
//
// with one step, rate and skip a head, and B and C of `order` entries that the heads of a group share. Chunks of LANES
// steps are multiplied out, so that what belongs to pairs of steps (i, j) is a square matrix of one vector a row. With
// L(i, j) = a[j+1] ⋯ a[i] for j ≤ i, else 0, and M(i, j) = C[i]·B[j] L(i, j) step[j]:
//
//     y[i] = a[0] ⋯ a[i] · C[i] h + Σ_j M(i, j) x[j] + skip · x[i]
//     h behind the chunk = a[0] ⋯ a[last] · h + Σ_j L(last, j) step[j] · B[j] x[j]ᵀ
//
// L is built by products from row to row, and the gradients of the steps by sums of what belongs to the pairs around
// them: no quotients or differences, so that neither decays of nearly 0 nor of nearly 1 cost precision.
//
// A head is `vectors` vectors wide, order is a multiple of LANES. The state of a group is [heads][vectors][order]
// vectors.
#pragma once
#include "segment.h"

#define CHUNK LANES
#define SEGMENT 64  // steps from one kept state to the next, a multiple of CHUNK
#define LN_2 0.69314718055994531f

typedef struct {
    int64_t heads, vectors, order, x_row, b_row, c_row;
    const float *x, *b, *c;             // rows a step: [heads][vectors] vectors; order entries twice
    const float *steps;                 // [heads][SEGMENT], zeros from the segment's end on
    const float *rates, *skip;          // [heads]; rates are A · log2 e
    float *pairs;                       // by chunk, from ssd_prepare: C[i]·B[j], and the transposes of B and C
} ssd_inputs;

INLINE int64_t ssd_state(const ssd_inputs *s) { return s->heads * s->vectors * s->order; }  // vectors

// In floats: what a pass needs, and the pairs of a chunk.
INLINE int64_t ssd_memory(int64_t vectors, int64_t order) {
    return (2 * vectors * LANES + 2 * vectors * order + 3 * LANES) * LANES + 8 * 16;
}
INLINE int64_t ssd_pairs(int64_t order) { return (LANES + 2 * order) * LANES; }

// sums[i] += Σ_k a(k, i) · b[k] for i < R; a(k, i) = a[k · a_column + i · a_row]
template <int R>
INLINE void add_products(vec *sums, int64_t inner, const float *a, int64_t a_column, int64_t a_row, const float *b,
                         int64_t b_row) {
    for (int64_t k = 0; k < inner; k++) {
        vec right = load(b + k * b_row);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) sums[i] += a[k * a_column + i * a_row] * right;
    }
}

// Of a lower triangle (a(k, i) = 0 for k > i), or of an upper one: half of the rows need half of the products.
template <int R>
INLINE void add_lower(vec *sums, int64_t inner, const float *a, int64_t a_column, int64_t a_row, const float *b,
                      int64_t b_row) {
    const int64_t half = inner < R / 2 ? inner : R / 2;
    add_products<R>(sums, half, a, a_column, a_row, b, b_row);
    a += half * a_column + R / 2 * a_row, b += half * b_row;
    add_products<R - R / 2>(sums + R / 2, inner - half, a, a_column, a_row, b, b_row);
}

template <int R>
INLINE void add_upper(vec *sums, int64_t inner, const float *a, int64_t a_column, int64_t a_row, const float *b,
                      int64_t b_row) {
    const int64_t half = inner < R / 2 ? inner : R / 2;
    add_products<R / 2>(sums, half, a, a_column, a_row, b, b_row);
    add_products<R>(sums, inner - half, a + half * a_column, a_column, a_row, b + half * b_row, b_row);
}

// state[n] = scale · state[n] + Σ_j a[j][n] · weight[j] · x[j], without the first if `zero`. memory: LANES vectors.
INLINE void advance(int64_t order, int64_t count, int zero, float scale, const float *a, int64_t a_row,
                    const float *weight, const float *x, int64_t x_row, vec *state, float *memory) {
    for (int64_t j = 0; j < count; j++) store(memory + j * LANES, load(x + j * x_row) * weight[j]);
    for (int64_t n = 0; n < order; n += LANES) {
        vec h[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) h[i] = zero ? all(0) : state[n + i] * scale;
        add_products<LANES>(h, count, a + n, a_row, 1, memory, LANES);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) state[n + i] = h[i];
    }
}

// `rows` rows of `width` columns → `width` rows of LANES columns, the last of them zeros.
static void transpose_rows(int64_t rows, int64_t width, const float *from, int64_t from_row, float *to) {
    static const float zeros[LANES] = {};
    for (int64_t first = 0; first < width; first += LANES) {
        vec v[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) v[i] = load(i < rows ? from + i * from_row + first : zeros);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(to + (first + i) * LANES, v[i]);
    }
}

// [order] vectors → LANES rows of `order` columns
static void transpose_state(int64_t order, const vec *state, float *to) {
    for (int64_t first = 0; first < order; first += LANES) {
        vec v[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) v[i] = state[first + i];
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(to + i * order + first, v[i]);
    }
}

INLINE ivec lane(void) {
    ivec v;
    for (int j = 0; j < LANES; j++) v[j] = j;
    return v;
}

// Step sizes of a segment and their slopes, [heads][SEGMENT], from rows of dt.
static void ssd_steps(int64_t heads, int64_t length, const float *dt, int64_t dt_row, const float *bias, int softplus,
                      float *steps, float *slopes) {
    for (int64_t head = 0; head < heads; head++)
        for (int64_t t = 0; t < length; t += LANES) {
            float v[LANES] = {};
            for (int64_t j = 0; j < LANES && t + j < length; j++) v[j] = dt[(t + j) * dt_row + head] + bias[head];
            vec step = load(v), slope = all(1);
            if (softplus) step = softplus_(step, &slope);
            store(slopes + head * SEGMENT + t, slope);
            store(steps + head * SEGMENT + t, lane() < (int32_t)(length - t) ? step : all(0));
        }
}

template <int R>
static void prepare_chunk(const ssd_inputs *s, int64_t start, int64_t count) {
    float *pairs = s->pairs + start / CHUNK * ssd_pairs(s->order);
    float *bt = pairs + LANES * LANES, *ct = bt + s->order * LANES;
    transpose_rows(count, s->order, s->b + start * s->b_row, s->b_row, bt);
    transpose_rows(count, s->order, s->c + start * s->c_row, s->c_row, ct);
    vec sums[R] = {};
    add_products<R>(sums, s->order, ct, LANES, 1, bt, LANES);
    memcpy(pairs, sums, sizeof sums);
}

// Of a head and a chunk: a[0] ⋯ a[i], L and, as a vector over j, the steps.
template <int R>
struct decays {
    float since[LANES];
    vec within[LANES], steps;
    vec rest;  // L(last, j) · step[j]
};

template <int R>
INLINE decays<R> decays_of(const ssd_inputs *s, int64_t head, int64_t start) {
    decays<R> d;
    float a[LANES], since = 1.0f;
    d.steps = load(s->steps + head * SEGMENT + start);
    store(a, exp2_(d.steps * s->rates[head]));
    vec row = all(0);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
        row = lane() == i ? all(1) : row * a[i];
        d.within[i] = row;
        d.since[i] = since *= a[i];
    }
    d.rest = row * d.steps;
    return d;
}

// y (rows y_row apart) is set unless it is 0; state goes from that before the chunk (zeros if `zero`) to that behind it
// unless `last`.
template <int R>
static void forward_chunk(const ssd_inputs *s, int64_t start, int64_t count, int zero, int last, vec *state, float *y,
                          int64_t y_row, float *memory) {
    const int64_t order = s->order;
    float *weights = take(&memory, LANES * LANES), *inputs = take(&memory, LANES * LANES);
    const float *pairs = s->pairs + start / CHUNK * ssd_pairs(order), *ct = pairs + (LANES + order) * LANES;
    const float *x = s->x + start * s->x_row, *b = s->b + start * s->b_row;
    for (int64_t head = 0; head < s->heads; head++) {
        const decays<R> d = decays_of<R>(s, head, start);
        float rest[LANES];
        store(rest, d.rest);
        if (y) {
#pragma GCC unroll 16
            for (int i = 0; i < R; i++) {
                vec m = load(pairs + i * LANES) * d.within[i] * d.steps;
                store(weights + i * LANES, lane() == i ? m + s->skip[head] : m);
            }
        }
        for (int64_t v = 0; v < s->vectors; v++, state += order) {
            const float *x_v = x + (head * s->vectors + v) * LANES;
            if (y) {
                vec out[R] = {};
                if (!zero) {
                    add_products<R>(out, order, ct, LANES, 1, (float *)state, LANES);
#pragma GCC unroll 16
                    for (int i = 0; i < R; i++) out[i] *= d.since[i];
                }
                add_lower<R>(out, count, weights, 1, LANES, x_v, s->x_row);
                float *y_v = y + start * y_row + (head * s->vectors + v) * LANES;
#pragma GCC unroll 16
                for (int i = 0; i < R; i++)
                    if (i < count) store(y_v + i * y_row, out[i]);
            }
            if (last) continue;
            advance(order, count, zero, d.since[R - 1], b, s->b_row, rest, x_v, s->x_row, state, inputs);
        }
    }
}

// A chunk's function for the least number of rows that holds `count` steps.
#define BY_ROWS(count, function, ...)                                   \
    do {                                                                \
        if ((count) > LANES / 2) function<LANES>(__VA_ARGS__);          \
        else if ((count) > LANES / 4) function<LANES / 2>(__VA_ARGS__); \
        else function<LANES / 4>(__VA_ARGS__);                          \
    } while (0)

static void ssd_prepare(const ssd_inputs *s, int64_t length) {
    for (int64_t start = 0; start < length; start += CHUNK) {
        const int64_t count = length - start < CHUNK ? length - start : CHUNK;
        BY_ROWS(count, prepare_chunk, s, start, count);
    }
}

// Walks `length` ≤ SEGMENT steps. Unless they are 0, y is set and history receives the state before each chunk.
static void ssd_forward(const ssd_inputs *s, int64_t length, int zero, int last, vec *state, float *y, int64_t y_row,
                        vec *history, float *memory) {
    const int64_t size = ssd_state(s);
    for (int64_t start = 0; start < length; start += CHUNK) {
        const int64_t count = length - start < CHUNK ? length - start : CHUNK;
        const int none = zero && start == 0, end = last && start + count == length;
        if (history && !none) memcpy(history + start / CHUNK * size, state, size * sizeof(vec));
        if (y || !end) BY_ROWS(count, forward_chunk, s, start, count, none, end, state, y, y_row, memory);
    }
}

typedef struct {
    vec *state;                   // the gradient of the state behind the segment, on return of that before it
    float *x, *b, *c;             // rows as in the inputs; set
    int64_t x_row, b_row, c_row;
    float *steps, *rates, *skip;  // [heads][SEGMENT], set; [heads] twice, those of A and D, added to
} ssd_gradients;

// `zero`: the state before the chunk is zeros; `last`: the gradient of that behind it is; `first`: no one needs the
// gradient of that before it.
template <int R>
static void backward_chunk(const ssd_inputs *s, int64_t start, int64_t count, int zero, int last, int first,
                           const vec *state, const float *gy, int64_t gy_row, ssd_gradients *g, float *memory) {
    const int64_t order = s->order, width = s->vectors * LANES;
    const float *pairs = s->pairs + start / CHUNK * ssd_pairs(order), *bt = pairs + LANES * LANES;
    float *xt = take(&memory, width * LANES), *gyt = take(&memory, width * LANES);
    float *ht = take(&memory, width * order), *gt = take(&memory, width * order);
    float *weights = take(&memory, LANES * LANES), *outputs = take(&memory, LANES * LANES);
    float *gpairs_rows = take(&memory, LANES * LANES);
    const float *x = s->x + start * s->x_row, *b = s->b + start * s->b_row, *c = s->c + start * s->c_row;
    float *gx = g->x + start * g->x_row, *gb = g->b + start * g->b_row, *gc = g->c + start * g->c_row;
    const vec *h = state;
    vec *gh = g->state;
    vec gpairs[R] = {};
    gy += start * gy_row;
    for (int64_t head = 0; head < s->heads; head++, h += s->vectors * order, gh += s->vectors * order) {
        const decays<R> d = decays_of<R>(s, head, start);
        const float *x_h = x + head * width, *gy_h = gy + head * width;
        float rest[LANES];
        store(rest, d.rest);
        transpose_rows(count, width, x_h, s->x_row, xt), transpose_rows(count, width, gy_h, gy_row, gyt);
        if (!zero)
            for (int64_t v = 0; v < s->vectors; v++) transpose_state(order, h + v * order, ht + v * LANES * order);
        if (!last)
            for (int64_t v = 0; v < s->vectors; v++) transpose_state(order, gh + v * order, gt + v * LANES * order);

        // around[k]: what changes with a[k], as a vector over the steps j before k that it carries to k and behind
        vec gm[R] = {}, around[LANES] = {}, gstep = all(0), diagonal = all(0);
        add_products<R>(gm, width, gyt, LANES, 1, xt, LANES);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            diagonal += lane() == i ? gm[i] : all(0);
            vec pair = load(pairs + i * LANES), m = pair * d.within[i] * d.steps, decayed = gm[i] * d.within[i];
            gpairs[i] += decayed * d.steps;
            gstep += decayed * pair;
            around[i] = decayed * pair * d.steps;
            store(weights + i * LANES, lane() == i ? m + s->skip[head] : m);
        }
        g->skip[head] += sum(diagonal);

        vec out[LANES] = {};
        for (int64_t v = 0; v < s->vectors; v++) {
            vec gin[R] = {};
            if (!last) {
                add_products<R>(gin, order, bt, LANES, 1, (float *)(gh + v * order), LANES);
#pragma GCC unroll 16
                for (int j = 0; j < R; j++) {
                    if (j < count) out[j] += gin[j] * load(x_h + j * s->x_row + v * LANES);
                    gin[j] *= rest[j];
                }
            }
            add_upper<R>(gin, count, weights, LANES, 1, gy_h + v * LANES, gy_row);
#pragma GCC unroll 16
            for (int j = 0; j < R; j++)
                if (j < count) store(gx + j * g->x_row + head * width + v * LANES, gin[j]);
        }
        sum_all(out);
        vec leaves = out[0] * d.within[R - 1];
        gstep += leaves;
        leaves *= d.steps;

        // From the state before the chunk to each step, and from each step to the state behind.
        vec enters[LANES] = {};
        for (int64_t n = 0; n < order && !zero; n += LANES) {
            vec sums[R] = {};
            add_products<R>(sums, width, gyt, LANES, 1, ht + n, order);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++) {
                if (i >= count) continue;
                vec v = sums[i] * d.since[i];
                enters[i] += v * load(c + i * s->c_row + n);
                store(gc + i * g->c_row + n, head ? load(gc + i * g->c_row + n) + v : v);
            }
        }
        for (int64_t n = 0; n < order && !last; n += LANES) {
            vec sums[R] = {};
            add_products<R>(sums, width, xt, LANES, 1, gt + n, order);
#pragma GCC unroll 16
            for (int j = 0; j < R; j++) {
                if (j >= count) continue;
                vec v = sums[j] * rest[j];
                store(gb + j * g->b_row + n, head ? load(gb + j * g->b_row + n) + v : v);
            }
        }
        vec through = all(0);
        for (int64_t v = 0; v < s->vectors; v++) {
            if (!last && !zero)
                for (int64_t n = 0; n < order; n++) through += gh[v * order + n] * h[v * order + n];
            if (!first)
                advance(order, count, last, d.since[R - 1], c, s->c_row, d.since, gy_h + v * LANES, gy_row,
                        gh + v * order, outputs);
        }

        // a[k] carries from before the chunk to steps i ≥ k and behind, and from steps j < k to those and behind.
        float entered[LANES];
        sum_all(enters);
        store(entered, enters[0]);
        vec total = lane() == LANES - 1 ? all(sum(through) * d.since[R - 1]) : leaves;
#pragma GCC unroll 16
        for (int k = R - 1; k >= 0; k--) {
            total += lane() == LANES - 1 ? all(entered[k]) : around[k];
            around[k] = (lane() < k) | (lane() == LANES - 1) ? total : all(0);
        }
        sum_all(around);
        vec grate = around[0] * d.steps;
        g->rates[head] += sum(grate);
        store(g->steps + head * SEGMENT + start, gstep + around[0] * (s->rates[head] * LN_2));
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) store(gpairs_rows + i * LANES, gpairs[i]);
    for (int64_t n = 0; n < order; n += LANES) {
        vec sums[R];
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) sums[i] = zero || i >= count ? all(0) : load(gc + i * g->c_row + n);
        add_lower<R>(sums, count, gpairs_rows, 1, LANES, b + n, s->b_row);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
            if (i < count) store(gc + i * g->c_row + n, sums[i]);
#pragma GCC unroll 16
        for (int j = 0; j < R; j++) sums[j] = last || j >= count ? all(0) : load(gb + j * g->b_row + n);
        add_upper<R>(sums, count, gpairs_rows, LANES, 1, c + n, s->c_row);
#pragma GCC unroll 16
        for (int j = 0; j < R; j++)
            if (j < count) store(gb + j * g->b_row + n, sums[j]);
    }
}

// One segment, from the states before its chunks. `zero`, `last` and `first` as for a chunk.
static void ssd_backward(const ssd_inputs *s, int64_t length, int zero, int last, int first, const vec *history,
                         const float *gy, int64_t gy_row, ssd_gradients *g, float *memory) {
    const int64_t end = (length - 1) / CHUNK * CHUNK;
    for (int64_t start = end; start >= 0; start -= CHUNK) {
        const int64_t count = length - start < CHUNK ? length - start : CHUNK;
        BY_ROWS(count, backward_chunk, s, start, count, zero && !start, last && start == end, first && !start,
                history + start / CHUNK * ssd_state(s), gy, gy_row, g, memory);
    }
}
