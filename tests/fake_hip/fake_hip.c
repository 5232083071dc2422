/* A libamdhip64.so / libhiprtc.so on host memory: every stream is a worker thread, so that a missing wait shows.
 * "Code objects" are shared libraries of kernels built by tests/gpu_shim.  Only what fomoe_io calls is here.
 *
 * Where vendors differ it takes the worse: a thread must make a device current (CUDA); streams of a priority share a few
 * hardware queues, in which a kernel, a recorded event or a wait holds up all behind it, whatever their streams (HIP);
 * what a graph's kernels read by plain loads of mapped host memory, or of what was copied in just before its launch, is
 * stale (HIP), and only the prelude's system_* and fresh_* calls see it.
 *
 * FAKE_HIP_DEVICES: how many devices (1).  FAKE_HIP_MEMORY: bytes of each (1 GiB), FAKE_HIP_INTEGRATED: whether it is a
 * processor's (0), FAKE_HIP_PEER: 0 no access between devices, 1 yes (default), 2 copies arrive damaged; lists name each
 * device's.  FAKE_HIP_QUEUES: hardware queues of a priority (4).  FAKE_HIP_DELAY: microseconds that a stream sleeps before
 * each piece of work (0).  FAKE_HIP_CODE: the library that the "compiler" hands out.
 * fake_hip_fail() makes a later call fail, fake_hip_lose() all of them, fake_hip_hang() makes its work never end;
 * fake_hip_new_queues() makes new hardware queues for streams from then on; fake_hip_live() counts what has not been
 * given back, fake_hip_misuses() what the real one may crash on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
       NOT_FOUND = 500, NOT_READY = 600, PEER_ALREADY = 704, NOT_REGISTERED = 713,
       CAPTURE_UNSUPPORTED = 900, CAPTURE_UNJOINED = 904 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- injected errors and what is still alive -------------------------------------------------------------------- */

static char failing_call[64], hanging_call[64];
static int failing_after, failing_code, hanging_after = -1, lost_code;
static long misuses;

API void fake_hip_fail(const char *call, int after, int code) {
    snprintf(failing_call, sizeof failing_call, "%s", call);
    failing_after = after, failing_code = code;
}
static int injected(const char *call) {
    int code = 0;
    pthread_mutex_lock(&lock);
    if (lost_code) code = lost_code;
    else if (failing_code && !strcmp(call, failing_call) && failing_after-- == 0) code = failing_code, failing_code = 0;
    pthread_mutex_unlock(&lock);
    return code;
}
/* The device is lost: every call fails, until code 0. */
API void fake_hip_lose(int code) {
    pthread_mutex_lock(&lock);
    lost_code = code;
    pthread_mutex_unlock(&lock);
}
API long fake_hip_misuses(void) { return __atomic_load_n(&misuses, __ATOMIC_RELAXED); }
static void misused(const char *what) {
    __atomic_fetch_add(&misuses, 1, __ATOMIC_RELAXED);
    fprintf(stderr, "fake_hip: %s\n", what);
}
#define ENTER                                \
    do {                                     \
        int injected_ = injected(__func__);  \
        if (injected_) return injected_;     \
    } while (0)

enum { BUFFERS, REGISTRATIONS, STREAMS, EVENTS, MODULES, GRAPHS, BLAS, KINDS };
static long live[KINDS];
static void born(int kind) { __atomic_fetch_add(&live[kind], 1, __ATOMIC_RELAXED); }
static void gone(int kind) { __atomic_fetch_sub(&live[kind], 1, __ATOMIC_RELAXED); }
API long fake_hip_live(int kind) { return __atomic_load_n(&live[kind], __ATOMIC_RELAXED); }

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}
/* The value of a device in a list such as "0,1"; the last one is that of all behind it. */
static long setting_of(const char *name, int device, long otherwise) {
    const char *text = getenv(name);
    if (!text) return otherwise;
    for (const char *next; device-- > 0 && (next = strchr(text, ',')); text = next + 1);
    return atol(text);
}

/* ---- hardware queues -------------------------------------------------------------------------------------------- */

/* Packets pass in the order in which they were submitted, whichever streams they are of.  Copies go by engines of their
 * own and take no place here. */
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    uint64_t taken, served;
    int users;
} hardware_queue;

enum { MOST_DEVICES = 8, MOST_QUEUES = 16, PRIORITIES = 2 };
static hardware_queue (*queues)[PRIORITIES][MOST_QUEUES]; /* by device */

