/* The matrix product of one core, y [rows, outputs] = x [rows, inputs] W^T, for any number of rows.

   W is packed once: in panels of PANEL outputs, each with the PANEL weights of input 0, then those
   of input 1. So memory is read in order, and a tile of ROWS x PANEL sums stays in registers while
   each weight is used for ROWS rows. Panels are cut into blocks that stay in the cache while all
   rows pass; the next block is fetched meanwhile (Goto, van de Geijn, ACM TOMS 34(3), 2008).

   Weights are float32, or bfloat16, float16 or int8 and widened in registers; int8 has a factor for
   each output. x, y and sums are float32; digits.c has another way for int8. A sum's additions are
   in the order of the inputs, whatever the number of rows and of registers: y's row is the same to
   the bit beside any others. Fused multiply-add and the instructions of digits.c, which not every
   processor has, make a difference. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* WIDTH: floats in a register; VECTORS: registers of a panel. ROWS x VECTORS sums, the weights and
   an input fit the 32 (AVX-512, NEON) or 16 registers. */
#if defined(__AVX512F__)
enum { WIDTH = 16, VECTORS = 4 };
#elif defined(__AVX2__)
enum { WIDTH = 8, VECTORS = 2 };
#elif defined(__aarch64__)
enum { WIDTH = 4, VECTORS = 4 };
#else
enum { WIDTH = 4, VECTORS = 2 };
#endif
enum { ROWS = 6, PANEL = VECTORS * WIDTH, BLOCK = 24576 / PANEL, GROUP = 4, LINE = 64 };

typedef float chunk __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
typedef int8_t bytes __attribute__((vector_size(WIDTH)));

typedef enum { FLOAT32, BFLOAT16, FLOAT16, INT8 } kind; /* as packed.KINDS has them */
static const int64_t SIZE[] = {4, 2, 2, 1};
enum { NONE, GELU, GELU_TANH, RELU, SILU }; /* from 1 on as model.ACTIVATIONS has them */

typedef struct {
    const char *panels;
    const float *factor, *bias; /* [outputs]; each may be NULL */
    int64_t outputs, inputs, kind, activation;
} linear;

INLINE chunk load(const float *from) {
    chunk c;
    memcpy(&c, from, sizeof c);
    return c;
}

INLINE void store(float *to, chunk c) { memcpy(to, &c, sizeof c); }

/* float16 as float32, exactly: moved into float32's place, then scaled by 2^112, which makes
   subnormal numbers normal; the largest exponent means infinity or NaN. */
INLINE chunk half_to_float(halves h) {
#if defined(__AVX512F__)
    return (chunk)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__) && defined(__F16C__)
    return (chunk)_mm256_cvtph_ps((__m128i)h);
#else
    const words w = __builtin_convertvector(h, words), number = (w & 0x7fff) << 13;
    const words scaled = (words)((chunk)number * 0x1p112f), infinite = (words)(number >= 0xf800000);
    return (chunk)(((w & 0x8000) << 16) | scaled | (infinite & 0x7f800000));
#endif
}

/* WIDTH weights from the i-th on */
INLINE chunk widen(const void *weights, int64_t i, kind of) {
    if (of == FLOAT32) return load((const float *)weights + i);
    if (of == INT8) {
        bytes b;
        memcpy(&b, (const int8_t *)weights + i, sizeof b);
#if defined(__AVX512F__)
        return (chunk)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b));
#elif defined(__AVX2__)
        return (chunk)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)b)));
#else
        return __builtin_convertvector(b, chunk);
#endif
    }
    halves h;
    memcpy(&h, (const uint16_t *)weights + i, sizeof h);
    if (of == FLOAT16) return half_to_float(h);
#if defined(__AVX512F__)
    return (chunk)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
    return (chunk)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    return (chunk)(__builtin_convertvector(h, words) << 16);
#endif
}

/* The processor fetches by itself what is read once, but not beyond the end of a page: touching the
   page 12 pages ahead makes that a tenth faster. */
static void fetch_pages(const char *begin, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 4096) __builtin_prefetch(begin + 12 * 4096 + i);
}

#include "digits.c"

/* A product's operands: n inputs, PANEL outputs; a row of each is so many numbers after the one
   before. more: add to y. lines: cache lines to fetch from `ahead` with GROUP inputs. */
typedef struct {
    const void *w;
    const float *x;
    float *y;
    int64_t w_row, x_row, y_row, n, more, lines;
    const char *ahead;
} tile;

