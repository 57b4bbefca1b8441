/* CPU kernels of the decode step. Activations are float32; weights and caches are float32 or
 * bfloat16. Each function is defined in plain torch in ops/native.py, which also compiles this
 * file, and tests hold the two together. Vector types are the compiler's own, so that the file
 * builds for any instruction set; 64 bytes is one AVX-512 register. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define WIDTH 16
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH), aligned(2)));
typedef uint16_t bf16;

static inline vec load_f32(const float *p) { return *(const vec *)p; }
static inline vec load_bf16(const bf16 *p) {
#ifdef __AVX512F__ /* compilers widen 16-bit vectors in halves when left alone */
  __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#else
  uvec wide = __builtin_convertvector(*(const hvec *)p, uvec) << 16;
#endif
  vec out;
  memcpy(&out, &wide, sizeof out);
  return out;
}
static inline float to_f32(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}
static inline bf16 to_bf16(float x) { /* round to nearest even; NaN stays NaN */
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40u);
  return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline void store_f32(float *p, vec x) { *(vec *)p = x; }
static inline void store_bf16(bf16 *p, vec x) {
  for (int i = 0; i < WIDTH; i++) p[i] = to_bf16(x[i]);
}
#define SAME(x) (x)
static inline float sum(vec v) { /* halves onto halves: log2(WIDTH) vector additions */
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 half[2];
  memcpy(half, &v, sizeof v);
  v8 a = half[0] + half[1];
  v4 quarter[2];
  memcpy(quarter, &a, sizeof a);
  v4 b = quarter[0] + quarter[1];
  return (b[0] + b[2]) + (b[1] + b[3]);
}

typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4)));

/* e^x to about two units in the last place; below -87 the result is tiny, not zero. The minimax
 * polynomial of e^r on |r| <= ln(2)/2 is scaled by 2^n through the exponent bits. NaN stays NaN. */
