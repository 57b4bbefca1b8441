/* CPU kernels of the decode step. Activations are float32; weights and caches are float32 or
 * bfloat16. Each function is defined in plain torch in ops/native.py, which also compiles this
 * file, and tests hold the two together. */
#include "tiles.h"
#include "vector.h"

#include <omp.h>
#include <stdlib.h>

/* ---- y[m,n] = x[m,:] . w[n,:] (+ bias[n]), w bfloat16 ------------------------------------- */

#define NR 4 /* weight rows and */
#define MR 6 /* activation rows whose sums are held in registers at once */

#define TILE(name, nr, mr)                                                                     \
  static void name(const float *x, const bf16 *w, const float *bias, float *y, int64_t N,      \
                   int64_t K) {                                                                \
    vec acc[mr][nr];                                                                           \
    memset(acc, 0, sizeof acc);                                                                \
    int64_t k = 0;                                                                             \
    for (; k + WIDTH <= K; k += WIDTH) {                                                       \
      vec wv[nr];                                                                              \
      for (int j = 0; j < nr; j++) wv[j] = load_bf16(w + j * K + k);                           \
      for (int i = 0; i < mr; i++) {                                                           \
        vec xv = load_f32(x + i * K + k);                                                      \
        for (int j = 0; j < nr; j++) acc[i][j] += xv * wv[j];                                  \
      }                                                                                        \
    }                                                                                          \
    for (int i = 0; i < mr; i++)                                                               \
      for (int j = 0; j < nr; j++) {                                                           \
        float total = sum(acc[i][j]);                                                          \
        for (int64_t t = k; t < K; t++) total += x[i * K + t] * to_f32(w[j * K + t]);          \
        y[i * N + j] = total + (bias ? bias[j] : 0.0f);                                        \
      }                                                                                        \
  }
TILE(tile_4x6, 4, 6)
TILE(tile_4x5, 4, 5)
TILE(tile_4x4, 4, 4)
TILE(tile_4x3, 4, 3)
TILE(tile_4x2, 4, 2)
TILE(tile_4x1, 4, 1)
TILE(tile_1x1, 1, 1)
#undef TILE

void linear_bf16(const float *x, const bf16 *w, const float *bias, float *y, int64_t M,
                 int64_t N, int64_t K, int threads) {
  typedef void (*tile)(const float *, const bf16 *, const float *, float *, int64_t, int64_t);
  static const tile tiles[] = {0, tile_4x1, tile_4x2, tile_4x3, tile_4x4, tile_4x5, tile_4x6};
  int64_t blocks = (N + NR - 1) / NR;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    int64_t n = b * NR, rows = N - n < NR ? N - n : NR;
    /* Asked of memory early, the block after the next arrives while these are multiplied. */
    if (N - n >= 3 * NR) fetch(w + (n + 2 * NR) * K, NR * K * sizeof(bf16));
    for (int64_t m = 0; m < M; m += MR) {
      int64_t count = M - m < MR ? M - m : MR;
      if (rows == NR) {
        tiles[count](x + m * K, w + n * K, bias ? bias + n : 0, y + m * N + n, N, K);
      } else {
        for (int64_t i = 0; i < count; i++)
          for (int64_t j = 0; j < rows; j++)
            tile_1x1(x + (m + i) * K, w + (n + j) * K, bias ? bias + n + j : 0,
                     y + (m + i) * N + n + j, N, K);
      }
    }
  }
}

/* Aligned room for `size` numbers, the calling thread's own, until its next call. */
#ifdef __AVX512BF16__
static bf16 *scratch(int64_t size) {
  static _Thread_local bf16 *held = 0;
  static _Thread_local int64_t room = 0;
  if (size > room) {
    free(held);
    held = aligned_alloc(64, size * sizeof(bf16));
    room = size;
  }
  return held;
}
#endif

/* ---- the same by AVX-512's products of bfloat16 pairs ----------------------------------------
 * x is rounded to bfloat16, as the wide products of more rows round it, and turned, so that the
 * lanes of a register are rows of x: a pair of weights, spread over all lanes, is multiplied with
 * all rows at once, and no sums are left to be folded together. A row's sum is made in the same
 * order whatever the rows beside it, so that it does not matter how rows are batched. */

#ifdef __AVX512BF16__

