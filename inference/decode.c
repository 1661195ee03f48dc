/* The decode step of a few tokens on one core: what a rank computes between two collectives. At
   batch 1 its time is that of reading the rank's weights once; these loops read as fast as the core
   can load. A matrix library, called from Python for each small operation, takes half more.

   The residual stream x [rows, C] has a row for each token, T of them for each row of the cache. A
   sub-block begins with x += arrived + bias, where `arrived` is the ranks' sum of the output of the
   last one. Where ranks do not synchronise, arrived is NULL and the sub-block reads `here`: x, and
   this rank's own outputs and the biases since the last sync point.

   All is float32; weights may be int8 with a factor for each output: weight = factor x number.
   C is the width of the stream, h this rank's heads, D their width, m its columns of the MLP, v its
   rows of the vocabulary. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { GELU, GELU_TANH, RELU, SILU }; /* as model.ACTIVATIONS has them */

typedef struct {
    const void *weight; /* [outputs, inputs] */
    const float *factor, *bias; /* [outputs]; no factor: float32 weights. Both may be NULL */
    int64_t outputs, inputs;
} linear;

typedef struct { const float *weight, *bias; } norm; /* [C]; bias may be NULL */

typedef struct {
    norm ln_1; linear c_attn, c_proj; norm ln_2; linear c_fc, c_proj_mlp;
    float scale; /* of queries times keys */
} block;

typedef struct {
    int64_t C, h, D, rows, T, size, activation; /* size: tokens that fit a row of the cache */
    float *x, *here, *partial; /* [rows, C]; partial: the sum of own outputs since a sync point */
    float *work;               /* the larger of rows x (C + 4hD) + size and rows x (C + m) */
    const int64_t *lengths;    /* [rows] tokens in the cache before this one */
    float epsilon;             /* of every LayerNorm */
} state;

/* --- products: the order of a sum's additions is fixed here and does not depend on the number of
   rows. So a token's numbers are the same to the bit, whichever tokens are read beside it. ---- */

enum { LANES = 32 }; /* partial sums of a product, so that no addition waits for the one before */

/* WIDTH: floats in a register. OUTPUTS, ROWS: rows of weights and of x in a tile, so that the sums
   fill the registers and each number loaded is used several times. */
#if defined(__AVX512F__)
enum { WIDTH = 16, OUTPUTS = 4, ROWS = 3 };
#elif defined(__AVX2__)
enum { WIDTH = 8, OUTPUTS = 1, ROWS = 3 };
#else
enum { WIDTH = 4, OUTPUTS = 1, ROWS = 3 };
#endif
enum { CHUNKS = LANES / WIDTH, QUADS = WIDTH / 4 };

typedef float chunk __attribute__((vector_size(4 * WIDTH)));
typedef float quad __attribute__((vector_size(16)));
typedef int8_t narrow __attribute__((vector_size(WIDTH)));

INLINE chunk load_float(const float *from) {
    chunk c;
    memcpy(&c, from, sizeof c);
    return c;
}

INLINE chunk load_int8(const int8_t *from) {
#if defined(__AVX512F__)
    return (chunk)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (chunk)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    narrow c;
    memcpy(&c, from, sizeof c);
    return __builtin_convertvector(c, chunk);
#endif
}

