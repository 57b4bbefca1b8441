/* Attention of a few newest tokens to keys and values kept as packed codes. Layout and arithmetic
 * are those of ops/quant.py, the definition is attend_torch in ops/packed.py.
 *
 * A line holds 64 codes: 16 places of the axis that is kept (tokens of keys, channels of values),
 * 4 neighbours each of the axis that is summed over. Scores sum over channels and outputs over
 * tokens, so that both are one product of lines and coefficients (query times key scale, softmax
 * weight times value scale), made in two ways:
 *   floats  float32 on any machine;
 *   int8    products of codes and coefficients split in two int8 parts, which keep 16 bits of the
 *           row's greatest: in vector registers for few rows, in AMX tiles, where a line is a tile
 *           row as it stands, for more.
 * The zero points' share is added outside: one number a key group, one a token for values. */
#include "tiles.h"
#include "vector.h"

#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
#define ROWS 64 /* query rows (tokens times query heads of one key head) of one task */
#define DIM 256 /* greatest head size; also the coefficients a product sums over at most */
#define LANES 16
#define LINE 64
#define KEYS_AHEAD 8    /* blocks of 16 keys, and */
#define VALUES_AHEAD 16 /* quads of values, that are asked of memory ahead of their use */

/* ---- scales and zero points ---------------------------------------------------------------- */

enum { FLOAT32, FLOAT16, BFLOAT16, CODED8, CODED4 };
typedef struct {
  const void *data; /* [kv_heads, n, m] */
  int64_t head;     /* elements (bytes of CODED) the heads are apart */
  int64_t kind;
  const uint16_t *step, *low; /* CODED: low + code * step, float16 [kv_heads, blocks] */
  int64_t block_head, size;   /* elements the heads of these are apart; numbers a block */
} numbers;

static inline float half_to_f32(uint16_t x) {
  uint32_t bits = (uint32_t)(x & 0x7fffu) << 13, sign = (uint32_t)(x & 0x8000u) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  out *= 0x1p112f; /* the exponent's offset, for subnormal numbers too */
  memcpy(&bits, &out, sizeof out);
  if ((x & 0x7c00u) == 0x7c00u) bits = 0x7f800000u | bits; /* infinity and NaN */
  bits |= sign;
  memcpy(&out, &bits, sizeof out);
  return out;
}

/* n elements of a head, the first at `first`, each `step` behind the one before. */
static void widen(const numbers *x, int64_t head, int64_t first, int64_t n, int64_t step,
                  float *out) {
  int64_t at = head * x->head + first, i = 0;
  const float *full = (const float *)x->data + at;
  const uint16_t *half = (const uint16_t *)x->data + at;
  switch (x->kind) {
    case FLOAT32:
      for (; i < n; i++) out[i] = full[i * step];
      break;
    case BFLOAT16:
      for (; step == 1 && i + WIDTH <= n; i += WIDTH) *(vec *)(out + i) = load_bf16(half + i);
      for (; i < n; i++) out[i] = to_f32(half[i * step]);
      break;
    case FLOAT16:
#ifdef __AVX512F__
      for (; step == 1 && i + WIDTH <= n; i += WIDTH)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(half + i))));
#endif
      for (; i < n; i++) out[i] = half_to_f32(half[i * step]);
      break;
    default:
      for (; i < n; i++) {
        const uint8_t *codes = (const uint8_t *)x->data + head * x->head;
        int64_t which = first + i * step, block = head * x->block_head + which / x->size;
        int code = x->kind == CODED8 ? codes[which] : codes[which / 2] >> (which % 2 * 4) & 15;
        out[i] = half_to_f32(x->low[block]) + (float)code * half_to_f32(x->step[block]);
      }
  }
}

static inline float dot(const float *a, const float *b, int64_t n) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += a[i] * b[i];
  return total;
}

/* ---- lines times coefficients -------------------------------------------------------------- */

/* Lines of quad k and block b stand at codes + k * quad + b * block (bytes). */
typedef struct {
  const uint8_t *codes;
  int64_t bits, quad, block;
  int64_t ahead; /* bytes from a line to the one that is needed some time later */
} lines;

/* The four codes of each of WIDTH places of a line, side by side in the low bits of 32; `part` 0
 * are the first places. */
