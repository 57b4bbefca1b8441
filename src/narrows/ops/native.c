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

/* ---- small row-wise operators -------------------------------------------------------------- */

/* h += delta (if given); out = h / rms(h) * weight */
void add_rms_norm(float *h, const float *delta, const float *weight, float eps, float *out,
                  int64_t M, int64_t N, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (M * N > 32768)
  for (int64_t m = 0; m < M; m++) {
    float *row = h + m * N, *to = out + m * N, squares = 0;
    if (delta)
      for (int64_t i = 0; i < N; i++) row[i] += delta[m * N + i];
    for (int64_t i = 0; i < N; i++) squares += row[i] * row[i];
    float scale = 1.0f / sqrtf(squares / (float)N + eps);
    for (int64_t i = 0; i < N; i++) to[i] = row[i] * scale * weight[i];
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

/* out[m,i] = silu(gate[m,i]) * up[m,i], gate and up side by side in one row */
void silu_mul(const float *gate_up, float *out, int64_t M, int64_t N, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (M * N > 32768)
  for (int64_t m = 0; m < M; m++) {
    const float *gate = gate_up + 2 * m * N, *up = gate + N;
    for (int64_t i = 0; i < N; i++) out[m * N + i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
  }
}

/* ---- ragged attention of a few newest tokens a sequence ------------------------------------ */

#define CHUNK 256    /* keys scored by one task; long contexts are split over threads */
#define MAX_GROUP 16 /* query heads that share a key head */

/* One query row and key head, keys [first, stop): running maximum, sum, and weighted values. */
#define ATTEND(name, T, load, scalar)                                                          \
  static void name(const float *q, int64_t group, int64_t D, int64_t Dv, const T *k,           \
                   const T *v, int64_t first, int64_t stop, float scale, float *part) {        \
    float score[MAX_GROUP][CHUNK];                                                             \
    int64_t n = stop - first;                                                                  \
    for (int64_t t = 0; t < n; t++) {                                                          \
      const T *key = k + (first + t) * D;                                                      \
      for (int64_t g = 0; g < group; g++) {                                                    \
        vec acc = {0};                                                                         \
        int64_t i = 0;                                                                         \
        for (; i + WIDTH <= D; i += WIDTH) acc += load_f32(q + g * D + i) * load(key + i);     \
        float dot = sum(acc);                                                                  \
        for (; i < D; i++) dot += q[g * D + i] * scalar(key[i]);                               \
        score[g][t] = dot * scale;                                                             \
      }                                                                                        \
    }                                                                                          \
    for (int64_t g = 0; g < group; g++) {                                                      \
      float top = -INFINITY, total = 0, *out = part + g * (Dv + 2) + 2;                        \
      for (int64_t t = 0; t < n; t++) top = score[g][t] > top ? score[g][t] : top;             \
      for (int64_t t = 0; t < n; t++) score[g][t] = expf(score[g][t] - top);                   \
      for (int64_t t = 0; t < n; t++) total += score[g][t];                                    \
      for (int64_t i = 0; i < Dv; i++) out[i] = 0;                                             \
      out[-2] = top;                                                                           \
      out[-1] = total;                                                                         \
    }                                                                                          \
    for (int64_t t = 0; t < n; t++) {                                                          \
      const T *value = v + (first + t) * Dv;                                                   \
      for (int64_t g = 0; g < group; g++) {                                                    \
        float *out = part + g * (Dv + 2) + 2, p = score[g][t];                                 \
        int64_t i = 0;                                                                         \
        for (; i + WIDTH <= Dv; i += WIDTH) *(vec *)(out + i) += p * load(value + i);          \
        for (; i < Dv; i++) out[i] += p * scalar(value[i]);                                    \
      }                                                                                        \
    }                                                                                          \
  }
#define SAME(x) (x)
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
