// Pairs of bfloat16, and what multiplies them: AMX where processor and operating system have it, else AVX512-BF16. A float
// then holds two neighbouring values of the summed dimension; factors are rounded, sums are float32.
//
// EMULATED, for tests, puts portable code in the place of instructions: 1 for those of AVX512-BF16, 2 for AMX's too.
#pragma once
#include "simd.h"

#if defined(__AVX512BF16__) || EMULATED
#define HALF 1
#else
#define HALF 0
#endif
#if EMULATED == 2
#define AMX 1
#elif !EMULATED && HALF && defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__))  // Clang before 15
#define AMX 1
#else
#define AMX 0
#endif

// sum + left · right; of pairs: plus the products of both halves.
template <bool half>
INLINE vec multiply_add(vec sum, float left, vec right) {
#if EMULATED
    if constexpr (half) {
        int32_t bits;
        memcpy(&bits, &left, 4);
        const ivec l = ivec{} + bits, r = (ivec)right, high = ivec{} + (int32_t)0xffff0000;
        return sum + (vec)(l << 16) * (vec)(r << 16) + (vec)(l & high) * (vec)(r & high);
    }
#elif HALF
    if constexpr (half) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(left), (__m512bh)right);
#endif
    return sum + left * right;
}

#if HALF
// bfloat16 of each lane, in its low half.
INLINE ivec rounded(vec x) {
#if EMULATED
    const ivec bits = (ivec)x, even = bits + 0x7fff + ((bits >> 16) & 1);
    return ((x == x ? even : ivec{} + 0x7fc00000) >> 16) & 0xffff;
#else
    return (ivec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#endif
}

// Lane j: the pair of x[j] and y[j].
INLINE vec paired(vec x, vec y) { return (vec)(rounded(x) | (rounded(y) << 16)); }

// LANES values as LANES / 2 pairs of neighbours.
INLINE void store_half(float *pairs, vec x) {
#if EMULATED
    const ivec low = rounded(x);
    uint16_t halves[LANES];
    for (int j = 0; j < LANES; j++) halves[j] = (uint16_t)low[j];
    memcpy(pairs, halves, sizeof halves);
#else
    _mm256_storeu_si256((__m256i *)pairs, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#endif
}

// p[0 … LANES - 1], where there are only `count` of them followed by zeros.
INLINE vec load_some(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
    vec v = all(0);
    if (count > 0) memcpy(&v, p, 4 * count);
    return v;
}

// Rows of a [rows, inner] as rows of `steps` pairs, with zeros for what a has not.
static void pair_along_rows(int64_t rows, int64_t inner, const float *a, int64_t a_row, float *pairs, int64_t steps,
                            int64_t pairs_row) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < 2 * steps; k += LANES)
            store_half(pairs + i * pairs_row + k / 2, load_some(a + i * a_row + k, inner - k));
}

INLINE vec pair_of_rows(int64_t k, int64_t inner, int64_t count, const float *a, int64_t a_row) {
    return paired(k < inner ? load_some(a + k * a_row, count) : all(0),
                  k + 1 < inner ? load_some(a + (k + 1) * a_row, count) : all(0));
}

// Neighbouring rows of a [inner, width] as `steps` rows of pairs, with zeros for what a has not. width may be any.
static void pair_along_columns(int64_t inner, int64_t width, const float *a, int64_t a_row, float *pairs, int64_t steps,
                               int64_t pairs_row) {
    for (int64_t k = 0; k < steps; k++)
        for (int64_t j = 0; j < width; j += LANES)
            store(pairs + k * pairs_row + j, pair_of_rows(2 * k, inner, width - j, a + j, a_row));
}

// The same, transposed: [width, steps], with zeros up to the next multiples of LANES.
static void pair_transposed(int64_t inner, int64_t width, const float *a, int64_t a_row, float *pairs, int64_t steps,
                            int64_t pairs_row) {
    for (int64_t k = 0; k < steps; k += LANES)
        for (int64_t j = 0; j < width; j += LANES) {
            vec v[LANES];
            for (int i = 0; i < LANES; i++) v[i] = pair_of_rows(2 * (k + i), inner, width - j, a + j, a_row);
            transpose(v);
            for (int i = 0; i < LANES; i++) store(pairs + (j + i) * pairs_row + k, v[i]);
        }
}
#endif

// ------------------------------------------------------------------ AMX: tiles of 16 rows of 16 floats or pairs
#if AMX
#if EMULATED
static thread_local float emulated[8][16][16];

