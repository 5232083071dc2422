#define _GNU_SOURCE
#include "mmap_reader.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct fomoe_mmap_reader {
    int files, depth, first, waiting;
    uint8_t **maps;
    uint64_t *file_bytes;
    fomoe_read *reads; /* a circle of depth */
};

static int submit(void *self, const fomoe_read *reads, int count) {
    fomoe_mmap_reader *m = self;
    if (m->waiting + count > m->depth) return -EBUSY;
    for (int i = 0; i < count; i++)
        if (reads[i].file >= m->files || reads[i].offset >= m->file_bytes[reads[i].file]) return -EINVAL;
    for (int i = 0; i < count; i++) m->reads[(m->first + m->waiting++) % m->depth] = reads[i];
    return 0;
}

static int reap(void *self, fomoe_completion *completions, int max, int wait) {
    fomoe_mmap_reader *m = self;
    (void)wait;
    if (!m->waiting || !max) return 0;
    const fomoe_read *r = &m->reads[m->first];
    uint64_t left = m->file_bytes[r->file] - r->offset;
    memcpy(r->target, m->maps[r->file] + r->offset, r->bytes < left ? r->bytes : left);
    completions[0] = (fomoe_completion){.tag = r->tag};
    m->first = (m->first + 1) % m->depth;
    m->waiting--;
    return 1;
}

static void ignore(void *self, uint64_t tag) {
    (void)self;
    (void)tag;
}

static int wait_for(void *self, int milliseconds) {
    (void)self;
    (void)milliseconds;
    return 1;
}

int fomoe_mmap_reader_new(const int *descriptors, const uint64_t *file_bytes, int files, int depth, int random_access,
                          fomoe_mmap_reader **result) {
    fomoe_mmap_reader *m = calloc(1, sizeof *m);
    int error = ENOMEM;
    if (!m) return -ENOMEM;
    m->depth = depth;
    m->maps = calloc(files + 1, sizeof *m->maps);
    m->file_bytes = malloc((files + 1) * sizeof *m->file_bytes);
    m->reads = calloc(depth + 1, sizeof *m->reads);
    if (!m->maps || !m->file_bytes || !m->reads) goto fail;
    memcpy(m->file_bytes, file_bytes, files * sizeof *file_bytes);
    for (; m->files < files; m->files++) {
        uint8_t *map = mmap(NULL, file_bytes[m->files], PROT_READ, MAP_PRIVATE, descriptors[m->files], 0);
        if (map == MAP_FAILED) {
            error = errno;
            goto fail;
        }
        m->maps[m->files] = map;
        if (random_access) madvise(map, file_bytes[m->files], MADV_RANDOM);
    }
    *result = m;
    return 0;
fail:
    fomoe_mmap_reader_free(m);
    return -error;
}

void fomoe_mmap_reader_free(fomoe_mmap_reader *m) {
    if (!m) return;
    for (int i = 0; i < m->files; i++) munmap(m->maps[i], m->file_bytes[i]);
    free(m->maps);
    free(m->file_bytes);
    free(m->reads);
    free(m);
}

void fomoe_mmap_reader_table(fomoe_mmap_reader *m, fomoe_reader *table) {
    *table = (fomoe_reader){
        .self = m, .submit = submit, .reap = reap, .promote = ignore, .cancel = ignore, .wait = wait_for};
}
