// Softmax cross-entropy of hidden states against a table of items, with its gradients. Arrays are C-contiguous float32.
//
// The scores of a few rows are made, turned into their gradient in place and multiplied into both gradients before the
// next rows: they never leave the cache of the thread.
#include "gemm.h"

// What a row ends with when its width is no multiple of LANES: the vector at `at`, filled up with `filler`.
static vec tail(const float *row, int64_t at, int64_t width, float filler) {
    float v[LANES];
    for (int64_t j = 0; j < LANES; j++) v[j] = at + j < width ? row[at + j] : filler;
    return load(v);
}

// Returns log Σ_j e^{row[j]} - row[target]; the row becomes the gradient of `scale` times that, if `gradient`.
static float softmax_row(float *row, int64_t width, int64_t target, const float *bias, float scale, int gradient) {
    const int64_t whole = width / LANES * LANES;
    vec highest = all(-INFINITY), total = all(0);
    if (bias)
        for (int64_t j = 0; j < width; j++) row[j] += bias[j];
    for (int64_t j = 0; j < whole; j += LANES) highest = higher(load(row + j), highest);
    if (whole < width) highest = higher(tail(row, whole, width, -INFINITY), highest);
    float top = highest[0];
    for (int j = 1; j < LANES; j++) top = highest[j] > top ? highest[j] : top;
    const float wanted = row[target];
    for (int64_t j = 0; j < whole; j += LANES) {
        vec e = exp_(load(row + j) - top);
        store(row + j, e);
        total += e;
    }
    float partition = sum(total);
    if (whole < width) {
        vec e = exp_(tail(row, whole, width, -INFINITY) - top);
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

extern "C" {

// scores [rows, width]; bias [width] is added to each row, or 0. losses[i] is set; scores becomes the gradient of
// scale · Σ losses if `gradient`, else what is left there means nothing.
void softmax_cross_entropy(int64_t rows, int64_t width, int threads, int gradient, float scale, const int64_t *targets,
                           const float *bias, float *scores, float *losses) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        losses[i] = softmax_row(scores + i * width, width, targets[i], bias, scale, gradient);
}

// hidden [rows, d] against table [items, d], d a multiple of LANES. losses [rows] is set. If ghidden is not 0: the
// gradient of scale · Σ losses, in ghidden [rows, d], gtable [threads, items, d] and gbias [threads, items] (or 0), the
// last two zeros before, to be summed over threads. `together` rows are in the cache at a time. half: round the factors
// of the products to bfloat16.
void cross_entropy(int64_t rows, int64_t items, int64_t d, int64_t together, int threads, int half, float scale,
                   const float *hidden, const float *table, const float *bias, const int64_t *targets, float *losses,
                   float *ghidden, float *gtable, float *gbias) {
    panels columns = pack(table, d, items, 1, d, half), whole = {};
    if (ghidden) whole = pack(table, items, d, d, 1, half);
    const int64_t row = columns.width;
#pragma omp parallel num_threads(threads)
    {
        float *scores = floats(together * row);
        const int thread = omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < (rows + together - 1) / together; tile++) {
            const int64_t first = tile * together, count = rows - first < together ? rows - first : together;
            multiply(count, hidden + first * d, d, &columns, 0, scores, row, 0);
            for (int64_t i = 0; i < count; i++)
                losses[first + i] =
                    softmax_row(scores + i * row, items, targets[first + i], bias, scale, ghidden != 0);
            if (!ghidden) continue;
            multiply(count, scores, row, &whole, 0, ghidden + first * d, d, 0);
            add_outer(items, d, count, scores, row, hidden + first * d, d, gtable + thread * items * d, d, half);
            if (gbias)
                for (int64_t i = 0; i < count; i++)
                    for (int64_t j = 0; j < items; j++) gbias[thread * items + j] += scores[i * row + j];
        }
        free(scores);
    }
    free(columns.data), free(whole.data);
}
}