/* As ROCclr: a new one while there are fewer than allowed, then the one with the fewest users. */
static hardware_queue *take_queue(int device, int is_urgent) {
    int most = (int)setting("FAKE_HIP_QUEUES", 4);
    pthread_mutex_lock(&lock);
    hardware_queue *pool = queues[device][is_urgent], *best = pool;
    for (int i = 1; i < most && i < MOST_QUEUES; i++)
        if (pool[i].users < best->users) best = &pool[i];
    best->users++;
    pthread_mutex_unlock(&lock);
    return best;
}
static void leave_queue(hardware_queue *q) {
    pthread_mutex_lock(&lock);
    q->users--;
    pthread_mutex_unlock(&lock);
}
/* As in a process of its own: streams that a test has given up hold no place in these. */
API void fake_hip_new_queues(void) {
    hardware_queue *all = calloc(MOST_DEVICES * PRIORITIES * MOST_QUEUES, sizeof *all);
    for (hardware_queue *q = all; q < all + MOST_DEVICES * PRIORITIES * MOST_QUEUES; q++) {
        pthread_mutex_init(&q->lock, NULL);
        pthread_cond_init(&q->moved, NULL);
    }
    pthread_mutex_lock(&lock);
    queues = (void *)all; /* who is in one of the others stays there */
    pthread_mutex_unlock(&lock);
}
__attribute__((constructor)) static void make_queues(void) { fake_hip_new_queues(); }
static void await_turn(hardware_queue *q, uint64_t ticket) {
    pthread_mutex_lock(&q->lock);
    while (q->served != ticket) pthread_cond_wait(&q->moved, &q->lock);
    pthread_mutex_unlock(&q->lock);
}
static void end_turn(hardware_queue *q) {
    pthread_mutex_lock(&q->lock);
    q->served++;
    pthread_cond_broadcast(&q->moved);
    pthread_mutex_unlock(&q->lock);
}

/* ---- streams ---------------------------------------------------------------------------------------------------- */

struct stream;
typedef struct task {
    struct task *next;
    void (*run)(void *, struct stream *);
    int is_packet, branch;
    uint64_t ticket; /* of a packet: its place in the hardware queue */
    size_t bytes;
    _Alignas(16) char payload[];
} task;

typedef struct {
    task *head, *tail;
} tasks;

typedef struct {
    tasks work;
    int number, branches, signals;
} capture;

typedef struct stale {
    struct stale *next, *before;
    char *to, *other; /* other: what was there before the copy; while a graph runs, what was copied */
    size_t bytes;
} stale;

typedef struct stream {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work, idle;
    tasks queue;
    hardware_queue *hardware;
    capture *capture;
    stale *recent, *last_recent; /* copied in since the last kernel outside a graph, or since the host has waited */
    int busy, is_ending, is_in_graph, device, branch, unjoined; /* unjoined: captured work that no other stream waits for yet */
    struct stream *next;
} stream;

static stream *all_streams;
static __thread int current_device = -1;

static void append(tasks *list, task *t) {
    t->next = NULL;
    if (list->tail) list->tail->next = t;
    else list->head = t;
    list->tail = t;
}

enum { COPY, PACKET }; /* how work gets to the device: by a copy engine, or through the stream's hardware queue */

static task *make_task(int kind, void (*run)(void *, stream *), const void *payload, size_t bytes) {
    task *t = malloc(sizeof *t + bytes);
    t->run = run, t->bytes = bytes, t->is_packet = kind == PACKET, t->branch = 0;
    memcpy(t->payload, payload, bytes);
    return t;
}

