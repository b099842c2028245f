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

/* In each whole group put the states of even inputs first, then those of odd inputs. A register of
   32 bfloat16 weights is then widened without a shuffle: even ones by a shift, odd ones by a mask.
   ``to`` may be x. */
static void split_pairs(const float *x, float *to, long inputs, long first, long last) {
  for (long g = first; g < last; g++) {
    const float *from = x + g * GROUP;
    float *out = to + g * GROUP, copy[GROUP];
    if (g * GROUP + GROUP > inputs) {
      if (to != x) memcpy(out, from, (inputs - g * GROUP) * sizeof *x);
      break;
    }
    memcpy(copy, from, sizeof copy);
    for (int i = 0; i < GROUP / 2; i++) {
      out[i] = copy[2 * i];
      out[i + GROUP / 2] = copy[2 * i + 1];
    }
  }
}

INLINE floats16 load16(const float *from) {
  floats16 x;
  memcpy(&x, from, sizeof x);
  return x;
}

/* Rows first .. last - 1 of a bfloat16 weight, times n <= TOKENS tokens of split_pairs. */
INLINE void pair_products(const float *x, const uint16_t *w, float *y, long inputs, long outputs,
                          long first, long last, const int n) {
  for (long o = first; o < last; o++) {
    const uint16_t *row = w + o * inputs;
    floats16 even[TOKENS], odd[TOKENS];
    for (int t = 0; t < n; t++) even[t] = odd[t] = (floats16){0};
    long i = 0;
    for (; i + GROUP <= inputs; i += GROUP) {
      words16 pairs;
      memcpy(&pairs, row + i, sizeof pairs);
      PREFETCH(row + i);
      const floats16 low = (floats16)(pairs << 16), high = (floats16)(pairs & 0xffff0000u);
      for (int t = 0; t < n; t++) {
        even[t] += low * load16(x + t * inputs + i);
        odd[t] += high * load16(x + t * inputs + i + GROUP / 2);
      }
    }
    for (int t = 0; t < n; t++) {
      const floats16 both = even[t] + odd[t];
      vec half[2];
      memcpy(half, &both, sizeof both);
      float total = sum(half[0] + half[1]);
      for (long rest = i; rest < inputs; rest++) total += wide(row[rest]) * x[t * inputs + rest];
      y[t * outputs + o] = total;
    }
  }
}

#define CASE(PRODUCTS, n)                                        \
  case n:                                                        \
    PRODUCTS(x_at, w, y_at, inputs, outputs, tile, end, n);      \
    break;
#define ROWS_OF(NAME, PRODUCTS, TYPE)                                                             \
  DISPATCHED                                                                                      \
  static void NAME(const float *x, const void *weight, float *y, long tokens, long inputs,        \
                   long outputs, long first, long last) {                                         \
    const TYPE *w = weight;                                                                       \
    for (long tile = first; tile < last; tile += TILE) {                                          \
      const long end = tile + TILE < last ? tile + TILE : last;                                   \
      for (long t = 0; t < tokens; t += TOKENS) {                                                 \
        const float *x_at = x + t * inputs;                                                       \
        float *y_at = y + t * outputs;                                                            \
        switch (tokens - t < TOKENS ? tokens - t : TOKENS) {                                      \
          CASE(PRODUCTS, 1) CASE(PRODUCTS, 2) CASE(PRODUCTS, 3)                                   \
          CASE(PRODUCTS, 4) CASE(PRODUCTS, 5) CASE(PRODUCTS, 6)                                   \
        }                                                                                         \
      }                                                                                           \
    }                                                                                             \
  }

ROWS_OF(rows_of, products, float)
ROWS_OF(rows_of_pairs, pair_products, uint16_t)
