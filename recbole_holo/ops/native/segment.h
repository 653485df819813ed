// Rows of a segment in a thread's own memory.
#pragma once
#include "simd.h"

// Distance of rows of `width` floats: an odd number of vectors, because at distances of powers of two the values of one
// channel would fall into a few sets of the L1 cache and evict each other.
INLINE int64_t spread(int64_t width) { return (width / LANES | 1) * LANES; }

INLINE float *take(float **memory, int64_t count) {
    float *taken = *memory;
    *memory += (count + 15) / 16 * 16;
    return taken;
}
