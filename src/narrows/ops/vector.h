/* What the CPU kernels share: vector types, conversions, the exponential, attention of a few query
 * rows to some dense keys and values, and kernels that others build on. Vector types are the
 * compiler's own, so that the files build for any instruction set; a vector is one register, since
 * compilers keep wider ones in memory, which is several times slower. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined __AVX512F__
#define WIDTH 16
#elif defined __AVX__
#define WIDTH 8
#else
#define WIDTH 4
#endif
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
static inline void store_bf16(bf16 *p, vec x) { /* as to_bf16, without branches */
  uvec bits;
  memcpy(&bits, &x, sizeof bits);
  uvec nan = (uvec)((bits & 0x7fffffffu) > 0x7f800000u);
  uvec round = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *(hvec *)p = __builtin_convertvector((round & ~nan) | (((bits >> 16) | 0x40u) & nan), hvec);
}
#define SAME(x) (x)
static inline float sum(vec v) { /* halves onto halves, in vector additions where it matters */
#if WIDTH == 4
  return (v[0] + v[2]) + (v[1] + v[3]);
#else
  typedef float v4 __attribute__((vector_size(16)));
  v4 part[WIDTH / 4];
  memcpy(part, &v, sizeof v);
  for (int n = WIDTH / 8; n; n /= 2)
    for (int i = 0; i < n; i++) part[i] += part[i + n];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
#endif
}

typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4)));

/* a where the comparison held, else b */
static inline vec choose(ivec held, vec a, vec b) {
  return (vec)((held & (ivec)a) | (~held & (ivec)b));
}

/* e^x to about two units in the last place; below -87 the result is tiny, not zero. The minimax
 * polynomial of e^r on |r| <= ln(2)/2 is scaled by 2^n through the exponent bits. NaN stays NaN. */
