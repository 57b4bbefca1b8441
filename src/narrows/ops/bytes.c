/* y[m,n] = x[m,:] . w[n,:] (+ bias[n]) for weights in bytes: codes [N, K], of which ZERO stands for
 * nothing, and behind them a float32 scale for each row. Rows of x are rounded to 8 bits, too, so
 * this is for guesses, which are no less lawful where they are a little off. Defined by
 * linear_bytes_torch in ops/forecast.py. Sums of codes are whole numbers: it does not matter how
 * rows are batched. */
#include "vector.h"

#include <stdlib.h>

#define ZERO 128
#define QUAD 4   /* codes that are multiplied at once */
#define LANES 16 /* rows of x, */
#define BLOCK 16 /* and weight rows, that are read together */

/* K numbers as whole ones from -127 to 127, and zeros behind them up to `stride`. Returns their
 * scale, NaN where one is not finite; *offset is what ZERO adds to their sum with weights. */
static float round_row(const float *x, int8_t *to, int64_t K, int64_t stride, float *offset) {
  float top = 0;
  int32_t odd = 0, total = 0;
#pragma omp simd reduction(max : top) reduction(| : odd)
  for (int64_t k = 0; k < K; k++) {
    float size = fabsf(x[k]);
    top = size > top ? size : top;
    odd |= !(size < INFINITY);
  }
  memset(to, 0, stride);
  *offset = 0;
  if (odd || top == 0) return odd ? NAN : 0;
  float by = 127.0f / top;
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < K; k++) {
    int32_t code = (int32_t)rintf(x[k] * by);
    to[k] = (int8_t)code;
    total += code;
  }
  *offset = (float)(ZERO * total);
  return top / 127.0f;
}

/* As many of LANES or half of them as hold some rows of x. */
static inline int64_t lanes_for(int64_t rows) { return rows > LANES / 2 ? LANES : LANES / 2; }

#ifdef __AVX512VNNI__
/* `sums_of` BLOCK rows of w, in half registers where half of the lanes do: these take half as long
 * where a processor makes wide products in two halves. What is read behind a row counts nothing. */
static inline __attribute__((always_inline)) void block_sums(const int8_t *turned, const uint8_t *w,
                                                             int64_t stride, int64_t K,
                                                             const int64_t lanes,
                                                             const uint8_t *ahead, float *sums) {
  const uint8_t *at[4] = {w, w + 4 * K, w + 8 * K, w + 12 * K};
  __m512i acc[BLOCK];
  __m512 out[BLOCK];
  for (int j = 0; j < BLOCK; j++) acc[j] = _mm512_setzero_si512();
  for (int64_t k = 0; k < stride; k += QUAD) {
    const void *from = turned + k * lanes;
    __m512i rows = lanes == LANES ? _mm512_load_si512(from)
                                  : _mm512_castsi256_si512(_mm256_load_si256(from));
    if (ahead) __builtin_prefetch(ahead + k * BLOCK, 0, 2);
    _Pragma("GCC unroll 16") for (int j = 0; j < BLOCK; j++) {
      int32_t quad;
      memcpy(&quad, at[j / 4] + j % 4 * K, sizeof quad);
      /* Compilers copy sums to and fro around the intrinsic; %t names the lower half. */
      if (lanes == LANES)
        asm("vpdpbusd %2, %1, %0" : "+v"(acc[j]) : "v"(_mm512_set1_epi32(quad)), "v"(rows));
      else
        asm("vpdpbusd %t2, %t1, %t0" : "+v"(acc[j]) : "v"(_mm256_set1_epi32(quad)), "v"(rows));
    }
    for (int i = 0; i < 4; i++) at[i] += QUAD;
  }
  for (int j = 0; j < BLOCK; j++) out[j] = _mm512_cvtepi32_ps(acc[j]);
  turn(out);
  for (int m = 0; m < lanes; m++) _mm512_storeu_ps(sums + m * BLOCK, out[m]);
}
#endif

/* Sums of up to `lanes` rows of x, `turned` [stride / QUAD, lanes] quads, with `count` rows of w:
 * sums [lanes, BLOCK]. What lies `ahead`, if anything, is asked of memory meanwhile. */
static void sums_of(const int8_t *turned, const uint8_t *w, int64_t stride, int64_t K, int64_t count,
                    int64_t lanes, const uint8_t *ahead, float *sums) {
#ifdef __AVX512VNNI__
  if (count == BLOCK && lanes == LANES) {
    block_sums(turned, w, stride, K, LANES, ahead, sums);
    return;
  }
  if (count == BLOCK) {
    block_sums(turned, w, stride, K, LANES / 2, ahead, sums);
    return;
  }
#endif
  if (ahead) fetch(ahead, count * K);
  for (int64_t j = 0; j < count; j++) {
    int32_t total[LANES] = {0};
    for (int64_t k = 0; k < K; k++)
      for (int64_t m = 0; m < lanes; m++)
        total[m] += turned[(k / QUAD * lanes + m) * QUAD + k % QUAD] * (int32_t)w[j * K + k];
    for (int64_t m = 0; m < lanes; m++) sums[m * BLOCK + j] = (float)total[m];
  }
}

void linear_bytes(const float *x, const uint8_t *w, const float *bias, float *y, int64_t M,
                  int64_t N, int64_t K, int threads) {
  int64_t stride = (K + QUAD - 1) / QUAD * QUAD, groups = (M + LANES - 1) / LANES;
  const uint8_t *scales = w + N * K;
  int8_t *turned = aligned_alloc(64, groups * LANES * stride);
  float unit[M], offset[M];
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; m++) { /* lanes that have no row hold anything */
      int32_t row[stride / QUAD];
      unit[m] = round_row(x + m * K, (int8_t *)row, K, stride, offset + m);
      int64_t first = m / LANES * LANES, lanes = lanes_for(M - first);
      int8_t *to = turned + first * stride + (m - first) * QUAD;
      for (int64_t k = 0; k < stride / QUAD; k++) memcpy(to + k * lanes * QUAD, row + k, QUAD);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n += BLOCK) {
      int64_t count = N - n < BLOCK ? N - n : BLOCK;
      const uint8_t *ahead = N - n >= 3 * BLOCK ? w + (n + 2 * BLOCK) * K : 0;
      float scale[BLOCK] = {0}, added[BLOCK] = {0}, sums[LANES * BLOCK];
      memcpy(scale, scales + n * sizeof *scale, count * sizeof *scale);
      if (bias) memcpy(added, bias + n, count * sizeof *added);
      for (int64_t m = 0; m < M; m += LANES, ahead = 0) {
        int64_t lanes = lanes_for(M - m);
        sums_of(turned + m * stride, w + n * K, stride, K, count, lanes, ahead, sums);
        for (int64_t i = 0; i < lanes && m + i < M; i++) {
          float *made = sums + i * BLOCK;
          for (int64_t c = 0; c < BLOCK; c++)
            made[c] = (made[c] - offset[m + i]) * unit[m + i] * scale[c] + added[c];
          memcpy(y + (m + i) * N + n, made, count * sizeof *made);
        }
      }
    }
  }
  free(turned);
}
