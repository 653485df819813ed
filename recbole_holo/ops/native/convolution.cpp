// The causal convolution as an operation of its own, with a SiLU behind it if `silu`.
//
// Arrays are float32. Rows of x are x_row apart, and sequences follow one another at the same distance; other arrays
// are C-contiguous. channels is a multiple of LANES.
#include "conv.h"

#define STEPS 8  // of all channels at a time, so that memory is read in its order; at least EARLIER

extern "C" {

typedef struct {
    int64_t batch, length, channels, silu, x_row;
    int64_t parts;                   // a thread takes one of so many parts of a sequence
    const float *x, *weight, *bias;  // [batch, length, channels], [4, channels], [channels]
} convolution_arguments;

typedef struct {
    const float *x;
    int64_t row, begin, end;  // the sequence's first row in other arrays; steps begin, …, end - 1
} convolution_part;

static convolution_part part_of(const convolution_arguments *s, int64_t task) {
    const int64_t each = ((s->length + s->parts - 1) / s->parts + STEPS - 1) / STEPS * STEPS;
    const int64_t row = task / s->parts * s->length, begin = task % s->parts * each, end = begin + each;
    return convolution_part{s->x + row * s->x_row, row, begin, end < s->length ? end : s->length};
}

// Steps start, …, start + count - 1, start 0 or at least EARLIER: their outputs and the derivatives of their SiLU.
static void stretch_of(const convolution_arguments *s, const convolution_part *p, int64_t start, int64_t count,
                       const float *zeros, float *y, float *slope) {
    const float *before = start ? p->x + (start - EARLIER) * s->x_row : zeros;
    (s->silu ? convolve_from<true> : convolve_from<false>)(count, s->channels, before, start ? s->x_row : 0,
                                                           p->x + start * s->x_row, s->x_row, s->weight, s->bias, y,
                                                           slope, s->channels);
}

// y [batch, length, channels] is set.
void convolution_forward(const convolution_arguments *s, int threads, float *y) {
#pragma omp parallel num_threads(threads)
    {
        float *zeros = floats(s->channels);
        memset(zeros, 0, 4 * s->channels);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->parts; task++) {
            const convolution_part p = part_of(s, task);
            for (int64_t start = p.begin; start < p.end; start += STEPS)
                stretch_of(s, &p, start, p.end - start < STEPS ? p.end - start : STEPS, zeros,
                           y + (p.row + start) * s->channels, 0);
        }
        free(zeros);
    }
}

// gx [batch, length, channels] is set. sums [threads, 5 · channels] must be zeros and receives the gradients of weight
// and bias.
void convolution_backward(const convolution_arguments *s, int threads, const float *gy, float *gx, float *sums) {
    const int64_t channels = s->channels;
#pragma omp parallel num_threads(threads)
    {
        float *gweight = sums + 5 * channels * omp_get_thread_num(), *gbias = gweight + 4 * channels;
        float *zeros = floats((1 + STEPS + STEPS + EARLIER) * channels);
        float *y = zeros + channels, *g = y + STEPS * channels;
        memset(zeros, 0, 4 * channels);
        // Rows of g: the gradient before the SiLU.
        auto before_silu = [&](const convolution_part &p, int64_t start, int64_t count, float *g) {
            const float *from = gy + (p.row + start) * channels;
            if (!s->silu) {
                memcpy(g, from, 4 * count * channels);
                return;
            }
            stretch_of(s, &p, start, count, zeros, y, g);
            for (int64_t i = 0; i < count * channels; i += LANES) store(g + i, load(g + i) * load(from + i));
        };
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s->batch * s->parts; task++) {
            const convolution_part p = part_of(s, task);
            if (p.begin >= p.end) continue;
            const int64_t last = (p.end - 1) / STEPS * STEPS, left = s->length - p.end;
            const int64_t following = left < EARLIER ? left : EARLIER;
            float *behind = g + (p.end - last) * channels;
            memset(behind, 0, 4 * EARLIER * channels);
            if (following) before_silu(p, p.end, following, behind);
            for (int64_t start = last; start >= p.begin; start -= STEPS) {
                const int64_t count = p.end - start < STEPS ? p.end - start : STEPS;
                before_silu(p, start, count, g);
                convolve_backward_from(count, channels, start ? p.x + (start - EARLIER) * s->x_row : zeros,
                                       start ? s->x_row : 0, p.x + start * s->x_row, s->x_row, s->weight, g, channels,
                                       gx + (p.row + start) * channels, channels, gweight, gbias);
                memmove(g + STEPS * channels, g, 4 * EARLIER * channels);
            }
        }
        free(zeros);
    }
}
}
