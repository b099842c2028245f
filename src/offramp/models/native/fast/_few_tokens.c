/* Matrix products and attention for a few tokens, close to the speed of the memory.

   Decoding reads every weight once for a few tokens. The usual libraries read a matrix at half the
   memory bandwidth for one column, and more slowly for several. Here each row of a weight is read
   once and multiplied with all tokens while it is in registers, so a few tokens take no longer than
   one. The result of a token does not depend on the number of tokens, bit for bit, in calls of up to
   FEW tokens. Prompts have products and attention of their own (many.h, prompts.h).

   States are float32 (rows of x are tokens), the cache float32 or bfloat16. Weights are
   (outputs, inputs), contiguous, in float32 or bfloat16 (products.h), or quantised (quantised.h).
   Addresses, shapes and places are checked in Python: kernels.py, products.py.
   The threads are those of PyTorch's own OpenMP. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__gnu_linux__)
#define DISPATCHED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISPATCHED
#endif

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#define X86 1
#endif

#define LANES 8
/* Weights are read into the second-level cache this many bytes before they are used. On a Zen 4
   processor several tokens wait for the memory half as long as with a prefetch into the first. */
#define PREFETCH(weights) __builtin_prefetch((const char *)(weights) + 8192, 0, 2)
#define SERIAL 65536   /* up to so many multiplications one thread is faster */
#define SERIAL_BLOCK 262144 /* the same for a block, in which threads synchronise six times */
#define LARGEST_HEAD 256
#define FEW 16 /* tokens of a call, as FEW_TOKENS in models/base.py; more of them are a prompt */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE long larger(long a, long b) { return a > b ? a : b; }

INLINE float wide(uint16_t half) {
  uint32_t word = (uint32_t)half << 16;
  float x;
  memcpy(&x, &word, 4);
  return x;
}