static inline vec vexp(vec x) {
  const vec none = {0}, low = none - 87.0f, high = none + 88.0f;
#ifdef __AVX512F__ /* the second is taken where one is NaN */
  x = (vec)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
#else
  x = choose(x < low, low, x); /* NaN passes */
  x = choose(x > high, high, x);
#endif
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

static inline vec silu(vec x) { return x / (1.0f + vexp(-x)); }

/* fold: the way to four sums, of v[0] to v[3]; folded: sum j of those, j < WIDTH. */
#ifdef __AVX512F__
#define ADD(lo, hi) _mm512_add_ps(lo, hi)
#define PD(x) _mm512_castps_pd(x)
#define PS(x) _mm512_castpd_ps(x)
#define FOLD(a, b) ADD(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))
typedef __m512 quad;
static inline quad fold(const vec *v) {
  __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  __m512 ab = ADD(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = ADD(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return ADD(PS(_mm512_unpacklo_pd(PD(ab), PD(cd))), PS(_mm512_unpackhi_pd(PD(ab), PD(cd))));
}
static inline vec folded(const quad *q) {
  return (vec)FOLD(FOLD(q[0], q[1]), FOLD(q[2], q[3]));
}
#undef FOLD
#undef PS
#undef PD
#undef ADD
#else
typedef struct {
  float of[4];
} quad;
static inline quad fold(const vec *v) {
  quad out;
  for (int j = 0; j < 4; j++) out.of[j] = sum(v[j]);
  return out;
}
static inline vec folded(const quad *q) {
  vec out;
  memcpy(&out, q, sizeof out);
  return out;
}
#endif

#ifdef __AVX512BF16__
/* K numbers rounded to bfloat16, and zeros behind them up to `stride`. */
static inline void round_rows(const float *x, bf16 *to, int64_t K, int64_t stride) {
  int64_t k = 0;
  for (; k + WIDTH <= K; k += WIDTH)
    _mm256_storeu_si256((void *)(to + k), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k)));
  for (; k < K; k++) to[k] = to_bf16(x[k]);
  for (; k < stride; k++) to[k] = 0;
}

/* Two neighbours, in each place of a register. */
static inline __m512bh both(const bf16 *p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}
#endif

#ifdef __AVX512F__
/* r[i][j] <-> r[j][i] of 16 by 16 words */
static inline __attribute__((always_inline)) void turn(__m512 *r) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      __m512d a = (__m512d)t[i + j], b = (__m512d)t[i + 2 + j];
      r[i + 2 * j] = (__m512)_mm512_unpacklo_pd(a, b);
      r[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    }
  for (int i = 0; i < 16; i++) { /* quarters: first 0 and 2, 1 and 3 of two registers ... */
    int from = i / 8 * 8 + i % 4;
    t[i] = i & 4 ? _mm512_shuffle_f32x4(r[from], r[from + 4], 0xdd)
                 : _mm512_shuffle_f32x4(r[from], r[from + 4], 0x88);
  }
  for (int i = 0; i < 8; i++) { /* ... then the same of four */
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}
#endif

#ifdef __AVX512BF16__
/* 32 columns of up to WIDTH rows of x [rows, K] -> 16 pairs of WIDTH rows each, rounded; zeros
 * where there are no rows, and behind K. */
static inline void turn_rows(const float *x, uint32_t *to, int64_t rows, int64_t left, int64_t K) {
  __m512 pairs[WIDTH];
  for (int64_t i = 0; i < WIDTH; i++) {
    bf16 row[32] = {0};
    if (i < rows) round_rows(x + i * K, row, left < 32 ? left : 32, 32);
    pairs[i] = _mm512_loadu_ps(row);
  }
  turn(pairs);
  for (int i = 0; i < WIDTH; i++) _mm512_store_ps(to + i * WIDTH, pairs[i]);
}
#endif

/* ---- a few query rows, some dense keys and values -------------------------------------------- */

#define CHUNK 256 /* keys scored by one task; long contexts are split over threads */

#ifdef __AVX512F__
/* The first n lanes of a register, all of them if there are more. */
static inline __mmask16 leading(int64_t n) { return n < WIDTH ? (1u << n) - 1 : 0xffff; }
#endif

/* The greatest of n numbers; -INFINITY of none, and NaN counts as less than any. */
static inline float greatest(const float *x, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512F__ /* the second is taken where one is NaN */
  __m512 most[4], none = _mm512_set1_ps(-INFINITY);
  for (int j = 0; j < 4; j++) most[j] = none;
  for (; i + 4 * WIDTH <= n; i += 4 * WIDTH)
    for (int j = 0; j < 4; j++)
      most[j] = _mm512_max_ps(_mm512_loadu_ps(x + i + j * WIDTH), most[j]);
  for (int j = 0; i < n; i += WIDTH, j++)
    most[j] = _mm512_max_ps(_mm512_mask_loadu_ps(none, leading(n - i), x + i), most[j]);
  for (int j = 1; j < 4; j++) most[0] = _mm512_max_ps(most[0], most[j]);
  return _mm512_reduce_max_ps(most[0]);
#else
  float top = -INFINITY;
  if (n >= WIDTH) {
    vec most = load_f32(x);
    for (i = WIDTH; i + WIDTH <= n; i += WIDTH) {
      vec next = load_f32(x + i);
      most = choose(next > most, next, most);
    }
    for (int j = 0; j < WIDTH; j++) top = most[j] > top ? most[j] : top;
  }
  for (; i < n; i++) top = x[i] > top ? x[i] : top;
  return top;
#endif
}

/* e^(score - top) in place over n scores (room up to a multiple of WIDTH); returns their sum. */
static inline float exponentials(float *score, int64_t n, float top) {
  vec total = {0};
  int64_t t = 0;
  for (; t + WIDTH <= n; t += WIDTH) {
    vec e = vexp(load_f32(score + t) - top);
    *(vec *)(score + t) = e;
    total += e;
  }
#ifdef __AVX512F__
  if (t < n) {
    __mmask16 last = leading(n - t);
    __m512 e = (__m512)vexp((vec)_mm512_maskz_loadu_ps(last, score + t) - top);
    _mm512_mask_storeu_ps(score + t, last, e);
    total += (vec)_mm512_maskz_mov_ps(last, e);
  }
  return sum(total);
#else
  float rest = 0;
  for (; t < n; t++) rest += score[t] = expf(score[t] - top);
  return sum(total) + rest;
#endif
}

/* Attention of a row to all keys, out of that to `count` stretches of them, whose parts lie `apart`
 * floats from each other: the maximum of the scores, the sum of their exponentials against it, and
 * the values [Dv] weighted by these. */
static inline void join_parts(const float *parts, int64_t count, int64_t apart, float *to,
                              int64_t Dv) {
  float top = -INFINITY, total = 0;
  for (int64_t c = 0; c < count; c++) top = parts[c * apart] > top ? parts[c * apart] : top;
  memset(to, 0, Dv * sizeof *to);
  for (int64_t c = 0; c < count; c++) {
    const float *part = parts + c * apart;
    float weight = expf(part[0] - top);
    total += weight * part[1];
    for (int64_t i = 0; i < Dv; i++) to[i] += weight * part[2 + i];
  }
  for (int64_t i = 0; i < Dv; i++) to[i] /= total;
}

/* Writes a row of n floats to a cache of bfloat16 or of floats, as its elements `at` and on. */
static inline void store_row(const float *x, int64_t n, void *cache, int64_t at, int is_bf16) {
  if (!is_bf16) {
    memcpy((float *)cache + at, x, n * sizeof *x);
    return;
  }
  bf16 *to = (bf16 *)cache + at;
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store_bf16(to + i, load_f32(x + i));
  for (; i < n; i++) to[i] = to_bf16(x[i]);
}

/* For element type T. name_dots: score[r * CHUNK + t] = q[r] . key[t] of n keys and `rows` rows,
 * while the same tokens' values are asked of memory. name_mix: out[r] = sum of score[r][t] v[t].
 * Scores are made for 16 keys at a time and values summed in registers, 64 or 16 columns and up
 * to HEADS rows at a time; odd sizes go one by one. Every number is made in the same way wherever
 * its key stands among the n, and whatever the rows beside it. */
#define HEADS 4
#define TOGETHER(rows) ((rows) % 3 ? HEADS : 3) /* no odd one where it can be helped */
#define DENSE_AHEAD 32 /* keys that are asked of memory ahead of those scored */
static inline void fetch(const void *from, int64_t bytes) {
  /* Into the second cache, since the first can wait for far fewer lines at a time. */
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}
#define DENSE(name, T, load, scalar)                                                           \
  static inline __attribute__((always_inline)) void name##_scores(                             \
      const float *q, int64_t heads, int64_t D, const T *key, float *score, int64_t kept) {    \
    quad part[HEADS][WIDTH / 4];                                                               \
    _Pragma("GCC unroll 4") for (int t = 0; t < WIDTH / 4; t++) {                              \
      vec acc[HEADS][4];                                                                       \
      memset(acc, 0, sizeof acc);                                                              \
      for (int64_t i = 0; i < D; i += WIDTH)                                                   \
        for (int j = 0; j < 4; j++) {                                                          \
          vec k = load(key + (4 * t + j) * D + i);                                             \
          for (int64_t g = 0; g < heads; g++) acc[g][j] += load_f32(q + g * D + i) * k;        \
        }                                                                                      \
      for (int64_t g = 0; g < heads; g++) part[g][t] = fold(acc[g]);                           \
    }                                                                                          \
    for (int64_t g = 0; g < heads; g++) {                                                      \
      vec made = folded(part[g]);                                                              \
      memcpy(score + g * CHUNK, &made, kept * sizeof(float));                                  \
    }                                                                                          \
  }                                                                                            \
  static inline __attribute__((always_inline)) void name##_values(                             \
      const float *score, int64_t heads, int64_t n, int64_t Dv, int columns, const T *v,       \
      float *out, int64_t out_stride) {                                                        \
    vec acc[HEADS][4];                                                                         \
    memset(acc, 0, sizeof acc);                                                                \
    for (int64_t t = 0; t < n; t++)                                                            \
      for (int j = 0; j < columns; j++) {                                                      \
        vec value = load(v + t * Dv + j * WIDTH);                                              \
        for (int64_t g = 0; g < heads; g++) acc[g][j] += score[g * CHUNK + t] * value;         \
      }                                                                                        \
    for (int64_t g = 0; g < heads; g++)                                                        \
      for (int j = 0; j < columns; j++)                                                        \
        *(vec *)(out + g * out_stride + j * WIDTH) = acc[g][j];                                \
  }                                                                                            \
  static inline __attribute__((always_inline)) void name##_block(                              \
      const float *q, int64_t rows, int64_t D, const T *key, float *score, int64_t kept) {     \
    for (int64_t g = 0; g < rows; g += TOGETHER(rows)) {                                       \
      const float *query = q + g * D;                                                          \
      float *to = score + g * CHUNK;                                                           \
      switch (rows - g < TOGETHER(rows) ? rows - g : TOGETHER(rows)) {                         \
        case 1: name##_scores(query, 1, D, key, to, kept); break;                              \
        case 2: name##_scores(query, 2, D, key, to, kept); break;                              \
        case 3: name##_scores(query, 3, D, key, to, kept); break;                              \
        default: name##_scores(query, 4, D, key, to, kept);                                    \
      }                                                                                        \
    }                                                                                          \
  }                                                                                            \
  static inline void name##_dots(const float *q, int64_t rows, int64_t D, int64_t Dv,          \
                                 const T *keys, const T *values, int64_t n, float *score) {    \
    int64_t blocked = D % WIDTH ? 0 : n - n % WIDTH, rest = n - blocked;                       \
    fetch(keys, (n < DENSE_AHEAD ? n : DENSE_AHEAD) * D * sizeof(T));                          \
    for (int64_t t = 0; t < blocked; t += WIDTH) {                                             \
      const T *key = keys + t * D;                                                             \
      if (t + DENSE_AHEAD < n) fetch(key + DENSE_AHEAD * D, WIDTH * D * sizeof(T));            \
      fetch(values + t * Dv, WIDTH * Dv * sizeof(T));                                          \
      name##_block(q, rows, D, key, score + t, WIDTH);                                         \
    }                                                                                          \
    if (D % WIDTH == 0 && rest) { /* the last few, with others that do not count */            \
      T last[WIDTH * D];                                                                       \
      memset(last, 0, sizeof last);                                                            \
      memcpy(last, keys + blocked * D, rest * D * sizeof(T));                                  \
      name##_block(q, rows, D, last, score + blocked, rest);                                   \
      return;                                                                                  \
    }                                                                                          \
    for (int64_t t = blocked; t < n; t++)                                                      \
      for (int64_t g = 0; g < rows; g++) {                                                     \
        vec acc = {0};                                                                         \
        float dot = 0;                                                                         \
        int64_t i = 0;                                                                         \
        for (; i + WIDTH <= D; i += WIDTH)                                                     \
          acc += load_f32(q + g * D + i) * load(keys + t * D + i);                             \
        for (; i < D; i++) dot += q[g * D + i] * scalar(keys[t * D + i]);                      \
        score[g * CHUNK + t] = sum(acc) + dot;                                                 \
      }                                                                                        \
  }                                                                                            \
  static inline __attribute__((always_inline)) void name##_columns(                            \
      const float *score, int64_t heads, int64_t n, int64_t Dv, int columns, const T *v,       \
      float *out, int64_t stride) {                                                            \
    switch (heads) {                                                                           \
      case 1: name##_values(score, 1, n, Dv, columns, v, out, stride); break;                  \
      case 2: name##_values(score, 2, n, Dv, columns, v, out, stride); break;                  \
      case 3: name##_values(score, 3, n, Dv, columns, v, out, stride); break;                  \
      default: name##_values(score, 4, n, Dv, columns, v, out, stride);                        \
    }                                                                                          \
  }                                                                                            \
  static inline void name##_mix(const float *score, int64_t rows, int64_t n, int64_t Dv,       \
                                const T *values, float *to, int64_t stride) {                  \
    int64_t i = 0;                                                                             \
    while (i + WIDTH <= Dv) {                                                                  \
      int wide = i + 4 * WIDTH <= Dv;                                                          \
      for (int64_t g = 0; g < rows; g += TOGETHER(rows)) {                                     \
        int64_t now = rows - g < TOGETHER(rows) ? rows - g : TOGETHER(rows);                   \
        const float *weight = score + g * CHUNK;                                               \
        float *out = to + g * stride + i;                                                      \
        if (wide)                                                                              \
          name##_columns(weight, now, n, Dv, 4, values + i, out, stride);                      \
        else                                                                                   \
          name##_columns(weight, now, n, Dv, 1, values + i, out, stride);                      \
      }                                                                                        \
      i += wide ? 4 * WIDTH : WIDTH;                                                           \
    }                                                                                          \
    for (; i < Dv; i++)                                                                        \
      for (int64_t g = 0; g < rows; g++) {                                                     \
        float total = 0;                                                                       \
        const float *weight = score + g * CHUNK;                                               \
        for (int64_t t = 0; t < n; t++) total += weight[t] * scalar(values[t * Dv + i]);       \
        to[g * stride + i] = total;                                                            \
      }                                                                                        \
  }
