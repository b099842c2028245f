/* Products of weights in 8 or 4 bits with states that are rounded to 15 bits in groups of 32.

   A weight is stored in blocks of 16 rows, in them groups of 32 inputs, in them chunks of 4 inputs
   of the 16 rows (quantised_weight.py). So one register holds 4 inputs of 16 rows, and the 4 inputs
   of a token are one word that all its lanes share: the sum of a group needs no shuffle. Sums of a
   group are exact; those of the groups are added in float32 in one order for every number of tokens.

   The best instructions are chosen when a process starts: AMX (tiles.h), AVX512-VNNI, AVX-VNNI, AVX2,
   or none. */

#define ROWS 16
#define MOST_KIND 4
#define MOST_CODE 16256.0f /* 128 x 127 */
#define AT_ONCE 8 /* tokens whose sums fit into the registers */

typedef int32_t ints16 __attribute__((vector_size(64)));
typedef uint16_t halves16 __attribute__((vector_size(32)));
typedef int8_t bytes8 __attribute__((vector_size(LANES)));

/* A weight: numbers, or codes with scales (and minimums); see quantised_weight.py. */
typedef struct {
  const void *values, *scales, *minimums;
} Matrix;

/* The states of a token as codes 128 high + low: for each group 32 high bytes and 32 low ones, then
   for each group the scale, then what the offset of the weights' codes or the minimums are multiplied
   with. With high bytes alone, int8, the PPL of SmolLM2-135M was 0.4% above that of float32. */
INLINE long record_of(long inputs) { return groups_of(inputs) * (2 * GROUP + 8); }

/* Round groups first .. last - 1 of a token's states: x = scale code. */
DISPATCHED
static void to_codes(const float *x, int8_t *record, long inputs, int format, long first, long last) {
  const long groups = groups_of(inputs);
  float *scales = (float *)(record + groups * 2 * GROUP);
  for (long g = first; g < last; g++) {
    float copy[GROUP] = {0};
    const float *from = x + g * GROUP;
    if (g * GROUP + GROUP > inputs) {
      memcpy(copy, from, (inputs - g * GROUP) * sizeof *x);
      from = copy;
    }
    vec most = {0}, nothing = {0};
    for (int i = 0; i < GROUP; i += LANES) {
      const vec part = load(from, i, 0), size = (vec)((ints)part & 0x7fffffff);
      most = chosen(size > most, size, most);
      nothing += part - part; /* not a number if a state is none, or infinite */
    }
    float largest = 1e-30f;
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    const float turns = MOST_CODE / largest, scale = largest / MOST_CODE + sum(nothing);
    int8_t *high = record + g * 2 * GROUP, *low = high + GROUP;
    ints total = {0};
    for (int i = 0; i < GROUP; i += LANES) {
      const vec part = load(from, i, 0); /* a state that is no number, or infinite, is code 0 */
      const vec whole = chosen(((ints)part & 0x7f800000) != 0x7f800000, part, (vec){0});
      const ints code = (ints)(whole * turns + 12582912.0f) - 0x4b400000;
      total += code;
      const ints upper = (code + 64) >> 7, lower = code - (upper << 7);
      const bytes8 upper_byte = __builtin_convertvector(upper, bytes8);
      const bytes8 lower_byte = __builtin_convertvector(lower, bytes8);
      memcpy(high + i, &upper_byte, sizeof upper_byte);
      memcpy(low + i, &lower_byte, sizeof lower_byte);
    }
    int32_t codes = 0;
    for (int k = 0; k < LANES; k++) codes += total[k];
    scales[g] = scale;
    if (format == INT8) {
      codes *= -128;
      memcpy(scales + groups + g, &codes, 4);
    } else {
      scales[groups + g] = scale * codes;
    }
  }
}

/* Half precision to single; a scale is never infinite. */
INLINE floats16 halves_to_floats(const uint16_t *from) {
  halves16 half;
  memcpy(&half, from, sizeof half);
  const words16 word = __builtin_convertvector(half, words16);
  const floats16 size = (floats16)((word & 0x7fff) << 13) * 0x1p112f;
  return (floats16)((words16)size | (word & 0x8000) << 16);
}

/* Sums of 4 inputs of 16 rows: unsigned weights x the 4 signed states in ``state``. */
INLINE ints16 dot_plain(ints16 sums, ints16 weights, int32_t state) {
  const words16 w = (words16)weights;
  const uint32_t a = (uint32_t)state;
  sums += (ints16)(w & 255) * (int8_t)a;
  sums += (ints16)(w >> 8 & 255) * (int8_t)(a >> 8);
  sums += (ints16)(w >> 16 & 255) * (int8_t)(a >> 16);
  return sums + (ints16)(w >> 24) * (int8_t)(a >> 24);
}

