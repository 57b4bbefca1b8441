/* Causal attention of many new tokens of one sequence, block by block of its keys: scores, their
 * exponentials and the weighted values stay in the cache of a core (FlashAttention, arXiv
 * 2205.14135). Products are of bfloat16 pairs, sums float32. Defined by ops/attention.py. */
#include "vector.h"

#include <omp.h>

#define ROWS 48  /* query rows, and */
#define KEYS 128 /* keys of a block */
#define PART 64  /* keys, or columns of values, of a tile */
#define MR 6     /* rows of a tile, the sums of which are held in registers */

#ifdef __AVX512BF16__

int flash_ready(void) { return 1; }

/* Keys of a head [m, D], by blocks: the pairs of a vector's numbers one after the other, each of
 * all keys of the block. The last block and an odd last number are filled up with zeros. */
static void pack_keys(const bf16 *k, int64_t m, int64_t D, bf16 *to) {
  int64_t even = D + D % 2;
  for (int64_t a = 0; a < m; a += KEYS, to += KEYS * even) {
    int64_t n = m - a < KEYS ? m - a : KEYS;
    if (n < KEYS || D % 2) memset(to, 0, KEYS * even * sizeof *to);
    for (int64_t t = 0; t < n; t++) {
      const bf16 *key = k + (a + t) * D;
      for (int64_t i = 0; i < D / 2; i++)
        memcpy(to + 2 * (i * KEYS + t), key + 2 * i, 2 * sizeof *to);
      if (D % 2) to[2 * (D / 2 * KEYS + t)] = key[D - 1];
    }
  }
}

/* Values of a head [m, D], those of two tokens next to each other; `wide` columns, of which those
 * behind D are zeros. */
static void pack_values(const bf16 *v, int64_t m, int64_t D, int64_t wide, bf16 *to) {
  for (int64_t t = 0; t < m; t += 2, to += 2 * wide) {
    const bf16 *one = v + t * D, *next = one + D;
    for (int64_t i = 0; i < D; i++) to[2 * i] = one[i], to[2 * i + 1] = t + 1 < m ? next[i] : 0;
    memset(to + 2 * D, 0, 2 * (wide - D) * sizeof *to);
  }
}

/* score[r][t] = q[r] . key[t] of MR rows and PART keys */
static void score_tile(const bf16 *q, int64_t D, const bf16 *keys, float *score) {
  __m512 acc[MR][PART / 16];
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < PART / 16; j++) acc[r][j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < D / 2; i++, keys += 2 * KEYS) {
    __m512bh key[PART / 16];
    for (int j = 0; j < PART / 16; j++) key[j] = (__m512bh)_mm512_loadu_si512(keys + 32 * j);
    for (int r = 0; r < MR; r++) {
      __m512bh x = both(q + r * D + 2 * i);
      for (int j = 0; j < PART / 16; j++) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], x, key[j]);
    }
  }
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < PART / 16; j++) _mm512_storeu_ps(score + r * KEYS + 16 * j, acc[r][j]);
}

/* out[r] = out[r] * fade[r] + sum of weight[r][t] value[t], of MR rows and 16 * wide columns */
static inline __attribute__((always_inline)) void mix_wide(const bf16 *weight, int64_t pairs,
                                                           const bf16 *values, int64_t D, int wide,
                                                           const float *fade, float *out) {
  __m512 acc[MR][PART / 16];
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < wide; j++)
      acc[r][j] = _mm512_mul_ps(_mm512_loadu_ps(out + r * D + 16 * j), _mm512_set1_ps(fade[r]));
  for (int64_t t = 0; t < pairs; t++, values += 2 * D) {
    __m512bh value[PART / 16];
    for (int j = 0; j < wide; j++) value[j] = (__m512bh)_mm512_loadu_si512(values + 32 * j);
    for (int r = 0; r < MR; r++) {
      __m512bh x = both(weight + r * KEYS + 2 * t);
      for (int j = 0; j < wide; j++) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], x, value[j]);
    }
  }
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < wide; j++) _mm512_storeu_ps(out + r * D + 16 * j, acc[r][j]);
}
static void mix_tile(const bf16 *weight, int64_t pairs, const bf16 *values, int64_t D, int wide,
                     const float *fade, float *out) {
  switch (wide) {
    case 1: mix_wide(weight, pairs, values, D, 1, fade, out); break;
    case 2: mix_wide(weight, pairs, values, D, 2, fade, out); break;
    case 3: mix_wide(weight, pairs, values, D, 3, fade, out); break;
    default: mix_wide(weight, pairs, values, D, 4, fade, out);
  }
}

/* What is known of a block of rows after some of their keys. */
typedef struct {
  float top[ROWS], fade[ROWS];
  float total[ROWS * WIDTH]; /* in parts, to be added up in the end */
  float score[ROWS * KEYS];
  bf16 weight[ROWS * KEYS];
} __attribute__((aligned(64))) progress;

/* Which of the WIDTH keys from t on are among [start, stop). */
static inline __mmask16 among(int64_t t, int64_t start, int64_t stop) {
  uint32_t below = stop <= t ? 0 : stop >= t + WIDTH ? 0xffffu : (1u << (stop - t)) - 1;
  return below & (start <= t ? 0xffffu : start >= t + WIDTH ? 0 : 0xffffu << (start - t));
}

