// Dropout whose mask is a function of a seed and the position, so that nothing has to be kept for the backward pass.
#include "simd.h"

#define CHUNK 65536  // elements of one 32-bit counter

// splitmix64: unlike seeds for neighbouring chunks.
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

// Wellons' lowbias32 of a counter: 32 well-mixed bits a lane.
INLINE uvec bits(uvec x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

extern "C" {

// y[i] = x[i] · scale where the random number of position i in [0, 2³¹) is at least `threshold`, else 0.
void dropout(int64_t count, int threads, const int64_t *seed, int32_t threshold, float scale, const float *x, float *y) {
    uvec lane;
    for (int j = 0; j < LANES; j++) lane[j] = j;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < (count + CHUNK - 1) / CHUNK; chunk++) {
        const uint64_t start = mix((uint64_t)*seed + mix(chunk));
        const int64_t first = chunk * CHUNK, size = count - first < CHUNK ? count - first : CHUNK;
        uvec counter = lane + (uint32_t)start;
        for (int64_t i = 0; i < size; i += LANES, counter += LANES) {
            ivec kept = (ivec)((bits(counter) ^ (uint32_t)(start >> 32)) >> 1) >= threshold;
            if (i + LANES <= size) {
                store(y + first + i, (vec)((ivec)(load(x + first + i) * scale) & kept));
            } else {
                for (int64_t j = 0; i + j < size; j++) y[first + i + j] = kept[j] ? x[first + i + j] * scale : 0.0f;
            }
        }
    }
}
}
