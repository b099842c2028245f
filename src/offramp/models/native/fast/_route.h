/* New tokens of some rows, from the embedding to the exit where each leaves; see router.py.

   Blocks run from exit to exit. At an exit its gate decides which tokens leave: RMSNorm, a linear
   map, SiLU and another linear map, in float32. A token that leaves has no keys and values above its
   exit; it stays in the list of pending tokens until a later token of its row runs deeper, as in
   deferred.py. The structures are filled by Python, which checks every address and size. */

typedef struct {
  uint64_t gate_norm, gate_up, gate_up_bias, gate_out, gate_out_bias;
  uint64_t bounds; /* the lowest scores that leave, by ``since``: for each new token, rung or both */
  uint64_t extra;  /* price x cost of running on to each later exit; 0: the bounds decide */
  uint64_t head_norm;
  Addresses head; /* values 0: the caller computes the logits */
  double head_eps;
  int64_t layer, units, outputs, bounded, head_format, norm_bfloat16;
} Exit;

typedef struct {
  uint64_t weights, embeddings, cosines, sines, keys, values, lengths, exits;
  uint64_t x, slots, rows, room, gate, states; /* space for FEW tokens */
  uint64_t pending_states, pending_slots, pending_rows, pending_layers;
  double eps, gate_eps;
  int64_t format, bfloat16, post, hidden, lower, upper, heads, kv_heads, size, capacity, cached;
  int64_t layer_bytes;
  int64_t cache_layers, complete_from, recompute, gain, exit_count, vocab, positions;
  int64_t pending, pending_space;
} Route;

/* The tokens that have not left, and the blocks that ran, by the tokens of a call. */
typedef struct {
  float *states; /* (count, hidden) */
  long count;
  int64_t slots[FEW], rows[FEW], since[FEW], place[FEW]; /* place: in the caller's order */
  long blocks[FEW + 1], keys_values[FEW + 1];
  float *scores; /* space for attention */
  int threads;
} Running;

static void run_blocks(const Route *r, const Running *run, float *x, const int64_t *slots,
                       const int64_t *rows, long start, long stop, long tokens, long kept) {
  const long cached = stop < r->cache_layers ? stop : r->cache_layers;
  const long first = start < r->cache_layers ? start : r->cache_layers - 1;
  blocks(x, (const Weights *)AT(r->weights) + start, stop - start, r->format, r->bfloat16,
         r->post, r->eps, AT(r->cosines), AT(r->sines),
         (char *)AT(r->keys) + first * r->layer_bytes, (char *)AT(r->values) + first * r->layer_bytes, r->layer_bytes,
         (int64_t *)AT(r->lengths) + first * r->cached, r->cached, slots, rows, AT(r->room),
         run->scores, tokens, kept, r->hidden, r->lower, r->upper, r->heads, r->kv_heads, r->size,
         r->capacity, run->threads, cached > start ? cached - start : 0);
}

/* Whether pending token i is at this layer and of a row that runs. */
static int awaits(const Route *r, const Running *run, long i, long layer) {
  if (((const int64_t *)AT(r->pending_layers))[i] != layer) return 0;
  for (long k = 0; k < run->count; k++)
    if (run->rows[k] == ((const int64_t *)AT(r->pending_rows))[i]) return 1;
  return 0;
}

/* Copy up to ``most`` pending tokens, from number ``next`` of the list on, into the space for a call.
   Returns how many; their numbers are in ``found``. */
static long gather(const Route *r, const Running *run, long layer, long most, long *next,
                   long *found) {
  long count = 0;
  for (; *next < r->pending && count < most; ++*next) {
    const long i = *next;
    if (!awaits(r, run, i, layer)) continue;
    memcpy((float *)AT(r->x) + count * r->hidden,
           (const float *)AT(r->pending_states) + i * r->hidden, 4 * r->hidden);
    ((int64_t *)AT(r->slots))[count] = ((const int64_t *)AT(r->pending_slots))[i];
    ((int64_t *)AT(r->rows))[count] = ((const int64_t *)AT(r->pending_rows))[i];
    found[count++] = i;
  }
  return count;
}

