/* Products of weights in float32 and bfloat16 with a few tokens: each row of a weight is read once. */

#define TOKENS 6 /* so many sums fit into the registers */
#define TILE 4   /* rows of a weight that stay in the cache for the next tokens */
#define GROUP 32 /* inputs that are prepared together */

typedef float floats16 __attribute__((vector_size(64)));
typedef uint32_t words16 __attribute__((vector_size(64)));

enum { FLOAT32, BFLOAT16, INT8, INT4 }; /* formats of weights */

INLINE long groups_of(long inputs) { return (inputs + GROUP - 1) / GROUP; }

/* Rows first .. last - 1 of a float32 weight, times n <= TOKENS tokens. */
INLINE void products(const float *x, const float *w, float *y, long inputs, long outputs,
                     long first, long last, const int n) {
  for (long o = first; o < last; o++) {
    const long row = o * inputs;
    vec even[TOKENS], odd[TOKENS];
    for (int t = 0; t < n; t++) even[t] = odd[t] = (vec){0};
    long i = 0;
    for (; i + 2 * LANES <= inputs; i += 2 * LANES) {
      vec a = load(w, row + i, 0), b = load(w, row + i + LANES, 0);
      if (n > 1) /* for one token the processor's own prefetching is better */
        PREFETCH(w + row + i);
      for (int t = 0; t < n; t++) {
        even[t] += a * load(x, t * inputs + i, 0);
        odd[t] += b * load(x, t * inputs + i + LANES, 0);
      }
    }
    for (int t = 0; t < n; t++) {
      float total = sum(even[t] + odd[t]);
      for (long rest = i; rest < inputs; rest++) total += w[row + rest] * x[t * inputs + rest];
      y[t * outputs + o] = total;
    }
  }
}

/* States that are multiplied with bfloat16 weights are rounded to bfloat16, too, as in the usual
   libraries. A token's are stored in groups of 32, with zeros after the last input: as the 32 numbers
   themselves where the processor multiplies pairs of them, else as float32, first those of even
   inputs, then those of odd ones. A register of 32 weights is then widened without a shuffle: even
   ones by a shift, odd ones by a mask. */
typedef void (*NumberProducts)(const float *, const void *, float *, long, long, long, long, long);

static NumberProducts half_products, float_products;
static int multiplies_pairs;

DISPATCHED
static void to_halves(const float *x, float *record, long inputs, long first, long last) {
  for (long g = first; g < last; g++) {
    uint16_t half[GROUP];
    float copy[GROUP] = {0};
    const float *from = x + g * GROUP;
    if (g * GROUP + GROUP > inputs) {
      memcpy(copy, from, (inputs - g * GROUP) * sizeof *x);
      from = copy;
    }
    for (int i = 0; i < GROUP; i += LANES) {
      const halves part = narrow_all(load(from, i, 0));
      memcpy(half + i, &part, sizeof part);
    }
    if (multiplies_pairs) {
      memcpy((uint16_t *)record + g * GROUP, half, sizeof half);
      continue;
    }
    for (int i = 0; i < GROUP / 2; i++) {
      record[g * GROUP + i] = wide(half[2 * i]);
      record[g * GROUP + GROUP / 2 + i] = wide(half[2 * i + 1]);
    }
  }
}

INLINE floats16 load16(const float *from) {
  floats16 x;
  memcpy(&x, from, sizeof x);
  return x;
}

/* Rows first .. last - 1 of a bfloat16 weight, times n <= TOKENS tokens of to_halves. */
INLINE void widened_products(const float *x, const uint16_t *w, float *y, long inputs, long outputs,
                             long first, long last, const int n) {
  const long record = groups_of(inputs) * GROUP;
  for (long o = first; o < last; o++) {
    const uint16_t *row = w + o * inputs;
    floats16 even[TOKENS], odd[TOKENS];
    for (int t = 0; t < n; t++) even[t] = odd[t] = (floats16){0};
    const long whole = inputs / GROUP * GROUP;
    for (long i = 0; i < inputs; i += GROUP) {
      words16 pairs = {0};
      if (i < whole)
        memcpy(&pairs, row + i, sizeof pairs);
      else
        memcpy(&pairs, row + i, (inputs - whole) * sizeof *w);
      if (n > 1) PREFETCH(row + i);
      const floats16 low = (floats16)(pairs << 16), high = (floats16)(pairs & 0xffff0000u);
      for (int t = 0; t < n; t++) {
        even[t] += low * load16(x + t * record + i);
        odd[t] += high * load16(x + t * record + i + GROUP / 2);
      }
    }
    for (int t = 0; t < n; t++) {
      const floats16 both = even[t] + odd[t];
      vec half[2];
      memcpy(half, &both, sizeof both);
      y[t * outputs + o] = sum(half[0] + half[1]);
    }
  }
}

#define CASE(PRODUCTS, n)                                        \
  case n:                                                        \
    PRODUCTS(x_at, w, y_at, inputs, outputs, tile, end, n);      \
    break;
#define ROWS_OF(NAME, PRODUCTS, TYPE, WITH, RECORD)                                               \
  WITH static void NAME(const float *x, const void *weight, float *y, long tokens, long inputs,   \
                        long outputs, long first, long last) {                                    \
    const TYPE *w = weight;                                                                       \
    const long parts = (tokens + TOKENS - 1) / TOKENS, most = (tokens + parts - 1) / larger(parts, 1); \
    for (long tile = first; tile < last; tile += TILE) {                                          \
      const long end = tile + TILE < last ? tile + TILE : last;                                   \
      for (long t = 0; t < tokens; t += most) {                                                   \
        const float *x_at = x + t * (RECORD);                                                     \
        float *y_at = y + t * outputs;                                                            \
        switch (tokens - t < most ? tokens - t : most) {                                          \
          CASE(PRODUCTS, 1) CASE(PRODUCTS, 2) CASE(PRODUCTS, 3)                                   \
          CASE(PRODUCTS, 4) CASE(PRODUCTS, 5) CASE(PRODUCTS, 6)                                   \
        }                                                                                         \
      }                                                                                           \
    }                                                                                             \
  }

