/* A forward pass on one core: what a rank computes between two collectives, for any number of
   tokens of any number of texts. At batch 1 its time is that of reading the rank's weights once.
   A matrix library, called from Python for each small operation, takes half more.

   The residual stream x [rows, C] has a row for each token that the pass reads: the `position`-th
   of the text in a `slot` of the cache. A text's tokens are consecutive rows. A sub-block begins
   with x += arrived + bias, where `arrived` is the ranks' sum of the output of the last one. Where
   ranks do not synchronise, arrived is NULL and the sub-block reads `here`: x, and this rank's own
   outputs and the biases since the last sync point.

   All is float32 but the weights (product.c). C is the width of the stream, h this rank's heads, D
   their width, m its columns of the MLP, v its rows of the vocabulary. A slot of a layer's cache
   has the heads' values [h, size, D], then their keys in panels as weights have them
   [h, panels, D, PANEL]: both are operands of products as they are. */

#include "product.c"

typedef struct { const float *weight, *bias; } norm; /* [C]; bias may be NULL */

typedef struct {
    norm ln_1; linear c_attn, c_proj; norm ln_2; linear c_fc, c_proj_mlp;
    float scale; /* of queries times keys */
} block;

typedef struct {
    int64_t C, h, D, rows, size; /* size: tokens that fit a slot */
    float *x, *here, *partial;   /* [rows, C]; partial: the sum of own outputs since a sync point */
    float *work;                 /* see nanotp_work */
    char *digits;                /* as wide as the products have inputs */
    const int64_t *positions, *slots; /* [rows] */
    float epsilon;                    /* of every LayerNorm */
} state;

/* Sums of one row are made in LANES partial sums, the same ones on every processor. */
enum { LANES = 32 };

static float sum_of_products(const float *a, const float *b, int64_t n) {
    float lane[LANES] = {0};
    for (int64_t k = 0; k + LANES <= n; k += LANES)
        for (int64_t i = 0; i < LANES; i++) lane[i] += a[k + i] * (b ? b[k + i] : 1);
    for (int64_t i = 0, k = n - n % LANES; k + i < n; i++) lane[i] += a[k + i] * (b ? b[k + i] : 1);
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

/* Adds the sum that arrived to the stream, and returns the stream that the sub-block reads. */
static const float *arrive(const state *s, const float *arrived, const float *bias) {
    if (!arrived) return s->here;
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t c = 0; c < s->C; c++)
            s->x[r * s->C + c] += arrived[r * s->C + c] + (bias ? bias[c] : 0);
    return s->x;
}

static void normalize(const float *x, int64_t C, float epsilon, const norm *n, float *y) {
    const float mean = sum_of_products(x, NULL, C) / (float)C;
    for (int64_t c = 0; c < C; c++) y[c] = x[c] - mean;
    const float scale = 1.0f / sqrtf(sum_of_products(y, y, C) / (float)C + epsilon);
    for (int64_t c = 0; c < C; c++) y[c] = y[c] * scale * n->weight[c] + (n->bias ? n->bias[c] : 0);
}

static void normalize_all(const state *s, const float *stream, const norm *n, float *y) {
    for (int64_t r = 0; r < s->rows; r++)
        normalize(stream + r * s->C, s->C, s->epsilon, n, y + r * s->C);
}