static inline vec vexp(vec x) {
  for (int i = 0; i < WIDTH; i++) { /* becomes two vector instructions; NaN passes */
    x[i] = x[i] < -87.0f ? -87.0f : x[i];
    x[i] = x[i] > 88.0f ? 88.0f : x[i];
  }
  vec n = x * 1.44269504f + 12582912.0f;
  ivec bits;
  memcpy(&bits, &n, sizeof bits); /* the integer nearest to x / ln 2 stands in the low bits */
  bits = (bits + (127 - 0x4b400000)) << 23;
  n -= 12582912.0f;
  vec r = x - n * 0.693145752f - n * 1.42860677e-6f, scale;
  vec p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

/* out[j] = sum of v[j], j < WIDTH */
static inline vec sums(const vec *v) {
#ifdef __AVX512F__
  __m512 x[16], y[4];
  memcpy(x, v, sizeof x);
#define ADD(lo, hi) _mm512_add_ps(lo, hi)
#define PD(x) _mm512_castps_pd(x)
#define PS(x) _mm512_castpd_ps(x)
  for (int i = 0; i < 4; i++) {
    __m512 a = x[4 * i], b = x[4 * i + 1], c = x[4 * i + 2], d = x[4 * i + 3];
    __m512 ab = ADD(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = ADD(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    y[i] = ADD(PS(_mm512_unpacklo_pd(PD(ab), PD(cd))), PS(_mm512_unpackhi_pd(PD(ab), PD(cd))));
  }
#define FOLD(a, b) ADD(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))
  __m512 first = FOLD(y[0], y[1]), second = FOLD(y[2], y[3]), all = FOLD(first, second);
  vec out;
  memcpy(&out, &all, sizeof out);
  return out;
#undef FOLD
#undef PS
#undef PD
#undef ADD
#else
  vec out;
  for (int j = 0; j < WIDTH; j++) out[j] = sum(v[j]);
  return out;
#endif
}

/* ---- y[m,n] = x[m,:] . w[n,:] (+ bias[n]), w bfloat16 ------------------------------------- */

#define NR 4 /* weight rows and */
#define MR 6 /* activation rows whose sums are held in registers at once */

#define TILE(name, nr, mr)                                                                    \
  static void name(const float *x, const bf16 *w, const float *bias, float *y, int64_t N,     \
                   int64_t K) {                                                               \
    vec acc[mr][nr];                                                                          \
    memset(acc, 0, sizeof acc);                                                               \
    int64_t k = 0;                                                                            \
    for (; k + WIDTH <= K; k += WIDTH) {                                                      \
      vec wv[nr];                                                                             \
      for (int j = 0; j < nr; j++) wv[j] = load_bf16(w + j * K + k);                          \
      for (int i = 0; i < mr; i++) {                                                          \
        vec xv = load_f32(x + i * K + k);                                                     \
        for (int j = 0; j < nr; j++) acc[i][j] += xv * wv[j];                                 \
      }                                                                                       \
    }                                                                                         \
    for (int i = 0; i < mr; i++)                                                              \
      for (int j = 0; j < nr; j++) {                                                          \
        float total = sum(acc[i][j]);                                                         \
        for (int64_t t = k; t < K; t++) total += x[i * K + t] * to_f32(w[j * K + t]);         \
        y[i * N + j] = total + (bias ? bias[j] : 0.0f);                                       \
      }                                                                                       \
  }
TILE(tile_4x6, 4, 6)
TILE(tile_4x5, 4, 5)
TILE(tile_4x4, 4, 4)
TILE(tile_4x3, 4, 3)
TILE(tile_4x2, 4, 2)
TILE(tile_4x1, 4, 1)
TILE(tile_1x1, 1, 1)

void linear_bf16(const float *x, const bf16 *w, const float *bias, float *y, int64_t M,
                 int64_t N, int64_t K, int threads) {
  typedef void (*tile)(const float *, const bf16 *, const float *, float *, int64_t, int64_t);
  static const tile tiles[] = {0, tile_4x1, tile_4x2, tile_4x3, tile_4x4, tile_4x5, tile_4x6};
  int64_t blocks = (N + NR - 1) / NR;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    int64_t n = b * NR, rows = N - n < NR ? N - n : NR;
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

/* ---- the same on AMX tiles ------------------------------------------------------------------
 * A tile holds 16 weight rows as they lie in memory. x is split in two bfloat16 parts, high and
 * low, which stand in different columns of the other operand, so that x counts with 16 bits of
 * mantissa; few rows are bound by reading the weights, and the products are nearly free. */

#define TILE_ROWS 16
#define TILE_K 32
#define TILE_X 8 /* rows of x in one tile: a high and a low column each */

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether this process may use the tile registers; asks the kernel once. */
int amx_ready(void) {
  static int known = -1;
  if (known < 0) known = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return known;
}

static void tiles_on(void) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } __attribute__((packed)) shape = {.palette = 1};
  for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = TILE_ROWS;
  _tile_loadconfig(&shape);
}

/* Rows [first, first + TILE_X) of x [M, K] -> K / 32 tiles of 16 pairs of k by 16 columns: 8 high
 * parts, 8 low ones. */
static void split_into_tiles(const float *x, uint32_t *tiles, int64_t first, int64_t M, int64_t K) {
  uint32_t pairs[2][16];
  int64_t rows = M - first < TILE_X ? M - first : TILE_X;
  if (rows < TILE_X) memset(tiles, 0, K * TILE_X * sizeof *tiles);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t k = 0; k < K; k += TILE_K) {
      const float *from = x + (first + m) * K + k;
      __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
      __m512i high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      __m512 ha = _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16));
      __m512 hb = _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16));
      /* The rest of an infinity would be NaN; it has none. */
      a = _mm512_maskz_sub_ps(~_mm512_fpclass_ps_mask(a, 0x18), a, ha);
      b = _mm512_maskz_sub_ps(~_mm512_fpclass_ps_mask(b, 0x18), b, hb);
      _mm512_storeu_si512(pairs[0], high);
      _mm512_storeu_si512(pairs[1], (__m512i)_mm512_cvtne2ps_pbh(b, a));
      uint32_t *to = tiles + k * TILE_X + m;
      for (int i = 0; i < 16; i++, to += 2 * TILE_X) to[0] = pairs[0][i], to[TILE_X] = pairs[1][i];
    }
}

