/* Attention of many tokens of one row at consecutive positions, such as a prompt.

   All queries of a head of the cache read the same keys. So QUERIES of them are multiplied with KEYS
   keys at a time, and the softmax runs along: sums are scaled when a larger score comes
   (FlashAttention, Dao et al. 2022). Keys are stored in blocks of 16, side by side, so that a product
   needs no sum across a register; values are float32. Keys after a token's own count 0 times; so a value
   that is not finite is seen by earlier tokens of its block, too. */

#define QUERIES 48 /* of one job of a thread */
#define KEYS 64    /* multiplied at a time */
#define SIDE (2 * LANES)
#define TALL 6 /* queries whose sums fit into the registers */

/* The keys and values of a text, in the form above. */
typedef struct {
  float *keys, *values; /* values: NULL where those of the cache are float32 */
  long end, padded;     /* positions, and the next multiple of KEYS */
} Text;

/* Whether tokens are many, of one row, and at consecutive positions. */
static int is_text(const int64_t *slots, const int64_t *rows, long tokens, long kept, long heads) {
  if (tokens <= FEW || kept || !heads) return 0;
  for (long t = 1; t < tokens; t++)
    if (rows[t] != rows[0] || slots[t] != slots[0] + t) return 0;
  return 1;
}

/* Space for the keys and values of a text; without keys if the tokens are not one, or memory is full. */
static Text new_text(const int64_t *slots, const int64_t *rows, long tokens, long kept, long heads,
                     long kv_heads, long size, int bfloat16) {
  Text text = {NULL, NULL, 0, 0};
  if (!is_text(slots, rows, tokens, kept, heads)) return text;
  text.end = slots[tokens - 1] + 1;
  text.padded = (text.end + KEYS - 1) / KEYS * KEYS;
  const size_t numbers = (size_t)kv_heads * text.padded * size;
  text.keys = aligned_alloc(64, numbers * (bfloat16 ? 2 : 1) * sizeof(float));
  if (text.keys && bfloat16) text.values = text.keys + numbers;
  return text;
}

/* Bring keys and values of a row of the cache into the form of a text; each thread a part. */
DISPATCHED
static void read_text(Team team, Text text, const void *keys, const void *values, int bfloat16,
                      long row, long kv_heads, long size, long capacity) {
  const long blocks = text.padded / SIDE;
  for (long job = team.me; job < kv_heads * blocks; job += team.all) {
    const long kv = job / blocks, first = job % blocks * SIDE;
    const long from = ((row * kv_heads + kv) * capacity + first) * size;
    const long count = text.end - first < SIDE ? text.end - first : SIDE;
    float *to = text.keys + job * SIDE * size;
    for (long i = 0; i < size; i++)
      for (long j = 0; j < SIDE; j++)
        to[i * SIDE + j] = j < count ? at(keys, from + j * size + i, bfloat16) : 0.0f;
    if (text.values)
      for (long i = 0; i < count * size; i++)
        text.values[(kv * text.padded + first) * size + i] = at(values, from + i, bfloat16);
  }
}

/* to[r] = scale[r] to[r] + the product of a[r] (``count`` numbers) with some columns of b, as many as
   VECTOR holds; rows of b are ``apart``. Without a ``scale`` to[r] is not read. Only the first ``n``
   rows are stored, of TALL. */
#define MULTIPLY(NAME, VECTOR)                                                                    \
  INLINE void NAME(const float *const *a, const float *b, long apart, long count,                 \
                   float *const *to, const float *scale, long n) {                                \
    VECTOR sums[TALL], column;                                                                    \
    for (int r = 0; r < TALL; r++) {                                                              \
      sums[r] = (VECTOR){0};                                                                      \
      if (!scale || r >= n) continue;                                                             \
      memcpy(&column, to[r], sizeof column);                                                      \
      sums[r] = column * scale[r];                                                                \
    }                                                                                             \
    for (long i = 0; i < count; i++) {                                                            \
      memcpy(&column, b + i * apart, sizeof column);                                              \
      for (int r = 0; r < TALL; r++) sums[r] += a[r][i] * column;                                 \
    }                                                                                             \
    for (int r = 0; r < TALL && r < n; r++) memcpy(to[r], sums + r, sizeof column);               \
  }
MULTIPLY(multiply, floats16)
MULTIPLY(multiply_half, vec)

