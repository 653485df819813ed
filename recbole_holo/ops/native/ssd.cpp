// The scan of Mamba-2 as an operation of its own.
//
// Arrays are float32. Rows of x, dt, B and C, one a step, are `*_row` apart, and sequences follow one another at the
// same distance. A head is `vectors` vectors wide, order is a multiple of LANES. States are packed as [heads, vectors,
// order, LANES].
#include "ssd.h"

extern "C" {

int64_t ssd_segment(void) { return SEGMENT; }

typedef struct {
    int64_t batch, length, heads, groups;
    int64_t parts;         // a thread takes one of so many parts of the heads of a group of a sequence
    int64_t vectors, order, softplus;
    int64_t begins, ends;  // there is no state before the first step; no one wants that behind the last
    int64_t x_row, dt_row, b_row, c_row;
    const float *x, *dt, *b, *c;       // rows [heads, vectors, LANES], [heads], [groups, order] twice
    const float *rates, *skip, *bias;  // A · log2 e and two more, [heads]
} ssd_arguments;

// What a task works on, and where.
typedef struct {
    int64_t sequence, group, part, heads;
    int64_t head, channel;               // the first ones
    int64_t state, all_states;           // of its first head among those of a sequence, and the size of these
    float *pairs, *steps, *slopes;
} ssd_part;

static int64_t each_part(const ssd_arguments *s) { return (s->heads / s->groups + s->parts - 1) / s->parts; }

static int64_t part_memory(const ssd_arguments *s) {
    return SEGMENT / CHUNK * ssd_pairs(s->order) + 2 * each_part(s) * SEGMENT + 3 * 16;
}

static ssd_part part_of(const ssd_arguments *s, int64_t task, float **memory) {
    const int64_t shared = s->heads / s->groups, each = each_part(s), head_state = s->vectors * LANES * s->order;
    ssd_part p;
    p.part = task % s->parts, p.group = task / s->parts % s->groups, p.sequence = task / s->parts / s->groups;
    p.head = p.group * shared + p.part * each, p.channel = p.head * s->vectors * LANES;
    p.heads = shared - p.part * each < each ? shared - p.part * each : each;
    p.state = p.head * head_state, p.all_states = s->heads * head_state;
    p.pairs = take(memory, SEGMENT / CHUNK * ssd_pairs(s->order));
    p.steps = take(memory, each * SEGMENT), p.slopes = take(memory, each * SEGMENT);
    return p;
}

// The segment from `start` on: its steps and their slopes, and what ssd_prepare computes.
static ssd_inputs segment_of(const ssd_arguments *s, const ssd_part *p, int64_t start, int64_t count) {
    const int64_t from = p->sequence * s->length + start, group = p->group * s->order;
    ssd_steps(p->heads, count, s->dt + from * s->dt_row + p->head, s->dt_row, s->bias + p->head, s->softplus, p->steps,
              p->slopes);
    const float *x = s->x + from * s->x_row + p->channel;
    const float *b = s->b + from * s->b_row + group, *c = s->c + from * s->c_row + group;
    const float *rates = s->rates + p->head, *skip = s->skip + p->head;
    const ssd_inputs inputs = {p->heads, s->vectors, s->order, s->x_row, s->b_row, s->c_row, x,
                               b,        c,          p->steps, rates,    skip,     p->pairs};
    ssd_prepare(&inputs, count);
    return inputs;
}

// The state before a segment that is not the first, in [batch, segments - 1, all_states].
static int64_t kept_at(const ssd_arguments *s, const ssd_part *p, int64_t start) {
    const int64_t segments = (s->length + SEGMENT - 1) / SEGMENT;
    return (p->sequence * (segments - 1) + start / SEGMENT - 1) * p->all_states + p->state;
}

// y [batch, length, heads, vectors, LANES] is set. kept, unless it is 0, receives the states before all segments but
// the first. state [batch, all_states] holds what came before and, on return, what the next step needs.
void ssd_op_forward(const ssd_arguments *s, int threads, float *kept, float *state, float *y) {
    const int64_t row = s->heads * s->vectors * LANES;
#pragma omp parallel num_threads(threads)
    {
        float *memory = floats(part_memory(s) + ssd_memory(s->vectors, s->order));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->groups * s->parts; task++) {
            float *rest = memory;
            const ssd_part p = part_of(s, task, &rest);
            float *h = state + p.sequence * p.all_states + p.state;
            for (int64_t start = 0; start < s->length; start += SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                const ssd_inputs inputs = segment_of(s, &p, start, count);
                if (kept && start) memcpy(kept + kept_at(s, &p, start), h, ssd_state(&inputs) * sizeof(vec));
                ssd_forward(&inputs, count, s->begins && !start, s->ends && start + count == s->length, (vec *)h,
                            y + (p.sequence * s->length + start) * row + p.channel, row, 0, rest);
            }
        }
        free(memory);
    }
}

