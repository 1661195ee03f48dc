/* One-shot collectives through memory that the ranks of one host share.

   Layout: for each rank a header of one cache line (its progress, and the kind of its messages),
   then for each rank two slots of slot_bytes. A message is cut into pieces of at most slot_bytes.
   Piece n of the group's life goes through slot n % 2:

     copy my piece into my slot; release: progress[me] = n + 1
     wait until progress[r] >= n + 1 for every r (acquire): all slots hold piece n
     out = slot[0] + slot[1] + ...           in rank order on every rank: the same bits everywhere

   In a gather every rank writes only its part of each piece, and reads all parts. In a sum it may
   want only its part. A slot is written again for piece n + 2, by a rank that has seen every
   progress[r] >= n + 2, which r stores only after it has read piece n: two slots are enough.

   No call blocks for longer than `patience`: it then returns the rank that is late, and continues
   when called again, so that the caller can handle signals and dead peers. A rank with another
   message than the others is found before anything is read.

   A sum that is waited for later has a group of its own, whose `slots` hold a message each: message
   n lies in slot n % slots from its post until every rank's `nanotp_finish` has read it. */

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { LINE = 128, SLOTS = 8, SPINS = 200, BLOCK = 2048 };
static const double SLEEP_AFTER = 1e-3; /* seconds of waiting, then the core is left to others */
enum { FLOAT32, BFLOAT16, BYTES };      /* type of an element */
enum { SUM, MAX, GATHER };              /* operations; larger ones gather, too */
enum { DONE = -1, DIFFERENT = -2 };     /* DIFFERENT - r: rank r sent another message */

typedef struct {
    char *base;                    /* the shared memory, zero when the group begins */
    int64_t rank, size, slots, slot_bytes;
    uint64_t piece;                /* pieces, or later sums, finished since the group began */
    int64_t at, posted; /* elements of the message finished; pieces in my slots that are not */
} group;

typedef struct {
    _Atomic uint64_t progress;     /* pieces posted since the group began */
    _Atomic uint64_t read;         /* later sums finished */
    uint64_t kind[SLOTS];          /* of the messages in the slots: length, operation, type */
} header;

static header *of(const group *g, int64_t rank) { return (header *)(g->base + rank * LINE); }

