/* Attention of a few newest tokens a sequence, for many sequences in one call, which also writes
 * their keys and values. Defined by ops/ragged.py. */
#include "tiles.h"
#include "vector.h"

#include <omp.h>
#include <stdlib.h>

#define AT_ONCE 32  /* query rows that one stretch of keys is read for, MAX_GROUP at least */
#define TILE 6      /* of them, whose sums are held in registers */
#define WEIGHING 15 /* steps of a tile that take as long as the weights of a row */

/* What is read next is asked of memory in small parts while there is something to compute, so that
 * neither waits for the other: [at, end), then [then, last). */
typedef struct {
  const char *at, *end, *then, *last;
  int64_t pace; /* lines that are asked for at each step of a tile */
} queue;
static inline __attribute__((always_inline)) void ask(queue *q, int64_t times) {
  const char *at = q->at, *stop = at + times * q->pace * 64;
  /* Past the first level, which holds what is read now. */
  for (const char *end = stop < q->end ? stop : q->end; at < end; at += 64)
    __builtin_prefetch(at, 0, 2);
  if (at >= q->end) at = q->then, q->end = q->then = q->last;
  q->at = at;
}

/* dense_bf16_dots and dense_bf16_mix by products of bfloat16 pairs, where there are units for them:
 * queries and weights are rounded to bfloat16, as they are for many rows (flash.c). */
#ifdef __AVX512BF16__
#define PAIRS 32 /* numbers in a register */
#define ACROSS 4 /* registers of keys, or of columns, of a tile */

/* The row behind the tile that begins at row g: tiles are as much of a size as can be. */
static inline int64_t tile_end(int64_t rows, int64_t g) {
  int64_t tiles = (rows - g + TILE - 1) / TILE;
  return g + (rows - g + tiles - 1) / tiles;
}

/* A call for each number of rows of a tile, so that compilers know what is held. */
#define BY_ROWS(rows, call)     \
  switch (rows) {               \
    case 1: call(1); break;     \
    case 2: call(2); break;     \
    case 3: call(3); break;     \
    case 4: call(4); break;     \
    case 5: call(5); break;     \
    default: call(TILE);        \
  }

/* 16 keys: pairs number i of all of them as to[i * ACROSS]. */
static inline void turn_keys(const bf16 *key, int64_t D, __m512 *to) {
  for (int64_t i = 0; i < D; i += PAIRS) {
    __m512 r[WIDTH];
    for (int t = 0; t < WIDTH; t++) r[t] = _mm512_loadu_ps((const void *)(key + t * D + i));
    turn(r);
    for (int t = 0; t < WIDTH; t++) to[(i / 2 + t) * ACROSS] = r[t];
  }
}

/* Of `rows` queries and 16 * wide keys, turned. */
static inline __attribute__((always_inline)) void pair_scores(const bf16 *q, int64_t rows,
                                                              int64_t D, const __m512 *keys,
                                                              int wide, queue *next,
                                                              float *score) {
  __m512 acc[TILE][ACROSS];
  for (int64_t g = 0; g < rows; g++)
    for (int j = 0; j < wide; j++) acc[g][j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < D / 2; i++, keys += ACROSS) {
    ask(next, 1);
    for (int64_t g = 0; g < rows; g++) {
      __m512bh x = both(q + g * D + 2 * i);
      for (int j = 0; j < wide; j++)
        acc[g][j] = _mm512_dpbf16_ps(acc[g][j], x, (__m512bh)keys[j]);
    }
  }
  for (int64_t g = 0; g < rows; g++)
    for (int j = 0; j < wide; j++) _mm512_storeu_ps(score + g * CHUNK + j * WIDTH, acc[g][j]);
}

/* Of 32 columns, those that unpacking brought to the low and to the high half of each quarter. */
static inline void in_order(__m512 low, __m512 high, float *to) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(low, first, high));
  _mm512_storeu_ps(to + WIDTH, _mm512_permutex2var_ps(low, last, high));
}

/* 32 columns of two tokens' values, of which there are n, brought next to each other, four by four:
 * those of the low and of the high half of each quarter. */