static void *worker(void *argument) {
    stream *s = argument;
    const long delay = setting("FAKE_HIP_DELAY", 0);
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (!s->queue.head && !s->is_ending) pthread_cond_wait(&s->work, &s->lock);
        task *t = s->queue.head;
        if (!t) break;
        if (!(s->queue.head = t->next)) s->queue.tail = NULL;
        s->busy = 1;
        pthread_mutex_unlock(&s->lock);
        if (delay) usleep(delay);
        if (t->is_packet) await_turn(s->hardware, t->ticket);
        t->run(t->payload, s);
        if (t->is_packet) end_turn(s->hardware);
        free(t);
        pthread_mutex_lock(&s->lock);
        s->busy = 0;
        if (!s->queue.head) pthread_cond_broadcast(&s->idle);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static void submit(stream *s, task *t) {
    pthread_mutex_lock(&s->lock);
    if (s->capture) {
        t->branch = s->branch;
        append(&s->capture->work, t);
        s->unjoined = 1;
    } else {
        if (t->is_packet) {
            pthread_mutex_lock(&s->hardware->lock);
            t->ticket = s->hardware->taken++;
            pthread_mutex_unlock(&s->hardware->lock);
        }
        append(&s->queue, t);
        pthread_cond_signal(&s->work);
    }
    pthread_mutex_unlock(&s->lock);
}

/* ---- work that never ends --------------------------------------------------------------------------------------- */

static pthread_cond_t let_go = PTHREAD_COND_INITIALIZER;
static long releases;

/* The work of the call after the next `after` ones never ends; after < 0: none. */
API void fake_hip_hang(const char *call, int after) {
    pthread_mutex_lock(&lock);
    snprintf(hanging_call, sizeof hanging_call, "%s", call);
    hanging_after = after;
    pthread_mutex_unlock(&lock);
}
API void fake_hip_release(void) {
    pthread_mutex_lock(&lock);
    releases++;
    pthread_cond_broadcast(&let_go);
    pthread_mutex_unlock(&lock);
}
static void hang(void *p, stream *s) {
    const long began = *(long *)p;
    pthread_mutex_lock(&lock);
    while (releases == began) pthread_cond_wait(&let_go, &lock);
    pthread_mutex_unlock(&lock);
}
static void hang_if_told(stream *s, int kind, const char *call) {
    pthread_mutex_lock(&lock);
    const int hangs = hanging_after >= 0 && !strcmp(call, hanging_call) && hanging_after-- == 0;
    const long began = releases;
    pthread_mutex_unlock(&lock);
    if (hangs) submit(s, make_task(kind, hang, &began, sizeof began));
}

static int is_current(const stream *s) { return s && s->device == current_device; }
static int enqueue(const char *call, stream *s, int kind, void (*run)(void *, stream *), const void *payload,
                   size_t bytes) {
    if (!s) return INVALID_HANDLE; /* the null stream is nothing that fomoe_io uses */
    if (!is_current(s)) return INVALID_CONTEXT;
    hang_if_told(s, kind, call);
    submit(s, make_task(kind, run, payload, bytes));
    return OK;
}

/* For the double of libhipblaslt beside this file. */
API int fake_hip_injected(const char *call) { return injected(call); }
API void fake_hip_born(int n) { __atomic_fetch_add(&live[BLAS], n, __ATOMIC_RELAXED); }
API int fake_hip_enqueue(void *s, void (*run)(void *, stream *), const void *payload, size_t bytes) {
    return enqueue("hipblasLtMatmul", s, PACKET, run, payload, bytes);
}

/* ---- what plain loads do not see ---- */

enum { MOST_STALE_BYTES = 1 << 20 };
static int stale_count; /* of the graphs that run now */

/* In a worker: what lies at `to` is about to be copied over. */
static void remember(stream *s, char *to, size_t bytes) {
    if (bytes > MOST_STALE_BYTES) return;
    stale *r = calloc(1, sizeof *r);
    *r = (stale){NULL, s->last_recent, to, malloc(bytes), bytes};
    memcpy(r->other, to, bytes);
    if (s->last_recent) s->last_recent->next = r;
    else s->recent = r;
    s->last_recent = r;
}
static void forget(stream *s) {
    for (stale *r = s->recent, *next; r; r = next) {
        next = r->next;
        free(r->other);
        free(r);
    }
    s->recent = s->last_recent = NULL;
}
static void swap(stale *r) {
    for (size_t i = 0; i < r->bytes; i++) {
        char c = r->to[i];
        r->to[i] = r->other[i], r->other[i] = c;
    }
}
static void begin_graph(void *p, stream *s) {
    pthread_mutex_lock(&lock);
    s->is_in_graph = 1;
    for (stale *r = s->last_recent; r; r = r->before, stale_count++) swap(r);
    pthread_mutex_unlock(&lock);
}
static void end_graph(void *p, stream *s) {
    pthread_mutex_lock(&lock);
    for (stale *r = s->recent; r; r = r->next, stale_count--) swap(r);
    s->is_in_graph = 0;
    pthread_mutex_unlock(&lock);
    forget(s); /* the next replay may see them */
}

static void drain(stream *s) {
    pthread_mutex_lock(&s->lock);
    while (s->queue.head || s->busy) pthread_cond_wait(&s->idle, &s->lock);
    forget(s);
    pthread_mutex_unlock(&s->lock);
}

static stream *new_stream(int device, int is_urgent) {
    stream *s = calloc(1, sizeof *s);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, NULL);
    pthread_cond_init(&s->idle, NULL);
    s->device = device;
    s->hardware = take_queue(device, is_urgent);
    pthread_mutex_lock(&lock);
    s->next = all_streams;
    all_streams = s;
    pthread_mutex_unlock(&lock);
    pthread_create(&s->thread, NULL, worker, s);
    return s;
}
static void end_stream(stream *s) {
    drain(s);
    pthread_mutex_lock(&s->lock);
    s->is_ending = 1;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    pthread_mutex_lock(&lock);
    for (stream **p = &all_streams; *p; p = &(*p)->next)
        if (*p == s) {
            *p = s->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    leave_queue(s->hardware);
    free(s);
}
API int hipDeviceGetStreamPriorityRange(int *least, int *greatest) { ENTER; *least = 1, *greatest = -1; return OK; }
API int hipStreamCreateWithPriority(stream **out, unsigned flags, int priority) {
    ENTER;
    if (current_device < 0) return INVALID_CONTEXT;
    *out = new_stream(current_device, priority < 0);
    born(STREAMS);
    return OK;
}
API int hipStreamCreateWithFlags(stream **out, unsigned flags) {
    ENTER;
    if (current_device < 0) return INVALID_CONTEXT;
    *out = new_stream(current_device, 0);
    born(STREAMS);
    return OK;
}
API int hipStreamDestroy(stream *s) {
    ENTER;
    end_stream(s);
    gone(STREAMS);
    return OK;
}
API int hipStreamSynchronize(stream *s) {
    ENTER;
    if (!is_current(s)) return INVALID_CONTEXT;
    if (s->capture) return CAPTURE_UNSUPPORTED;
    drain(s);
    return OK;
}
API int hipStreamQuery(stream *s) {
    ENTER;
    if (!is_current(s)) return INVALID_CONTEXT;
    pthread_mutex_lock(&s->lock);
    const int is_busy = s->queue.head || s->busy;
    pthread_mutex_unlock(&s->lock);
    return is_busy ? NOT_READY : OK;
}
API int hipDeviceSynchronize(void) {
    ENTER;
    pthread_mutex_lock(&lock);
    stream *s = all_streams;
    pthread_mutex_unlock(&lock);
    for (; s; s = s->next) drain(s);
    return OK;
}

/* ---- events ----------------------------------------------------------------------------------------------------- */

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t reached;
    uint64_t recorded, passed;
    double seconds;
    int holders; /* its owner, and the work on streams that will pass it or waits for it */
    int waiters; /* streams that wait */
    int device, capture, branch, signal; /* recorded during a capture: not in time, but in the graph */
    stream *captured_on;
} event;
typedef struct {
    event *e;
    uint64_t number;
} mark;