#define LANES 16   /* rows of x in a register of full width; a half holds 8, a quarter 4 */
#define BLOCK_N 16 /* weight rows that are read together, the next block asked of memory meanwhile */
#define FEWER 12   /* of them as far as sums with 32 rows fit in registers */

int bf16_dots(void) { return 1; }

/* A weight row's sums with rows of x, the lanes of sums[j] -> column j of `rows` rows of y. */
static inline void put_rows(__m512 *sums, float *y, int64_t rows, int64_t N, __mmask16 columns,
                            __m512 bias) {
  turn(sums);
  for (int64_t m = 0; m < rows; m++)
    _mm512_mask_storeu_ps(y + m * N, columns, _mm512_add_ps(sums[m], bias));
}

static inline int32_t pair_at(const bf16 *from) {
  int32_t pair;
  memcpy(&pair, from, sizeof pair);
  return pair;
}

#define EACH(j, n) _Pragma("GCC unroll 16") for (int j = 0; j < (n); j++)

/* Up to 8 rows of x, in groups as turn_rows makes them, and, if `four`, 4 more times 16 weight rows
 * that lie `step` apart from w -> those columns of y's first `rows` rows that have a bit in
 * `columns`. In registers of half the width, of which processors that halve wide products multiply
 * twice as many, and spread twice as many numbers over all lanes. The 4 rows stand in both halves of
 * one, which is multiplied with two weight rows at once. What lies `ahead`, if anything, is asked of
 * memory meanwhile, into the second cache (see `fetch`). */
#define HALF_TILE(name, four)                                                                   \
  static void name(const uint32_t *x, int64_t stride, const bf16 *w, int64_t step,              \
                   const float *bias, float *y, int64_t rows, int64_t N, int64_t K,             \
                   __mmask16 columns, const bf16 *ahead) {                                      \
    const bf16 *at[4] = {w, w + 4 * step, w + 8 * step, w + 12 * step};                         \
    __m256 acc[BLOCK_N], rest[BLOCK_N / 2], twice = _mm256_setzero_ps();                        \
    EACH(j, BLOCK_N) acc[j] = rest[j / 2] = twice;                                              \
    for (int64_t k = 0; k < K; k += 2, x += LANES) {                                            \
      if (ahead) __builtin_prefetch(ahead, 0, 2), ahead += 32;                                  \
      __m256 eight = _mm256_load_ps((const float *)x);                                          \
      if (four) twice = _mm256_broadcast_ps((const __m128 *)(x + 8));                           \
      __m256i all[2];                                                                           \
      EACH(j, BLOCK_N) {                                                                        \
        all[j % 2] = _mm256_set1_epi32(pair_at(at[j / 4] + j % 4 * step));                      \
        acc[j] = _mm256_dpbf16_ps(acc[j], (__m256bh)eight, (__m256bh)all[j % 2]);               \
        if (four && j % 2)                                                                      \
          rest[j / 2] =                                                                         \
              _mm256_dpbf16_ps(rest[j / 2], (__m256bh)twice,                                    \
                               (__m256bh)_mm256_mask_blend_epi32(0xf0, all[0], all[1]));        \
      }                                                                                         \
      for (int i = 0; i < 4; i++) at[i] += 2;                                                   \
    }                                                                                           \
    __m512 out[BLOCK_N], more = _mm512_setzero_ps();                                            \
    if (bias) more = _mm512_maskz_loadu_ps(columns, bias);                                      \
    EACH(j, BLOCK_N) {                                                                          \
      __m256 high = rest[j / 2];                                                                \
      if (j % 2) high = _mm256_permute2f128_ps(high, high, 1);                                  \
      out[j] = _mm512_insertf32x8(_mm512_castps256_ps512(acc[j]), high, 1);                     \
    }                                                                                           \
    put_rows(out, y, rows, N, columns, more);                                                   \
  }
HALF_TILE(tile_8, 0)
HALF_TILE(tile_12, 1)
#undef HALF_TILE

/* The same with `nr` weight rows, and rows of x in `full` registers, if `half`, 8 more, and, if
 * `quarter`, 4 more, in groups `stride` words apart. The 8 stand in both halves of a register, the 4
 * in those of one of half the width, which are multiplied with two weight rows at once. */