static inline __attribute__((always_inline)) void pair_columns(const bf16 *v, int64_t Dv, int64_t n,
                                                               __m512i *low, __m512i *high) {
  __m512i one = n > 0 ? _mm512_loadu_si512(v) : _mm512_setzero_si512();
  __m512i other = n > 1 ? _mm512_loadu_si512(v + Dv) : _mm512_setzero_si512();
  *low = _mm512_unpacklo_epi16(one, other);
  *high = _mm512_unpackhi_epi16(one, other);
}

/* 64 columns. */
static inline __attribute__((always_inline)) void pair_values(const bf16 *weight, int64_t rows,
                                                              int64_t n, int64_t Dv, const bf16 *v,
                                                              queue *next, float *out,
                                                              int64_t stride) {
  __m512 acc[TILE][ACROSS];
  for (int64_t g = 0; g < rows; g++)
    for (int j = 0; j < ACROSS; j++) acc[g][j] = _mm512_setzero_ps();
  for (int64_t t = 0; t < n; t += 2) {
    __m512i pairs[ACROSS];
    for (int j = 0; j < ACROSS; j += 2)
      pair_columns(v + t * Dv + j * WIDTH, Dv, n - t, pairs + j, pairs + j + 1);
    ask(next, 1);
    for (int64_t g = 0; g < rows; g++) {
      __m512bh x = both(weight + g * CHUNK + t);
      for (int j = 0; j < ACROSS; j++)
        acc[g][j] = _mm512_dpbf16_ps(acc[g][j], x, (__m512bh)pairs[j]);
    }
  }
  for (int64_t g = 0; g < rows; g++)
    for (int j = 0; j < ACROSS; j += 2)
      in_order(acc[g][j], acc[g][j + 1], out + g * stride + j * WIDTH);
}

#ifdef TILES
/* The same on AMX tiles, where a product of up to 16 query rows takes no longer than one of a few.
 * What a tile loads must have left the store buffer, and what it stores is slow to be read at once,
 * so neither follows the other at once. */
#define SCORES 0
#define KEYS 1
#define QUERIES 2
#define FIRST 3 /* of the queries, and these, which stay */
#define SECOND 4
#define OUT_0 0 /* columns of what is mixed */
#define OUT_1 1
#define OUT_2 2
#define OUT_3 3
#define WEIGHTS 4
#define VALUES 5
#define TILED_PACE 4 /* lines a step, whatever the rows; a tile of keys takes so many steps, */
#define SCORING 5
#define MIXING 10 /* and a block of values so many */

/* Whether vectors of that many numbers are multiplied so. */
static inline int tiled(int64_t D) { return D % PAIRS == 0 && amx_ready(); }