static mark hold(event *e) {
    __atomic_fetch_add(&e->holders, 1, __ATOMIC_RELAXED);
    return (mark){e, e->recorded};
}
static void let(event *e) {
    if (__atomic_sub_fetch(&e->holders, 1, __ATOMIC_ACQ_REL) == 0) free(e);
}
static void pass(void *p, stream *s) {
    mark *m = p;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    pthread_mutex_lock(&m->e->lock);
    m->e->passed = m->number;
    m->e->seconds = t.tv_sec + 1e-9 * t.tv_nsec;
    pthread_cond_broadcast(&m->e->reached);
    pthread_mutex_unlock(&m->e->lock);
    let(m->e);
}
static void await(mark *m) {
    pthread_mutex_lock(&m->e->lock);
    while (m->e->passed < m->number) pthread_cond_wait(&m->e->reached, &m->e->lock);
    pthread_mutex_unlock(&m->e->lock);
    let(m->e);
}
static void await_event(void *p, stream *s) {
    mark *m = p;
    event *e = hold(m->e).e;
    await(m);
    __atomic_fetch_sub(&e->waiters, 1, __ATOMIC_RELAXED);
    let(e);
}
API int hipEventCreateWithFlags(event **out, unsigned flags) {
    ENTER;
    if (current_device < 0) return INVALID_CONTEXT;
    *out = calloc(1, sizeof **out);
    pthread_mutex_init(&(*out)->lock, NULL);
    pthread_cond_init(&(*out)->reached, NULL);
    (*out)->holders = 1, (*out)->device = current_device;
    born(EVENTS);
    return OK;
}
API int hipEventDestroy(event *e) {
    ENTER;
    if (__atomic_load_n(&e->waiters, __ATOMIC_RELAXED)) misused("an event was destroyed while a stream waited for it");
    let(e);
    gone(EVENTS);
    return OK;
}
typedef struct launch launch;
typedef struct {
    launch *of;
    int number;
} joint;
static void give_signal(void *p, stream *s);
static void await_signal(void *p, stream *s);

API int hipEventRecord(event *e, stream *s) {
    ENTER;
    if (!is_current(s) || e->device != s->device) return INVALID_CONTEXT;
    e->captured_on = s->capture ? s : NULL;
    if (s->capture) {
        e->capture = s->capture->number, e->branch = s->branch, e->signal = s->capture->signals++;
        const int was_unjoined = s->unjoined;
        submit(s, make_task(PACKET, give_signal, &(joint){NULL, e->signal}, sizeof(joint)));
        s->unjoined = was_unjoined;
        return OK;
    }
    mark m = hold(e);
    m.number = ++e->recorded;
    return enqueue(__func__, s, PACKET, pass, &m, sizeof m);
}
API int hipEventSynchronize(event *e) {
    ENTER;
    mark m = hold(e);
    await(&m);
    return OK;
}
API int hipEventQuery(event *e) {
    ENTER;
    if (e->device != current_device) return INVALID_CONTEXT;
    pthread_mutex_lock(&e->lock);
    const int is_done = e->passed >= e->recorded;
    pthread_mutex_unlock(&e->lock);
    return is_done ? OK : NOT_READY;
}
API int hipEventElapsedTime(float *ms, event *from, event *to) {
    ENTER;
    *ms = (float)((to->seconds - from->seconds) * 1e3);
    return OK;
}
/* The stream joins the capture, as a branch of the graph. */
static int wait_in_capture(stream *s, event *e) {
    capture *c = e->captured_on->capture;
    if (!c || c->number != e->capture) return INVALID_HANDLE;
    if (!s->capture) s->capture = c, s->branch = c->branches++;
    e->captured_on->unjoined = 0;
    if (e->branch == s->branch) return OK;
    submit(s, make_task(PACKET, await_signal, &(joint){NULL, e->signal}, sizeof(joint)));
    return OK;
}
API int hipStreamWaitEvent(stream *s, event *e, unsigned flags) {
    ENTER;
    if (!is_current(s)) return INVALID_CONTEXT;
    if (e->captured_on) return wait_in_capture(s, e);
    mark m = hold(e);
    __atomic_fetch_add(&e->waiters, 1, __ATOMIC_RELAXED);
    return enqueue(__func__, s, PACKET, await_event, &m, sizeof m);
}

