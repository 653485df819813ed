// Softmax cross-entropy with its gradients, as in cross_entropy.cpp, with factors of the products in bfloat16.
//
// The table is packed once, for both products with it. A thread takes a block of rows and goes through the items, BLOCK at
// a time. Their scores become powers e^{score - reference}, in bfloat16, while they are in its cache:
//
//     gx_i = f_i Σ_j p_ij t_j - (1 - p_target) t_target     f_i = scale / Σ_j p_ij, applied at the end
//
// The powers are kept, and when their sums are known, f_i goes into the rows: gt_j = Σ_i p_ij (f_i x_i). A row's reference
// is its target's score; where others are MARGIN higher, it is raised to theirs and what was summed is scaled down. The
// target is left out of the powers, and its part computed in float32 from the sum of the others, without a difference.
#include "gemm.h"
#include "left_out.h"
#include "segment.h"

#define PANEL 64      // items
#define BLOCK 256     // items, whole panels
#define MARGIN 30.0f  // e^MARGIN times the number of items is far from the largest float
#define TINY -60.0f   // powers of less are 0, not denormal numbers, which are slow
#define MOST 128      // rows of a block

extern "C" {

// What the products in bfloat16 run on: 0 nothing, 1 AVX512-BF16, 2 AMX.
int half_products(void) { return amx() ? 2 : HALF; }
}

#if HALF

INLINE vec powers(vec scores, float reference) {
    const vec x = scores - reference;
    return x < all(TINY) ? all(0) : exp_(x);
}
INLINE float power(float x) { return exp_(all(x))[0]; }

INLINE bool any(ivec set) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)set, (__m512i)set);
#else
    for (int j = 0; j < LANES; j++)
        if (set[j]) return true;
    return false;
#endif
}

typedef struct {
    int64_t items, d;
    int64_t wide;            // items, whole panels
    int64_t steps, deep;     // pairs along d; d, whole vectors
    float *columns, *whole;  // [wide / PANEL, steps, PANEL] for scores; panels of [wide / 2, deep] for the gradient of x
} table_pairs;

// Items [first, first + PANEL) of table [items, d].
static void pack_items(const table_pairs *t, const float *table, int64_t first) {
    const int64_t count = t->items - first < PANEL ? t->items - first : PANEL, groups = (t->steps + LANES - 1) / LANES;
    float *rows = scratch(PANEL * groups * LANES), *to = t->columns + first * t->steps;
    pair_along_rows(count, t->d, table + first * t->d, t->d, rows, groups * LANES, groups * LANES);
    memset(rows + count * groups * LANES, 0, 4 * (PANEL - count) * groups * LANES);
    for (int64_t j = 0; j < PANEL; j += LANES)
        for (int64_t k = 0; k < t->steps; k += LANES) {
            vec v[LANES];
            for (int i = 0; i < LANES; i++) v[i] = load(rows + (j + i) * groups * LANES + k);
            transpose(v);
            for (int i = 0; i < LANES && k + i < t->steps; i++) store(to + (k + i) * PANEL + j, v[i]);
        }
    for (int64_t at = 0; at < t->deep; at += COLUMNS * LANES) {
        const int64_t width = columns_from(at, t->deep) * LANES;
        pair_along_columns(count, t->d - at < width ? t->d - at : width, table + first * t->d + at, t->d,
                           t->whole + at * t->wide / 2 + first / 2 * width, PANEL / 2, width);
    }
}

// What a thread has of its rows. R is the most rows, rounded up to what tiles take; r counts rows, p pairs of them.
typedef struct {
    int64_t R, pairs, turned_row;
    float *x;              // [R, steps], pairs along d
    float *scores;         // [R, BLOCK]
    float *left;           // [R, BLOCK / 2]: powers, pairs along the items
    float *right;          // [wide / PANEL, pairs, PANEL]: powers, pairs of rows
    float *scaled;         // [R, d]: f_i x_i, for an item block
    float *turned;         // [deep, turned_row], the same as pairs of rows
    float *gx;             // [R, deep]
    float *reference;      // [blocks, R]
    bool *raised;          // [blocks]: some row's reference is not that of the block before
    vec *others;           // [R]: sums of the powers but the target's
    float *wanted;         // [R]: the target's score
    float *weights, *here;  // [R], [R + 1]: f_i; and times what differs from the last block's reference
    uint8_t *kept;         // [R, out.size()]
    float *gt;             // [wide / PANEL, deep, PANEL]
} row_block;