/* Scores of up to 16 queries [rows, D], D a multiple of 32. */
static void tile_dots(const float *q, int64_t rows, int64_t D, const bf16 *keys, int64_t n,
                      queue *next, float *score) {
  uint32_t query[D / PAIRS * TILE_ROWS * WIDTH] __attribute__((aligned(64)));
  float sums[CHUNK][WIDTH] __attribute__((aligned(64))); /* a key's with all queries */
  bf16 end[TILE_ROWS * D];
  queue ahead = *next;
  int64_t part = TILE_ROWS * WIDTH;
  for (int64_t i = 0; i < D; i += PAIRS) turn_rows(q + i, query + i / PAIRS * part, rows, PAIRS, D);
  _tile_loadd(FIRST, query, 64);
  if (D > PAIRS) _tile_loadd(SECOND, query + part, 64);
  for (int64_t t = 0; t < n; t += TILE_ROWS) {
    const bf16 *key = keys + t * D;
    ask(&ahead, SCORING);
    if (n - t < TILE_ROWS) { /* the last few, with others that do not count */
      memset(end, 0, sizeof end);
      key = memcpy(end, key, (n - t) * D * sizeof *end);
    }
    _tile_zero(SCORES);
    for (int64_t i = 0; i < D; i += PAIRS) {
      _tile_loadd(KEYS, key + i, D * sizeof *key);
      if (i == 0) {
        _tile_dpbf16ps(SCORES, KEYS, FIRST);
      } else if (i == PAIRS) {
        _tile_dpbf16ps(SCORES, KEYS, SECOND);
      } else {
        _tile_loadd(QUERIES, query + i / PAIRS * part, 64);
        _tile_dpbf16ps(SCORES, KEYS, QUERIES);
      }
    }
    _tile_stored(SCORES, sums[t], 64);
  }
  *next = ahead;
  for (int64_t t = 0; t < n; t += WIDTH)
    for (int64_t g = 0; g < rows; g += 4) { /* of 4 queries, keys 4 l + j in quarter l of of[j] */
      __m512 of[4];
      for (int j = 0; j < 4; j++) {
        const float *from = sums[t + j] + g;
        of[j] = _mm512_castps128_ps512(_mm_load_ps(from));
        of[j] = _mm512_mask_broadcast_f32x4(of[j], 0x00f0, _mm_load_ps(from + 4 * WIDTH));
        of[j] = _mm512_mask_broadcast_f32x4(of[j], 0x0f00, _mm_load_ps(from + 8 * WIDTH));
        of[j] = _mm512_mask_broadcast_f32x4(of[j], 0xf000, _mm_load_ps(from + 12 * WIDTH));
      }
      __m512d a = (__m512d)_mm512_unpacklo_ps(of[0], of[1]);
      __m512d b = (__m512d)_mm512_unpackhi_ps(of[0], of[1]);
      __m512d c = (__m512d)_mm512_unpacklo_ps(of[2], of[3]);
      __m512d d = (__m512d)_mm512_unpackhi_ps(of[2], of[3]);
      float *to = score + g * CHUNK + t;
      _mm512_storeu_ps(to, (__m512)_mm512_unpacklo_pd(a, c));
      if (g + 1 < rows) _mm512_storeu_ps(to + CHUNK, (__m512)_mm512_unpackhi_pd(a, c));
      if (g + 2 < rows) _mm512_storeu_ps(to + 2 * CHUNK, (__m512)_mm512_unpacklo_pd(b, d));
      if (g + 3 < rows) _mm512_storeu_ps(to + 3 * CHUNK, (__m512)_mm512_unpackhi_pd(b, d));
    }
}

/* Values of 32 tokens, of which there are n: pairs of tokens, in tiles of 16 columns. */
static inline void pair_block(const bf16 *v, int64_t n, int64_t Dv, int64_t wide,
                              __m512i (*to)[PAIRS / 2]) {
  for (int64_t t = 0; t < PAIRS; t += 2)
    for (int64_t j = 0; j < wide; j += 2)
      pair_columns(v + t * Dv + j * WIDTH, Dv, n - t, &to[j][t / 2], &to[j + 1][t / 2]);
}

/* Values weighted for up to 16 queries, Dv a multiple of 32: up to 64 columns at a time. A block of
 * tokens is paired while the one before it is multiplied. */