/* Scores to weights e^(score - top), of a row's keys [start[r], stop[r]) alone, `top` being the
 * greatest so far; what was summed up below another top fades. `whole`: all keys, of all rows. */
static inline __attribute__((always_inline)) void weigh(progress *s, int64_t rows, int whole,
                                                        const int64_t *start,
                                                        const int64_t *stop) {
  for (int64_t r = 0; r < rows; r++) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t t = 0; t < KEYS; t += WIDTH) {
      __m512 next = _mm512_loadu_ps(s->score + r * KEYS + t);
      most = _mm512_mask_max_ps(most, whole ? 0xffff : among(t, start[r], stop[r]), next, most);
    }
    float found = _mm512_reduce_max_ps(most), next = found > s->top[r] ? found : s->top[r];
    s->fade[r] = next == -INFINITY ? 0.0f : s->top[r] - next;
    s->top[r] = next;
  }
  for (int64_t r = rows; r < ROWS; r++) s->fade[r] = 0;
  for (int64_t r = 0; r < ROWS; r += WIDTH) store_f32(s->fade + r, vexp(load_f32(s->fade + r)));
  for (int64_t r = 0; r < rows; r++) {
    float *total = s->total + r * WIDTH;
    vec sums = {0};
    for (int64_t t = 0; t < KEYS; t += WIDTH) {
      __m512 e = (__m512)vexp(load_f32(s->score + r * KEYS + t) - s->top[r]);
      if (!whole) e = _mm512_maskz_mov_ps(among(t, start[r], stop[r]), e);
      sums += (vec)e;
      _mm256_storeu_si256((void *)(s->weight + r * KEYS + t), (__m256i)_mm512_cvtneps_pbh(e));
    }
    /* Said outright, or compilers would fuse it for some rows and not for others. */
    __m512 before = _mm512_loadu_ps(total), fade = _mm512_set1_ps(s->fade[r]);
    _mm512_storeu_ps(total, _mm512_fmadd_ps(before, fade, (__m512)sums));
  }
}

static int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

/* Numbers of room for keys and values in order, */
int64_t flash_room(int64_t m, int64_t groups, int64_t D, int64_t Dv) {
  return groups * up(m, KEYS) * (up(D, 2) + up(Dv, 16));
}
/* and floats for `rows` rows of mass, a thread's own. */
int64_t flash_mass_room(int64_t m, int64_t rows, int threads) {
  return threads * rows * up(m, KEYS);
}

typedef struct {
  const float *q;
  int64_t q_stride;
  const bf16 *keys, *values; /* in order, heads `padded` tokens apart */
  float *out;
  int64_t n, past, heads, groups, D, Dv, window, padded;
  float scale;
  int64_t mass_rows, first_paid, last_paid; /* keys [first_paid, last_paid) count */
  int most;
} job;

/* The next rows of a KV head, which are a token's query heads and then the next token's, from row
 * `first` on. What they pay each key is added to `mass` [mass_rows, padded], if there is one, or
 * the most of it kept there. */
static void attend_block(const job *j, int64_t h, int64_t first, float *mass) {
  int64_t group = j->heads / j->groups, even = up(j->D, 2), wide = up(j->Dv, 16);
  int64_t rows = j->n * group - first < ROWS ? j->n * group - first : ROWS;
  int64_t oldest = j->past + first / group + 1, end = j->past + (first + rows - 1) / group + 1;
  int64_t begin = j->window && oldest > j->window ? (oldest - j->window) / KEYS * KEYS : 0;
  const bf16 *keys = j->keys + h * j->padded * even, *values = j->values + h * j->padded * wide;
  int64_t token[ROWS], head[ROWS], start[ROWS], stop[ROWS];
  progress s;
  bf16 queries[ROWS * even];
  float mixed[ROWS * wide], share[ROWS];
  memset(queries, 0, sizeof queries);
  memset(mixed, 0, sizeof mixed);
  memset(s.weight, 0, sizeof s.weight);
  memset(s.total, 0, sizeof s.total);
  for (int64_t r = 0; r < ROWS; r++) s.top[r] = -INFINITY;
  for (int64_t r = 0; r < rows; r++) {
    token[r] = (first + r) / group, head[r] = h * group + (first + r) % group;
    const float *from = j->q + token[r] * j->q_stride + head[r] * j->D;
    for (int64_t i = 0; i < j->D; i++) queries[r * even + i] = to_bf16(from[i] * j->scale);
  }
  for (int again = 0; again < (mass ? 2 : 1); again++) {
    if (again) { /* now that tops and totals are known */
      begin = begin > j->first_paid / KEYS * KEYS ? begin : j->first_paid / KEYS * KEYS;
      end = end < j->last_paid ? end : j->last_paid;
    }
    for (int64_t from = begin; from < end; from += KEYS) {
      int64_t count = end - from < KEYS ? end - from : KEYS;
      for (int64_t r = 0; r < rows; r += MR)
        for (int64_t t = 0; t < count; t += PART)
          score_tile(queries + r * even, even, keys + from * even + 2 * t, s.score + r * KEYS + t);
      for (int64_t r = 0; r < rows; r++) {
        int64_t seen = j->past + token[r] + 1 - from;
        stop[r] = seen < 0 ? 0 : seen < count ? seen : count;
        start[r] = j->window && seen > j->window ? seen - j->window : 0;
      }
      if (again) {
        for (int64_t r = 0; r < rows; r++) {
          float *paid = mass + (j->mass_rows > 1 ? head[r] : 0) * j->padded + from;
          for (int64_t t = 0; t < KEYS; t += WIDTH) {
            vec e = vexp(load_f32(s.score + r * KEYS + t) - s.top[r]) * share[r];
            e = (vec)_mm512_maskz_mov_ps(among(t, start[r], stop[r]), (__m512)e);
            vec old = load_f32(paid + t);
            store_f32(paid + t, j->most ? (vec)_mm512_max_ps((__m512)e, (__m512)old) : old + e);
          }
        }
        continue;
      }
      if (from + KEYS <= oldest && (!j->window || end <= from + j->window))
        weigh(&s, rows, 1, start, stop);
      else
        weigh(&s, rows, 0, start, stop);
      for (int64_t r = 0; r < rows; r += MR)
        for (int64_t i = 0; i < wide; i += PART)
          mix_tile(s.weight + r * KEYS, (count + 1) / 2, values + from * wide + 2 * i, wide,
                   (int)(wide - i) / 16, s.fade + r, mixed + r * wide + i);
    }
    for (int64_t r = 0; r < rows; r++) share[r] = 1 / sum(load_f32(s.total + r * WIDTH));
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < j->Dv; i++)
      j->out[(token[r] * j->heads + head[r]) * j->Dv + i] = mixed[r * wide + i] * share[r];
}

