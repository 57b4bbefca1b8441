/* How texts may go on by their last few tokens: as behind where they stood before, or as a table of
 * runs has it. Asked for all sequences between steps, which leave little of what it takes at hand: so
 * few instructions and little memory. Defined by ops/ngrams.py. */
#include "vector.h"

/* The last place up to `from` in a text that stands behind the same `size` tokens as `stop`, or -1. */
static int64_t earlier(const int32_t *text, int64_t stop, int64_t from, int64_t size) {
  const int64_t block = 64; /* places passed over at once where none stands behind the last token */
  int32_t last = text[stop - 1];
  for (int64_t at = from; at >= size;) {
    int64_t end = at < block ? 0 : at - block;
    int found = 0;
    if (end)
      for (int64_t i = 0; i < block; i++) found |= text[end + i] == last;
    if (end && !found) at = end;
    for (; at > end && at >= size; at--) {
      int64_t same = 0;
      while (same < size && text[at - 1 - same] == text[stop - 1 - same]) same++;
      if (same == size) return at;
    }
  }
  return -1;
}

/* How many of a text's last tokens, `shortest` to `longest`, stood together in it before, the longest
 * run and of it the last; counted on, up to `far`, if they are `longest`; or 0. `place` is behind them,
 * and in `went` stands of each of `most` tokens from there, as far as there are some, how it followed
 * the run before it, of as many tokens as match by then, at most `longest`: 0 if that had not been
 * there before, 1 if it had gone on alike the last time, else 2. */
static int64_t repeated(const int32_t *text, int64_t count, int64_t shortest, int64_t longest,
                        int64_t far, int64_t most, int64_t *behind, int64_t *went) {
  int64_t size = 0, place = count - 1;
  for (int64_t n = shortest; n <= longest && n < count; n++) {
    int64_t at = earlier(text, count, place, n);
    if (at < 0) break;
    size = n, place = at;
  }
  if (!size) return 0;
  *behind = place;
  for (int64_t i = 0; i < most && place + i < count; i++) {
    int64_t stop = place + i, run = size + i < longest ? size + i : longest;
    int64_t before = earlier(text, stop, stop - 1, run);
    went[i] = before < 0 ? 0 : text[before] == text[stop] ? 1 : 2;
  }
  while (size >= longest && size < far && size < place &&
         text[place - size - 1] == text[count - size - 1])
    size++;
  return size;
}

/* The same of `n` texts, given by address and count [n][2]: size, place and `went` in `found`
 * [n][2 + most]. */
void repeats(const int64_t *texts, int64_t n, int64_t shortest, int64_t longest, int64_t far,
             int64_t most, int64_t *found) {
  for (int64_t i = 0; i < n; i++, found += 2 + most)
    found[0] = repeated((const int32_t *)texts[2 * i], texts[2 * i + 1], shortest, longest, far, most,
                        found + 1, found + 2);
}

/* Runs of tokens by their keys [N], which rise; those that begin with the same bits, above `shift`
 * others, stand from parts[bits] up to parts[bits + 1]. Behind each run, the likeliest of `tokens`, a
 * guess of one of `sorts`, which is right with one of `chances`. */
typedef struct {
  const int64_t *keys;
  const int32_t *parts, *tokens;
  const uint8_t *sorts;
  const float *chances;
  int64_t shift;
} table;

static int64_t place_of(const table *of, int64_t key) {
  int64_t low = of->parts[key >> of->shift], stop = of->parts[(key >> of->shift) + 1];
  for (int64_t high = stop; low < high;) {
    int64_t middle = (low + high) / 2;
    if (of->keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low < stop && of->keys[low] == key ? low : -1;
}

/* Guesses behind each of `n` texts, given by their last `longest` tokens [n][longest], -1 where there
 * are none: each what follows the longest run that is known and ends there, as long as one is and its
 * chance is at least `least`. found[i] [1 + most] is how many there are, and where in the table. */
void phrases(const table *of, const int32_t *texts, int64_t n, int64_t longest, int64_t most,
             float least, int64_t *found) {
  for (int64_t text = 0; text < n; text++, texts += longest, found += 1 + most) {
    int32_t tokens[longest + most];
    memcpy(tokens, texts, longest * sizeof *tokens);
    for (int64_t *count = found; *count < most; ++*count) {
      const int32_t *last = tokens + longest + *count;
      uint64_t key = 0;
      int64_t place = -1;
      for (int64_t i = 1; i <= longest && last[-i] >= 0; i++) {
        key = (key * 0x1E3779B97F4A7C15u + (uint64_t)last[-i] + 1) & INT64_MAX; /* longer_key */
        int64_t at = place_of(of, (int64_t)key);
        if (at < 0) break; /* nor is anything longer there */
        place = at;
      }
      if (place < 0 || of->chances[of->sorts[place]] < least) break;
      found[1 + *count] = place;
      tokens[longest + *count] = of->tokens[place];
    }
  }
}