static void tile_mix(const float *score, int64_t rows, int64_t n, int64_t Dv, const bf16 *values,
                     queue *next, float *to, int64_t stride) {
  bf16 weight[TILE_ROWS * CHUNK] __attribute__((aligned(64)));
  __m512i pairs[2][ACROSS][PAIRS / 2]; /* of two blocks */
  float sums[ACROSS][TILE_ROWS][WIDTH] __attribute__((aligned(64)));
  queue ahead = *next;
  int64_t whole = (n + PAIRS - 1) / PAIRS * PAIRS;
  for (int64_t r = 0; r < rows; r++)
    round_rows(score + r * CHUNK, weight + r * CHUNK, n, whole);
  for (int64_t i = 0, wide; i < Dv; i += wide * WIDTH) {
    const bf16 *from = values + i;
    wide = Dv - i < ACROSS * WIDTH ? 2 : ACROSS;
    _tile_zero(OUT_0);
    _tile_zero(OUT_1);
    _tile_zero(OUT_2);
    _tile_zero(OUT_3);
    pair_block(from, n, Dv, wide, pairs[0]);
    for (int64_t t = 0; t < whole; t += PAIRS) {
      __m512i(*held)[PAIRS / 2] = pairs[t / PAIRS % 2];
      ask(&ahead, MIXING);
      if (t + PAIRS < whole)
        pair_block(from + (t + PAIRS) * Dv, n - t - PAIRS, Dv, wide, pairs[(t / PAIRS + 1) % 2]);
      _tile_loadd(WEIGHTS, weight + t, CHUNK * sizeof *weight);
      _tile_loadd(VALUES, held[0], 64);
      _tile_dpbf16ps(OUT_0, WEIGHTS, VALUES);
      _tile_loadd(VALUES, held[1], 64);
      _tile_dpbf16ps(OUT_1, WEIGHTS, VALUES);
      if (wide == 2) continue;
      _tile_loadd(VALUES, held[2], 64);
      _tile_dpbf16ps(OUT_2, WEIGHTS, VALUES);
      _tile_loadd(VALUES, held[3], 64);
      _tile_dpbf16ps(OUT_3, WEIGHTS, VALUES);
    }
    _tile_stored(OUT_0, sums[0], 64);
    _tile_stored(OUT_1, sums[1], 64);
    _tile_stored(OUT_2, sums[2], 64);
    _tile_stored(OUT_3, sums[3], 64);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < wide; j += 2)
        in_order(_mm512_load_ps(sums[j][r]), _mm512_load_ps(sums[j + 1][r]),
                 to + r * stride + i + j * WIDTH);
  }
  *next = ahead;
}
#endif

/* With nothing to ask for next, keys are taken a register at a time, so that they come evenly. */
static inline void paired_dots(const float *q, int64_t rows, int64_t D, int64_t Dv,
                               const bf16 *keys, const bf16 *values, int64_t n, queue *next,
                               float *score) {
#ifdef TILES
  if (tiled(D)) {
    for (int64_t g = 0; g < rows; g += TILE_ROWS) {
      int64_t some = rows - g < TILE_ROWS ? rows - g : TILE_ROWS;
      tile_dots(q + g * D, some, D, keys, n, next, score + g * CHUNK);
    }
    return;
  }
#endif
  if (D % PAIRS) {
    dense_bf16_dots(q, rows, D, Dv, keys, values, n, score);
    return;
  }
  bf16 query[rows * D], end[WIDTH * D];
  __m512 turned[D / 2 * ACROSS];
  int64_t most = next->pace ? ACROSS * WIDTH : WIDTH;
  round_rows(q, query, rows * D, rows * D);
  fetch(keys, (n < DENSE_AHEAD ? n : DENSE_AHEAD) * D * sizeof(bf16));
  for (int64_t t = 0, stop; t < n; t = stop) {
    stop = t + most < n ? t + most : n;
    int wide = 0;
    for (int64_t at = t; at < stop; at += WIDTH, wide++) {
      const bf16 *key = keys + at * D;
      int64_t there = n - at < WIDTH ? n - at : WIDTH;
      if (at + DENSE_AHEAD < n) fetch(key + DENSE_AHEAD * D, WIDTH * D * sizeof(bf16));
      fetch(values + at * Dv, there * Dv * sizeof(bf16));
      if (there < WIDTH) { /* the last few, with others that do not count */
        memset(end, 0, sizeof end);
        key = memcpy(end, key, there * D * sizeof(bf16));
      }
      turn_keys(key, D, turned + wide);
    }
    for (int64_t g = 0, tile; g < rows; g = tile) {
      tile = tile_end(rows, g);
      const bf16 *from = query + g * D;
      float *to = score + g * CHUNK + t;
#define ALL(rows) pair_scores(from, rows, D, turned, ACROSS, next, to)
#define ONE(rows) pair_scores(from, rows, D, turned + j, 1, next, to + j * WIDTH)
      if (wide == ACROSS)
        BY_ROWS(tile - g, ALL)
      else
        for (int j = 0; j < wide; j++) BY_ROWS(tile - g, ONE)
#undef ALL
#undef ONE
    }
  }
}