INLINE uint16_t narrow(float x) { /* to the nearest, ties to even */
  uint32_t word;
  memcpy(&word, &x, 4);
  if (x != x) return 0x7fc0;
  return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE vec load(const void *from, long at, int bfloat16) {
  if (bfloat16) {
    halves half;
    memcpy(&half, (const uint16_t *)from + at, sizeof half);
    return (vec)(__builtin_convertvector(half, words) << 16);
  }
  vec x;
  memcpy(&x, (const float *)from + at, sizeof x);
  return x;
}

INLINE float at(const void *from, long i, int bfloat16) {
  return bfloat16 ? wide(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

INLINE float sum(vec x) {
  return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

INLINE vec chosen(ints where, vec yes, vec no) {
  return (vec)((where & (ints)yes) | (~where & (ints)no));
}

INLINE halves narrow_all(vec x) {
  const words word = (words)x, nan = (words)(x != x);
  const words rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), halves);
}

INLINE vec exponential(vec x) { /* Cephes' expf, between e^-87 and e^87 */
  const vec zero = {0}, lowest = zero - 87.0f, highest = zero + 87.0f;
  const ints nan = x != x;
  x = chosen(x < lowest, lowest, x);
  x = chosen(x > highest, highest, x);
  vec n = x * 1.44269504088896341f + 12582912.0f; /* rounds to a whole number */
  const ints power = (ints)n << 23;
  n -= 12582912.0f;
  x = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec y = 1.9875691500e-4f * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * x * x + x + 1.0f;
  return (vec)(((ints)y + power) | nan);
}

#ifdef __clang__
#define MIXED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIXED(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* Rows become columns. */
INLINE void turn(vec *v) {
  vec a[LANES], b[LANES];
  for (int i = 0; i < LANES; i += 2) {
    a[i] = MIXED(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = MIXED(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int k = 0; k < 2; k++) {
      b[i + 2 * k] = MIXED(a[i + k], a[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * k + 1] = MIXED(a[i + k], a[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < LANES / 2; i++) {
    v[i] = MIXED(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = MIXED(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

/* All threads of a parallel region call the functions below, each with its number. */
typedef struct {
  long me, all;
} Team;

INLINE Team team(void) { return (Team){omp_get_thread_num(), omp_get_num_threads()}; }

#include "products.h"
#include "many.h"
#include "quantised.h"

INLINE void store(void *to, long i, float x, int bfloat16) {
  if (bfloat16)
    ((uint16_t *)to)[i] = narrow(x);
  else
    ((float *)to)[i] = x;
}

INLINE void store_all(void *to, long i, vec x, int bfloat16) {
  if (bfloat16) {
    const halves half = narrow_all(x);
    memcpy((uint16_t *)to + i, &half, sizeof half);
  } else {
    memcpy((float *)to + i, &x, sizeof x);
  }
}

/* RMSNorm of a token; each of x, the weight and the result is float32 or bfloat16. */
INLINE void normalise_any(const void *x, int x_half, const void *weight, int weight_half, float eps,
                          void *out, int out_half, long size) {
  vec squares = {0};
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    vec a = load(x, i, x_half);
    squares += a * a;
  }
  float total = sum(squares);
  for (; i < size; i++) total += at(x, i, x_half) * at(x, i, x_half);
  const float scale = 1.0f / sqrtf(total / size + eps);
  for (i = 0; i + LANES <= size; i += LANES)
    store_all(out, i, load(x, i, x_half) * scale * load(weight, i, weight_half), out_half);
  for (; i < size; i++)
    store(out, i, at(x, i, x_half) * scale * at(weight, i, weight_half), out_half);
}

DISPATCHED
static void normalise(const float *x, const void *weight, int bfloat16, float eps, float *out,
                      long size) {
  normalise_any(x, 0, weight, bfloat16, eps, out, 0, size);
}

/* SiLU(first half) x second half, of entries first .. last - 1. */
INLINE void swiglu_any(const void *x, int x_half, void *out, int out_half, long size, long first,
                       long last) {
  long i = first;
  for (; i + LANES <= last; i += LANES) {
    vec gate = load(x, i, x_half);
    store_all(out, i, gate / (1.0f + exponential(-gate)) * load(x, size + i, x_half), out_half);
  }
  for (; i < last; i++) {
    const float gate = at(x, i, x_half);
    store(out, i, gate / (1.0f + expf(-gate)) * at(x, size + i, x_half), out_half);
  }
}

DISPATCHED
static void swiglu(const float *x, float *out, long size, long first, long last) {
  swiglu_any(x, 0, out, 0, size, first, last);
}

/* What a product of PyTorch multiplies of one token: RMSNorm, or without a ``norm`` SwiGLU. */
DISPATCHED
static void prepare_token(const void *x, int x_half, const void *norm, int norm_half, float eps,
                          void *out, int out_half, long inputs) {
  if (norm)
    normalise_any(x, x_half, norm, norm_half, eps, out, out_half, inputs);
  else
    swiglu_any(x, x_half, out, out_half, inputs, 0, inputs);
}

enum { AS_IT_IS, NORMALISED, GATED };

/* Bring groups of a token's states into the form that products read: see products.h, quantised.h. */
INLINE void prepare(const float *x, void *to, int format, long inputs, long first, long last) {
  if (format == BFLOAT16)
    to_halves(x, to, inputs, first, last);
  else if (format != FLOAT32)
    to_codes(x, to, inputs, format, first, last);
}

/* The size of a token's states in that form, in bytes. */
INLINE long prepared_size(long inputs, int format) {
  if (format == BFLOAT16) return groups_of(inputs) * GROUP * (multiplies_pairs ? 2 : 4);
  return record_of(inputs);
}

/* y = W f(x) (+ residual); f by ``before``: nothing, RMSNorm, or SwiGLU of twice the inputs.
   ``panels`` is that of new_panels. */
static void linear_in_parts(Team team, const float *x, Matrix w, int format, float *y, long tokens,
                            long inputs, long outputs, int before, const void *norm, int bfloat16,
                            float eps, const float *residual, float *scratch, float *panels) {
  const long me = team.me, all = team.all, groups = groups_of(inputs);
  const long from = groups * me / all, to = groups * (me + 1) / all, end = to * GROUP;
  const int prepares = before != AS_IT_IS || format != FLOAT32;
  int8_t *records = prepares ? (int8_t *)(scratch + tokens * inputs) : NULL;
  const long size = prepared_size(inputs, format);
  for (long t = 0; t < tokens && prepares; t++) {
    float *row = scratch + t * inputs;
    void *ready = format == FLOAT32 ? (void *)row : records + t * size;
    if (before == GATED) {
      swiglu(x + 2 * t * inputs, row, inputs, from * GROUP, end < inputs ? end : inputs);
      prepare(row, ready, format, inputs, from, to);
    } else if (before == NORMALISED && t % all == me) {
      normalise(x + t * inputs, norm, bfloat16, eps, row, inputs);
      prepare(row, ready, format, inputs, 0, groups);
    } else if (before == AS_IT_IS) {
      prepare(x + t * inputs, ready, format, inputs, from, to);
    }
  }
  if (prepares) {
#pragma omp barrier
    x = format == BFLOAT16 ? (const float *)records : scratch;
  }
  long first = outputs * me / all, last = outputs * (me + 1) / all;
  if (are_many(panels, format, inputs)) {
    products_of_many(team, x, w.values, format, y, residual, tokens, inputs, outputs, first, last,
                     panels);
    residual = NULL;
  } else if (format < INT8) {
    (format == BFLOAT16 ? half_products : float_products)(x, w.values, y, tokens, inputs, outputs,
                                                          first, last);
  } else {
    const long parts = (outputs + ROWS - 1) / ROWS;
    first = parts * me / all, last = parts * (me + 1) / all;
    quantised_products(records, w, format, y, tokens, inputs, outputs, first, last);
    first *= ROWS, last = last * ROWS < outputs ? last * ROWS : outputs;
  }
  if (residual)
    for (long t = 0; t < tokens; t++)
      for (long o = first; o < last; o++) y[t * outputs + o] += residual[t * outputs + o];
#pragma omp barrier
}

#include "prompts.h"
#include "attention.h"

/* Rotate a head, whose halves are pairs. */
DISPATCHED
static void rotate(float *x, const float *cosines, const float *sines, long size, float scale) {
  const long half = size / 2;
  for (long i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = (a * cosines[i] + b * sines[i]) * scale;
    x[i + half] = (b * cosines[i + half] + a * sines[i + half]) * scale;
  }
}

/* Rotate, store keys and values, attend. qkv is (tokens, (heads + 2 kv_heads) size). With heads 0,
   and for the first ``kept`` tokens, keys and values are only stored. Without ``own`` keys and values
   qkv is (tokens, heads size), and nothing is stored. The cache is (rows, kv_heads, capacity, size);
   token t is in slots[t] of rows[t]. cosines and sines are (positions, size). scores has space for
   TOGETHER (capacity + LANES) numbers per thread, out for the tokens that attend. lengths (rows) counts the
   positions that are written. ``text`` is that of new_text for these tokens. */
static void attend_in_parts(Team team, float *qkv, const float *cosines, const float *sines,
                            void *keys, void *values, int64_t *lengths, int bfloat16,
                            const int64_t *slots, const int64_t *rows, float *out, float *scores,
                            long tokens, long kept, long heads, long kv_heads, long size,
                            long capacity, int own, Text text) {
  const long all_heads = heads + (own ? 2 * kv_heads : 0);
  const float scale = 1.0f / sqrtf((float)size);
  for (long job = team.me; job < tokens * all_heads; job += team.all) {
    const long t = job / all_heads, head = job % all_heads;
    float *x = qkv + job * size;
    const long kv = head < heads + kv_heads ? head - heads : head - heads - kv_heads;
    const long to = ((rows[t] * kv_heads + kv) * capacity + slots[t]) * size;
    if (head < heads + kv_heads)
      rotate(x, cosines + slots[t] * size, sines + slots[t] * size, size,
             head < heads ? scale : 1.0f);
    if (head >= heads)
      for (long i = 0; i < size; i++)
        store(head < heads + kv_heads ? keys : values, to + i, x[i], bfloat16);
  }
  for (long t = 0; t < tokens && team.me == 0 && own; t++)
    if (lengths[rows[t]] < slots[t] + 1) lengths[rows[t]] = slots[t] + 1;
#pragma omp barrier
  if (text.keys) {
    attend_text(team, text, qkv, keys, values, bfloat16, slots[0], rows[0], out, tokens, all_heads,
                heads, kv_heads, size, capacity);
    return;
  }
  const long group = heads / kv_heads, parts = (group + TOGETHER - 1) / TOGETHER;
  const long apart = capacity + LANES;
  float *mine = scores + team.me * TOGETHER * apart;
#pragma omp for schedule(dynamic, 1)
  for (long job = kept * kv_heads * parts; job < tokens * kv_heads * parts; job++) {
    const long t = job / (kv_heads * parts), kv = job / parts % kv_heads, first = job % parts * TOGETHER;
    const long from = (rows[t] * kv_heads + kv) * capacity * size * (bfloat16 ? 2 : 4);
    const long head = kv * group + first, n = group - first < TOGETHER ? group - first : TOGETHER;
    attention(qkv + (t * all_heads + head) * size, n, (char *)keys + from, (char *)values + from,
              bfloat16, out + ((t - kept) * heads + head) * size, mine, apart, slots[t] + 1, size);
  }
}

/* Multiplications of attention. */
static long work_of(const int64_t *slots, long first, long tokens, long heads, long size) {
  long work = 0;
  for (long t = first; t < tokens; t++) work += 2 * heads * size * (slots[t] + 1);
  return work;
}

static void normalise_in_parts(Team team, float *x, const void *norm, int bfloat16, float eps,
                               long tokens, long size) {
  for (long t = team.me; t < tokens; t += team.all)
    normalise(x + t * size, norm, bfloat16, eps, x + t * size, size);
#pragma omp barrier
}

#define AT(address) ((void *)(uintptr_t)(address))

/* The addresses of a weight's values, scales and minimums; 0 for what its format has not. */
typedef struct {
  uint64_t values, scales, minimums;
} Addresses;

INLINE Matrix matrix(Addresses of) {
  return (Matrix){AT(of.values), AT(of.scales), AT(of.minimums)};
}

/* The addresses of a block's weights; the norms are before or after the sublayers. */
typedef struct {
  Addresses qkv, out, gate_up, down;
  uint64_t first_norm, second_norm;
} Weights;

/* Run blocks on the states x (tokens, hidden), in place. The first ``kept`` tokens keep their state:
   only their keys and values are computed. keys, values and lengths are those of the first block;
   those of the next block are ``layer`` bytes and ``cached`` rows further. Only the first ``own``
   blocks have their own keys and values; the others have only queries, and read those of the last
   block that has (or, if there is none here, those that are given). ``format`` is that of the
   matrices; with bfloat16 the norms and the cache are bfloat16, and so is a state after a block.
   room is a buffer of tokens x (qkv + attended + hidden + 2 units) numbers and the scratch of the
   most inputs (kernel_weights.py), where units is the larger of lower (units of the blocks with own
   keys and values) and upper. */
static void blocks(float *x, const Weights *weights, long count, int format, int bfloat16, int post,
                   float eps,
                   const float *cosines, const float *sines, char *keys, char *values, long layer,
                   int64_t *lengths, long cached, const int64_t *slots, const int64_t *rows,
                   float *room, float *scores,
                   long tokens, long kept, long hidden, long lower, long upper, long heads,
                   long kv_heads, long size, long capacity, int threads, long own) {
  const long attended = heads * size, all_heads = attended + 2 * kv_heads * size;
  const long running = tokens - kept, most = larger(lower, upper);
  const long work = own * tokens * hidden * all_heads + (count - own) * running * hidden * attended +
                    3 * running * hidden * (own * lower + (count - own) * upper) +
                    count * (running * hidden * attended +
                             work_of(slots, kept, tokens, heads, size));
  const int before = post ? AS_IT_IS : NORMALISED;
  float *qkv = room, *seen = qkv + tokens * all_heads, *middle = seen + tokens * attended;
  float *gate_up = middle + tokens * hidden, *scratch = gate_up + 2 * tokens * most;
  float *mine = x + kept * hidden;
  if (work < count * SERIAL_BLOCK) threads = 1;
  const Text text = new_text(slots, rows, tokens, kept, heads, kv_heads, size, bfloat16);
  float *panels = new_panels(format, tokens, larger(larger(hidden, attended), most));
#pragma omp parallel num_threads(threads)
  {
    const Team we = team();
    for (long i = 0; i < count; i++) {
      const Weights *of = weights + i;
      const void *first = AT(of->first_norm), *second = AT(of->second_norm);
      const long left_out = i < own ? 0 : kept, here = tokens - left_out;
      const long units = i < own ? lower : upper;
      const long from = i < own ? i : own ? own - 1 : 0;
      linear_in_parts(we, x + left_out * hidden, matrix(of->qkv), format, qkv, here, hidden,
                      i < own ? all_heads : attended, before, first, bfloat16, eps, NULL, scratch,
                      panels);
      attend_in_parts(we, qkv, cosines, sines, keys + from * layer, values + from * layer,
                      lengths + from * cached, bfloat16, slots + left_out, rows + left_out, seen,
                      scores, here, kept - left_out, heads, kv_heads, size, capacity, i < own, text);
      linear_in_parts(we, seen, matrix(of->out), format, middle, running, attended, hidden, AS_IT_IS,
                      NULL, 0, eps, mine, scratch, panels);
      if (post) normalise_in_parts(we, middle, first, bfloat16, eps, running, hidden);
      linear_in_parts(we, middle, matrix(of->gate_up), format, gate_up, running, hidden, 2 * units,
                      before, second, bfloat16, eps, NULL, scratch, panels);
      linear_in_parts(we, gate_up, matrix(of->down), format, mine, running, units, hidden, GATED,
                      NULL, 0, eps, middle, scratch, panels);
      if (post) normalise_in_parts(we, mine, second, bfloat16, eps, running, hidden);
      if (bfloat16) {
        for (long j = we.me; j < running * hidden; j += we.all) mine[j] = wide(narrow(mine[j]));
#pragma omp barrier
      }
    }
  }
  free(text.keys);
  free(panels);
}

typedef unsigned long long address;

/* Sizes that would divide by zero or write beyond an array of a fixed size. */
static int refused(long tokens, long heads, long kv_heads, long size, long capacity, int threads) {
  if (tokens >= 0 && heads >= 0 && kv_heads >= 1 && heads % kv_heads == 0 && size >= LANES &&
      size % LANES == 0 && size <= LARGEST_HEAD && capacity >= 1 && threads >= 1)
    return 0;
  PyErr_SetString(PyExc_ValueError, "expected sizes of tokens and heads that fit together");
  return 1;
}

static PyObject *py_linear(PyObject *self, PyObject *args) {
  address x, y, norm, residual, scratch;
  Addresses w;
  long tokens, inputs, outputs;
  int format, before, bfloat16, threads;
  float eps;
  if (!PyArg_ParseTuple(args, "K(KKK)iKllliKpfKKi", &x, &w.values, &w.scales, &w.minimums, &format,
                        &y, &tokens, &inputs, &outputs, &before, &norm, &bfloat16, &eps, &residual,
                        &scratch, &threads))
    return NULL;
  if (tokens < 0 || inputs < 0 || outputs < 0 || threads < 1 || format < FLOAT32 || format > INT4) {
    PyErr_SetString(PyExc_ValueError, "expected sizes of at least 0 and threads of at least 1");
    return NULL;
  }
  if (tokens * inputs * outputs < SERIAL) threads = 1;
  Py_BEGIN_ALLOW_THREADS
  float *panels = new_panels(format, tokens, inputs);
#pragma omp parallel num_threads(threads)
  linear_in_parts(team(), AT(x), matrix(w), format, AT(y), tokens, inputs, outputs, before,
                  AT(norm), bfloat16, eps, AT(residual), AT(scratch), panels);
  free(panels);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_prepare(PyObject *self, PyObject *args) {
  address x, norm, out;
  long tokens, inputs;
  int x_half, norm_half, out_half, threads;
  float eps;
  if (!PyArg_ParseTuple(args, "KpKpfKplli", &x, &x_half, &norm, &norm_half, &eps, &out, &out_half,
                        &tokens, &inputs, &threads))
    return NULL;
  if (tokens < 0 || inputs < 0 || threads < 1) {
    PyErr_SetString(PyExc_ValueError, "expected sizes of at least 0 and threads of at least 1");
    return NULL;
  }
  const long x_bytes = (norm ? 1 : 2) * inputs * (x_half ? 2 : 4);
  const long out_bytes = inputs * (out_half ? 2 : 4);
  if (tokens * inputs < SERIAL) threads = 1;
  Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads(threads)
  for (long t = 0; t < tokens; t++)
    prepare_token((char *)AT(x) + t * x_bytes, x_half, AT(norm), norm_half, eps,
                  (char *)AT(out) + t * out_bytes, out_half, inputs);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_attend(PyObject *self, PyObject *args) {
  address qkv, cosines, sines, keys, values, lengths, slots, rows, out, scores;
  long tokens, heads, kv_heads, size, capacity;
  int bfloat16, threads, own;
  if (!PyArg_ParseTuple(args, "KKKKKKpKKKKlllllip", &qkv, &cosines, &sines, &keys, &values,
                        &lengths, &bfloat16, &slots, &rows, &out, &scores, &tokens, &heads,
                        &kv_heads, &size, &capacity, &threads, &own))
    return NULL;
  if (refused(tokens, heads, kv_heads, size, capacity, threads)) return NULL;
  if (work_of(AT(slots), 0, tokens, heads, size) < SERIAL) threads = 1;
  Py_BEGIN_ALLOW_THREADS
  const Text text = new_text(AT(slots), AT(rows), tokens, 0, heads, kv_heads, size, bfloat16);
#pragma omp parallel num_threads(threads)
  attend_in_parts(team(), AT(qkv), AT(cosines), AT(sines), AT(keys), AT(values), AT(lengths),
                  bfloat16, AT(slots), AT(rows), AT(out), AT(scores), tokens, 0, heads, kv_heads,
                  size, capacity, own, text);
  free(text.keys);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_blocks(PyObject *self, PyObject *args) {
  address x, weights, cosines, sines, keys, values, lengths, slots, rows, room, scores;
  long count, layer, cached, tokens, kept, hidden, units, heads, kv_heads, size, capacity;
  long own, upper;
  int format, bfloat16, post, threads;
  float eps;
  if (!PyArg_ParseTuple(args, "KKlippfKKKKlKlKKKKllllllllill", &x, &weights, &count, &format,
                        &bfloat16, &post, &eps, &cosines, &sines, &keys, &values, &layer, &lengths, &cached,
                        &slots, &rows, &room,
                        &scores, &tokens, &kept, &hidden, &units, &heads, &kv_heads, &size,
                        &capacity, &threads, &own, &upper))
    return NULL;
  if (refused(tokens, heads, kv_heads, size, capacity, threads)) return NULL;
  if (format < FLOAT32 || format > INT4) {
    PyErr_SetString(PyExc_ValueError, "expected a format of weights");
    return NULL;
  }
  Py_BEGIN_ALLOW_THREADS
  blocks(AT(x), AT(weights), count, format, bfloat16, post, eps, AT(cosines), AT(sines), AT(keys),
         AT(values), layer, AT(lengths), cached, AT(slots), AT(rows), AT(room), AT(scores),
         tokens, kept, hidden, units, upper, heads, kv_heads, size, capacity, threads, own);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

#include "_route.h"

/* Limit the kinds of quantised products, for tests; return the kind that is used (quantised.h). */
static PyObject *py_kind(PyObject *self, PyObject *args) {
  int most;
  if (!PyArg_ParseTuple(args, "i", &most)) return NULL;
  return PyLong_FromLong(choose_products(most));
}

/* The formats, as bits, whose products with many tokens the processor has (many.h). */
static PyObject *py_many(PyObject *self, PyObject *args) {
  return PyLong_FromLong(multiplies_many);
}

static PyMethodDef methods[] = {{"linear", py_linear, METH_VARARGS, ""},
                                {"prepare", py_prepare, METH_VARARGS, ""},
                                {"attend", py_attend, METH_VARARGS, ""},
                                {"blocks", py_blocks, METH_VARARGS, ""},
                                {"route", py_route, METH_VARARGS, ""},
                                {"run_on", py_run_on, METH_VARARGS, ""},
                                {"kind", py_kind, METH_VARARGS, ""},
                                {"many", py_many, METH_NOARGS, ""},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_few_tokens", "", -1, methods};
PyMODINIT_FUNC PyInit__few_tokens(void) {
  choose_products(MOST_KIND);
  return PyModule_Create(&module);
}