// gx, gdt, gb and gc are set; gb and gc are [parts, batch, length, groups, order], to be summed over the parts. state
// is that before the first step; gstate holds the gradient of the last state and, on return, that of the first. sums
// [threads, 3 · heads] must be zeros and receives those of A, skip and bias.
void ssd_op_backward(const ssd_arguments *s, int threads, const float *kept, const float *state, const float *gy,
                     float *gx, float *gdt, float *gb, float *gc, float *gstate, float *sums) {
    const int64_t row = s->heads * s->vectors * LANES, bc_row = s->groups * s->order;
#pragma omp parallel num_threads(threads)
    {
        const int64_t most = each_part(s) * s->vectors * LANES * s->order;
        float *g_rates = sums + 3 * s->heads * omp_get_thread_num(), *g_skip = g_rates + s->heads;
        float *g_bias = g_skip + s->heads;
        float *memory = floats(part_memory(s) + ssd_memory(s->vectors, s->order) + each_part(s) * SEGMENT +
                               (SEGMENT / CHUNK + 1) * most + 3 * 16);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->groups * s->parts; task++) {
            float *rest = memory;
            const ssd_part p = part_of(s, task, &rest);
            float *gsteps = take(&rest, each_part(s) * SEGMENT);
            vec *history = (vec *)take(&rest, SEGMENT / CHUNK * most), *h = (vec *)take(&rest, most);
            const int64_t of_sequence = p.sequence * p.all_states + p.state;
            for (int64_t start = (s->length - 1) / SEGMENT * SEGMENT; start >= 0; start -= SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                const int64_t from = p.sequence * s->length + start, at = from * row + p.channel;
                const int64_t bc = (p.part * s->batch * s->length + from) * bc_row + p.group * s->order;
                const int zero = s->begins && !start, end = s->ends && start + count == s->length;
                const ssd_inputs inputs = segment_of(s, &p, start, count);
                const float *before = start ? kept + kept_at(s, &p, start) : state + of_sequence;
                if (!zero) memcpy(h, before, ssd_state(&inputs) * sizeof(vec));
                ssd_forward(&inputs, count, zero, 1, h, 0, 0, history, rest);
                ssd_gradients into = {(vec *)(gstate + of_sequence), gx + at, gb + bc, gc + bc, row, bc_row, bc_row,
                                      gsteps, g_rates + p.head, g_skip + p.head};
                ssd_backward(&inputs, count, zero, end, zero, history, gy + at, row, &into, rest);
                for (int64_t head = 0; head < p.heads; head++)
                    for (int64_t t = 0; t < count; t++) {
                        const float g = gsteps[head * SEGMENT + t] * p.slopes[head * SEGMENT + t];
                        gdt[(from + t) * s->heads + p.head + head] = g;
                        g_bias[p.head + head] += g;
                    }
            }
        }
        free(memory);
    }
}
}