static int64_t to_panels(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

/* The floats of a slot of a layer's cache */
int64_t nanotp_slot(int64_t h, int64_t D, int64_t size) { return h * D * (size + to_panels(size)); }

/* The floats of a pass's work. width: of this rank's heads, hD */
int64_t nanotp_work(int64_t C, int64_t width, int64_t m, int64_t rows, int64_t size) {
    const int64_t attention = rows * (C + 4 * width) + ROWS * to_panels(size);
    return attention > rows * (C + m) ? attention : rows * (C + m);
}

/* Puts the keys and values of the pass into a layer's cache. qkv: [rows, 3, h, D] */
static void keep(const state *s, const float *qkv, float *cache) {
    const int64_t h = s->h, D = s->D, all = to_panels(s->size);
    for (int64_t r = 0; r < s->rows; r++, qkv += 3 * h * D) {
        const int64_t t = s->positions[r];
        float *values = cache + s->slots[r] * nanotp_slot(h, D, s->size);
        float *keys = values + h * s->size * D + t / PANEL * PANEL * D + t % PANEL;
        for (int64_t i = 0; i < h; i++) {
            memcpy(values + (i * s->size + t) * D, qkv + (2 * h + i) * D, (size_t)D * 4);
            for (int64_t d = 0; d < D; d++) keys[i * all * D + d * PANEL] = qkv[(h + i) * D + d];
        }
    }
}

/* One head, at most ROWS consecutive tokens of a text, the first of which follows n others:
   queries [rows, D] -> y [rows, D]; a row of q is q_row numbers after the one before. */
static void attend(const state *s, const float *q, int64_t q_row, const float *keys,
                   const float *values, int64_t n, int64_t rows, float scale, float *score,
                   float *y) {
    const int64_t all = n + rows, width = to_panels(all), D = s->D;
    tile t = {.x = q, .x_row = q_row, .w_row = PANEL, .n = D, .y_row = width};
    for (int64_t j = 0; j < all; j += PANEL) {
        t.w = keys + j * D;
        t.y = score + j;
        multiply_rows(&t, rows, PANEL, FLOAT32);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *const p = score + r * width, most = -INFINITY;
        const int64_t seen = n + r + 1;
        for (int64_t j = 0; j < seen; j++) most = p[j] > most ? p[j] : most;
        for (int64_t j = 0; j < seen; j++) p[j] = exponential(scale * (p[j] - most));
        const float share = 1.0f / sum_of_products(p, NULL, seen);
        for (int64_t j = 0; j < all; j++) p[j] = j < seen ? p[j] * share : 0;
    }
    t = (tile){.x = score, .x_row = width, .w_row = D, .n = all, .y_row = s->h * D};
    for (int64_t d = 0; d < D; d += PANEL) {
        t.w = values + d;
        t.y = y + d;
        multiply_rows(&t, rows, D - d, FLOAT32);
    }
}

/* --- what native_decoder.py calls ----------------------------------------------------------- */

/* x becomes the positions' rows of wpe [, C]. */
void nanotp_begin(const state *s, const float *wpe) {
    for (int64_t r = 0; r < s->rows; r++)
        memcpy(s->x + r * s->C, wpe + s->positions[r] * s->C, (size_t)s->C * 4);
}

/* cache: this layer's. out [rows, C]: this rank's part of the sum, without c_proj's bias. So it is
   for the MLP. */
void nanotp_attention(const state *s, const block *b, const float *arrived, const float *bias,
                      float *cache, float *out) {
    const int64_t h = s->h, D = s->D, width = h * D;
    float *normed = s->work, *qkv = normed + s->rows * s->C;
    float *y = qkv + s->rows * 3 * width, *score = y + s->rows * width;
    normalize_all(s, arrive(s, arrived, bias), &b->ln_1, normed);
    nanotp_product(&b->c_attn, normed, qkv, s->rows, s->digits);
    keep(s, qkv, cache);
    for (int64_t r = 0, n; r < s->rows; r += n) {
        const float *values = cache + s->slots[r] * nanotp_slot(h, D, s->size);
        const float *keys = values + h * s->size * D;
        for (n = 1; n < ROWS && r + n < s->rows && s->slots[r + n] == s->slots[r];) n++;
        for (int64_t i = 0; i < h; i++)
            attend(s, qkv + r * 3 * width + i * D, 3 * width, keys + i * to_panels(s->size) * D,
                   values + i * s->size * D, s->positions[r], n, b->scale, score,
                   y + r * width + i * D);
    }
    nanotp_product(&b->c_proj, y, out, s->rows, s->digits);
}

void nanotp_mlp(const state *s, const block *b, const float *arrived, const float *bias,
                float *out) {
    float *normed = s->work, *hidden = normed + s->rows * s->C;
    normalize_all(s, arrive(s, arrived, bias), &b->ln_2, normed);
    nanotp_product(&b->c_fc, normed, hidden, s->rows, s->digits);
    nanotp_product(&b->c_proj_mlp, hidden, out, s->rows, s->digits);
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

/* logits [n, v]: this rank's columns after the rows of the pass that `wanted` names */
void nanotp_head(const state *s, const norm *ln_f, const linear *table, const float *arrived,
                 const float *bias, const int64_t *wanted, int64_t n, float *logits) {
    const float *x = arrive(s, arrived, bias);
    for (int64_t i = 0; i < n; i++)
        normalize(x + wanted[i] * s->C, s->C, s->epsilon, ln_f, s->work + i * s->C);
    nanotp_product(table, s->work, logits, n, s->digits);
}