static void add_running(const Route *r, const Running *run, long from, long count, long to) {
  memcpy((float *)AT(r->x) + to * r->hidden, run->states + from * r->hidden,
         4 * count * r->hidden);
  memcpy((int64_t *)AT(r->slots) + to, run->slots + from, 8 * count);
  memcpy((int64_t *)AT(r->rows) + to, run->rows + from, 8 * count);
}

/* Pending tokens of the rows that run move up; above the last layer with keys and values nothing is
   pending. The others keep their order, which is that of their positions in each row. */
static void move_up(Route *r, const Running *run, long from, long to) {
  int64_t *layers = AT(r->pending_layers), *slots = AT(r->pending_slots);
  int64_t *rows = AT(r->pending_rows);
  float *states = AT(r->pending_states);
  long kept = 0;
  for (long i = 0; i < r->pending; i++) {
    const int64_t layer = awaits(r, run, i, from) ? to : layers[i];
    if (layer >= r->cache_layers) continue;
    if (kept != i) {
      memcpy(states + kept * r->hidden, states + i * r->hidden, 4 * r->hidden);
      slots[kept] = slots[i], rows[kept] = rows[i];
    }
    layers[kept++] = layer;
  }
  r->pending = kept;
}

static void defer(Route *r, long layer, int64_t row, int64_t slot, const float *state) {
  if (layer >= r->cache_layers) return;
  const long i = r->pending++;
  memcpy((float *)AT(r->pending_states) + i * r->hidden, state, 4 * r->hidden);
  ((int64_t *)AT(r->pending_slots))[i] = slot;
  ((int64_t *)AT(r->pending_rows))[i] = row;
  ((int64_t *)AT(r->pending_layers))[i] = layer;
}

/* Run the tokens from layer start to stop. The keys and values of pending tokens are projected from
   their states, in the same products if all tokens fit into one call. */
static void propagate(Route *r, Running *run, long pending, long start, long stop) {
  const long top = stop < r->cache_layers ? stop : r->cache_layers;
  long next = 0, found[FEW], count;
  float *x = AT(r->x);
  run->blocks[run->count] += stop - start;
  if (pending + run->count <= FEW) {
    gather(r, run, start, pending, &next, found);
    add_running(r, run, 0, run->count, pending);
    run->keys_values[pending] += top - start;
    run_blocks(r, run, x, AT(r->slots), AT(r->rows), start, stop, pending + run->count, pending);
    memcpy(run->states, x + pending * r->hidden, 4 * run->count * r->hidden);
  } else {
    while ((count = gather(r, run, start, FEW, &next, found))) {
      run->keys_values[count] += top - start;
      run_blocks(r, run, x, AT(r->slots), AT(r->rows), start, top, count, count);
    }
    run_blocks(r, run, run->states, run->slots, run->rows, start, stop, run->count, 0);
  }
  move_up(r, run, start, stop);
}

/* Run the tokens and the pending ones from layer start to stop, a few in each call. */
static void recompute(Route *r, Running *run, long start, long stop) {
  long next = 0, found[FEW], ran = 0;
  float *x = AT(r->x), *states = AT(r->pending_states);
  while (ran < run->count) {
    const long old = gather(r, run, start, FEW, &next, found);
    const long new = FEW - old < run->count - ran ? FEW - old : run->count - ran;
    add_running(r, run, ran, new, old);
    run->blocks[old + new] += stop - start;
    run_blocks(r, run, x, AT(r->slots), AT(r->rows), start, stop, old + new, 0);
    for (long k = 0; k < old; k++)
      memcpy(states + found[k] * r->hidden, x + k * r->hidden, 4 * r->hidden);
    memcpy(run->states + ran * r->hidden, x + old * r->hidden, 4 * new * r->hidden);
    ran += new;
  }
  move_up(r, run, start, stop);
}

