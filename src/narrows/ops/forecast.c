/* A SpecFormer's draft in two calls, from what the target made of tokens to context vectors and
 * from those to the tokens they forecast: called one after the other, the operations of a draft of
 * one sequence take longer to call than to do. Defined by draft/specformer.py, but for the rounding of
 * weights and what enters them to bytes, see bytes.c: most of a draft's time is spent reading weights.
 * Activations are float32. */
#include "vector.h"

typedef struct {
  const uint8_t *fuse, *context_qkv, *context_out;
  const uint8_t *spread, *anchor, *qkv, *out, *gate_up, *down, *head, *after; /* or null */
  const float *spread_bias, *slot_bias;                                    /* one of them */
  const float *fuse_norm, *context_norm, *spread_norm, *token_norm, *slot_norm, *mlp_norm;
  const float *final_norm, *cosine, *sine; /* the tables [places, dim] */
  const bf16 *narrowed;      /* [vocabulary, markov] */
  const int64_t *vocabulary; /* [named], or null: all tokens are */
  int64_t groups, hidden, heads, kv_heads, dim, slots, wide, named, markov, causal;
  float eps, final_eps;
} forecaster;

/* Floats of room that `forecast` needs for n sequences. */
int64_t forecast_room(const forecaster *f, int64_t n) {
  int64_t heads = 2 * f->heads + 2 * f->kv_heads;
  int64_t a_slot = 5 * f->hidden + heads * f->dim + 3 * f->wide + f->named;
  return n * (f->slots * a_slot + 2 * f->hidden + f->named + f->markov);
}

#define TAKEN 64 /* rows taken in at once */

/* Floats of room that `absorb` needs for n sequences. */
int64_t absorb_room(const forecaster *f, int64_t n) {
  int64_t row = (f->heads + 2 * f->kv_heads) * f->dim;
  int64_t a_row = (f->groups + 2) * f->hidden + row + 2 * f->dim;
  return TAKEN * a_row + n * (row + f->heads * f->dim + f->hidden);
}

/* What the target made of the newest tokens of n sequences, taps [rows, groups, hidden], goes into
 * their caches, and behind the last of each comes out its context [n, hidden]. The rows of sequence
 * s end before row ends[s], and places[s] is where its last one goes, as row s of n; those before
 * it are only held, since nothing looks at what they attend to. Returns 0, or -1 if there was no
 * memory. */
int absorb(const forecaster *f, int64_t n, const place *const *places, const int64_t *ends,
           const float *taps, int is_bf16, float *contexts, float *room, int threads) {
  int64_t H = f->hidden, D = f->dim, heads = f->heads, turned = heads + f->kv_heads;
  int64_t row = (turned + f->kv_heads) * D, all = f->groups * H, rows = ends[n - 1];
  int64_t owner[TAKEN];
  float *normed = room, *x = normed + TAKEN * all, *y = x + TAKEN * H, *qkv = y + TAKEN * H;
  float *cosine = qkv + TAKEN * row, *sine = cosine + TAKEN * D, *newest = sine + TAKEN * D;
  float *mixed = newest + n * row, *delta = mixed + n * heads * D;
  for (int64_t from = 0, s = 0; from < rows; from += TAKEN) {
    int64_t count = rows - from < TAKEN ? rows - from : TAKEN;
#pragma omp parallel for schedule(static) num_threads(threads) if (count * all > SHARED)
    for (int64_t r = 0; r < count; r++)
      for (int64_t g = 0; g < f->groups; g++)
        add_rms_norm((float *)taps + (from + r) * all + g * H, 0, 0, f->fuse_norm + g * H, f->eps,
                     normed + r * all + g * H, 0, 1, H, 1);
    linear_bytes(normed, f->fuse, 0, x, count, H, all, threads);
    add_rms_norm(x, 0, 0, f->context_norm, f->eps, y, 0, count, H, threads);
    linear_bytes(y, f->context_qkv, 0, qkv, count, row, H, threads);
    for (int64_t r = 0; r < count; r++) { /* a token's place in the text is that in the cache */
      while (from + r == ends[s]) s++;
      owner[r] = s;
      int64_t at = places[s]->stored - ends[s] + from + r;
      memcpy(cosine + r * D, f->cosine + at * D, D * sizeof(float));
      memcpy(sine + r * D, f->sine + at * D, D * sizeof(float));
    }
    norm_rotate(qkv, row, turned, D, 0, 0, cosine, sine, count, threads);
    for (int64_t r = 0; r < count; r++) {
      const place *p = places[owner[r]];
      int64_t before_end = ends[owner[r]] - from - r;
      if (before_end == 1) {
        memcpy(contexts + owner[r] * H, x + r * H, H * sizeof(float));
        memcpy(newest + owner[r] * row, qkv + r * row, row * sizeof(float));
        continue;
      }
      for (int64_t h = 0; h < f->kv_heads; h++) {
        int64_t to = (h * p->capacity + p->stored - before_end) * D;
        store_row(qkv + r * row + (heads + h) * D, D, p->k, to, is_bf16);
        store_row(qkv + r * row + (turned + h) * D, D, p->v, to, is_bf16);
      }
    }
  }
  if (append_attend(places, n, newest, row, newest + heads * D, row, newest + turned * D, row, mixed,
                    heads, f->kv_heads, D, D, 1.0f / sqrtf((float)D), is_bf16, threads))
    return -1;
  linear_bytes(mixed, f->context_out, 0, delta, n, H, heads * D, threads);
  for (int64_t i = 0; i < n * H; i++) contexts[i] += delta[i];
  return 0;
}