/* ---- devices and memory ----------------------------------------------------------------------------------------- */

static size_t used;

API int hipInit(unsigned flags) { ENTER; return OK; }
API int hipGetDeviceCount(int *n) { ENTER; *n = (int)setting("FAKE_HIP_DEVICES", 1); return OK; }
API int hipSetDevice(int device) {
    ENTER;
    if (device < 0 || device >= setting("FAKE_HIP_DEVICES", 1)) return INVALID_DEVICE;
    current_device = device;
    return OK;
}
API int hipDriverGetVersion(int *version) { ENTER; *version = 70000000; return OK; }
API int hipDeviceGetName(char *name, int size, int device) { ENTER; snprintf(name, size, "fake gfx0 device"); return OK; }
API int hipDeviceTotalMem(size_t *n, int device) {
    ENTER;
    *n = setting_of("FAKE_HIP_MEMORY", device, 1 << 30);
    return OK;
}
API int hipDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER;
    *value = attribute == 63   ? 4 /* compute units */
             : attribute == 19 ? 4 << 20 /* L2 bytes */
             : attribute == 16 ? (int)setting_of("FAKE_HIP_INTEGRATED", device, 0)
                               : 0;
    return OK;
}
API int hipDeviceCanAccessPeer(int *can, int device, int peer) {
    ENTER;
    *can = device != peer && setting("FAKE_HIP_PEER", 1);
    return OK;
}
API int hipDeviceEnablePeerAccess(int peer, unsigned flags) {
    static int is_enabled[MOST_DEVICES][MOST_DEVICES];
    ENTER;
    if (current_device < 0 || !setting("FAKE_HIP_PEER", 1)) return INVALID_DEVICE;
    return is_enabled[current_device][peer]++ ? PEER_ALREADY : OK;
}
/* 1472 bytes and gcnArchName at 1160: hipDeviceProp_tR0600 of HIP 6 */
API int hipGetDevicePropertiesR0600(void *properties, int device) {
    ENTER;
    memset(properties, 0, 1472);
    strcpy(properties, "fake gfx0 device");
    strcpy((char *)properties + 1160, "gfx90a:sramecc+:xnack-");
    return OK;
}
API int hipDrvGetErrorName(int code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "hipErrorOutOfMemory" : code == 719 ? "hipErrorLaunchFailure" : "hipErrorFake";
    return OK;
}
API int hipDrvGetErrorString(int code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : code == 719 ? "unspecified launch failure" : "injected or misused";
    return OK;
}

typedef struct {
    size_t bytes;
    int device;
} header; /* a page before each buffer */
API int hipMemGetInfo(size_t *free_bytes, size_t *total) {
    ENTER;
    if (current_device < 0) return INVALID_CONTEXT;
    *total = setting_of("FAKE_HIP_MEMORY", current_device, 1 << 30);
    *free_bytes = *total - used;
    return OK;
}
API int hipMalloc(void **out, size_t bytes) {
    ENTER;
    if (current_device < 0) return INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    const int fits = used + bytes <= (size_t)setting_of("FAKE_HIP_MEMORY", current_device, 1 << 30);
    if (fits) used += bytes;
    pthread_mutex_unlock(&lock);
    if (!fits) return OUT_OF_MEMORY;
    char *p = aligned_alloc(4096, (bytes + 8191) / 4096 * 4096);
    *(header *)p = (header){bytes, current_device};
    memset(p + 4096, 0xCD, bytes); /* what was never written must not look like zeros */
    born(BUFFERS);
    *out = p + 4096;
    return OK;
}
API int hipFree(void *p) {
    ENTER;
    if (!p) return OK;
    hipDeviceSynchronize(); /* as the real one does */
    header *h = (header *)((char *)p - 4096);
    pthread_mutex_lock(&lock);
    used -= h->bytes;
    pthread_mutex_unlock(&lock);
    memset(p, 0xDD, h->bytes);
    free(h);
    gone(BUFFERS);
    return OK;
}

