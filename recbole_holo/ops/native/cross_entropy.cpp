// Softmax cross-entropy of hidden states against a table of items, with its gradients. Arrays are C-contiguous float32.
//
// The scores of a few rows are made, turned into their gradient in place and multiplied into both gradients before the
// next rows: they never leave the cache of the thread.
#include "gemm.h"
#include "left_out.h"

// What a row ends with when its width is no multiple of LANES: the vector at `at`, filled up with `filler`.
static vec tail(const float *row, int64_t at, int64_t width, float filler) {
    float v[LANES];
    for (int64_t j = 0; j < LANES; j++) v[j] = at + j < width ? row[at + j] : filler;
    return load(v);
}

// Returns log Σ_j e^{row[j]} - row[target]; the row becomes the gradient of `scale` times that, if `gradient`. With
// leaves_out, items that are not `kept` have no part in it, whatever their scores, and gradient 0.
template <bool leaves_out>
static float softmax_row(float *row, int64_t width, int64_t target, const uint8_t *kept, const float *bias, float scale,
                         int gradient) {
    const int64_t whole = width / LANES * LANES;
    vec highest = all(-INFINITY), total = all(0);
    const auto rival = [&](int64_t j, vec v) {
        return leaves_out ? (lanes_of(kept, j) ? v : all(-INFINITY)) : v;
    };
    const auto power = [&](int64_t j, vec v) {
        const vec e = exp_(v);
        return leaves_out ? (vec)((ivec)e & lanes_of(kept, j)) : e;
    };
    if (bias)
        for (int64_t j = 0; j < width; j++) row[j] += bias[j];
    for (int64_t j = 0; j < whole; j += LANES) highest = higher(rival(j, load(row + j)), highest);
    if (whole < width) highest = higher(rival(whole, tail(row, whole, width, -INFINITY)), highest);
    float top = highest[0];
    for (int j = 1; j < LANES; j++) top = highest[j] > top ? highest[j] : top;
    const float wanted = row[target];
    for (int64_t j = 0; j < whole; j += LANES) {
        vec e = power(j, load(row + j) - top);
        store(row + j, e);
        total += e;
    }
    float partition = sum(total);
    if (whole < width) {
        vec e = power(whole, tail(row, whole, width, -INFINITY) - top);
        memcpy(row + whole, &e, 4 * (width - whole));
        for (int64_t j = whole; j < width; j++) partition += row[j];
    }
    if (gradient) {
        const float factor = scale / partition;
        for (int64_t j = 0; j < whole; j += LANES) store(row + j, load(row + j) * factor);
        for (int64_t j = whole; j < width; j++) row[j] *= factor;
        row[target] -= scale;
    }
    return logf(partition) + top - wanted;
}

// softmax_row of row i of all, which is at `row`. The target is in it whether or not it was seen.
static float softmax_of(left_out *out, int64_t i, float *row, const int64_t *targets, const float *bias, float scale,
                        int gradient) {
    const int64_t target = targets[i];
    if (!out->seen) return softmax_row<false>(row, out->width, target, 0, bias, scale, gradient);
    out->turn_to(i);
    const bool stayed = out->kept[target / 8] >> target % 8 & 1;
    out->set(target, true);
    const float loss = softmax_row<true>(row, out->width, target, out->kept, bias, scale, gradient);
    out->set(target, stayed);
    return loss;
}

extern "C" {

// scores [rows, width]; bias [width] is added to each row, or 0. losses[i] is set; scores becomes the gradient of
// scale · Σ losses if `gradient`, else what is left there means nothing. `seen` says what the rows leave out, or is 0.
void softmax_cross_entropy(int64_t rows, int64_t width, int threads, int gradient, float scale, const seen_items *seen,
                           const int64_t *targets, const float *bias, float *scores, float *losses) {
#pragma omp parallel num_threads(threads)
    {
        left_out out(seen, width);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++)
            losses[i] = softmax_of(&out, i, scores + i * width, targets, bias, scale, gradient);
    }
}

// hidden [rows, d] against table [items, d], d a multiple of LANES. losses [rows] is set. If ghidden is not 0: the
// gradient of scale · Σ losses, in ghidden [rows, d], gtable [threads, items, d] and gbias [threads, items] (or 0), the
// last two zeros before, to be summed over threads. Threads get multiples of `share` rows, and take `together` at a
// time: more of them read and write gtable less often. `seen` says what the rows leave out, or is 0.
void cross_entropy(int64_t rows, int64_t items, int64_t d, int64_t share, int64_t together, int threads,
                   float scale, const seen_items *seen, const float *hidden, const float *table, const float *bias,
                   const int64_t *targets, float *losses, float *ghidden, float *gtable, float *gbias) {
    panels columns = pack(table, d, items, 1, d), whole = {};
    if (ghidden) whole = pack(table, items, d, d, 1);
    const int64_t row = columns.width;
#pragma omp parallel num_threads(threads)
    {
        float *scores = floats(together * row);
        const int thread = omp_get_thread_num();
        left_out out(seen, items);
        // As OpenMP's static schedule divides the shares: the sums of a thread must not depend on `together`.
        const int64_t shares = (rows + share - 1) / share, each = shares / omp_get_num_threads();
        const int64_t more = shares % omp_get_num_threads(), before = thread * each + (thread < more ? thread : more);
        const int64_t last = (before + each + (thread < more)) * share, end = last < rows ? last : rows;
        for (int64_t first = before * share; first < end; first += together) {
            const int64_t count = end - first < together ? end - first : together;
            multiply(count, hidden + first * d, d, &columns, 0, scores, row, 0);
            for (int64_t i = 0; i < count; i++)
                losses[first + i] = softmax_of(&out, first + i, scores + i * row, targets, bias, scale, ghidden != 0);
            if (!ghidden) continue;
            multiply(count, scores, row, &whole, 0, ghidden + first * d, d, 0);
            add_outer(items, d, count, scores, row, hidden + first * d, d, gtable + thread * items * d, d);
            if (gbias)
                for (int64_t i = 0; i < count; i++)
                    for (int64_t j = 0; j < items; j++) gbias[thread * items + j] += scores[i * row + j];
        }
        free(scores);
    }
    free(columns.data), free(whole.data);
}
}