static void run_to(Route *r, Running *run, long start, long stop) {
  long pending = 0;
  for (long i = 0; i < r->pending; i++) pending += awaits(r, run, i, start);
  if (!pending) {
    run->blocks[run->count] += stop - start;
    run_blocks(r, run, run->states, run->slots, run->rows, start, stop, run->count, 0);
  } else if (!r->recompute || start >= r->complete_from) {
    propagate(r, run, pending, start, stop);
  } else {
    const long here = stop < r->complete_from ? stop : r->complete_from;
    recompute(r, run, start, here);
    if (here < stop) run_to(r, run, here, stop);
  }
}

/* y = W f(x), by as many threads as pay. */
static void linear_of(const float *x, Matrix w, int format, float *y, long tokens, long inputs,
                      long outputs, const void *norm, int bfloat16, float eps, float *scratch,
                      int threads) {
  if (tokens * inputs * outputs < SERIAL) threads = 1;
#pragma omp parallel num_threads(threads)
  linear_in_parts(team(), x, w, format, y, tokens, inputs, outputs, norm ? NORMALISED : AS_IT_IS,
                  norm, bfloat16, eps, NULL, scratch, NULL);
}

enum { STAYS, LEAVES, BREAKS };

/* The score of each running token at an exit, and whether it leaves (exits/policy.py) or its score is
   not a number. */
static void decide(const Route *r, const Exit *exit, const Running *run, float *score, int *leaves) {
  const long n = run->count, units = exit->units, outputs = exit->outputs;
  float *scratch = AT(r->gate), *middle = scratch + n * r->hidden, *out = middle + n * units;
  const float *bias = AT(exit->gate_up_bias), *last_bias = AT(exit->gate_out_bias);
  const float *bounds = AT(exit->bounds), *extra = AT(exit->extra);
  linear_of(run->states, (Matrix){AT(exit->gate_up)}, FLOAT32, middle, n, r->hidden, units,
            AT(exit->gate_norm), 0, r->gate_eps, scratch, run->threads);
  for (long i = 0; i < n * units; i++) {
    const float y = middle[i] + bias[i % units];
    middle[i] = y / (1.0f + expf(-y));
  }
  linear_of(middle, (Matrix){AT(exit->gate_out)}, FLOAT32, out, n, units, outputs, NULL, 0, 0, NULL,
            1);
  for (long t = 0; t < n; t++) {
    float *y = out + t * outputs;
    for (long k = 0; k < outputs; k++) {
      y[k] += last_bias[k];
      if (r->gain) y[k] = y[k] > 20.0f ? y[k] : log1pf(expf(y[k])); /* nats that leaving costs */
    }
    score[t] = r->gain ? -y[0] : 1.0f / (1.0f + expf(-y[0]));
    if (score[t] != score[t]) {
      leaves[t] = BREAKS;
    } else if (extra) {
      float best = y[0] - extra[outputs - 1];
      for (long k = 1; k < outputs; k++) {
        const float saved = y[0] - y[k] - extra[k - 1];
        best = saved > best ? saved : best;
      }
      leaves[t] = best <= 0.0f ? LEAVES : STAYS;
    } else {
      const long at = run->since[t] < exit->bounded ? run->since[t] : exit->bounded - 1;
      leaves[t] = score[t] >= bounds[at] ? LEAVES : STAYS;
    }
  }
}

