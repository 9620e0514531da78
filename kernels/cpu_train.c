/* Training of a GPT-2 on a CPU: whole sequences, thoughts included, forward and backward.

In PyTorch, a step of a small model is thousands of operations on small tensors, and most take longer
to start than to compute. Here a thread takes GROUP sequences through the whole pass without waiting
for other threads: all prefixes of the group at once, then thought by thought, then all suffixes at
once. PyTorch then computes the gradients of the weights from the saved tensors, one product each.

Shapes: N rows are the positions of all sequences, one sequence after another, without padding. C is
n_embd, a multiple of COLS, and NH heads have HS dimensions each. cpu_train.py compiles this file for
one C and NH, because constant sizes make attention twice as fast. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* GROUP: maximum number of sequences per thread and of rows per product; COLS: columns per product;
HS: head size */
enum { GROUP = 8, COLS = 32, HS = C / NH };

typedef struct {
    const float *w, *b;  /* (C) each */
} LayerNorm;

typedef struct {
    const float *w, *w_t, *b;  /* (out, in) and its transpose, both in panels (see mul), and (out) */
} Linear;

typedef struct {  /* what a LayerNorm saves: out = normed * w + b, normed = (x - mean) * scale */
    float *out, *normed, *scale;  /* (N, C), (N, C), (N) */
} Norm;

typedef struct {
    LayerNorm ln_1;
    Linear c_attn, attn_proj;
    LayerNorm ln_2;
    Linear c_fc, mlp_proj;
    /* saved by forward: (N, 3C), log of the sum of exponentials (N, NH), (N, C), (N, 4C), (N, 4C) */
    Norm norm_1, norm_2;
    float *qkv, *lse, *y, *h, *gelu_grad;
    /* gradients of the outputs of the six layers, (N, .); d_qkv is zero before backward */
    float *d_norm_1, *d_qkv, *d_attn, *d_norm_2, *d_fc, *d_mlp;
} Block;

typedef struct {
    int64_t n_layer, B, n_threads;
    const int64_t *first, *n_prefix, *n_thoughts;  /* first row of each sequence (B + 1), (B), (B) */
    const int64_t *start;  /* (N) first row of the row's sequence */
    int64_t *rows;         /* (N) workspace: the rows that a group computes together */
    const Block *blocks;
    LayerNorm ln_f;
    Linear smear;   /* without bias; without weights if the model has none */
    float *emb;     /* (N, C) input embeddings; forward writes those of thoughts */
    float *prev;    /* (N, C) the embedding one row before, for the smear */
    const float *pos;  /* (N, C) position embeddings */
    float *x;          /* (N, C) workspace: the residual stream, and in backward its gradient */
    Norm norm_f;       /* norm_f.out are the hidden states */
    float *d_hidden, *d_emb;  /* (N, C); backward adds to both */
    float *work;              /* (N, C) */
} Pass;

/* For n rows, a constant: columns [o, o + COLS) of y (N, out) = [y +] x (N, in) @ w [+ b]. */
static inline __attribute__((always_inline)) void mul_rows(
    const int n, float *y, const float *x, const int64_t *rows, const float *w, const float *b,
    int in, int out, int o, int add) {
    float sum[GROUP][COLS];  /* in registers */
    const float *xr[GROUP];
    for (int r = 0; r < n; r++) {
        xr[r] = x + rows[r] * in;
        for (int j = 0; j < COLS; j++)
            sum[r][j] = (b ? b[o + j] : 0) + (add ? y[rows[r] * out + o + j] : 0);
    }
    for (int i = 0; i < in; i++)
        for (int r = 0; r < n; r++)
            for (int j = 0; j < COLS; j++) sum[r][j] += xr[r][i] * w[i * COLS + j];
    for (int r = 0; r < n; r++) memcpy(y + rows[r] * out + o, sum[r], sizeof(sum[r]));
}

/* w is the matrix (in, out) in panels of COLS columns, so (out / COLS, in, COLS). */
static void mul(float *y, const float *x, const int64_t *rows, int n, const float *w,
                const float *b, int in, int out, int add) {
    for (int o = 0; o < out; o += COLS, w += in * COLS) {
        int r = 0;
        for (; n - r >= 8; r += 8) mul_rows(8, y, x, rows + r, w, b, in, out, o, add);
        if (n - r >= 4) mul_rows(4, y, x, rows + r, w, b, in, out, o, add), r += 4;
        if (n - r >= 2) mul_rows(2, y, x, rows + r, w, b, in, out, o, add), r += 2;
        if (n - r >= 1) mul_rows(1, y, x, rows + r, w, b, in, out, o, add);
    }
}