static inline void paired_mix(const float *score, int64_t rows, int64_t n, int64_t Dv,
                              const bf16 *values, queue *next, float *to, int64_t stride) {
#ifdef TILES
  if (tiled(Dv)) {
    for (int64_t g = 0; g < rows; g += TILE_ROWS) {
      int64_t some = rows - g < TILE_ROWS ? rows - g : TILE_ROWS;
      tile_mix(score + g * CHUNK, some, n, Dv, values, next, to + g * stride, stride);
    }
    return;
  }
#endif
  if (Dv % (2 * PAIRS)) {
    dense_bf16_mix(score, rows, n, Dv, values, to, stride);
    return;
  }
  bf16 weight[TILE * CHUNK];
  for (int64_t g = 0, tile; g < rows; g = tile) {
    tile = tile_end(rows, g);
    for (int64_t r = g; r < tile; r++)
      round_rows(score + r * CHUNK, weight + (r - g) * CHUNK, n, n + n % 2);
    for (int64_t i = 0; i < Dv; i += 2 * PAIRS) {
#define MIX(rows) pair_values(weight, rows, n, Dv, values + i, next, to + g * stride + i, stride)
      BY_ROWS(tile - g, MIX)
#undef MIX
    }
  }
}
#else
#define paired_dots(q, rows, D, Dv, k, v, n, next, score) dense_bf16_dots(q, rows, D, Dv, k, v, n, score)
#define paired_mix(score, rows, n, Dv, v, next, to, stride) dense_bf16_mix(score, rows, n, Dv, v, to, stride)
#endif
#define plain_dots(q, rows, D, Dv, k, v, n, next, score) dense_f32_dots(q, rows, D, Dv, k, v, n, score)
#define plain_mix(score, rows, n, Dv, v, next, to, stride) dense_f32_mix(score, rows, n, Dv, v, to, stride)

/* Queries q [rows * group, D] of the tokens at key `at` and after it, and one key head, keys
 * [from, to) of those that lie there: each head's maximum, sum, and weighted values. A token sees
 * the keys up to its own, at most `window` of them (0: all). Query head g sees key t < seen_n only
 * if bit g of seen[t] is set. */
#define ATTEND(name, T, dense)                                                                 \
  static void name(const float *q, int64_t rows, int64_t group, int64_t D, int64_t Dv,         \
                   const T *k, const T *v, int64_t from, int64_t to, int64_t at,               \
                   int64_t window, float scale, const uint16_t *seen, int64_t seen_n,          \
                   queue *next, float *part) {                                                 \
    float score[AT_ONCE][CHUNK];                                                               \
    int64_t n = to - from, stride = Dv + 2;                                                    \
    dense##_dots(q, rows * group, D, Dv, k + from * D, v + from * Dv, n, next, score[0]);      \
    for (int64_t r = 0; r < rows; r++) {                                                       \
      int64_t stop = at + r + 1, start = window && stop > window ? stop - window : 0;          \
      start = start < from ? 0 : start > to ? n : start - from;                                \
      stop = stop < from + start ? start : stop > to ? n : stop - from;                        \
      for (int64_t g = 0; g < group; g++) {                                                    \
        ask(next, WEIGHING);                                                                   \
        float *own = score[r * group + g], *told = part + (r * group + g) * stride;            \
        for (int64_t t = start; t < stop; t++) own[t] *= scale;                                \
        for (int64_t t = start; t < stop && from + t < seen_n; t++)                            \
          if (!(seen[from + t] >> g & 1)) own[t] = -INFINITY;                                  \
        float top = told[0] = greatest(own + start, stop - start);                             \
        int64_t first = top == -INFINITY ? stop : start; /* if none is seen */                 \
        told[1] = exponentials(own + first, stop - first, top);                                \
        memset(own, 0, first * sizeof(float));                                                 \
        memset(own + stop, 0, (n - stop) * sizeof(float));                                     \
      }                                                                                        \
    }                                                                                          \
    dense##_mix(score[0], rows * group, n, Dv, v + from * Dv, next, part + 2, stride);         \
  }
ATTEND(attend_f32, float, plain)
ATTEND(attend_bf16, bf16, paired)

