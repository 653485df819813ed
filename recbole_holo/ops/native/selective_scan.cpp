// The selective scan as an operation of its own, with step size, skip and gate around it.
//
// Arrays are C-contiguous float32, but rows of z are z_row apart. inner is a multiple of LANES, order of STATES. Rates,
// states and their gradients are packed as [inner / LANES, order, LANES]; below, state = inner · order.
#include "scan.h"
#include "segment.h"

#define SEGMENT 64  // steps, a multiple of STRETCH

extern "C" {

int64_t lanes(void) { return LANES; }
int64_t stretch(void) { return STRETCH; }
int64_t states_together(void) { return STATES; }

typedef struct {
    int64_t batch, length, inner, order, groups, softplus, z_row;  // a thread takes a sequence and one of `groups` of its channels
    const float *u, *delta, *b, *c;         // [batch, length, inner] twice, [batch, length, order] twice
    const float *rates, *skip, *bias, *z;   // A · log2 e, packed; [inner] twice; [batch, length, inner], or 0
} scan_arguments;

typedef struct {
    int64_t sequence, first, width, steps;  // channels first, …, first + width - 1; steps: kept states of a sequence
    int64_t row;
    float *step, *slope, *input, *y;
} part;

static part which(const scan_arguments *s, int64_t task, float **memory) {
    const int64_t blocks = s->inner / LANES, each = (blocks + s->groups - 1) / s->groups, first = task % s->groups * each;
    part p;
    p.sequence = task / s->groups, p.first = first * LANES, p.steps = (s->length + STRETCH - 1) / STRETCH;
    p.width = (first + each < blocks ? each : blocks - first) * LANES;
    p.row = spread(each * LANES);
    p.step = take(memory, SEGMENT * p.row), p.slope = take(memory, SEGMENT * p.row);
    p.input = take(memory, SEGMENT * p.row), p.y = take(memory, SEGMENT * p.row);
    return p;
}

static int64_t part_row(const scan_arguments *s) {
    return spread((s->inner / LANES + s->groups - 1) / s->groups * LANES);
}

static scan_inputs prepare(const scan_arguments *s, const part *p, int64_t start, int64_t count) {
    const int64_t from = p->sequence * s->length + start;
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < p->width; i += LANES) {
            const int64_t at = t * p->row + i, there = (from + t) * s->inner + p->first + i;
            vec u = load(s->u + there), step = load(s->delta + there) + load(s->bias + p->first + i), slope = all(1);
            if (s->softplus) step = softplus_(step, &slope);
            store(p->step + at, step), store(p->slope + at, slope), store(p->input + at, step * u);
            store(p->y + at, load(s->skip + p->first + i) * u);
        }
    return scan_inputs{p->width / LANES, s->order, p->row, s->order, p->step, p->input, s->b + from * s->order,
                       s->c + from * s->order};
}

// y [batch, length, inner] is set; kept [batch, ceil(length / STRETCH) · state] too, unless it is 0. state
// [batch, state] holds what came before and, on return, what the next step needs.
void selective_scan_forward(const scan_arguments *s, int threads, float *kept, float *state, float *y) {
    const int64_t size = s->inner * s->order;
#pragma omp parallel num_threads(threads)
    {
        float *memory = floats(4 * (SEGMENT * part_row(s) + 16));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->groups; task++) {
            float *rest = memory;
            const part p = which(s, task, &rest);
            float *h = state + p.sequence * size + p.first * s->order;
            float *kept_p = kept ? kept + (p.sequence * size + p.first * s->order) * p.steps : 0;
            for (int64_t start = 0; start < s->length && p.width > 0; start += SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                scan_inputs inputs = prepare(s, &p, start, count);
                scan_forward(&inputs, count, (const vec *)s->rates + p.first / LANES * s->order, (vec *)h, p.y,
                             kept ? kept_p + start / STRETCH * p.width * s->order : 0);
                for (int64_t t = 0; t < count; t++)
                    for (int64_t i = 0; i < p.width; i += LANES) {
                        const int64_t from = p.sequence * s->length + start + t;
                        vec v = load(p.y + t * p.row + i);
                        if (s->z) {
                            vec z = load(s->z + from * s->z_row + p.first + i);
                            v *= z * sigmoid_(z);
                        }
                        store(y + from * s->inner + p.first + i, v);
                    }
            }
        }
        free(memory);
    }
}

