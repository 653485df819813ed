// Which positions dropout keeps: a function of a seed and the position, so that nothing has to be stored.
#pragma once
#include "simd.h"

typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

// splitmix64: unlike seeds for neighbouring runs.
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Wellons' lowbias32 of a counter: 32 well-mixed bits a lane.
INLINE uvec bits(uvec x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Draws for the positions of one run, LANES at a time; a run has at most 2³² positions.
typedef struct {
    uvec counter;
    uint32_t flipped;
} draws;

INLINE draws draws_of(uint64_t seed, uint64_t run) {
    const uint64_t start = mix(seed + mix(run));
    draws d;
    for (int j = 0; j < LANES; j++) d.counter[j] = j;
    d.counter += (uint32_t)start, d.flipped = (uint32_t)(start >> 32);
    return d;
}

// All bits of a lane where the next random number in [0, 2³¹) is at least `threshold`, else none.
INLINE ivec kept(draws *d, int32_t threshold) {
    ivec drawn = (ivec)((bits(d->counter) ^ d->flipped) >> 1);
    d->counter += LANES;
    return drawn >= threshold;
}