INLINE uvec places(const uint8_t *line, int bits, int part) {
  uvec out;
#ifdef __AVX512F__
  __m512i wide;
  if (bits == 8) wide = _mm512_loadu_si512(line);
  if (bits == 4) wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)line));
  if (bits == 2) wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)line));
  if (bits == 1) { /* a byte is two places: the low four bits, the high four bits */
    int64_t all;
    memcpy(&all, line, sizeof all);
    __m512i byte = _mm512_srlv_epi64(_mm512_set1_epi64(all),
                                     _mm512_set_epi64(56, 48, 40, 32, 24, 16, 8, 0));
    __m512i high = _mm512_slli_epi64(_mm512_and_si512(byte, _mm512_set1_epi64(0xf0)), 28);
    wide = _mm512_or_si512(_mm512_and_si512(byte, _mm512_set1_epi64(0x0f)), high);
  }
  memcpy(&out, &wide, sizeof out);
  (void)part;
#else
  typedef uint8_t bvec __attribute__((vector_size(WIDTH), aligned(1)));
  line += WIDTH * bits / 2 * part;
  if (bits == 8) memcpy(&out, line, sizeof out);
  if (bits == 4) out = __builtin_convertvector(*(const hvec *)line, uvec);
  if (bits == 2) out = __builtin_convertvector(*(const bvec *)line, uvec);
  if (bits == 1) {
    uint32_t all = 0;
    uvec shift;
    memcpy(&all, line, WIDTH / 2);
    for (int i = 0; i < WIDTH; i++) shift[i] = 4 * i;
    out = ((uvec){0} + all) >> shift & 15;
  }
#endif
  return out;
}

#define PARTS (LANES / WIDTH)
#define SOME (WIDTH == 16 ? 4 : 1) /* blocks at once, as many as there are registers for */
INLINE void floats_of(lines x, int bits, int64_t quads, int blocks, const float *coef, int rows,
                      float *out, int64_t stride) {
  vec acc[4][SOME * PARTS];
  memset(acc, 0, sizeof acc);
  for (int64_t k = 0; k < quads; k++)
    for (int b = 0; b < blocks; b++)
      for (int p = 0; p < PARTS; p++) {
        uvec four = places(x.codes + k * x.quad + b * x.block, bits, p);
        for (int j = 0; j < 4; j++) {
          ivec code = (ivec)(four >> (bits * j) & ((1u << bits) - 1));
          vec value = __builtin_convertvector(code, vec);
          for (int r = 0; r < rows; r++)
            acc[r][b * PARTS + p] += coef[r * DIM + 4 * k + j] * value;
        }
      }
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < blocks * PARTS; i++) *(vec *)(out + r * stride + WIDTH * i) = acc[r][i];
}

#define CASES(BITS, N) CASE(BITS, N, 1) CASE(BITS, N, 2) CASE(BITS, N, 3) CASE(BITS, N, 4)

/* out[r][16 b + i] = sum over k < quads and j < 4 of coef[r][4 k + j] * code j of place i of the
 * line (k, b). Rows of coef are DIM floats apart and zero up to a multiple of LINE. */
static void floats(lines x, int64_t quads, int64_t blocks, const float *coef, int64_t rows,
                   float *out, int64_t stride) {
  const uint8_t *start = x.codes;
  for (int64_t b = 0; b < blocks;) {
    int64_t some = blocks - b < SOME ? 1 : SOME;
    x.codes = start + b * x.block;
    for (int64_t r = 0; r < rows; r += 4) {
      const float *c = coef + r * DIM;
      float *to = out + r * stride + LANES * b;
      int64_t few = rows - r < 4 ? rows - r : 4;
#define CASE(BITS, N, R)                                       \
  case BITS * 64 + N * 8 + R:                                  \
    floats_of(x, BITS, quads, N, c, R, to, stride);            \
    break;
      switch (x.bits * 64 + some * 8 + few) {
        CASES(1, 1) CASES(2, 1) CASES(4, 1) CASES(8, 1)
#if WIDTH == 16
        CASES(1, 4) CASES(2, 4) CASES(4, 4) CASES(8, 4)
#endif
      }
#undef CASE
    }
    b += some;
  }
}

#if defined __AVX512VNNI__ && defined __AVX512VBMI__
#define INT8
#define BLOCKS 4 /* of 16 kept places, in a tile of sums each */
#define TILE_X 8 /* rows of coefficients in one tile: a high and a low part each */

