#define _GNU_SOURCE
#include "pread_pool.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ALIGNMENT = 4096, MOST_RETRIES = 100, NONE = -1 };

typedef struct {
    fomoe_read read;
    int32_t error, next;
} operation;

typedef struct {
    int32_t first, last;
} queue;

struct fomoe_pread_pool {
    int *descriptors;
    uint64_t *file_bytes;
    int files, threads, started, direct, stop;
    pthread_t *thread;
    pthread_mutex_t mutex;
    pthread_cond_t work, finished;
    operation *operations;
    int32_t capacity, free_list, outstanding; /* outstanding: submitted and not yet reaped */
    queue waiting[2], done;
    fomoe_pread_counters counters;
};

static void push(fomoe_pread_pool *pool, queue *q, int32_t i) {
    pool->operations[i].next = NONE;
    if (q->last >= 0)
        pool->operations[q->last].next = i;
    else
        q->first = i;
    q->last = i;
}

static int32_t pop(fomoe_pread_pool *pool, queue *q) {
    int32_t i = q->first;
    if (i < 0) return NONE;
    q->first = pool->operations[i].next;
    if (q->first < 0) q->last = NONE;
    return i;
}

/* The whole read, short ones continued; 0 or a negative errno, *done says how far it came. */
static int read_fully(fomoe_pread_pool *pool, const fomoe_read *r, uint64_t *done, uint64_t *shorts, uint64_t *retries) {
    uint64_t end = r->offset + r->bytes < pool->file_bytes[r->file] ? r->offset + r->bytes : pool->file_bytes[r->file];
    uint64_t wanted = end - r->offset;
    int tries = 0;
    *done = 0;
    while (*done < wanted) {
        uint64_t size = wanted - *done;
        if (pool->direct) size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        ssize_t n = pread(pool->descriptors[r->file], r->target + *done, size, r->offset + *done);
        if (n == 0) return -ENODATA;
        if (n < 0) {
            if ((errno != EINTR && errno != EAGAIN) || ++tries > MOST_RETRIES) return -errno;
            ++*retries;
            continue;
        }
        *done += n;
        if (*done >= wanted) break;
        ++*shorts;
        if (++tries > MOST_RETRIES) return -EIO;
        if (pool->direct) *done = *done / ALIGNMENT * ALIGNMENT;
    }
    return 0;
}

