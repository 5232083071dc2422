/* The paced reader on a clock of its own, over a reader that has every byte `slow_ns` after it was asked, built by
 * tests/fakes/pace.py. */
#define FOMOE_CLOCK_H /* in place of csrc/read/clock.h */
#include <stdint.h>
#include <time.h>

static uint64_t clock_ns;
static uint64_t fomoe_now_ns(void) { return clock_ns += 10; } /* who spins gets on */
static int fake_sleep(const struct timespec *time, struct timespec *left) {
    (void)left;
    clock_ns += time->tv_sec * 1000000000ULL + time->tv_nsec;
    return 0;
}
#define nanosleep fake_sleep
#include "../../fomoe_io/csrc/read/paced_reader.c"
#undef nanosleep

enum { MOST_READS = 1024 };

typedef struct {
    uint64_t tag, due_ns;
    int32_t error;
} fake_read;

static struct {
    fake_read reads[MOST_READS];
    int count, cancels, promotes;
    uint64_t slow_ns;
} fake;

static int fake_submit(void *self, const fomoe_read *reads, int count) {
    (void)self;
    for (int i = 0; i < count; i++) {
        if (reads[i].offset) return -EINVAL;
        fake.reads[fake.count++] = (fake_read){reads[i].tag, clock_ns + fake.slow_ns, 0};
    }
    return 0;
}

static int fake_reap(void *self, fomoe_completion *completions, int max, int wait) {
    int taken = 0, kept = 0;
    (void)self, (void)wait;
    for (int i = 0; i < fake.count; i++)
        if (fake.reads[i].due_ns <= clock_ns && taken < max)
            completions[taken++] = (fomoe_completion){fake.reads[i].tag, fake.reads[i].error};
        else
            fake.reads[kept++] = fake.reads[i];
    fake.count = kept;
    return taken;
}

static void fake_promote(void *self, uint64_t tag) { (void)self, (void)tag, fake.promotes++; }

static void fake_cancel(void *self, uint64_t tag) {
    (void)self, fake.cancels++;
    for (int i = 0; i < fake.count; i++)
        if (fake.reads[i].tag == tag) fake.reads[i].error = -ECANCELED;
}

static int fake_wait(void *self, int milliseconds) {
    (void)self;
    clock_ns += milliseconds * 10000ULL;
    return 1;
}

static fomoe_reader inner = {NULL, fake_submit, fake_reap, fake_promote, fake_cancel, fake_wait};

static fomoe_paced_reader *paced;
static fomoe_reader table;

int fake_pace_open(double bandwidth, uint64_t latency_ns, int depth, uint64_t slow_ns) {
    fake.count = fake.cancels = fake.promotes = 0;
    fake.slow_ns = slow_ns;
    paced = fomoe_paced_reader_new(&inner, bandwidth, latency_ns, depth, NULL);
    if (paced) fomoe_paced_reader_table(paced, &table);
    clock_ns = 0;
    return paced != NULL;
}

void fake_pace_close(void) { fomoe_paced_reader_free(paced); }
uint64_t fake_pace_clock(void) { return clock_ns; }
void fake_pace_pass(uint64_t ns) { clock_ns += ns; }
int fake_pace_cancels(void) { return fake.cancels; }
uint64_t fake_pace_late(void) { return fomoe_paced_reader_count(paced)->late; }

int fake_pace_submit(uint64_t tag, uint32_t bytes, int priority, uint64_t offset) {
    fomoe_read read = {.tag = tag, .offset = offset, .bytes = bytes, .priority = priority};
    return table.submit(table.self, &read, 1);
}

/* One completion; 0: none. */
int fake_pace_reap(int wait, uint64_t *tag, int32_t *error) {
    fomoe_completion done;
    int count = table.reap(table.self, &done, 1, wait);
    if (count > 0) *tag = done.tag, *error = done.error;
    return count;
}

void fake_pace_promote(uint64_t tag) { table.promote(table.self, tag); }
void fake_pace_cancel(uint64_t tag) { table.cancel(table.self, tag); }
