/* The two halves of a decoder layer around its attention, for few rows: one call each, since the
 * operations of a step of few rows take longer to call than to do. Defined by ops/decoder.py. */
#include "vector.h"

typedef struct {
  const bf16 *qkv, *out, *gate_up, *down;
  const float *first_norm, *second_norm;
  const float *qkv_bias, *out_bias, *q_norm, *k_norm; /* or null */
  int64_t hidden, heads, kv_heads, key_dim, value_dim, wide;
  float eps;
} layer;

/* h [M, hidden] gains delta, if there is one; qkv [M, (heads + kv_heads) key_dim + kv_heads
 * value_dim] are the layer's, rotated. x is room for M rows. */
void before_attention(const layer *l, float *h, const float *delta, const float *cosine,
                      const float *sine, float *x, float *qkv, int64_t M, int threads) {
  int64_t turned = l->heads + l->kv_heads, D = l->key_dim;
  int64_t row = turned * D + l->kv_heads * l->value_dim;
  add_rms_norm(h, delta, 0, l->first_norm, l->eps, x, 0, M, l->hidden, threads);
  linear_few(x, l->qkv, l->qkv_bias, qkv, M, row, l->hidden, threads);
  if (l->q_norm) {
    norm_rotate(qkv, row, l->heads, D, l->q_norm, l->eps, cosine, sine, M, threads);
    norm_rotate(qkv + l->heads * D, row, l->kv_heads, D, l->k_norm, l->eps, cosine, sine, M,
                threads);
  } else {
    norm_rotate(qkv, row, turned, D, 0, l->eps, cosine, sine, M, threads);
  }
}

/* What attention mixed [M, heads value_dim] goes through the rest of the layer: h gains the first
 * half of it, and delta [M, hidden] becomes the second. x [M, hidden] and y [M, 3 wide] are room. */
void after_attention(const layer *l, float *h, const float *mixed, float *delta, float *x,
                     float *y, int64_t M, int threads) {
  float *gated = y + M * 2 * l->wide;
  linear_few(mixed, l->out, l->out_bias, delta, M, l->hidden, l->heads * l->value_dim, threads);
  add_rms_norm(h, delta, 0, l->second_norm, l->eps, x, 0, M, l->hidden, threads);
  linear_few(x, l->gate_up, 0, y, M, 2 * l->wide, l->hidden, threads);
  silu_mul(y, gated, M, l->wide, threads);
  linear_few(gated, l->down, 0, delta, M, l->hidden, l->wide, threads);
}
