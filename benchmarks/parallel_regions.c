// Counts OpenMP's parallel regions: loaded before libgomp by LD_PRELOAD, see benchmarks/parallel_regions.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>

static long regions;

long parallel_regions(void) { return regions; }

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    static void (*next)(void (*)(void *), void *, unsigned, unsigned);
    if (!next) next = (void (*)(void (*)(void *), void *, unsigned, unsigned))dlsym(RTLD_NEXT, "GOMP_parallel");
    regions += threads != 1;  // 1: the region's `if` was false
    next(body, data, threads, flags);
}