/* The device sees registered memory at another address, where plain loads find zeros and plain stores are lost. */
static struct {
    char *address, *alias;
    size_t bytes;
} registered[256];
static int most_registered; /* so many of them have ever been in use */
API int hipHostRegister(void *address, size_t bytes, unsigned flags) {
    ENTER;
    if (current_device < 0) return INVALID_CONTEXT;
    for (int i = 0; i < 256; i++)
        if (!registered[i].address) {
            registered[i].alias = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            registered[i].bytes = bytes;
            if (i >= most_registered) most_registered = i + 1;
            registered[i].address = address;
            born(REGISTRATIONS);
            return OK;
        }
    return OUT_OF_MEMORY;
}
API int hipHostUnregister(void *address) {
    ENTER;
    for (int i = 0; i < 256; i++)
        if (registered[i].address == address) {
            registered[i].address = NULL;
            munmap(registered[i].alias, registered[i].bytes);
            gone(REGISTRATIONS);
            return OK;
        }
    return NOT_REGISTERED;
}
API int hipHostGetDevicePointer(void **out, void *address, unsigned flags) {
    ENTER;
    for (int i = 0; i < 256; i++)
        if (registered[i].address == address) {
            *out = registered[i].alias;
            return OK;
        }
    return INVALID_VALUE;
}
/* What a kernel's system_* and fresh_* calls reach at an address. */
static char *seen(const void *p) {
    for (int i = 0; i < most_registered; i++)
        if (registered[i].address && (size_t)((char *)p - registered[i].alias) < registered[i].bytes)
            return registered[i].address + ((char *)p - registered[i].alias);
    if (!__atomic_load_n(&stale_count, __ATOMIC_RELAXED)) return (char *)p;
    char *found = (char *)p;
    pthread_mutex_lock(&lock);
    for (stream *s = all_streams; s; s = s->next)
        for (stale *r = s->is_in_graph ? s->last_recent : NULL; r && found == p; r = r->before)
            if ((size_t)((char *)p - r->to) < r->bytes) found = r->other + ((char *)p - r->to);
    pthread_mutex_unlock(&lock);
    return found;
}

typedef struct {
    void *to;
    const void *from;
    size_t bytes;
    int value;
} transfer;
static void do_copy(void *p, stream *s) {
    transfer *t = p;
    memcpy(t->to, t->from, t->bytes);
    if (t->value) ((char *)t->to)[t->bytes / 2] ^= 1; /* damaged on the way between devices */
}
static void do_copy_in(void *p, stream *s) {
    transfer *t = p;
    pthread_mutex_lock(&s->lock);
    remember(s, t->to, t->bytes);
    pthread_mutex_unlock(&s->lock);
    do_copy(p, s);
}
static void do_fill(void *p, stream *s) {
    transfer *t = p;
    memset(t->to, t->value, t->bytes);
}
typedef struct {
    char *word;
    uint32_t value;
} written_word;
static void do_write_value(void *p, stream *s) {
    written_word *w = p;
    __atomic_store_n((uint32_t *)seen(w->word), w->value, __ATOMIC_RELEASE);
}
API int hipStreamWriteValue32(stream *s, void *word, uint32_t value, unsigned flags) {
    ENTER;
    if (flags || (uintptr_t)word % 4) return INVALID_VALUE;
    return enqueue(__func__, s, PACKET, do_write_value, &(written_word){word, value}, sizeof(written_word));
}
static int device_of(const void *p) { return ((const header *)((uintptr_t)p / 4096 * 4096 - 4096))->device; }
API int hipMemcpyHtoDAsync(void *to, const void *from, size_t bytes, stream *s) {
    ENTER;
    return enqueue(__func__, s, COPY, do_copy_in, &(transfer){to, from, bytes, 0}, sizeof(transfer));
}
API int hipMemcpyDtoHAsync(void *to, const void *from, size_t bytes, stream *s) {
    ENTER;
    return enqueue(__func__, s, COPY, do_copy, &(transfer){to, from, bytes, 0}, sizeof(transfer));
}
API int hipMemcpyDtoDAsync(void *to, const void *from, size_t bytes, stream *s) {
    ENTER;
    const int is_damaged = setting("FAKE_HIP_PEER", 1) == 2 && device_of(to) != device_of(from);
    return enqueue(__func__, s, COPY, do_copy, &(transfer){to, from, bytes, is_damaged}, sizeof(transfer));
}
API int hipMemsetD8Async(void *to, unsigned char value, size_t bytes, stream *s) {
    ENTER;
    return enqueue(__func__, s, PACKET, do_fill, &(transfer){to, NULL, bytes, value}, sizeof(transfer));
}

/* ---- code ------------------------------------------------------------------------------------------------------- */

typedef struct {
    void (*launch)(void **, int, int, int);
    const char *signature;
    int threads;
} kernel;
typedef struct {
    kernel k;
    int x, y, z;
    uint64_t values[32];
} call;

