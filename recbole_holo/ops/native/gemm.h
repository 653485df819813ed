// Products of matrices small enough to stay in the cache, inside a parallel region. Row-major, float32.
//
// With `half`, factors are rounded to bfloat16 and summed in float32, which AVX512-BF16 does at twice the speed: a float
// then holds two neighbouring values of the summed dimension, and `inner` counts such pairs. Where the processor lacks
// it, half means nothing.
#pragma once
#include "simd.h"

#if defined(__AVX512BF16__)
#define HALF 1
#else
#define HALF 0
#endif

#define ROWS 6
#define COLUMNS (LANES == 16 ? 4 : 2)  // vectors; ROWS · COLUMNS sums fill the registers

template <bool half>
INLINE vec multiply_add(vec sum, float left, vec right) {
#if HALF
    if constexpr (half) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(left), (__m512bh)right);
#endif
    return sum + left * right;
}

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

#if HALF
// bfloat16 of each lane, in its low half.
INLINE __m512i rounded(vec x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

// Lane j: the pair of x[j] and y[j].
INLINE vec paired(vec x, vec y) { return (vec)_mm512_or_si512(rounded(x), _mm512_slli_epi32(rounded(y), 16)); }

// Rows of a [rows, inner] as rows of pairs; an odd last value is paired with 0.
static void pair_along_rows(int64_t rows, int64_t inner, const float *a, int64_t a_row, float *pairs, int64_t pairs_row) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < inner; k += LANES) {
            vec v;
            if (k + LANES <= inner) v = load(a + i * a_row + k);
            else {
                v = all(0);
                memcpy(&v, a + i * a_row + k, 4 * (inner - k));
            }
            _mm256_storeu_si256((__m256i *)(pairs + i * pairs_row + k / 2), (__m256i)_mm512_cvtneps_pbh((__m512)v));
        }
}

// Neighbouring rows of a [inner, width] as one row of pairs; an odd last row is paired with 0. width may be any.
static void pair_along_columns(int64_t inner, int64_t width, const float *a, int64_t a_row, float *pairs, int64_t pairs_row) {
    for (int64_t k = 0; k < inner; k += 2)
        for (int64_t j = 0; j < width; j += LANES) {
            vec x = all(0), y = all(0);
            const int64_t count = width - j < LANES ? width - j : LANES;
            memcpy(&x, a + k * a_row + j, 4 * count);
            if (k + 1 < inner) memcpy(&y, a + (k + 1) * a_row + j, 4 * count);
            store(pairs + k / 2 * pairs_row + j, paired(x, y));
        }
}
#endif

// A matrix [inner, width] in panels of COLUMNS · LANES columns, the last one narrower: rows of a panel are neighbours.
typedef struct {
    int64_t inner, width;  // width: a multiple of LANES; columns beyond the matrix are zero
    float *data;
    bool half;  // inner counts pairs, but what it is multiplied with still has `whole` values
    int64_t whole;
} panels;

static panels pack(const float *matrix, int64_t inner, int64_t width, int64_t row, int64_t column, bool half = false) {
    half = half && HALF;
    const int64_t steps = half ? (inner + 1) / 2 : inner, filled = (width + LANES - 1) / LANES * LANES;
    panels packed = {steps, filled, floats(steps * filled), half, inner};
    float *p = packed.data;
    for (int64_t first = 0; first < filled; first += COLUMNS * LANES)
        for (int64_t k = 0; k < steps; k++)
            for (int64_t j = first; j < first + COLUMNS * LANES && j < filled; j += LANES, p += LANES) {
                vec v[2] = {};
                for (int64_t i = 0; i < LANES && j + i < width; i++) {
                    const float *at = matrix + (j + i) * column;
                    v[0][i] = at[(half ? 2 * k : k) * row];
                    if (half && 2 * k + 1 < inner) v[1][i] = at[(2 * k + 1) * row];
                }
#if HALF
                if (half) v[0] = paired(v[0], v[1]);
#endif
                store(p, v[0]);
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
        const int64_t row = (b->whole + LANES - 1) / LANES * LANES / 2;
        float *pairs = scratch(rows * row);
        pair_along_rows(rows, b->whole, a, a_row, pairs, row);
        a = pairs, a_row = row;
    }
#endif
    for (int64_t first = 0; first < b->width; first += COLUMNS * LANES) {
        const int64_t columns = columns_from(first, b->width);
        for (int64_t i = 0; i < rows; i += ROWS)
            (b->half ? any_tile<true> : any_tile<false>)(rows - i, columns, b->inner, a + i * a_row, a_row, 1,
                                                         b->data + first * b->inner, columns * LANES,
                                                         c + i * c_row + first, c_row, add);
    }
}

// c[height, width] += aᵀ[height, inner] · b[inner, width]; width a multiple of LANES
static void add_outer(int64_t height, int64_t width, int64_t inner, const float *a, int64_t a_row, const float *b,
                      int64_t b_row, float *c, int64_t c_row, bool half = false) {
    half = half && HALF;
#if HALF
    if (half) {
        const int64_t steps = (inner + 1) / 2, left = (height + LANES - 1) / LANES * LANES;
        float *pairs = scratch(steps * (left + width)), *right = pairs + steps * left;
        pair_along_columns(inner, height, a, a_row, pairs, left);
        pair_along_columns(inner, width, b, b_row, right, width);
        a = pairs, a_row = left, b = right, b_row = width, inner = steps;
    }
#endif
    for (int64_t first = 0; first < width; first += COLUMNS * LANES)
        for (int64_t i = 0; i < height; i += ROWS)
            (half ? any_tile<true> : any_tile<false>)(height - i, columns_from(first, width), inner, a + i, 1, a_row,
                                                      b + first, b_row, c + i * c_row + first, c_row, 1);
}

// sums[width] += Σ_i a[i]
static void add_rows(int64_t rows, int64_t width, const float *a, int64_t a_row, float *sums) {
    for (int64_t j = 0; j < width; j += LANES) {
        vec total = load(sums + j);
        for (int64_t i = 0; i < rows; i++) total += load(a + i * a_row + j);
        store(sums + j, total);
    }
}