static inline float total(chunk *c) {
    for (int n = CHUNKS / 2; n; n /= 2)
        for (int i = 0; i < n; i++) c[i] += c[i + n];
    quad q[QUADS];
    memcpy(q, c, sizeof q);
    for (int n = QUADS / 2; n; n /= 2)
        for (int i = 0; i < n; i++) q[i] += q[i + n];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

/* The processor prefetches by itself, but not beyond the end of a page. Touching the page 12 pages
   ahead, once for each page, makes reading one row after the other a third to half faster. */
static inline void prefetch_pages(const void *row, int64_t bytes) {
    const uintptr_t begin = (uintptr_t)row, end = begin + (uintptr_t)bytes;
    for (uintptr_t page = (begin + 4095) & ~(uintptr_t)4095; page < end; page += 4096)
        __builtin_prefetch((const char *)page + 12 * 4096);
}

/* TILE makes these three functions for one type of weights.
   tile: y[r * stride + j] = (row j of w) . (row r of x), for `outputs` rows of w and `rows` rows of
   x, of n numbers each. Both counts are constants at each call, so that the sums stay in registers.
   The processor prefetches several rows of w badly: the next ones are fetched here.
   tiles: the same for any number of rows of x. products: y [rows, outputs] = x [rows, n] W^T. One
   row of x takes the rows of W in the order in which they lie in memory.
   A macro, as an inline function of a constant flag is a fifth slower for three rows (gcc 12). */
#define TILE(kind, type)                                                                           \
    INLINE void tile_##kind(const type *restrict w, const float *restrict x, int64_t n,            \
                            float *restrict y, int64_t stride, int outputs, int rows) {            \
        chunk acc[OUTPUTS][ROWS][CHUNKS], here[ROWS];                                              \
        for (int j = 0; j < outputs; j++)                                                          \
            for (int r = 0; r < rows; r++)                                                         \
                for (int i = 0; i < CHUNKS; i++) acc[j][r][i] = (chunk){0};                        \
        for (int64_t k = 0; k + LANES <= n; k += LANES)                                            \
            for (int i = 0; i < CHUNKS; i++) {                                                     \
                const int64_t at = k + i * WIDTH;                                                  \
                for (int r = 0; r < rows; r++) here[r] = load_float(x + r * n + at);               \
                for (int j = 0; j < outputs; j++) {                                                \
                    const chunk weight = load_##kind(w + j * n + at);                              \
                    if (outputs > 1) __builtin_prefetch(w + (outputs + j) * n + at, 0, 2);         \
                    for (int r = 0; r < rows; r++) acc[j][r][i] += weight * here[r];               \
                }                                                                                  \
            }                                                                                      \
        const int64_t rest = n % LANES;                                                            \
        for (int j = 0; j < outputs; j++)                                                          \
            for (int r = 0; r < rows; r++) {                                                       \
                if (rest) {                                                                        \
                    type last_w[LANES] = {0};                                                      \
                    float last_x[LANES] = {0};                                                     \
                    memcpy(last_w, w + (j + 1) * n - rest, (size_t)rest * sizeof *w);              \
                    memcpy(last_x, x + (r + 1) * n - rest, (size_t)rest * sizeof *x);              \
                    for (int i = 0, k = 0; i < CHUNKS; i++, k += WIDTH)                            \
                        acc[j][r][i] += load_##kind(last_w + k) * load_float(last_x + k);          \
                }                                                                                  \
                y[r * stride + j] = total(acc[j][r]);                                              \
            }                                                                                      \
    }                                                                                              \
    INLINE void tiles_##kind(const type *w, const float *x, int64_t n, float *y, int64_t stride,   \
                             int outputs, int64_t rows) {                                          \
        for (; rows >= ROWS; rows -= ROWS, x += ROWS * n, y += ROWS * stride)                      \
            tile_##kind(w, x, n, y, stride, outputs, ROWS);                                        \
        if (rows == 2) tile_##kind(w, x, n, y, stride, outputs, 2);                                \
        if (rows == 1) tile_##kind(w, x, n, y, stride, outputs, 1);                                \
    }                                                                                              \
    static void products_##kind(const type *w, const float *x, int64_t n, float *y,                \
                                int64_t outputs, int64_t rows) {                                   \
        int64_t j = 0;                                                                             \
        for (; OUTPUTS > 1 && rows > 1 && j + OUTPUTS <= outputs; j += OUTPUTS)                    \
            tiles_##kind(w + j * n, x, n, y + j, outputs, OUTPUTS, rows);                          \
        for (; j < outputs; j++) {                                                                 \
            prefetch_pages(w + j * n, n * (int64_t)sizeof *w);                                     \
            tiles_##kind(w + j * n, x, n, y + j, outputs, 1, rows);                                \
        }                                                                                          \
    }

TILE(float, float)
TILE(int8, int8_t)

static float dot(const float *a, const float *b, int64_t n) {
    float y;
    tile_float(a, b, n, &y, 1, 1, 1);
    return y;
}

static float sum_of(const float *x, int64_t n) {
    chunk acc[CHUNKS];
    for (int i = 0; i < CHUNKS; i++) acc[i] = (chunk){0};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        for (int i = 0; i < CHUNKS; i++) acc[i] += load_float(x + k + i * WIDTH);
    float sum = total(acc);
    for (; k < n; k++) sum += x[k];
    return sum;
}

/* y [rows, outputs] = x [rows, inputs] W^T + bias */
static void apply(const linear *l, const float *x, float *y, int64_t rows) {
    const int64_t n = l->inputs, m = l->outputs;
    if (l->factor) products_int8(l->weight, x, n, y, m, rows);
    else products_float(l->weight, x, n, y, m, rows);
    if (!l->factor && !l->bias) return;
    for (int64_t r = 0; r < rows; r++, y += m)
        for (int64_t j = 0; j < m; j++)
            y[j] = (l->factor ? l->factor[j] : 1) * y[j] + (l->bias ? l->bias[j] : 0);
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
    else
        for (int64_t i = 0; i < n; i++)
            y[i] = 0.5f * y[i] * (1.0f + error_function(y[i] * 0.7071067812f));
}

/* Adds the sum that arrived to the stream, and returns the stream that the sub-block reads. */
static const float *arrive(const state *s, const float *arrived, const float *bias) {
    if (!arrived) return s->here;
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t c = 0; c < s->C; c++)
            s->x[r * s->C + c] += arrived[r * s->C + c] + (bias ? bias[c] : 0);
    return s->x;
}

static void normalize(const state *s, const float *stream, const norm *n, float *y) {
    const int64_t C = s->C;
    for (int64_t r = 0; r < s->rows; r++) {
        const float *x = stream + r * C;
        float *z = y + r * C;
        const float mean = sum_of(x, C) / (float)C;
        for (int64_t c = 0; c < C; c++) z[c] = x[c] - mean;
        const float scale = 1.0f / sqrtf(dot(z, z, C) / (float)C + s->epsilon);
        for (int64_t c = 0; c < C; c++)
            z[c] = z[c] * scale * n->weight[c] + (n->bias ? n->bias[c] : 0);
    }
}