API int hipModuleLoadData(void **module, const void *image) {
    ENTER;
    const Elf64_Ehdr *elf = image;
    if (memcmp(elf->e_ident, ELFMAG, SELFMAG)) return INVALID_IMAGE;
    const size_t bytes = elf->e_shoff + (size_t)elf->e_shnum * elf->e_shentsize; /* the section table stands last */
    const int fd = memfd_create("kernels", 0);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (write(fd, image, bytes) != (ssize_t)bytes) return INVALID_IMAGE;
    *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    close(fd);
    if (!*module) return INVALID_IMAGE;
    char *(**reach)(const void *) = dlsym(*module, "fibers_reach");
    if (reach) *reach = seen;
    born(MODULES);
    return OK;
}
API int hipModuleUnload(void *module) {
    ENTER;
    gone(MODULES);
    return OK;
}
API int hipModuleGetFunction(kernel **out, void *module, const char *name) {
    ENTER;
    char symbol[256];
    snprintf(symbol, sizeof symbol, "%s__launch", name);
    void *launch = dlsym(module, symbol);
    if (!launch) return NOT_FOUND;
    kernel *k = calloc(1, sizeof *k); /* lives as long as the process, as a module's functions do */
    *(void **)&k->launch = launch;
    snprintf(symbol, sizeof symbol, "%s__signature", name);
    k->signature = ((const char *(*)(void))dlsym(module, symbol))();
    snprintf(symbol, sizeof symbol, "%s__block_threads", name);
    k->threads = ((int (*)(void))dlsym(module, symbol))();
    *out = k;
    return OK;
}
API int hipFuncGetAttribute(int *value, int attribute, void *function) { ENTER; *value = 0; return OK; }

static void run_kernel(void *p, stream *s) {
    call *c = p;
    void *arguments[32];
    for (int i = 0; i < 32; i++) arguments[i] = &c->values[i];
    c->k.launch(arguments, c->x, c->y, c->z);
}
static void run_kernel_alone(void *p, stream *s) {
    pthread_mutex_lock(&s->lock);
    forget(s); /* outside a graph a kernel begins with clean caches */
    pthread_mutex_unlock(&s->lock);
    run_kernel(p, s);
}
API int hipModuleLaunchKernel(kernel *k, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared_bytes, stream *s, void **arguments, void **extra) {
    ENTER;
    if ((int)bx != k->threads || by != 1 || bz != 1 || !gx || !gy || !gz || gy > 65535 || gz > 65535 || extra)
        return INVALID_VALUE;
    call c = {*k, gx, gy, gz, {0}};
    /* Arguments are taken now, as the real call does, not when the stream gets there. */
    for (int i = 0; k->signature[i]; i++) memcpy(&c.values[i], arguments[i], strchr("pq", k->signature[i]) ? 8 : 4);
    return enqueue(__func__, s, PACKET, s && s->capture ? run_kernel : run_kernel_alone, &c, sizeof c);
}

/* ---- graphs: branches that run beside each other ----------------------------------------------------------------- */

typedef struct {
    capture of;
    stream **beside; /* of the executable: branch 0 runs on the stream of the launch, each other one on its own */
    int streams, device;
} graph;

/* One replay: what its branches have reached. */
struct launch {
    pthread_mutex_t lock;
    pthread_cond_t given;
    int holders;
    char has[];
};
static void release(launch *l) {
    if (__atomic_sub_fetch(&l->holders, 1, __ATOMIC_ACQ_REL) == 0) free(l);
}
static void give_signal(void *p, stream *s) {
    joint *j = p;
    pthread_mutex_lock(&j->of->lock);
    j->of->has[j->number] = 1;
    pthread_cond_broadcast(&j->of->given);
    pthread_mutex_unlock(&j->of->lock);
    release(j->of);
}
static void await_signal(void *p, stream *s) {
    joint *j = p;
    pthread_mutex_lock(&j->of->lock);
    while (!j->of->has[j->number]) pthread_cond_wait(&j->of->given, &j->of->lock);
    pthread_mutex_unlock(&j->of->lock);
    release(j->of);
}

