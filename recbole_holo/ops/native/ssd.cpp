// The scan of Mamba-2 as an operation of its own.
//
// Arrays are float32. Rows of x, dt, B and C are those of a step, `*_row` apart, and sequences follow one another at the
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
    const float *x, *dt, *b, *c;        // [heads, vectors, LANES], [heads], [groups, order] twice
    const float *rates, *skip, *bias;   // A · log2 e and two more, [heads]
} ssd_arguments;

typedef struct {
    int64_t sequence, group, part, first, heads;  // heads first, …, first + heads - 1
} ssd_part;

static ssd_part which(const ssd_arguments *s, int64_t task) {
    const int64_t shared = s->heads / s->groups, each = (shared + s->parts - 1) / s->parts;
    ssd_part p;
    p.part = task % s->parts, p.group = task / s->parts % s->groups, p.sequence = task / s->parts / s->groups;
    p.first = p.group * shared + p.part * each;
    p.heads = shared - p.part * each < each ? shared - p.part * each : each;
    return p;
}

// The segment from `start` on; steps and their slopes are computed.
static ssd_inputs segment_of(const ssd_arguments *s, const ssd_part *p, int64_t start, int64_t count, float *steps,
                             float *slopes, float *pairs) {
    const int64_t from = p->sequence * s->length + start, channel = p->first * s->vectors * LANES;
    for (int64_t head = 0; head < p->heads; head++)
        for (int64_t t = 0; t < count; t += LANES) {
            const float *dt = s->dt + (from + t) * s->dt_row + p->first + head;
            float v[LANES] = {};
            for (int64_t j = 0; j < LANES && t + j < count; j++) v[j] = dt[j * s->dt_row] + s->bias[p->first + head];
            vec step = load(v), slope = all(1);
            if (s->softplus) step = softplus_(step, &slope);
            store(slopes + head * SEGMENT + t, slope);
            store(steps + head * SEGMENT + t, lane() < (int32_t)(count - t) ? step : all(0));
        }
    return ssd_inputs{p->heads, s->vectors, s->order, s->x_row, s->b_row, s->c_row, s->x + from * s->x_row + channel,
                      s->b + from * s->b_row + p->group * s->order, s->c + from * s->c_row + p->group * s->order, steps,
                      s->rates + p->first, s->skip + p->first, pairs};
}

// y [batch, length, heads, vectors, LANES] is set. kept, unless it is 0, receives the states before all segments but the
// first. state [batch, ...] holds what came before and, on return, what the next step needs.
void ssd_op_forward(const ssd_arguments *s, int threads, float *kept, float *state, float *y) {
    const int64_t block = s->vectors * LANES * s->order, size = s->heads * block, width = s->heads * s->vectors * LANES;
    const int64_t segments = (s->length + SEGMENT - 1) / SEGMENT, shared = s->heads / s->groups;
#pragma omp parallel num_threads(threads)
    {
        const int64_t pairs_size = SEGMENT / CHUNK * ssd_pairs(s->order);
        float *memory = floats(ssd_memory(s->vectors, s->order) + 2 * (shared * SEGMENT + 16) + pairs_size), *rest = memory;
        float *pairs = take(&rest, pairs_size), *steps = take(&rest, shared * SEGMENT), *slopes = take(&rest, shared * SEGMENT);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->groups * s->parts; task++) {
            const ssd_part p = which(s, task);
            float *h = state + p.sequence * size + p.first * block;
            for (int64_t start = 0; start < s->length && p.heads > 0; start += SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                const ssd_inputs inputs = segment_of(s, &p, start, count, steps, slopes, pairs);
                ssd_prepare(&inputs, count);
                if (kept && start)
                    memcpy(kept + (p.sequence * (segments - 1) + start / SEGMENT - 1) * size + p.first * block, h,
                           4 * p.heads * block);
                ssd_forward(&inputs, count, s->begins && !start, s->ends && start + count == s->length, (vec *)h,
                            y + (p.sequence * s->length + start) * width + p.first * s->vectors * LANES, width, 0, rest);
            }
        }
        free(memory);
    }
}

// gx, gdt, gb and gc are set; gb and gc are [parts, batch, length, groups, order], to be summed over the parts. state is
// that before the first step; gstate holds the gradient of the last state and, on return, that of the first. sums
// [threads, 3 · heads] must be zeros and receives those of A, skip and bias.
void ssd_op_backward(const ssd_arguments *s, int threads, const float *kept, const float *state, const float *gy, float *gx,
                     float *gdt, float *gb, float *gc, float *gstate, float *sums) {
    const int64_t block = s->vectors * LANES * s->order, size = s->heads * block, width = s->heads * s->vectors * LANES;
    const int64_t segments = (s->length + SEGMENT - 1) / SEGMENT, shared = s->heads / s->groups, bc_row = s->groups * s->order;
#pragma omp parallel num_threads(threads)
    {
        float *g_rates = sums + 3 * s->heads * omp_get_thread_num(), *g_skip = g_rates + s->heads, *g_bias = g_skip + s->heads;
        const int64_t chunks = SEGMENT / CHUNK, pairs_size = chunks * ssd_pairs(s->order);
        float *memory = floats(ssd_memory(s->vectors, s->order) + 3 * (shared * SEGMENT + 16) + pairs_size + (chunks + 1) * shared * block);
        float *rest = memory, *pairs = take(&rest, pairs_size), *steps = take(&rest, shared * SEGMENT), *slopes = take(&rest, shared * SEGMENT);
        float *gsteps = take(&rest, shared * SEGMENT);
        vec *history = (vec *)take(&rest, chunks * shared * block), *h = (vec *)take(&rest, shared * block);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->groups * s->parts; task++) {
            const ssd_part p = which(s, task);
            for (int64_t start = (s->length - 1) / SEGMENT * SEGMENT; start >= 0 && p.heads > 0; start -= SEGMENT) {
                const int64_t count = s->length - start < SEGMENT ? s->length - start : SEGMENT;
                const int64_t from = p.sequence * s->length + start, zero = s->begins && !start;
                const int64_t end = s->ends && start + count == s->length;
                const ssd_inputs inputs = segment_of(s, &p, start, count, steps, slopes, pairs);
                ssd_prepare(&inputs, count);
                const float *before = start ? kept + (p.sequence * (segments - 1) + start / SEGMENT - 1) * size : state + p.sequence * size;
                if (!zero) memcpy(h, before + p.first * block, 4 * p.heads * block);
                ssd_forward(&inputs, count, zero, 1, h, 0, 0, history, rest);
                const int64_t at = from * width + p.first * s->vectors * LANES;
                const int64_t bc = (p.part * s->batch * s->length + from) * bc_row + p.group * s->order;
                ssd_gradients into = {(vec *)(gstate + p.sequence * size + p.first * block), gx + at, gb + bc, gc + bc,
                                      width, bc_row, bc_row, gsteps, g_rates + p.first, g_skip + p.first};
                ssd_backward(&inputs, count, zero, end, zero, history, gy + at, width, &into, rest);
                for (int64_t head = 0; head < p.heads; head++)
                    for (int64_t t = 0; t < count; t++) {
                        const float g = gsteps[head * SEGMENT + t] * slopes[head * SEGMENT + t];
                        gdt[(from + t) * s->heads + p.first + head] = g;
                        g_bias[p.first + head] += g;
                    }
            }
        }
        free(memory);
    }
}
}