static char *slot(const group *g, int64_t rank, uint64_t piece) {
    const int64_t number = g->slots * rank + (int64_t)(piece % (uint64_t)g->slots);
    return g->base + g->size * LINE + number * g->slot_bytes;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Until every rank has posted, or read, n pieces. Returns DONE or a rank that is late.
   Spin for some microseconds; then yield the core between looks, as ranks may outnumber cores; in
   the end sleep, as a waiting loop slows the other thread of its core. */
static int64_t wait_for_all(const group *g, int reads, uint64_t n, double patience) {
    const struct timespec nap = {0, 20000};
    double start = 0, waited = 0;
    for (int64_t r = 0; r < g->size; r++) {
        const _Atomic uint64_t *progress = reads ? &of(g, r)->read : &of(g, r)->progress;
        for (int64_t looks = 0;; looks++) {
            if (atomic_load_explicit(progress, memory_order_acquire) >= n) break;
            if (looks < SPINS) {
                pause_cpu();
                continue;
            }
            if (waited > SLEEP_AFTER) nanosleep(&nap, NULL);
            else sched_yield();
            if (start == 0) start = now();
            if ((waited = now() - start) > patience) return r;
        }
    }
    return DONE;
}

static float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint16_t narrow(float f) { /* to nearest, ties to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return (uint16_t)((bits >> 16) | 64);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static float larger(float a, float b) { return a > b || a != a ? a : b; } /* a NaN stays */

/* Elements [first, first + n) of the current piece, of all ranks, into out. bfloat16 is added in
   float32, in blocks of `sum`, and rounded once. */
static void reduce(const group *g, void *out, int64_t first, int64_t n, int64_t type, int64_t op) {
    float sum[BLOCK];
    for (int64_t lo = 0; lo < n; lo += BLOCK) {
        int64_t len = n - lo < BLOCK ? n - lo : BLOCK;
        float *acc = type == FLOAT32 ? (float *)out + lo : sum;
        for (int64_t r = 0; r < g->size; r++) {
            if (type == FLOAT32) {
                const float *x = (const float *)slot(g, r, g->piece) + first + lo;
                if (r == 0) memcpy(acc, x, (size_t)len * 4);
                else if (op == SUM) for (int64_t i = 0; i < len; i++) acc[i] += x[i];
                else for (int64_t i = 0; i < len; i++) acc[i] = larger(acc[i], x[i]);
            } else {
                const uint16_t *x = (const uint16_t *)slot(g, r, g->piece) + first + lo;
                if (r == 0) for (int64_t i = 0; i < len; i++) acc[i] = widen(x[i]);
                else if (op == SUM) for (int64_t i = 0; i < len; i++) acc[i] += widen(x[i]);
                else for (int64_t i = 0; i < len; i++) acc[i] = larger(acc[i], widen(x[i]));
            }
        }
        if (type == BFLOAT16)
            for (int64_t i = 0; i < len; i++) ((uint16_t *)out)[lo + i] = narrow(acc[i]);
    }
}

/* elements [lo, hi) of the message; packed: the place of lo in the part by itself */
typedef struct { int64_t lo, hi, packed; } run;

/* Find the first run of rank r's part in elements [at, end) of the message; returns 0 if there is
   none. The message is rows of edges[size] elements: [edges[r], edges[r + 1]) are rank r's. Without
   edges all of it is. */
static int next_run(const group *g, const int64_t *edges, int64_t r, int64_t at, int64_t end,
                    run *found) {
    *found = (run){at, end, at};
    if (!edges) return at < end;
    const int64_t width = edges[g->size], own = edges[r + 1] - edges[r];
    for (int64_t row = at / width; row * width < end; row++) {
        const int64_t first = row * width + edges[r], last = first + own;
        found->lo = first > at ? first : at;
        found->hi = last < end ? last : end;
        found->packed = row * own + found->lo - first;
        if (found->lo < found->hi) return 1;
    }
    return 0;
}

/* Move a message of n elements. SUM, MAX: in is mine [n], out the sum or maximum, or my part of it.
   GATHER: in is my part, out all parts, each in its place [n]. Parts: see next_run. in and out may
   not overlap. Returns DONE, or a rank that is late by `patience` seconds (call again, with the
   same arguments), or DIFFERENT - r if rank r moves another message. */
int64_t nanotp_move(group *g, const char *in, char *out, int64_t n, int64_t type, int64_t op,
                    const int64_t *edges, double patience) {
    const int64_t width = type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1;
    const int64_t most = g->slot_bytes / width;
    const uint64_t kind = (uint64_t)n << 16 | (uint64_t)(op << 4 | type);
    header *mine = of(g, g->rank);
    while (g->at < n) {
        const int64_t at = g->at, end = n - at < most ? n : at + most;
        run own;
        if (!g->posted) {
            const int64_t *parts = op >= GATHER ? edges : NULL;
            for (int64_t lo = at; next_run(g, parts, g->rank, lo, end, &own); lo = own.hi)
                memcpy(slot(g, g->rank, g->piece) + (own.lo - at) * width, in + own.packed * width,
                       (size_t)((own.hi - own.lo) * width));
            mine->kind[g->piece % 2] = kind;
            atomic_store_explicit(&mine->progress, g->piece + 1, memory_order_release);
            g->posted = 1;
        }
        int64_t late = wait_for_all(g, 0, g->piece + 1, patience);
        if (late != DONE) return late;
        for (int64_t r = 0; r < g->size; r++)
            if (of(g, r)->kind[g->piece % 2] != kind) return DIFFERENT - r;
        if (op < GATHER)
            for (int64_t lo = at; next_run(g, edges, g->rank, lo, end, &own); lo = own.hi)
                reduce(g, out + own.packed * width, own.lo - at, own.hi - own.lo, type, op);
        else for (int64_t r = 0; r < g->size; r++)
            for (int64_t lo = at; next_run(g, edges, r, lo, end, &own); lo = own.hi)
                memcpy(out + own.lo * width, slot(g, r, g->piece) + (own.lo - at) * width,
                       (size_t)((own.hi - own.lo) * width));
        g->piece++;
        g->posted = 0;
        g->at = end;
    }
    g->at = 0;
    return DONE;
}

/* Begin to sum n elements, which fit a slot. At most `slots` sums may be under way. Returns as
   nanotp_move does. */
int64_t nanotp_post(group *g, const char *in, int64_t n, int64_t type, double patience) {
    const uint64_t number = g->piece + (uint64_t)g->posted, slots = (uint64_t)g->slots;
    header *mine = of(g, g->rank);
    if (number >= slots) { /* the message before in this slot */
        const int64_t late = wait_for_all(g, 1, number - slots + 1, patience);
        if (late != DONE) return late;
    }
    memcpy(slot(g, g->rank, number), in, (size_t)(n * (type == FLOAT32 ? 4 : 2)));
    mine->kind[number % slots] = (uint64_t)n << 16 | (uint64_t)type;
    atomic_store_explicit(&mine->progress, number + 1, memory_order_release);
    g->posted++;
    return DONE;
}

/* Wait for the oldest sum under way: out [n]. */
int64_t nanotp_finish(group *g, char *out, int64_t n, int64_t type, double patience) {
    const int64_t late = wait_for_all(g, 0, g->piece + 1, patience);
    if (late != DONE) return late;
    for (int64_t r = 0; r < g->size; r++)
        if (of(g, r)->kind[g->piece % (uint64_t)g->slots] != ((uint64_t)n << 16 | (uint64_t)type))
            return DIFFERENT - r;
    reduce(g, out, 0, n, type, SUM);
    g->piece++;
    g->posted--;
    atomic_store_explicit(&of(g, g->rank)->read, g->piece, memory_order_release);
    return DONE;
}
