/* Preloaded by tests: makes some reads short, interrupted or failing, for pread and for io_uring.
 * FAULT: short, eintr, eagain or eio hits every 7th read; slow: each read of pread takes a fifth of a second; forbidden refuses io_uring as a container does; unsupported
 * sets up a ring whose reads are refused. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static unsigned calls; /* a race between pread threads only changes which reads are hit */

static int due(const char *kind) {
    const char *fault = getenv("FAULT");
    return fault && !strcmp(fault, kind) && ++calls % 7 == 3;
}

ssize_t pread(int fd, void *target, size_t bytes, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (!real) real = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    if (bytes >= 4096 && bytes % 4096 == 0) { /* the reader's, not the interpreter's */
        const char *fault = getenv("FAULT");
        if (fault && !strcmp(fault, "slow")) usleep(200000);
        if (due("short") && bytes > 4096) bytes = bytes / 2 / 512 * 512;
        if (due("eintr")) return errno = EINTR, -1;
        if (due("eagain")) return errno = EAGAIN, -1;
        if (due("eio")) return errno = EIO, -1;
    }
    return real(fd, target, bytes, offset);
}
ssize_t pread64(int fd, void *target, size_t bytes, off_t offset) { return pread(fd, target, bytes, offset); }

int io_uring_queue_init_params(unsigned entries, struct io_uring *ring, struct io_uring_params *parameters) {
    const char *fault = getenv("FAULT");
    if (fault && !strcmp(fault, "forbidden")) return -EPERM;
    void *liburing = dlopen("liburing.so.2", RTLD_LAZY | RTLD_NOLOAD);
    int (*real)(unsigned, struct io_uring *, struct io_uring_params *) =
        (int (*)(unsigned, struct io_uring *, struct io_uring_params *))dlsym(liburing, "io_uring_queue_init_params");
    return real(entries, ring, parameters);
}

unsigned io_uring_peek_batch_cqe(struct io_uring *ring, struct io_uring_cqe **cqes, unsigned count) {
    static unsigned (*real)(struct io_uring *, struct io_uring_cqe **, unsigned);
    if (!real) { /* Python loads liburing with local symbols: RTLD_NEXT does not see it */
        void *liburing = dlopen("liburing.so.2", RTLD_LAZY | RTLD_NOLOAD);
        real = (unsigned (*)(struct io_uring *, struct io_uring_cqe **, unsigned))dlsym(liburing,
                                                                                        "io_uring_peek_batch_cqe");
    }
    unsigned got = real(ring, cqes, count);
    const char *fault = getenv("FAULT");
    for (unsigned i = 0; i < got; i++) {
        if (fault && !strcmp(fault, "unsupported")) cqes[i]->res = -EOPNOTSUPP;
        if (cqes[i]->res <= 0) continue;
        if (cqes[i]->res > 4096 && due("short")) cqes[i]->res = cqes[i]->res / 2 / 512 * 512;
        if (due("eintr")) cqes[i]->res = -EINTR;
        if (due("eagain")) cqes[i]->res = -EAGAIN;
        if (due("eio")) cqes[i]->res = -EIO;
    }
    /* completions of a batch in reverse: nobody may rely on their order */
    for (unsigned i = 0; i + 1 < got - i; i++) {
        struct io_uring_cqe swap = *cqes[i];
        *cqes[i] = *cqes[got - 1 - i];
        *cqes[got - 1 - i] = swap;
    }
    return got;
}