static void *thread_main(void *argument) {
    fomoe_pread_pool *pool = argument;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        int32_t i = pop(pool, &pool->waiting[0]);
        if (i < 0) i = pop(pool, &pool->waiting[1]);
        if (i < 0) {
            if (pool->stop) break;
            pthread_cond_wait(&pool->work, &pool->mutex);
            continue;
        }
        fomoe_read read = pool->operations[i].read; /* the table may move while the lock is away */
        pthread_mutex_unlock(&pool->mutex);
        uint64_t done, shorts = 0, retries = 0;
        int error = read_fully(pool, &read, &done, &shorts, &retries);
        pthread_mutex_lock(&pool->mutex);
        pool->operations[i].error = error;
        pool->counters.bytes += done;
        pool->counters.short_reads += shorts;
        pool->counters.retries += retries;
        if (error) {
            pool->counters.errors++;
            pool->counters.error_file = read.file;
            pool->counters.error_offset = read.offset + done;
            pool->counters.error_code = -error;
        }
        push(pool, &pool->done, i);
        pthread_cond_signal(&pool->finished);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

static int reserve(fomoe_pread_pool *pool, int count) {
    if (pool->outstanding + count <= pool->capacity) return 0;
    int32_t capacity = pool->capacity ? pool->capacity : 256;
    while (capacity < pool->outstanding + count) capacity *= 2;
    operation *operations = realloc(pool->operations, capacity * sizeof *operations);
    if (!operations) return -ENOMEM;
    pool->operations = operations;
    for (int32_t i = capacity - 1; i >= pool->capacity; i--) {
        operations[i].next = pool->free_list;
        pool->free_list = i;
    }
    pool->capacity = capacity;
    return 0;
}

static int submit(void *self, const fomoe_read *reads, int count) {
    fomoe_pread_pool *pool = self;
    int error = 0;
    pthread_mutex_lock(&pool->mutex);
    for (int i = 0; i < count && !error; i++)
        if (reads[i].file >= pool->files || reads[i].offset >= pool->file_bytes[reads[i].file] || !reads[i].bytes) {
            pool->counters.errors++;
            pool->counters.error_file = reads[i].file < pool->files ? reads[i].file : pool->files - 1;
            pool->counters.error_offset = reads[i].offset;
            pool->counters.error_code = EINVAL;
            error = -EINVAL;
        }
    if (!error) error = reserve(pool, count);
    for (int i = 0; i < count && !error; i++) {
        int32_t index = pool->free_list;
        pool->free_list = pool->operations[index].next;
        pool->operations[index].read = reads[i];
        push(pool, &pool->waiting[reads[i].priority != 0], index);
        pool->outstanding++;
        pool->counters.reads++;
    }
    if (!error) pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    return error;
}

static int reap(void *self, fomoe_completion *completions, int most, int wait) {
    fomoe_pread_pool *pool = self;
    int count = 0;
    pthread_mutex_lock(&pool->mutex);
    while (wait && pool->done.first < 0 && pool->outstanding) pthread_cond_wait(&pool->finished, &pool->mutex);
    while (count < most) {
        int32_t i = pop(pool, &pool->done);
        if (i < 0) break;
        completions[count++] = (fomoe_completion){pool->operations[i].read.tag, pool->operations[i].error};
        pool->operations[i].next = pool->free_list;
        pool->free_list = i;
        pool->outstanding--;
    }
    pthread_mutex_unlock(&pool->mutex);
    return count;
}

/* Take a read out of the prefetch queue; its index, or NONE. */
static int32_t unqueue(fomoe_pread_pool *pool, uint64_t tag) {
    queue *q = &pool->waiting[1];
    for (int32_t i = q->first, previous = NONE; i >= 0; previous = i, i = pool->operations[i].next) {
        if (pool->operations[i].read.tag != tag) continue;
        if (previous < 0)
            q->first = pool->operations[i].next;
        else
            pool->operations[previous].next = pool->operations[i].next;
        if (q->last == i) q->last = previous;
        return i;
    }
    return NONE;
}

static void promote(void *self, uint64_t tag) {
    fomoe_pread_pool *pool = self;
    pthread_mutex_lock(&pool->mutex);
    int32_t i = unqueue(pool, tag);
    if (i >= 0) push(pool, &pool->waiting[0], i);
    pthread_mutex_unlock(&pool->mutex);
}

static void cancel(void *self, uint64_t tag) {
    fomoe_pread_pool *pool = self;
    pthread_mutex_lock(&pool->mutex);
    int32_t i = unqueue(pool, tag);
    if (i >= 0) {
        pool->operations[i].error = -ECANCELED;
        push(pool, &pool->done, i);
        pthread_cond_signal(&pool->finished);
    }
    pthread_mutex_unlock(&pool->mutex);
}

fomoe_pread_pool *fomoe_pread_pool_new(const int *descriptors, const uint64_t *file_bytes, int files, int threads,
                                       int direct) {
    fomoe_pread_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    pool->files = files;
    pool->direct = direct;
    pool->free_list = NONE;
    pool->waiting[0] = pool->waiting[1] = pool->done = (queue){NONE, NONE};
    pool->descriptors = malloc((files + 1) * sizeof *descriptors);
    pool->file_bytes = malloc((files + 1) * sizeof *file_bytes);
    pool->thread = calloc(threads, sizeof *pool->thread);
    if (!pool->descriptors || !pool->file_bytes || !pool->thread) goto fail;
    memcpy(pool->descriptors, descriptors, files * sizeof *descriptors);
    memcpy(pool->file_bytes, file_bytes, files * sizeof *file_bytes);
    for (; pool->started < threads; pool->started++)
        if (pthread_create(&pool->thread[pool->started], NULL, thread_main, pool)) goto fail;
    return pool;
fail:
    fomoe_pread_pool_free(pool);
    return NULL;
}

void fomoe_pread_pool_free(fomoe_pread_pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    pool->stop = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->thread[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->finished);
    free(pool->descriptors);
    free(pool->file_bytes);
    free(pool->thread);
    free(pool->operations);
    free(pool);
}

void fomoe_pread_pool_table(fomoe_pread_pool *pool, fomoe_reader *table) {
    *table = (fomoe_reader){.self = pool, .submit = submit, .reap = reap, .promote = promote, .cancel = cancel};
}

fomoe_pread_counters fomoe_pread_pool_count(fomoe_pread_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    fomoe_pread_counters counters = pool->counters;
    pthread_mutex_unlock(&pool->mutex);
    return counters;
}
