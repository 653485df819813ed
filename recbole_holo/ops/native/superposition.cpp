// Sums of bound pairs, in the frequencies: a window is the sum of its events' spectra, each times that of its role.
//
// A spectrum of 2 · half numbers has the real parts of the frequencies in front and the imaginary parts behind. What is
// real, frequency 0 and that of the sign, share the first place: its two numbers are multiplied each for itself. A role
// is three rows of half numbers that say so for all places: `same` and `across` of the real part, `other` of the
// imaginary one,
//
//     out_re = same · re - across · im      out_im = across · re + other · im
//
// Arrays are C-contiguous; half is a multiple of LANES.
#include "simd.h"

typedef struct {
    int64_t windows, size, half;
    const int64_t *events;  // [windows, size]: rows of spectra
    const float *spectra;   // [rows, 2 · half]
    const float *roles;     // [size, 3, half]
} sizes;

#define AT_ONCE 128  // windows whose gradients stay in the cache, and are summed before they are added to a role's

// The part of the items that an item is in.
INLINE int64_t part_of(int64_t item, int64_t parts) {
    return ((uint64_t)((uint32_t)item * 0x9e3779b1u) * (uint32_t)parts) >> 32;
}

extern "C" {

// out [windows, 2 · half] is set.
void superposition(const sizes *s, int threads, float *out) {
    const int64_t half = s->half;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t w = 0; w < s->windows; w++)
        for (int64_t c = 0; c < half; c += LANES) {
            vec re = all(0), im = all(0);
            for (int64_t j = 0; j < s->size; j++) {
                const float *x = s->spectra + s->events[w * s->size + j] * 2 * half + c, *r = s->roles + j * 3 * half + c;
                const vec same = load(r), across = load(r + half), other = load(r + 2 * half);
                re += same * load(x) - across * load(x + half);
                im += across * load(x) + other * load(x + half);
            }
            store(out + w * 2 * half + c, re), store(out + w * 2 * half + half + c, im);
        }
}

// gspectra, like spectra, must be zeros and receives the gradient; so must sums [threads, size, 3, half], which
// receives that of roles. All threads read all events, each adds up the gradients of its part of the items.
void superposition_backward(const sizes *s, int threads, const float *gout, float *gspectra, float *sums) {
    const int64_t half = s->half;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t first = 0; first < s->windows; first += AT_ONCE) {
            const int64_t end = first + AT_ONCE < s->windows ? first + AT_ONCE : s->windows;
            for (int64_t j = 0; j < s->size; j++)
                for (int64_t c = 0; c < half; c += LANES) {
                    const float *r = s->roles + j * 3 * half + c;
                    const vec same = load(r), across = load(r + half), other = load(r + 2 * half);
                    vec gsame = all(0), gacross = all(0), gother = all(0);
                    for (int64_t w = first; w < end; w++) {
                        const int64_t item = s->events[w * s->size + j];
                        if (part_of(item, threads) != part) continue;
                        const float *x = s->spectra + item * 2 * half + c, *g = gout + w * 2 * half + c;
                        float *gx = gspectra + item * 2 * half + c;
                        const vec gre = load(g), gim = load(g + half), re = load(x), im = load(x + half);
                        store(gx, load(gx) + same * gre + across * gim);
                        store(gx + half, load(gx + half) - across * gre + other * gim);
                        gsame += re * gre, gacross += re * gim - im * gre, gother += im * gim;
                    }
                    float *gr = sums + (part * s->size + j) * 3 * half + c;
                    store(gr, load(gr) + gsame), store(gr + half, load(gr + half) + gacross);
                    store(gr + 2 * half, load(gr + 2 * half) + gother);
                }
        }
}
}
