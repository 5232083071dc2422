#define _GNU_SOURCE
#include "pread_pool.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    fomoe_pread_pool *pool;
    int drive;
    pthread_t thread;
} worker;

struct fomoe_pread_pool {
    pthread_mutex_t mutex;    /* guards the table and stop */
    pthread_cond_t *work;     /* of each drive */
    pthread_cond_t finished;
    fomoe_read_table *table;
    int *descriptors;
    int drives, write, started, stop;
    pid_t process; /* the threads' */
    worker *workers;
};

/* Whoever starts a piece wakes the next. */
static void wake(fomoe_pread_pool *pool, int drive) {
    if (fomoe_read_table_ready(pool->table, drive)) pthread_cond_signal(&pool->work[drive]);
}

static void *worker_main(void *argument) {
    worker *w = argument;
    fomoe_pread_pool *pool = w->pool;
    pthread_mutex_lock(&pool->mutex);
    while (!pool->stop) {
        int32_t index = fomoe_read_table_start(pool->table, w->drive);
        if (index < 0) {
            pthread_cond_wait(&pool->work[w->drive], &pool->mutex);
            continue;
        }
        const fomoe_piece *p = fomoe_read_table_piece(pool->table, index);
        wake(pool, w->drive); /* one answer or one long read may have made room or work for several */
        pthread_mutex_unlock(&pool->mutex);
        int fd = pool->descriptors[p->file];
        uint8_t *target = p->target + p->done;
        size_t bytes = p->asked - p->done;
        uint64_t offset = p->offset + p->done;
        ssize_t n = pool->write ? pwrite(fd, target, bytes, offset) : pread(fd, target, bytes, offset);
        int32_t result = n < 0 ? -errno : (int32_t)n;
        pthread_mutex_lock(&pool->mutex);
        fomoe_read_table_finish(pool->table, index, result);
        for (int d = 0; d < pool->drives; d++) wake(pool, d);
        if (fomoe_read_table_done(pool->table)) pthread_cond_signal(&pool->finished);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

static int submit(void *self, const fomoe_read *reads, int count) {
    fomoe_pread_pool *pool = self;
    pthread_mutex_lock(&pool->mutex);
    int error = fomoe_read_table_submit(pool->table, reads, count);
    for (int d = 0; d < pool->drives && !error; d++)
        if (count == 1 && pool->drives == 1)
            pthread_cond_signal(&pool->work[d]);
        else
            pthread_cond_broadcast(&pool->work[d]);
    pthread_mutex_unlock(&pool->mutex);
    return error;
}

static int reap(void *self, fomoe_completion *completions, int max, int wait) {
    fomoe_pread_pool *pool = self;
    pthread_mutex_lock(&pool->mutex);
    while (wait && !fomoe_read_table_done(pool->table) && fomoe_read_table_left(pool->table))
        pthread_cond_wait(&pool->finished, &pool->mutex);
    int count = fomoe_read_table_collect(pool->table, completions, max);
    pthread_mutex_unlock(&pool->mutex);
    return count;
}

static int wait_for(void *self, int milliseconds) {
    fomoe_pread_pool *pool = self;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += milliseconds % 1000 * 1000000L;
    until.tv_sec += milliseconds / 1000 + until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&pool->mutex);
    int has_answer, error = 0;
    while (!(has_answer = fomoe_read_table_done(pool->table) || !fomoe_read_table_left(pool->table)) && !error)
        error = pthread_cond_timedwait(&pool->finished, &pool->mutex, &until);
    pthread_mutex_unlock(&pool->mutex);
    return has_answer;
}

static void promote(void *self, uint64_t tag) {
    fomoe_pread_pool *pool = self;
    pthread_mutex_lock(&pool->mutex);
    fomoe_read_table_promote(pool->table, tag);
    for (int d = 0; d < pool->drives; d++) wake(pool, d); /* a demand need not wait until the drive is nearly empty */
    pthread_mutex_unlock(&pool->mutex);
}

static void cancel(void *self, uint64_t tag) {
    fomoe_pread_pool *pool = self;
    pthread_mutex_lock(&pool->mutex);
    fomoe_read_table_cancel(pool->table, tag);
    pthread_mutex_unlock(&pool->mutex);
}

int fomoe_pread_pool_new(const fomoe_read_options *options, const int *descriptors, int threads, int write,
                         fomoe_pread_pool **result) {
    int total = threads * options->drives, error = -ENOMEM;
    fomoe_pread_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return -ENOMEM;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&pool->finished, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pool->process = getpid();
    pool->drives = options->drives;
    pool->write = write;
    pool->table = fomoe_read_table_new(options);
    pool->descriptors = malloc((options->files + 1) * sizeof *descriptors);
    pool->work = calloc(options->drives + 1, sizeof *pool->work);
    pool->workers = calloc(total + 1, sizeof *pool->workers);
    if (!pool->table || !pool->descriptors || !pool->work || !pool->workers) goto fail;
    memcpy(pool->descriptors, descriptors, options->files * sizeof *descriptors);
    for (int d = 0; d < options->drives; d++) pthread_cond_init(&pool->work[d], NULL);
    for (; pool->started < total; pool->started++) {
        worker *w = &pool->workers[pool->started];
        w->pool = pool;
        w->drive = pool->started % options->drives;
        if ((error = -pthread_create(&w->thread, NULL, worker_main, w))) goto fail;
    }
    *result = pool;
    return 0;
fail:
    fomoe_pread_pool_free(pool);
    return error;
}

void fomoe_pread_pool_free(fomoe_pread_pool *pool) {
    if (!pool || pool->process != getpid()) return; /* after a fork: no threads to stop, and a mutex in any state */
    pthread_mutex_lock(&pool->mutex);
    pool->stop = 1;
    for (int d = 0; d < pool->drives && pool->started; d++) pthread_cond_broadcast(&pool->work[d]);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
    for (int d = 0; d < pool->drives && pool->work; d++) pthread_cond_destroy(&pool->work[d]);
    pthread_cond_destroy(&pool->finished);
    pthread_mutex_destroy(&pool->mutex);
    fomoe_read_table_free(pool->table);
    free(pool->descriptors);
    free(pool->work);
    free(pool->workers);
    free(pool);
}

void fomoe_pread_pool_table(fomoe_pread_pool *pool, fomoe_reader *table) {
    *table = (fomoe_reader){
        .self = pool, .submit = submit, .reap = reap, .promote = promote, .cancel = cancel, .wait = wait_for};
}

fomoe_read_counters fomoe_pread_pool_count(fomoe_pread_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    fomoe_read_counters counters = *fomoe_read_table_count(pool->table);
    pthread_mutex_unlock(&pool->mutex);
    return counters;
}