INLINE void multiply(const tile *t, int rows, kind of) {
    const float *x = t->x;
    const void *from = t->w;
    const int64_t w_row = t->w_row, x_row = t->x_row, n = t->n, lines = t->lines;
    const char *ahead = t->ahead;
    chunk sum[ROWS][VECTORS], w[VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = t->more ? load(t->y + r * t->y_row + v * WIDTH) : (chunk){0};
#define INPUT(k)                                                                                   \
    for (int v = 0; v < VECTORS; v++) w[v] = widen(from, (k) * w_row + v * WIDTH, of);             \
    for (int r = 0; r < rows; r++)                                                                 \
        for (int v = 0; v < VECTORS; v++) sum[r][v] += w[v] * x[r * x_row + (k)];
    int64_t k = 0;
    for (; k + GROUP <= n; k += GROUP) {
        for (int64_t i = 0; i < lines; i++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
        _Pragma("GCC unroll 1") /* gcc would reorder several inputs, and run out of registers */
        for (int64_t i = k; i < k + GROUP; i++) { INPUT(i) }
    }
    for (; k < n; k++) { INPUT(k) }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) store(t->y + r * t->y_row + v * WIDTH, sum[r][v]);
}

#define TILES(of)                                                                                  \
    static void multiply_##of(const tile *t, int64_t rows) {                                       \
        switch (rows) {                                                                            \
        case 1: multiply(t, 1, of); break;                                                         \
        case 2: multiply(t, 2, of); break;                                                         \
        case 3: multiply(t, 3, of); break;                                                         \
        case 4: multiply(t, 4, of); break;                                                         \
        case 5: multiply(t, 5, of); break;                                                         \
        case 6: multiply(t, 6, of); break;                                                         \
        }                                                                                          \
    }

TILES(FLOAT32)
TILES(BFLOAT16)
TILES(FLOAT16)
TILES(INT8)
static void (*const MULTIPLY[])(const tile *, int64_t) = {multiply_FLOAT32, multiply_BFLOAT16,
                                                          multiply_FLOAT16, multiply_INT8};

/* at most ROWS rows; width: how many of the panel's outputs y has */
static void multiply_rows(const tile *t, int64_t rows, int64_t width, kind of) {
    if (width >= PANEL) {
        MULTIPLY[of](t, rows);
        return;
    }
    float all[ROWS * PANEL];
    tile whole = *t;
    whole.y = all;
    whole.y_row = PANEL;
    for (int64_t r = 0; r < rows && t->more; r++)
        memcpy(all + r * PANEL, t->y + r * t->y_row, (size_t)width * 4);
    MULTIPLY[of](&whole, rows);
    for (int64_t r = 0; r < rows; r++)
        memcpy(t->y + r * t->y_row, all + r * PANEL, (size_t)width * 4);
}

static void widen_all(const void *from, float *to, int64_t n, kind of) {
    for (int64_t i = 0; i < n; i += WIDTH)
        store(to + i, of == FLOAT32 ? widen(from, i, FLOAT32)
                      : of == BFLOAT16 ? widen(from, i, BFLOAT16)
                      : of == FLOAT16 ? widen(from, i, FLOAT16) : widen(from, i, INT8));
}

/* Adds the products of inputs [at, at + n) to the outputs of one panel, from output j on, for all
   rows. If several tiles use a block of narrow weights, it is widened once. */
static void multiply_block(const linear *l, const float *x, float *y, int64_t rows, int64_t j,
                           int64_t at, int64_t n) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS, size = SIZE[l->kind] * PANEL;
    const char *block = l->panels + (j / PANEL * l->inputs + at) * size;
    const int narrow = tiles > 1 && l->kind != FLOAT32;
    float wide[BLOCK * PANEL];
    tile t = {.w = narrow ? (const void *)wide : block, .x_row = l->inputs, .y_row = l->outputs,
              .w_row = PANEL, .n = n, .more = at > 0, .ahead = block + l->inputs * size};
    if (tiles > 1 || l->kind == INT8) t.lines = (GROUP * size / LINE + tiles - 1) / tiles;
    else if (l->kind == FLOAT32) fetch_pages(block, n * size);
    if (narrow) widen_all(block, wide, n * PANEL, (kind)l->kind);
    for (int64_t i = 0, r = 0; i < tiles; i++) {
        const int64_t own = rows / tiles + (i < rows % tiles);
        t.x = x + r * l->inputs + at;
        t.y = y + r * l->outputs + j;
        multiply_rows(&t, own, l->outputs - j, narrow ? FLOAT32 : (kind)l->kind);
        t.ahead += t.lines * LINE * (n / GROUP);
        r += own;
    }
}

/* e^x to 2 units in the last place, as good as 0 below -87; NaN stays NaN. The compiler turns it
   into vectors. */
static inline float exponential(float x) {
    float z = x < -87.0f ? -87.0f : x;
    z = z > 88.0f ? 88.0f : z;
    const float k = rintf(z * 1.44269504f);
    const float r = (z - k * 0.693359375f) + k * 2.12194440e-4f; /* ln 2 in two parts */
    float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r
                + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)k + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* erf to 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26 */
static inline float error_function(float x) {
    const float z = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * z);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t
                     + 0.254829592f) * t;
    return copysignf(1.0f - p * exponential(-z * z), x);
}