typedef struct {
  int8_t parts[2 * ROWS][DIM], codes[DIM / 16 * DIM / 4 + TILE_ROWS][LINE];
  int32_t sums[BLOCKS][TILE_ROWS][16];
  float step[ROWS];
} __attribute__((aligned(64))) int8_room;

/* A line's codes as 64 bytes. */
INLINE __m512i bytes(const uint8_t *line, int bits) {
  __m512i wide, from = _mm512_set1_epi64(0x0706050403020100 * bits);
  if (bits == 8) return _mm512_loadu_si512(line);
  if (bits == 4) wide = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const void *)line));
  if (bits == 2) wide = _mm512_cvtepu16_epi64(_mm_loadu_si128((const void *)line));
  if (bits == 1) {
    uint64_t all;
    memcpy(&all, line, sizeof all);
    return _mm512_maskz_set1_epi8(all, 1);
  }
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(from, wide),
                          _mm512_set1_epi8((1 << bits) - 1));
}

/* Splits n coefficients into high * 256 + low times the returned step. What is not finite makes the
 * step NaN. */
static float split(const float *x, int64_t n, int8_t *high, int8_t *low) {
  const __m512i size = _mm512_set1_epi32(0x7fffffff); /* sizes are ordered as their bits are */
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += WIDTH)
    most = _mm512_max_epi32(most, _mm512_and_si512(size, _mm512_loadu_si512(x + i)));
  int32_t bits = _mm512_reduce_max_epi32(most);
  float top, step;
  memcpy(&top, &bits, sizeof top);
  step = isfinite(top) ? top / 32512.0f : NAN;
  __m512 scale = _mm512_set1_ps(top > 1e-30f ? 32512.0f / top : 0.0f);
  for (int64_t i = 0; i < n; i += WIDTH) {
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale));
    __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128((void *)(low + i), _mm512_cvtepi32_epi8(v));
    _mm_storeu_si128((void *)(high + i), _mm512_cvtepi32_epi8(h));
  }
  return step;
}

/* Sums of high and low parts, as a number. At most 255 * 32512 * DIM: it fits 32 bits. */
INLINE vec joined(__m512i high, __m512i low, float step) {
  __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  return (vec)_mm512_mul_ps(sum, _mm512_set1_ps(step));
}

#define PAIR 2 /* blocks at once, and */
#define FEW 4  /* rows */
INLINE void direct_of(lines x, int bits, int64_t quads, int blocks, const int8_room *room,
                      int64_t first, int rows, float *out, int64_t stride) {
  __m512i acc[FEW][PAIR][2];
  memset(acc, 0, sizeof acc);
  for (int64_t k = 0; k < quads; k++) {
    __m512i code[PAIR];
    for (int b = 0; b < blocks; b++) {
      const uint8_t *line = x.codes + k * x.quad + b * x.block;
      _mm_prefetch((const void *)(line + x.ahead), _MM_HINT_T0);
      code[b] = bytes(line, bits);
    }
    for (int r = 0; r < rows; r++)
      for (int part = 0; part < 2; part++) {
        int32_t four;
        memcpy(&four, room->parts[2 * (first + r) + part] + 4 * k, sizeof four);
        __m512i all = _mm512_set1_epi32(four);
        for (int b = 0; b < blocks; b++)
          acc[r][b][part] = _mm512_dpbusd_epi32(acc[r][b][part], code[b], all);
      }
  }
  for (int r = 0; r < rows; r++)
    for (int b = 0; b < blocks; b++)
      *(vec *)(out + r * stride + WIDTH * b) =
          joined(acc[r][b][0], acc[r][b][1], room->step[first + r]);
}

/* As floats, of coefficients in parts, in vector registers. */
static void direct(lines x, int64_t quads, int64_t blocks, int64_t rows, float *out,
                   int64_t stride, const int8_room *room) {
  const uint8_t *start = x.codes;
  for (int64_t b = 0; b < blocks;) {
    int64_t some = blocks - b < PAIR ? 1 : PAIR;
    x.codes = start + b * x.block;
    for (int64_t r = 0; r < rows; r += FEW) {
      float *to = out + r * stride + LANES * b;
      int64_t few = rows - r < FEW ? rows - r : FEW;
#define CASE(BITS, N, R)                                       \
  case BITS * 64 + N * 8 + R:                                  \
    direct_of(x, BITS, quads, N, room, r, R, to, stride);      \
    break;
      switch (x.bits * 64 + some * 8 + few) {
        CASES(1, 1) CASES(2, 1) CASES(4, 1) CASES(8, 1)
        CASES(1, PAIR) CASES(2, PAIR) CASES(4, PAIR) CASES(8, PAIR)
      }
#undef CASE
    }
    b += some;
  }
}

