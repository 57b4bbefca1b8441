/* A decoder's layers for few rows: in one call where kernels write all its caches, else one for each
 * half of a layer around its attention, since the operations of a step of few rows take longer to
 * call than to do. Defined by ops/decoder.py. */
#include "vector.h"

typedef struct {
  const bf16 *qkv, *out, *gate_up, *down;
  const float *first_norm, *second_norm;
  const float *qkv_bias, *out_bias, *q_norm, *k_norm; /* or null */
  int64_t hidden, heads, kv_heads, key_dim, value_dim, wide;
  float eps, scale;
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
  linear_few(mixed, l->out, l->out_bias, delta, M, l->hidden, l->heads * l->value_dim, threads);
  add_rms_norm(h, delta, 0, l->second_norm, l->eps, x, 0, M, l->hidden, threads);
  gated_mlp(x, l->gate_up, l->down, delta, y, M, l->wide, l->hidden, threads);
}

/* Floats of room that `decode` needs for M rows. */
int64_t decode_room(const layer *const *layers, int64_t count, int64_t M) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    const layer *l = layers[i];
    int64_t row = (l->heads + l->kv_heads) * l->key_dim + l->kv_heads * l->value_dim;
    int64_t a_row = l->hidden + row + l->heads * l->value_dim + 3 * l->wide;
    if (a_row > most) most = a_row;
  }
  return M * most;
}

/* `count` layers one after the other: h [M, hidden] becomes what enters the last one's second half,
 * and delta [M, hidden] what is still to be added to it. Layer i's places end at dense[i],
 * its packed ones at coded[i]. What enters it goes to taps[i], if that is one: its `seen_count` rows
 * seen, `tap_stride` floats apart. Returns 0, or -1 if there was no memory. */
int decode(const layer *const *layers, int64_t count, float *h, float *delta, const float *cosine,
           const float *sine, const place *const *places, const int64_t *dense,
           const packed_place *const *packed, const int64_t *coded, int is_bf16,
           float *const *taps, int64_t tap_stride, const int64_t *seen, int64_t seen_count,
           float *room, int64_t M, int threads) {
  int64_t first = 0, coded_first = 0;
  for (int64_t i = 0; i < count; first = dense[i], coded_first = coded[i], i++) {
    const layer *l = layers[i];
    int64_t queries = l->heads * l->key_dim, keys = l->kv_heads * l->key_dim;
    int64_t row = queries + keys + l->kv_heads * l->value_dim;
    float *x = room, *qkv = x + M * l->hidden, *mixed = qkv + M * row;
    float *y = mixed + M * l->heads * l->value_dim;
    before_attention(l, h, i ? delta : 0, cosine, sine, x, qkv, M, threads);
    for (int64_t r = 0; taps[i] && r < seen_count; r++)
      memcpy(taps[i] + r * tap_stride, h + seen[r] * l->hidden, l->hidden * sizeof *h);
    const float *k = qkv + queries, *v = k + keys;
    if (dense[i] > first &&
        append_attend(places + first, dense[i] - first, qkv, row, k, row, v, row, mixed, l->heads,
                      l->kv_heads, l->key_dim, l->value_dim, l->scale, is_bf16, threads))
      return -1;
    if (coded[i] > coded_first &&
        attend_packed(packed + coded_first, coded[i] - coded_first, qkv, row, k, row, v, row, mixed,
                      l->heads, l->kv_heads, l->key_dim, l->value_dim, l->scale, is_bf16, !is_bf16,
                      threads))
      return -1;
    after_attention(l, h, mixed, delta, x, y, M, threads);
  }
  return 0;
}