#define LANE_TILE(name, full, half, quarter, nr)                                                \
  static void name(const uint32_t *x, int64_t stride, const bf16 *w, int64_t step,              \
                   const float *bias, float *y, int64_t rows, int64_t N, int64_t K,             \
                   __mmask16 columns, const bf16 *ahead) {                                      \
    const bf16 *at[4] = {w, w + 4 * step, w + 8 * step, w + 12 * step};                         \
    __m512 acc[2][nr], eights[nr / 2], wide[2], twice, more = _mm512_setzero_ps();              \
    __m256 fours[nr / 2], often;                                                                \
    EACH(j, nr) {                                                                               \
      for (int v = 0; v < full; v++) acc[v][j] = more;                                          \
      eights[j / 2] = more, fours[j / 2] = _mm256_setzero_ps();                                 \
    }                                                                                           \
    for (int64_t k = 0; k < K; k += 2, x += LANES) {                                            \
      if (ahead) __builtin_prefetch(ahead, 0, 2), ahead += 32;                                  \
      for (int v = 0; v < full; v++) wide[v] = _mm512_load_ps(x + v * stride);                  \
      const float *others = (const float *)(x + full * stride);                                 \
      if (half) twice = _mm512_broadcast_f32x8(_mm256_load_ps(others));                         \
      if (quarter) often = _mm256_broadcast_ps((const __m128 *)(others + 8 * half));            \
      __m512i all[2];                                                                           \
      EACH(j, nr) {                                                                             \
        all[j % 2] = _mm512_set1_epi32(pair_at(at[j / 4] + j % 4 * step));                      \
        for (int v = 0; v < full; v++)                                                          \
          acc[v][j] = _mm512_dpbf16_ps(acc[v][j], (__m512bh)wide[v], (__m512bh)all[j % 2]);     \
        if (half && j % 2)                                                                      \
          eights[j / 2] =                                                                       \
              _mm512_dpbf16_ps(eights[j / 2], (__m512bh)twice,                                  \
                               (__m512bh)_mm512_mask_blend_epi32(0xff00, all[0], all[1]));      \
        if (quarter && j % 2)                                                                   \
          fours[j / 2] = _mm256_dpbf16_ps(                                                      \
              fours[j / 2], (__m256bh)often,                                                    \
              (__m256bh)_mm256_mask_blend_epi32(0xf0, _mm512_castsi512_si256(all[0]),           \
                                                _mm512_castsi512_si256(all[1])));               \
      }                                                                                         \
      for (int i = 0; i < 4; i++) at[i] += 2;                                                   \
    }                                                                                           \
    if (bias) more = _mm512_maskz_loadu_ps(columns, bias);                                      \
    __m512 out[16];                                                                             \
    EACH(j, 16) out[j] = _mm512_setzero_ps();                                                   \
    for (int v = 0; v < full; v++, y += LANES * N, rows -= LANES) {                             \
      EACH(j, nr) out[j] = acc[v][j];                                                           \
      put_rows(out, y, rows < LANES ? rows : LANES, N, columns, more);                          \
    }                                                                                           \
    if (half) {                                                                                 \
      EACH(j, nr)                                                                               \
        out[j] = j % 2 ? _mm512_shuffle_f32x4(eights[j / 2], eights[j / 2], 0xee) : eights[j / 2]; \
      put_rows(out, y, rows < 8 ? rows : 8, N, columns, more);                                  \
      y += 8 * N, rows -= 8;                                                                    \
    }                                                                                           \
    if (quarter) {                                                                              \
      EACH(j, nr)                                                                               \
        out[j] = _mm512_zextps128_ps512(_mm256_extractf128_ps(fours[j / 2], j % 2));            \
      put_rows(out, y, rows, N, columns, more);                                                 \
    }                                                                                           \
  }
LANE_TILE(tile_16, 1, 0, 0, BLOCK_N)
LANE_TILE(tile_20, 1, 0, 1, BLOCK_N)
LANE_TILE(tile_24, 1, 1, 0, BLOCK_N)
LANE_TILE(narrow_16, 1, 0, 0, FEWER)
LANE_TILE(narrow_20, 1, 0, 1, FEWER)
LANE_TILE(narrow_24, 1, 1, 0, FEWER)
LANE_TILE(narrow_28, 1, 1, 1, FEWER)
LANE_TILE(narrow_32, 2, 0, 0, FEWER)
#undef LANE_TILE
#undef EACH