#ifdef TILES
/* Whether a task of so many rows is one for tiles. */
static int tiled(int64_t rows, int exact) { return !exact && rows > FEW && amx_ready(); }

INLINE void unpack(lines x, int bits, int64_t quads, int64_t blocks, int8_room *room) {
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t k = 0; k < quads; k++)
      _mm512_store_si512(room->codes[b * quads + k],
                         bytes(x.codes + k * x.quad + b * x.block, bits));
}

/* As direct, in tiles. All lines are unpacked before the first is used, since a tile cannot be
 * loaded before what was stored there has left the store buffer. */
static void tiles(lines x, int64_t quads, int64_t blocks, int64_t rows, float *out, int64_t stride,
                  int8_room *room) {
  switch (x.bits) {
    case 1: unpack(x, 1, quads, blocks, room); break;
    case 2: unpack(x, 2, quads, blocks, room); break;
    case 4: unpack(x, 4, quads, blocks, room); break;
    default: unpack(x, 8, quads, blocks, room);
  }
  for (int64_t b = 0; b < blocks; b += BLOCKS) {
    int some = blocks - b < BLOCKS ? blocks - b : BLOCKS;
    const int8_t *codes = room->codes[b * quads];
    int64_t next = quads * LINE; /* from block to block */
    for (int64_t r = 0; r < rows; r += TILE_X) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < quads; k += TILE_ROWS) {
        _tile_loadd(4, room->parts[2 * r] + 4 * k, DIM);
        _tile_loadd(5, codes + k * LINE, LINE);
        _tile_dpbsud(0, 4, 5);
        if (some > 1) {
          _tile_loadd(6, codes + k * LINE + next, LINE);
          _tile_dpbsud(1, 4, 6);
        }
        if (some > 2) {
          _tile_loadd(5, codes + k * LINE + 2 * next, LINE);
          _tile_dpbsud(2, 4, 5);
        }
        if (some > 3) {
          _tile_loadd(6, codes + k * LINE + 3 * next, LINE);
          _tile_dpbsud(3, 4, 6);
        }
      }
      _tile_stored(0, room->sums[0], 64);
      if (some > 1) _tile_stored(1, room->sums[1], 64);
      if (some > 2) _tile_stored(2, room->sums[2], 64);
      if (some > 3) _tile_stored(3, room->sums[3], 64);
      for (int64_t i = 0; i < TILE_X && r + i < rows; i++)
        for (int c = 0; c < some; c++)
          *(vec *)(out + (r + i) * stride + WIDTH * (b + c)) =
              joined(_mm512_load_si512(room->sums[c][2 * i]),
                     _mm512_load_si512(room->sums[c][2 * i + 1]), room->step[r + i]);
    }
  }
}
#endif
#endif

/* ---- one task: some rows, one key head, at most CHUNK tokens ------------------------------- */

/* Keys or values of one layer: `sink` dense tokens, then `tokens` packed ones, then a dense tail.
 * Without codes the packed tokens are their zero points alone. */
typedef struct {
  const uint8_t *codes;
  int64_t head, bits, tokens, group; /* head in bytes; group of tokens (keys), channels (values) */
  numbers scale, zero;
  const void *sink;
  void *tail;
  int64_t sink_head, tail_head; /* elements */
} side;
struct packed_place {
  side key, value;
  int64_t sink, length, first_row, rows;
};

typedef struct {
  float query[ROWS * DIM], coef[ROWS][DIM], score[ROWS][CHUNK], sum[ROWS][DIM];
  float scale[DIM], zero[DIM];
#ifdef INT8
  int8_room int8;
#endif
} room;

/* Of the coefficients in w. Unpacking is about a fifth of the whole kernel's time (2 bit keys, 1
 * bit values, 3 query heads a key head): an owner and a borrower of the same value codes could
 * save a tenth of the borrower's, too little to keep codes unpacked between layers. */