// Scores of rows r and r + 1 of the block (of row r alone if `single`) become powers.
template <bool leaves_out>
static void powers_of(row_block *b, int64_t r, bool single, int64_t j, int64_t count, int64_t kept_row,
                      const float *reference) {
    const float *upper = b->scores + r * BLOCK, *lower = upper + BLOCK;
    const uint8_t *up = b->kept + r * kept_row, *low = up + kept_row;
    float *left = b->left + r * BLOCK / 2;
    vec total[2] = {b->others[r], b->others[r + 1]};
    for (int64_t i = 0; i < count; i += LANES) {
        vec e = powers(leaves_out ? visible(upper + i, up, j + i) : load(upper + i), reference[r]), g = all(0);
        if (!single) g = powers(leaves_out ? visible(lower + i, low, j + i) : load(lower + i), reference[r + 1]);
        total[0] += e, total[1] += g;
        store_half(left + i / 2, e), store_half(left + (BLOCK + i) / 2, g);
        store(b->right + (((j + i) / PANEL * b->pairs) + r / 2) * PANEL + i % PANEL, paired(e, g));
    }
    b->others[r] = total[0], b->others[r + 1] = total[1];
}

// Raises the reference of row r if scores of the block lie far above it.
template <bool leaves_out>
static void settle(row_block *b, int64_t r, int64_t j, int64_t count, int64_t kept_row, int64_t deep, float *reference,
                   bool *raised) {
    const float *row = b->scores + r * BLOCK;
    vec highest = all(-INFINITY);
    for (int64_t i = 0; i < count; i += LANES)
        highest = higher(leaves_out ? visible(row + i, b->kept + r * kept_row, j + i) : load(row + i), highest);
    if (!any(highest > all(reference[r] + MARGIN))) return;
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = highest[i] > top ? highest[i] : top;
    const float down = power(reference[r] - top);
    b->others[r] *= down;
    for (int64_t k = 0; k < deep; k += LANES) store(b->gx + r * deep + k, load(b->gx + r * deep + k) * down);
    reference[r] = top;
    *raised = true;
}

// The rows x [count, d] of the block, each times what its powers of an item block with these references want.
static void weigh(row_block *b, const float *x, int64_t count, int64_t d, const float *final, const float *reference) {
    for (int64_t r = 0; r < count; r++) {
        b->here[r] = b->weights[r] * (reference[r] == final[r] ? 1 : power(reference[r] - final[r]));
        for (int64_t k = 0; k < d; k++) b->scaled[r * d + k] = x[r * d + k] * b->here[r];
    }
    b->here[count] = 0;
    pair_transposed(count, d, b->scaled, d, b->turned, steps_of(count), b->turned_row);
}

// g_bias[j …] += Σ_r here_r · power, over the `count` rows of the block.
static void add_to_bias(const row_block *b, int64_t count, int64_t j, int64_t end, float *g_bias) {
    const ivec high = ivec{} + (int32_t)0xffff0000;
    for (int64_t i = j; i < j + end; i += LANES) {
        vec total = load(g_bias + i);
        for (int64_t r = 0; r < count; r += 2) {
            const ivec pair = (ivec)load(b->right + (i / PANEL * b->pairs + r / 2) * PANEL + i % PANEL);
            total += (vec)(pair << 16) * b->here[r] + (vec)(pair & high) * b->here[r + 1];
        }
        store(g_bias + i, total);
    }
}

