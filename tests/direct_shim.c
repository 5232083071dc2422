/* Preloaded by tests: file systems and drives that are choosy about direct I/O, for pread and for io_uring.
 *
 * DIRECT_BLOCK: direct reads and writes of regular files are refused (EINVAL) unless they begin and end at its
 * multiples; 0: all of them are, as some FUSE file systems do.  DIRECT_STATED: what statx tells, "silent" nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int ring_files[1024];

static int refused(int fd, uint64_t bytes, uint64_t offset) {
    const char *text = getenv("DIRECT_BLOCK");
    struct stat status;
    int flags = fcntl(fd, F_GETFL);
    if (!text || flags < 0 || !(flags & O_DIRECT) || fstat(fd, &status) || !S_ISREG(status.st_mode)) return 0;
    uint64_t block = strtoull(text, NULL, 10);
    return !block || bytes % block || offset % block;
}

static uint64_t total(const struct iovec *vectors, int count) {
    uint64_t sum = 0;
    for (int i = 0; i < count; i++) sum += vectors[i].iov_len;
    return sum;
}

#define CHOOSY(type, name, arguments, names, bytes)                   \
    type name arguments {                                             \
        static type(*real) arguments;                                 \
        if (!real) real = (type(*) arguments)dlsym(RTLD_NEXT, #name); \
        if (refused(fd, bytes, offset)) return errno = EINVAL, -1;    \
        return real names;                                            \
    }
CHOOSY(ssize_t, pread, (int fd, void *target, size_t size, off_t offset), (fd, target, size, offset), size)
CHOOSY(ssize_t, pread64, (int fd, void *target, size_t size, off_t offset), (fd, target, size, offset), size)
CHOOSY(ssize_t, preadv, (int fd, const struct iovec *v, int n, off_t offset), (fd, v, n, offset), total(v, n))
CHOOSY(ssize_t, preadv64, (int fd, const struct iovec *v, int n, off_t offset), (fd, v, n, offset), total(v, n))
CHOOSY(ssize_t, preadv2, (int fd, const struct iovec *v, int n, off_t offset, int f), (fd, v, n, offset, f),
       total(v, n))
CHOOSY(ssize_t, preadv64v2, (int fd, const struct iovec *v, int n, off_t offset, int f), (fd, v, n, offset, f),
       total(v, n))
CHOOSY(ssize_t, pwritev, (int fd, const struct iovec *v, int n, off_t offset), (fd, v, n, offset), total(v, n))
CHOOSY(ssize_t, pwritev64, (int fd, const struct iovec *v, int n, off_t offset), (fd, v, n, offset), total(v, n))
CHOOSY(ssize_t, pwritev2, (int fd, const struct iovec *v, int n, off_t offset, int f), (fd, v, n, offset, f),
       total(v, n))
CHOOSY(ssize_t, pwritev64v2, (int fd, const struct iovec *v, int n, off_t offset, int f), (fd, v, n, offset, f),
       total(v, n))

int statx(int directory, const char *restrict path, int flags, unsigned mask, struct statx *restrict found) {
    static int (*real)(int, const char *restrict, int, unsigned, struct statx *restrict);
    const char *stated = getenv("DIRECT_STATED");
    if (!real)
        real = (int (*)(int, const char *restrict, int, unsigned, struct statx *restrict))dlsym(RTLD_NEXT, "statx");
    int error = real(directory, path, flags, mask, found);
    if (error || !stated || !(mask & 0x2000)) return error;
    found->stx_mask &= ~0x2000u;
    if (!strcmp(stated, "silent")) return 0;
    found->stx_mask |= 0x2000u;
    uint32_t words[2] = {512, (uint32_t)strtoul(stated, NULL, 10)}; /* of memory, of offsets */
    memcpy((char *)found + 152, words, sizeof words);
    return 0;
}

static void *liburing_symbol(const char *name) { /* Python loads liburing with local symbols */
    return dlsym(dlopen("liburing.so.2", RTLD_LAZY | RTLD_NOLOAD), name);
}

int io_uring_register_files(struct io_uring *ring, const int *files, unsigned count) {
    for (unsigned i = 0; i < count && i < 1024; i++) ring_files[i] = files[i];
    return ((int (*)(struct io_uring *, const int *, unsigned))liburing_symbol("io_uring_register_files"))(ring, files,
                                                                                                           count);
}

int io_uring_submit(struct io_uring *ring) {
    static int (*real)(struct io_uring *);
    if (!real) real = (int (*)(struct io_uring *))liburing_symbol("io_uring_submit");
    for (unsigned i = ring->sq.sqe_head; i != ring->sq.sqe_tail; i++) {
        struct io_uring_sqe *sqe = &ring->sq.sqes[i & *ring->sq.kring_mask];
        if (sqe->flags & IOSQE_FIXED_FILE && refused(ring_files[sqe->fd], sqe->len, sqe->off))
            sqe->opcode = 255; /* the kernel answers EINVAL */
    }
    return real(ring);
}