static void tile_zero(int to) { memset(emulated[to], 0, sizeof emulated[to]); }
static void tile_load(int to, const float *from, int64_t row) {
    for (int i = 0; i < 16; i++) memcpy(emulated[to][i], from + i * row, 64);
}
static void tile_store(int from, float *to, int64_t row) {
    for (int i = 0; i < 16; i++) memcpy(to + i * row, emulated[from][i], 64);
}
static void tile_multiply(int sums, int left, int right) {
    for (int i = 0; i < 16; i++) {
        vec total = load(emulated[sums][i]);
        for (int k = 0; k < 16; k++) total = multiply_add<true>(total, emulated[left][i][k], load(emulated[right][k]));
        store(emulated[sums][i], total);
    }
}
static bool amx() { return true; }
static void tile_configure() {}
static void tile_release() {}
#else
#include <sys/syscall.h>
#include <unistd.h>

#define tile_zero(to) _tile_zero(to)
#define tile_load(to, from, row) _tile_loadd(to, from, 4 * (row))
#define tile_store(from, to, row) _tile_stored(from, to, 4 * (row))
#define tile_multiply(sums, left, right) _tile_dpbf16ps(sums, left, right)

// Linux grants the tiles to a process that asks for them. RECBOLE_HOLO_AMX=0 does without, to compare.
static bool amx() {
    const int request = 0x1023, tile_data = 18;
    static const char *wanted = getenv("RECBOLE_HOLO_AMX");
    static const bool granted = !(wanted && *wanted == '0') && !syscall(SYS_arch_prctl, request, tile_data);
    return granted;
}

static void tile_configure() {
    struct alignas(64) {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
}
static void tile_release() { _tile_release(); }
#endif

// A thread's products run in tiles as long as this lives.
struct tiles {
    static inline thread_local bool ready = false;
    tiles() {
        if (amx()) tile_configure(), ready = true;
    }
    ~tiles() {
        if (ready) tile_release(), ready = false;
    }
};

// One or two tiles of rows by one or two of columns of the product below, of which `rows` exist in c.
template <bool tall, bool broad>
static void amx_block(int64_t rows, int64_t steps, const float *a, int64_t a_row, const float *b, int64_t b_row, float *c,
                      int64_t c_row, int add) {
    alignas(64) float buffer[32 * 32];
    float *to = c;
    int64_t row = c_row;
    const int64_t bytes = broad ? 128 : 64;
    if (rows < (tall ? 32 : 16)) {
        to = buffer, row = 32;
        for (int64_t i = 0; add && i < rows; i++) memcpy(to + i * row, c + i * c_row, bytes);
    }
    asm volatile("" ::: "memory");  // the compiler does not know what tiles read and write
    if (add) {
        tile_load(0, to, row);
        if (broad) tile_load(1, to + 16, row);
        if (tall) tile_load(2, to + 16 * row, row);
        if (tall && broad) tile_load(3, to + 16 * row + 16, row);
    } else {
        tile_zero(0);
        if (broad) tile_zero(1);
        if (tall) tile_zero(2);
        if (tall && broad) tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k += 16) {
        tile_load(4, a + k, a_row);
        tile_load(6, b + k * b_row, b_row);
        tile_multiply(0, 4, 6);
        if (broad) {
            tile_load(7, b + k * b_row + 16, b_row);
            tile_multiply(1, 4, 7);
        }
        if (tall) {
            tile_load(5, a + 16 * a_row + k, a_row);
            tile_multiply(2, 5, 6);
        }
        if (tall && broad) tile_multiply(3, 5, 7);
    }
    tile_store(0, to, row);
    if (broad) tile_store(1, to + 16, row);
    if (tall) tile_store(2, to + 16 * row, row);
    if (tall && broad) tile_store(3, to + 16 * row + 16, row);
    asm volatile("" ::: "memory");
    for (int64_t i = 0; to == buffer && i < rows; i++) memcpy(c + i * c_row, to + i * row, bytes);
}

// c[rows, 16 · columns] (+)= a[rows, steps] · b[steps, 16 · columns], of pairs. steps is a multiple of 16, and a has a
// multiple of 16 rows, whatever is in those beyond `rows`.
static void amx_product(int64_t rows, int64_t columns, int64_t steps, const float *a, int64_t a_row, const float *b,
                        int64_t b_row, float *c, int64_t c_row, int add) {
    for (int64_t i = 0; i < rows; i += 32)
        for (int64_t j = 0; j < columns; j += 2) {
            const bool tall = rows - i > 16, broad = columns - j > 1;
            const auto block = tall ? broad ? amx_block<true, true> : amx_block<true, false>
                                    : broad ? amx_block<false, true> : amx_block<false, false>;
            block(rows - i < 32 ? rows - i : 32, steps, a + i * a_row, a_row, b + 16 * j, b_row, c + i * c_row + 16 * j,
                  c_row, add);
        }
}
#else
static bool amx() { return false; }
struct tiles {
    tiles() {}
};
#endif

// Pairs that hold `inner` values; tiles take 16 at a time.
INLINE int64_t steps_of(int64_t inner) { return amx() ? (inner + 31) / 32 * 16 : (inner + 1) / 2; }
