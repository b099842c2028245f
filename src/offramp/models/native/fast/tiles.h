/* Products of quantised weights with 16 tokens at a time, by the matrix tiles of AMX.

   Weights and states are stored in the form of the tiles: a group of 16 rows is a tile of 8 x 64
   bytes, and so are 16 tokens of 16 x 32. The sums of a group are whole numbers, and those of the groups
   are added in the same order as in quantised.h, so a token's result is the same, bit for bit. */

#if defined(X86) && __has_include(<amxint8intrin.h>)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#define WITH_TILES                                                                                \
  __attribute__((target(                                                                          \
      "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")))
#define TILE_TOKENS 16
#define TILE_CACHED 262144 /* bytes of weights that stay in the cache for the next tokens */

typedef struct {
  uint8_t palette, start, none[14];
  uint16_t bytes[16]; /* of a row, by tile */
  uint8_t rows[16];
} TileConfig;

/* The sums of a group: whole numbers of 16 tokens and 16 rows, of their high and of their low bytes. */
typedef struct {
  _Alignas(64) int32_t high[TILE_TOKENS][ROWS], low[TILE_TOKENS][ROWS];
  _Alignas(64) uint8_t weights[8 * 4 * ROWS]; /* of 4 bits, one a byte */
} GroupSums;

/* Multiply a group by tiles A (high states), B (low states), W (weights) into C (high) and D (low). */
#define TILE_PRODUCTS(C, D)                                                                       \
  _tile_loadd(0, states, record);                                                                 \
  _tile_loadd(1, states + GROUP, record);                                                         \
  _tile_loadd(2, weights, 4 * ROWS);                                                              \
  _tile_zero(C);                                                                                  \
  _tile_zero(D);                                                                                  \
  _tile_dpbsud(C, 0, 2);                                                                          \
  _tile_dpbsud(D, 1, 2);                                                                          \
  _tile_stored(C, to->high, 4 * ROWS);                                                            \
  _tile_stored(D, to->low, 4 * ROWS)

WITH_TILES INLINE void sum_group(const int8_t *states, long record, const uint8_t *values, int format,
                                 GroupSums *to, int odd) {
  const uint8_t *weights = values;
  if (format == INT4) {
    for (int c = 0; c < 4; c++) {
      ints16 part;
      memcpy(&part, values + 64 * c, sizeof part);
      const ints16 first = part & 0x0f0f0f0f;
      const ints16 second = (ints16)((words16)part >> 4) & 0x0f0f0f0f;
      memcpy(to->weights + 64 * c, &first, sizeof first);
      memcpy(to->weights + 64 * (c + 4), &second, sizeof second);
    }
    weights = to->weights;
    __asm__ volatile("" ::: "memory"); /* the tiles read what was written */
  }
  if (odd) {
    TILE_PRODUCTS(5, 6);
  } else {
    TILE_PRODUCTS(3, 4);
  }
}

/* What a group's sums of 16 tokens are multiplied with; see quantised.h. */
typedef struct {
  float scales[TILE_TOKENS], others[TILE_TOKENS];
} GroupScales;

static void read_scales(const int8_t *records, long inputs, GroupScales *to) {
  const long groups = groups_of(inputs), record = record_of(inputs);
  for (int t = 0; t < TILE_TOKENS; t++) {
    const float *from = (const float *)(records + t * record + groups * 2 * GROUP);
    for (long g = 0; g < groups; g++) to[g].scales[t] = from[g], to[g].others[t] = from[groups + g];
  }
}