// gu, gdelta and, with a gate, gz [batch, length, inner] are set, gb and gc [groups, batch, length, order] too: to be
// summed over the groups. gstate [batch, state] holds the gradient of the last state and, on return, of the first. sums
// [threads, state + 2 · inner] must be zeros and receives those of A (packed), skip and bias.
void selective_scan_backward(const scan_arguments *s, int threads, const float *kept, const float *gy, float *gu,
                             float *gdelta, float *gz, float *gb, float *gc, float *gstate, float *sums) {
    const int64_t size = s->inner * s->order, own = size + 2 * s->inner, partial = STRETCH * s->order * LANES;
#pragma omp parallel num_threads(threads)
    {
        float *g_rates = sums + own * omp_get_thread_num(), *g_skip = g_rates + size, *g_bias = g_skip + s->inner;
        float *memory = floats(7 * (SEGMENT * part_row(s) + 16) + 2 * partial + size);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->groups; task++) {
            float *rest = memory;
            const part p = which(s, task, &rest);
            float *gout = take(&rest, SEGMENT * p.row), *gstep = take(&rest, SEGMENT * p.row);
            float *ginput = take(&rest, SEGMENT * p.row);
            vec *gb_lanes = (vec *)take(&rest, partial), *gc_lanes = (vec *)take(&rest, partial), *grates = (vec *)rest;
            const int64_t at_state = p.sequence * size + p.first * s->order, part_size = p.width * s->order;
            if (p.width <= 0) continue;
            memcpy(grates, g_rates + p.first * s->order, 4 * part_size);
            for (int64_t start = (s->length - 1) / SEGMENT * SEGMENT; start >= 0; start -= SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                const int64_t from = p.sequence * s->length + start;
                scan_inputs inputs = prepare(s, &p, start, count);
                for (int64_t t = 0; t < count; t++)
                    for (int64_t i = 0; i < p.width; i += LANES) {
                        const int64_t there = (from + t) * s->inner + p.first + i;
                        vec g = load(gy + there), slope;
                        if (s->z) {
                            vec open = silu_(load(s->z + (from + t) * s->z_row + p.first + i), &slope);
                            store(gz + there, g * slope);  // but for y, not known yet
                            g *= open;
                        }
                        store(gout + t * p.row + i, g);
                    }
                memset(gstep, 0, 4 * count * p.row), memset(ginput, 0, 4 * count * p.row);
                for (int64_t at = (count - 1) / STRETCH * STRETCH; at >= 0; at -= STRETCH) {
                    const int64_t steps = count - at < STRETCH ? count - at : STRETCH, row = at * p.row;
                    scan_inputs here = inputs;
                    here.step += row, here.input += row, here.b += at * s->order, here.c += at * s->order;
                    scan_gradients into = {grates, (vec *)(gstate + at_state), gstep + row, ginput + row, gb_lanes, gc_lanes};
                    const int64_t bc = ((task % s->groups * s->batch + p.sequence) * s->length + start + at) * s->order;
                    scan_backward(&here, steps, (const vec *)s->rates + p.first / LANES * s->order,
                                  kept + at_state * p.steps + (start + at) / STRETCH * part_size, p.y + row, gout + row,
                                  &into, gb + bc, gc + bc);
                }
                for (int64_t i = 0; i < p.width; i += LANES) {
                    vec skip = load(s->skip + p.first + i), gskip = all(0), gbias = all(0);
                    for (int64_t t = 0; t < count; t++) {
                        const int64_t at = t * p.row + i, there = (from + t) * s->inner + p.first + i;
                        vec u = load(s->u + there), g = load(gout + at), gin = load(ginput + at);
                        vec gdelta_t = (load(gstep + at) * LN_2 + gin * u) * load(p.slope + at);
                        store(gdelta + there, gdelta_t);
                        store(gu + there, gin * load(p.step + at) + skip * g);
                        if (s->z) store(gz + there, load(gz + there) * load(p.y + at));
                        gskip += g * u, gbias += gdelta_t;
                    }
                    store(g_skip + p.first + i, load(g_skip + p.first + i) + gskip);
                    store(g_bias + p.first + i, load(g_bias + p.first + i) + gbias);
                }
            }
            memcpy(g_rates + p.first * s->order, grates, 4 * part_size);
        }
        free(memory);
    }
}
}