/* Each slot of one sequence attends to all, or to those before it: qkv [slots, heads + 2 kv_heads,
 * dim] -> mixed [slots, heads, dim]. */
static void attend_slots(const forecaster *f, const float *qkv, float *mixed) {
  int64_t D = f->dim, row = (f->heads + 2 * f->kv_heads) * D, group = f->heads / f->kv_heads;
  float scale = 1.0f / sqrtf((float)D), score[f->slots];
  for (int64_t s = 0; s < f->slots; s++)
    for (int64_t h = 0; h < f->heads; h++) {
      const float *q = qkv + s * row + h * D, *k = qkv + (f->heads + h / group) * D;
      const float *v = k + f->kv_heads * D;
      float *to = mixed + (s * f->heads + h) * D, top = -INFINITY, total = 0;
      int64_t seen = f->causal ? s + 1 : f->slots;
      for (int64_t t = 0; t < seen; t++) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < D; i++) dot += q[i] * k[t * row + i];
        score[t] = dot * scale;
        top = score[t] > top ? score[t] : top;
      }
      for (int64_t t = 0; t < seen; t++) total += score[t] = expf(score[t] - top);
      for (int64_t i = 0; i < D; i++) to[i] = 0;
      for (int64_t t = 0; t < seen; t++)
        for (int64_t i = 0; i < D; i++) to[i] += score[t] / total * v[t * row + i];
    }
}

/* The first place of the greatest of n scores, which become their exponentials; `chance` is the
 * share that it has of them. */
static int64_t likeliest(float *score, int64_t n, float *chance) {
  float top;
  int64_t best;
  row_maxima(score, 1, n, &top, &best, 1);
  *chance = 1.0f / exponentials(score, n, top);
  return best;
}

#define ROWS_AT_ONCE 8 /* cost little more than one */

/* Context vectors [n, hidden], the tokens that followed them [n] and what those enter the model as
 * [n, hidden] -> the likeliest `most` tokens behind each, found [n, most], and how likely each is,
 * chance [n, most]. Behind one that is less likely than `least`, those before it included, no more
 * are looked for: -1 stands there. */