static inline float dot(const float *a, const float *b, int n) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* exp(x) with a relative error of 2e-7. Unlike expf, it is vectorized. The polynomial is Cephes'. */
static inline float exp_(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    const float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    /* 2 ** n; a NaN is no integer, and stays NaN in y */
    union { uint32_t bits; float x; } power = {((uint32_t)(int32_t)(n == n ? n : 0) + 127) << 23};
    return (y * r * r + r + 1) * power.x;
}

static void layer_norm(Norm to, const float *x, const int64_t *rows, int n, LayerNorm ln) {
    for (int r = 0; r < n; r++) {
        const int64_t at = rows[r] * C;
        float sum = 0, squares = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = 0; i < C; i++) sum += x[at + i];
        const float mean = sum / C;
        #pragma omp simd reduction(+ : squares)
        for (int i = 0; i < C; i++) squares += (x[at + i] - mean) * (x[at + i] - mean);
        const float scale = to.scale[rows[r]] = 1 / sqrtf(squares / C + 1e-5f);  /* torch's eps */
        #pragma omp simd
        for (int i = 0; i < C; i++) {
            to.normed[at + i] = (x[at + i] - mean) * scale;
            to.out[at + i] = to.normed[at + i] * ln.w[i] + ln.b[i];
        }
    }
}

/* Add the gradient of the input to dx. */
static void layer_norm_backward(float *dx, const float *d_out, Norm saved, const int64_t *rows,
                                int n, LayerNorm ln) {
    for (int r = 0; r < n; r++) {
        const float *d = d_out + rows[r] * C, *normed = saved.normed + rows[r] * C;
        float *to = dx + rows[r] * C, mean = 0, product = 0;
        #pragma omp simd reduction(+ : mean, product)
        for (int i = 0; i < C; i++) {
            mean += d[i] * ln.w[i] / C;
            product += d[i] * ln.w[i] * normed[i] / C;
        }
        const float scale = saved.scale[rows[r]];
        #pragma omp simd
        for (int i = 0; i < C; i++) to[i] += scale * (d[i] * ln.w[i] - mean - normed[i] * product);
    }
}

/* Attention of a row to itself and to the earlier rows of its sequence. */
static void attend(const Pass *g, const Block *l, int64_t row) {
    const int64_t start = g->start[row], n = row - start + 1;
    for (int h = 0; h < NH; h++) {
        const float *q = l->qkv + row * 3 * C + h * HS;
        const float *k = l->qkv + start * 3 * C + C + h * HS, *v = k + C;
        float p[n], y[HS] = {0}, max = -INFINITY, sum = 0;
        for (int s = 0; s < n; s++) p[s] = dot(q, k + s * 3 * C, HS) / sqrtf(HS);
        #pragma omp simd reduction(max : max)
        for (int s = 0; s < n; s++) max = p[s] > max ? p[s] : max;
        #pragma omp simd reduction(+ : sum)
        for (int s = 0; s < n; s++) sum += p[s] = exp_(p[s] - max);
        for (int s = 0; s < n; s++)
            for (int i = 0; i < HS; i++) y[i] += p[s] / sum * v[s * 3 * C + i];
        memcpy(l->y + row * C + h * HS, y, sizeof(y));
        l->lse[row * NH + h] = max + logf(sum);
    }
}

/* Add the gradients of the row's query, and of the keys and values that it attends to. */
static void attend_backward(const Pass *g, const Block *l, const float *d_y, int64_t row) {
    const int64_t start = g->start[row], n = row - start + 1;
    for (int h = 0; h < NH; h++) {
        const int64_t at = row * 3 * C + h * HS, keys = start * 3 * C + C + h * HS;
        const float *q = l->qkv + at, *k = l->qkv + keys, *v = k + C, *d = d_y + row * C + h * HS;
        const float mean = dot(d, l->y + row * C + h * HS, HS), lse = l->lse[row * NH + h];
        float *dk = l->d_qkv + keys, *dv = dk + C, p[n], dq[HS] = {0};
        for (int s = 0; s < n; s++) p[s] = dot(q, k + s * 3 * C, HS) / sqrtf(HS);
        #pragma omp simd
        for (int s = 0; s < n; s++) p[s] = exp_(p[s] - lse);
        for (int s = 0; s < n; s++) {
            const int64_t o = s * 3 * C;
            const float d_score = p[s] * (dot(d, v + o, HS) - mean) / sqrtf(HS);
            #pragma omp simd
            for (int i = 0; i < HS; i++) {
                dq[i] += d_score * k[o + i];
                dk[o + i] += d_score * q[i];
                dv[o + i] += p[s] * d[i];
            }
        }
        for (int i = 0; i < HS; i++) l->d_qkv[at + i] += dq[i];
    }
}

