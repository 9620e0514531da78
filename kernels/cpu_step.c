/* One step of GPT-2 on a CPU, which appends one position to each sequence of a KV cache, and its LM
head.

A step reads every weight once, so it should take no longer than reading them. Two things make it
slower in PyTorch: matrix products designed for many rows, and threads that fall asleep between a
few hundred small operations. Here each row of a weight is one dot product, and one parallel region
spans all layers: each `omp for` splits its loop among the threads and ends with a barrier.
Weights are float32 or bfloat16 (-DBF16), everything else is float32.

Shapes: B sequences, C = n_embd, nh heads of hs = C / nh. cpu_step.py compiles this file. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BF16
typedef uint16_t weight;
static inline float value(weight w) {  /* a bfloat16 is the upper half of a float */
    union { uint32_t bits; float x; } u = {(uint32_t)w << 16};
    return u.x;
}
#else
typedef float weight;
static inline float value(weight w) { return w; }
#endif

typedef struct {
    const weight *w;  /* (out, in) */
    const float *b;   /* (out), or NULL */
} Linear;

typedef struct {
    const float *w, *b;  /* (C) each */
} LayerNorm;

typedef struct {
    LayerNorm ln_1;
    Linear c_attn, attn_proj;
    LayerNorm ln_2;
    Linear c_fc, mlp_proj;
} Block;

enum op { SET, ADD, GELU };

static float gelu(float x) {
    return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
}

/* y (B, out) = x (B, in) @ w.T + b, or its GELU, or added to y */
static void linear(float *y, const float *x, Linear fc, int B, int in, int out, enum op op) {
    #pragma omp for
    for (int r = 0; r < out; r++) {
        const weight *w = fc.w + (int64_t)r * in;
        for (int b = 0; b < B; b++) {  /* w is in the cache after the first sequence */
            const float *xb = x + b * in;
            float sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int i = 0; i < in; i++) sum += value(w[i]) * xb[i];
            if (fc.b) sum += fc.b[r];
            float *yb = y + b * out + r;
            *yb = op == ADD ? *yb + sum : op == GELU ? gelu(sum) : sum;
        }
    }
}

/* y (B, C) = the LayerNorm of x (B, C). Every thread computes all of it. */
static void layer_norm(float *y, const float *x, LayerNorm ln, int B, int C) {
    for (int b = 0; b < B; b++, x += C, y += C) {
        float sum = 0, squares = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = 0; i < C; i++) sum += x[i];
        const float mean = sum / C;
        #pragma omp simd reduction(+ : squares)
        for (int i = 0; i < C; i++) squares += (x[i] - mean) * (x[i] - mean);
        const float scale = 1 / sqrtf(squares / C + 1e-5f);  /* nn.LayerNorm's eps */
        for (int i = 0; i < C; i++) y[i] = (x[i] - mean) * scale * ln.w[i] + ln.b[i];
    }
}

/* y (hs) = the attention of one head's query q (hs) to n keys and values (n, hs) */
static void attend(float *y, const float *q, const float *k, const float *v, int n, int hs) {
    float p[n], max = -INFINITY, sum = 0;
    for (int t = 0; t < n; t++, k += hs) {
        float score = 0;
        #pragma omp simd reduction(+ : score)
        for (int i = 0; i < hs; i++) score += q[i] * k[i];
        p[t] = score / sqrtf(hs);
        max = fmaxf(max, p[t]);
    }
    for (int t = 0; t < n; t++) {
        p[t] = expf(p[t] - max);
        sum += p[t];
    }
    for (int i = 0; i < hs; i++) y[i] = 0;
    for (int t = 0; t < n; t++, v += hs)
        for (int i = 0; i < hs; i++) y[i] += p[t] / sum * v[i];
}

/* Append to the cache, and overwrite x with the hidden states after the final LayerNorm.

x          (B, C)                             input embeddings with their positions
blocks     (n_layer)
cache      (n_layer, 2, B, nh, capacity, hs)  keys and values
lengths    (B)                                position of the new key, below capacity; not changed
workspace  (B, 8 * C)                                                                         */
void step(float *x, const Block *blocks, const LayerNorm *ln_f, int n_layer, int B, int C, int nh,
          float *cache, int capacity, const int64_t *lengths, float *workspace, int n_threads) {
    const int hs = C / nh;
    const int64_t head_size = (int64_t)capacity * hs, layer_size = B * nh * head_size;
    float *qkv = workspace, *y = qkv + B * 3 * C, *h = y + B * C;
    #pragma omp parallel num_threads(n_threads)
    {
        float normed[B * C];
        for (int layer = 0; layer < n_layer; layer++) {
            const Block block = blocks[layer];
            float *keys = cache + 2 * layer * layer_size, *values = keys + layer_size;
            layer_norm(normed, x, block.ln_1, B, C);
            linear(qkv, normed, block.c_attn, B, C, 3 * C, SET);
            #pragma omp for
            for (int i = 0; i < B * nh; i++) {
                const float *q = qkv + i / nh * 3 * C + i % nh * hs;  /* then k and v, C apart */
                float *k = keys + i * head_size, *v = values + i * head_size;
                const int64_t pos = lengths[i / nh];
                memcpy(k + pos * hs, q + C, hs * sizeof(float));
                memcpy(v + pos * hs, q + 2 * C, hs * sizeof(float));
                attend(y + i * hs, q, k, v, pos + 1, hs);
            }
            linear(x, y, block.attn_proj, B, C, C, ADD);
            layer_norm(normed, x, block.ln_2, B, C);
            linear(h, normed, block.c_fc, B, C, 4 * C, GELU);
            linear(x, h, block.mlp_proj, B, 4 * C, C, ADD);
        }
        #pragma omp single
        layer_norm(x, x, *ln_f, B, C);
    }
}

/* logits (B, V) = hidden (B, C) @ wte (V, C).T */
void lm_head(float *logits, const float *hidden, const weight *wte, int B, int C, int V,
             int n_threads) {
    #pragma omp parallel num_threads(n_threads)
    linear(logits, hidden, (Linear){wte, NULL}, B, C, V, SET);
}