/* Turn a query's scores of some keys into shares; returns what earlier sums are multiplied with. */
INLINE float share(float *scores, long seen, long count, float *most, float *total) {
  float best = *most;
  for (long j = seen > 0 ? seen : 0; j < count; j++) scores[j] = -INFINITY;
  vec largest = load(scores, 0, 0);
  for (long j = LANES; j < count; j += LANES) {
    const vec part = load(scores, j, 0);
    largest = chosen(part > largest, part, largest);
  }
  for (int k = 0; k < LANES; k++) best = largest[k] > best ? largest[k] : best;
  vec sums = {0};
  for (long j = 0; j < count; j += LANES) {
    const vec p = exponential(load(scores, j, 0) - best);
    memcpy(scores + j, &p, sizeof p);
  }
  for (long j = seen > 0 ? seen : 0; j < count; j++) scores[j] = 0;
  for (long j = 0; j < count; j += LANES) sums += load(scores, j, 0);
  const float scale = *most == -INFINITY ? 0.0f : expf(*most - best);
  *most = best;
  *total = *total * scale + sum(sums);
  return scale;
}

/* Attention of ``n`` <= QUERIES queries to the keys of their head, in order of their positions. Query
   r sees the first ``seen[r]`` keys; its result is at to[r]. */
DISPATCHED
static void attend_some(const float *const *queries, float *const *to, const long *seen, long n,
                        const float *keys, const float *values, long size) {
  float scores[QUERIES][KEYS], most[QUERIES], total[QUERIES], scale[QUERIES];
  for (long r = 0; r < n; r++) most[r] = -INFINITY, total[r] = 0;
  for (long first = 0; first < seen[n - 1]; first += KEYS) {
    const long left = seen[n - 1] - first, count = left < KEYS ? (left + SIDE - 1) / SIDE * SIDE : KEYS;
    for (long r = 0; r < n; r += TALL) {
      const float *rows[TALL];
      float *found[TALL];
      for (int k = 0; k < TALL; k++) rows[k] = queries[r + k < n ? r + k : n - 1];
      for (long j = 0; j < count; j += SIDE) {
        for (int k = 0; k < TALL; k++) found[k] = scores[r + k < n ? r + k : n - 1] + j;
        multiply(rows, keys + (first + j) * size, SIDE, size, found, NULL, n - r);
      }
    }
    for (long r = 0; r < n; r++)
      scale[r] = share(scores[r], seen[r] - first, count, most + r, total + r);
    const long used = left < count ? left : count;
    for (long r = 0; r < n; r += TALL) {
      const float *rows[TALL];
      float *sums[TALL];
      for (int k = 0; k < TALL; k++) rows[k] = scores[r + k < n ? r + k : n - 1];
      for (long i = 0; i < size; i += SIDE) {
        const float *from = values + first * size + i, *kept = first ? scale + r : NULL;
        for (int k = 0; k < TALL; k++) sums[k] = to[r + k < n ? r + k : n - 1] + i;
        if (size - i < SIDE)
          multiply_half(rows, from, size, used, sums, kept, n - r);
        else
          multiply(rows, from, size, used, sums, kept, n - r);
      }
    }
  }
  for (long r = 0; r < n; r++) {
    const float by = 1.0f / total[r];
    for (long i = 0; i < size; i++) to[r][i] *= by;
  }
}

/* Attention of all queries of a text, whose keys and values are in the cache; qkv and out as in
   attend_in_parts. */
static void attend_text(Team team, Text text, const float *qkv, const void *keys, const void *values,
                        int bfloat16, int64_t slot, int64_t row, float *out, long tokens,
                        long all_heads, long heads, long kv_heads, long size, long capacity) {
  read_text(team, text, keys, values, bfloat16, row, kv_heads, size, capacity);
#pragma omp barrier
  const long group = heads / kv_heads, all = tokens * group, parts = (all + QUERIES - 1) / QUERIES;
#pragma omp for schedule(dynamic, 1)
  for (long job = 0; job < kv_heads * parts; job++) {
    const long kv = job % kv_heads, from = (parts - 1 - job / kv_heads) * QUERIES; /* longest first */
    const long n = all - from < QUERIES ? all - from : QUERIES;
    const float *queries[QUERIES], *of = (const float *)values;
    float *to[QUERIES];
    long seen[QUERIES];
    for (long r = 0; r < n; r++) {
      const long t = (from + r) / group, head = kv * group + (from + r) % group;
      queries[r] = qkv + (t * all_heads + head) * size;
      to[r] = out + (t * heads + head) * size;
      seen[r] = slot + t + 1;
    }
    of = text.values ? text.values + kv * text.padded * size
                     : of + (row * kv_heads + kv) * capacity * size;
    attend_some(queries, to, seen, n, text.keys + kv * text.padded * size, of, size);
  }
}
