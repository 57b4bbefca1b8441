/* One token's values to codes: what every decoding step of a quantised cache does in every layer.
 * Defined in plain torch in ops/quant.py (quantise, calibrate, value_lines), and equal to it to the
 * bit, so that it does not matter how tokens arrive. */
#include "vector.h"

/* x: the tail, for each head `used` rows of `dim` floats or bfloat16, heads `x_stride` apart: the
 * first becomes codes, and the others move up. `lines` (null: a borrower, which
 * stores no codes) as quant.value_lines, a head `line_stride` bytes apart; scale and zero
 * [heads, tokens, dim / group], `meta_stride` numbers apart, kind 0 float32, 1 float16, 2 bfloat16.
 * Returns 0, 1 where a number is not finite in its kind (nothing is written then), or 2 where the
 * compiler knows no float16. */
#ifdef __FLT16_MAX__
static int put(void *to, int kind, int64_t at, float x, int write) {
  if (kind == 0) {
    if (write) ((float *)to)[at] = x;
    return !isfinite(x);
  }
  if (kind == 1) {
    _Float16 half = (_Float16)x;
    if (write) ((_Float16 *)to)[at] = half;
    return !isfinite((float)half);
  }
  bf16 short_ = to_bf16(x);
  if (write) ((bf16 *)to)[at] = short_;
  return !isfinite(to_f32(short_));
}

int fold_value(void *x, int is_bf16, int64_t x_stride, int64_t used, int64_t heads, int64_t dim,
               int64_t group, int bits, float eta, float shrink, uint8_t *lines,
               int64_t line_stride, void *scale, void *zero, int64_t meta_stride, int kind,
               int64_t token) {
  int64_t groups = dim / group, blocks = dim / 16;
  float levels = (float)((1 << bits) - 1);
  for (int write = 0; write < 2; write++) /* look first, then write */
    for (int64_t h = 0; h < heads; h++)
      for (int64_t g = 0; g < groups; g++) {
        int64_t first = h * x_stride + g * group, at = h * meta_stride + token * groups + g;
        float low = INFINITY, high = -INFINITY, bad = 0;
        for (int64_t i = 0; i < group; i++) {
          float v = is_bf16 ? to_f32(((const bf16 *)x)[first + i]) : ((const float *)x)[first + i];
          low = v < low ? v : low;
          high = v > high ? v : high;
          bad += v - v; /* NaN for NaN and infinities */
        }
        if (bad != 0) return 1;
        /* volatile: no two operations may be contracted to one rounding */
        volatile float step = (high - low) / levels, part = eta * step;
        part = part * levels;
        if (put(scale, kind, at, shrink * step, write) | put(zero, kind, at, low + part, write))
          return 1;
        if (!write || !lines) continue;
        for (int64_t i = 0; i < group; i++) {
          float v = is_bf16 ? to_f32(((const bf16 *)x)[first + i]) : ((const float *)x)[first + i];
          float code = step > 0 ? rintf((v - low) / step) : 0.0f;
          code = code > levels ? levels : code;
          int64_t c = g * group + i, bit = (c % 16 * 4 + token % 4) * bits;
          uint8_t *line = lines + h * line_stride + (token / 4 * blocks + c / 16) * 8 * bits;
          line[bit / 8] |= (uint8_t)((int)code << bit % 8);
        }
      }
  size_t size = is_bf16 ? sizeof(bf16) : sizeof(float);
  for (int64_t h = 0; h < heads; h++) {
    char *first = (char *)x + h * x_stride * size;
    memmove(first, first + dim * size, (used - 1) * dim * size);
  }
  return 0;
}
#else
int fold_value(void *x, int is_bf16, int64_t x_stride, int64_t used, int64_t heads, int64_t dim,
               int64_t group, int bits, float eta, float shrink, uint8_t *lines,
               int64_t line_stride, void *scale, void *zero, int64_t meta_stride, int kind,
               int64_t token) {
  return 2;
}
#endif