#ifdef X86
#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))
#define WITH_AVX_VNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#define WITH_AVX512_VNNI                                                                          \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

typedef union {
  ints16 all;
  __m256i half[2];
} Halves;

WITH_AVX2 INLINE ints16 dot_avx2(ints16 sums, ints16 weights, int32_t state) {
  const __m256i even = _mm256_set1_epi32((int)(((uint32_t)(int16_t)(int8_t)state & 0xffff) |
                                               (uint32_t)(int8_t)(state >> 16) << 16));
  const __m256i odd = _mm256_set1_epi32((int)(((uint32_t)(int16_t)(int8_t)(state >> 8) & 0xffff) |
                                              (uint32_t)(int8_t)(state >> 24) << 16));
  Halves s = {sums}, w = {weights};
  for (int i = 0; i < 2; i++) {
    const __m256i low = _mm256_and_si256(w.half[i], _mm256_set1_epi16(255));
    const __m256i high = _mm256_srli_epi16(w.half[i], 8);
    s.half[i] = _mm256_add_epi32(s.half[i], _mm256_add_epi32(_mm256_madd_epi16(low, even),
                                                             _mm256_madd_epi16(high, odd)));
  }
  return s.all;
}

WITH_AVX_VNNI INLINE ints16 dot_avx_vnni(ints16 sums, ints16 weights, int32_t state) {
  Halves s = {sums}, w = {weights};
  for (int i = 0; i < 2; i++)
    s.half[i] = _mm256_dpbusd_avx_epi32(s.half[i], w.half[i], _mm256_set1_epi32(state));
  return s.all;
}

WITH_AVX512_VNNI INLINE ints16 dot_avx512_vnni(ints16 sums, ints16 weights, int32_t state) {
  return (ints16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(state));
}
#endif

/* Rows of blocks first .. last - 1 times n <= AT_ONCE tokens; ``end`` is the number of rows. */
#define PRODUCTS(NAME, DOT, WITH)                                                                 \
  WITH INLINE void NAME(const int8_t *records, const Matrix w, int format, float *y, long inputs, \
                        long outputs, long b, const int n) {                                      \
    const long groups = groups_of(inputs), record = record_of(inputs);                            \
    const long bytes = (format == INT8 ? 8 : 4) * 4 * ROWS;                                       \
    const uint8_t *values = (const uint8_t *)w.values + b * groups * bytes;                       \
    floats16 total[AT_ONCE];                                                                      \
    for (int t = 0; t < n; t++) total[t] = (floats16){0};                                         \
    for (long g = 0; g < groups; g++, values += bytes) {                                          \
      ints16 sums[AT_ONCE], high[AT_ONCE], part;                                                  \
      const int8_t *states = records + g * 2 * GROUP;                                             \
      const float *scales = (const float *)(records + groups * 2 * GROUP) + g;                    \
      const long at = (b * groups + g) * ROWS;                                                    \
      for (int t = 0; t < n; t++) sums[t] = high[t] = (ints16){0};                                \
      if (format == INT8) {                                                                       \
        for (int t = 0; t < n; t++) {                                                             \
          int32_t offset;                                                                         \
          memcpy(&offset, (const int8_t *)(scales + groups) + t * record, 4);                     \
          sums[t] += offset;                                                                      \
        }                                                                                         \
        for (int c = 0; c < 8; c++) {                                                             \
          PREFETCH(values + 64 * c);                                                              \
          memcpy(&part, values + 64 * c, sizeof part);                                            \
          for (int t = 0; t < n; t++) {                                                           \
            int32_t state;                                                                        \
            memcpy(&state, states + t * record + 4 * c, 4);                                       \
            high[t] = DOT(high[t], part, state);                                                  \
            memcpy(&state, states + t * record + 4 * c + GROUP, 4);                               \
            sums[t] = DOT(sums[t], part, state);                                                  \
          }                                                                                       \
        }                                                                                         \
        const floats16 scale = halves_to_floats((const uint16_t *)w.scales + at);                 \
        for (int t = 0; t < n; t++)                                                               \
          total[t] += __builtin_convertvector(sums[t] + high[t] * 128, floats16) *                \
                      *(const float *)((const int8_t *)scales + t * record) * scale;              \
      } else {                                                                                    \
        for (int c = 0; c < 4; c++) {                                                             \
          PREFETCH(values + 64 * c);                                                              \
          memcpy(&part, values + 64 * c, sizeof part);                                            \
          const ints16 first = part & 0x0f0f0f0f;                                                 \
          const ints16 second = (ints16)((words16)part >> 4) & 0x0f0f0f0f;                        \
          for (int t = 0; t < n; t++) {                                                           \
            int32_t state;                                                                        \
            memcpy(&state, states + t * record + 4 * c, 4);                                       \
            high[t] = DOT(high[t], first, state);                                                 \
            memcpy(&state, states + t * record + 4 * c + GROUP, 4);                               \
            sums[t] = DOT(sums[t], first, state);                                                 \
            memcpy(&state, states + t * record + 4 * c + 16, 4);                                  \
            high[t] = DOT(high[t], second, state);                                                \
            memcpy(&state, states + t * record + 4 * c + 16 + GROUP, 4);                          \
            sums[t] = DOT(sums[t], second, state);                                                \
          }                                                                                       \
        }                                                                                         \
        const floats16 scale = halves_to_floats((const uint16_t *)w.scales + at);                 \
        const floats16 least = halves_to_floats((const uint16_t *)w.minimums + at);               \
        for (int t = 0; t < n; t++) {                                                             \
          const float *of = (const float *)((const int8_t *)scales + t * record);                 \
          total[t] += __builtin_convertvector(sums[t] + high[t] * 128, floats16) * of[0] * scale; \
          total[t] += least * of[groups];                                                         \
        }                                                                                         \
      }                                                                                           \
    }                                                                                             \
    const long rows = outputs - b * ROWS < ROWS ? outputs - b * ROWS : ROWS;                      \
    for (int t = 0; t < n; t++)                                                                   \
      memcpy(y + t * outputs + b * ROWS, &total[t], rows * sizeof *y);                            \
  }                                                                                               \
  WITH static void NAME##_of_blocks(const int8_t *records, const Matrix w, int format, float *y,  \
                                    long tokens, long inputs, long outputs, long first,           \
                                    long last) {                                                  \
    for (long b = first; b < last; b++)                                                           \
      for (long t = 0; t < tokens; t += AT_ONCE) {                                                \
        const int8_t *from = records + t * record_of(inputs);                                     \
        float *to = y + t * outputs;                                                              \
        const long n = tokens - t < AT_ONCE ? tokens - t : AT_ONCE;                               \
        if (format == INT8) switch (n) {                                                          \
            EACH(NAME, INT8, 1) EACH(NAME, INT8, 2) EACH(NAME, INT8, 3) EACH(NAME, INT8, 4)       \
            EACH(NAME, INT8, 5) EACH(NAME, INT8, 6) EACH(NAME, INT8, 7) EACH(NAME, INT8, 8)       \
          }                                                                                       \
        else switch (n) {                                                                         \
            EACH(NAME, INT4, 1) EACH(NAME, INT4, 2) EACH(NAME, INT4, 3) EACH(NAME, INT4, 4)       \
            EACH(NAME, INT4, 5) EACH(NAME, INT4, 6) EACH(NAME, INT4, 7) EACH(NAME, INT4, 8)       \
          }                                                                                       \
      }                                                                                           \
  }