DENSE(dense_f32, float, load_f32, SAME)
DENSE(dense_bf16, bf16, load_bf16, to_f32)

/* ---- kernels of native.c that others build on ------------------------------------------------ */

#define SHARED 4096 /* numbers from which on row-wise operators are faster on several threads */

void linear_few(const float *x, const bf16 *w, const float *bias, float *y, int64_t M, int64_t N,
                int64_t K, int threads);
void linear_bytes(const float *x, const uint8_t *w, const float *bias, float *y, int64_t M, int64_t N,
                  int64_t K, int threads);
void add_rms_norm(float *h, const void *delta, int delta_bf16, const float *weight, float eps,
                  void *out, int out_bf16, int64_t M, int64_t N, int threads);
void row_maxima(const float *x, int64_t M, int64_t N, float *value, int64_t *at, int threads);
void gated_mlp(const float *x, const bf16 *gate_up, const bf16 *down, float *y, float *room,
               int64_t M, int64_t N, int64_t K, int threads);
void silu_mul(const float *gate_up, float *out, int64_t M, int64_t N, int threads);
void norm_rotate(float *x, int64_t stride, int64_t heads, int64_t dim, const float *weight,
                 float eps, const float *cosine, const float *sine, int64_t M, int threads);

/* A codebook, see cache/codebook.py: vectors [n] that are multiples of entries, of keys turned by
 * some places. Pointers are null, or numbers 0, where there is nothing. */
