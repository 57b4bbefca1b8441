/* How a text may go on by its last few tokens: as behind where they stood in it before, or as a table
 * of runs has it. Asked for each sequence between steps, which leave little of what it takes at hand:
 * so few instructions and little memory. Defined by ops/ngrams.py. */
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
 * run and of it the last; counted on, up to `far`, if they are `longest`; or 0. found[0] is the place
 * behind them, and from found[1] on stands of each of `most` tokens from there, as far as there are
 * some, how it followed the run before it, of as many tokens as match by then, at most `longest`: 0 if
 * that had not been there before, 1 if it had gone on alike the last time, else 2. */
int64_t repeats(const int32_t *text, int64_t count, int64_t shortest, int64_t longest, int64_t far,
                int64_t most, int64_t *found) {
  int64_t size = 0, place = count - 1;
  for (int64_t n = shortest; n <= longest && n < count; n++) {
    int64_t at = earlier(text, count, place, n);
    if (at < 0) break;
    size = n, place = at;
  }
  if (!size) return 0;
  found[0] = place;
  for (int64_t i = 0; i < most && place + i < count; i++) {
    int64_t stop = place + i, run = size + i < longest ? size + i : longest;
    int64_t before = earlier(text, stop, stop - 1, run);
    found[1 + i] = before < 0 ? 0 : text[before] == text[stop] ? 1 : 2;
  }
  while (size >= longest && size < far && size < place &&
         text[place - size - 1] == text[count - size - 1])
    size++;
  return size;
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

/* Guesses behind `count` tokens of a text, for which there is room behind them: each what follows the
 * longest run that is known and ends there, of up to `longest` tokens, as long as one is and its chance
 * is at least `least`. places[n] is where in the table guess n stands. Returns how many there are. */
int64_t phrases(const table *of, int32_t *text, int64_t count, int64_t longest, int64_t most,
                float least, int64_t *places) {
  for (int64_t n = 0; n < most; n++, count++) {
    uint64_t key = 0;
    int64_t found = -1;
    for (int64_t i = 1; i <= longest && i <= count; i++) {
      key = (key * 0x1E3779B97F4A7C15u + (uint64_t)text[count - i] + 1) & INT64_MAX; /* longer_key */
      int64_t at = place_of(of, (int64_t)key);
      if (at < 0) break; /* nor is anything longer there */
      found = at;
    }
    if (found < 0 || of->chances[of->sorts[found]] < least) return n;
    places[n] = found;
    text[count] = of->tokens[found];
  }
  return most;
}
