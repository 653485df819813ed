// Products of matrices small enough to stay in the cache, inside a parallel region. Row-major, float32.
//
// With `half`, factors are rounded to bfloat16 and summed in float32 (half.h): `inner` then counts pairs. Where the
// processor cannot multiply those, half means nothing.
#pragma once
#include "half.h"

#define ROWS 6
#define COLUMNS (LANES == 16 ? 4 : 2)  // vectors; ROWS · COLUMNS sums fill the registers

// c[i][j] (+)= Σ_k a(i, k) · b[k][j] for i < rows, j < columns · LANES; a(i, k) = a[i · a_row + k · a_column].
template <bool half, int rows, int columns>
INLINE void tile(int64_t inner, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *c,
                 int64_t c_row, int add) {
    vec sums[rows][columns];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) sums[i][j] = add ? load(c + i * c_row + j * LANES) : all(0);
    for (int64_t k = 0; k < inner; k++) {
        vec right[columns];
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) right[j] = load(b + k * b_row + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
            for (int j = 0; j < columns; j++)
                sums[i][j] = multiply_add<half>(sums[i][j], a[i * a_row + k * a_column], right[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) store(c + i * c_row + j * LANES, sums[i][j]);
}

template <bool half, int rows = ROWS>
static void any_tile(int64_t height, int64_t columns, int64_t inner, const float *a, int64_t a_row, int64_t a_column,
                     const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
    if constexpr (rows > 1) {
        if (height < rows)
            return any_tile<half, rows - 1>(height, columns, inner, a, a_row, a_column, b, b_row, c, c_row, add);
    }
    if (columns >= 4) tile<half, rows, 4>(inner, a, a_row, a_column, b, b_row, c, c_row, add);
    else if (columns == 3) tile<half, rows, 3>(inner, a, a_row, a_column, b, b_row, c, c_row, add);
    else if (columns == 2) tile<half, rows, 2>(inner, a, a_row, a_column, b, b_row, c, c_row, add);
    else tile<half, rows, 1>(inner, a, a_row, a_column, b, b_row, c, c_row, add);
}

// The same for any number of rows and up to COLUMNS vectors; with half, a's pairs of one row are neighbours on AMX.
static void product(bool half, int64_t rows, int64_t columns, int64_t inner, const float *a, int64_t a_row,
                    int64_t a_column, const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
#if AMX
    if (half && tiles::ready) return amx_product(rows, columns, inner, a, a_row, b, b_row, c, c_row, add);
#endif
    for (int64_t i = 0; i < rows; i += ROWS)
        (half ? any_tile<true> : any_tile<false>)(rows - i, columns, inner, a + i * a_row, a_row, a_column, b, b_row,
                                                  c + i * c_row, c_row, add);
}

INLINE int64_t columns_from(int64_t first, int64_t width) {
    return (width - first) / LANES < COLUMNS ? (width - first) / LANES : COLUMNS;
}

// Memory of the thread, good until it asks again for this purpose.
template <int purpose = 0>
static float *scratch(int64_t count) {
    static thread_local struct memory {
        float *data = nullptr;
        int64_t size = 0;
        ~memory() { free(data); }
    } kept;
    if (kept.size < count) {
        free(kept.data);
        kept.data = floats(kept.size = count);
    }
    return kept.data;
}

// A matrix [inner, width] in panels of COLUMNS · LANES columns, the last one narrower: rows of a panel are neighbours.
typedef struct {
    int64_t inner, width;  // width: a multiple of LANES; columns beyond the matrix are zero
    float *data;
    bool half;  // inner counts pairs, but what it is multiplied with still has `whole` values
    int64_t whole;
} panels;

// LANES values of row k of the matrix from column j on, with zeros for what it has not.
INLINE vec some_of_row(const float *matrix, int64_t inner, int64_t width, int64_t row, int64_t column, int64_t k,
                       int64_t j) {
    if (k < inner && column == 1 && j + LANES <= width) return load(matrix + k * row + j);
    vec v = all(0);
    for (int64_t i = 0; k < inner && i < LANES && j + i < width; i++) v[i] = matrix[k * row + (j + i) * column];
    return v;
}

// matrix(k, j) = matrix[k · row + j · column]
static panels pack(const float *matrix, int64_t inner, int64_t width, int64_t row, int64_t column, bool half = false) {
    half = half && HALF;
    const int64_t steps = half ? steps_of(inner) : inner, filled = (width + LANES - 1) / LANES * LANES;
    panels packed = {steps, filled, floats(steps * filled), half, inner};
    float *p = packed.data;
    for (int64_t first = 0; first < filled; first += COLUMNS * LANES)
        for (int64_t k = 0; k < steps; k++)
            for (int64_t j = first; j < first + COLUMNS * LANES && j < filled; j += LANES, p += LANES) {
                const auto of_row = [&](int64_t k) { return some_of_row(matrix, inner, width, row, column, k, j); };
#if HALF
                store(p, half ? paired(of_row(2 * k), of_row(2 * k + 1)) : of_row(k));
#else
                store(p, of_row(k));
#endif
            }
    return packed;
}

// c[rows, b.width] (+)= a[rows, b.whole] · b (+ bias)
static void multiply(int64_t rows, const float *a, int64_t a_row, const panels *b, const float *bias, float *c,
                     int64_t c_row, int add) {
    if (bias)
        for (int64_t i = 0; i < rows; i++) memcpy(c + i * c_row, bias, 4 * b->width);
    add |= bias != 0;
#if HALF
    if (b->half) {
        const int64_t row = (b->inner + LANES / 2 - 1) / (LANES / 2) * (LANES / 2);
        float *pairs = scratch((rows + 15) / 16 * 16 * row);
        pair_along_rows(rows, b->whole, a, a_row, pairs, row, row);
        a = pairs, a_row = row;
    }
#endif
    for (int64_t first = 0; first < b->width; first += COLUMNS * LANES) {
        const int64_t columns = columns_from(first, b->width);
        product(b->half, rows, columns, b->inner, a, a_row, 1, b->data + first * b->inner, columns * LANES, c + first,
                c_row, add);
    }
}

#define STRIP 48  // rows of a product whose left factor stays in the L1 cache from one panel to the next

// c[height, width] += aᵀ[height, inner] · b[inner, width]; width a multiple of LANES
static void add_outer(int64_t height, int64_t width, int64_t inner, const float *a, int64_t a_row, const float *b,
                      int64_t b_row, float *c, int64_t c_row, bool half = false) {
    half = half && HALF;
    int64_t row = 1, column = a_row;  // of aᵀ
#if HALF
    if (half) {
        const int64_t steps = steps_of(inner), left = (height + LANES - 1) / LANES * LANES;
        float *pairs = scratch(steps * (left + width)), *right = pairs + steps * left;
        if (amx()) pair_transposed(inner, height, a, a_row, pairs, steps, steps), row = steps, column = 1;
        else pair_along_columns(inner, height, a, a_row, pairs, steps, left), column = left;
        pair_along_columns(inner, width, b, b_row, right, steps, width);
        a = pairs, b = right, b_row = width, inner = steps;
    }
#endif
    for (int64_t i = 0; i < height; i += STRIP)
        for (int64_t first = 0; first < width; first += COLUMNS * LANES)
            product(half, height - i < STRIP ? height - i : STRIP, columns_from(first, width), inner, a + i * row, row,
                    column, b + first, b_row, c + i * c_row + first, c_row, 1);
}

// sums[width] += Σ_i a[i]
static void add_rows(int64_t rows, int64_t width, const float *a, int64_t a_row, float *sums) {
    for (int64_t j = 0; j < width; j += LANES) {
        vec total = load(sums + j);
        for (int64_t i = 0; i < rows; i++) total += load(a + i * a_row + j);
        store(sums + j, total);
    }
}