static inline int64_t whole(const void *from, int64_t wide, int64_t i) {
  return wide ? ((const int32_t *)from)[i] : ((const int16_t *)from)[i];
}
#define AHEAD 6 /* vectors */

/* How many vectors from t on are the entries that follow t's, as they are. */
static int64_t run(const codes *c, int64_t t, int64_t stop, int64_t size) {
  int64_t n = 1, most = (stop < c->n ? stop : c->n) - t, entry = whole(c->index, c->index_wide, t);
  const bf16 *short_ = c->ratio;
  const float *wide = c->ratio;
  uint16_t unit = 0x3f80; /* 1 in bfloat16 */
  for (; n < most; n++) {
    if (whole(c->index, c->index_wide, t + n) != entry + n) break;
    if (c->turns && whole(c->turns, c->turns_wide, t + n)) break;
    if (size == 2 ? short_[t + n] != unit : wide[t + n] != 1.0f) break;
  }
  return n;
}

/* Vectors [first, stop) written out in the type they are stored in: what codes stand for, then
 * dense ones. A vector that is its own entry is copied as it is. */
#define REBUILD(name, T, load, scalar, store, round)                                           \
  static void name(const codes *c, const T *dense, int64_t D, int64_t first, int64_t stop,     \
                   T *restrict out) {                                                          \
    int64_t half = D / 2, wide = half - half % WIDTH;                                          \
    for (int64_t t = first; t < stop; t++, out += D) {                                         \
      if (t >= c->n) {                                                                         \
        memcpy(out, dense + (t - c->n) * D, (stop - t) * D * sizeof(T));                       \
        return;                                                                                \
      }                                                                                        \
      const T *entry = (const T *)c->entries + whole(c->index, c->index_wide, t) * D;          \
      float ratio = scalar(((const T *)c->ratio)[t]);                                          \
      int64_t turn = c->turns ? whole(c->turns, c->turns_wide, t) : 0, i = 0;                  \
      if (!turn && ratio == 1.0f) { /* and those after it that follow each other */            \
        int64_t n = run(c, t, stop, sizeof(T));                                                \
        memcpy(out, entry, n * D * sizeof(T));                                                 \
        t += n - 1, out += (n - 1) * D;                                                        \
        continue;                                                                              \
      }                                                                                        \
      if (!turn) {                                                                             \
        for (; i + WIDTH <= D; i += WIDTH) store(out + i, load(entry + i) * ratio);            \
        for (; i < D; i++) out[i] = round(scalar(entry[i]) * ratio);                           \
        continue;                                                                              \
      }                                                                                        \
      int64_t row = (turn < 0 ? -turn : turn) * half;                                          \
      if (t + AHEAD < c->n) { /* the tables' rows come in no order */                          \
        int64_t next = whole(c->turns, c->turns_wide, t + AHEAD);                              \
        next = (next < 0 ? -next : next) * half;                                               \
        for (int64_t j = 0; j < half; j += 16) {                                               \
          __builtin_prefetch(c->cosine + next + j);                                            \
          __builtin_prefetch(c->sine + next + j);                                              \
        }                                                                                      \
      }                                                                                        \
      const float *cosine = c->cosine + row, *sine = c->sine + row;                            \
      float sign = turn < 0 ? -ratio : ratio;                                                  \
      for (; i < wide; i += WIDTH) {                                                           \
        vec a = load(entry + i), b = load(entry + half + i);                                   \
        vec x = load_f32(cosine + i) * ratio, y = load_f32(sine + i) * sign;                   \
        store(out + i, a * x - b * y);                                                         \
        store(out + half + i, b * x + a * y);                                                  \
      }                                                                                        \
      for (; i < half; i++) {                                                                  \
        float a = scalar(entry[i]), b = scalar(entry[half + i]);                               \
        float x = cosine[i] * ratio, y = sine[i] * sign;                                       \
        out[i] = round(a * x - b * y);                                                         \
        out[half + i] = round(b * x + a * y);                                                  \
      }                                                                                        \
    }                                                                                          \
  }