ROWS_OF(rows_of, products, float, DISPATCHED, inputs)
ROWS_OF(rows_of_widened, widened_products, uint16_t, DISPATCHED, groups_of(inputs) * GROUP)

#ifdef X86
#define WITH_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))

/* The sums of four registers, side by side. */
WITH_AVX512 INLINE __m128 four_sums(const __m512 *of) {
  __m256 half[TILE];
  for (int r = 0; r < TILE; r++)
    half[r] = _mm256_add_ps(_mm512_castps512_ps256(of[r]), _mm512_extractf32x8_ps(of[r], 1));
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]),
                                     _mm256_hadd_ps(half[2], half[3]));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

/* 64 bytes, of which ``left`` are read and the others are 0. */
WITH_AVX512 INLINE __m512i load64(const void *from, long left) {
  if (left >= 64) return _mm512_loadu_si512(from);
  char some[64] = {0};
  memcpy(some, from, left);
  return _mm512_loadu_si512(some);
}

/* The same products by AVX-512. For one or two tokens the memory is the limit, and rows are read one
   after the other. For more of them it is arithmetic: TILE rows run together, and all sums stay in
   registers; where there are fewer rows, the last one is multiplied again and not stored. ADD adds the
   products of 64 bytes of a row and of a token's states, which are RECORD words of 4 bytes. */
#define TILED(NAME, WITH, TYPE, RECORD, ADD)                                                      \
  WITH INLINE void NAME##_step(const float *x, const TYPE *const *row, __m512 (*sums)[TILE],      \
                               long inputs, long i, long left, const int n, const int rows) {     \
    __m512i weights[TILE];                                                                        \
    for (int r = 0; r < rows; r++) {                                                              \
      if (n > 2) PREFETCH((const char *)row[r] + i);                                              \
      weights[r] = load64((const char *)row[r] + i, left);                                        \
    }                                                                                             \
    for (int t = 0; t < n; t++) {                                                                 \
      const __m512i states = load64((const char *)(x + t * (RECORD)) + i, left);                  \
      for (int r = 0; r < rows; r++) sums[t][r] = ADD(sums[t][r], weights[r], states);            \
    }                                                                                             \
  }                                                                                               \
  WITH INLINE void NAME##_sums(const float *x, const TYPE *const *row, __m512 (*to)[TILE],        \
                               long inputs, const int n, const int rows) {                        \
    __m512 sums[TOKENS][TILE];                                                                    \
    for (int t = 0; t < n; t++)                                                                   \
      for (int r = 0; r < rows; r++) sums[t][r] = _mm512_setzero_ps();                            \
    const long bytes = inputs * sizeof(TYPE);                                                     \
    long i = 0;                                                                                   \
    for (; i + 64 <= bytes; i += 64) NAME##_step(x, row, sums, inputs, i, 64, n, rows);           \
    if (i < bytes) NAME##_step(x, row, sums, inputs, i, bytes - i, n, rows);                      \
    for (int t = 0; t < n; t++)                                                                   \
      for (int r = 0; r < rows; r++) to[t][r] = sums[t][r];                                       \
  }                                                                                               \
  WITH INLINE void NAME(const float *x, const TYPE *w, float *y, long inputs, long outputs,       \
                        long first, long last, const int n) {                                     \
    __m512 sums[TOKENS][TILE], one[TOKENS][TILE];                                                 \
    const TYPE *row[TILE];                                                                        \
    for (int r = 0; r < TILE; r++)                                                                \
      row[r] = w + (first + r < last ? first + r : last - 1) * inputs;                            \
    if (n > 2) NAME##_sums(x, row, sums, inputs, n, TILE);                                        \
    for (int r = 0; r < TILE && n <= 2; r++) {                                                    \
      NAME##_sums(x, row + r, one, inputs, n, 1);                                                 \
      for (int t = 0; t < n; t++) sums[t][r] = one[t][0];                                         \
    }                                                                                             \
    for (int t = 0; t < n; t++) {                                                                 \
      const __m128 total = four_sums(sums[t]);                                                    \
      memcpy(y + t * outputs + first, &total, (last - first) * sizeof *y);                        \
    }                                                                                             \
  }

WITH_AVX512 INLINE __m512 add_products(__m512 sums, __m512i weights, __m512i states) {
  return _mm512_fmadd_ps((__m512)weights, (__m512)states, sums);
}
TILED(tiled_products, WITH_AVX512, float, inputs, add_products)
ROWS_OF(rows_of_tiles, tiled_products, float, WITH_AVX512, inputs)

#if __has_include(<avx512bf16intrin.h>)
#define PAIRS 1
#define WITH_PAIRS                                                                                \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

/* AVX512-BF16 adds the products of two pairs of bfloat16 at a time. */
WITH_PAIRS INLINE __m512 add_pairs(__m512 sums, __m512i weights, __m512i states) {
  return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)states);
}
#define PAIRED (groups_of(inputs) * GROUP / 2)
TILED(pair_products, WITH_PAIRS, uint16_t, PAIRED, add_pairs)
ROWS_OF(rows_of_pairs, pair_products, uint16_t, WITH_PAIRS, PAIRED)
#endif
#endif
