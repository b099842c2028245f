/* Matrix products and attention for a few tokens, as fast as the memory gives the weights.

   Decoding reads every weight once for a handful of tokens. The usual libraries read a matrix at
   half the memory's speed for one column, and at less for several. Here each row of a weight is
   read once and meets all tokens while it is in registers, so a few tokens take no longer than
   one; and what a token gets does not depend, bit for bit, on how many there are.

   States are float32 (rows of x are tokens), weights and the cache float32 or bfloat16. Weights
   are (outputs, inputs), contiguous. Addresses and sizes are checked in Python: kernels.py.
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

#define LANES 8
#define AHEAD 1024     /* bytes */
#define TOKENS 6       /* whose sums fit the registers */
#define TILE 4         /* rows of a weight that wait in the cache for the next tokens */
#define SERIAL 65536   /* multiplications that are not worth a second thread */
#define LARGEST_HEAD 256

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

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

/* Rows first .. last - 1 of a weight, times n <= TOKENS tokens. */
INLINE void products(const float *x, const void *w, int bfloat16, float *y, long inputs,
                     long outputs, long first, long last, const int n) {
  for (long o = first; o < last; o++) {
    const long row = o * inputs;
    vec even[TOKENS], odd[TOKENS];
    for (int t = 0; t < n; t++) even[t] = odd[t] = (vec){0};
    long i = 0;
    for (; i + 2 * LANES <= inputs; i += 2 * LANES) {
      vec a = load(w, row + i, bfloat16), b = load(w, row + i + LANES, bfloat16);
      if (n > 1 || bfloat16) /* alone in float32 the processor's own foresight is better */
        __builtin_prefetch((const char *)w + (bfloat16 ? 2 : 4) * (row + i) + AHEAD);
      for (int t = 0; t < n; t++) {
        even[t] += a * load(x, t * inputs + i, 0);
        odd[t] += b * load(x, t * inputs + i + LANES, 0);
      }
    }
    for (int t = 0; t < n; t++) {
      float total = sum(even[t] + odd[t]);
      for (long rest = i; rest < inputs; rest++)
        total += at(w, row + rest, bfloat16) * x[t * inputs + rest];
      y[t * outputs + o] = total;
    }
  }
}

#define CASE(n)                                                                           \
  case n:                                                                                 \
    if (bfloat16)                                                                         \
      products(x_at, w, 1, y_at, inputs, outputs, tile, end, n);                          \
    else                                                                                  \
      products(x_at, w, 0, y_at, inputs, outputs, tile, end, n);                          \
    break;

DISPATCHED
static void rows_of(const float *x, const void *w, int bfloat16, float *y, long tokens,
                    long inputs, long outputs, long first, long last) {
  for (long tile = first; tile < last; tile += TILE) {
    const long end = tile + TILE < last ? tile + TILE : last;
    for (long t = 0; t < tokens; t += TOKENS) {
      const float *x_at = x + t * inputs;
      float *y_at = y + t * outputs;
      switch (tokens - t < TOKENS ? tokens - t : TOKENS) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
      }
    }
  }
}

DISPATCHED
static void normalise(const float *x, const void *weight, int bfloat16, float eps, float *out,
                      long size) {
  vec squares = {0};
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    vec a = load(x, i, 0);
    squares += a * a;
  }
  float total = sum(squares);
  for (; i < size; i++) total += x[i] * x[i];
  const float scale = 1.0f / sqrtf(total / size + eps);
  for (i = 0; i < size; i++) out[i] = x[i] * scale * at(weight, i, bfloat16);
}

/* SiLU(first half) x second half, of entries first .. last - 1. */
DISPATCHED
static void swiglu(const float *x, float *out, long size, long first, long last) {
  long i = first;
  for (; i + LANES <= last; i += LANES) {
    vec gate = load(x, i, 0);
    vec y = gate / (1.0f + exponential(-gate)) * load(x, size + i, 0);
    memcpy(out + i, &y, sizeof y);
  }
  for (; i < last; i++) out[i] = x[i] / (1.0f + expf(-x[i])) * x[size + i];
}

enum { AS_IT_IS, NORMALISED, GATED };

/* y = W f(x) (+ residual); f by ``before``: nothing, RMSNorm, or SwiGLU of twice the inputs. */
static void linear(const float *x, const void *w, int bfloat16, float *y, long tokens,
                   long inputs, long outputs, int before, const void *norm, float eps,
                   const float *residual, float *scratch, int threads) {
  const float *read = before == AS_IT_IS ? x : scratch;
  if (tokens * inputs * outputs < SERIAL) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    const long me = omp_get_thread_num(), all = omp_get_num_threads();
    if (before == NORMALISED) {
      for (long t = me; t < tokens; t += all)
        normalise(x + t * inputs, norm, bfloat16, eps, scratch + t * inputs, inputs);
    } else if (before == GATED) {
      for (long t = 0; t < tokens; t++)
        swiglu(x + 2 * t * inputs, scratch + t * inputs, inputs, inputs * me / all / LANES * LANES,
               me + 1 == all ? inputs : inputs * (me + 1) / all / LANES * LANES);
    }
#pragma omp barrier
    const long first = outputs * me / all, last = outputs * (me + 1) / all;
    rows_of(read, w, bfloat16, y, tokens, inputs, outputs, first, last);
    if (residual)
      for (long t = 0; t < tokens; t++)
        for (long o = first; o < last; o++) y[t * outputs + o] += residual[t * outputs + o];
  }
}