API int hipStreamBeginCapture(stream *s, int mode) {
    static int number;
    ENTER;
    if (!is_current(s)) return INVALID_CONTEXT;
    s->capture = calloc(1, sizeof *s->capture);
    s->capture->number = __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED);
    s->capture->branches = 1, s->branch = 0;
    return OK;
}
API int hipStreamEndCapture(stream *s, graph **out) {
    ENTER;
    capture *captured = s->capture;
    int is_open = 0;
    pthread_mutex_lock(&lock);
    for (stream *other = all_streams; other; other = other->next)
        if (other->capture == captured) {
            is_open |= other != s && other->unjoined;
            other->capture = NULL;
        }
    pthread_mutex_unlock(&lock);
    if (is_open) return CAPTURE_UNJOINED;
    *out = calloc(1, sizeof **out);
    (*out)->of = *captured;
    free(captured);
    born(GRAPHS);
    return OK;
}
API int hipGraphInstantiateWithFlags(graph **out, graph *of, unsigned long long flags) {
    ENTER;
    graph *g = *out = calloc(1, sizeof *g);
    g->of = of->of;
    g->of.work = (tasks){NULL, NULL};
    for (task *t = of->of.work.head; t; t = t->next) {
        task *copied = make_task(t->is_packet ? PACKET : COPY, t->run, t->payload, t->bytes);
        copied->branch = t->branch;
        append(&g->of.work, copied);
    }
    g->streams = g->of.branches > 1 ? g->of.branches - 1 : 1; /* HIP makes one in any case */
    g->beside = calloc(g->streams, sizeof *g->beside);
    for (int i = 0; i < g->streams; i++) g->beside[i] = new_stream(current_device, 0);
    born(GRAPHS);
    return OK;
}
API int hipGraphLaunch(graph *g, stream *s) {
    ENTER;
    if (!is_current(s)) return INVALID_CONTEXT;
    hang_if_told(s, PACKET, __func__);
    launch *l = calloc(1, sizeof *l + g->of.signals + 1);
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->given, NULL);
    l->holders = 1;
    submit(s, make_task(COPY, begin_graph, "", 0));
    for (task *t = g->of.work.head; t; t = t->next) {
        task *copied = make_task(t->is_packet ? PACKET : COPY, t->run, t->payload, t->bytes);
        if (t->run == give_signal || t->run == await_signal) {
            ((joint *)copied->payload)->of = l;
            __atomic_fetch_add(&l->holders, 1, __ATOMIC_RELAXED);
        }
        submit(t->branch ? g->beside[t->branch - 1] : s, copied);
    }
    submit(s, make_task(COPY, end_graph, "", 0));
    release(l);
    return OK;
}
static int free_graph(graph *g) {
    for (int i = 0; i < g->streams; i++) end_stream(g->beside[i]);
    for (task *t = g->of.work.head, *next; t; t = next) {
        next = t->next;
        free(t);
    }
    free(g->beside);
    free(g);
    gone(GRAPHS);
    return OK;
}
API int hipGraphExecDestroy(graph *executable) { ENTER; return free_graph(executable); }
API int hipGraphDestroy(graph *g) { ENTER; return free_graph(g); }

/* ---- the run-time compiler: checks what it is given, hands out a library built before ----------------------------- */

typedef struct {
    char log[512];
} program;
API int hiprtcVersion(int *major, int *minor) { *major = 9, *minor = 0; return OK; }
API const char *hiprtcGetErrorString(int code) { return code == 6 ? "HIPRTC_ERROR_COMPILATION" : "HIPRTC_ERROR_FAKE"; }
API int hiprtcCreateProgram(program **out, const char *source, const char *name, int headers, const char **texts,
                            const char **names) {
    ENTER;
    program *p = calloc(1, sizeof *p);
    for (const char *at = source; (at = strstr(at, "#include \"")); at++) {
        const char *file = at + 10;
        int is_there = 0;
        for (int i = 0; i < headers; i++)
            is_there |= !strncmp(file, names[i], strlen(names[i])) && file[strlen(names[i])] == '"' && *texts[i];
        if (!is_there) snprintf(p->log, sizeof p->log, "%s: an included file is missing: %.20s", name, file);
    }
    *out = p;
    return OK;
}
API int hiprtcCompileProgram(program *p, int count, const char **options) {
    ENTER;
    int has_target = 0;
    for (int i = 0; i < count; i++) has_target |= !strncmp(options[i], "--offload-arch=gfx", 18);
    if (!has_target) snprintf(p->log, sizeof p->log, "no --offload-arch");
    return *p->log || !getenv("FAKE_HIP_CODE") ? 6 : OK;
}
API int hiprtcGetProgramLogSize(program *p, size_t *bytes) { *bytes = strlen(p->log) + 1; return OK; }
API int hiprtcGetProgramLog(program *p, char *log) { strcpy(log, p->log); return OK; }
API int hiprtcGetCodeSize(program *p, size_t *bytes) {
    FILE *f = fopen(getenv("FAKE_HIP_CODE"), "rb");
    if (!f) return 1;
    fseek(f, 0, SEEK_END);
    *bytes = ftell(f);
    fclose(f);
    return OK;
}
API int hiprtcGetCode(program *p, char *code) {
    FILE *f = fopen(getenv("FAKE_HIP_CODE"), "rb");
    if (!f) return 1;
    size_t n, at = 0;
    while ((n = fread(code + at, 1, 1 << 16, f)) > 0) at += n;
    fclose(f);
    return OK;
}
API int hiprtcDestroyProgram(program **p) { free(*p); *p = NULL; return OK; }
