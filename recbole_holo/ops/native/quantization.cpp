// Products of a few vectors with all rows of a matrix in 4 to 8 bits a number; see ops/quantization.py.
#include "simd.h"

typedef struct {
    int64_t rows, width, bits, bytes, queries;
} sizes;

// A plane of `plane` bits a number, `size` bytes: adds its numbers, shifted by `done` bits, to x.
template <int plane>
INLINE void add_plane(const uint8_t *codes, int64_t size, int64_t width, int done, int32_t *x) {
    for (int part = 0; part < 8 / plane; part++) {
        const int64_t first = part * size, count = width - first < size ? width - first : size;
        for (int64_t i = 0; i < count; i++) x[first + i] += ((codes[i] >> (plane * part)) & ((1 << plane) - 1)) << done;
    }
}

// One row as floats; `filled`, a multiple of LANES, is at least its width.
INLINE void read_row(const sizes *s, const uint8_t *codes, int64_t filled, int32_t *numbers, float *row) {
    for (int64_t i = 0; i < s->width; i++) numbers[i] = -(1 << (s->bits - 1));
    if (s->bits == 8) add_plane<8>(codes, s->width, s->width, 0, numbers);
    else add_plane<4>(codes, (s->width + 1) / 2, s->width, 0, numbers);
    codes += (s->width + 1) / 2;
    if (s->bits & 2) add_plane<2>(codes, (s->width + 3) / 4, s->width, 4, numbers), codes += (s->width + 3) / 4;
    if (s->bits & 1) add_plane<1>(codes, (s->width + 7) / 8, s->width, s->bits - 1, numbers);
    for (int64_t i = 0; i < filled; i += LANES) {
        ivec v;
        memcpy(&v, numbers + i, sizeof v);
        store(row + i, __builtin_convertvector(v, vec));
    }
}

extern "C" {

// codes [rows, bytes], scales [rows], query [queries, width] → out [queries, rows].
void quantized_product(const sizes *s, int threads, const uint8_t *codes, const float *scales, const float *query, float *out) {
    const int64_t filled = (s->width + LANES - 1) / LANES * LANES, blocks = (s->rows + LANES - 1) / LANES;
    float *queries = floats(s->queries * filled);
    memset(queries, 0, 4 * s->queries * filled);
    for (int64_t q = 0; q < s->queries; q++) memcpy(queries + q * filled, query + q * s->width, 4 * s->width);
#pragma omp parallel num_threads(threads)
    {
        float *rows = floats((LANES + 1) * filled);
        int32_t *numbers = (int32_t *)(rows + LANES * filled);
        memset(numbers, 0, 4 * filled);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = block * LANES, count = s->rows - first < LANES ? s->rows - first : LANES;
            for (int64_t r = 0; r < count; r++)
                read_row(s, codes + (first + r) * s->bytes, filled, numbers, rows + r * filled);
            for (int64_t q = 0; q < s->queries; q++) {
                vec sums[LANES];
                for (int64_t r = 0; r < LANES; r++) {
                    sums[r] = all(0);
                    for (int64_t i = 0; i < filled && r < count; i += LANES)
                        sums[r] += load(rows + r * filled + i) * load(queries + q * filled + i);
                }
                sum_all(sums);
                float *at = out + q * s->rows + first;
                float found[LANES];
                store(found, sums[0]);
                for (int64_t r = 0; r < count; r++) at[r] = found[r] * scales[first + r];
            }
        }
        free(rows);
    }
    free(queries);
}
}