/* Add a group's sums to those of the groups before it, as in quantised.h. */
WITH_TILES INLINE void add_group(const GroupSums *of, const GroupScales *by, const Matrix w, long at,
                                 int format, floats16 *total) {
  const floats16 scale = halves_to_floats((const uint16_t *)w.scales + at);
  const floats16 least =
      format == INT8 ? scale : halves_to_floats((const uint16_t *)w.minimums + at);
#pragma GCC unroll 16
  for (int t = 0; t < TILE_TOKENS; t++) {
    ints16 low, high;
    memcpy(&low, of->low[t], sizeof low);
    memcpy(&high, of->high[t], sizeof high);
    if (format == INT8) {
      int32_t offset;
      memcpy(&offset, by->others + t, 4);
      low += offset;
    }
    total[t] += __builtin_convertvector(low + high * 128, floats16) * by->scales[t] * scale;
    if (format == INT4) total[t] += least * by->others[t];
  }
}

/* Rows of block b times 16 tokens. */
WITH_TILES INLINE void tile_products(const int8_t *records, const GroupScales *scales,
                                     const Matrix w, int format, float *y, long inputs,
                                     long outputs, long b) {
  const long groups = groups_of(inputs), record = record_of(inputs);
  const long bytes = (format == INT8 ? 8 : 4) * 4 * ROWS, at = b * groups;
  const uint8_t *values = (const uint8_t *)w.values + at * bytes;
  floats16 total[TILE_TOKENS];
  GroupSums sums[2];
  for (int t = 0; t < TILE_TOKENS; t++) total[t] = (floats16){0};
  sum_group(records, record, values, format, sums, 0);
  for (long g = 0; g < groups; g += 2) { /* the tiles of the next group work meanwhile */
    if (g + 1 < groups)
      sum_group(records + (g + 1) * 2 * GROUP, record, values + (g + 1) * bytes, format, sums + 1, 1);
    add_group(sums, scales + g, w, (at + g) * ROWS, format, total);
    if (g + 1 == groups) break;
    if (g + 2 < groups)
      sum_group(records + (g + 2) * 2 * GROUP, record, values + (g + 2) * bytes, format, sums, 0);
    add_group(sums + 1, scales + g + 1, w, (at + g + 1) * ROWS, format, total);
  }
  const long rows = outputs - b * ROWS < ROWS ? outputs - b * ROWS : ROWS;
  for (int t = 0; t < TILE_TOKENS; t++)
    memcpy(y + t * outputs + b * ROWS, &total[t], rows * sizeof *y);
}

/* Rows of blocks first .. last - 1: some blocks that stay in the cache, times all tokens. */
WITH_TILES static void tile_products_of_blocks(const int8_t *records, const Matrix w, int format,
                                               float *y, long tokens, long inputs, long outputs,
                                               long first, long last) {
  const long groups = groups_of(inputs), record = record_of(inputs);
  const long fit = TILE_CACHED / (groups * 4 * ROWS * 8 + 1) + 1;
  GroupScales *scales = NULL;
  long whole = groups && first < last ? tokens / TILE_TOKENS * TILE_TOKENS : 0;
  if (whole && !(scales = malloc(groups * sizeof *scales))) whole = 0;
  if (whole) {
    const TileConfig config = {.palette = 1,
                               .bytes = {GROUP, GROUP, 64, 64, 64, 64, 64},
                               .rows = {16, 16, 8, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
    for (long from = first; from < last; from += fit)
      for (long t = 0; t < whole; t += TILE_TOKENS) {
        read_scales(records + t * record, inputs, scales);
        for (long b = from; b < last && b < from + fit; b++)
          if (format == INT8)
            tile_products(records + t * record, scales, w, INT8, y + t * outputs, inputs, outputs, b);
          else
            tile_products(records + t * record, scales, w, INT4, y + t * outputs, inputs, outputs, b);
      }
    _tile_release();
    free(scales);
  }
  avx512_vnni_products_of_blocks(records + whole * record, w, format, y + whole * outputs,
                                 tokens - whole, inputs, outputs, first, last);
}

/* Whether the processor has tiles of whole numbers, and the kernel lets this process use them. */
static int has_tiles(void) {
  unsigned int a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  if (!(d >> 24 & 1) || !(d >> 25 & 1)) return 0;
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* the tiles' data */) == 0;
}
#endif