static void product(lines x, int64_t quads, int64_t blocks, int64_t rows, float *out,
                    int64_t stride, int exact, room *w) {
#ifdef INT8
  if (!exact) {
    int8_room *int8 = &w->int8;
    int64_t size = (4 * quads + LINE - 1) / LINE * LINE;
    for (int64_t r = 0; r < rows; r++)
      int8->step[r] = split(w->coef[r], size, int8->parts[2 * r], int8->parts[2 * r + 1]);
#ifdef TILES
    if (tiled(rows, exact)) return tiles(x, quads, blocks, rows, out, stride, int8);
#endif
    return direct(x, quads, blocks, rows, out, stride, int8);
  }
#endif
  (void)exact;
  floats(x, quads, blocks, w->coef[0], rows, out, stride);
}

/* score[r][t] = query[r] . key of packed tokens [from, to), multiples of 16; D of 4 */
static void packed_scores(const side *k, int64_t h, int64_t from, int64_t to, int64_t rows,
                          int64_t D, float *score, int exact, room *w) {
  while (from < to) {
    int64_t j = from / k->group, stop = (j + 1) * k->group < to ? (j + 1) * k->group : to;
    int64_t n = stop - from, line = k->bits * LINE / 8, quads = D / 4;
    widen(&k->zero, h, j * D, D, 1, w->zero);
    if (k->codes) {
      widen(&k->scale, h, j * D, D, 1, w->scale);
      for (int64_t r = 0; r < rows; r++) {
        const float *q = w->query + r * D;
        for (int64_t d = 0; d < D; d++) w->coef[r][d] = q[d] * w->scale[d];
        for (int64_t d = D; d % LINE; d++) w->coef[r][d] = 0;
      }
      lines x = {k->codes + h * k->head + from / 16 * quads * line, k->bits, line, quads * line,
                 KEYS_AHEAD * quads * line};
      product(x, quads, n / 16, rows, score, CHUNK, exact, w);
    }
    for (int64_t r = 0; r < rows; r++) {
      float *to_row = score + r * CHUNK, base = dot(w->query + r * D, w->zero, D);
      if (k->codes)
        for (int64_t t = 0; t < n; t++) to_row[t] += base;
      else
        for (int64_t t = 0; t < n; t++) to_row[t] = base;
    }
    score += n;
    from = stop;
  }
}

/* out[r] += sum of weight[r][t] * value of packed tokens [from, from + n), from a multiple of 4,
 * groups of 16 */