void forecast(const forecaster *f, int64_t n, const float *contexts, const int64_t *newest,
              const float *entered, int64_t most, float least, int64_t *found, float *chance,
              float *room, int threads) {
  int64_t H = f->hidden, rows = n * f->slots, row = (f->heads + 2 * f->kv_heads) * f->dim;
  float *y = room, *more = y + n * H, *drafts = more + n * H, *normed = drafts + rows * H;
  float *delta = normed + rows * H, *qkv = delta + rows * H, *mixed = qkv + rows * row;
  float *gate_up = mixed + rows * f->heads * f->dim, *gated = gate_up + 2 * rows * f->wide;
  float *score = gated + rows * f->wide, *bias = score + rows * f->named;
  float *before = bias + n * f->named, *slot = before + n * f->markov, *added = slot + rows * H;
  add_rms_norm((float *)contexts, 0, 0, f->spread_norm, f->eps, y, 0, n, H, threads);
  if (f->anchor) {
    add_rms_norm((float *)entered, 0, 0, f->token_norm, f->eps, normed, 0, n, H, threads);
    linear_bytes(normed, f->anchor, 0, more, n, H, H, threads);
    for (int64_t i = 0; i < n * H; i++) y[i] += more[i];
  }
  if (f->spread)
    linear_bytes(y, f->spread, f->spread_bias, drafts, n, f->slots * H, H, threads);
  else
    for (int64_t i = 0; i < rows * H; i++)
      drafts[i] = y[i / (f->slots * H) * H + i % H] + f->slot_bias[i % (f->slots * H)];
  add_rms_norm(drafts, 0, 0, f->slot_norm, f->eps, normed, 0, rows, H, threads);
  linear_bytes(normed, f->qkv, 0, qkv, rows, row, H, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 1)
  for (int64_t s = 0; s < n; s++)
    attend_slots(f, qkv + s * f->slots * row, mixed + s * f->slots * f->heads * f->dim);
  linear_bytes(mixed, f->out, 0, delta, rows, H, f->heads * f->dim, threads);

  int64_t going[n], count = n;
  float stays[n]; /* how likely all that was found of a sequence is */
  for (int64_t s = 0; s < n; s++) going[s] = s, stays[s] = 1;
  for (int64_t i = 0; i < n * most; i++) found[i] = -1, chance[i] = 0;
  for (int64_t first = 0, together; first < most && count; first += together) {
    together = ROWS_AT_ONCE / count < 1 ? 1 : ROWS_AT_ONCE / count;
    together = together < most - first ? together : most - first;
    rows = count * together;
    for (int64_t g = 0; g < count; g++) {
      int64_t from = (going[g] * f->slots + first) * H, size = together * H;
      memcpy(slot + g * size, drafts + from, size * sizeof(float));
      memcpy(added + g * size, delta + from, size * sizeof(float));
    }
    add_rms_norm(slot, added, 0, f->mlp_norm, f->eps, normed, 0, rows, H, threads);
    linear_bytes(normed, f->gate_up, 0, gate_up, rows, 2 * f->wide, H, threads);
    silu_mul(gate_up, gated, rows, f->wide, threads);
    linear_bytes(gated, f->down, 0, added, rows, H, f->wide, threads);
    add_rms_norm(slot, added, 0, f->final_norm, f->final_eps, normed, 0, rows, H, threads);
    linear_bytes(normed, f->head, 0, score, rows, f->named, H, threads);
    for (int64_t i = 0; i < together; i++) {
      for (int64_t g = 0; f->after && g < count; g++) {
        int64_t last = going[g] * most + first + i - 1;
        int64_t token = first + i && found[last] >= 0 ? found[last] : newest[going[g]];
        const bf16 *from = f->narrowed + token * f->markov;
        for (int64_t j = 0; j < f->markov; j++) before[g * f->markov + j] = to_f32(from[j]);
      }
      if (f->after) linear_bytes(before, f->after, 0, bias, count, f->named, f->markov, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 1)
      for (int64_t g = 0; g < count; g++) {
        float *own = score + (g * together + i) * f->named;
        int64_t s = going[g], at = s * most + first + i;
        if (stays[s] < least) continue;
        for (int64_t j = 0; f->after && j < f->named; j++) own[j] += bias[g * f->named + j];
        int64_t best = likeliest(own, f->named, chance + at);
        found[at] = f->vocabulary ? f->vocabulary[best] : best;
        stays[s] *= chance[at];
      }
    }
    int64_t left = 0;
    for (int64_t g = 0; g < count; g++)
      if (stays[going[g]] >= least) going[left++] = going[g];
    count = left;
  }
}