/* One query on the keys and values at positions 0 .. length - 1. */
DISPATCHED
static void attention(const float *query, const void *keys, const void *values, int bfloat16,
                      float *out, float *scores, long length, long size) {
  float most = -INFINITY;
  for (long j = 0; j < length; j++) {
    vec dot = {0};
    for (long i = 0; i < size; i += LANES)
      dot += load(query, i, 0) * load(keys, j * size + i, bfloat16);
    scores[j] = sum(dot);
    most = scores[j] > most ? scores[j] : most;
  }
  for (long j = length; j % LANES; j++) scores[j] = -INFINITY;
  vec total = {0};
  for (long j = 0; j < length; j += LANES) {
    vec p = exponential(load(scores, j, 0) - most);
    for (int k = 0; k < LANES; k++) p[k] = j + k < length ? p[k] : 0.0f;
    total += p;
    memcpy(scores + j, &p, sizeof p);
  }
  vec seen[LARGEST_HEAD / LANES];
  for (long i = 0; i < size / LANES; i++) seen[i] = (vec){0};
  for (long j = 0; j < length; j++)
    for (long i = 0; i < size / LANES; i++)
      seen[i] += scores[j] * load(values, j * size + i * LANES, bfloat16);
  const float scale = 1.0f / sum(total);
  for (long i = 0; i < size; i++) out[i] = seen[i / LANES][i % LANES] * scale;
}

INLINE void store(void *to, long i, float x, int bfloat16) {
  if (bfloat16)
    ((uint16_t *)to)[i] = narrow(x);
  else
    ((float *)to)[i] = x;
}

/* Rotate, store keys and values, attend. qkv is (tokens, (heads + 2 kv_heads) size); heads 0
   stores only. The cache is (rows, kv_heads, capacity, size); a token stands at slots[t] of
   rows[t]. scores has room for capacity + LANES numbers a thread. */
static void attend(float *qkv, const float *cosines, const float *sines, void *keys,
                   void *values, int bfloat16, const int64_t *slots, const int64_t *rows,
                   float *out, float *scores, long tokens, long heads, long kv_heads, long size,
                   long capacity, int threads) {
  const long width = (heads + 2 * kv_heads) * size, half = size / 2;
  const float scale = 1.0f / sqrtf((float)size);
  for (long t = 0; t < tokens; t++)
    for (long head = 0; head < heads + 2 * kv_heads; head++) {
      float *x = qkv + t * width + head * size;
      const long kv = head < heads + kv_heads ? head - heads : head - heads - kv_heads;
      const long to = ((rows[t] * kv_heads + kv) * capacity + slots[t]) * size;
      if (head < heads + kv_heads) {
        const float *c = cosines + t * size, *s = sines + t * size;
        for (long i = 0; i < half; i++) {
          const float a = x[i], b = x[i + half];
          x[i] = a * c[i] + b * s[i];
          x[i + half] = b * c[i + half] + a * s[i + half];
        }
      }
      if (head < heads)
        for (long i = 0; i < size; i++) x[i] *= scale;
      else
        for (long i = 0; i < size; i++)
          store(head < heads + kv_heads ? keys : values, to + i, x[i], bfloat16);
    }
  if (!heads) return;
  long work = 0;
  for (long t = 0; t < tokens; t++) work += 2 * heads * size * (slots[t] + 1);
  if (work < SERIAL) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    float *mine = scores + omp_get_thread_num() * (capacity + LANES);
#pragma omp for schedule(dynamic, 1)
    for (long job = 0; job < tokens * heads; job++) {
      const long t = job / heads, head = job % heads, kv = head / (heads / kv_heads);
      const long from = (rows[t] * kv_heads + kv) * capacity * size * (bfloat16 ? 2 : 4);
      attention(qkv + t * width + head * size, (char *)keys + from, (char *)values + from,
                bfloat16, out + (t * heads + head) * size, mine, slots[t] + 1, size);
    }
  }
}

#define AT(address) ((void *)(uintptr_t)(address))
typedef unsigned long long address;

static PyObject *py_linear(PyObject *self, PyObject *args) {
  address x, w, y, norm, residual, scratch;
  long tokens, inputs, outputs;
  int bfloat16, before, threads;
  float eps;
  if (!PyArg_ParseTuple(args, "KKiKllliKfKKi", &x, &w, &bfloat16, &y, &tokens, &inputs, &outputs,
                        &before, &norm, &eps, &residual, &scratch, &threads))
    return NULL;
  Py_BEGIN_ALLOW_THREADS
  linear(AT(x), AT(w), bfloat16, AT(y), tokens, inputs, outputs, before, AT(norm), eps,
         AT(residual), AT(scratch), threads);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_attend(PyObject *self, PyObject *args) {
  address qkv, cosines, sines, keys, values, slots, rows, out, scores;
  long tokens, heads, kv_heads, size, capacity;
  int bfloat16, threads;
  if (!PyArg_ParseTuple(args, "KKKKKiKKKKllllli", &qkv, &cosines, &sines, &keys, &values,
                        &bfloat16, &slots, &rows, &out, &scores, &tokens, &heads, &kv_heads,
                        &size, &capacity, &threads))
    return NULL;
  Py_BEGIN_ALLOW_THREADS
  attend(AT(qkv), AT(cosines), AT(sines), AT(keys), AT(values), bfloat16, AT(slots), AT(rows),
         AT(out), AT(scores), tokens, heads, kv_heads, size, capacity, threads);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"linear", py_linear, METH_VARARGS, ""},
                                {"attend", py_attend, METH_VARARGS, ""},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_few_tokens", "", -1, methods};
PyMODINIT_FUNC PyInit__few_tokens(void) { return PyModule_Create(&module); }