typedef void lane_tile(const uint32_t *, int64_t, const bf16 *, int64_t, const float *, float *,
                       int64_t, int64_t, int64_t, __mmask16, const bf16 *);

/* For so many rows of x, by fours, and blocks of BLOCK_N or of FEWER weight rows. */
static lane_tile *tile_for(int64_t rows, int64_t block) {
  static lane_tile *const usual[] = {tile_8, tile_8, tile_12, tile_16, tile_20, tile_24};
  static lane_tile *const narrow[] = {narrow_16, narrow_16, narrow_16, narrow_16,
                                      narrow_20, narrow_24, narrow_28, narrow_32};
  return (block == BLOCK_N ? usual : narrow)[(rows - 1) / 4];
}

/* As linear_bf16, for K a multiple of 2, after bf16_dots() said yes. */
void linear_bf16_dot(const float *x, const bf16 *w, const float *bias, float *y, int64_t M,
                     int64_t N, int64_t K, int threads) {
  int64_t parts = (K + 31) / 32, stride = parts * 16 * LANES, groups = (M + LANES - 1) / LANES;
  int64_t block = M > 24 ? FEWER : BLOCK_N;
  uint32_t *turned = (uint32_t *)scratch(2 * groups * stride);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) collapse(2)
    for (int64_t g = 0; g < groups; g++)
      for (int64_t part = 0; part < parts; part++)
        turn_rows(x + g * LANES * K + part * 32, turned + g * stride + part * 16 * LANES,
                  M - g * LANES, K - part * 32, K);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n += block) {
      int64_t left = N - n, step = left < block ? 0 : K; /* the last few, one by one */
      const bf16 *weight = w + n * K, *ahead = left < 2 * block ? 0 : weight + block * K;
      for (int64_t m = 0, rows; m < M; m += rows, ahead = 0) {
        rows = M - m; /* 16 and up to 24 take less than 32 and up to 8 */
        if (rows > 2 * LANES) rows = (rows - 1) % (2 * LANES) < 8 ? LANES : 2 * LANES;
        lane_tile *tile = tile_for(rows, block);
        for (int64_t j = 0; j < (step ? 1 : left); j++)
          tile(turned + m / LANES * stride, stride, weight + j * K, step, bias ? bias + n + j : 0,
               y + m * N + n + j, rows, N, K, step ? (1u << block) - 1 : 1, ahead);
      }
    }
  }
}
#else
int bf16_dots(void) { return 0; }
void linear_bf16_dot(const float *x, const bf16 *w, const float *bias, float *y, int64_t M,
                     int64_t N, int64_t K, int threads) {
  linear_bf16(x, w, bias, y, M, N, K, threads);
}
#endif

/* ---- the same on AMX tiles ------------------------------------------------------------------
 * A tile holds 16 weight rows as they lie in memory, another one 32 columns of 16 rows of x, turned
 * as above, and a third their sums. */

#define TILE_K 32

#ifdef TILES
#include <sys/syscall.h>
#include <unistd.h>

int amx_ready(void) {
  static int known = -1;
  if (known < 0) known = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return known;
}

/* What follows is shared among the threads of a parallel region that have called tiles_on. */

/* Rows of x [M, K] -> groups of 16 of them, turned: [groups][K / 32][16 pairs][16 lanes]. */
static void turn_all(const float *x, uint32_t *turned, int64_t M, int64_t K) {
  int64_t parts = K / TILE_K, groups = (M + LANES - 1) / LANES;
#pragma omp for schedule(static) collapse(2)
  for (int64_t g = 0; g < groups; g++)
    for (int64_t part = 0; part < parts; part++)
      turn_rows(x + g * LANES * K + part * TILE_K, turned + (g * parts + part) * 16 * LANES,
                M - g * LANES, TILE_K, K);
}

/* The weights after those that a thread multiplies, asked of memory all that time, `share` numbers a
 * tile, so that neither waits for the other. */
typedef struct {
  const bf16 *at, *stop;
  int64_t share;
} waiting;

/* The block of weight rows behind that at w, if it does not begin at `end`. */
static inline waiting behind(const bf16 *w, const bf16 *end, int64_t K, int64_t groups) {
  const bf16 *next = w + LANES * K;
  return (waiting){next, next < end ? next + LANES * K : next, (LANES + groups - 1) / groups * TILE_K};
}