/* The largest of some logits, NaN if one is; its first place; and its probability. */
DISPATCHED
static float largest(const float *logits, long vocab, int64_t *place, float *probability) {
  const float *x = logits;
  vec most = (vec){0} - INFINITY, total = {0};
  ints nan = {0};
  long i = 0;
  for (; i + LANES <= vocab; i += LANES) {
    const vec here = load(x, i, 0);
    most = chosen(here > most, here, most);
    nan |= here != here;
  }
  float top = -INFINITY, rest = 0.0f;
  int none = 0;
  for (int k = 0; k < LANES; k++) top = most[k] > top ? most[k] : top, none |= nan[k];
  for (; i < vocab; i++) top = x[i] > top ? x[i] : top, none |= x[i] != x[i];
  for (i = 0; i + LANES <= vocab; i += LANES) total += exponential(load(x, i, 0) - top);
  for (; i < vocab; i++) rest += expf(x[i] - top);
  *probability = none ? NAN : 1.0f / (sum(total) + rest);
  for (i = 0; i < vocab && x[i] != top; i++) {}
  *place = i < vocab ? i : 0;
  return none ? NAN : top;
}

/* Round numbers to bfloat16, in place, and copy them. */
DISPATCHED
static void round_all(float *x, uint16_t *to, long size) {
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    store_all(to, i, load(x, i, 0), 1);
    store_all(x, i, load(to, i, 1), 0);
  }
  for (; i < size; i++) to[i] = narrow(x[i]), x[i] = wide(to[i]);
}

/* What ``route`` says of each token, in the caller's order. A token whose score at exit e is not a
   number has the exit -1 - e, and is not decoded. */
typedef struct {
  int64_t exit[FEW], best[FEW];
  float score[FEW], top[FEW];
  long evaluated[FEW], left[FEW]; /* by exit */
} Left;

/* The logits of the tokens that leave, whose states are in ``states`` by their places. */
static int logits_of(const Route *r, const Exit *exit, const Running *run, long count,
                     const int64_t *place, char *logits, int last, Left *left) {
  const long vocab = r->vocab, hidden = r->hidden;
  const float *states = AT(r->states);
  float *scratch = AT(r->gate), *x = AT(r->x), *y = malloc(4 * count * vocab);
  if (!y) return 0;
  for (long i = 0; i < count; i++)
    memcpy(x + i * hidden, states + place[i] * hidden, 4 * hidden);
  linear_of(x, matrix(exit->head), exit->head_format, y, count, hidden, vocab, AT(exit->head_norm),
            exit->norm_bfloat16, exit->head_eps, scratch, run->threads);
#pragma omp parallel for num_threads(run->threads) if (count > 1)
  for (long i = 0; i < count; i++) {
    float *mine = y + i * vocab, probability;
    if (r->bfloat16)
      round_all(mine, (uint16_t *)logits + place[i] * vocab, vocab);
    else
      memcpy((float *)logits + place[i] * vocab, mine, 4 * vocab);
    left->top[place[i]] = largest(mine, vocab, left->best + place[i], &probability);
    if (last) left->score[place[i]] = probability;
  }
  free(y);
  return 1;
}

/* Run one token of each row until it leaves. Returns 0 without memory. */
static int route(Route *r, Running *run, const int64_t *ids, char *logits, Left *left) {
  const long hidden = r->hidden;
  float *states = AT(r->states), score[FEW];
  int leaves[FEW];
  for (long i = 0; i < run->count; i++)
    for (long j = 0; j < hidden; j++)
      run->states[i * hidden + j] = at(AT(r->embeddings), ids[i] * hidden + j, r->bfloat16);
  long done = 0;
  for (long e = 0; e < r->exit_count && run->count; e++) {
    const Exit *exit = (const Exit *)AT(r->exits) + e;
    const int last = e + 1 == r->exit_count;
    int64_t out[FEW];
    long count = 0, staying = 0;
    run_to(r, run, done, exit->layer);
    done = exit->layer;
    if (!last) {
      left->evaluated[e] = run->count;
      decide(r, exit, run, score, leaves);
    }
    for (long i = 0; i < run->count; i++) {
      const float *state = run->states + i * hidden;
      const int64_t place = run->place[i];
      if (!last && leaves[i] == BREAKS) {
        left->exit[place] = -1 - e;
      } else if (last || leaves[i] == LEAVES) {
        out[count++] = place;
        memcpy(states + place * hidden, state, 4 * hidden);
        left->exit[place] = e;
        if (!last) {
          left->score[place] = score[i];
          defer(r, exit->layer, run->rows[i], run->slots[i], state);
        }
      } else {
        if (staying != i) memcpy(run->states + staying * hidden, state, 4 * hidden);
        run->slots[staying] = run->slots[i], run->rows[staying] = run->rows[i];
        run->since[staying] = run->since[i], run->place[staying++] = place;
      }
    }
    left->left[e] = count;
    run->count = staying;
    if (count && exit->head.values && !logits_of(r, exit, run, count, out, logits, last, left)) return 0;
  }
  return 1;
}

