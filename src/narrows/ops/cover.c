/* The greedy cover of a graph: see ops/cover.py for the definition. */
#include "vector.h"

/* graph [n, n] bytes, 1 where two vectors are alike (every one is like itself); weight [n] counts
 * a vector so many times; degree and alive are scratch of n. `any`: also a covered vector may
 * become an entry. Writes to owner [n] the vector that stands for each; returns the entries. */
int64_t greedy_cover(const uint8_t *graph, int64_t n, const int32_t *weight, int any,
                     int64_t *degree, uint8_t *alive, int64_t *owner) {
  int64_t entries = 0, left = n;
  memset(alive, 1, n);
  memset(degree, 0, n * sizeof *degree);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) degree[j] += weight[i] * graph[i * n + j];
  while (left) {
    int64_t best = -1, most = 0;
    for (int64_t j = 0; j < n; j++)
      if (degree[j] > most && (any || alive[j])) most = degree[j], best = j;
    if (best < 0) break; /* no weight is left, which weights above 0 rule out */
    const uint8_t *row = graph + best * n;
    for (int64_t i = 0; i < n; i++) {
      if (!row[i] || !alive[i]) continue;
      alive[i] = 0;
      owner[i] = best;
      left--;
      const uint8_t *gone = graph + i * n;
      for (int64_t j = 0; j < n; j++) degree[j] -= weight[i] * gone[j];
    }
    entries++;
  }
  return entries;
}