/* 16 weight rows times a group of turned rows. */
static inline void tile_sums(const bf16 *w, const uint32_t *rows, int64_t K, __m512 *sums,
                             waiting *next) {
  _tile_zero(0);
  for (int64_t k = 0; k < K; k += TILE_K, rows += 16 * LANES) {
    if (next->at < next->stop) fetch(next->at, next->share * sizeof *w), next->at += next->share;
    _tile_loadd(1, w + k, K * sizeof *w);
    _tile_loadd(2, rows, 64);
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, sums, 64);
}

/* As linear_bf16, of turned rows. */
static void linear_turned(const uint32_t *turned, const bf16 *w, const float *bias, float *y,
                          int64_t M, int64_t N, int64_t K) {
  int64_t groups = (M + LANES - 1) / LANES;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < N; n += LANES) {
    __m512 sums[LANES], more = bias ? _mm512_loadu_ps(bias + n) : _mm512_setzero_ps();
    waiting next = behind(w + n * K, w + N * K, K, groups);
    for (int64_t g = 0; g < groups; g++) {
      tile_sums(w + n * K, turned + g * K / 2 * LANES, K, sums, &next);
      int64_t left = M - g * LANES;
      put_rows(sums, y + g * LANES * N + n, left < LANES ? left : LANES, N, -1, more);
    }
  }
}

/* As linear_bf16, for N a multiple of 16, K of 32, after amx_ready() said yes. */
static void linear_bf16_amx(const float *x, const bf16 *w, const float *bias, float *y, int64_t M,
                            int64_t N, int64_t K, int threads) {
  uint32_t *turned = (uint32_t *)scratch((M + LANES - 1) / LANES * K * LANES);
#pragma omp parallel num_threads(threads)
  {
    tiles_on(0, 0);
    turn_all(x, turned, M, K);
    linear_turned(turned, w, bias, y, M, N, K);
    _tile_release();
  }
}

/* The greatest numbers of 16 rows so far, and the first places where they stand. */
typedef struct {
  float value[LANES];
  int32_t at[LANES];
} maxima;

/* Of linear_turned's y without a bias, as row_maxima tells; `found` [threads][groups] is room. */
static void maxima_turned(const uint32_t *turned, const bf16 *w, maxima *found, float *value,
                          int64_t *at, int64_t M, int64_t N, int64_t K) {
  int64_t groups = (M + LANES - 1) / LANES;
  maxima *mine = found + omp_get_thread_num() * groups;
  for (int64_t g = 0; g < groups; g++)
    for (int i = 0; i < LANES; i++) mine[g].value[i] = -INFINITY, mine[g].at[i] = 0;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < N; n += LANES) {
    __m512 sums[LANES];
    waiting next = behind(w + n * K, w + N * K, K, groups);
    for (int64_t g = 0; g < groups; g++) {
      tile_sums(w + n * K, turned + g * K / 2 * LANES, K, sums, &next);
      __m512 most = _mm512_loadu_ps(mine[g].value), top = sums[0], total = top;
      for (int i = 1; i < LANES; i++)
        top = _mm512_max_ps(top, sums[i]), total = _mm512_add_ps(total, sums[i]);
      /* Seldom is there a greater one. A sum is NaN where a number is. */
      if (!(_mm512_cmp_ps_mask(top, most, _CMP_GT_OQ) | _mm512_cmp_ps_mask(total, total, _CMP_UNORD_Q)))
        continue;
      __m512i place = _mm512_loadu_si512(mine[g].at);
      for (int i = 0; i < LANES; i++) {
        __mmask16 more = _mm512_cmp_ps_mask(sums[i], most, _CMP_NLE_UQ);
        more &= _mm512_cmp_ps_mask(most, most, _CMP_ORD_Q); /* the first NaN stays */
        most = _mm512_mask_mov_ps(most, more, sums[i]);
        place = _mm512_mask_mov_epi32(place, more, _mm512_set1_epi32((int)(n + i)));
      }
      _mm512_storeu_ps(mine[g].value, most);
      _mm512_storeu_si512(mine[g].at, place);
    }
  }