/* Run a token of the last call, which left at exit number ``exit``, on to the last layer. It runs
   with copies of its row's other pending tokens, and lengths are put back, so that nothing changes
   but slots above the exit, which are filled anew when they are needed. Returns 0 without memory. */
static int run_on(const Route *r, Running *run, long place, long exit, char *logits, Left *left) {
  const long hidden = r->hidden, last = r->exit_count - 1;
  const int64_t *rows = AT(r->pending_rows), *slots = AT(r->pending_slots);
  const int64_t *layers = AT(r->pending_layers), first = 0;
  const float *states = AT(r->pending_states);
  const Exit *exits = AT(r->exits);
  int64_t *lengths = (int64_t *)AT(r->lengths) + run->rows[0];
  char *space = malloc(r->pending * (4 * hidden + 24) + 8 * r->cache_layers);
  if (!space) return 0;
  int64_t *before = (int64_t *)space, *own_slots = before + r->cache_layers;
  int64_t *own_rows = own_slots + r->pending, *own_layers = own_rows + r->pending;
  float *own_states = (float *)(own_layers + r->pending);
  long count = 0;
  for (long i = 0; i < r->pending; i++) {
    if (rows[i] != run->rows[0] || slots[i] == run->slots[0]) continue;
    memcpy(own_states + count * hidden, states + i * hidden, 4 * hidden);
    own_slots[count] = slots[i], own_rows[count] = rows[i], own_layers[count++] = layers[i];
  }
  for (long k = 0; k < r->cache_layers; k++) before[k] = lengths[k * r->cached];
  Route own = *r;
  own.pending = count, own.states = (uintptr_t)run->states;
  own.pending_slots = (uintptr_t)own_slots;
  own.pending_rows = (uintptr_t)own_rows;
  own.pending_layers = (uintptr_t)own_layers;
  own.pending_states = (uintptr_t)own_states;
  memcpy(run->states, (float *)AT(r->states) + place * hidden, 4 * hidden);
  for (long e = exit; e < last; e++) run_to(&own, run, exits[e].layer, exits[e + 1].layer);
  for (long k = 0; k < r->cache_layers; k++) lengths[k * r->cached] = before[k];
  free(space);
  left->exit[0] = last, left->left[last] = 1;
  return !exits[last].head.values || logits_of(&own, exits + last, run, 1, &first, logits, 1, left);
}

/* Read a list of whole numbers from 0 to below - 1. */
static int numbers(PyObject *list, int64_t *to, Py_ssize_t count, long long below) {
  if (!PyList_Check(list) || PyList_Size(list) != count) return 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    to[i] = PyLong_AsLongLong(PyList_GetItem(list, i));
    if (PyErr_Occurred() || to[i] < 0 || to[i] >= below) return 0;
  }
  return 1;
}

static int append(PyObject *list, PyObject *item) {
  const int failed = !item || PyList_Append(list, item);
  Py_XDECREF(item);
  return !failed;
}