// Sums over threads of the gradients of items [first, first + PANEL).
static void sum_items(const table_pairs *t, float **sums, float **bias_sums, int threads, int64_t first, float *gtable,
                      float *gbias) {
    for (int64_t j = first; j < first + PANEL && j < t->items; j += LANES) {
        const int64_t count = t->items - j < LANES ? t->items - j : LANES;
        for (int64_t k = 0; k < t->deep; k += LANES) {
            vec v[LANES] = {};
            for (int thread = 0; thread < threads; thread++)
                for (int i = 0; sums[thread] && i < LANES; i++)
                    v[i] += load(sums[thread] + (first / PANEL * t->deep + k + i) * PANEL + j % PANEL);
            transpose(v);
            const int64_t width = t->d - k < LANES ? t->d - k : LANES;
            for (int64_t i = 0; i < count; i++) memcpy(gtable + (j + i) * t->d + k, v + i, 4 * width);
        }
        if (!gbias) continue;
        vec total = all(0);
        for (int thread = 0; thread < threads; thread++)
            if (bias_sums[thread]) total += load(bias_sums[thread] + j);
        memcpy(gbias + j, &total, 4 * count);
    }
}

extern "C" {

// As cross_entropy, but: any d; gtable [items, d] and gbias [items] are set, and hold the sums of all threads. Blocks have
// `together` rows, an even number.
void cross_entropy_half(int64_t rows, int64_t items, int64_t d, int64_t together, int threads, float scale,
                        const seen_items *seen, const float *hidden, const float *table, const float *bias,
                        const int64_t *targets, float *losses, float *ghidden, float *gtable, float *gbias) {
    const int64_t wide = (items + PANEL - 1) / PANEL * PANEL, deep = (d + LANES - 1) / LANES * LANES;
    const int64_t blocks = (items + BLOCK - 1) / BLOCK;
    table_pairs t = {items, d, wide, steps_of(d), deep, 0, 0};
    t.columns = floats(wide * t.steps), t.whole = floats(wide / 2 * deep);
    float **sums = (float **)calloc(2 * threads, sizeof(float *)), **bias_sums = sums + threads;
#pragma omp parallel num_threads(threads)
    {
        tiles mine;
        left_out out(seen, items);
        row_block b;
        b.R = (together + 31) / 32 * 32, b.pairs = steps_of(together), b.turned_row = (b.pairs + LANES - 1) / LANES * LANES;
        const int64_t kept_row = seen ? out.size() : 0, R = b.R;
        float *memory = floats(R * (t.steps + BLOCK + BLOCK / 2 + d + deep + blocks + LANES + 3 + kept_row / 4) +
                               wide * b.pairs + deep * b.turned_row + blocks + 16 * 16);
        float *rest = memory;
        b.x = take(&rest, R * t.steps), b.scores = take(&rest, R * BLOCK), b.left = take(&rest, R * BLOCK / 2);
        b.right = take(&rest, wide * b.pairs), b.scaled = take(&rest, R * d);
        b.turned = take(&rest, deep * b.turned_row), b.gx = take(&rest, R * deep);
        b.reference = take(&rest, R * blocks), b.raised = (bool *)take(&rest, blocks);
        b.others = (vec *)take(&rest, R * LANES), b.wanted = take(&rest, R);
        b.weights = take(&rest, R), b.here = take(&rest, R + 1), b.kept = (uint8_t *)take(&rest, R * kept_row / 4);
        memset(b.right, 0, 4 * wide * b.pairs);
        if (ghidden) {
            b.gt = sums[omp_get_thread_num()] = floats(wide * deep);
            memset(b.gt, 0, 4 * wide * deep);
        }
        float *g_bias = 0;
        if (gbias) {
            g_bias = bias_sums[omp_get_thread_num()] = floats(wide);
            memset(g_bias, 0, 4 * wide);
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < wide; first += PANEL) pack_items(&t, table, first);

#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += together) {
            const int64_t count = rows - first < together ? rows - first : together;
            const float *x = hidden + first * d;
            pair_along_rows(count, d, x, d, b.x, t.steps, t.steps);
            memset(b.gx, 0, 4 * R * deep), memset(b.others, 0, 4 * R * LANES);
            for (int64_t r = 0; r < count; r++) {
                const float *target = table + targets[first + r] * d;
                vec dot = all(0);
                for (int64_t k = 0; k < d; k += LANES)
                    dot += load_some(x + r * d + k, d - k) * load_some(target + k, d - k);
                b.wanted[r] = sum(dot) + (bias ? bias[targets[first + r]] : 0);
                if (!seen) continue;
                out.turn_to(first + r);
                memcpy(b.kept + r * kept_row, out.kept, kept_row);
            }

            for (int64_t block = 0; block < blocks; block++) {
                const int64_t j = block * BLOCK, end = wide - j < BLOCK ? wide - j : BLOCK;
                float *reference = b.reference + block * R;
                memcpy(reference, block ? reference - R : b.wanted, 4 * count);
                b.raised[block] = false;
                if (bias)
                    for (int64_t r = 0; r < count; r++)
                        memcpy(b.scores + r * BLOCK, bias + j, 4 * (items - j < end ? items - j : end));
                for (int64_t at = 0; at < end; at += PANEL)
                    product(true, count, PANEL / LANES, t.steps, b.x, t.steps, 1, t.columns + (j + at) * t.steps, PANEL,
                            b.scores + at, BLOCK, bias != 0);
                for (int64_t r = 0; r < count; r++) {
                    for (int64_t i = items - j; i < end; i++) b.scores[r * BLOCK + i] = -INFINITY;
                    const int64_t target = targets[first + r] - j;
                    if (target >= 0 && target < end) b.scores[r * BLOCK + target] = -INFINITY;
                    (seen ? settle<true> : settle<false>)(&b, r, j, end, kept_row, deep, reference, b.raised + block);
                }
                for (int64_t r = 0; r < count; r += 2)
                    (seen ? powers_of<true> : powers_of<false>)(&b, r, r + 1 == count, j, end, kept_row, reference);
                if (!ghidden) continue;
                for (int64_t at = 0; at < deep; at += COLUMNS * LANES) {
                    const int64_t columns = columns_from(at, deep);
                    product(true, count, columns, end / 2, b.left, BLOCK / 2, 1,
                            t.whole + at * wide / 2 + j / 2 * columns * LANES, columns * LANES, b.gx + at, deep, 1);
                }
            }

            const float *reference = b.reference + (blocks - 1) * R;
            for (int64_t r = 0; r < count; r++) {
                const int64_t target = targets[first + r], panel = target / PANEL;
                const float others = sum(b.others[r]), all_of_them = others + power(b.wanted[r] - reference[r]);
                losses[first + r] = logf(all_of_them) + reference[r] - b.wanted[r];
                if (!ghidden) continue;
                const float factor = scale / all_of_them, back = factor * others;
                for (int64_t k = 0; k < d; k++)
                    ghidden[(first + r) * d + k] = b.gx[r * deep + k] * factor - back * table[target * d + k];
                // The target's part in the gradient of the table: as a power of its block or, if the reference was
                // another there, directly.
                if (b.reference[target / BLOCK * R + r] == reference[r]) {
                    uint16_t *pair = (uint16_t *)(b.right + (panel * b.pairs + r / 2) * PANEL + target % PANEL);
                    pair[r % 2] = (uint16_t)rounded(all(-others))[0];
                } else {
                    for (int64_t k = 0; k < d; k++)
                        b.gt[(panel * deep + k) * PANEL + target % PANEL] -= back * x[r * d + k];
                    if (g_bias) g_bias[target] -= back;
                }
                b.weights[r] = factor;
            }
            if (!ghidden) continue;
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t j = block * BLOCK, end = wide - j < BLOCK ? wide - j : BLOCK, steps = steps_of(count);
                if (!block || b.raised[block]) weigh(&b, x, count, d, reference, b.reference + block * R);
                for (int64_t at = j / PANEL; at < (j + end) / PANEL; at++)
                    product(true, deep, PANEL / LANES, steps, b.turned, b.turned_row, 1, b.right + at * b.pairs * PANEL,
                            PANEL, b.gt + at * deep * PANEL, PANEL, 1);
                if (g_bias) add_to_bias(&b, count, j, end, g_bias);
            }
        }

        if (gtable) {
#pragma omp for schedule(static)
            for (int64_t first = 0; first < wide; first += PANEL) sum_items(&t, sums, bias_sums, threads, first, gtable, gbias);
        }
    }
    for (int thread = 0; thread < threads; thread++) free(sums[thread]), free(bias_sums[thread]);
    free(sums), free(t.columns), free(t.whole);
}
}
#endif