#pragma omp for schedule(static)
  for (int64_t m = 0; m < M; m++) {
    value[m] = -INFINITY, at[m] = 0;
    for (int t = 0; t < omp_get_num_threads(); t++) { /* later threads had later places */
      const maxima *of = found + t * groups + m / LANES;
      float here = of->value[m % LANES];
      if (value[m] == value[m] && !(here <= value[m])) value[m] = here, at[m] = of->at[m % LANES];
    }
  }
}

static inline __m512i rounded(vec x) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
}

/* silu(gate[n,:] . x) * (up[n,:] . x) of turned rows, [N, K] each, turned likewise. */
static void gated_turned(const uint32_t *turned, const bf16 *gate, const bf16 *up, uint32_t *to,
                         int64_t M, int64_t N, int64_t K) {
  int64_t groups = (M + LANES - 1) / LANES;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < N; n += LANES) {
    __m512 opened[LANES], raised[LANES];
    waiting next = behind(gate + n * K, gate + N * K, K, groups);
    waiting other = behind(up + n * K, up + N * K, K, groups);
    for (int64_t g = 0; g < groups; g++) {
      tile_sums(gate + n * K, turned + g * K / 2 * LANES, K, opened, &next);
      tile_sums(up + n * K, turned + g * K / 2 * LANES, K, raised, &other);
      uint32_t *pairs = to + (g * N + n) / 2 * LANES;
      for (int i = 0; i < LANES; i += 2, pairs += LANES) {
        __m512i even = rounded(silu((vec)opened[i]) * (vec)raised[i]);
        __m512i odd = rounded(silu((vec)opened[i + 1]) * (vec)raised[i + 1]);
        _mm512_store_si512(pairs, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
}
#endif

/* Whether products with weights [N, K] run on tiles. */
int on_tiles(int64_t N, int64_t K) {
#ifdef TILES
  return N % LANES == 0 && K % TILE_K == 0 && amx_ready();
#else
  return 0;
#endif
}

/* The fastest of the three for weights of a size on this processor. */
void linear_few(const float *x, const bf16 *w, const float *bias, float *y, int64_t M, int64_t N,
                int64_t K, int threads) {
#ifdef TILES
  if (on_tiles(N, K)) {
    linear_bf16_amx(x, w, bias, y, M, N, K, threads);
    return;
  }
#endif
  if (bf16_dots() && K % 2 == 0)
    linear_bf16_dot(x, w, bias, y, M, N, K, threads);
  else
    linear_bf16(x, w, bias, y, M, N, K, threads);
}

/* y[m,:] = down . (silu(gate . x[m,:]) * (up . x[m,:])), gate and up [N, K] one after the other, down
 * [K, N]. `room` is for 3 N numbers a row. */
void gated_mlp(const float *x, const bf16 *gate_up, const bf16 *down, float *y, float *room,
               int64_t M, int64_t N, int64_t K, int threads) {
#ifdef TILES
  if (N % TILE_K == 0 && on_tiles(N, K)) {
    int64_t groups = (M + LANES - 1) / LANES;
    uint32_t *turned = (uint32_t *)scratch(groups * (K + N) * LANES);
    uint32_t *gated = turned + groups * K / 2 * LANES;
#pragma omp parallel num_threads(threads)
    {
      tiles_on(0, 0);
      turn_all(x, turned, M, K);
      gated_turned(turned, gate_up, gate_up + N * K, gated, M, N, K);
      linear_turned(gated, down, 0, y, M, K, N);
      _tile_release();
    }
    return;
  }
#endif
  linear_few(x, gate_up, 0, room, M, 2 * N, K, threads);
  silu_mul(room, room + 2 * M * N, M, N, threads);
  linear_few(room + 2 * M * N, down, 0, y, M, K, N, threads);
}

/* row_maxima of linear_few's y without a bias, which is not made, after on_tiles said yes.
 * `room` is for 32 numbers a row and thread, rows counted by 16. */
void linear_maxima(const float *x, const bf16 *w, float *value, int64_t *at, float *room, int64_t M,
                   int64_t N, int64_t K, int threads) {
#ifdef TILES
  uint32_t *turned = (uint32_t *)scratch((M + LANES - 1) / LANES * K * LANES);
#pragma omp parallel num_threads(threads)
  {
    tiles_on(0, 0);
    turn_all(x, turned, M, K);
    maxima_turned(turned, w, (maxima *)room, value, at, M, N, K);
    _tile_release();
  }
#endif
}

/* ---- small row-wise operators -------------------------------------------------------------- */

/* h += delta (if given); out = h / rms(h) * weight. delta and out are float32 or bfloat16. */
void add_rms_norm(float *h, const void *delta, int delta_bf16, const float *weight, float eps,
                  void *out, int out_bf16, int64_t M, int64_t N, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (M * N > SHARED)
  for (int64_t m = 0; m < M; m++) {
    float *row = h + m * N, squares = 0;
    if (delta && delta_bf16)
      for (int64_t i = 0; i < N; i++) row[i] += to_f32(((const bf16 *)delta)[m * N + i]);
    else if (delta)
      for (int64_t i = 0; i < N; i++) row[i] += ((const float *)delta)[m * N + i];
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < N; i++) squares += row[i] * row[i];
    float scale = 1.0f / sqrtf(squares / (float)N + eps);
    if (out_bf16) {
      bf16 *to = (bf16 *)out + m * N;
      for (int64_t i = 0; i < N; i++) to[i] = to_bf16(row[i] * scale * weight[i]);
    } else {
      float *to = (float *)out + m * N;
      for (int64_t i = 0; i < N; i++) to[i] = row[i] * scale * weight[i];
    }
  }
}

/* The greatest number of each row of x [M, N] and the first place where it stands; NaN, the first
 * of several, is the greatest of all. */
void row_maxima(const float *x, int64_t M, int64_t N, float *value, int64_t *at, int threads) {
  const int64_t part = 1024; /* numbers looked at twice while they are at hand */
#pragma omp parallel for schedule(static) num_threads(threads) if (M > 1)
  for (int64_t m = 0; m < M; m++) {
    const float *row = x + m * N;
    float top = -INFINITY;
    int64_t best = 0; /* the part it stands in */
    for (int64_t a = 0; a < N && top == top; a += part) {
      int64_t n = N - a < part ? N - a : part, odd = 0;
      for (int64_t i = 0; i < n; i++) odd |= row[a + i] != row[a + i];
      float here = odd ? NAN : greatest(row + a, n);
      if (odd || here > top) top = here, best = a;
    }
    while (top == top ? row[best] != top : row[best] == row[best]) best++;
    value[m] = top, at[m] = best;
  }
}

/* out [M, N] = rows at[m] of a table of `count` rows, float32 or bfloat16. Returns 0, or -1 if one of
 * them is not in it. */
int gather_rows(const void *table, int is_bf16, int64_t count, int64_t N, const int64_t *at,
                int64_t M, float *out) {
  for (int64_t m = 0; m < M; m++) {
    if (at[m] < 0 || at[m] >= count) return -1;
    if (!is_bf16) {
      memcpy(out + m * N, (const float *)table + at[m] * N, N * sizeof *out);
      continue;
    }
    const bf16 *row = (const bf16 *)table + at[m] * N;
    for (int64_t i = 0; i < N; i++) out[m * N + i] = to_f32(row[i]);
  }
  return 0;
}

/* On rows of `stride` floats that begin with `heads` vectors of `dim`: normalise each by its rms
 * times weight (if given), then rotate its two halves by cos/sin [M, dim]. */
void norm_rotate(float *x, int64_t stride, int64_t heads, int64_t dim, const float *weight,
                 float eps, const float *cosine, const float *sine, int64_t M, int threads) {
  int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (M * heads * dim > SHARED)
  for (int64_t m = 0; m < M; m++) {
    const float *c = cosine + m * dim, *s = sine + m * dim;
    for (int64_t h = 0; h < heads; h++) {
      float *v = x + m * stride + h * dim;
      if (weight) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < dim; i++) squares += v[i] * v[i];
        float scale = 1.0f / sqrtf(squares / (float)dim + eps);
        for (int64_t i = 0; i < dim; i++) v[i] *= scale * weight[i];
      }
      for (int64_t i = 0; i < half; i++) {
        float a = v[i], b = v[i + half];
        v[i] = a * c[i] - b * s[i];
        v[i + half] = b * c[i + half] + a * s[i + half];
      }
    }
  }
}

