// Which items a row leaves out of its softmax, kept from row to row: of a history as long as the rows before it, only the
// events since then are new.
#pragma once
#include "simd.h"

typedef struct {
    int64_t pads;                // items before the table's first
    const int64_t *items;        // numbers of items; the table's first is `pads`
    const int64_t *start, *end;  // [rows]: the row has seen items[start .. end - 1]
} seen_items;

struct left_out {
    const seen_items *seen;  // or 0: no row leaves out any
    int64_t width, start = 0, end = 0;
    uint8_t *kept = 0;  // [size] bytes: bit j is set if item j stays in

    left_out(const seen_items *seen, int64_t width) : seen(seen), width(width) {
        if (!seen) return;
        kept = (uint8_t *)floats(size() / 4);
        memset(kept, 0xff, size());
    }
    ~left_out() { free(kept); }
    int64_t size() const { return (width + 511) / 512 * 64; }

    void set(int64_t item, bool stays) {
        const uint8_t bit = (uint8_t)(1 << item % 8);
        if (stays) kept[item / 8] |= bit;
        else kept[item / 8] &= (uint8_t)~bit;
    }
    void mark(int64_t from, int64_t to, bool stays) {
        for (int64_t k = from; k < to; k++) {
            const int64_t item = seen->items[k] - seen->pads;
            if (item >= 0 && item < width) set(item, stays);
        }
    }
    // `kept` becomes what row i has not seen.
    void turn_to(int64_t i) {
        if (seen->start[i] != start || seen->end[i] < end) {
            mark(start, end, true);
            start = end = seen->start[i];
        }
        if (seen->end[i] > end) {
            mark(end, seen->end[i], false);
            end = seen->end[i];
        }
    }
};

// All bits of a lane are set where that of item j, j + 1, … is; j is a multiple of LANES.
INLINE ivec lanes_of(const uint8_t *kept, int64_t j) {
    uint16_t bits;
    memcpy(&bits, kept + j / 16 * 2, 2);
    ivec each;
    for (int i = 0; i < LANES; i++) each[i] = 1 << i;
    return ((ivec{} + (bits >> j % 16)) & each) != 0;
}

// p[0 … LANES - 1], those of items j, …; -∞ for the ones that are not kept.
INLINE vec visible(const float *p, const uint8_t *kept, int64_t j) {
#if defined(__AVX512F__)
    __mmask16 bits;
    memcpy(&bits, kept + j / 8, 2);
    return (vec)_mm512_mask_loadu_ps((__m512)all(-INFINITY), bits, p);
#else
    return lanes_of(kept, j) ? load(p) : all(-INFINITY);
#endif
}