#define EACH(NAME, FORMAT, n)                                                                     \
  case n:                                                                                         \
    NAME(from, w, FORMAT, to, inputs, outputs, b, n);                                             \
    break;

PRODUCTS(plain_products, dot_plain, )
#ifdef X86
PRODUCTS(avx2_products, dot_avx2, WITH_AVX2)
PRODUCTS(avx_vnni_products, dot_avx_vnni, WITH_AVX_VNNI)
PRODUCTS(avx512_vnni_products, dot_avx512_vnni, WITH_AVX512_VNNI)
#endif

#include "tiles.h"

typedef void (*Products)(const int8_t *, Matrix, int, float *, long, long, long, long, long);

static Products quantised_products;

/* Choose the best products that the processor has, of the first ``most`` + 1 kinds. From the
   fourth kind on, float32 and bfloat16 weights use AVX-512 where the processor has it: products.h,
   many.h. */
static int choose_products(int most) {
  int kind = 0;
  quantised_products = plain_products_of_blocks;
  half_products = rows_of_widened, float_products = rows_of;
  multiplies_pairs = multiplies_many = 0;
#ifdef X86
  __builtin_cpu_init();
  if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    quantised_products = avx2_products_of_blocks;
    kind = 1;
  }
  if (most >= 2 && kind == 1 && __builtin_cpu_supports("avxvnni")) {
    quantised_products = avx_vnni_products_of_blocks;
    kind = 2;
  }
  if (most >= 3 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    quantised_products = avx512_vnni_products_of_blocks;
    kind = 3;
  }
  const int avx512 = most >= 3 && kind >= 1 && __builtin_cpu_supports("avx512f") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl");
  if (avx512) float_products = rows_of_tiles, multiplies_many |= 1 << FLOAT32;
#ifdef PAIRS
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    half_products = rows_of_pairs;
    multiplies_pairs = 1;
    multiplies_many |= 1 << BFLOAT16;
  }
#endif
#ifdef TILES
  if (most >= 4 && kind == 3 && has_tiles()) {
    quantised_products = tile_products_of_blocks;
    kind = 4;
  }
#endif
#endif
  return kind;
}