static PyObject *described(const Route *r, const Running *run, const Left *left,
                           Py_ssize_t count) {
  PyObject *tokens = PyList_New(0), *calls = PyList_New(0);
  int fine = tokens && calls;
  for (Py_ssize_t i = 0; i < count && fine; i++)
    fine = append(tokens, Py_BuildValue("(LdLd)", (long long)left->exit[i], (double)left->score[i],
                                        (long long)left->best[i], (double)left->top[i]));
  for (long n = 1; n <= FEW && fine; n++) {
    if (run->blocks[n]) fine = append(calls, Py_BuildValue("(illl)", 0, 0L, n, run->blocks[n]));
    if (run->keys_values[n] && fine)
      fine = append(calls, Py_BuildValue("(illl)", 1, 0L, n, run->keys_values[n]));
  }
  for (long e = 0; e < r->exit_count && fine; e++) {
    if (left->evaluated[e]) fine = append(calls, Py_BuildValue("(illl)", 2, e, left->evaluated[e], 1L));
    if (left->left[e] && fine) fine = append(calls, Py_BuildValue("(illl)", 3, e, left->left[e], 1L));
  }
  if (fine) return Py_BuildValue("(NN)", tokens, calls);
  Py_XDECREF(tokens);
  Py_XDECREF(calls);
  return NULL;
}

static PyObject *py_route(PyObject *self, PyObject *args) {
  address plan, states, logits, scores;
  PyObject *ids, *rows, *slots, *since;
  int threads;
  if (!PyArg_ParseTuple(args, "KOOOOKKKi", &plan, &ids, &rows, &slots, &since, &states, &logits,
                        &scores, &threads))
    return NULL;
  Route *r = AT(plan);
  Running run = {.states = AT(states), .scores = AT(scores), .threads = threads};
  Left left = {0};
  int64_t id[FEW];
  const Py_ssize_t count = PyList_Check(ids) ? PyList_Size(ids) : 0;
  const long space = r->pending_space - r->pending;
  if (count < 1 || count > FEW || count > space || r->exit_count > FEW || threads < 1 ||
      refused(count, r->heads, r->kv_heads, r->size, r->capacity, threads) ||
      !numbers(ids, id, count, r->vocab) || !numbers(rows, run.rows, count, r->cached) ||
      !numbers(slots, run.slots, count, r->positions) ||
      !numbers(since, run.since, count, LLONG_MAX)) {
    PyErr_Clear();
    PyErr_SetString(PyExc_ValueError, "expected ids, rows and positions of the model and its cache");
    return NULL;
  }
  run.count = count;
  for (long i = 0; i < count; i++) run.place[i] = i;
  int fine;
  Py_BEGIN_ALLOW_THREADS
  fine = route(r, &run, id, AT(logits), &left);
  Py_END_ALLOW_THREADS
  return fine ? described(r, &run, &left, count) : PyErr_NoMemory();
}

static PyObject *py_run_on(PyObject *self, PyObject *args) {
  address plan, states, logits, scores;
  long long place, exit, row, slot;
  int threads;
  if (!PyArg_ParseTuple(args, "KLLLLKKKi", &plan, &place, &exit, &row, &slot, &states, &logits,
                        &scores, &threads))
    return NULL;
  Route *r = AT(plan);
  Running run = {.states = AT(states), .scores = AT(scores), .threads = threads, .count = 1};
  Left left = {0};
  if (place < 0 || place >= FEW || exit < 0 || exit >= r->exit_count - 1 || r->exit_count > FEW ||
      row < 0 || row >= r->cached || slot < 0 || slot >= r->positions || threads < 1 ||
      refused(1, r->heads, r->kv_heads, r->size, r->capacity, threads)) {
    PyErr_SetString(PyExc_ValueError, "expected a token of the last call that left early");
    return NULL;
  }
  run.rows[0] = row, run.slots[0] = slot;
  int fine;
  Py_BEGIN_ALLOW_THREADS
  fine = run_on(r, &run, place, exit, AT(logits), &left);
  Py_END_ALLOW_THREADS
  return fine ? described(r, &run, &left, 1) : PyErr_NoMemory();
}
