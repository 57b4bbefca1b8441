/* The likeness graph of some vectors and its greedy cover: see ops/cover.py for the definitions. */
#include "vector.h"

#define COLUMNS (4 * WIDTH)
#define ROWS 6 /* of a tile, the sums of which are held in registers */

/* Which of the numbers of v are above x, a bit each. */
static inline uint32_t above(vec v, float x) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(x), _CMP_GT_OQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < WIDTH; i++) bits |= (uint32_t)(v[i] > x) << i;
  return bits;
#endif
}

/* Floats of room that a product with n vectors needs. */
int64_t likeness_room(int64_t n, int64_t dim) {
  return dim * ((n + COLUMNS - 1) / COLUMNS * COLUMNS);
}

/* Vectors [n, dim] as columns of `to`, COLUMNS together; those that fill up the last are zeros. */
static void pack(const float *x, int64_t n, int64_t dim, float *to) {
#pragma omp for schedule(static)
  for (int64_t c = 0; c < n; c += COLUMNS)
    for (int64_t i = 0; i < dim; i++)
      for (int64_t t = 0; t < COLUMNS; t++)
        to[c * dim + i * COLUMNS + t] = c + t < n ? x[(c + t) * dim + i] : 0;
}

/* sums[r][j * WIDTH + t] = rows[r] . column j * WIDTH + t; of fewer rows the last counts again. */
static inline void tile(const float *rows, int64_t count, int64_t dim, const float *columns,
                        vec sums[ROWS][4]) {
  const float *row[ROWS];
  for (int r = 0; r < ROWS; r++) row[r] = rows + (r < count ? r : count - 1) * dim;
  vec acc[ROWS][4];
  memset(acc, 0, sizeof acc);
  for (int64_t i = 0; i < dim; i++, columns += COLUMNS) {
    vec column[4];
    for (int j = 0; j < 4; j++) column[j] = load_f32(columns + j * WIDTH);
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < 4; j++) acc[r][j] += row[r][i] * column[j];
  }
  memcpy(sums, acc, sizeof acc);
}

/* unit [n, dim] -> graph [n, n] bytes: 1 where the product of two is above the threshold, and of
 * every vector with itself. */
void likeness(const float *unit, int64_t n, int64_t dim, float threshold, float *room,
              uint8_t *graph, int threads) {
  memset(graph, 0, n * n);
#pragma omp parallel num_threads(threads)
  {
    pack(unit, n, dim, room);
#pragma omp for schedule(dynamic, 8)
    for (int64_t a = 0; a < n; a += ROWS) {
      int64_t count = n - a < ROWS ? n - a : ROWS;
      for (int64_t c = a - a % COLUMNS; c < n; c += COLUMNS) { /* the other half mirrors this */
        vec sums[ROWS][4];
        tile(unit + a * dim, count, dim, room + c * dim, sums);
        for (int64_t r = 0; r < count; r++)
          for (int j = 0; j < 4; j++)
            for (uint32_t bits = above(sums[r][j], threshold); bits; bits &= bits - 1) {
              int64_t t = c + j * WIDTH + __builtin_ctz(bits);
              if (t > a + r && t < n) graph[(a + r) * n + t] = graph[t * n + a + r] = 1;
            }
      }
      for (int64_t r = 0; r < count; r++) graph[(a + r) * (n + 1)] = 1;
    }
  }
}

/* Of each of m vectors x the greatest product with one of n others, and which: the first such. */
void nearest(const float *x, int64_t m, const float *others, int64_t n, int64_t dim, float *room,
             float *best, int64_t *index, int threads) {
#pragma omp parallel num_threads(threads)
  {
    pack(others, n, dim, room);
#pragma omp for schedule(static)
    for (int64_t a = 0; a < m; a += ROWS) {
      int64_t count = m - a < ROWS ? m - a : ROWS;
      for (int64_t r = 0; r < count; r++) best[a + r] = -INFINITY, index[a + r] = 0;
      for (int64_t c = 0; c < n; c += COLUMNS) {
        vec sums[ROWS][4];
        tile(x + a * dim, count, dim, room + c * dim, sums);
        for (int64_t r = 0; r < count; r++)
          for (int j = 0; j < 4; j++)
            for (uint32_t bits = above(sums[r][j], best[a + r]); bits; bits &= bits - 1) {
              int t = __builtin_ctz(bits);
              if (sums[r][j][t] > best[a + r] && c + j * WIDTH + t < n)
                best[a + r] = sums[r][j][t], index[a + r] = c + j * WIDTH + t;
            }
      }
    }
  }
}

/* graph [n, n] bytes, 1 where two vectors are alike (every one is like itself); weight [n] counts
 * a vector so many times; degree and alive are scratch of n. `any`: also a covered vector may
 * become an entry. Writes to owner [n] the vector that stands for each; returns the entries. */
int64_t greedy_cover(const uint8_t *graph, int64_t n, const int32_t *weight, int any,
                     int64_t *degree, uint8_t *alive, int64_t *owner, int threads) {
  int64_t entries = 0, left = n;
  memset(alive, 1, n);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < n; j++) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; i++) total += weight[i] * graph[j * n + i];
    degree[j] = total;
  }
  while (left) {
    int64_t best = -1, most = 0;
    int joined = 0; /* whether any two that are left are alike */
    for (int64_t j = 0; j < n; j++) {
      if (!any && !alive[j]) continue;
      joined |= degree[j] > weight[j];
      if (degree[j] > most) most = degree[j], best = j;
    }
    if (best < 0) break; /* no weight is left, which weights above 0 rule out */
    if (!any && !joined) { /* each is its own entry */
      for (int64_t j = 0; j < n; j++)
        if (alive[j]) owner[j] = j, entries++;
      break;
    }
    const uint8_t *row = graph + best * n;
    for (int64_t i = 0; i < n; i++) {
      if (!row[i] || !alive[i]) continue;
      alive[i] = 0;
      owner[i] = best;
      left--;
      const uint8_t *gone = graph + i * n;
      for (int64_t j = 0; j < n; j += 8) { /* most are unlike */
        uint64_t eight = 0;
        memcpy(&eight, gone + j, n - j < 8 ? n - j : 8);
        for (; eight; eight &= eight - 1) degree[j + __builtin_ctzll(eight) / 8] -= weight[i];
      }
    }
    entries++;
  }
  return entries;
}