static void copy_rows(float *to, const float *from, const int64_t *rows, int n) {
    for (int r = 0; r < n; r++) memcpy(to + rows[r] * C, from + rows[r] * C, C * sizeof(float));
}

/* Run all layers for n rows. In the last layer, queries and all that follows are computed only for
the rows in `tail`. */
static void forward_rows(const Pass *g, const int64_t *rows, int n, const int64_t *tail,
                         int n_tail) {
    for (int r = 0; r < n; r++)
        for (int64_t i = rows[r] * C; i < (rows[r] + 1) * C; i++) {
            g->x[i] = g->emb[i] + g->pos[i];
            if (g->smear.w) g->prev[i] = rows[r] > g->start[rows[r]] ? g->emb[i - C] : 0;
        }
    if (g->smear.w) mul(g->x, g->prev, rows, n, g->smear.w_t, NULL, C, C, 1);
    for (int layer = 0; layer < g->n_layer; layer++) {
        const Block *l = g->blocks + layer;
        layer_norm(l->norm_1, g->x, rows, n, l->ln_1);
        mul(l->qkv, l->norm_1.out, rows, n, l->c_attn.w_t, l->c_attn.b, C, 3 * C, 0);
        if (layer == g->n_layer - 1) rows = tail, n = n_tail;
        for (int r = 0; r < n; r++) attend(g, l, rows[r]);
        mul(g->x, l->y, rows, n, l->attn_proj.w_t, l->attn_proj.b, C, C, 1);
        layer_norm(l->norm_2, g->x, rows, n, l->ln_2);
        mul(l->h, l->norm_2.out, rows, n, l->c_fc.w_t, l->c_fc.b, C, 4 * C, 0);
        for (int r = 0; r < n; r++) {
            float *h = l->h + rows[r] * 4 * C, *grad = l->gelu_grad + rows[r] * 4 * C;
            #pragma omp simd
            for (int i = 0; i < 4 * C; i++) {  /* GELU: u * (1 + tanh(z)) / 2 = u * sigmoid(2 * z) */
                const float u = h[i], a = 1.595769122f, b = 0.044715f;
                const float s = 1 / (1 + exp_(-a * (u + b * u * u * u)));
                h[i] = u * s;
                grad[i] = s + u * s * (1 - s) * a * (1 + 3 * b * u * u);
            }
        }
        mul(g->x, l->h, rows, n, l->mlp_proj.w_t, l->mlp_proj.b, 4 * C, C, 1);
    }
    layer_norm(g->norm_f, g->x, rows, n, g->ln_f);
}

/* Run backward for the rows in `all`, after the rows of later positions. In the last layer, only
`rows`, the tail, have gradients. */
static void backward_rows(const Pass *g, const int64_t *all, int n_all, const int64_t *rows,
                          int n) {
    for (int r = 0; r < n_all; r++) memset(g->x + all[r] * C, 0, C * sizeof(float));
    layer_norm_backward(g->x, g->d_hidden, g->norm_f, rows, n, g->ln_f);
    for (int layer = g->n_layer - 1; layer >= 0; layer--, rows = all, n = n_all) {
        const Block *l = g->blocks + layer;
        copy_rows(l->d_mlp, g->x, rows, n);
        mul(l->d_fc, l->d_mlp, rows, n, l->mlp_proj.w, NULL, C, 4 * C, 0);
        for (int r = 0; r < n; r++)
            for (int64_t i = rows[r] * 4 * C; i < (rows[r] + 1) * 4 * C; i++)
                l->d_fc[i] *= l->gelu_grad[i];
        mul(l->d_norm_2, l->d_fc, rows, n, l->c_fc.w, NULL, 4 * C, C, 0);
        layer_norm_backward(g->x, l->d_norm_2, l->norm_2, rows, n, l->ln_2);
        copy_rows(l->d_attn, g->x, rows, n);
        mul(g->work, l->d_attn, rows, n, l->attn_proj.w, NULL, C, C, 0);
        for (int r = 0; r < n; r++) attend_backward(g, l, g->work, rows[r]);
        mul(l->d_norm_1, l->d_qkv, all, n_all, l->c_attn.w, NULL, 3 * C, C, 0);
        layer_norm_backward(g->x, l->d_norm_1, l->norm_1, all, n_all, l->ln_1);
    }
    if (g->smear.w) mul(g->work, g->x, rows, n, g->smear.w, NULL, C, C, 0);
    for (int r = 0; r < n; r++)
        for (int64_t i = rows[r] * C; i < (rows[r] + 1) * C; i++) {
            g->d_emb[i] += g->x[i];
            if (g->smear.w && rows[r] > g->start[rows[r]]) g->d_emb[i - C] += g->work[i];
        }
}