/* one head: its query q [D] over its first n keys and values [n, D] -> y [D] */
static void attend(const float *q, const float *k, const float *v, int64_t n, int64_t D,
                   float scale, float *score, float *y) {
    float most = -INFINITY;
    for (int64_t t = 0; t < n; t++) {
        score[t] = scale * dot(q, k + t * D, D);
        most = score[t] > most ? score[t] : most;
    }
    for (int64_t t = 0; t < n; t++) score[t] = exponential(score[t] - most);
    const float share = 1.0f / sum_of(score, n);
    for (int64_t d = 0; d < D; d++) y[d] = 0;
    for (int64_t t = 0; t < n; t++)
        for (int64_t d = 0; d < D; d++) y[d] += score[t] * share * v[t * D + d];
}

/* --- what native_decoder.py calls ----------------------------------------------------------- */

/* ids [rows] -> out [rows, C]: the table's rows [lo, hi) that this rank holds, zeros for other ids.
   x becomes the positions' rows. */
void nanotp_embed(const state *s, const float *table, int64_t lo, int64_t hi, const float *wpe,
                  const int64_t *ids, float *out) {
    const size_t row = (size_t)s->C * 4;
    for (int64_t r = 0; r < s->rows; r++) {
        if (lo <= ids[r] && ids[r] < hi) memcpy(out + r * s->C, table + (ids[r] - lo) * s->C, row);
        else memset(out + r * s->C, 0, row);
        memcpy(s->x + r * s->C, wpe + s->lengths[r] * s->C, row);
    }
}

/* kv: this layer's cache [rows / T, 2h, size, D], keys, then values. out [rows, C]: this rank's
   part of the sum, without c_proj's bias. So it is for the MLP. */
void nanotp_attention(const state *s, const block *b, const float *arrived, const float *bias,
                      float *kv, float *out) {
    const int64_t h = s->h, D = s->D, width = h * D, head = s->size * D;
    float *normed = s->work, *qkv = normed + s->rows * s->C;
    float *y = qkv + s->rows * 3 * width, *score = y + s->rows * width;
    normalize(s, arrive(s, arrived, bias), &b->ln_1, normed);
    apply(&b->c_attn, normed, qkv, s->rows);
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t i = 0; i < h; i++) {
            const float *q = qkv + r * 3 * width + i * D;
            float *keys = kv + (r / s->T * 2 * h + i) * head, *values = keys + h * head;
            memcpy(keys + s->lengths[r] * D, q + width, (size_t)D * 4);
            memcpy(values + s->lengths[r] * D, q + 2 * width, (size_t)D * 4);
            attend(q, keys, values, s->lengths[r] + 1, D, b->scale, score,
                   y + r * width + i * D);
        }
    apply(&b->c_proj, y, out, s->rows);
}

void nanotp_mlp(const state *s, const block *b, const float *arrived, const float *bias,
                float *out) {
    float *normed = s->work, *hidden = normed + s->rows * s->C;
    normalize(s, arrive(s, arrived, bias), &b->ln_2, normed);
    apply(&b->c_fc, normed, hidden, s->rows);
    activate(hidden, s->rows * b->c_fc.outputs, s->activation);
    apply(&b->c_proj_mlp, hidden, out, s->rows);
}

/* Under a delay: what arrived joins x, and the next sub-block reads x with this rank's n outputs
   whose sums are under way. */
void nanotp_join(const state *s, const float *arrived, const float *bias,
                 const float *const *own, int64_t n) {
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t c = 0; c < s->C; c++) {
            const int64_t i = r * s->C + c;
            s->x[i] += (arrived ? arrived[i] : 0) + (bias ? bias[c] : 0);
            s->here[i] = s->x[i];
            for (int64_t k = 0; k < n; k++) s->here[i] += own[k][i];
        }
}

/* After a sub-block without a sync point, the first since the last one or not: out stays here. */
void nanotp_keep(const state *s, const float *out, const float *bias, int64_t first) {
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t c = 0; c < s->C; c++) {
            const int64_t i = r * s->C + c;
            s->here[i] = (first ? s->x[i] : s->here[i]) + out[i] + (bias ? bias[c] : 0);
            s->partial[i] = first ? out[i] : s->partial[i] + out[i];
        }
}

/* Before a sync point: add the outputs that this rank kept to the last sub-block's out. */
void nanotp_add_kept(const state *s, float *out) {
    for (int64_t i = 0; i < s->rows * s->C; i++) out[i] += s->partial[i];
}

/* logits [rows, v]: this rank's columns */
void nanotp_head(const state *s, const norm *ln_f, const linear *table, const float *arrived,
                 const float *bias, float *logits) {
    normalize(s, arrive(s, arrived, bias), ln_f, s->work);
    apply(table, s->work, logits, s->rows);
}
