// Products of matrices small enough to stay in the cache, inside a parallel region. Row-major, float32.
#pragma once
#include "simd.h"

#define ROWS 6
#define COLUMNS (LANES == 16 ? 4 : 2)  // vectors; ROWS · COLUMNS sums fill the registers

// c[i][j] (+)= Σ_k a(i, k) · b[k][j] for i < rows, j < columns · LANES; a(i, k) = a[i · a_row + k · a_column].
INLINE void tile(const int rows, const int columns, int64_t inner, const float *a, int64_t a_row, int64_t a_column,
                 const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
    vec sums[ROWS][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) sums[i][j] = add ? load(c + i * c_row + j * LANES) : all(0);
    for (int64_t k = 0; k < inner; k++) {
        vec right[4];
        for (int j = 0; j < columns; j++) right[j] = load(b + k * b_row + j * LANES);
        for (int i = 0; i < rows; i++) {
            float left = a[i * a_row + k * a_column];
            for (int j = 0; j < columns; j++) sums[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) store(c + i * c_row + j * LANES, sums[i][j]);
}

#define TILE(r, k) tile(r, k, inner, a, a_row, a_column, b, b_row, c, c_row, add)
#define TILES(r)                                      \
    switch (columns) {                                \
        case 1: TILE(r, 1); break;                    \
        case 2: TILE(r, 2); break;                    \
        case 3: TILE(r, 3); break;                    \
        default: TILE(r, 4);                          \
    }

static void any_tile(int rows, int columns, int64_t inner, const float *a, int64_t a_row, int64_t a_column,
                     const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
    switch (rows) {
        case 1: TILES(1); break;
        case 2: TILES(2); break;
        case 3: TILES(3); break;
        case 4: TILES(4); break;
        case 5: TILES(5); break;
        default: TILES(6);
    }
}
#undef TILE
#undef TILES

// A matrix [inner, width] in panels of COLUMNS · LANES columns, the last one narrower: rows of a panel are neighbours.
typedef struct {
    int64_t inner, width;  // width: a multiple of LANES; columns beyond the matrix are zero
    float *data;
} panels;

static panels pack(const float *matrix, int64_t inner, int64_t width, int64_t row, int64_t column) {
    panels packed = {inner, (width + LANES - 1) / LANES * LANES, nullptr};
    float *p = packed.data = floats(inner * packed.width);
    for (int64_t first = 0; first < packed.width; first += COLUMNS * LANES)
        for (int64_t k = 0; k < inner; k++)
            for (int64_t j = first; j < first + COLUMNS * LANES && j < packed.width; j++)
                *p++ = j < width ? matrix[k * row + j * column] : 0.0f;
    return packed;
}

// c[rows, b.width] (+)= a[rows, b.inner] · b (+ bias)
static void multiply(int64_t rows, const float *a, int64_t a_row, const panels *b, const float *bias, float *c,
                     int64_t c_row, int add) {
    if (bias)
        for (int64_t i = 0; i < rows; i++) memcpy(c + i * c_row, bias, 4 * b->width);
    add |= bias != 0;
    for (int64_t first = 0; first < b->width; first += COLUMNS * LANES) {
        int columns = (int)((b->width - first) / LANES < COLUMNS ? (b->width - first) / LANES : COLUMNS);
        for (int64_t i = 0; i < rows; i += ROWS)
            any_tile((int)(rows - i < ROWS ? rows - i : ROWS), columns, b->inner, a + i * a_row, a_row, 1,
                     b->data + first * b->inner, columns * LANES, c + i * c_row + first, c_row, add);
    }
}

// c[height, width] += aᵀ[height, inner] · b[inner, width]; width a multiple of LANES
static void add_outer(int64_t height, int64_t width, int64_t inner, const float *a, int64_t a_row, const float *b,
                      int64_t b_row, float *c, int64_t c_row) {
    for (int64_t first = 0; first < width; first += COLUMNS * LANES) {
        int columns = (int)((width - first) / LANES < COLUMNS ? (width - first) / LANES : COLUMNS);
        for (int64_t i = 0; i < height; i += ROWS)
            any_tile((int)(height - i < ROWS ? height - i : ROWS), columns, inner, a + i, 1, a_row, b + first, b_row,
                     c + i * c_row + first, c_row, 1);
    }
}

// sums[width] += Σ_i a[i]
static void add_rows(int64_t rows, int64_t width, const float *a, int64_t a_row, float *sums) {
    for (int64_t j = 0; j < width; j += LANES) {
        vec total = load(sums + j);
        for (int64_t i = 0; i < rows; i++) total += load(a + i * a_row + j);
        store(sums + j, total);
    }
}