static void put_tile(const float *sums, const float *bias, float *y, int64_t rows, int64_t N) {
  for (int64_t m = 0; m < rows; m++)
    for (int64_t n = 0; n < TILE_ROWS; n++)
      y[m * N + n] = sums[n * 16 + m] + sums[n * 16 + TILE_X + m] + (bias ? bias[n] : 0.0f);
}

/* As linear_bf16, for N a multiple of 32, K of 32, after amx_ready() said yes. */
void linear_bf16_amx(const float *x, const bf16 *w, const float *bias, float *y, int64_t M,
                     int64_t N, int64_t K, int threads) {
  static _Thread_local bf16 *tiles = 0;
  static _Thread_local int64_t room = 0;
  int64_t blocks = (M + TILE_X - 1) / TILE_X, steps = K / TILE_K, size = blocks * K * 2 * TILE_X;
  if (size > room) {
    free(tiles);
    tiles = aligned_alloc(64, size * sizeof(bf16));
    room = size;
  }
  bf16 *packed = tiles; /* a thread-local name would mean another buffer in each thread */
#pragma omp parallel num_threads(threads)
  {
    float sums[4][TILE_ROWS * 16] __attribute__((aligned(64)));
    tiles_on();
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      split_into_tiles(x, (uint32_t *)packed + b * K * TILE_X, b * TILE_X, M, K);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n += 2 * TILE_ROWS) {
      const bf16 *above = w + n * K, *below = above + TILE_ROWS * K;
      for (int64_t b = 0; b < blocks; b += 2) {
        const bf16 *left = packed + b * K * 2 * TILE_X, *right = left + K * 2 * TILE_X;
        int64_t rows = M - b * TILE_X;
        _tile_zero(0);
        _tile_zero(1);
        if (rows > TILE_X) {
          _tile_zero(2);
          _tile_zero(3);
          for (int64_t s = 0; s < steps; s++) {
            _tile_loadd(4, above + s * TILE_K, K * sizeof(bf16));
            _tile_loadd(5, below + s * TILE_K, K * sizeof(bf16));
            _tile_loadd(6, left + s * 512, 64);
            _tile_loadd(7, right + s * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
          }
          _tile_stored(2, sums[2], 64);
          _tile_stored(3, sums[3], 64);
        } else {
          for (int64_t s = 0; s < steps; s++) {
            _tile_loadd(4, above + s * TILE_K, K * sizeof(bf16));
            _tile_loadd(5, below + s * TILE_K, K * sizeof(bf16));
            _tile_loadd(6, left + s * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
          }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        float *to = y + b * TILE_X * N + n;
        const float *add = bias ? bias + n : 0, *next = bias ? add + TILE_ROWS : 0;
        int64_t first = rows < TILE_X ? rows : TILE_X, second = rows - TILE_X;
        put_tile(sums[0], add, to, first, N);
        put_tile(sums[1], next, to + TILE_ROWS, first, N);
        if (second > 0) {
          if (second > TILE_X) second = TILE_X;
          put_tile(sums[2], add, to + TILE_X * N, second, N);
          put_tile(sums[3], next, to + TILE_X * N + TILE_ROWS, second, N);
        }
      }
    }
    _tile_release();
  }
}
#else
int amx_ready(void) { return 0; }
void linear_bf16_amx(const float *x, const bf16 *w, const float *bias, float *y, int64_t M,
                     int64_t N, int64_t K, int threads) {
  linear_bf16(x, w, bias, y, M, N, K, threads);
}
#endif

/* ---- small row-wise operators -------------------------------------------------------------- */

/* h += delta (if given); out = h / rms(h) * weight. delta and out are float32 or bfloat16. */
void add_rms_norm(float *h, const void *delta, int delta_bf16, const float *weight, float eps,
                  void *out, int out_bf16, int64_t M, int64_t N, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (M * N > 32768)
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

/* On rows of `stride` floats that begin with `heads` vectors of `dim`: normalise each by its rms
 * times weight (if given), then rotate its two halves by cos/sin [M, dim]. */
void norm_rotate(float *x, int64_t stride, int64_t heads, int64_t dim, const float *weight,
                 float eps, const float *cosine, const float *sine, int64_t M, int threads) {
  int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (M * heads * dim > 32768)
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
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (M * N > 32768)")       \
    for (int64_t m = 0; m < M; m++) {                                                          \
      const T *gate = gate_up + 2 * m * N, *up = gate + N;                                     \
      T *to = out + m * N;                                                                     \
      int64_t i = 0;                                                                           \
      for (; i + WIDTH <= N; i += WIDTH) {                                                     \
        vec g = load(gate + i);                                                                \
        store(to + i, g / (1.0f + vexp(-g)) * load(up + i));                                   \
      }                                                                                        \
      for (; i < N; i++) {                                                                     \
        float g = scalar(gate[i]);                                                             \
        to[i] = round(g / (1.0f + expf(-g)) * scalar(up[i]));                                  \
      }                                                                                        \
    }                                                                                          \
  }
SILU(silu_mul, float, load_f32, SAME, store_f32, SAME)
SILU(silu_mul_bf16, bf16, load_bf16, to_f32, store_bf16, to_bf16)

/* ---- ragged attention of a few newest tokens a sequence ------------------------------------ */

#define CHUNK 256    /* keys scored by one task; long contexts are split over threads */
#define MAX_GROUP 16 /* query heads that share a key head */

/* e^(score - top) in place over n scores (room up to a multiple of WIDTH); returns their sum. */
static float exponentials(float *score, int64_t n, float top) {
  vec total = {0};
  float rest = 0;
  int64_t t = 0;
  for (; t + WIDTH <= n; t += WIDTH) {
    vec e = vexp(load_f32(score + t) - top);
    *(vec *)(score + t) = e;
    total += e;
  }
  for (; t < n; t++) rest += score[t] = expf(score[t] - top);
  return sum(total) + rest;
}

/* One query row and key head, keys [first, stop): running maximum, sum, and weighted values.
 * Scores are made for 16 keys at a time and values summed in registers, 64 columns and up to
 * HEADS query heads at a time; odd sizes go one by one. */
#define HEADS 4
#define AHEAD 0 /* keys ahead of those scored that are asked of memory */
static inline void fetch(const void *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
}
#define ATTEND(name, T, load, scalar)                                                          \
  static inline __attribute__((always_inline)) void name##_scores(                             \
      const float *q, int64_t heads, int64_t D, const T *key, float *score) {                  \
    vec part[HEADS][WIDTH];                                                                    \
    for (int64_t t = 0; t < WIDTH; t += 4) {                                                   \
      vec acc[HEADS][4];                                                                       \
      memset(acc, 0, sizeof acc);                                                              \
      for (int64_t i = 0; i < D; i += WIDTH)                                                   \
        for (int j = 0; j < 4; j++) {                                                          \
          vec k = load(key + (t + j) * D + i);                                                 \
          for (int64_t g = 0; g < heads; g++) acc[g][j] += load_f32(q + g * D + i) * k;        \
        }                                                                                      \
      for (int64_t g = 0; g < heads; g++)                                                      \
        for (int j = 0; j < 4; j++) part[g][t + j] = acc[g][j];                                \
    }                                                                                          \
    for (int64_t g = 0; g < heads; g++) *(vec *)(score + g * CHUNK) = sums(part[g]);           \
  }                                                                                            \
  static inline __attribute__((always_inline)) void name##_values(                             \
      const float *score, int64_t heads, int64_t n, int64_t Dv, const T *v, float *out,        \
      int64_t out_stride) {                                                                    \
    vec acc[HEADS][4];                                                                         \
    memset(acc, 0, sizeof acc);                                                                \
    for (int64_t t = 0; t < n; t++)                                                            \
      for (int j = 0; j < 4; j++) {                                                            \
        vec value = load(v + t * Dv + j * WIDTH);                                              \
        for (int64_t g = 0; g < heads; g++) acc[g][j] += score[g * CHUNK + t] * value;         \
      }                                                                                        \
    for (int64_t g = 0; g < heads; g++)                                                        \
      for (int j = 0; j < 4; j++) *(vec *)(out + g * out_stride + j * WIDTH) = acc[g][j];      \
  }                                                                                            \
  static void name(const float *q, int64_t group, int64_t D, int64_t Dv, const T *k,           \
                   const T *v, int64_t first, int64_t stop, float scale, float *part) {        \
    float score[MAX_GROUP][CHUNK];                                                             \
    int64_t n = stop - first, blocked = D % WIDTH ? 0 : n - n % WIDTH, stride = Dv + 2;        \
    const T *keys = k + first * D, *values = v + first * Dv;                                   \
    for (int64_t t = 0; t < blocked; t += WIDTH) {                                             \
      const T *key = keys + t * D;                                                             \
      fetch(key + AHEAD * D, WIDTH * D * sizeof(T));                                           \
      fetch(values + t * Dv, WIDTH * Dv * sizeof(T));                                          \
      for (int64_t g = 0; g < group; g += HEADS) {                                             \
        const float *query = q + g * D;                                                        \
        switch (group - g) {                                                                   \
          case 1: name##_scores(query, 1, D, key, score[g] + t); break;                        \
          case 2: name##_scores(query, 2, D, key, score[g] + t); break;                        \
          case 3: name##_scores(query, 3, D, key, score[g] + t); break;                        \
          default: name##_scores(query, 4, D, key, score[g] + t);                              \
        }                                                                                      \
      }                                                                                        \
    }                                                                                          \
    for (int64_t t = blocked; t < n; t++)                                                      \
      for (int64_t g = 0; g < group; g++) {                                                    \
        float dot = 0;                                                                         \
        for (int64_t i = 0; i < D; i++) dot += q[g * D + i] * scalar(keys[t * D + i]);         \
        score[g][t] = dot;                                                                     \
      }                                                                                        \
    for (int64_t g = 0; g < group; g++) {                                                      \
      float top = -INFINITY;                                                                   \
      for (int64_t t = 0; t < n; t++) {                                                        \
        score[g][t] *= scale;                                                                  \
        top = score[g][t] > top ? score[g][t] : top;                                           \
      }                                                                                        \
      part[g * stride] = top;                                                                  \
      part[g * stride + 1] = exponentials(score[g], n, top);                                   \
    }                                                                                          \
    int64_t i = 0;                                                                             \
    for (; i + 4 * WIDTH <= Dv; i += 4 * WIDTH)                                                \
      for (int64_t g = 0; g < group; g += HEADS) {                                             \
        float *out = part + g * stride + 2 + i;                                                \
        switch (group - g) {                                                                   \
          case 1: name##_values(score[g], 1, n, Dv, values + i, out, stride); break;           \
          case 2: name##_values(score[g], 2, n, Dv, values + i, out, stride); break;           \
          case 3: name##_values(score[g], 3, n, Dv, values + i, out, stride); break;           \
          default: name##_values(score[g], 4, n, Dv, values + i, out, stride);                 \
        }                                                                                      \
      }                                                                                        \
    for (; i < Dv; i++)                                                                        \
      for (int64_t g = 0; g < group; g++) {                                                    \
        float total = 0;                                                                       \
        for (int64_t t = 0; t < n; t++) total += score[g][t] * scalar(values[t * Dv + i]);     \
        part[g * stride + 2 + i] = total;                                                      \
      }                                                                                        \
  }
ATTEND(attend_f32, float, load_f32, SAME)
ATTEND(attend_bf16, bf16, load_bf16, to_f32)

/* Where one sequence's keys and values of a layer lie. */
typedef struct {
  void *k, *v;       /* [kv_heads, capacity, dim] */
  int64_t capacity;  /* tokens a head's rows are apart */
  int64_t stored;    /* tokens, this step's included */
  int64_t first_row; /* its first token row in q, k_new, v_new */
  int64_t rows;      /* its token rows */
} place;

/* Writes this step's keys and values of every sequence into its cache, then attends.
 * Rows of q, k_new and v_new are `q_stride`, `k_stride` and `v_stride` floats apart;
 * out is [T, heads, Dv]. `window` 0 means full attention. `tasks` holds 4 int64 a task and `parts`
 * heads/kv_heads * (Dv + 2) floats a task; both have room for `max_tasks`. Returns the tasks
 * used, or -1 if there was no room. */
int64_t append_attend(place *places, int64_t sequences, const float *q, int64_t q_stride,
                      const float *k_new, int64_t k_stride, const float *v_new, int64_t v_stride,
                      float *out, int64_t heads, int64_t kv_heads, int64_t D, int64_t Dv, float scale,
                      int64_t window, int is_bf16, int64_t *tasks, float *parts,
                      int64_t max_tasks, int threads) {
  int64_t group = heads / kv_heads, size = group * (Dv + 2), count = 0;
  for (int64_t s = 0; s < sequences; s++) {
    place *p = places + s;
    for (int64_t r = 0; r < p->rows; r++) {
      int64_t row = p->first_row + r, at = p->stored - p->rows + r;
      for (int64_t h = 0; h < kv_heads; h++) {
        const float *kn = k_new + row * k_stride + h * D, *vn = v_new + row * v_stride + h * Dv;
        int64_t ko = (h * p->capacity + at) * D, vo = (h * p->capacity + at) * Dv;
        if (is_bf16) {
          for (int64_t i = 0; i < D; i++) ((bf16 *)p->k)[ko + i] = to_bf16(kn[i]);
          for (int64_t i = 0; i < Dv; i++) ((bf16 *)p->v)[vo + i] = to_bf16(vn[i]);
        } else {
          memcpy((float *)p->k + ko, kn, D * sizeof(float));
          memcpy((float *)p->v + vo, vn, Dv * sizeof(float));
        }
      }
      int64_t stop = at + 1, start = window && stop > window ? stop - window : 0;
      for (int64_t h = 0; h < kv_heads; h++)
        for (int64_t a = start; a < stop; a += CHUNK) {
          if (count == max_tasks) return -1;
          int64_t *task = tasks + 4 * count++;
          task[0] = s, task[1] = row * kv_heads + h, task[2] = a;
          task[3] = a + CHUNK < stop ? a + CHUNK : stop;
        }
    }
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t t = 0; t < count; t++) {
    const int64_t *task = tasks + 4 * t;
    const place *p = places + task[0];
    int64_t row = task[1] / kv_heads, h = task[1] % kv_heads;
    const float *query = q + row * q_stride + h * group * D;
    int64_t ko = h * p->capacity * D, vo = h * p->capacity * Dv;
    if (is_bf16)
      attend_bf16(query, group, D, Dv, (bf16 *)p->k + ko, (bf16 *)p->v + vo, task[2], task[3],
                  scale, parts + t * size);
    else
      attend_f32(query, group, D, Dv, (float *)p->k + ko, (float *)p->v + vo, task[2], task[3],
                 scale, parts + t * size);
  }
  for (int64_t t = 0; t < count;) { /* join the chunks of each row and key head */
    int64_t end = t + 1, which = tasks[4 * t + 1];
    while (end < count && tasks[4 * end + 1] == which) end++;
    int64_t row = which / kv_heads, h = which % kv_heads;
    for (int64_t g = 0; g < group; g++) {
      float top = -INFINITY, total = 0, *to = out + (row * heads + h * group + g) * Dv;
      for (int64_t c = t; c < end; c++) {
        float m = parts[c * size + g * (Dv + 2)];
        top = m > top ? m : top;
      }
      for (int64_t i = 0; i < Dv; i++) to[i] = 0;
      for (int64_t c = t; c < end; c++) {
        const float *part = parts + c * size + g * (Dv + 2);
        float weight = expf(part[0] - top);
        total += weight * part[1];
        for (int64_t i = 0; i < Dv; i++) to[i] += weight * part[2 + i];
      }
      for (int64_t i = 0; i < Dv; i++) to[i] /= total;
    }
    t = end;
  }
  return count;
}