static void activate(float *y, int64_t n, int64_t activation) {
    if (activation == GELU_TANH)
        for (int64_t i = 0; i < n; i++) { /* x/2 (1 + tanh u) = x (1 - 1 / (e^2u + 1)) */
            const float u = 0.7978845608f * (y[i] + 0.044715f * y[i] * y[i] * y[i]);
            y[i] = y[i] - y[i] / (exponential(2.0f * u) + 1.0f);
        }
    else if (activation == RELU)
        for (int64_t i = 0; i < n; i++) y[i] = y[i] < 0 ? 0 : y[i];
    else if (activation == SILU)
        for (int64_t i = 0; i < n; i++) y[i] = y[i] / (1.0f + exponential(-y[i]));
    else if (activation == GELU)
        for (int64_t i = 0; i < n; i++)
            y[i] = 0.5f * y[i] * (1.0f + error_function(y[i] * 0.7071067812f));
}

static void finish(const linear *l, float *y, int64_t rows, int64_t j) {
    const int64_t n = l->outputs - j < PANEL ? l->outputs - j : PANEL;
    for (float *z = y + j; rows--; z += l->outputs) {
        for (int64_t i = 0; l->factor && i < n; i++) z[i] *= l->factor[j + i];
        for (int64_t i = 0; l->bias && i < n; i++) z[i] += l->bias[j + i];
        activate(z, n, l->activation);
    }
}

/* y [rows, outputs] = activation(x [rows, inputs] W^T + bias). A block of inputs of x stays in the
   cache while all outputs pass. work: rows x nanotp_digits(inputs) bytes */
void nanotp_product(const linear *l, const float *x, float *y, int64_t rows, char *work) {
    const int64_t inputs = l->inputs, outputs = l->outputs, most = rows > ROWS ? BLOCK : inputs;
    if (DEPTH > 1 && l->kind == INT8) {
        for (int64_t r = 0; r < rows; r++)
            to_digits(x + r * inputs, inputs, (digits *)(work + r * nanotp_digits(inputs)));
        for (int64_t j = 0; j < outputs; j += PANEL) {
            multiply_ints(l, work, y, rows, j);
            finish(l, y, rows, j);
        }
        return;
    }
    for (int64_t at = 0; at < inputs; at += most)
        for (int64_t j = 0; j < outputs; j += PANEL) {
            multiply_block(l, x, y, rows, j, at, inputs - at < most ? inputs - at : most);
            if (inputs - at <= most) finish(l, y, rows, j);
        }
}

int64_t nanotp_panel(void) { return PANEL; }
int64_t nanotp_depth(void) { return DEPTH; }

/* weight [outputs, inputs] of numbers of `size` bytes -> panels, zero where there is no output. By
   cache lines of the inputs, as each output's are far apart. DEPTH int8 are one number. */
#define PACK(type)                                                                                 \
    for (int64_t at = 0; at < inputs; at += line)                                                  \
        for (int64_t k = at; k < inputs && k < at + line; k++)                                     \
            for (int64_t p = 0; p < n; p++)                                                        \
                ((type *)panels)[k * PANEL + p] = ((const type *)weight)[(j + p) * inputs + k];
void nanotp_pack(const char *weight, char *panels, int64_t outputs, int64_t inputs, int64_t size) {
    const int64_t line = LINE / size, bytes = inputs * PANEL * size;
    for (int64_t j = 0; j < outputs; j += PANEL, panels += bytes) {
        const int64_t n = outputs - j < PANEL ? outputs - j : PANEL;
        if (n < PANEL) memset(panels, 0, (size_t)bytes);
        if (size == 4) { PACK(uint32_t) }
        else if (size == 2) { PACK(uint16_t) }
        else { PACK(uint8_t) }
    }
}

/* rows [n, inputs] = row ids[i] - lo of the matrix; zeros if it has no such row */
void nanotp_rows(const linear *l, const int64_t *ids, int64_t n, int64_t lo, float *rows) {
    const int64_t size = SIZE[l->kind], inputs = l->inputs, depth = l->kind == INT8 ? DEPTH : 1;
    for (int64_t i = 0; i < n; i++, rows += inputs) {
        const int64_t j = ids[i] - lo;
        const char *from = l->panels + (j / PANEL * padded(inputs, l->kind) * PANEL) * size;
        memset(rows, 0, (size_t)inputs * 4);
        for (int64_t k = 0; k < inputs && 0 <= j && j < l->outputs; k += WIDTH) {
            const int64_t m = inputs - k < WIDTH ? inputs - k : WIDTH;
            char narrow[4 * WIDTH] = {0};
            float wide[WIDTH];
            for (int64_t e = 0, at; e < m; e++) {
                at = ((k + e) / depth * PANEL + j % PANEL) * depth + (k + e) % depth;
                memcpy(narrow + e * size, from + at * size, (size_t)size);
            }
            widen_all(narrow, wide, WIDTH, (kind)l->kind);
            memcpy(rows + k, wide, (size_t)m * 4);
        }
    }
}