static void packed_mix(const side *v, int64_t h, int64_t from, int64_t n, int64_t rows, int64_t Dv,
                       const float *weight, float *out, int64_t stride, int exact, room *w) {
  int64_t groups = Dv / v->group, quads = (n + 3) / 4, line = v->bits * LINE / 8;
  for (int64_t c = 0; c < groups; c++) {
    int64_t first = c * v->group, quad = Dv / 16 * line;
    widen(&v->zero, h, from * groups + c, n, groups, w->zero);
    if (v->codes) {
      widen(&v->scale, h, from * groups + c, n, groups, w->scale);
      for (int64_t r = 0; r < rows; r++) {
        const float *p = weight + r * CHUNK;
        for (int64_t t = 0; t < n; t++) w->coef[r][t] = p[t] * w->scale[t];
        for (int64_t t = n; t % LINE; t++) w->coef[r][t] = 0;
      }
      lines x = {v->codes + h * v->head + from / 4 * quad + first / 16 * line, v->bits, quad, line,
                 VALUES_AHEAD * quad};
      product(x, quads, v->group / 16, rows, w->sum[0], DIM, exact, w);
    }
    for (int64_t r = 0; r < rows; r++) {
      float *to = out + r * stride + first, base = dot(weight + r * CHUNK, w->zero, n);
      if (v->codes)
        for (int64_t i = 0; i < v->group; i++) to[i] += base + w->sum[r][i];
      else
        for (int64_t i = 0; i < v->group; i++) to[i] += base;
    }
  }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t clamp(int64_t x, int64_t a, int64_t b) { return x < a ? a : least(x, b); }

typedef struct {
  int64_t place, head, row, rows, first, stop; /* token rows; tokens [first, stop) */
  float *part;                                 /* for each query row: maximum, sum, values */
} task;

/* score[r][t - a] = query[r] . key[t] of tokens [a, b) */
static void scores(const packed_place *p, int64_t h, int64_t a, int64_t b, int64_t rows, int64_t D,
                   int is_bf16, int exact, room *w) {
  const side *k = &p->key;
  int64_t edge = p->sink + k->tokens, first = clamp(p->sink, a, b), tail = clamp(edge, a, b);
  float *score = w->score[0];
#define DENSE_SCORES(base, at, n, to)                                                    \
  if (is_bf16)                                                                           \
    dense_bf16_dots(w->query, rows, D, D, (const bf16 *)(base) + (at), base, n, to);     \
  else                                                                                   \
    dense_f32_dots(w->query, rows, D, D, (const float *)(base) + (at), base, n, to);
  if (a < first) {
    DENSE_SCORES(k->sink, h * k->sink_head + a * D, first - a, score)
  }
  if (first < tail)
    packed_scores(k, h, first - p->sink, tail - p->sink, rows, D, score + first - a, exact, w);
  if (tail < b) {
    DENSE_SCORES(k->tail, h * k->tail_head + (tail - edge) * D, b - tail, score + tail - a)
  }
}

/* out[r] = sum of score[r][t - a] * value[t] of tokens [a, b) */
static void mix(const packed_place *p, int64_t h, int64_t a, int64_t b, int64_t rows, int64_t Dv,
                float *out, int64_t stride, int is_bf16, int exact, room *w) {
  const side *v = &p->value;
  int64_t edge = p->sink + v->tokens, first = clamp(p->sink, a, b), tail = clamp(edge, a, b);
  const float *weight = w->score[0];
  for (int64_t r = 0; r < rows; r++) memset(out + r * stride, 0, Dv * sizeof *out);
  for (int part = 0; part < 2; part++) {
    int64_t from = part ? tail : a, n = (part ? b : first) - from;
    const void *base = part ? v->tail : v->sink;
    int64_t at = part ? h * v->tail_head + (tail - edge) * Dv : h * v->sink_head + a * Dv;
    if (n == 0) continue;
    if (is_bf16)
      dense_bf16_mix(weight + from - a, rows, n, Dv, (const bf16 *)base + at, w->sum[0], DIM);
    else
      dense_f32_mix(weight + from - a, rows, n, Dv, (const float *)base + at, w->sum[0], DIM);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < Dv; i++) out[r * stride + i] += w->sum[r][i];
  }
  if (first < tail)
    packed_mix(v, h, first - p->sink, tail - first, rows, Dv, weight + first - a, out, stride,
               exact, w);
}

/* Asks memory for packed tokens [from, from + n), if they are that: codes, and scales and zeros of
 * two bytes. */
static void ask_values(const side *v, int64_t h, int64_t from, int64_t n, int64_t Dv) {
  int64_t quad = Dv / 16 * v->bits * LINE / 8, groups = Dv / v->group;
  if (from < 0 || from + n > v->tokens || !v->codes) return;
  fetch(v->codes + h * v->head + from / 4 * quad, n / 4 * quad);
  fetch((const uint16_t *)v->scale.data + h * v->scale.head + from * groups, 2 * n * groups);
  fetch((const uint16_t *)v->zero.data + h * v->zero.head + from * groups, 2 * n * groups);
}

static void run(const packed_place *p, const task *t, const float *q, int64_t q_stride,
                int64_t group, int64_t D, int64_t Dv, float scale, int is_bf16, int exact,
                room *w) {
  int64_t n = t->stop - t->first, rows = t->rows * group, stride = Dv + 2;
#ifdef TILES
  if (tiled(rows, exact)) tiles_on(BLOCKS + 1, rows < TILE_X ? 2 * rows : TILE_ROWS);
#endif
  for (int64_t r = 0; r < rows; r++) {
    int64_t row = p->first_row + t->row + r / group;
    const float *from = q + row * q_stride + (t->head * group + r % group) * D;
    for (int64_t d = 0; d < D; d++) w->query[r * D + d] = from[d] * scale;
  }
  ask_values(&p->value, t->head, t->first - p->sink, n, Dv);
  scores(p, t->head, t->first, t->stop, rows, D, is_bf16, exact, w);
  for (int64_t r = 0; r < rows; r++) {
    int64_t seen = p->length - p->rows + t->row + r / group + 1; /* tokens this row may see */
    float *score = w->score[r], *part = t->part + r * stride;
    seen = clamp(seen - t->first, 0, n);
    part[0] = greatest(score, seen);
    part[1] = exponentials(score, seen, part[0]);
    for (int64_t i = seen; i < n; i++) score[i] = 0;
  }
  mix(p, t->head, t->first, t->stop, rows, Dv, t->part + 2, stride, is_bf16, exact, w);
}

