/* Products of int8 weights in integers, on processors that add DEPTH products of bytes at once. For
   that an input becomes three digits of 8 bits. A sum of integers is exact in any order.

   Some instructions want unsigned weights: OFFSET is added to them, and its products are taken off
   again. */

typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
#if defined(__AVX512VNNI__)
enum { DEPTH = 4, OFFSET = 128 };
INLINE ints dot(ints sum, ints w, ints x) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
enum { DEPTH = 4, OFFSET = 128 };
INLINE ints dot(ints sum, ints w, ints x) {
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
}
#elif defined(__ARM_FEATURE_DOTPROD)
enum { DEPTH = 4, OFFSET = 0 };
INLINE ints dot(ints sum, ints w, ints x) {
    return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
}
#else
enum { DEPTH = 1, OFFSET = 0 };
INLINE ints dot(ints sum, ints w, ints x) { return sum + w * x; } /* is not called */
#endif
enum { DIGITS = 3, DOT_ROWS = ROWS / DIGITS };

/* A row of x as integers of 24 bits times a scale: DIGITS digits of base 256, -128 to 127 each,
   [DIGITS, inputs], padded to DEPTH. */
typedef struct { float scale; int32_t sum[DIGITS]; int8_t digit[]; } digits;

INLINE int64_t padded(int64_t inputs, int64_t kind) {
    return kind == INT8 ? (inputs + DEPTH - 1) / DEPTH * DEPTH : inputs;
}

/* The bytes of a row's digits */
int64_t nanotp_digits(int64_t inputs) {
    return DEPTH > 1 ? (int64_t)sizeof(digits) + DIGITS * padded(inputs, INT8) : 0;
}

/* An infinite or NaN input makes the scale so. */
static void to_digits(const float *x, int64_t n, digits *to) {
    const int64_t all = padded(n, INT8);
    const float top = 127 * 65536 + 127 * 256 + 127;
    uint32_t most = 0;
    int32_t sum[DIGITS] = {0};
    int8_t *const d = to->digit;
    for (int64_t k = 0; k < n; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    memcpy(&to->scale, &most, 4);
    const float inverse = top / to->scale;
    for (int64_t k = 0; k < n; k++) {
        float z = x[k] * inverse;
        z = z > -top ? z : -top;
        z = z < top ? z : top;
        const int32_t i = (int32_t)rintf(z), high = (i + 128) >> 8;
        d[k] = (int8_t)i;
        d[all + k] = (int8_t)high;
        d[2 * all + k] = (int8_t)((high + 128) >> 8);
        sum[0] += d[k];
        sum[1] += d[all + k];
        sum[2] += d[2 * all + k];
    }
    for (int64_t i = 0; i < DIGITS; i++) {
        memset(d + i * all + n, 0, (size_t)(all - n));
        to->sum[i] = sum[i];
    }
    to->scale /= top;
}

/* y [rows, PANEL] of a panel of int8 weights; sums of integers are exact in any order. */
INLINE void multiply_digits(const char *w, const char *x, float *y, int64_t y_row, int64_t n,
                            int rows) {
    const int64_t x_row = nanotp_digits(n), all = padded(n, INT8);
    const digits *from[DOT_ROWS];
    ints sum[DOT_ROWS][DIGITS][VECTORS], weights[VECTORS];
    for (int r = 0; r < rows; r++) {
        from[r] = (const digits *)(x + r * x_row);
        for (int d = 0; d < DIGITS; d++)
            for (int v = 0; v < VECTORS; v++) sum[r][d][v] = (ints){0} - OFFSET * from[r]->sum[d];
    }
    for (int64_t k = 0; k < all; k += DEPTH, w += DEPTH * PANEL) {
        for (int v = 0; v < VECTORS; v++) {
            memcpy(&weights[v], w + v * 4 * WIDTH, 4 * WIDTH);
            weights[v] ^= (int32_t)(OFFSET * 0x01010101U);
        }
        for (int r = 0; r < rows; r++)
            for (int d = 0; d < DIGITS; d++) {
                int32_t four;
                memcpy(&four, from[r]->digit + d * all + k, 4);
                for (int v = 0; v < VECTORS; v++)
                    sum[r][d][v] = dot(sum[r][d][v], weights[v], (ints){0} + four);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            chunk total = __builtin_convertvector(sum[r][2][v], chunk) * 65536.0f;
            total += __builtin_convertvector(sum[r][1][v], chunk) * 256.0f;
            total += __builtin_convertvector(sum[r][0][v], chunk);
            store(y + r * y_row + v * WIDTH, total * from[r]->scale);
        }
}

static void multiply_ints(const linear *l, const char *x, float *y, int64_t rows, int64_t j) {
    const int64_t n = l->inputs, x_row = nanotp_digits(n), width = l->outputs - j;
    const char *w = l->panels + j * padded(n, INT8);
    if (rows <= DOT_ROWS) fetch_pages(w, padded(n, INT8) * PANEL);
    for (int64_t r = 0, own; r < rows; r += own, x += own * x_row) {
        float part[DOT_ROWS * PANEL], *const to = y + r * l->outputs + j;
        own = rows - r < DOT_ROWS ? 1 : DOT_ROWS;
        const int64_t y_row = width < PANEL ? PANEL : l->outputs;
        if (own == 1) multiply_digits(w, x, width < PANEL ? part : to, y_row, n, 1);
        else multiply_digits(w, x, width < PANEL ? part : to, y_row, n, DOT_ROWS);
        for (int64_t i = 0; i < own && width < PANEL; i++)
            memcpy(to + i * l->outputs, part + i * PANEL, (size_t)width * 4);
    }
}