/* q [n, heads, D] of the newest n of m tokens, k [groups, .., D] and v [groups, .., Dv], heads of
 * which are k_stride and v_stride numbers apart -> out [n, heads, Dv]. A token sees at most
 * `window` keys, its own included (0: all). What each key is paid is added to `mass` [mass_rows, m],
 * by query head or, where there is one row, by all; or, with `most`, the most that is paid there is
 * kept; of keys [first_paid, last_paid) alone. Null for none. `room` holds flash_room numbers and
 * `parts` flash_mass_room. */
void flash(const float *q, int64_t q_stride, const bf16 *k, int64_t k_stride, const bf16 *v,
           int64_t v_stride, float *out, int64_t n, int64_t m, int64_t heads, int64_t groups,
           int64_t D, int64_t Dv, float scale, int64_t window, float *mass, int64_t mass_rows,
           int64_t first_paid, int64_t last_paid, int most, bf16 *room, float *parts,
           int threads) {
  int64_t padded = up(m, KEYS), even = up(D, 2), wide = up(Dv, 16), size = mass_rows * padded;
  bf16 *keys = room, *values = room + groups * padded * even;
  job j = {q, q_stride, keys,   values, out,   n,         m - n,      heads,     groups,
           D, Dv,       window, padded, scale, mass_rows, first_paid, last_paid, most};
  int64_t blocks = up(n * (heads / groups), ROWS) / ROWS, tasks = blocks * groups;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < 2 * groups; i++) {
      int64_t h = i / 2;
      if (i % 2)
        pack_values(v + h * v_stride, m, Dv, wide, values + h * padded * wide);
      else
        pack_keys(k + h * k_stride, m, D, keys + h * padded * even);
    }
    /* The longest first. Who pays what is added up in the same order each time. */
    if (mass) {
      float *own = parts + omp_get_thread_num() * size;
      memset(own, 0, size * sizeof *own);
#pragma omp for schedule(static, 1)
      for (int64_t t = 0; t < tasks; t++)
        attend_block(&j, t % groups, (blocks - 1 - t / groups) * ROWS, own);
#pragma omp for schedule(static)
      for (int64_t t = first_paid; t < last_paid; t++)
        for (int64_t i = 0; i < mass_rows * omp_get_num_threads(); i++) {
          float more = parts[i * padded + t], *paid = mass + i % mass_rows * m + t;
          *paid = !most ? *paid + more : more > *paid ? more : *paid;
        }
    } else {
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < tasks; t++)
        attend_block(&j, t % groups, (blocks - 1 - t / groups) * ROWS, 0);
    }
  }
}
#else
int flash_ready(void) { return 0; }
int64_t flash_room(int64_t m, int64_t groups, int64_t D, int64_t Dv) { return 0; }
int64_t flash_mass_room(int64_t m, int64_t rows, int threads) { return 0; }
void flash(const float *q, int64_t q_stride, const bf16 *k, int64_t k_stride, const bf16 *v,
           int64_t v_stride, float *out, int64_t n, int64_t m, int64_t heads, int64_t groups,
           int64_t D, int64_t Dv, float scale, int64_t window, float *mass, int64_t mass_rows,
           int64_t first_paid, int64_t last_paid, int most, bf16 *room, float *parts,
           int threads) {}
#endif