REBUILD(rebuild_f32, float, load_f32, SAME, store_f32, SAME)
REBUILD(rebuild_bf16, bf16, load_bf16, to_f32, store_bf16, to_bf16)

/* A stretch of CHUNK keys of one head of a place, for all its rows, so that keys and values are
 * read from memory once. Each of the rows has a part (`join_parts`) for each query head. Stretches
 * begin at multiples of CHUNK, so a row is summed alike whatever the rows beside it. */
typedef struct {
  const place *p;
  int64_t h, from;
  float *part;
} task;

/* What a task reads of bfloat16 numbers, to be asked for while `rows` rows attend to something
 * else. Codes are not asked for. */
static queue to_read(const task *t, int64_t D, int64_t Dv, int64_t rows) {
  const place *p = t->p;
  int64_t n = p->stored - t->from < CHUNK ? p->stored - t->from : CHUNK;
  int64_t tiles = (rows + TILE - 1) / TILE, first = t->h * p->capacity + t->from;
  if (t->from < p->k_codes.n || t->from < p->v_codes.n) return (queue){0};
  const bf16 *k = (const bf16 *)p->k + (first - p->k_codes.n) * D;
  const bf16 *v = (const bf16 *)p->v + (first - p->v_codes.n) * Dv;
  int64_t pace = (3 + tiles - 1) / tiles;
#ifdef TILES
  if (tiled(D)) pace = TILED_PACE;
#endif
  return (queue){(const char *)k, (const char *)(k + n * D), (const char *)v,
                 (const char *)(v + n * Dv), pace};
}

static void attend_task(const task *t, const float *q, int64_t q_stride, int64_t group, int64_t D,
                        int64_t Dv, float scale, int is_bf16, queue *next) {
  const place *p = t->p;
  int64_t from = t->from, to = from + CHUNK < p->stored ? from + CHUNK : p->stored;
  int64_t at = p->stored - p->rows, n = p->seen_n, fit = AT_ONCE / group;
  int coded = from < p->k_codes.n || from < p->v_codes.n;
  float scratch[coded ? CHUNK * (D + Dv) : 1]; /* this stretch, written out */
  float queries[p->rows > 1 ? AT_ONCE * D : 1];
  /* A stretch behind all codes is read where it lies. */
  const char *keys = p->k, *values = p->v;
  int64_t wide = is_bf16 ? sizeof(bf16) : sizeof(float);
  keys += (t->h * p->capacity - p->k_codes.n) * D * wide;
  values += (t->h * p->capacity - p->v_codes.n) * Dv * wide;
  const uint16_t *seen = p->seen;
  if (coded) {
    keys = (char *)scratch, values = (char *)(scratch + CHUNK * D);
    if (is_bf16) {
      rebuild_bf16(&p->k_codes, p->k, D, from, to, (bf16 *)keys);
      rebuild_bf16(&p->v_codes, p->v, Dv, from, to, (bf16 *)values);
    } else {
      rebuild_f32(&p->k_codes, p->k, D, from, to, (float *)keys);
      rebuild_f32(&p->v_codes, p->v, Dv, from, to, (float *)values);
    }
    seen = seen ? seen + from : NULL;
    at -= from, n -= from, to -= from, from = 0;
  }
  for (int64_t r = 0; r < p->rows; r += fit) {
    int64_t rows = p->rows - r < fit ? p->rows - r : fit;
    const float *query = q + (p->first_row + r) * q_stride + (p->head + t->h) * group * D;
    float *part = t->part + r * group * (Dv + 2);
    if (rows > 1) {
      for (int64_t i = 0; i < rows; i++)
        memcpy(queries + i * group * D, query + i * q_stride, group * D * sizeof *query);
      query = queries;
    }
    if (is_bf16)
      attend_bf16(query, rows, group, D, Dv, (const bf16 *)keys, (const bf16 *)values, from, to,
                  at + r, p->window, scale, seen, n, next, part);
    else
      attend_f32(query, rows, group, D, Dv, (const float *)keys, (const float *)values, from, to,
                 at + r, p->window, scale, seen, n, next, part);
  }
}

