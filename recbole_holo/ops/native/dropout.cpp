// Dropout whose mask is computed again in the backward pass.
#include "dropout.h"

#define CHUNK 65536  // elements of one run of draws

extern "C" {

// y[i] = x[i] · scale where the random number of position i in [0, 2³¹) is at least `threshold`, else 0.
void dropout(int64_t count, int threads, const int64_t *seed, int32_t threshold, float scale, const float *x, float *y) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < (count + CHUNK - 1) / CHUNK; chunk++) {
        draws drawn = draws_of(*seed, chunk);
        const int64_t first = chunk * CHUNK, size = count - first < CHUNK ? count - first : CHUNK;
        for (int64_t i = 0; i < size; i += LANES) {
            ivec keep = kept(&drawn, threshold);
            if (i + LANES <= size) {
                store(y + first + i, (vec)((ivec)(load(x + first + i) * scale) & keep));
            } else {
                for (int64_t j = 0; i + j < size; j++) y[first + i + j] = keep[j] ? x[first + i + j] * scale : 0.0f;
            }
        }
    }
}
}
