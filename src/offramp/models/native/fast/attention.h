/* Attention of a token to the keys and values at positions 0 .. length - 1 of its row.

   Heads that read the same keys and values run together, at most TOGETHER of them, so that these are
   read once. The numbers of a head do not depend on the others. */

#define AHEAD(from) __builtin_prefetch((from) + 4096, 0, 3)
#define TOGETHER 2
#define WIDE 8 /* registers of a value whose sums are computed together */

/* The products of ``n`` queries, (n, size), with LANES keys, of which there are ``count``; the last one
   stands for those after it. */
INLINE void score_keys(const float *queries, const void *keys, long first, int bfloat16, float *scores,
                       long apart, long size, long count, const int n) {
  const long bytes = size * (bfloat16 ? 2 : 4);
  for (long i = 0; i < LANES * bytes; i += 64) AHEAD((const char *)keys + first * bytes + i);
  vec dots[TOGETHER][LANES];
  for (int q = 0; q < n; q++)
    for (int k = 0; k < LANES; k++) dots[q][k] = (vec){0};
  for (long i = 0; i < size; i += LANES) {
    vec query[TOGETHER];
    for (int q = 0; q < n; q++) query[q] = load(queries, q * size + i, 0);
    for (int k = 0; k < LANES; k++) {
      const vec key = load(keys, (first + (k < count ? k : count - 1)) * size + i, bfloat16);
      for (int q = 0; q < n; q++) dots[q][k] += query[q] * key;
    }
  }
  for (int q = 0; q < n; q++) {
    vec *of = dots[q];
    turn(of);
    const vec all = ((of[0] + of[4]) + (of[1] + of[5])) + ((of[2] + of[6]) + (of[3] + of[7]));
    memcpy(scores + q * apart + first, &all, sizeof all);
  }
}

/* out[q] = by[q] x the sum of values, weighted by shares[q], of ``count`` registers from ``at`` on. */
INLINE void mix_values(const float *shares, long apart, const void *values, int bfloat16, float *out,
                       const float *by, long length, long size, long at, const int n,
                       const int count) {
  vec sums[TOGETHER][WIDE];
  for (int q = 0; q < n; q++)
    for (int k = 0; k < count; k++) sums[q][k] = (vec){0};
  const long bytes = size * (bfloat16 ? 2 : 4);
  for (long j = 0; j < length; j++) {
    for (long i = 0; i < count * LANES * (bfloat16 ? 2 : 4); i += 64)
      AHEAD((const char *)values + j * bytes + at * (bfloat16 ? 2 : 4) + i);
    for (int k = 0; k < count; k++) {
      const vec value = load(values, j * size + at + k * LANES, bfloat16);
      for (int q = 0; q < n; q++) sums[q][k] += shares[q * apart + j] * value;
    }
  }
  for (int q = 0; q < n; q++)
    for (int k = 0; k < count; k++) {
      const vec sum = sums[q][k] * by[q];
      memcpy(out + q * size + at + k * LANES, &sum, sizeof sum);
    }
}

INLINE void attend(const float *queries, const void *keys, const void *values, int bfloat16, float *out,
                   float *scores, long apart, long length, long size, const int n) {
  const long whole = length / LANES * LANES, padded = (length + LANES - 1) / LANES * LANES;
  for (long j = 0; j < whole; j += LANES)
    score_keys(queries, keys, j, bfloat16, scores, apart, size, LANES, n);
  if (whole < length)
    score_keys(queries, keys, whole, bfloat16, scores, apart, size, length - whole, n);
  float by[TOGETHER];
  for (int q = 0; q < n; q++) {
    float most = -INFINITY, total = 0;
    share(scores + q * apart, length, padded, &most, &total);
    by[q] = 1.0f / total;
  }
  long at = 0;
#define MIX(count)                                      \
  for (; at + (count) * LANES <= size; at += (count) * LANES) \
    mix_values(scores, apart, values, bfloat16, out, by, length, size, at, n, count);
  MIX(WIDE) MIX(4) MIX(2) MIX(1)
#undef MIX
}

/* Attention of ``n`` <= TOGETHER queries of a token, (n, size), whose results are at ``out``. ``scores``
   has space for ``apart`` >= length + LANES numbers of each. */
DISPATCHED
static void attention(const float *queries, long n, const void *keys, const void *values, int bfloat16,
                      float *out, float *scores, long apart, long length, long size) {
  if (n == 1 && bfloat16)
    attend(queries, keys, values, 1, out, scores, apart, length, size, 1);
  else if (n == 1)
    attend(queries, keys, values, 0, out, scores, apart, length, size, 1);
  else if (bfloat16)
    attend(queries, keys, values, 1, out, scores, apart, length, size, 2);
  else
    attend(queries, keys, values, 0, out, scores, apart, length, size, 2);
}