enum part { PREFIX, LAST, THOUGHT, SUFFIX };

/* Write the row numbers of n sequences, starting with sequence b: of their prefixes, the last rows of
their prefixes, their i-th thoughts, or their suffixes. Return the number of rows. */
static int find_rows(int64_t *rows, const Pass *g, int b, int n, enum part part, int i) {
    int count = 0;
    for (int s = b; s < b + n; s++) {
        int64_t from = g->first[s], to = from + g->n_prefix[s];
        if (part == LAST) from = to - 1;
        if (part == THOUGHT) from = to + i, to += g->n_thoughts[s] > i ? i + 1 : i;
        if (part == SUFFIX) from = to + g->n_thoughts[s], to = g->first[s + 1];
        while (from < to) rows[count++] = from++;
    }
    return count;
}

static void forward_group(const Pass *g, int b, int size) {
    int64_t *rows = g->rows + g->first[b], last[GROUP];
    find_rows(last, g, b, size, LAST, 0);
    forward_rows(g, rows, find_rows(rows, g, b, size, PREFIX, 0), last, size);
    for (int i = 0, n; (n = find_rows(rows, g, b, size, THOUGHT, i)); i++) {
        for (int r = 0; r < n; r++)  /* feed the last hidden state back */
            memcpy(g->emb + rows[r] * C, g->norm_f.out + (rows[r] - 1) * C, C * sizeof(float));
        forward_rows(g, rows, n, rows, n);
    }
    const int n = find_rows(rows, g, b, size, SUFFIX, 0);
    forward_rows(g, rows, n, rows, n);
}

static void backward_group(const Pass *g, int b, int size) {
    int64_t *rows = g->rows + g->first[b], last[GROUP], i = 0;
    int n = find_rows(rows, g, b, size, SUFFIX, 0);
    backward_rows(g, rows, n, rows, n);
    for (int s = b; s < b + size; s++) i = g->n_thoughts[s] > i ? g->n_thoughts[s] : i;
    while (i--) {
        n = find_rows(rows, g, b, size, THOUGHT, i);
        backward_rows(g, rows, n, rows, n);
        for (int r = 0; r < n; r++)
            for (int64_t j = rows[r] * C; j < (rows[r] + 1) * C; j++) {
                g->d_hidden[j - C] += g->d_emb[j];
                g->d_emb[j] = 0;  /* not the embedding of a token */
            }
    }
    find_rows(last, g, b, size, LAST, 0);
    backward_rows(g, rows, find_rows(rows, g, b, size, PREFIX, 0), last, size);
}

/* Return the number of sequences that a thread takes at once: fewer than GROUP if some threads would
have none otherwise. No sum depends on it. */
static int group_size(const Pass *g) {
    const int64_t n = (g->B + g->n_threads - 1) / g->n_threads;
    return n < GROUP ? n : GROUP;
}

void forward(const Pass *g) {
    const int n = group_size(g);
    #pragma omp parallel for schedule(dynamic) num_threads(g->n_threads)
    for (int b = 0; b < g->B; b += n) forward_group(g, b, g->B - b < n ? g->B - b : n);
}

void backward(const Pass *g) {
    const int n = group_size(g);
    #pragma omp parallel for schedule(dynamic) num_threads(g->n_threads)
    for (int b = 0; b < g->B; b += n) backward_group(g, b, g->B - b < n ? g->B - b : n);
}
