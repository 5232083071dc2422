/* A libamdhip64.so / libhiprtc.so on host memory: every stream is a worker thread, so that a missing wait shows.
 * "Code objects" are shared libraries of kernels built by tests/gpu_shim.  Only what fomoe_io calls is here.
 *
 * FAKE_HIP_DEVICES: how many devices (1).  FAKE_HIP_MEMORY: bytes of each (1 GiB).  FAKE_HIP_DELAY: microseconds that a
 * stream sleeps before each piece of work (0).  FAKE_HIP_CODE: the library that the "compiler" hands out.
 * fake_hip_fail() makes a later call fail; fake_hip_live() counts what has not been given back. */
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

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_HANDLE = 400,
       NOT_FOUND = 500, NOT_READY = 600, NOT_REGISTERED = 713, CAPTURE_UNSUPPORTED = 900,
       CAPTURE_UNJOINED = 904 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- injected errors and what is still alive -------------------------------------------------------------------- */

static char failing_call[64];
static int failing_after, failing_code;

API void fake_hip_fail(const char *call, int after, int code) {
    snprintf(failing_call, sizeof failing_call, "%s", call);
    failing_after = after, failing_code = code;
}
static int injected(const char *call) {
    int code = 0;
    pthread_mutex_lock(&lock);
    if (failing_code && !strcmp(call, failing_call) && failing_after-- == 0) code = failing_code, failing_code = 0;
    pthread_mutex_unlock(&lock);
    return code;
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

/* ---- streams ---------------------------------------------------------------------------------------------------- */

typedef struct task {
    struct task *next;
    void (*run)(void *);
    size_t bytes;
    _Alignas(16) char payload[];
} task;

typedef struct {
    task *head, *tail;
} tasks;

typedef struct stream {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work, idle;
    tasks queue, *capture;
    int busy, is_ending, device, unjoined; /* unjoined: captured work that no other stream waits for yet */
    struct stream *next;
} stream;

static stream *all_streams;
static __thread int current_device;

static void append(tasks *list, task *t) {
    t->next = NULL;
    if (list->tail) list->tail->next = t;
    else list->head = t;
    list->tail = t;
}

static task *make_task(void (*run)(void *), const void *payload, size_t bytes) {
    task *t = malloc(sizeof *t + bytes);
    t->run = run, t->bytes = bytes;
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
        t->run(t->payload);
        free(t);
        pthread_mutex_lock(&s->lock);
        s->busy = 0;
        if (!s->queue.head) pthread_cond_broadcast(&s->idle);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static int enqueue(stream *s, void (*run)(void *), const void *payload, size_t bytes) {
    if (!s) return INVALID_HANDLE; /* the null stream is nothing that fomoe_io uses */
    task *t = make_task(run, payload, bytes);
    pthread_mutex_lock(&s->lock);
    append(s->capture ? s->capture : &s->queue, t);
    s->unjoined = s->capture != NULL;
    pthread_cond_signal(&s->work);
    pthread_mutex_unlock(&s->lock);
    return OK;
}

/* For the double of libhipblaslt beside this file. */
API int fake_hip_injected(const char *call) { return injected(call); }
API void fake_hip_born(int n) { __atomic_fetch_add(&live[BLAS], n, __ATOMIC_RELAXED); }
API int fake_hip_enqueue(void *s, void (*run)(void *), const void *payload, size_t bytes) {
    return enqueue(s, run, payload, bytes);
}

static void drain(stream *s) {
    pthread_mutex_lock(&s->lock);
    while (s->queue.head || s->busy) pthread_cond_wait(&s->idle, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

API int hipStreamCreateWithFlags(stream **out, unsigned flags) {
    ENTER;
    stream *s = calloc(1, sizeof *s);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->work, NULL);
    pthread_cond_init(&s->idle, NULL);
    s->device = current_device;
    pthread_mutex_lock(&lock);
    s->next = all_streams;
    all_streams = s;
    pthread_mutex_unlock(&lock);
    pthread_create(&s->thread, NULL, worker, s);
    born(STREAMS);
    *out = s;
    return OK;
}
API int hipStreamDestroy(stream *s) {
    ENTER;
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
    free(s);
    gone(STREAMS);
    return OK;
}
API int hipStreamSynchronize(stream *s) {
    ENTER;
    if (s->capture) return CAPTURE_UNSUPPORTED;
    drain(s);
    return OK;
}
API int hipStreamQuery(stream *s) {
    ENTER;
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
    stream *captured_on; /* recorded during a capture: not in time, but in the graph */
} event;
typedef struct {
    event *e;
    uint64_t number;
} mark;

static void pass(void *p) {
    mark *m = p;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    pthread_mutex_lock(&m->e->lock);
    m->e->passed = m->number;
    m->e->seconds = t.tv_sec + 1e-9 * t.tv_nsec;
    pthread_cond_broadcast(&m->e->reached);
    pthread_mutex_unlock(&m->e->lock);
}
static void await(void *p) {
    mark *m = p;
    pthread_mutex_lock(&m->e->lock);
    while (m->e->passed < m->number) pthread_cond_wait(&m->e->reached, &m->e->lock);
    pthread_mutex_unlock(&m->e->lock);
}
API int hipEventCreateWithFlags(event **out, unsigned flags) {
    ENTER;
    *out = calloc(1, sizeof **out);
    pthread_mutex_init(&(*out)->lock, NULL);
    pthread_cond_init(&(*out)->reached, NULL);
    born(EVENTS);
    return OK;
}
API int hipEventDestroy(event *e) {
    ENTER;
    await(&(mark){e, e->recorded});
    free(e);
    gone(EVENTS);
    return OK;
}
API int hipEventRecord(event *e, stream *s) {
    ENTER;
    e->captured_on = s->capture ? s : NULL;
    if (s->capture) return OK;
    return enqueue(s, pass, &(mark){e, ++e->recorded}, sizeof(mark));
}
API int hipEventSynchronize(event *e) {
    ENTER;
    await(&(mark){e, e->recorded});
    return OK;
}
API int hipEventQuery(event *e) {
    ENTER;
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
API int hipStreamWaitEvent(stream *s, event *e, unsigned flags) {
    ENTER;
    if (e->captured_on) { /* the stream joins the capture; the graph runs in the order of the calls */
        s->capture = e->captured_on->capture;
        e->captured_on->unjoined = 0;
        return OK;
    }
    return enqueue(s, await, &(mark){e, e->recorded}, sizeof(mark));
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
API int hipDeviceTotalMem(size_t *n, int device) { ENTER; *n = setting("FAKE_HIP_MEMORY", 1 << 30); return OK; }
API int hipDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER;
    *value = attribute == 63 ? 4 : attribute == 19 ? 4 << 20 : 0; /* compute units, L2 bytes */
    return OK;
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
} header; /* a page before each buffer */
API int hipMemGetInfo(size_t *free_bytes, size_t *total) {
    ENTER;
    *total = setting("FAKE_HIP_MEMORY", 1 << 30);
    *free_bytes = *total - used;
    return OK;
}
API int hipMalloc(void **out, size_t bytes) {
    ENTER;
    pthread_mutex_lock(&lock);
    const int fits = used + bytes <= (size_t)setting("FAKE_HIP_MEMORY", 1 << 30);
    if (fits) used += bytes;
    pthread_mutex_unlock(&lock);
    if (!fits) return OUT_OF_MEMORY;
    char *p = aligned_alloc(4096, (bytes + 8191) / 4096 * 4096);
    ((header *)p)->bytes = bytes;
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

static struct {
    void *address;
} registered[256];
API int hipHostRegister(void *address, size_t bytes, unsigned flags) {
    ENTER;
    for (int i = 0; i < 256; i++)
        if (!registered[i].address) {
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
            gone(REGISTRATIONS);
            return OK;
        }
    return NOT_REGISTERED;
}
API int hipHostGetDevicePointer(void **out, void *address, unsigned flags) { ENTER; *out = address; return OK; }

typedef struct {
    void *to;
    const void *from;
    size_t bytes;
    int value;
} transfer;
static void do_copy(void *p) {
    transfer *t = p;
    memcpy(t->to, t->from, t->bytes);
}
static void do_fill(void *p) {
    transfer *t = p;
    memset(t->to, t->value, t->bytes);
}
API int hipMemcpyHtoDAsync(void *to, const void *from, size_t bytes, stream *s) {
    ENTER;
    return enqueue(s, do_copy, &(transfer){to, from, bytes, 0}, sizeof(transfer));
}
API int hipMemcpyDtoHAsync(void *to, const void *from, size_t bytes, stream *s) {
    ENTER;
    return enqueue(s, do_copy, &(transfer){to, from, bytes, 0}, sizeof(transfer));
}
API int hipMemcpyDtoDAsync(void *to, const void *from, size_t bytes, stream *s) {
    ENTER;
    return enqueue(s, do_copy, &(transfer){to, from, bytes, 0}, sizeof(transfer));
}
API int hipMemsetD8Async(void *to, unsigned char value, size_t bytes, stream *s) {
    ENTER;
    return enqueue(s, do_fill, &(transfer){to, NULL, bytes, value}, sizeof(transfer));
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

static void run_kernel(void *p) {
    call *c = p;
    void *arguments[32];
    for (int i = 0; i < 32; i++) arguments[i] = &c->values[i];
    c->k.launch(arguments, c->x, c->y, c->z);
}
API int hipModuleLaunchKernel(kernel *k, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared_bytes, stream *s, void **arguments, void **extra) {
    ENTER;
    if ((int)bx != k->threads || by != 1 || bz != 1 || !gx || !gy || !gz || gy > 65535 || gz > 65535 || extra)
        return INVALID_VALUE;
    call c = {*k, gx, gy, gz, {0}};
    /* Arguments are taken now, as the real call does, not when the stream gets there. */
    for (int i = 0; k->signature[i]; i++) memcpy(&c.values[i], arguments[i], strchr("pq", k->signature[i]) ? 8 : 4);
    return enqueue(s, run_kernel, &c, sizeof c);
}

/* ---- graphs: one stream's work, recorded and replayed ------------------------------------------------------------ */

API int hipStreamBeginCapture(stream *s, int mode) {
    ENTER;
    s->capture = calloc(1, sizeof *s->capture);
    return OK;
}
API int hipStreamEndCapture(stream *s, tasks **graph) {
    ENTER;
    tasks *captured = s->capture;
    int is_open = 0;
    pthread_mutex_lock(&lock);
    for (stream *other = all_streams; other; other = other->next)
        if (other->capture == captured) {
            is_open |= other != s && other->unjoined;
            other->capture = NULL;
        }
    pthread_mutex_unlock(&lock);
    if (is_open) return CAPTURE_UNJOINED;
    *graph = captured;
    born(GRAPHS);
    return OK;
}
API int hipGraphInstantiateWithFlags(tasks **executable, tasks *graph, unsigned long long flags) {
    ENTER;
    *executable = calloc(1, sizeof **executable);
    for (task *t = graph->head; t; t = t->next) append(*executable, make_task(t->run, t->payload, t->bytes));
    born(GRAPHS);
    return OK;
}
API int hipGraphLaunch(tasks *executable, stream *s) {
    ENTER;
    for (task *t = executable->head; t; t = t->next) enqueue(s, t->run, t->payload, t->bytes);
    return OK;
}
static int free_graph(tasks *graph) {
    for (task *t = graph->head, *next; t; t = next) {
        next = t->next;
        free(t);
    }
    free(graph);
    gone(GRAPHS);
    return OK;
}
API int hipGraphExecDestroy(tasks *executable) { ENTER; return free_graph(executable); }
API int hipGraphDestroy(tasks *graph) { ENTER; return free_graph(graph); }

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