/* out[m,i] = silu(gate[m,i]) * up[m,i], gate and up side by side in one row; both float32, or
 * both bfloat16 */
#define SILU(name, T, load, scalar, store, round)                                              \
  void name(const T *gate_up, T *out, int64_t M, int64_t N, int threads) {                     \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (M * N > SHARED)")      \
    for (int64_t m = 0; m < M; m++) {                                                          \
      const T *gate = gate_up + 2 * m * N, *up = gate + N;                                     \
      T *to = out + m * N;                                                                     \
      int64_t i = 0;                                                                           \
      for (; i + WIDTH <= N; i += WIDTH)                                                       \
        store(to + i, silu(load(gate + i)) * load(up + i));                                    \
      for (; i < N; i++) {                                                                     \
        float g = scalar(gate[i]);                                                             \
        to[i] = round(g / (1.0f + expf(-g)) * scalar(up[i]));                                  \
      }                                                                                        \
    }                                                                                          \
  }
SILU(silu_mul, float, load_f32, SAME, store_f32, SAME)
SILU(silu_mul_bf16, bf16, load_bf16, to_f32, store_bf16, to_bf16)

/* ---- softmax that also sums its columns -------------------------------------------------------
 * scores [groups, rows, seen], float32 or bfloat16, become softmax weights in place. `folded` rows
 * in turn belong to one query, the first at key `offset`; a query sees the keys up to its own, at
 * most `window` of them (0: all). mass [seen], unless null, gains the column sums of the weights,
 * in float32; `parts` then holds `threads` * seen floats. */
#define SOFTMAX(name, T, load, scalar, store, round)                                           \
  static void name(T *row, int64_t first, int64_t stop, int64_t seen, float *part) {           \
    float top = -INFINITY, total = 0;                                                          \
    int64_t i = first;                                                                         \
    vec most = {0}, added = {0};                                                               \
    if (stop - first >= WIDTH) {                                                               \
      most = load(row + first);                                                                \
      for (i += WIDTH; i + WIDTH <= stop; i += WIDTH) {                                        \
        vec x = load(row + i);                                                                 \
        most = choose(x > most, x, most);                                                      \
      }                                                                                        \
      for (int j = 0; j < WIDTH; j++) top = most[j] > top ? most[j] : top;                     \
    }                                                                                          \
    for (; i < stop; i++) top = scalar(row[i]) > top ? scalar(row[i]) : top;                   \
    for (i = first; i + WIDTH <= stop; i += WIDTH) added += vexp(load(row + i) - top);         \
    for (; i < stop; i++) total += expf(scalar(row[i]) - top);                                 \
    float share = 1.0f / (total + sum(added));                                                 \
    for (i = first; i + WIDTH <= stop; i += WIDTH) {                                           \
      vec p = vexp(load(row + i) - top) * share;                                               \
      if (part) *(vec *)(part + i) += p;                                                       \
      store(row + i, p);                                                                       \
    }                                                                                          \
    for (; i < stop; i++) {                                                                    \
      float p = expf(scalar(row[i]) - top) * share;                                            \
      if (part) part[i] += p;                                                                  \
      row[i] = round(p);                                                                       \
    }                                                                                          \
    memset(row, 0, first * sizeof(T));                                                         \
    memset(row + stop, 0, (seen - stop) * sizeof(T));                                          \
  }
SOFTMAX(softmax_f32, float, load_f32, SAME, store_f32, SAME)
SOFTMAX(softmax_bf16, bf16, load_bf16, to_f32, store_bf16, to_bf16)

void softmax_mass(void *scores, int is_bf16, int64_t groups, int64_t rows, int64_t folded,
                  int64_t seen, int64_t offset, int64_t window, float *mass, float *parts,
                  int threads) {
  if (mass) memset(parts, 0, threads * seen * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < groups * rows; r++) {
    float *part = mass ? parts + omp_get_thread_num() * seen : NULL;
    int64_t stop = offset + r % rows / folded + 1, first = window && stop > window ? stop - window : 0;
    if (is_bf16)
      softmax_bf16((bf16 *)scores + r * seen, first, stop, seen, part);
    else
      softmax_f32((float *)scores + r * seen, first, stop, seen, part);
  }
  for (int t = 0; mass && t < threads; t++)
    for (int64_t i = 0; i < seen; i++) mass[i] += parts[t * seen + i];
}