/* Joins the parts of `count` stretches of one head. */
static void join(const task *t, int64_t count, float *out, int64_t heads, int64_t group,
                 int64_t Dv) {
  const place *p = t->p;
  int64_t rows = p->rows * group, stride = Dv + 2;
  for (int64_t n = 0; n < rows; n++) {
    int64_t at = (p->first_row + n / group) * heads + (p->head + t->h) * group + n % group;
    join_parts(t->part + n * stride, count, rows * stride, out + at * Dv, Dv);
  }
}

/* Where the first key lies that any of a place's rows sees, at a multiple of CHUNK. */
static inline int64_t first_of(const place *p) {
  int64_t start = p->window ? p->stored - p->rows + 1 - p->window : 0;
  return start > 0 ? start - start % CHUNK : 0;
}

/* Writes this step's keys and values of every place, then attends. Rows of q, k_new and v_new are
 * `q_stride`, `k_stride` and `v_stride` floats apart; out is [T, heads, Dv]. Returns 0, or -1 if
 * there was no memory. */
int append_attend(const place *const *places, int64_t count, const float *q, int64_t q_stride,
                  const float *k_new, int64_t k_stride, const float *v_new, int64_t v_stride,
                  float *out, int64_t heads, int64_t kv_heads, int64_t D, int64_t Dv, float scale,
                  int is_bf16, int threads) {
  int64_t group = heads / kv_heads, size = group * (Dv + 2), many = 0, used = 0;
  for (int64_t n = 0; n < count; n++) {
    const place *p = places[n];
    int64_t stretches = p->kv_heads * ((p->stored - first_of(p) + CHUNK - 1) / CHUNK);
    many += stretches, used += stretches * p->rows;
  }
  task *tasks = malloc(many * sizeof *tasks), *t = tasks;
  float *parts = malloc(used * size * sizeof *parts), *part = parts;
  if (!tasks || !parts) {
    free(tasks);
    free(parts);
    return -1;
  }
  /* Those of several rows come last: threads take long runs of tasks first, then short ones, so
   * that work of different weight is shared out in the end. */
  for (int64_t n = 0; n < 2 * count; n++) {
    const place *p = places[n % count];
    if ((p->rows > 1) != (n >= count)) continue;
    for (int64_t h = 0; h < p->kv_heads; h++) {
      for (int64_t r = 0; r < p->rows; r++) {
        int64_t row = p->first_row + r, at = h * p->capacity + p->stored - p->rows + r;
        store_row(k_new + row * k_stride + (p->head + h) * D, D, p->k, (at - p->k_codes.n) * D,
                  is_bf16);
        store_row(v_new + row * v_stride + (p->head + h) * Dv, Dv, p->v, (at - p->v_codes.n) * Dv,
                  is_bf16);
      }
      for (int64_t a = first_of(p); a < p->stored; a += CHUNK, part += p->rows * size)
        *t++ = (task){p, h, a, part};
    }
  }
#pragma omp parallel num_threads(threads)
  {
#ifdef TILES /* once, as telling it takes longer than fewer rows of some save */
    int on = is_bf16 && (tiled(D) || tiled(Dv));
    if (on) tiles_on(0, 0);
#endif
#pragma omp for schedule(guided)
    for (int64_t i = 0; i < many; i++) {
      queue next = {0};
      if (is_bf16 && i + 1 < many)
        next = to_read(tasks + i + 1, D, Dv, tasks[i].p->rows * group);
      attend_task(tasks + i, q, q_stride, group, D, Dv, scale, is_bf16, &next);
    }
#ifdef TILES
    if (on) _tile_release();
#endif
#pragma omp for schedule(static)
    for (int64_t i = 0; i < many; i++) {
      const task *own = tasks + i;
      int64_t stretches = 1;
      if (i && own[-1].p == own->p && own[-1].h == own->h) continue;
      while (i + stretches < many && own[stretches].p == own->p && own[stretches].h == own->h)
        stretches++;
      join(own, stretches, out, heads, group, Dv);
    }
  }
  free(tasks);
  free(parts);
  return 0;
}
