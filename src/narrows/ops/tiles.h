/* AMX tiles: registers of 16 rows of 64 bytes, which are multiplied with each other. More sums
 * at once need fewer loads, but where the other thread of a core is busy, loads into many tiles and
 * products of them wait for each other, so that one sum after the other is faster there, and little
 * slower where a thread has its core alone; but for sums that share what was made for them. */
#include <stdint.h>

#define TILE_ROWS 16

#if defined __AMX_BF16__ && defined __AMX_INT8__ && defined __AVX512BF16__
#define TILES
#include <immintrin.h>

/* Whether this process may use tiles; native.c asks for it. */
int amx_ready(void);

/* The first `count` tiles hold `few` rows, the others all. The time a product takes goes with the
 * rows of its first operand. */
static inline void tiles_on(int count, int64_t few) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } __attribute__((packed)) shape = {.palette = 1};
  for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = i < count ? few : TILE_ROWS;
  _tile_loadconfig(&shape);
}
#endif
