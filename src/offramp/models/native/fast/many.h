/* Products of weights in float32 and bfloat16 with many tokens, such as a prompt, by AVX-512.

   The states are stored in panels of 32 tokens, side by side, for each input (or pair of bfloat16
   inputs). So a register holds 16 tokens, and a weight is broadcast to all of them: a product needs no
   sum across a register, and the rows of a weight are read as they are. Panels of some tokens and
   inputs stay in the second-level cache. */

#define SIDE_BY_SIDE 32
#define HEIGHT 8          /* rows of a weight that are multiplied together */
#define PANEL_TOKENS 128  /* tokens whose panels stay in the cache */
#define PANEL_INPUTS 768  /* inputs, or pairs of them, of those panels */

static int multiplies_many; /* formats for which the products below can be used, as bits */

/* Space for the panels of a call; NULL if there are few tokens, the processor cannot, or memory is
   full. ``inputs`` is the largest number of inputs. */
static float *new_panels(int format, long tokens, long inputs) {
  if (tokens <= FEW || format >= INT8 || !(multiplies_many >> format & 1)) return NULL;
  const size_t panels = (tokens + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE;
  return aligned_alloc(64, panels * SIDE_BY_SIDE * inputs * sizeof(float));
}

#ifdef X86
/* Bring states x, rows of ``apart`` words of 4 bytes, into panels; each thread some of them. */
WITH_AVX512 static void fill_panels(Team team, const float *x, float *panels, long tokens, long words,
                                  long apart) {
  const long count = (tokens + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE;
  for (long panel = count * team.me / team.all; panel < count * (team.me + 1) / team.all; panel++) {
    const long first = panel * SIDE_BY_SIDE, left = tokens - first;
    const float *from = x + first * apart;
    float *to = panels + first * words;
    for (long i = 0; i < words; i += LANES)
      for (long j = 0; j < SIDE_BY_SIDE; j += LANES) {
        if (i + LANES <= words && j + LANES <= left) {
          vec v[LANES];
          for (int k = 0; k < LANES; k++) v[k] = load(from, (j + k) * apart + i, 0);
          turn(v);
          for (int k = 0; k < LANES; k++) memcpy(to + (i + k) * SIDE_BY_SIDE + j, v + k, sizeof v[k]);
          continue;
        }
        for (long k = i; k < i + LANES && k < words; k++)
          for (long t = j; t < j + LANES; t++)
            to[k * SIDE_BY_SIDE + t] = t < left ? from[t * apart + k] : 0.0f;
      }
  }
}

/* Store the products of HEIGHT rows from ``o`` on with a panel of ``count`` tokens; those of ``more``,
   which may be y itself or NULL, are added. */
INLINE void store_sums(float (*sums)[SIDE_BY_SIDE], float *y, const float *more, long count,
                       long outputs, long o, long last) {
  for (long j = 0; j < count; j += LANES) {
    if (o + HEIGHT <= last && j + LANES <= count) {
      vec v[LANES];
      for (int r = 0; r < HEIGHT; r++) memcpy(v + r, sums[r] + j, sizeof v[r]);
      turn(v);
      for (int k = 0; k < LANES; k++) {
        const long at = (j + k) * outputs + o;
        if (more) v[k] += load(more, at, 0);
        memcpy(y + at, v + k, sizeof v[k]);
      }
      continue;
    }
    for (long k = j; k < j + LANES && k < count; k++)
      for (long r = 0; r < HEIGHT && o + r < last; r++) {
        const long at = k * outputs + o + r;
        y[at] = (more ? more[at] : 0.0f) + sums[r][k];
      }
  }
}

/* Rows first .. last - 1 of a weight, of ``apart`` bytes each, times all tokens (+ residual). ADD adds
   to a sum a register of states times one word of the weight. */
#define MANY_ROWS(NAME, WITH, ADD)                                                                \
  WITH static void NAME(const float *panels, const char *w, long apart, float *y,                 \
                        const float *residual, long tokens, long words, long outputs, long first, \
                        long last) {                                                              \
    for (long start = 0; start < tokens; start += PANEL_TOKENS) {                                 \
      const long end = start + PANEL_TOKENS < tokens ? start + PANEL_TOKENS : tokens;             \
      for (long from = 0; from < words; from += PANEL_INPUTS) {                                   \
        const long count = words - from < PANEL_INPUTS ? words - from : PANEL_INPUTS;             \
        for (long o = first; o < last; o += HEIGHT) {                                             \
          const float *row[HEIGHT];                                                               \
          for (int r = 0; r < HEIGHT; r++)                                                        \
            row[r] = (const float *)(w + (o + r < last ? o + r : last - 1) * apart) + from;       \
          for (long t = start; t < end; t += SIDE_BY_SIDE) {                                      \
            const float *panel = panels + t * words + from * SIDE_BY_SIDE;                        \
            float sums[HEIGHT][SIDE_BY_SIDE];                                                     \
            floats16 low[HEIGHT], high[HEIGHT];                                                   \
            for (int r = 0; r < HEIGHT; r++) low[r] = high[r] = (floats16){0};                    \
            for (long i = 0; i < count; i++) {                                                    \
              if (t == start && i % 16 == 0) /* the next rows, into the second-level cache */     \
                for (int r = 0; r < HEIGHT; r++)                                                  \
                  __builtin_prefetch((const char *)(row[r] + i) + HEIGHT * apart, 0, 2);          \
              const floats16 a = load16(panel + i * SIDE_BY_SIDE);                                \
              const floats16 b = load16(panel + i * SIDE_BY_SIDE + 16);                           \
              for (int r = 0; r < HEIGHT; r++) {                                                  \
                low[r] = ADD(low[r], a, row[r] + i);                                              \
                high[r] = ADD(high[r], b, row[r] + i);                                            \
              }                                                                                   \
            }                                                                                     \
            for (int r = 0; r < HEIGHT; r++) {                                                    \
              memcpy(sums[r], low + r, sizeof low[r]);                                            \
              memcpy(sums[r] + 16, high + r, sizeof high[r]);                                     \
            }                                                                                     \
            const long here = end - t < SIDE_BY_SIDE ? end - t : SIDE_BY_SIDE;                    \
            const float *more = from ? y : residual;                                              \
            store_sums(sums, y + t * outputs, more ? more + t * outputs : NULL, here, outputs, o, \
                       last);                                                                     \
          }                                                                                       \
        }                                                                                         \
      }                                                                                           \
    }                                                                                             \
  }

INLINE floats16 add_number(floats16 sums, floats16 states, const float *weight) {
  return sums + states * *weight;
}
MANY_ROWS(rows_of_many, WITH_AVX512, add_number)

#ifdef PAIRS
WITH_PAIRS INLINE floats16 add_pair(floats16 sums, floats16 states, const float *weight) {
  int32_t pair;
  memcpy(&pair, weight, sizeof pair);
  return (floats16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)states, (__m512bh)_mm512_set1_epi32(pair));
}
MANY_ROWS(rows_of_many_pairs, WITH_PAIRS, add_pair)
#endif
#endif

/* Whether the products of many tokens below are computed, which all threads of a team do together. */
INLINE int are_many(const float *panels, int format, long inputs) {
  return panels && inputs > 0 && (format == FLOAT32 || inputs % 2 == 0);
}

/* Rows first .. last - 1 of a weight times the prepared states of all tokens (+ residual). */
static void products_of_many(Team team, const float *x, const void *w, int format, float *y,
                             const float *residual, long tokens, long inputs, long outputs,
                             long first, long last, float *panels) {
#ifdef X86
  const long words = format == FLOAT32 ? inputs : inputs / 2;
  const long apart = format == FLOAT32 ? inputs : groups_of(inputs) * GROUP / 2;
  fill_panels(team, x, panels, tokens, words, apart);
#pragma omp barrier
#ifdef PAIRS
  if (format == BFLOAT16) {
    rows_of_many_pairs(panels, w, 2 * inputs, y, residual, tokens, words, outputs, first, last);
    return;
  }
#endif
  rows_of_many(panels, w, 4 * inputs, y, residual, tokens, words, outputs, first, last);
#endif
}