/* Joins the parts of one head's rows, `count` tasks over disjoint tokens. */
static void join(const packed_place *p, const task *t, int64_t count, float *out, int64_t heads,
                 int64_t group, int64_t Dv) {
  int64_t rows = t->rows * group, stride = Dv + 2;
  for (int64_t r = 0; r < rows; r++) {
    int64_t at = (p->first_row + t->row + r / group) * heads + t->head * group + r % group;
    join_parts(t->part + r * stride, count, rows * stride, out + at * Dv, Dv);
  }
}

/* Whether products in int8 were compiled in. */
int packed_int8(void) {
#ifdef INT8
  return 1;
#endif
  return 0;
}

/* Causal attention of the newest `rows` tokens of each place. Rows of q are q_stride floats apart;
 * so are those of k_new and v_new, which are first written to the ends of the tails (null: they
 * stand there); out is [T, heads, Dv]. All packed tokens and the sink must be visible to all rows.
 * `exact` keeps float32's precision. Returns 0, or -1 if there was no memory. */
int attend_packed(const packed_place *const *places, int64_t sequences, const float *q,
                  int64_t q_stride, const float *k_new, int64_t k_stride, const float *v_new,
                  int64_t v_stride, float *out, int64_t heads, int64_t kv_heads, int64_t D,
                  int64_t Dv, float scale, int is_bf16, int exact, int threads) {
  int64_t group = heads / kv_heads, few = ROWS / group, count = 0, units = 0, floats = 0;
  exact |= !packed_int8();
  for (int64_t s = 0; s < sequences; s++) {
    const packed_place *p = places[s];
    int64_t chunks = (p->sink + CHUNK - 1) / CHUNK + (p->length - p->sink + CHUNK - 1) / CHUNK;
    int64_t blocks = (p->rows + few - 1) / few * kv_heads;
    count += chunks * blocks;
    units += blocks;
    floats += chunks * p->rows * heads * (Dv + 2);
    int64_t first = p->length - p->rows - p->sink;
    for (int64_t h = 0; h < kv_heads && k_new; h++)
      for (int64_t r = 0; r < p->rows; r++) {
        const side *k = &p->key, *v = &p->value;
        int64_t row = p->first_row + r;
        store_row(k_new + row * k_stride + h * D, D, k->tail,
                  h * k->tail_head + (first + r - k->tokens) * D, is_bf16);
        store_row(v_new + row * v_stride + h * Dv, Dv, v->tail,
                  h * v->tail_head + (first + r - v->tokens) * Dv, is_bf16);
      }
  }
  task *tasks = malloc(count * sizeof *tasks), **unit = malloc((units + 1) * sizeof *unit);
  float *parts = malloc(floats * sizeof *parts), *part = parts;
  int done = tasks && unit && parts ? 0 : -1;
  task *t = tasks;
  units = 0;
  for (int64_t s = 0; s < sequences && done == 0; s++) {
    const packed_place *p = places[s];
    for (int64_t row = 0; row < p->rows; row += few)
      for (int64_t h = 0; h < kv_heads; h++) {
        int64_t rows = least(few, p->rows - row), a = 0;
        unit[units++] = t;
        while (a < p->length) {
          int64_t b = least(a + CHUNK, a < p->sink ? p->sink : p->length);
          *t++ = (task){s, h, row, rows, a, b, part};
          part += rows * group * (Dv + 2);
          a = b;
        }
      }
  }
  if (done == 0) {
    unit[units] = t;
#pragma omp parallel num_threads(threads)
    {
      room w;
      /* Guided: a thread goes on with the next stretch, which it has asked for. */
#pragma omp for schedule(guided)
      for (int64_t i = 0; i < count; i++)
        run(places[tasks[i].place], tasks + i, q, q_stride, group, D, Dv, scale, is_bf16, exact,
            &w);
#pragma omp for schedule(static)
      for (int64_t u = 0; u < units; u++)
        join(places[unit[u]->place], unit[u], unit[u + 1] - unit[u], out, heads, group, Dv);
#ifdef TILES
      if (!exact && amx_ready()) _tile_release();
#endif
    }
  }
  free(tasks);
  free(unit);
  free(parts);
  return done;
}