typedef struct {
  void *entries;      /* [.., dim], like the dense keys */
  void *index;        /* [n], int32 if wide, else int16 */
  int64_t index_wide;
  void *ratio;        /* [n], like the entries */
  void *turns;        /* [n], int32 if wide, else int16 */
  int64_t turns_wide;
  int64_t n;
  const float *cosine, *sine; /* [places, dim / 2] */
} codes;

/* Where keys and values of some key heads of one sequence lie, in a layer. With codes it is one
 * head, and the first tokens are theirs; k and v begin behind them. */
typedef struct {
  void *k, *v;       /* [kv_heads, capacity, dim] */
  int64_t capacity;  /* tokens a head's rows are apart */
  int64_t stored;    /* tokens, this step's included */
  int64_t first_row; /* its first token row in q, k_new, v_new */
  int64_t rows;      /* its token rows */
  int64_t head;      /* the first of its key heads */
  int64_t kv_heads;  /* how many there are */
  int64_t window;    /* keys that a token sees, its own included; 0: all */
  codes k_codes, v_codes;
  const uint16_t *seen; /* which query heads see each of the first seen_n tokens */
  int64_t seen_n;
} place;

int append_attend(const place *const *places, int64_t count, const float *q, int64_t q_stride,
                  const float *k_new, int64_t k_stride, const float *v_new, int64_t v_stride,
                  float *out, int64_t heads, int64_t kv_heads, int64_t D, int64_t Dv, float scale,
                  int is_bf16, int threads);
typedef struct packed_place packed_place; /* packed.c */
int attend_packed(const packed_place *const *places, int64_t sequences, const float *q,
                  int64_t q_stride, const float *k_new, int64_t k_stride, const float *v_new,
                  int64_t v_stride, float *out, int64_t heads, int64_t kv_heads, int64_t D,
                  int64_t Dv, float scale, int is_bf16, int exact, int threads);
